"""Cross-products of carried columns: per group and in total; they add over rows, files and days.

For the carried columns F (n, k) of some rows and the random ones among them, W (n, q):
``WtF`` per group and ``FtF`` in total are all that a linear mixed model needs of its rows
(Bates et al. 2015, Journal of Statistical Software 67(1), section 5.2, grouped by level).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import _sparsetools

from dmixed.blocks import CONSTANT, Column, Floats, Frame, Recoding
from dmixed.references import CommonReferences, References, change_of_total, move, rounded
from dmixed.whitening import frame_change, matrix, original, recoded

Index: TypeAlias = NDArray[np.intp]

csc_matvecs: Any = _sparsetools.csc_matvecs  # Y += A X for sparse A; scipy has no public name

GROUPS = 4096
"""Groups summed over at a time: they stay in the processor's cache."""

FAR = 100.0
"""Standard deviations between a variable's mean and its shift that call for a better shift."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupMoments:
    """Moments of a set of groups; a commutative monoid under alignment and addition.

    The arrays are read-only: moments are shared by models and results.

    Attributes
    ----------
    columns
        labels of the k carried columns, as they were before any recoding
    random
        positions of the q random columns among them, the constant first
    frame
        shifts and scales of the variables
    WtF
        (G, q, k), dimensionless (products of shifted and scaled columns), about the references
    FtF
        (k, k), the same summed over all rows; `gram` is about zero
    plain
        (k, k), without row weights and about zero; the same array as FtF where there are no weights
    counts
        (G,) rows of each group
    log_weights
        sum of log(weight) over the rows
    reference
        (G, k) row of each group that is taken from its rows; None: zeros, see `references`
    recoding
        what the columns were recoded by before they were multiplied, see `whitening`
    """

    columns: tuple[Column, ...]
    random: tuple[int, ...]
    frame: Frame
    WtF: Floats
    FtF: Floats
    plain: Floats
    counts: NDArray[np.int64]
    log_weights: float
    reference: References | None = None
    recoding: Recoding | None = None

    def __post_init__(self) -> None:
        k, q, G = len(self.columns), len(self.random), len(self.counts)
        assert self.WtF.shape == (G, q, k)
        assert self.FtF.shape == self.plain.shape == (k, k)
        assert self.columns[self.random[0]] == CONSTANT
        for array in (self.WtF, self.FtF, self.plain, self.counts):
            array.flags.writeable = False
        if self.reference is not None:
            assert self.reference.shape == (G, k)
            assert self.reference.dtype == np.float32
            self.reference.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a call of the class: what arrives from a worker is read-only too."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

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
        own = 0 if self.reference is None else self.reference.nbytes
        return int(self.WtF.nbytes + self.counts.nbytes + 2 * self.FtF.nbytes + own)

    @property
    def gram(self) -> Floats:
        """(k, k): FtF about zero."""
        return np.asarray(self.FtF + self._change())

    @property
    def unweighted(self) -> Floats:
        """(k, k): FtF about zero, without row weights and recoding."""
        recoded = self.gram if self.plain is self.FtF else self.plain
        return original(self.recoding, self.columns, recoded)

    def coded(self, T: Floats) -> Floats:
        """Coefficients of the columns as they were summed, for those T (k, ...) of the columns."""
        return recoded(self.recoding, self.columns, T)

    @property
    def absolute(self) -> GroupMoments:
        """The same moments about zero."""
        if self.reference is None:
            return self
        WtF = self.WtF.copy()
        FtF = self.FtF + move(WtF, self.random, self.reference.astype(np.float64))
        plain = FtF if self.plain is self.FtF else self.plain
        return replace(self, WtF=WtF, FtF=FtF, plain=plain, reference=None)

    @property
    def totals(self) -> Totals:
        """What is known of all groups together."""
        return Totals(
            columns=self.columns,
            random=self.random,
            frame=self.frame,
            FtF=self.FtF,
            change=self._change(),
            plain=self.plain,
            between=self._between(),
            n_groups=self.n_groups,
            nobs=self.nobs,
            log_weights=self.log_weights,
            nbytes=self.nbytes,
            smallest=int(self.counts.min(initial=np.iinfo(np.int64).max)),
            largest=int(self.counts.max(initial=0)),
            weighted=self.plain is not self.FtF,
            recoding=self.recoding,
            referenced=self.reference is not None,
        )

    def _change(self) -> Floats:
        """(k, k): what FtF about zero has besides."""
        if self.reference is None:
            return np.zeros_like(self.FtF)
        return change_of_total(self.WtF, self.random, self.reference.astype(np.float64))

    def _between(self) -> Floats:
        """(k, k): sum over groups of s s' / n, s the sums of a group about its reference."""
        found = np.zeros((len(self.columns),) * 2)
        for start in range(0, self.n_groups, GROUPS):
            sums = self.WtF[start : start + GROUPS, 0]
            sums = sums / np.sqrt(sums[:, self.random[0]])[:, None]
            found += np.dot(sums.T, sums)
        return found

    def part(self, start: int, stop: int) -> GroupMoments:
        """Neighbouring groups; arrays are shared, and the sums over all rows stay as they are."""
        own = None if self.reference is None else self.reference[start:stop]
        WtF, counts = self.WtF[start:stop], self.counts[start:stop]
        return replace(self, WtF=WtF, counts=counts, reference=own)

    def take(self, groups: Index) -> GroupMoments:
        """Some of the groups, in this order; the sums over all rows stay as they are."""
        own = None if self.reference is None else self.reference.take(groups, axis=0)
        WtF, counts = self.WtF.take(groups, axis=0), self.counts.take(groups)
        return replace(self, WtF=WtF, counts=counts, reference=own)

    def __add__(self, other: GroupMoments) -> GroupMoments:
        """Moments of both sets of rows, for the same groups in the same order."""
        if not isinstance(other, GroupMoments):
            return NotImplemented
        if self.n_groups != other.n_groups:
            raise ValueError("align the groups first: GroupMoments add group by group")
        same = np.arange(self.n_groups)
        return combine([self, other], [same, same], self.n_groups)


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """Sums over all groups of some moments; kilobytes, whatever the number of groups.

    Every sum is one over shards in their order: the bits do not tell whether the sums over all
    rows are in the first of them, or spread.

    Attributes
    ----------
    columns, random, frame, FtF, plain, log_weights
        see `GroupMoments`
    change
        (k, k): what FtF about zero has besides
    between
        (k, k): sum over groups of s s' / n, s the sums of a group about its reference
    n_groups, nobs, nbytes
        groups, rows, bytes of their moments
    smallest, largest
        rows of the smallest and of the largest group
    recoding
        see `GroupMoments`
    weighted, referenced
        whether rows have weights, and groups references
    """

    columns: tuple[Column, ...]
    random: tuple[int, ...]
    frame: Frame
    FtF: Floats
    change: Floats
    plain: Floats
    between: Floats
    n_groups: int
    nobs: int
    log_weights: float
    nbytes: int
    smallest: int
    largest: int
    recoding: Recoding | None
    weighted: bool
    referenced: bool

    @property
    def gram(self) -> Floats:
        """(k, k): FtF about zero."""
        return np.asarray(self.FtF + self.change)

    @property
    def unweighted(self) -> Floats:
        """(k, k): FtF about zero, without row weights and recoding."""
        return original(self.recoding, self.columns, self.plain if self.weighted else self.gram)

    def coded(self, T: Floats) -> Floats:
        """Coefficients of the columns as they were summed, for those T (k, ...) of the columns."""
        return recoded(self.recoding, self.columns, T)

    def __add__(self, other: Totals) -> Totals:
        """Totals of both sets of groups, which have the same columns."""
        assert (self.columns, self.frame) == (other.columns, other.frame)
        names = ("FtF", "change", "plain", "between", "n_groups", "nobs")
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in (*names, "log_weights", "nbytes")
        }
        flags = {n: getattr(self, n) or getattr(other, n) for n in ("weighted", "referenced")}
        smallest, largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        return replace(self, **sums, **flags, smallest=smallest, largest=largest)


