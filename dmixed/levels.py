"""From moments per cell to clusters of levels: what a model with several factors evaluates.

A *cell* is a combination of levels of all factors that occurs in the data; every row of a cell
falls in the same level of every factor. Cells that share a level, directly or through others,
form a *cluster*: a school with its classes, or everything where factors are fully crossed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.nested import Bucket, DenseMeans, Span, SparseMeans

Index = NDArray[np.intp]

MAX_DENSE = 6_000
"""Random columns of one cluster, leaves aside, that are worked on as a dense matrix."""

MAX_NUMBERS = 2**29
"""Numbers (of 8 bytes) in all dense arrays."""


SPARSE = 48
"""Random columns of a single cluster from which the leaves' means are kept sparse."""


class TooManyLevels(ValueError):
    """A cluster has too many random columns for dense algebra: ``columns`` of them."""

    def __init__(self, columns: int, numbers: int) -> None:
        super().__init__(columns, numbers)
        self.columns, self.numbers = columns, numbers


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Some random columns, and the levels of the factor over which they vary.

    Attributes
    ----------
    block
        block of Psi that their effects follow
    T
        (k, c): the columns as combinations of carried columns
    codes
        (N,) level of each cell, -1 where the columns are left out
    n_levels
        number of levels
    repeated
        the c columns are c independent effects of one variance, not c coefficients of one level
    """

    block: int
    T: Floats
    codes: Index
    n_levels: int
    repeated: bool = False

    @property
    def size(self) -> int:
        """Effects in all: rows of the coefficients of all levels."""
        return self.n_levels * self.T.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Cross-products of the random columns, of each other and with F, in each cell.

    Attributes
    ----------
    KtK
        (N, c, c) for the c columns of all terms, one after the other
    KtF
        (N, c, k)
    centred
        both within each cell, summed without loss, where every cell is a level of its own of the
        leaves and their column is constant
    """

    KtK: Floats
    KtF: Floats
    centred: tuple[Floats, Floats] | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """One column of a term: its place in `Cells`, the block's column, its copy."""

    column: int
    term: int
    a: int
    copy: int


def clusters(terms: Sequence[Term]) -> tuple[Index, int]:
    """Cluster of each cell, numbered by first appearance, and how many there are."""
    codes = list({t.codes.tobytes(): t.codes for t in terms}.values())
    coarsest = min(codes, key=lambda code: int(code.max(initial=-1)))
    if coarsest.min(initial=0) >= 0 and all(_within(code, coarsest) for code in codes):
        labels = coarsest
    else:
        labels = _connected(codes)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    if (np.diff(first) > 0).all():
        return inverse, len(first)
    order = np.empty(len(first), np.intp)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse], len(first)


def _within(fine: Index, coarse: Index) -> bool:
    """Whether every level of a factor lies in one level of another."""
    if fine is coarse:
        return True
    used = fine >= 0
    image = np.zeros(int(fine.max(initial=-1)) + 1, np.intp)
    image[fine[used]] = coarse[used]
    return bool((image[fine[used]] == coarse[used]).all())


