"""Cross-products of carried columns: per group and in total; they add over rows, files and days.

For the carried columns F (n, k) of some rows and the random ones among them, W (n, q):
``WtF`` per group and ``FtF`` in total are all that a linear mixed model needs of its rows
(Bates et al. 2015, Journal of Statistical Software 67(1), section 5.2, grouped by level).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import _sparsetools

from dmixed.blocks import CONSTANT, Column, DesignBlock, Floats, Frame, Recoding
from dmixed.references import CommonReferences, References, change_of_total, move, rounded
from dmixed.whitening import frame_change, matrix, original, places, recoded

Index: TypeAlias = NDArray[np.intp]

_csc_matvecs: Any = _sparsetools.csc_matvecs  # Y += A X for sparse A; scipy has no public name

FAR = 100.0
"""Standard deviations between a variable's mean and its shift that call for a better shift."""

CHUNK = 16_384
"""Rows turned into carried columns at a time: the block stays in the processor's cache."""

LINE, CACHE, FETCH = 64, 2**23, 2**18
"""Bytes of a cache line; of sums that the cache holds; of sums fetched into it at a time."""


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
        if self.reference is None:
            return self.FtF
        delta = self.reference.astype(np.float64)
        return np.asarray(self.FtF + change_of_total(self.WtF, self.random, delta))

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
        sums = self.WtF[:, 0] / np.sqrt(self.WtF[:, 0, self.random[0]])[:, None]
        return Totals(
            columns=self.columns,
            random=self.random,
            frame=self.frame,
            FtF=self.FtF,
            gram=self.gram,
            unweighted=self.unweighted,
            plain=self.plain,
            between=np.asarray(sums.T @ sums),
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

    def part(self, start: int, stop: int) -> GroupMoments:
        """Neighbouring groups; arrays are shared, and the sums over all rows stay as they are."""
        own = None if self.reference is None else self.reference[start:stop]
        WtF, counts = self.WtF[start:stop], self.counts[start:stop]
        return replace(self, WtF=WtF, counts=counts, reference=own)

    def take(self, groups: Index) -> GroupMoments:
        """Some of the groups, in this order; the sums over all rows stay as they are."""
        own = None if self.reference is None else self.reference[groups]
        return replace(self, WtF=self.WtF[groups], counts=self.counts[groups], reference=own)

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

    Attributes
    ----------
    columns, random, frame, FtF, plain, log_weights
        see `GroupMoments`
    gram, unweighted
        (k, k): FtF about zero, and without row weights
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
    gram: Floats
    unweighted: Floats
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

    def coded(self, T: Floats) -> Floats:
        """Coefficients of the columns as they were summed, for those T (k, ...) of the columns."""
        return recoded(self.recoding, self.columns, T)

    def __add__(self, other: Totals) -> Totals:
        """Totals of both sets of groups, which have the same columns."""
        assert (self.columns, self.frame) == (other.columns, other.frame)
        names = ("FtF", "gram", "unweighted", "plain", "between", "n_groups", "nobs")
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in (*names, "log_weights", "nbytes")
        }
        flags = {n: getattr(self, n) or getattr(other, n) for n in ("weighted", "referenced")}
        smallest, largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        return replace(self, **sums, **flags, smallest=smallest, largest=largest)


def carried_columns(block: DesignBlock, rows: slice) -> Floats:
    """Carried columns F (m, k) of some rows of a block, unweighted."""
    m = len(range(*rows.indices(block.nobs)))
    return _Workspace(block, m).columns(block, rows)[:, : len(block.columns)]


class _Workspace:
    """Arrays for one chunk of rows, used again and again.

    Dask's workers return freed memory to the system at once (``MALLOC_TRIM_THRESHOLD_``), which
    makes every fresh array of a chunk cost its page faults: twice the time of the sums.
    """

    def __init__(self, block: DesignBlock, size: int = CHUNK) -> None:
        k, q, v = len(block.columns), len(block.random), len(block.values)
        self.F, self.shifted = np.zeros((size, _width(q, k))), np.empty((v, size))
        self.product, self.inside = np.empty(size), np.empty(size, dtype=np.bool_)
        self.W, self.where = np.empty((size, q)), np.empty((size, q), dtype=np.int32)
        self.indptr = np.arange(0, size * q + 1, q, dtype=np.int32)
        self.place = np.empty(size, dtype=np.int64)
        self.reference = np.empty((size if block.references else 0, k), dtype=np.float32)
        self.alone = _alone(block)
        done = set(self.alone.values())
        self.others = [(j, r) for j, r in enumerate(block.recipes) if j not in done]
        self.recoded = np.empty((0 if block.recoding is None else size, k))

    def columns(self, block: DesignBlock, rows: slice) -> Floats:
        """Carried columns F (m, width) of some rows, unweighted; valid until the next call.

        Columns beyond k are zero, see `_width`.
        """
        m = len(range(*rows.indices(block.nobs)))
        F, product, inside = self.F[:m], self.product[:m], self.inside[:m]
        frame = zip(block.values, block.frame.shift, block.frame.scale, self.shifted, strict=True)
        for v, (x, shift, scale, u) in enumerate(frame):
            np.subtract(x[rows], shift, out=u[:m])
            out = F[:, self.alone[v]] if v in self.alone else u[:m]
            np.multiply(u[:m], 1.0 / scale, out=out)
        for j, recipe in self.others:
            factors = [self.shifted[v, :m] for v, power in recipe.powers for _ in range(power)]
            column: Floats | float = factors[0] if factors else 1.0
            for factor in factors[1:]:
                column = np.multiply(column, factor, out=product)
            if recipe.cells >= 0:
                np.equal(block.cells[recipe.cells][rows], recipe.code, out=inside)
                np.multiply(inside, column, out=F[:, j])
            else:
                F[:, j] = column
        return F


