"""Rows and groups taken out of moments again, as if they had never been there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Column
from dmixed.cellmoments import CellMoments, join, merge, split
from dmixed.derived import kept
from dmixed.design import FactorLevels
from dmixed.errors import DataError
from dmixed.moments import GroupMoments


def has_crossproducts(cells: CellMoments) -> bool:
    """Whether each cell has all that the sums over all rows have of it."""
    return len(cells.group.random) == len(cells.group.columns) and cells.spec.weights is None


def without(cells: CellMoments, gone: NDArray[np.bool_], reason: str | None = None) -> CellMoments:
    """Moments of the other cells: the sums over all rows are made anew, nothing is subtracted.

    Parameters
    ----------
    cells
        moments that have cross-products of each cell
    gone
        (N,) which cells to leave out
    reason
        why: their rows count as dropped for it; by default they are forgotten
    """
    assert has_crossproducts(cells)
    stay = np.flatnonzero(~gone)
    group = kept(cells.group, stay)
    found = replace(cells, group=group, labels=cells.labels.take(stay), sizes=())
    rows = cells.nobs - group.nobs
    if reason is not None and rows:
        dropped = {**cells.dropped, reason: cells.dropped.get(reason, 0) + rows}
        found = replace(found, dropped=dropped)
    return _met(_divided(found, cells.sizes))


def less(whole: CellMoments, part: CellMoments) -> CellMoments:
    """Moments of the rows of ``whole`` that are not those of ``part``.

    Parameters
    ----------
    part
        moments of some of the rows, with cross-products of each cell where no rows are weighted;
        of cells that ``whole`` does not have (groups may have been erased) nothing is subtracted

    Raises
    ------
    DataError
        the rows cannot be some of those of ``whole``
    """
    part = alike(part, whole)
    if part.nobs == 0:
        return whole
    left = merge([whole, _negative(part)])
    counts = left.group.counts
    if (counts < 0).any():
        raise DataError(
            f"the rows are not some of those that were summed: they have {part.nobs:,} rows, more "
            "than the moments have of some groups"
        )
    gone, rest = np.flatnonzero(counts == 0), np.flatnonzero(counts > 0)
    if len(gone):
        left = left.take(rest)
    dropped = {reason: rows - part.dropped.get(reason, 0) for reason, rows in whole.dropped.items()}
    dropped = {reason: rows for reason, rows in dropped.items() if rows > 0}
    return _met(_divided(replace(left, dropped=dropped), whole.sizes))


def alike(part: CellMoments, whole: CellMoments) -> CellMoments:
    """Moments of those cells that ``whole`` has, with the random columns that it has.

    Raises
    ------
    DataError
        there are other cells, and no cross-products to take them out with
    """
    other = keys.lookup(whole.labels, part.labels) < 0
    if other.any():
        if not has_crossproducts(part):
            raise DataError(
                "the rows have groups that these moments do not have (they were forgotten, or the "
                "rows are others), and as they are weighted their sums cannot be told apart"
            )
        part = without(part, other)
    group, wanted = part.group, {x.categories: x for x in whole.spec.needs}
    rows, own = [], []
    for a, j in enumerate(group.random):
        column = group.columns[j]
        need = wanted[tuple(name for name, _ in column.cell)]
        if need.random[need.monomials.index(column.powers)]:
            rows.append(a)
            own.append(j)
    return replace(
        part, spec=whole.spec, group=replace(group, WtF=group.WtF[:, rows], random=tuple(own))
    )


def _negative(part: CellMoments) -> CellMoments:
    group = part.group
    FtF = -group.FtF
    negative = replace(
        group,
        WtF=-group.WtF,
        FtF=FtF,
        plain=FtF if group.plain is group.FtF else -group.plain,
        counts=-group.counts,
        log_weights=-group.log_weights,
    )
    return replace(part, group=negative)


def _divided(cells: CellMoments, sizes: tuple[int, ...]) -> CellMoments:
    """In as many shards as there were."""
    return cells if not sizes else join(split(replace(cells, sizes=()), len(sizes)))


def _met(cells: CellMoments) -> CellMoments:
    """The same without columns and levels that no row has any more."""
    group = cells.group
    count = dict(zip(group.columns, np.diag(group.unweighted), strict=True))
    met = {column.cell: count[Column(column.cell)] > 0.5 for column in group.columns}
    stay = [j for j, column in enumerate(group.columns) if met[column.cell]]
    levels: dict[str, FactorLevels] = {}
    for name, known in cells.levels.items():
        own = {level for cell, there in met.items() if there for f, level in cell if f == name}
        levels[name] = replace(known, levels=tuple(x for x in known.levels if x in own))
    if len(stay) < len(group.columns):
        group = _with_columns(group, stay)
    return replace(cells, group=group, levels=_same(cells.levels, levels))


def _with_columns(group: GroupMoments, stay: list[int]) -> GroupMoments:
    here, place = np.ix_(stay, stay), {j: i for i, j in enumerate(stay)}
    rows = [a for a, j in enumerate(group.random) if j in place]
    FtF = group.FtF[here]
    return replace(
        group,
        columns=tuple(group.columns[j] for j in stay),
        random=tuple(place[group.random[a]] for a in rows),
        WtF=group.WtF[:, rows][:, :, stay],
        FtF=FtF,
        plain=FtF if group.plain is group.FtF else group.plain[here],
        reference=None if group.reference is None else group.reference[:, stay],
    )


def _same(
    before: Mapping[str, FactorLevels], after: Mapping[str, FactorLevels]
) -> Mapping[str, FactorLevels]:
    return before if before == after else after