def _connected(codes: Sequence[Index]) -> Index:
    """Components of the graph that links every cell with its levels."""
    N = len(codes[0])
    nodes, left, right = N, [], []
    for code in codes:
        cells = np.flatnonzero(code >= 0)
        left.append(cells)
        right.append(nodes + code[cells])
        nodes += int(code.max(initial=-1)) + 1
    rows, cols = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, cols)), shape=(nodes, nodes))
    return connected_components(graph.tocsr(), directed=False)[1][:N].astype(np.intp)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Levels of one term: their cluster, and their number within it."""

    cluster: Index
    rank: Index
    counts: Index  # levels in each cluster


def _placed(term: Term, cluster: Index, G: int) -> _Placed:
    used = term.codes >= 0
    of_level = np.full(term.n_levels, -1, np.intp)
    of_level[term.codes[used]] = cluster[used]
    met = of_level >= 0  # a level whose every cell is left out has no column
    counts = np.bincount(of_level[met], minlength=G)
    order = np.argsort(of_level, kind="stable")[np.count_nonzero(~met) :]
    rank = np.full(term.n_levels, -1, np.intp)
    starts = np.cumsum(counts) - counts
    rank[order] = np.arange(len(order)) - starts[of_level[order]]
    return _Placed(of_level, rank, counts)


def leaf_term(terms: Sequence[Term], n_clusters: int) -> int | None:
    """The term to eliminate level by level: the largest that is scalar and a block of its own."""
    best, most = None, n_clusters
    for i, term in enumerate(terms):
        alone = sum(t.block == term.block for t in terms) == 1
        if alone and term.T.shape[1] == 1 and term.n_levels > most:
            best, most = i, term.n_levels
    return best


def leaves_are_cells(terms: Sequence[Term]) -> int | None:
    """The leaves' term, if every cell is a level of its own of it."""
    leaf = leaf_term(terms, clusters(terms)[1])
    if leaf is None or terms[leaf].n_levels != len(terms[leaf].codes):
        return None
    return leaf if terms[leaf].codes.min(initial=0) >= 0 else None


def buckets(
    blocks: Blocks, terms: Sequence[Term], cells: Cells
) -> tuple[tuple[Bucket, ...], Floats]:
    """Clusters by shape, and what their leaves take of F'F: the sum of d bbar bbar' (k, k).

    Raises
    ------
    TooManyLevels
        a cluster's dense block would not fit
    """
    cluster, G = clusters(terms)
    leaf = leaf_term(terms, G)
    placed = [_placed(term, cluster, G) for term in terms]
    rest = [i for i in range(len(terms)) if i != leaf]
    widths = np.array(
        [placed[i].counts * (terms[i].T.shape[1] if terms[i].repeated else 1) for i in rest]
    ).reshape(len(rest), G)
    leaves = placed[leaf].counts if leaf is not None else np.zeros(G, np.intp)
    shapes = np.vstack([_padded(widths), _padded(leaves)[None]])
    kinds, inverse = np.unique(shapes, axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)  # numpy 2.0 gives it the shape of what it sorted
    members = [np.flatnonzero(inverse == s) for s in range(kinds.shape[1])]
    sizes = [terms[i].T.shape[1] if not terms[i].repeated else 1 for i in rest]
    _check_size(members, widths, leaves, np.array(sizes, dtype=np.intp))
    position = np.empty(G, np.intp)  # of a cluster in its bucket
    for inside in members:
        position[inside] = np.arange(len(inside))
    found, taken = [], np.zeros((cells.KtF.shape[2],) * 2)
    by_bucket = np.argsort(inverse[cluster], kind="stable")
    ends = np.cumsum(np.bincount(inverse[cluster], minlength=len(members)))
    for s, inside in enumerate(members):
        here = by_bucket[(ends[s - 1] if s else 0) : ends[s]]
        builder = _Builder(
            blocks, terms, placed, rest, leaf, cells, inside, here, position[cluster[here]]
        )
        bucket, leaf_part = builder.build()
        found.append(bucket)
        taken += leaf_part
    return tuple(found), taken


