"""Models on some of the columns of moments: what they carry, made of what was carried."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Codes, Column, Floats, Frame, Level
from dmixed.cellmoments import CellMoments, Summary
from dmixed.derived import Derivation, coarsen, derive, selection
from dmixed.design import DesignSpec, FactorLevels, specification
from dmixed.design.coding import MAX_COLUMNS
from dmixed.design.columns import Rows, kind_of
from dmixed.design.pilot import frame_of
from dmixed.design.spans import Category
from dmixed.design.spec import Need
from dmixed.dispatch import gather, one_blas_thread
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.formula import ParsedFormula
from dmixed.formula.expressions import Call, Name, columns_of, walk
from dmixed.formula.polynomials import LEARNED, ONE, Monomial, Variable
from dmixed.formula.terms import display
from dmixed.groupcolumns import GroupColumns, Within
from dmixed.moments import GroupMoments

WIDE = 2
"""Times the columns of a model that are worked on, rather than to copy those that it needs."""

Cell: TypeAlias = tuple[tuple[str, Level], ...]
Number: TypeAlias = "float | Floats"
Products: TypeAlias = dict[Monomial, Number]
"""Sums of products of powers of carried variables, with numbers for all cells or for each."""


@one_blas_thread
def submodel(
    cells: CellMoments | RemoteMoments, formula: ParsedFormula, known: GroupColumns, small: bool
) -> CellMoments | RemoteMoments:
    """Moments of a model whose columns are made of carried ones and of known ones.

    Parameters
    ----------
    cells
        moments of the larger model
    formula
        the model
    known
        columns known after the pass
    small
        without columns that the model does not need; else they may stay, which saves a copy

    Raises
    ------
    DataError
        a column was not carried, or not by group
    """
    plan = _plan(cells, formula, known, small)
    if isinstance(cells, CellMoments):
        return _made(cells, plan)
    if plan.regrouped is not None:
        raise NotSupportedError(
            f"the groups of {formula.text!r} are not those of the moments, which are on the "
            'workers of a cluster: collect them with evaluate_on="driver"'
        )
    futures = cells.each(partial(_made, plan=plan))
    client = cells.client
    summaries: list[Summary] = gather(client, client.map(_summary, futures, pure=False))
    return RemoteMoments(reduce(add, summaries), tuple(futures), client)


def own_model(cells: CellMoments | RemoteMoments) -> CellMoments | RemoteMoments:
    """Moments with the random columns of their own formula alone, which a fit needs."""
    spec = cells.spec
    if not spec.carry and not spec.group_crossproducts:
        return cells
    return submodel(cells, spec.formula, GroupColumns(), False)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How moments of a model are made of others.

    Attributes
    ----------
    spec, levels
        of the model
    wanted
        its columns; None where they are those there are, with some of them random
    random
        positions of the random columns among those there are, if ``wanted`` is None
    key
        positions of its keys in the labels there are, if the cells stay as they are
    regrouped
        else the cell of the model that each cell is a part of, and labels of those
    """

    spec: DesignSpec
    levels: Mapping[str, FactorLevels]
    wanted: Derivation | None
    random: tuple[int, ...]
    key: tuple[int, ...]
    regrouped: tuple[NDArray[np.intp], keys.Labels] | None


def _summary(cells: CellMoments) -> Summary:
    return cells.summary


def _made(cells: CellMoments, plan: Plan) -> CellMoments:
    """Moments of the model."""
    group = cells.group
    group = _fewer_random(group, plan.random) if plan.wanted is None else derive(group, plan.wanted)
    spec = replace(plan.spec, recoding=group.recoding)
    sizes, labels = cells.sizes, cells.labels
    if plan.regrouped is None:
        labels = labels.columns(plan.key)
    else:
        codes, labels = plan.regrouped
        group, sizes = coarsen(group, codes, len(labels)), ()
    group = _without_empty(group) if plan.wanted is not None and plan.wanted.varying else group
    return CellMoments(spec, plan.levels, labels, group, cells.dropped, sizes)


