"""Rows to moments: carried columns chunk by chunk, and their products added to their groups."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import DesignBlock, Floats
from dmixed.moments import GROUPS, GroupMoments, Index, csc_matvecs
from dmixed.products import gram
from dmixed.references import rounded
from dmixed.whitening import matrix, places

CHUNK = 16_384
"""Rows turned into carried columns at a time: the block stays in the processor's cache."""

RUN = 8
"""Rows of a group one after the other, on average, from which they are added up by runs."""

LINE, CACHE, FETCH = 64, 2**23, 2**17
"""Bytes of a cache line; of sums that the cache holds; of sums fetched into it at a time."""


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
        width = _width(q, k)
        self.by_row, self.by_column = np.zeros((size, width)), np.zeros((width, size)).T
        self.shifted = np.empty((v, size))
        self.product, self.inside = np.empty(size), np.empty(size, dtype=np.bool_)
        self.W, self.where = np.ones((size, q)), np.empty((size, q), dtype=np.int32)
        self.indptr = np.arange(0, size * q + 1, q, dtype=np.int32)
        self.place = np.empty(size, dtype=np.int64)
        self.rows, self.products = np.arange(size + 1, dtype=np.int32), np.empty((k, size))
        self.reference = np.empty((size if block.references else 0, k), dtype=np.float32)
        self.alone = _alone(block)
        done = set(self.alone.values())
        self.others = [(j, r) for j, r in enumerate(block.recipes) if j not in done]
        self.recoded = np.empty((0 if block.recoding is None else size, k))

    def columns(self, block: DesignBlock, rows: slice, by_column: bool = False) -> Floats:
        """Carried columns F (m, width) of some rows, unweighted; valid until the next call.

        Columns beyond k are zero, see `_width`. In memory they lie row by row, or column by column.
        """
        m = len(range(*rows.indices(block.nobs)))
        F = (self.by_column if by_column else self.by_row)[:m]
        product, inside = self.product[:m], self.inside[:m]
        frame = zip(block.values, block.frame.shift, block.frame.scale, self.shifted, strict=True)
        for v, (x, shift, scale, u) in enumerate(frame):
            out = F[:, self.alone[v]] if v in self.alone else u[:m]
            if scale == 1.0:  # as of all variables of about that size: scales are powers of two
                np.subtract(x[rows], shift, out=out)
            else:
                np.subtract(x[rows], shift, out=u[:m])
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
        self.counting = not self.weighted and self.recoding is None  # the first of W is 1
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
            group = block.group[rows]
            runs = _runs(group)
            F = self._recode(self.workspace.columns(block, rows, runs is not None))
            if block.weights is not None:
                self.plain += self._products(F, runs is not None)
            if block.references:
                self._take_references(F[:, : len(self.columns)], group)
            if block.weights is not None:
                F *= np.sqrt(block.weights[rows])[:, None]
            self.FtF += self._products(F, runs is not None)
            if runs is None:
                self._scatter(F, group, block.random)
            else:
                self._scatter_runs(F, group, block.random, runs)

    @staticmethod
    def _products(F: Floats, by_column: bool) -> Floats:
        """F'F (width, width)."""
        return gram(F.T) if by_column else np.dot(F.T, F)

    def _recode(self, F: Floats) -> Floats:
        """``F S`` of some rows (m, k)."""
        recoding = self.recoding
        if recoding is None:
            return F
        k = len(self.columns)
        if len(recoding.columns) == k:
            own = self.workspace.recoded[: len(F)]
            F[:, :k] = np.dot(F[:, :k], matrix(recoding, self.columns), out=own)
            return F
        at = places(recoding, self.columns)
        F[:, at] = np.dot(F[:, at], np.array(recoding.S))
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
            if a > 0 or not self.counting:
                W[:, a] = F[:, j]
            np.multiply(group, np.int32(q), out=where[:, a])
            where[:, a] += np.int32(a)
        step, sums = m, self.WtF.reshape(-1)
        far = sums.nbytes > CACHE
        if far:
            step = max(FETCH // (8 * q * k), 1)
            ends = [] if q * k * 8 % LINE == 0 else [q * k - 1]
            lines = [*range(0, q * k, LINE // 8), *ends]
        for start in range(0, m, step):
            part = slice(start, min(start + step, m))
            size = part.stop - start
            if far:
                self._fetch(sums, group[part], lines)
            csc_matvecs(
                *(len(self.WtF) * q, size, k, self.workspace.indptr[: size + 1]),
                *(where[part].reshape(-1), W[part].reshape(-1), F[part].reshape(-1), sums),
            )

    def _scatter_runs(
        self, F: Floats, group: NDArray[np.int32], random: tuple[int, ...], starts: Index
    ) -> None:
        """The same of rows that lie group by group: the rows of each run are added up first.

        Parameters
        ----------
        F
            (m, k), column by column in memory
        starts
            first row of each run
        """
        (m, k), c, q, n = F.shape, len(self.columns), len(random), len(starts)
        first = group[starts] * np.int32(q)
        for a, j in enumerate(random):
            products = F.T[:c]
            if a > 0 or not self.counting:
                products = np.multiply(products, F[:, j], out=self.workspace.products[:, :m])
            added = np.zeros((n, k))
            added[:, :c] = np.add.reduceat(products, starts, axis=1).T
            csc_matvecs(
                *(len(self.WtF) * q, n, k, self.workspace.rows[: n + 1], first + np.int32(a)),
                *(np.ones(n), added.reshape(-1), self.WtF.reshape(-1)),
            )

    def _fetch(self, sums: Floats, group: NDArray[np.int32], lines: list[int]) -> None:
        """Bring the sums of some rows' groups into the cache.

        Adding to them would wait for memory group by group; reading one number of each cache line
        waits for many at once, which makes the addition twice as fast.
        """
        place, read = self.workspace.place[: len(group)], self.workspace.product[: len(group)]
        np.multiply(group, self.WtF[0].size, out=place)
        before = 0
        for line in lines:
            place += line - before
            sums.take(place, out=read, mode="clip")  # "raise" would make a copy of out
            before = line

    def _grow(self, n_groups: int) -> None:
        """Room for ``n_groups``, and more than was expected: what is not used costs nothing.

        Copying the sums of a million groups takes as long as adding two million rows.
        """
        held = len(self.WtF)
        if n_groups <= held:
            return
        size = max(n_groups, self.expected + self.expected // 8 if held == 0 else held + held // 2)
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
        WtF, counts = _without_padding(self.WtF[: self.n_groups], k), self.counts[: self.n_groups]
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


def _runs(group: NDArray[np.int32]) -> Index | None:
    """First row of each run of rows of one group; None where runs are short."""
    heads = np.flatnonzero(group[1:] != group[:-1])
    return np.concatenate([[0], heads + 1]) if RUN * len(heads) < len(group) else None


def _width(q: int, k: int) -> int:
    """Columns of F in memory: as many as make a group's sums (q, width) whole cache lines.

    Only if that takes few more: groups that begin anywhere in a line touch one more line each.
    """
    width = next(w for w in range(k, k + LINE // 8) if w * q * 8 % LINE == 0)
    return width if 4 * width <= 5 * k else k


def _without_padding(sums: Floats, k: int) -> Floats:
    """The first k columns of all groups (G, q, width), moved together in the same memory."""
    G, q, width = sums.shape
    if width == k:
        return sums
    found: Floats = sums.reshape(-1)[: G * q * k].reshape(G, q, k)
    for start in range(0, G, GROUPS):  # numpy copies what overlaps: here a few groups at most
        found[start : start + GROUPS] = sums[start : start + GROUPS, :, :k]
    return found


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