def combine(
    parts: Sequence[GroupMoments], positions: Sequence[Index], n_groups: int
) -> GroupMoments:
    """Sum of moments: union of the columns, group g of part i added at ``positions[i][g]``.

    All parts are first brought to the frame and the recoding of the first one, which is linear and
    exact, and the sums of a group to the reference it has in the first part that has the group.
    """
    first = parts[0]
    parts = [first, *(reframe(part, first.frame, first.recoding) for part in parts[1:])]
    columns = _union(parts)
    random_labels = {part.columns[j] for part in parts for j in part.random}
    random = tuple(j for j, column in enumerate(columns) if column in random_labels)
    k, q = len(columns), len(random)
    WtF, FtF, filled = np.empty((n_groups, q, k)), np.zeros((k, k)), 0
    weighted = any(part.plain is not part.FtF for part in parts)
    plain = np.zeros((k, k)) if weighted else FtF
    counts = np.zeros(n_groups, dtype=np.int64)
    place = {column: j for j, column in enumerate(columns)}
    random_place = {columns[j]: a for a, j in enumerate(random)}
    referenced = any(part.reference is not None for part in parts)
    common = CommonReferences(n_groups, k) if referenced else None
    for part, position in zip(parts, positions, strict=True):
        to_k = np.array([place[column] for column in part.columns], dtype=np.intp)
        to_q = np.array([random_place[part.columns[j]] for j in part.random], dtype=np.intp)
        own = part.WtF, part.FtF
        if common is not None:
            own = common.moved(*own, part.random, part.reference, position, to_k)
        same = np.array_equal(to_k, np.arange(k)) and np.array_equal(to_q, np.arange(q))
        if len(position):
            filled = _add_at(WtF, filled, position, own[0], None if same else (to_q, to_k))
        FtF[np.ix_(to_k, to_k)] += own[1]
        if weighted:
            plain[np.ix_(to_k, to_k)] += part.gram if part.plain is part.FtF else part.plain
        counts[position] += part.counts
    WtF[filled:] = 0.0
    log_weights = float(sum(part.log_weights for part in parts))
    reference = None if common is None else common.values
    return GroupMoments(
        *(columns, random, first.frame, WtF, FtF, plain, counts, log_weights, reference),
        first.recoding,
    )


