"""Cross-products of carried columns: per group and in total; they add over rows, files and days.

For the carried columns F (n, k) of some rows and the random ones among them, W (n, q):
``WtF`` per group and ``FtF`` in total are all that a linear mixed model needs of its rows
(Bates et al. 2015, Journal of Statistical Software 67(1), section 5.2, grouped by level).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import _sparsetools  # type: ignore[attr-defined]

from dmixed.blocks import CONSTANT, Column, DesignBlock, Floats, Frame

Index: TypeAlias = NDArray[np.intp]

CHUNK = 16_384
"""Rows turned into carried columns at a time: the block stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Moments of a set of groups; a commutative monoid under alignment and addition.

    Attributes
    ----------
    columns
        labels of the k carried columns
    random
        positions of the q random columns among them, the constant first
    frame
        shifts and scales of the variables
    WtF
        (G, q, k), dimensionless (products of shifted and scaled columns)
    FtF
        (k, k), the same summed over all rows
    plain
        (k, k), FtF without the row weights; the same array where there are none
    counts
        (G,) rows of each group
    log_weights
        sum of log(weight) over the rows
    """

    columns: tuple[Column, ...]
    random: tuple[int, ...]
    frame: Frame
    WtF: Floats
    FtF: Floats
    plain: Floats
    counts: NDArray[np.int64]
    log_weights: float

    def __post_init__(self) -> None:
        k, q, G = len(self.columns), len(self.random), len(self.counts)
        assert self.WtF.shape == (G, q, k)
        assert self.FtF.shape == self.plain.shape == (k, k)
        assert self.columns[self.random[0]] == CONSTANT

    @property
    def n_groups(self) -> int:
        """Number of groups, G."""
        return len(self.counts)

    @property
    def nobs(self) -> int:
        """Number of rows."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays, in bytes."""
        return int(self.WtF.nbytes + self.counts.nbytes + 2 * self.FtF.nbytes)

    def __add__(self, other: GroupMoments) -> GroupMoments:
        """Moments of both sets of rows, for the same groups in the same order."""
        if self.n_groups != other.n_groups:
            raise ValueError("align the groups first: GroupMoments add group by group")
        same = np.arange(self.n_groups)
        return combine([self, other], [same, same], self.n_groups)


def carried_columns(block: DesignBlock, rows: slice) -> Floats:
    """Carried columns F (m, k) of some rows of a block, unweighted."""
    m = len(range(*rows.indices(block.nobs)))
    shifted = [
        (x[rows] - shift) * (1.0 / scale)
        for x, shift, scale in zip(block.values, block.frame.shift, block.frame.scale, strict=True)
    ]
    F = np.empty((m, len(block.recipes)))
    for j, recipe in enumerate(block.recipes):
        column: Floats | float = 1.0
        for v, power in recipe.powers:
            factor = shifted[v] if power == 1 else shifted[v] ** power
            column = factor if isinstance(column, float) else column * factor
        if recipe.cells >= 0:
            column = (block.cells[recipe.cells][rows] == recipe.code) * column
        F[:, j] = column
    return F


def accumulate(block: DesignBlock) -> GroupMoments:
    """Moments of one batch of rows: the only code that ever touches rows."""
    k, q, G, n = len(block.columns), len(block.random), block.n_groups, block.nobs
    WtF, FtF, plain = np.zeros((G, q, k)), np.zeros((k, k)), np.zeros((k, k))
    random = list(block.random)
    indptr = np.arange(0, CHUNK * q + 1, q, dtype=np.int32)
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        F = carried_columns(block, rows)
        if block.weights is not None:
            plain += F.T @ F
            F *= np.sqrt(block.weights[rows])[:, None]
        FtF += F.T @ F
        m = len(F)
        # W as a sparse (G q, m) matrix, q entries a row of data, times F, added in place:
        # scipy's kernel releases the GIL and needs no (G, q, k) temporary for each chunk.
        where = np.ascontiguousarray(block.group[rows], dtype=np.int32)[:, None] * np.int32(q)
        indices = (where + np.arange(q, dtype=np.int32)).ravel()
        data = np.ascontiguousarray(F[:, random]).ravel()
        _sparsetools.csc_matvecs(
            G * q, m, k, indptr[: m + 1], indices, data, F.ravel(), WtF.reshape(-1)
        )
    return GroupMoments(
        columns=block.columns,
        random=block.random,
        frame=block.frame,
        WtF=WtF,
        FtF=FtF,
        plain=FtF if block.weights is None else plain,
        counts=np.bincount(block.group, minlength=G).astype(np.int64),
        log_weights=0.0 if block.weights is None else float(np.log(block.weights).sum()),
    )


