"""Batches of rows to blocks of carried columns; runs on the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import CONSTANT, RESPONSE, Codes, Column, DesignBlock, Floats, Level, Recipe
from dmixed.design.coding import MAX_COLUMNS
from dmixed.design.columns import Factor, Rows, check_levels, kind_of
from dmixed.design.recoding import FactorLevels
from dmixed.design.spans import Category
from dmixed.design.spec import DesignSpec, Input, Need
from dmixed.errors import DataError, MissingDataError
from dmixed.formula.expressions import Name, columns_of
from dmixed.formula.polynomials import shown_powers
from dmixed.index import LabelIndex

MAX_SIZE = 1e70
"""Carried columns beyond this are refused: fourth powers, summed over rows, must not overflow."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of rows, ready for cross-products.

    Attributes
    ----------
    block
        numbers
    labels
        labels of the block's groups, which are cells: combinations of all keys; None where an
        index has them
    dropped
        rows dropped, by reason
    levels
        levels met of each factor
    """

    block: DesignBlock
    labels: keys.Labels | None
    dropped: dict[str, int]
    levels: dict[str, FactorLevels]


class _Complete:
    """Which rows are complete; rows that are not are counted once, under their first reason."""

    def __init__(self, spec: DesignSpec, rows: Rows, row0: int) -> None:
        self.spec = spec
        self.rows = rows
        self.row0 = row0
        self.kept: NDArray[np.bool_] | None = None
        self.dropped: dict[str, int] = {}
        self._seen: set[str] = set()
        self._first: tuple[int, str] | None = None

    def column(self, name: str) -> None:
        """A data column used by what follows."""
        if name not in self._seen:
            self._seen.add(name)
            self.drop(f"{name}: missing", self.rows.missing(name))

    def drop(self, reason: str, bad: NDArray[np.bool_] | None) -> None:
        """Take rows off; where that is not allowed, note the first row and its first reason."""
        if bad is None:
            return
        if self.spec.missing != "drop":
            row = int(np.argmax(bad))
            if bad[row] and (self._first is None or row < self._first[0]):
                self._first = row, reason
            return
        fresh = bad if self.kept is None else bad & self.kept
        count = int(np.count_nonzero(fresh))
        if count == 0:
            return
        self.dropped[reason] = count
        self.kept = ~bad if self.kept is None else self.kept & ~bad

    def check(self) -> None:
        """Refuse rows that are missing something, unless such rows are dropped."""
        if self._first is not None:
            row, reason = self._first
            raise MissingDataError(
                f"{reason} in row {self.row0 + row}{self.rows.place}; "
                'missing="drop" leaves such rows out and counts them'
            )

    def place(self, row: int) -> str:
        """Which row of the data one of the complete rows is, for messages."""
        if self.kept is not None:
            row = int(np.flatnonzero(self.kept)[row])
        return f"row {self.row0 + row}{self.rows.place}"


def block(
    spec: DesignSpec,
    table: pa.Table,
    row0: int = 0,
    where: str = "",
    index: LabelIndex | None = None,
) -> Batch:
    """Turn a batch of rows into carried columns.

    Parameters
    ----------
    spec
        what to compute
    table
        n rows with at least the columns of `spec`
    row0
        number of the batch's first row in the data, for messages
    where
        name of the batch, for messages
    index
        numbers the groups; without it, the batch's own groups are numbered, in any order

    Raises
    ------
    MissingDataError
        a value is missing and the spec does not drop such rows
    DataError
        a column has another type than in the pilot, a weight is not positive, or a factor has too
        many levels
    """
    rows = Rows(table, spec.context, where)
    complete = _Complete(spec, rows, row0)
    variables: list[Floats] = []
    factors: dict[str, Factor] = {}
    for item in spec.inputs:
        _check_types(spec, rows, item)
        for name in columns_of(item.node):
            complete.column(name)
        if isinstance(item, Category):
            factors[item.name] = rows.factor(item.node)
            complete.drop(f"{item.name}: missing", _uncoded(factors[item.name].codes))
        else:
            variables.append(rows.variable(item))
            if not isinstance(item.node, Name):
                text = spec.formula.response_text if item.name == RESPONSE else item.name
                complete.drop(f"{text}: not finite", rows.not_finite(variables[-1]))
    group, labels = _groups(spec, rows, complete, index)
    weights = None
    if spec.weights is not None:
        weights = rows.number(spec.weights)
        complete.column(spec.weights)
    if spec.offset is not None:
        complete.column(spec.offset)
        with np.errstate(over="ignore"):  # refused below
            variables[0] = variables[0] - rows.number(spec.offset)
    complete.check()
    kept = complete.kept
    if kept is not None:
        variables = [v[kept] for v in variables]
        factors = {k: Factor(f.codes[kept], f.levels, f.declared) for k, f in factors.items()}
        weights = None if weights is None else weights[kept]
        group = group[kept]
        if labels is not None:
            group, labels = _regroup(group, labels)
    _check_weights(spec, weights, complete)
    _check_sizes(spec, variables, complete)
    levels = {name: _levels_met(name, factor, rows.place) for name, factor in factors.items()}
    n_groups = len(labels) if labels is not None else len(index or ())
    made = _assemble(spec, variables, factors, group, n_groups, weights, rows.place)
    return Batch(made, labels, complete.dropped, levels)


def _check_types(spec: DesignSpec, rows: Rows, item: Input) -> None:
    """Refuse a column of categories that comes as numbers in this batch."""
    for name in columns_of(item.node):
        type_ = rows.column(name).type
        if name in spec.text_columns and kind_of(type_) == "number":
            raise DataError(
                f"column {name!r} has type {type_}{rows.place}, but holds categories in the first "
                "rows of the data; give the column one type everywhere"
            )


def _uncoded(codes: Codes) -> NDArray[np.bool_] | None:
    """Rows without a level."""
    if len(codes) == 0 or codes.min() >= 0:
        return None
    bad: NDArray[np.bool_] = codes < 0
    return bad


def _groups(
    spec: DesignSpec, rows: Rows, complete: _Complete, index: LabelIndex | None
) -> tuple[Codes, keys.Labels | None]:
    """Codes and, without an index, labels of the cells of all rows."""
    for key in spec.keys:
        if not isinstance(key.node, Name):  # an expression may hide that a column is missing
            for name in columns_of(key.node):
                complete.column(name)
    columns = [rows.key(key.node) for key in spec.keys]
    labels = None
    if index is None:
        codes, labels = keys.encode(columns, spec.group)
    else:
        codes = index.encode(columns)
    if _uncoded(codes) is not None:
        for name, column in zip(spec.group, columns, strict=True):
            alone, _ = keys.encode([column], [name])
            complete.drop(f"{name}: missing", _uncoded(alone))
    return codes, labels


def _check_weights(spec: DesignSpec, weights: Floats | None, complete: _Complete) -> None:
    """Refuse a weight that is not positive in a row that is used."""
    if weights is None or len(weights) == 0 or weights.min() > 0:
        return
    row = int(np.argmax(weights <= 0))
    if weights[row] <= 0:
        raise DataError(
            f"weight {spec.weights!r} is {weights[row]:g} in {complete.place(row)}; "
            "weights must be positive"
        )


def _check_sizes(spec: DesignSpec, variables: Sequence[Floats], complete: _Complete) -> None:
    """Refuse values, of complete rows, so large that the cross-products would overflow."""
    if _plainly_small(spec, variables, complete.rows):
        return
    digits: dict[str, float] = {}
    frame = zip(spec.frame.names, spec.frame.shift, spec.frame.scale, variables, strict=True)
    for name, shift, scale, values in frame:
        if len(values) == 0:
            return
        low, high = float(values.min()), float(values.max())
        largest = max(shift - low, high - shift) / scale
        if not largest <= MAX_SIZE:
            row = int(values.argmin() if shift - low > high - shift else values.argmax())
            shown = spec.formula.response_text if name == RESPONSE else name
            raise DataError(
                f"{shown}: values so large that their squares overflow ({values[row]:g} in "
                f"{complete.place(row)}, among values near {max(abs(shift), scale):.1g}); "
                "rescale the column, or leave the row out"
            )
        digits[name] = math.log10(max(largest, 1.0))
    for monomial in {m for need in spec.needs for m in need.monomials}:
        if sum(digits[name] * power for name, power in monomial) > math.log10(MAX_SIZE):
            raise DataError(
                f"{shown_powers(monomial)}: values so large that their squares overflow"
                f"{complete.rows.place}; rescale the column, or leave outlying rows out"
            )


def _plainly_small(spec: DesignSpec, variables: Sequence[Floats], rows: Rows) -> bool:
    """Whether norms tell that nothing overflows: no value is larger, and one is found faster."""
    frame = zip(spec.frame.names, spec.frame.shift, spec.frame.scale, variables, strict=True)
    with np.errstate(over="ignore"):
        bounds = {n: (abs(shift) + rows.norm(x)) / scale for n, shift, scale, x in frame}
    if not all(bound <= MAX_SIZE for bound in bounds.values()):
        return False
    digits = {name: math.log10(max(bound, 1.0)) for name, bound in bounds.items()}
    return all(
        sum(digits[name] * power for name, power in monomial) <= math.log10(MAX_SIZE)
        for need in spec.needs
        for monomial in need.monomials
    )


def _regroup(group: Codes, labels: keys.Labels) -> tuple[Codes, keys.Labels]:
    """Only groups that still have rows, numbered 0..G-1."""
    used = np.bincount(group, minlength=len(labels)) > 0
    if used.all():
        return group, labels
    position = np.cumsum(used, dtype=np.int32) - 1
    return position.astype(np.int32)[group], labels.take(np.flatnonzero(used))


def _levels_met(name: str, factor: Factor, place: str) -> FactorLevels:
    met = np.flatnonzero(np.bincount(factor.codes, minlength=len(factor.levels)))
    check_levels(name, len(met), place)
    levels = tuple(factor.levels[i] for i in met)
    return FactorLevels(levels, factor.levels if factor.declared and levels else None)


def _assemble(
    spec: DesignSpec,
    variables: Sequence[Floats],
    factors: Mapping[str, Factor],
    group: Codes,
    n_groups: int,
    weights: Floats | None,
    place: str,
) -> DesignBlock:
    """Block of complete rows: the cells met, and a recipe for each carried column."""
    index = {name: i for i, name in enumerate(spec.frame.names)}
    columns: list[Column] = []
    recipes: list[Recipe] = []
    random: list[int] = []
    cells: list[Codes] = []
    for need in spec.needs:
        powers = [tuple((index[v], p) for v, p in monomial) for monomial in need.monomials]
        codes, met = _cells([factors[name] for name in need.categories], need, place)
        if need.categories:
            cells.append(codes)
        source = len(cells) - 1 if need.categories else -1
        for code, cell in enumerate(met):
            for monomial, power, drawn in zip(need.monomials, powers, need.random, strict=True):
                if drawn:
                    random.append(len(columns))
                columns.append(Column(cell, monomial))
                recipes.append(Recipe(source, code, power))
        if len(columns) > MAX_COLUMNS:
            raise DataError(
                f"{':'.join(need.categories)} has {len(met)} combinations of levels{place}: more "
                "than a fixed effect can have; as a group it belongs right of a bar"
            )
    assert columns[random[0]] == CONSTANT
    return DesignBlock(
        columns=tuple(columns),
        recipes=tuple(recipes),
        random=tuple(random),
        frame=spec.frame,
        values=tuple(variables),
        cells=tuple(cells),
        group=group,
        n_groups=n_groups,
        weights=weights,
        references=spec.references,
        recoding=spec.recoding,
    )


def _cells(
    factors: Sequence[Factor], need: Need, place: str
) -> tuple[Codes, list[tuple[tuple[str, Level], ...]]]:
    """Codes of the combinations of levels that the rows have, and the combinations."""
    if not factors:
        return np.empty(0, np.int32), [()]
    sizes = [len(f.levels) for f in factors]
    joint = factors[0].codes.astype(np.int64)
    for factor in factors[1:]:
        joint = joint * len(factor.levels) + factor.codes
    total = int(np.prod(sizes, dtype=object))
    if total <= max(4 * len(joint), 1024):
        met = np.flatnonzero(np.bincount(joint, minlength=total))
        position = np.zeros(total, np.int32)
        position[met] = np.arange(len(met), dtype=np.int32)
        codes = position[joint]
    else:
        met, inverse = np.unique(joint, return_inverse=True)
        codes = inverse.astype(np.int32)
    check_levels(":".join(need.categories), len(met), place)
    where = np.unravel_index(met, sizes) if len(met) else [[]] * len(sizes)
    return codes, [
        tuple(
            (name, factor.levels[i])
            for name, factor, i in zip(need.categories, factors, combination, strict=True)
        )
        for combination in zip(*where, strict=True)
    ]
