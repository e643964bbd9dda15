"""Rows to moments: one batch, and the union of many. Runs on the workers; knows no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmixed import keys
from dmixed.accumulation import Accumulator
from dmixed.design import Batch, Design, DesignSpec, FactorLevels, block, learn, merge_levels
from dmixed.errors import DataError
from dmixed.hashing import label_hashes
from dmixed.index import LabelIndex
from dmixed.moments import GroupMoments, Totals, combine
from dmixed.sources import Part, stream

CELLS = 2**17
"""Cells of one shard that are factored at a time."""

PARTS, ENOUGH = 4, 2**14
"""Parts of one shard at least, where they have so many cells each: work for several threads."""

SUMS = 4
"""Sets of columns, as batches with other levels have them, that are summed side by side."""


@dataclass(frozen=True, eq=False)
class CellMoments:
    """Everything a model needs of its rows: a design and the moments of its columns.

    Attributes
    ----------
    spec
        what was evaluated on the rows
    levels
        levels met, per factor
    labels
        labels of the cells that the rows have, G of them: combinations of all keys of the spec
    group
        the numbers of each cell, see `GroupMoments`
    dropped
        rows dropped, by reason
    sizes
        cells of each shard, one after the other; empty for one shard
    """

    spec: DesignSpec
    levels: Mapping[str, FactorLevels]
    labels: keys.Labels
    group: GroupMoments
    dropped: Mapping[str, int]
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.labels) == self.group.n_groups == sum(self.sizes or (len(self.labels),))

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.group.nobs

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.group.n_groups

    @property
    def design(self) -> Design:
        """Names and coding of all columns, learned over all rows."""
        return self.summary.design

    @cached_property
    def summary(self) -> Summary:
        """All but what belongs to single cells: summed as if each shard were on a worker."""
        whole = _pieces(self.group, self.sizes or (self.n_cells,))
        parts = (_pieces(shard, _parts(shard.n_groups)) for shard in whole)
        totals = reduce(add, (reduce(add, (part.totals for part in own)) for own in parts))
        return Summary(self.spec, self.levels, totals, self.dropped)

    @property
    def shards(self) -> list[GroupMoments]:
        """Moments of the cells of each shard, the first with the sums over all rows.

        Of one shard, of neighbouring cells.
        """
        return _pieces(self.group, self.sizes or _parts(self.n_cells))

    def __add__(self, other: CellMoments) -> CellMoments:
        """Moments of both sets of rows; cells are aligned by label, columns by name."""
        return merge([self, other]) if isinstance(other, CellMoments) else NotImplemented

    def take(self, cells: NDArray[np.intp]) -> CellMoments:
        """Some of the cells; the sums over all rows stay as they are."""
        labels, group = self.labels.take(cells), self.group.take(cells)
        return replace(self, labels=labels, group=group, sizes=())

    def __radd__(self, other: int) -> CellMoments:
        """``0 + moments``, with which ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _pieces(group: GroupMoments, sizes: Sequence[int]) -> list[GroupMoments]:
    """Neighbouring cells, so many each; the first has the sums over all rows."""
    ends = np.cumsum(sizes).tolist()
    parts = [group.part(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [parts[0], *map(without_totals, parts[1:])]


def _parts(n: int) -> list[int]:
    """Cells of each part of one shard of n; they depend on n alone."""
    parts = max(-(-n // CELLS), min(PARTS, n // ENOUGH), 1)
    ends = [n * (i + 1) // parts for i in range(parts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What is known of all cells together, see `CellMoments`; kilobytes."""

    spec: DesignSpec
    levels: Mapping[str, FactorLevels]
    totals: Totals
    dropped: Mapping[str, int]

    @property
    def design(self) -> Design:
        """Names and coding of all columns, learned over all rows."""
        totals = self.totals
        return learn(self.spec, self.levels, totals.columns, totals.unweighted, totals.nobs)

    def __add__(self, other: Summary) -> Summary:
        """Of both sets of cells, which are shards of the same moments."""
        levels = _merged_levels([self.levels, other.levels])
        dropped = _added([self.dropped, other.dropped])
        return Summary(self.spec, levels, self.totals + other.totals, dropped)


def parts_moments(
    spec: DesignSpec,
    parts: Sequence[tuple[Part, int]],
    value: Any = None,
    expected: int = 0,
    told: Callable[[int, int, int], None] | None = None,
) -> CellMoments:
    """Moments of some parts of a source, read one after the other into one state.

    Parameters
    ----------
    parts
        each with the number of its first row
    value
        the frame, if Dask made it (then there is one part)
    expected
        cells for which there is room from the start
    told
        called with the position, rows and bytes of each part when it has been added
    """
    state = _State(spec, expected)
    for i, (part, row0) in enumerate(parts):
        rows = nbytes = 0
        for table in stream(part, value):
            state.add(block(spec, table, row0 + rows, part.name, state.index))
            rows, nbytes = rows + len(table), nbytes + table.nbytes
            del table  # its memory is that of the next one
        if told is not None:
            told(i, rows, nbytes)
    return state.moments()


class _State:
    """Moments under way: sums, and an index of the cells met so far.

    Batches in which other levels of a factor occur have other columns, and sums of their own.
    """

    def __init__(self, spec: DesignSpec, expected: int) -> None:
        self.spec, self.expected = spec, expected
        self.index = LabelIndex(spec.group)
        self.sums: list[Accumulator] = []
        self.finished: list[GroupMoments] = []
        self.levels: dict[str, FactorLevels] = {}
        self.dropped: dict[str, int] = {}

    def add(self, batch: Batch) -> None:
        """Add a batch, whose groups are numbered by the index."""
        sums = next((s for s in self.sums if s.fits(batch.block)), None)
        if sums is None:
            if len(self.sums) == SUMS:
                self.finished = [self._sum()]
                self.sums = []
            sums = Accumulator(batch.block, self.expected)
            self.sums.append(sums)
        sums.add(batch.block)
        self.levels = _merged_levels([self.levels or batch.levels, batch.levels])
        self.dropped = _added([self.dropped, batch.dropped])

    def _sum(self) -> GroupMoments:
        """All sums so far; numbers of groups are those of the index."""
        parts = [*self.finished, *(sums.moments() for sums in self.sums)]
        if len(parts) == 1 and parts[0].n_groups == len(self.index):
            return parts[0]
        return combine(parts, [np.arange(part.n_groups) for part in parts], len(self.index))

    def moments(self) -> CellMoments:
        """What was added."""
        found = CellMoments(self.spec, self.levels, self.index.labels, self._sum(), self.dropped)
        used = found.group.counts > 0  # not so where every row of a cell was dropped
        return found if used.all() else found.take(np.flatnonzero(used))


def split(moments: CellMoments, shards: int, of: int = 1) -> list[CellMoments]:
    """Shards by a stable hash of the labels (a power of two of them); the first has the totals.

    Parameters
    ----------
    of
        the moments are one of so many shards themselves (a power of two)
    """
    own = label_hashes(moments.labels) << np.uint64(of.bit_length() - 1)  # the bits not used yet
    shard = (own >> np.uint64(65 - shards.bit_length())).astype(np.uint16)
    order = np.argsort(shard, kind="stable")
    ends = np.cumsum(np.bincount(shard, minlength=shards))
    whole = [moments.take(own) for own in np.split(order, ends[:-1])]
    rest = [replace(m, group=without_totals(m.group), dropped={}) for m in whole[1:]]
    return [whole[0], *rest]


def without_totals(group: GroupMoments) -> GroupMoments:
    """The same cells, but zero in place of the sums over all rows."""
    nothing = np.zeros_like(group.FtF)
    plain = nothing if group.plain is group.FtF else np.zeros_like(group.plain)
    return replace(group, FtF=nothing, plain=plain, log_weights=0.0)


def join(shards: Sequence[CellMoments]) -> CellMoments:
    """Shards side by side again: their cells are disjoint."""
    sizes = [len(shard.labels) for shard in shards]
    ends = np.cumsum(sizes).tolist()
    cells = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    labels = keys.concatenate([shard.labels for shard in shards])
    group = combine([shard.group for shard in shards], cells, ends[-1])
    levels = _merged_levels([shard.levels for shard in shards])
    dropped = _added([shard.dropped for shard in shards])
    return CellMoments(shards[0].spec, levels, labels, group, dropped, tuple(sizes))


def _merged_levels(parts: Sequence[Mapping[str, FactorLevels]]) -> dict[str, FactorLevels]:
    return {factor: reduce(merge_levels, (part[factor] for part in parts)) for factor in parts[0]}


def _added(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for reason, rows in part.items():
            total[reason] = total.get(reason, 0) + rows
    return total


def merge(parts: Sequence[CellMoments]) -> CellMoments:
    """Sum of moments over disjoint sets of rows.

    Raises
    ------
    DataError
        the moments are of different models
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if not first.spec.compatible(other.spec):
            raise DataError(
                "these moments are of different models and cannot be added: "
                f"{first.spec.formula.text!r} and {other.spec.formula.text!r}"
            )
    index = LabelIndex(first.labels.names)
    codes = index.encode(keys.stacked([part.labels for part in parts]))
    positions = np.split(codes.astype(np.intp), np.cumsum([part.n_cells for part in parts[:-1]]))
    labels = index.labels
    group = combine([part.group for part in parts], positions, len(labels))
    levels = _merged_levels([part.levels for part in parts])
    dropped = _added([part.dropped for part in parts])
    return CellMoments(first.spec, levels, labels, group, dropped)