def _fewer_random(group: GroupMoments, random: tuple[int, ...]) -> GroupMoments:
    """The same with some of the random columns; what lies side by side is not copied."""
    rows = [group.random.index(j) for j in random]
    if rows == list(range(len(group.random))):
        return group
    side = rows == list(range(rows[0], rows[0] + len(rows)))
    WtF = group.WtF[:, rows[0] : rows[-1] + 1] if side else group.WtF[:, rows]
    return replace(group, random=random, WtF=WtF)


def _without_empty(group: GroupMoments) -> GroupMoments:
    """The same without columns of cells that no row is in."""
    square = np.diag(group.gram)
    used = [j for j, c in enumerate(group.columns) if not c.cell or square[j] > 0.0]
    if len(used) == len(group.columns):
        return group
    return derive(group, selection(group, used, [j for j in group.random if j in used]))


class _Lack(Exception):
    """A column cannot be had: what it is, and whether it is there but not by group."""

    def __init__(self, text: str, by_group: bool) -> None:
        super().__init__(text, by_group)
        self.text, self.by_group = text, by_group


def _plan(
    cells: CellMoments | RemoteMoments, formula: ParsedFormula, known: GroupColumns, small: bool
) -> Plan:
    stored = cells.spec
    table = known.table(stored, cells.labels) if isinstance(cells, CellMoments) else pa.table({})
    spec, table_rows = _specified(stored, formula, known, table), Rows(table, stored.context)
    inputs = _Inputs(stored, cells, known, table_rows)
    lacks: dict[str, bool] = {}
    for item in spec.inputs:
        try:
            inputs.add(item)
        except _Lack as lack:
            lacks[lack.text] = lack.by_group
    _refuse(stored, formula, lacks)
    _check_learned(spec, inputs)
    spec = replace(spec, frame=inputs.frame(spec), references=stored.references)
    columns, random = _columns(spec.needs, inputs, lacks)
    _refuse(stored, formula, lacks)
    wanted = _derivation(inputs, spec.frame, columns, random, lacks)
    _refuse(stored, formula, lacks)
    levels = {c.name: inputs.levels[c.name] for c in spec.categories}
    positions, regrouped = _regrouped(stored, spec, cells, table_rows)
    direct = _direct(inputs, wanted, small)
    if direct is not None:
        return Plan(spec, levels, None, direct, positions, regrouped)
    return Plan(spec, levels, wanted, (), positions, regrouped)


def _specified(
    stored: DesignSpec, formula: ParsedFormula, known: GroupColumns, table: pa.Table
) -> DesignSpec:
    """What the model would evaluate on rows."""
    available = dict.fromkeys([*stored.columns, *table.column_names, *known.names])
    for name in dict.fromkeys(name for bar in formula.bars for name in bar.group):
        if name not in stored.group and name not in table.column_names:
            raise DataError(
                f"{formula.text!r}: the moments are not divided by {name!r}, but by "
                f"{', '.join(stored.group)}; collect them with a formula that has a bar for it, "
                f"(1 | {name}), or join it, if each group has one {name!r}"
            )
    lacks = {name: False for name in formula.columns if name not in available}
    _refuse(stored, formula, lacks)
    resolved = formula.resolved(tuple(available))
    if resolved.response != stored.formula.response and display(resolved.response) != (
        stored.formula.response_text
    ):
        raise DataError(
            f"the moments are of the response {stored.formula.response_text!r}, not of "
            f"{resolved.response_text!r}"
        )
    resolved = replace(resolved, response=stored.formula.response)
    text = {f.name for f in table.schema if kind_of(f.type) == "category"}
    return specification(
        resolved,
        (stored.text_columns | text) & set(resolved.columns),
        weights=stored.weights,
        offset=stored.offset,
        missing=stored.missing,
        context=stored.context,
    )