def combine(
    parts: Sequence[GroupMoments], positions: Sequence[Index], n_groups: int
) -> GroupMoments:
    """Sum of moments: union of the columns, group g of part i added at ``positions[i][g]``.

    All parts are first brought to the frame of the first one, which is linear and exact.
    """
    first = parts[0]
    parts = [first, *(reframe(part, first.frame) for part in parts[1:])]
    columns = _union(parts)
    random_labels = {part.columns[j] for part in parts for j in part.random}
    random = tuple(j for j, column in enumerate(columns) if column in random_labels)
    k, q = len(columns), len(random)
    WtF, FtF = np.zeros((n_groups, q, k)), np.zeros((k, k))
    weighted = any(part.plain is not part.FtF for part in parts)
    plain = np.zeros((k, k)) if weighted else FtF
    counts = np.zeros(n_groups, dtype=np.int64)
    place = {column: j for j, column in enumerate(columns)}
    random_place = {columns[j]: a for a, j in enumerate(random)}
    for part, position in zip(parts, positions, strict=True):
        to_k = [place[column] for column in part.columns]
        to_q = [random_place[part.columns[j]] for j in part.random]
        if to_k == list(range(k)) and to_q == list(range(q)):
            WtF[position] += part.WtF
        else:
            WtF[np.ix_(position, to_q, to_k)] += part.WtF
        FtF[np.ix_(to_k, to_k)] += part.FtF
        if weighted:
            plain[np.ix_(to_k, to_k)] += part.plain
        counts[position] += part.counts
    log_weights = float(sum(part.log_weights for part in parts))
    return GroupMoments(columns, random, first.frame, WtF, FtF, plain, counts, log_weights)


def _union(parts: Sequence[GroupMoments]) -> tuple[Column, ...]:
    """All columns of the parts, in an order that does not depend on the order of the parts."""
    first = parts[0].columns
    if all(part.columns == first for part in parts):
        return first

    def key(column: Column) -> tuple[object, ...]:
        factors = tuple(factor for factor, _ in column.cell)
        degree = sum(power for _, power in column.powers)
        levels = tuple(level for _, level in column.cell)
        return len(factors), degree, factors, column.powers, levels

    return tuple(sorted({c for part in parts for c in part.columns}, key=key))


def reframe(moments: GroupMoments, frame: Frame) -> GroupMoments:
    """The same moments about other shifts and scales: a linear recoding, exact in exact arithmetic.

    ``v = (s_old u + m_old - m_new) / s_new``; a product of powers expands by the binomial
    theorem into lower margins, which are always carried.
    """
    if moments.frame == frame:
        return moments
    T = frame_change(moments.columns, moments.frame, frame)
    T_random = T[np.ix_(moments.random, moments.random)]
    WtF = np.einsum("ab,gac->gbc", T_random, moments.WtF @ T, optimize=True)
    FtF = T.T @ moments.FtF @ T
    weighted = moments.plain is not moments.FtF
    return GroupMoments(
        columns=moments.columns,
        random=moments.random,
        frame=frame,
        WtF=WtF,
        FtF=FtF,
        plain=T.T @ moments.plain @ T if weighted else FtF,
        counts=moments.counts,
        log_weights=moments.log_weights,
    )


def frame_change(columns: tuple[Column, ...], old: Frame, new: Frame) -> Floats:
    """T (k, k) with F_new = F_old T for carried columns about two frames."""
    place = {column: j for j, column in enumerate(columns)}
    T = np.zeros((len(columns), len(columns)))
    for j, column in enumerate(columns):
        expansion: dict[tuple[tuple[str, int], ...], float] = {(): 1.0}
        for name, power in column.powers:
            (m_old, s_old), (m_new, s_new) = old.of(name), new.of(name)
            slope, intercept = s_old / s_new, (m_old - m_new) / s_new
            expansion = {
                (*powers, *(((name, r),) if r else ())): value
                * comb(power, r)
                * slope**r
                * intercept ** (power - r)
                for powers, value in expansion.items()
                for r in range(power + 1)
            }
        for powers, value in expansion.items():
            if value != 0.0:
                T[place[Column(column.cell, powers)], j] = value
    return T
