"""Counts of points in bins that add exactly: what a picture needs of rows or groups without end.

Bins are cells of a lattice through zero whose widths are powers of two, so that two of a bin make
one of the next width. Each sum has the finest width at which its points span no more bins than
asked for; what is found is the same however the points were divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats

PRECISION = 45
"""Bits of the largest value that its bin has at most: numbers of bins are exact."""

FINEST = -1000
"""Exponent of the width where all points are zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Binned:
    """How many points there are in each bin, and the sum of a value over them.

    Attributes
    ----------
    limits
        (d,) bins that the points may span along each axis
    exponents
        (d,): bins are 2**exponent wide, units of the axis
    bins
        (m, d) numbers of the bins that have points, in order; bin i is [i, i + 1) widths
    counts
        (m,) points
    sums
        (m,) sums of the value over the points
    """

    limits: tuple[int, ...]
    exponents: tuple[int, ...]
    bins: NDArray[np.int64]
    counts: NDArray[np.int64]
    sums: Floats

    def __post_init__(self) -> None:
        assert self.bins.shape == (len(self.counts), len(self.limits))
        assert len(self.exponents) == len(self.limits)
        assert len(self.sums) == len(self.counts)

    @classmethod
    def of(cls, points: Floats, limits: Sequence[int], values: Floats | None = None) -> Binned:
        """Bins of points (n, d), finite, with a value (n,) each."""
        columns, exponents = [], []
        for x, limit in zip(points.T, limits, strict=True):
            exponent = _finest(x, limit)
            columns.append(np.floor(np.ldexp(x, -exponent)).astype(np.int64))
            exponents.append(exponent)
        bins = np.stack(columns, axis=1)
        values = np.zeros(len(points)) if values is None else values
        ones = np.ones(len(points), np.int64)
        return cls(tuple(limits), tuple(exponents), *_gathered(bins, ones, values))._fitted()

    def __add__(self, other: Binned) -> Binned:
        """Bins of both sets of points."""
        if not isinstance(other, Binned):
            return NotImplemented
        assert self.limits == other.limits
        if not len(self.counts) or not len(other.counts):
            return other if not len(self.counts) else self
        widest = np.maximum(self.exponents, other.exponents)
        a, b = self._coarser(widest), other._coarser(widest)
        found = _gathered(
            np.concatenate([a.bins, b.bins]),
            np.concatenate([a.counts, b.counts]),
            np.concatenate([a.sums, b.sums]),
        )
        return Binned(self.limits, a.exponents, *found)._fitted()

    def _coarser(self, exponents: Sequence[int] | NDArray[np.int64]) -> Binned:
        """The same points in bins as wide or wider."""
        shift = np.minimum(np.subtract(exponents, self.exponents), 63)  # more is sign alone
        if not shift.any():
            return self
        found = _gathered(self.bins >> shift, self.counts, self.sums)
        return Binned(self.limits, tuple(int(e) for e in exponents), *found)

    def _fitted(self) -> Binned:
        """In the finest bins of which there are not too many."""
        if not len(self.counts):
            return self
        exponents = list(self.exponents)
        for axis, limit in enumerate(self.limits):
            low, high = int(self.bins[:, axis].min()), int(self.bins[:, axis].max())
            while high - low >= limit:
                low, high = low >> 1, high >> 1
                exponents[axis] += 1
        return self._coarser(exponents)

    @property
    def total(self) -> int:
        """Points in all."""
        return int(self.counts.sum())

    @property
    def widths(self) -> Floats:
        """(d,) widths of the bins."""
        return np.ldexp(1.0, np.asarray(self.exponents))

    @property
    def centres(self) -> Floats:
        """(m, d) middles of the bins."""
        return np.asarray((self.bins + 0.5) * self.widths)

    def quantiles(self, p: Floats) -> Floats:
        """Quantiles of points on one axis, evenly spread within each bin; off by a bin at most."""
        assert len(self.limits) == 1
        ends = np.cumsum(self.counts)
        at = np.clip(p, 0.0, 1.0) * ends[-1]
        i = np.minimum(np.searchsorted(ends, at, side="left"), len(ends) - 1)
        inside = np.clip((at - (ends[i] - self.counts[i])) / self.counts[i], 0.0, 1.0)
        return np.asarray((self.bins[i, 0] + inside) * self.widths[0])

    def means(self) -> Floats:
        """(m,) mean of the value in each bin."""
        return np.asarray(self.sums / self.counts)


def _finest(x: Floats, limit: int) -> int:
    """Exponent of the width that is fine enough for ``limit`` bins, or a little finer."""
    if not len(x):
        return FINEST
    largest = float(np.abs(x).max())
    least = int(np.frexp(largest)[1]) - PRECISION if largest > 0 else FINEST
    span = float(x.max() - x.min())
    wanted = int(np.frexp(span / limit)[1]) - 1 if span > 0 else FINEST
    return max(least, wanted, FINEST)


def _gathered(
    bins: NDArray[np.int64], counts: NDArray[np.int64], sums: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Each bin once, in order."""
    if not len(bins):
        return bins, counts, sums
    order = np.lexsort(bins.T[::-1])
    bins, counts, sums = bins[order], counts[order], sums[order]
    first = np.flatnonzero(np.append(True, (bins[1:] != bins[:-1]).any(axis=1)))
    return bins[first], np.add.reduceat(counts, first), np.add.reduceat(sums, first)