def _alone(block: DesignBlock) -> dict[int, int]:
    """Variables that make one column, as they are, and no other; with that column."""
    uses = Counter(v for recipe in block.recipes for v, _ in recipe.powers)
    return {
        recipe.powers[0][0]: j
        for j, recipe in enumerate(block.recipes)
        if recipe.cells < 0 and len(recipe.powers) == 1 and recipe.powers[0][1] == 1
        and uses[recipe.powers[0][0]] == 1
    }  # fmt: skip


class Accumulator:
    """Moments of many batches, added in place: the only code that ever touches rows.

    Batches must agree in columns and frame (`fits`); the group axis grows as groups appear.

    Parameters
    ----------
    expected
        groups for which there is room from the start, which need not be right
    """

    def __init__(self, block: DesignBlock, expected: int = 0) -> None:
        k, q = len(block.columns), len(block.random)
        width = _width(q, k)
        self.columns, self.random, self.frame = block.columns, block.random, block.frame
        self.weighted = block.weights is not None
        self.workspace = _Workspace(block)
        self.n_groups, self.expected = 0, expected
        self.WtF, self.counts = np.zeros((0, q, width)), np.zeros(0, dtype=np.int64)
        self.FtF, self.plain = np.zeros((width, width)), np.zeros((width, width))
        self.log_weights = 0.0

        self.references, self.recoding = block.references, block.recoding
        # the constant and the cells of categories have reference 0
        self.varying = np.array([r.cells < 0 and bool(r.powers) for r in block.recipes])
        self.reference = np.zeros((0, k), dtype=np.float32)
        self.first = np.zeros(0, dtype=np.int32)  # row of a chunk, -1 for none so far

    def fits(self, block: DesignBlock) -> bool:
        """Whether a block has the same columns."""
        same = block.columns == self.columns and block.frame == self.frame
        same = same and block.references == self.references
        same = same and block.recoding == self.recoding
        return same and (block.weights is not None) == self.weighted

    def add(self, block: DesignBlock) -> None:
        """Add the rows of a block; its groups are those of the sums, and perhaps new ones."""
        self._grow(block.n_groups)
        self.n_groups = block.n_groups
        if block.weights is not None:
            np.add.at(self.counts, block.group, 1)
            self.log_weights += float(np.log(block.weights).sum())
        for start in range(0, block.nobs, CHUNK):
            rows = slice(start, min(start + CHUNK, block.nobs))
            F = self._recode(self.workspace.columns(block, rows))
            if block.weights is not None:
                self.plain += F.T @ F
            if block.references:
                self._take_references(F[:, : len(self.columns)], block.group[rows])
            if block.weights is not None:
                F *= np.sqrt(block.weights[rows])[:, None]
            self.FtF += F.T @ F
            self._scatter(F, block.group[rows], block.random)

    def _recode(self, F: Floats) -> Floats:
        """``F S`` of some rows (m, k)."""
        recoding = self.recoding
        if recoding is None:
            return F
        k = len(self.columns)
        if len(recoding.columns) == k:
            own = self.workspace.recoded[: len(F)]
            F[:, :k] = np.matmul(F[:, :k], matrix(recoding, self.columns), out=own)
            return F
        at = places(recoding, self.columns)
        F[:, at] = F[:, at] @ np.array(recoding.S)
        return F

    def _take_references(self, F: Floats, group: NDArray[np.int32]) -> None:
        """Subtract from each row (m, k) the reference of its group: the first row that was met."""
        new = np.flatnonzero(self.first[group] < 0)[::-1]
        if len(new):  # of assignments to one place the last counts: backwards, the first row
            self.first[group[new]] = new
            rows = new[self.first[group[new]] == new]
            self.reference[group[rows]] = rounded(F[rows]) * self.varying
        own = self.workspace.reference[: len(F)]
        np.take(self.reference, group, axis=0, out=own, mode="clip")
        F -= own

    def _scatter(self, F: Floats, group: NDArray[np.int32], random: tuple[int, ...]) -> None:
        """Add W_i' F_i of each row (m, k) to its group, in place.

        W is a sparse (G q, m) matrix with q entries for each row of data. scipy's kernel
        releases the GIL and needs no (G, q, k) temporary for each chunk.
        """
        (m, k), q = F.shape, len(random)
        W, where = self.workspace.W[:m], self.workspace.where[:m]
        for a, j in enumerate(random):
            W[:, a] = F[:, j]
            np.multiply(group, np.int32(q), out=where[:, a])
            where[:, a] += np.int32(a)
        step, sums = m, self.WtF.reshape(-1)
        far = sums.nbytes > CACHE
        if far:
            step = max(FETCH // (8 * q * k), 1)
            lines = np.unique([*range(0, q * k, 8), q * k - 1])
        for start in range(0, m, step):
            part = slice(start, min(start + step, m))
            size = part.stop - start
            if far:
                self._fetch(sums, group[part], lines)
            _csc_matvecs(
                *(len(self.WtF) * q, size, k, self.workspace.indptr[: size + 1]),
                *(where[part].reshape(-1), W[part].reshape(-1), F[part].reshape(-1), sums),
            )

    def _fetch(self, sums: Floats, group: NDArray[np.int32], lines: Index) -> None:
        """Bring the sums of some rows' groups into the cache.

        Adding to them would wait for memory group by group; reading one number of each cache line
        waits for many at once, which makes the addition twice as fast.
        """
        place, read = self.workspace.place[: len(group)], self.workspace.product[: len(group)]
        np.multiply(group, self.WtF[0].size, out=place)
        before = 0
        for line in lines.tolist():
            place += line - before
            sums.take(place, out=read, mode="clip")  # "raise" would make a copy of out
            before = line

    def _grow(self, n_groups: int) -> None:
        """Room for ``n_groups``; doubling keeps the copies fewer than the rows."""
        held = len(self.WtF)
        if n_groups <= held:
            return
        size = max(n_groups, self.expected if held == 0 else held + held // 2)
        WtF = _aligned_zeros((size, *self.WtF.shape[1:]))
        counts = np.zeros(size, dtype=np.int64)
        WtF[:held], counts[:held] = self.WtF, self.counts
        self.WtF, self.counts = WtF, counts
        if self.references:
            reference = np.zeros((size, len(self.columns)), dtype=np.float32)
            reference[:held] = self.reference
            first = np.full(size, -1, dtype=np.int32)
            first[:held] = self.first
            self.reference, self.first = reference, first

    def moments(self) -> GroupMoments:
        """What was added; the accumulator is not to be used afterwards."""
        k = len(self.columns)
        WtF, counts = self.WtF[: self.n_groups, :, :k], self.counts[: self.n_groups]
        FtF, plain = self.FtF[:k, :k], self.plain[:k, :k]
        if not self.weighted:  # the constant's sums are the counts, exactly
            constant = self.random[0]
            np.copyto(counts, WtF[:, 0, constant], casting="unsafe")
        return GroupMoments(
            columns=self.columns,
            random=self.random,
            frame=self.frame,
            WtF=WtF,
            FtF=FtF,
            plain=plain if self.weighted else FtF,
            counts=counts,
            log_weights=self.log_weights,
            reference=self.reference[: self.n_groups] if self.references else None,
            recoding=self.recoding,
        )


def _width(q: int, k: int) -> int:
    """Columns of F in memory: as many as make a group's sums (q, width) whole cache lines.

    Only if that takes few more: groups that begin anywhere in a line touch one more line each.
    """
    width = next(w for w in range(k, k + LINE // 8) if w * q * 8 % LINE == 0)
    return width if 4 * width <= 5 * k else k


def _aligned_zeros(shape: tuple[int, ...]) -> Floats:
    """Zeros that begin with a cache line, so that no group's sums share more than they must."""
    size = int(np.prod(shape)) * 8
    raw = np.zeros(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(np.float64).reshape(shape)


def accumulate(block: DesignBlock) -> GroupMoments:
    """Moments of one batch."""
    sums = Accumulator(block)
    sums.add(block)
    return sums.moments()


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
    WtF, FtF = np.zeros((n_groups, q, k)), np.zeros((k, k))
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
        if np.array_equal(to_k, np.arange(k)) and np.array_equal(to_q, np.arange(q)):
            _add_at(WtF, position, own[0])
        else:
            WtF[np.ix_(position, to_q, to_k)] += own[0]
        FtF[np.ix_(to_k, to_k)] += own[1]
        if weighted:
            plain[np.ix_(to_k, to_k)] += part.gram if part.plain is part.FtF else part.plain
        counts[position] += part.counts
    log_weights = float(sum(part.log_weights for part in parts))
    reference = None if common is None else common.values
    return GroupMoments(
        *(columns, random, first.frame, WtF, FtF, plain, counts, log_weights, reference),
        first.recoding,
    )


def _add_at(sums: Floats, position: Index, values: Floats) -> None:
    """``sums[position] += values`` along the first axis, in place, each position once."""
    n, size = len(values), values[0].size if len(values) else 0
    step = np.diff(position)
    if n and position[0] + n - 1 == position[-1] and (step == 1).all():
        sums[position[0] : position[-1] + 1] += values
    elif n:  # faster than numpy's by three passes, and it releases the GIL
        ones, indptr = np.ones(n), np.arange(n + 1, dtype=np.int32)
        flat = np.ascontiguousarray(values).reshape(-1), sums.reshape(-1)
        _csc_matvecs(len(sums), n, size, indptr, position.astype(np.int32), ones, *flat)


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
