"""Rows to moments: one batch, and the union of many. Runs on the workers; knows no scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from dmixed import keys
from dmixed.design import Batch, Design, DesignSpec, FactorLevels, block, learn, merge_levels
from dmixed.errors import DataError
from dmixed.moments import Accumulator, GroupMoments, combine
from dmixed.sources import Part, load


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
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
    """

    spec: DesignSpec
    levels: Mapping[str, FactorLevels]
    labels: keys.Labels
    group: GroupMoments
    dropped: Mapping[str, int]

    def __post_init__(self) -> None:
        assert len(self.labels) == self.group.n_groups

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.group.nobs

    @property
    def design(self) -> Design:
        """Names and coding of all columns, learned over all rows."""
        return learn(self.spec, self.levels, self.group.columns, self.group.unweighted, self.nobs)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows; cells are aligned by label, columns by name."""
        return merge([self, other]) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: int) -> Moments:
        """``0 + moments``, with which ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


def parts_moments(
    spec: DesignSpec, parts: Sequence[tuple[Part, int]], value: Any = None
) -> Moments:
    """Moments of some parts of a source, read one after the other into one state.

    Parameters
    ----------
    parts
        each with the number of its first row
    value
        the frame, if Dask made it (then there is one part)
    """
    finished: list[Moments] = []
    state: _State | None = None
    for part, row0 in parts:
        batch = block(spec, load(part, value), row0, part.name)
        if state is not None and not state.sums.fits(batch.block):  # other levels: other columns
            finished.append(state.moments(spec))
            state = None
        if state is None:
            state = _State(batch)
        state.add(batch)
    assert state is not None
    return merge([*finished, state.moments(spec)])


class _State:
    """Moments under way: sums, and the labels of the cells met so far."""

    def __init__(self, batch: Batch) -> None:
        self.sums = Accumulator(batch.block)
        self.labels: keys.Labels | None = None
        self.levels: dict[str, FactorLevels] = {}
        self.dropped: dict[str, int] = {}

    def add(self, batch: Batch) -> None:
        """Add a batch whose columns fit."""
        if self.labels is None:
            self.labels, positions = batch.labels, np.arange(len(batch.labels))
        else:
            # the union starts with the labels already held, so their positions stay
            self.labels, (_, positions) = keys.align([self.labels, batch.labels])
        self.sums.add(batch.block, positions, len(self.labels))
        self.levels = _merged_levels([self.levels or batch.levels, batch.levels])
        self.dropped = _added([self.dropped, batch.dropped])

    def moments(self, spec: DesignSpec) -> Moments:
        """What was added."""
        assert self.labels is not None
        group = self.sums.moments(len(self.labels))
        return Moments(spec, self.levels, self.labels, group, self.dropped)


def _merged_levels(parts: Sequence[Mapping[str, FactorLevels]]) -> dict[str, FactorLevels]:
    return {factor: reduce(merge_levels, (part[factor] for part in parts)) for factor in parts[0]}


def _added(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for reason, rows in part.items():
            total[reason] = total.get(reason, 0) + rows
    return total


def merge(parts: Sequence[Moments]) -> Moments:
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
    labels, positions = keys.align([part.labels for part in parts])
    group = combine([part.group for part in parts], positions, len(labels))
    levels = _merged_levels([part.levels for part in parts])
    dropped = _added([part.dropped for part in parts])
    return Moments(first.spec, levels, labels, group, dropped)