def _refuse(stored: DesignSpec, formula: ParsedFormula, lacks: Mapping[str, bool]) -> None:
    """One error for all columns that cannot be had."""
    if not lacks:
        return
    absent = [text for text, by_group in lacks.items() if not by_group]
    whole = [text for text, by_group in lacks.items() if by_group]
    said = [f"do not have {', '.join(absent)}"] if absent else []
    said += [f"have {', '.join(whole)} in total only, not by group"] if whole else []
    raise DataError(
        f"{formula.text!r}: the moments of {stored.formula.text!r} {', and '.join(said)}; "
        f"collect them with carry={[*absent, *whole]}"
        + (", or with a larger formula" if absent else "")
        + (", or join what is known of groups" if absent else "")
    )


class _Inputs:
    """Where the inputs of a model come from.

    Attributes
    ----------
    levels
        of the categories
    codes
        (N,) of the categories that are known by cell, in the order of their levels
    """

    def __init__(
        self,
        stored: DesignSpec,
        cells: CellMoments | RemoteMoments,
        known: GroupColumns,
        table: Rows,
    ) -> None:
        here = isinstance(cells, CellMoments)
        source = cells.group if isinstance(cells, CellMoments) else cells.summary.totals
        self.stored, self.known, self.table = stored, known, table
        self.columns, self.random = source.columns, source.random
        self.recoded = source.recoding is not None
        self.own_levels = cells.levels if here else cells.summary.levels  # type: ignore[union-attr]
        self.levels: dict[str, FactorLevels] = {}
        self.codes: dict[str, Codes] = {}
        self.values: dict[str, Floats] = {}
        self.within: dict[str, Within] = {}
        self.carried = {v.name: v.node for v in stored.variables}
        self.places: dict[tuple[frozenset[str], Monomial], list[tuple[Cell, int]]] = {}
        for j, column in enumerate(self.columns):
            names = frozenset(name for name, _ in column.cell)
            self.places.setdefault((names, column.powers), []).append((column.cell, j))

    def add(self, item: Variable | Category) -> None:
        """Find an input.

        Raises
        ------
        _Lack
            it is neither carried nor known
        """
        in_table = set(columns_of(item.node)) <= set(self.table.table.column_names)
        if isinstance(item, Category):
            if item.name in self.own_levels:
                self.levels[item.name] = self.own_levels[item.name]
            elif in_table:
                factor = self.table.factor(item.node)
                met = np.flatnonzero(np.bincount(factor.codes, minlength=len(factor.levels)))
                found = tuple(factor.levels[i] for i in met)
                declared = factor.levels if factor.declared else None
                self.levels[item.name] = FactorLevels(found, declared)
                self.codes[item.name] = np.searchsorted(met, factor.codes).astype(np.int32)
            else:
                name = item.node
                raise _Lack(f"C({name.text})" if isinstance(name, Name) else item.name, False)
        elif item.name in self.carried:
            pass
        elif isinstance(item.node, Name) and item.node.column in self.known.within:
            self.within[item.name] = self.known.within[item.node.column]
        elif in_table:
            values = self.table.variable(item)
            if not np.isfinite(values).all():
                raise DataError(f"{item.name} is not finite for some groups")
            self.values[item.name] = values
        else:
            raise _Lack(item.name, False)

    def frame(self, spec: DesignSpec) -> Frame:
        """Shifts and scales: as carried, or from what is known."""
        found: dict[str, tuple[float, float]] = {}
        for variable in spec.variables:
            name = variable.name
            if name in self.values:
                own = frame_of({name: self.values[name]}, spec.formula.response_text)
                found[name] = own.of(name)
            elif name in self.within:
                found[name] = 0.0, self.within[name].scale
            else:
                found[name] = self.stored.frame.of(name)
        shift, scale = zip(*found.values(), strict=True)
        return Frame(tuple(found), shift, scale)

    def products(self, frame: Frame, monomial: Monomial) -> Products:
        """A product of powers in carried variables and numbers known by cell."""
        found: Products = {ONE: 1.0}
        for name, power in monomial:
            one: Products = {((name, 1),): 1.0}
            if name in self.values:
                shift, scale = frame.of(name)
                one = {ONE: (self.values[name] - shift) / scale}
            elif name in self.within:
                within = self.within[name]
                one = {m: value / within.scale for m, value in within.polynomial.items()}
                one[ONE] = -within.mean / within.scale
            for _ in range(power):
                found = _times(found, one)
        return found

    def indicator(self, cell: Cell) -> tuple[Cell, Number]:
        """A cell as one of carried categories, and 1 or 0 where it depends on known ones."""
        carried, number = [], 1.0
        for name, level in cell:
            if name in self.codes:
                inside = self.codes[name] == self.levels[name].levels.index(level)
                number = number * inside
            else:
                carried.append((name, level))
        return tuple(carried), number

    def made_of(self, cell: Cell, powers: Monomial, by_group: bool) -> list[int]:
        """Carried columns whose sum is a column, by group if that is needed.

        Raises
        ------
        _Lack
            there are none
        """
        names, own = frozenset(name for name, _ in cell), set(cell)
        sets = [key for key, power in self.places if power == powers and key >= names]
        for key in sorted(sets, key=lambda s: (len(s), sorted(s))):
            found = [j for other, j in self.places[key, powers] if own <= set(other)]
            if not by_group or set(found) <= set(self.random):
                return found
        raise _Lack(_term([*(name for name, _ in cell)], powers), bool(sets))

    def cells(self, categories: Sequence[str]) -> list[Cell]:
        """Combinations of levels that rows may be in, the last category fastest.

        Raises
        ------
        _Lack
            carried columns do not tell
        """
        carried = [name for name in categories if name not in self.codes]
        others = [name for name in categories if name in self.codes]
        sets = [key for key, power in self.places if power == ONE and key >= set(carried)]
        if not sets:
            raise _Lack(_term(carried, ONE), False)
        best = min(sets, key=lambda s: (len(s), sorted(s)))
        met = {tuple(p for p in cell if p[0] in carried) for cell, _ in self.places[best, ONE]}
        combined: list[Cell] = [()]
        if others:
            codes = np.unique(np.stack([self.codes[name] for name in others]), axis=1).T
            combined = [
                tuple((n, self.levels[n].levels[i]) for n, i in zip(others, row, strict=True))
                for row in codes
            ]
        pairs = itertools.product(sorted(met, key=repr), combined)
        return [tuple(sorted((*a, *b))) for a, b in pairs]