def _padded(widths: Index) -> Index:
    """Widths rounded up to 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = np.exp2(np.floor(np.log2(np.maximum(widths, 1)))).astype(np.intp)
    rounded = np.where(
        widths <= power, power, np.where(2 * widths <= 3 * power, 3 * power // 2, 2 * power)
    )
    return np.where(widths == 0, 0, np.where(widths == 3, 3, rounded))


def _check_size(members: Sequence[Index], widths: Index, leaves: Index, sizes: Index) -> None:
    numbers = 0
    for inside in members:
        r = int((widths[:, inside].max(axis=1) * sizes).sum()) if len(widths) else 0
        n = int(leaves[inside].max())
        numbers += len(inside) * r * (r if len(inside) == 1 else r + n)
        if r > MAX_DENSE or numbers > MAX_NUMBERS:
            raise TooManyLevels(r, numbers)


@dataclass(frozen=True, slots=True, eq=False)
class _Builder:
    """Fills the arrays of one bucket from its cells."""

    blocks: Blocks
    terms: Sequence[Term]
    placed: Sequence[_Placed]
    rest: Sequence[int]
    leaf: int | None
    cells: Cells
    inside: Index  # clusters of the bucket
    here: Index  # its cells
    position: Index  # of each cell's cluster in the bucket

    def build(self) -> tuple[Bucket, Floats]:
        spans, offsets = self._spans()
        G, r, k = len(self.inside), spans[-1].stop if spans else 0, self.cells.KtF.shape[2]
        columns = [(kind, self._columns(kind, spans, offsets)) for kind in self._kinds()]
        KtK, F = self.cells.centred or (self.cells.KtK, self.cells.KtF)
        A = self._sum(
            (G, r, r),
            [(self.position * r + at) * r + to for _, at in columns for _, to in columns],
            [KtK[self.here, i.column, j.column] for i, _ in columns for j, _ in columns],
            [(at >= 0) & (to >= 0) for _, at in columns for _, to in columns],
        )
        B = np.stack(
            [
                self._sum(
                    (G, r),
                    [self.position * r + at for _, at in columns],
                    [F[self.here, i.column, j] for i, _ in columns],
                    [at >= 0 for _, at in columns],
                )
                for j in range(k)
            ],
            axis=-1,
        )
        d, abar, bbar, leaf_levels = self._leaves(G, r, k, columns)
        if self.cells.centred is None:
            A -= abar.products(slice(None), d)
            B -= abar.products(slice(None), d, bbar)
        flat = bbar.reshape(-1, k)
        taken = flat.T @ (d.reshape(-1, 1) * flat)
        block = None if self.leaf is None else self.terms[self.leaf].block
        levels = self._rest_levels(spans, offsets, G)
        return (
            Bucket(block, spans, A, B, d, abar, bbar, self.inside, levels, leaf_levels),
            taken,
        )

    def _spans(self) -> tuple[tuple[Span, ...], dict[int, int]]:
        """Spans of the rest's blocks, and per term the copy from which its levels start."""
        spans: list[Span] = []
        offsets: dict[int, int] = {}
        start = 0
        for block in dict.fromkeys(self.terms[i].block for i in self.rest):
            copies, size = 0, 1
            for i in (i for i in self.rest if self.terms[i].block == block):
                term, c = self.terms[i], self.terms[i].T.shape[1]
                offsets[i] = copies
                most = int(self.placed[i].counts[self.inside].max(initial=0))
                copies += most * (c if term.repeated else 1)
                size = 1 if term.repeated else c
            if copies:
                spans.append(Span(block, start, copies, size))
                start = spans[-1].stop
        return tuple(spans), offsets

    def _kinds(self) -> list[_Kind]:
        """Columns of the rest's terms."""
        found, column = [], 0
        for i, term in enumerate(self.terms):
            for j in range(term.T.shape[1]):
                if i != self.leaf:
                    a, copy = (0, j) if term.repeated else (j, 0)
                    found.append(_Kind(column, i, a, copy))
                column += 1
        return found

    def _copy(self, i: int, levels: Index, copy: int, offset: int) -> Index:
        """Copy of a block's columns that belongs to each level of a term."""
        term = self.terms[i]
        times = term.T.shape[1] if term.repeated else 1
        return offset + self.placed[i].rank[levels] * times + copy

    def _columns(self, kind: _Kind, spans: Sequence[Span], offsets: dict[int, int]) -> Index:
        """Column of the rest that each cell's rows have for a kind, -1 for none."""
        term = self.terms[kind.term]
        codes = term.codes[self.here]
        span = next((s for s in spans if s.block == term.block), None)
        if span is None:
            return np.full(len(codes), -1, np.intp)
        copies = self._copy(kind.term, codes, kind.copy, offsets[kind.term])
        return np.where(codes >= 0, span.start + copies * span.size + kind.a, -1)

    def _sum(
        self,
        shape: tuple[int, ...],
        where: Sequence[Index],
        values: Sequence[Floats],
        used: Sequence[NDArray[np.bool_]],
    ) -> Floats:
        """Array of a shape with values added at flat places."""
        size = int(np.prod(shape))
        if not where or size == 0:
            return np.zeros(shape)
        index = np.concatenate([w[u] for w, u in zip(where, used, strict=True)])
        added = np.concatenate([v[u] for v, u in zip(values, used, strict=True)])
        return np.asarray(np.bincount(index, added, minlength=size).reshape(shape), np.float64)

    def _leaves(
        self, G: int, r: int, k: int, columns: Sequence[tuple[_Kind, Index]]
    ) -> tuple[Floats, DenseMeans | SparseMeans, Floats, Index]:
        """Sizes d (G, n), means abar (G, n, r) and bbar (G, n, k), and levels of the leaves."""
        if self.leaf is None:
            return (
                np.zeros((G, 0)), DenseMeans(np.zeros((G, 0, r))), np.zeros((G, 0, k)),
                np.zeros((G, 0), np.intp),
            )  # fmt: skip
        placed, codes = self.placed[self.leaf], self.terms[self.leaf].codes[self.here]
        n = int(placed.counts[self.inside].max(initial=0))
        used = codes >= 0
        where = self.position * n + placed.rank[codes]
        levels = np.full(G * n, -1, np.intp)
        levels[where[used]] = codes[used]
        column = sum(term.T.shape[1] for term in self.terms[: self.leaf])
        KtK, KtF = self.cells.KtK[self.here, column], self.cells.KtF[self.here, column]
        d = self._sum((G, n), [where], [KtK[:, column]], [used])
        bbar = np.stack(
            [self._sum((G, n), [where], [KtF[:, j]], [used]) for j in range(k)], axis=-1
        )
        inverse = np.divide(1.0, d, out=np.zeros_like(d), where=d > 0)[:, :, None]
        sums = [(at, KtK[:, kind.column], used & (at >= 0)) for kind, at in columns]
        means = self._means((G, n, r), where, sums, inverse)
        return d, means, bbar * inverse, levels.reshape(G, n)

    def _means(
        self,
        shape: tuple[int, int, int],
        where: Index,
        sums: Sequence[tuple[Index, Floats, NDArray[np.bool_]]],
        inverse: Floats,
    ) -> DenseMeans | SparseMeans:
        """Means of the rest's columns over the leaves: (column, sum, whether) for each cell."""
        G, n, r = shape
        if G > 1 or r < SPARSE:
            index = [where * r + at for at, _, _ in sums]
            total = self._sum(shape, index, [v for _, v, _ in sums], [u for _, _, u in sums])
            return DenseMeans(total * inverse)
        rows = np.concatenate([where[u] for _, _, u in sums])
        cols = np.concatenate([at[u] for at, _, u in sums])
        values = np.concatenate([v[u] for _, v, u in sums])
        sparse = coo_array((values, (rows, cols)), shape=(n, r)).tocsr()
        return SparseMeans(sparse.multiply(inverse[0]).tocsr())

    def _rest_levels(
        self, spans: Sequence[Span], offsets: dict[int, int], G: int
    ) -> tuple[Index, ...]:
        """Per span (G, levels): position of each copy among its block's effects, -1 if none."""
        found = []
        for span in spans:
            levels = np.full((G, span.levels), -1, np.intp)
            base = 0
            for i in (i for i in self.rest if self.terms[i].block == span.block):
                term, placed = self.terms[i], self.placed[i]
                times = term.T.shape[1] if term.repeated else 1
                codes = np.unique(term.codes[self.here])
                codes = codes[codes >= 0]
                bucket = np.searchsorted(self.inside, placed.cluster[codes])
                for copy in range(times):
                    at = self._copy(i, codes, copy, offsets[i])
                    levels[bucket, at] = base + codes * times + copy
                base += term.n_levels * times
            found.append(levels)
        return tuple(found)
