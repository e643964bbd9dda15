"""Rows to moments: one batch, and the union of many. Runs on the workers; knows no scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from dmixed import keys
from dmixed.design import Design, DesignSpec, FactorLevels, block, learn, merge_levels
from dmixed.errors import DataError
from dmixed.moments import GroupMoments, accumulate, combine
from dmixed.sources import Part, load


@dataclass(frozen=True, slots=True)
class Moments:
    """Everything a model needs of its rows: a design and the moments of its columns.

    Attributes
    ----------
    spec
        what was evaluated on the rows
    levels
        levels met, per factor
    labels
        the groups' labels, G of them
    group
        the numbers, see `GroupMoments`
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
        return learn(self.spec, self.levels, self.group.columns, self.group.plain, self.nobs)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows; groups are aligned by label, columns by name."""
        return merge([self, other])


def part_moments(spec: DesignSpec, part: Part, row0: int, value: Any = None) -> Moments:
    """Moments of one part of a source; ``value`` is the frame if Dask made it."""
    table = load(part, value)
    batch = block(spec, table, row0, part.name)
    return Moments(spec, batch.levels, batch.labels, accumulate(batch.block), batch.dropped)


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
    levels = {
        factor: reduce(merge_levels, (part.levels[factor] for part in parts))
        for factor in first.levels
    }
    dropped: dict[str, int] = {}
    for part in parts:
        for reason, rows in part.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + rows
    return Moments(first.spec, levels, labels, group, dropped)