def _add_at(
    sums: Floats,
    filled: int,
    position: Index,
    values: Floats,
    columns: tuple[Index, Index] | None = None,
) -> int:
    """``sums[position] += values`` along the first axis, in place, each position once.

    Parameters
    ----------
    filled
        rows from here on hold nothing yet
    columns
        places of the values along the other axes, if they are not all

    Returns
    -------
    filled
        of the sums as they are now
    """
    n, first, end = len(values), int(position[0]), int(position.max()) + 1
    side_by_side = columns is None and end - first == n and bool((np.diff(position) == 1).all())
    if side_by_side and first == filled:
        sums[first:end] = values
        return end
    sums[filled:end] = 0.0
    if side_by_side:
        sums[first:end] += values
    elif columns is not None:
        sums[np.ix_(position, *columns)] += values
    else:  # faster than numpy's by three passes, and it releases the GIL
        ones, indptr = np.ones(n), np.arange(n + 1, dtype=np.int32)
        flat = np.ascontiguousarray(values).reshape(-1), sums.reshape(-1)
        csc_matvecs(len(sums), n, values[0].size, indptr, position.astype(np.int32), ones, *flat)
    return max(filled, end)


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


def reframe(moments: GroupMoments, frame: Frame, recoding: Recoding | None = None) -> GroupMoments:
    """The same moments about other shifts and scales, and recoded: exact in exact arithmetic.

    ``v = (s_old u + m_old - m_new) / s_new``; a product of powers expands by the binomial
    theorem into lower margins, which are always carried.
    """
    if moments.frame == frame and moments.recoding == recoding:
        return moments
    columns = moments.columns
    T = frame_change(columns, moments.frame, frame) @ matrix(recoding, columns)
    T = recoded(moments.recoding, columns, T)
    plain = T.T @ moments.plain @ T
    constant, reference = moments.random[0], None
    if moments.reference is not None:
        # F = Fc + r with the constant 1 in r: what T adds of it belongs to the new references
        target = moments.reference.astype(np.float64)
        target[:, constant] = 1.0
        target = target @ T
        target[:, constant] = 0.0
        reference = rounded(target)
        T[constant] = np.arange(len(T)) == constant
    T_random = T[np.ix_(moments.random, moments.random)]
    WtF = np.einsum("ab,gac->gbc", T_random, moments.WtF @ T, optimize=True)
    FtF = T.T @ moments.FtF @ T
    if reference is not None:
        FtF += move(WtF, moments.random, target - reference)
    return replace(
        moments,
        frame=frame,
        WtF=WtF,
        FtF=FtF,
        plain=FtF if moments.plain is moments.FtF else plain,
        reference=reference,
        recoding=recoding,
    )


def better_frame(moments: Totals) -> Frame | None:
    """Frame of the rows themselves, if some variable lies far from the one they were summed in.

    A mean of `FAR` standard deviations costs twice its digits, and four times in squares; the
    digits are gone before the sums can tell, so only another pass brings them back.
    """
    place, sums = {column: j for j, column in enumerate(moments.columns)}, moments.unweighted
    shift, scale = list(moments.frame.shift), list(moments.frame.scale)
    far, n = False, max(moments.nobs, 1)
    for v, name in enumerate(moments.frame.names):
        j = place.get(Column((), ((name, 1),)))
        if j is None:
            continue
        mean = sums[place[CONSTANT], j] / n
        variance = sums[j, j] / n - mean**2
        if variance > 0.0 and mean**2 > FAR**2 * variance:
            far = True
            shift[v] += scale[v] * mean
            scale[v] *= 2.0 ** round(np.log2(variance) / 2)
    return Frame(moments.frame.names, tuple(shift), tuple(scale)) if far else None