def _times(a: Products, b: Products) -> Products:
    found: Products = {}
    for first, x in a.items():
        for second, y in b.items():
            powers = dict(first)
            for name, exponent in second:
                powers[name] = powers.get(name, 0) + exponent
            key = tuple(sorted(powers.items()))
            found[key] = found[key] + x * y if key in found else x * y
    return found


def _term(categories: Sequence[str], powers: Monomial) -> str:
    """A product as a formula has it."""
    own = [name if p == 1 else f"I({name} ** {p})" for name, p in powers]
    return ":".join([*categories, *own])


def _columns(
    needs: Sequence[Need], inputs: _Inputs, lacks: dict[str, bool]
) -> tuple[list[Column], list[int]]:
    """Labels of the model's carried columns, and which are random."""
    columns: list[Column] = []
    random: list[int] = []
    for need in needs:
        try:
            met = inputs.cells(need.categories) if need.categories else [()]
        except _Lack as lack:
            lacks[lack.text] = lack.by_group
            continue
        if len(columns) + len(met) * len(need.monomials) > MAX_COLUMNS:
            raise DataError(
                f"{':'.join(need.categories)} has {len(met)} combinations of levels: more than a "
                "fixed effect can have; as a group it belongs right of a bar"
            )
        for cell in met:
            for monomial, drawn in zip(need.monomials, need.random, strict=True):
                if drawn:
                    random.append(len(columns))
                columns.append(Column(cell, monomial))
    return columns, random


def _derivation(
    inputs: _Inputs,
    frame: Frame,
    columns: Sequence[Column],
    random: Sequence[int],
    lacks: dict[str, bool],
) -> Derivation:
    """The model's carried columns, made of those there are."""
    T = np.zeros((len(inputs.columns), len(columns)))
    varying: list[tuple[int, int, Floats]] = []
    drawn, products = set(random), dict[Monomial, Products]()
    for j, column in enumerate(columns):
        if column.powers not in products:
            products[column.powers] = inputs.products(frame, column.powers)
        cell, inside = inputs.indicator(column.cell)
        for powers, value in products[column.powers].items():
            number = value * inside
            varies = isinstance(number, np.ndarray)
            try:
                made_of = inputs.made_of(cell, powers, varies or j in drawn)
            except _Lack as lack:
                lacks[lack.text] = lack.by_group
                continue
            for i in made_of:
                if isinstance(number, np.ndarray):
                    varying.append((i, j, number))
                else:
                    T[i, j] += number
    return Derivation(tuple(columns), tuple(random), frame, T, tuple(varying))


def _direct(inputs: _Inputs, wanted: Derivation, small: bool) -> tuple[int, ...] | None:
    """Random columns among those carried, if the model's columns are just some of these."""
    k, m = wanted.T.shape
    if wanted.varying or k > (m if small else WIDE * m):
        return None
    place = {column: j for j, column in enumerate(inputs.columns)}
    at = [place.get(column, -1) for column in wanted.columns]
    if min(at) < 0 or not (wanted.T[at, np.arange(m)] == 1.0).all() or wanted.T.sum() != m:
        return None
    drawn = {at[j] for j in wanted.random}
    if inputs.recoded and drawn != set(inputs.random):
        return None  # random columns are to be combinations of random ones
    return tuple(j for j in inputs.random if j in drawn)


def _check_learned(spec: DesignSpec, inputs: _Inputs) -> None:
    """Refuse statistics over rows that moments with row weights do not tell."""
    if spec.weights is None:
        return
    of_groups = {name for v in spec.variables if v.name in inputs.values for name in
                 columns_of(v.node)}  # fmt: skip
    for factor in dict.fromkeys(f for term in spec.formula.terms() for f in term.factors):
        for node in walk(factor):
            if not isinstance(node, Call) or node.function not in (*LEARNED, "poly"):
                continue
            used = set(columns_of(node))
            if used & set(inputs.known.within) or (used & of_groups and used - of_groups):
                raise NotSupportedError(
                    f"{node.text} is learned from rows without their weights, which the moments "
                    "have of carried columns and of columns of groups only; leave it out"
                )


def _regrouped(
    stored: DesignSpec, spec: DesignSpec, cells: CellMoments | RemoteMoments, table: Rows
) -> tuple[tuple[int, ...], tuple[NDArray[np.intp], keys.Labels] | None]:
    """Positions of the model's keys among those there are, and its cells if they are others."""
    place = {key.name: j for j, key in enumerate(stored.keys)}
    at = [place.get(key.name) for key in spec.keys]
    own = tuple(j for j in at if j is not None)
    if len(own) == len(at) == len(stored.keys):
        return own, None
    if not isinstance(cells, CellMoments):
        return own, (np.empty(0, np.intp), cells.no_labels())
    if len(own) == len(at):
        codes, labels = keys.subset(cells.labels, own)
        return own, (codes.astype(np.intp), labels)
    for key, j in zip(spec.keys, at, strict=True):
        if j is None and not set(columns_of(key.node)) <= set(table.table.column_names):
            raise DataError(
                f"the moments are not divided by {key.name}, which a variance component names: "
                "collect them with this component"
            )
    columns = [
        table.key(key.node) if j is None else cells.labels.arrays[j]
        for key, j in zip(spec.keys, at, strict=True)
    ]
    found, labels = keys.encode(columns, spec.group)
    return own, (found.astype(np.intp), labels)
