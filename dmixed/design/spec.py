"""What every batch is turned into: decided once, from the formula and a pilot sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from dmixed.blocks import RESPONSE, Floats, Frame, Recoding
from dmixed.design.columns import Context, Rows, kind_of
from dmixed.design.pilot import frame_of
from dmixed.design.spans import Category, Product, category_of, span
from dmixed.errors import DataError, NotSupportedError
from dmixed.formula import Bar, ParsedFormula, parse_terms
from dmixed.formula.expressions import Call, Name, Node, columns_of
from dmixed.formula.polynomials import (
    ONE,
    Expansion,
    Monomial,
    Polynomial,
    Unknown,
    Variable,
    plus,
    times,
)
from dmixed.formula.terms import Term

Input: TypeAlias = Variable | Category


@dataclass(frozen=True, slots=True)
class Need:
    """Carried columns of one set of categories.

    Attributes
    ----------
    categories
        names, sorted; none for columns of all rows
    monomials
        products of powers carried in every cell
    random
        for each monomial, whether the random columns include it
    """

    categories: tuple[str, ...]
    monomials: tuple[Monomial, ...]
    random: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """One key column of the cells, the combinations of all keys that the rows have.

    Attributes
    ----------
    name
        of the column, or the text of an expression
    node
        the column, or an expression under ``C()`` whose values are the levels
    """

    name: str
    node: Node


@dataclass(frozen=True, slots=True)
class RandomTerm:
    """Random columns that one set of keys divides into levels.

    Attributes
    ----------
    block
        position of its bar in ``formula.bars``
    key
        positions in `DesignSpec.keys`
    products
        numeric factors of the columns (in a bar, all factors); no factor is the constant
    reduced
        in a variance component, positions in `DesignSpec.keys` of categories coded by contrasts:
        within each group, their first level met has no columns
    written
        the products with their categories
    """

    block: int
    key: tuple[int, ...]
    products: tuple[Product, ...]
    reduced: tuple[int, ...]
    written: tuple[Product, ...]


@dataclass(frozen=True, slots=True)
class DesignSpec:
    """Everything a worker needs to turn a batch of rows into a block; small and picklable.

    Attributes
    ----------
    formula
        with ``pi`` decided
    text_columns
        data columns that are categories by their type
    frame
        shifts and scales of the variables, from the pilot
    inputs
        variables (the response first) and categories, in the order in which rows with missing
        values are counted
    fixed_inputs
        those of the fixed terms
    fixed
        products of factors that span the fixed terms
    keys
        key columns of the cells, those of the model's groups first
    terms
        random columns: one term per bar, one or more per variance component
    needs
        carried columns
    weights, offset
        data columns, or None
    missing
        "drop", "raise" or "none"
    context
        the caller's functions
    columns
        data columns to read
    references
        take sums about a row of each group, see `references`; moments with and without them add
    recoding
        take sums of combinations of the carried columns, see `whitening`; likewise
    carry
        terms whose columns are summed by group too, in the words of a formula, although the model
        does not have them, or not as random ones
    group_crossproducts
        all carried columns are summed by group: ``WtF`` has F'F of each
    """

    formula: ParsedFormula
    text_columns: frozenset[str]
    frame: Frame
    inputs: tuple[Input, ...]
    fixed_inputs: tuple[Input, ...]
    fixed: tuple[Product, ...]
    keys: tuple[Key, ...]
    terms: tuple[RandomTerm, ...]
    needs: tuple[Need, ...]
    weights: str | None
    offset: str | None
    missing: str
    context: Context
    columns: tuple[str, ...]
    references: bool = False
    recoding: Recoding | None = None
    carry: tuple[str, ...] = ()
    group_crossproducts: bool = False

    @property
    def group(self) -> tuple[str, ...]:
        """Names of the keys."""
        return tuple(key.name for key in self.keys)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Numeric inputs, aligned with the frame."""
        return tuple(x for x in self.inputs if isinstance(x, Variable))

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categorical inputs."""
        return tuple(x for x in self.inputs if isinstance(x, Category))

    def with_crossproducts(self) -> DesignSpec:
        """The same with all columns summed by group."""
        needs = tuple(replace(need, random=(True,) * len(need.monomials)) for need in self.needs)
        return replace(self, needs=needs, group_crossproducts=True)

    def compatible(self, other: DesignSpec) -> bool:
        """Whether moments made by both specs may be added."""
        return _key(self) == _key(other)


def _key(spec: DesignSpec) -> tuple[object, ...]:
    """What decides the meaning of the carried columns."""
    return (  # not the frame: shifts and scales may differ, moments are moved to one of them
        *(spec.inputs, spec.fixed, spec.keys, spec.terms, spec.needs),
        *(spec.weights, spec.offset),
    )


def specify(
    formula: ParsedFormula,
    pilot: pa.Table,
    *,
    weights: str | None = None,
    offset: str | None = None,
    missing: str = "drop",
    context: Context | None = None,
    carry: Sequence[str] = (),
    group_crossproducts: bool = False,
) -> DesignSpec:
    """Decide which columns are categories, and the shift and scale of each variable.

    Parameters
    ----------
    formula
        the model
    pilot
        some rows with all columns of the formula, weights and offset; only types, means and
        standard deviations are taken from it, and the fit does not depend on the latter two
    weights, offset
        data columns
    missing
        what to do with rows that have missing values: "drop", "raise" or "none" (there are none)
    context
        the caller's row-wise functions by name
    carry, group_crossproducts
        see `DesignSpec`

    Raises
    ------
    DataError
        a column is not there, or its type cannot be used where the formula has it
    FormulaError
        a term of ``carry`` cannot be read
    """
    formula = formula.resolved(pilot.column_names)
    rows = Rows(pilot, context or {})
    names = [*formula.columns, *carried_names(carry, pilot.column_names, context or ())]
    text = frozenset(x for x in names if kind_of(rows.column(x).type) == "category")
    spec = specification(
        formula,
        text,
        weights=weights,
        offset=offset,
        missing=missing,
        context=context,
        carry=carry,
        group_crossproducts=group_crossproducts,
        available=pilot.column_names,
    )
    values = {x.name: _pilot_values(rows, x) for x in spec.inputs}
    for key in spec.keys:
        if not isinstance(key.node, Name):
            rows.key(key.node)
    for name in (weights, offset):
        if name is not None:
            rows.number(name)
    if offset is not None:
        with np.errstate(over="ignore"):  # such rows are refused, or are not used
            values[RESPONSE] = values[RESPONSE] - rows.number(offset)
    numeric = {x.name: values[x.name] for x in spec.variables}
    return replace(spec, frame=frame_of(numeric, formula.response_text))


def specification(
    formula: ParsedFormula,
    text_columns: frozenset[str],
    *,
    weights: str | None = None,
    offset: str | None = None,
    missing: str = "drop",
    context: Context | None = None,
    carry: Sequence[str] = (),
    group_crossproducts: bool = False,
    available: Collection[str] | None = None,
) -> DesignSpec:
    """What a formula asks for once it is known which columns are categories.

    Shifts are 0 and scales 1.

    Parameters
    ----------
    formula
        with ``pi`` decided
    text_columns
        data columns that are categories by their type
    weights, offset, missing, context, carry, group_crossproducts
        see `specify`
    available
        columns of the data, if ``carry`` may use others than the formula
    """
    _check_options(missing, context)
    fixed = span(formula.fixed, text_columns)
    keys, terms = _random(formula.bars, text_columns)
    known = formula.columns if available is None else available
    more = parse_terms(carry, "carry", known, context or ())
    inputs, fixed_inputs, needs = _plan(
        formula, text_columns, fixed, terms, span(more, text_columns)
    )
    variables = tuple(x.name for x in inputs if isinstance(x, Variable))
    extra = [x for x in (weights, offset) if x is not None]
    spec = DesignSpec(
        formula,
        text_columns,
        Frame(variables, (0.0,) * len(variables), (1.0,) * len(variables)),
        inputs,
        fixed_inputs,
        fixed,
        keys,
        terms,
        needs,
        weights,
        offset,
        missing,
        dict(context or {}),
        tuple(dict.fromkeys([*formula.columns, *_names(more), *extra])),
        carry=tuple(carry),
    )
    return spec.with_crossproducts() if group_crossproducts else spec


def carried_names(
    carry: Sequence[str], available: Collection[str], context: Collection[str] = ()
) -> tuple[str, ...]:
    """Data columns that terms to carry use.

    Raises
    ------
    FormulaError, DataError
        a term cannot be read; the data lack a column
    """
    return _names(parse_terms(carry, "carry", available, context))


def _names(terms: Sequence[Term]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for t in terms for f in t.factors for name in columns_of(f)))


def _check_options(missing: str, context: Context | None) -> None:
    if missing not in ("drop", "raise", "none"):
        raise DataError(f'missing must be "drop", "raise" or "none", not {missing!r}')
    if context is not None and not (
        isinstance(context, Mapping) and all(callable(f) for f in context.values())
    ):
        raise DataError("context must map names to functions, as {'f': f}")


def _random(
    bars: Sequence[Bar], text_columns: frozenset[str]
) -> tuple[tuple[Key, ...], tuple[RandomTerm, ...]]:
    """Keys and random terms of a formula."""
    keys: dict[Key, int] = {}
    terms: list[RandomTerm] = []
    for block, bar in enumerate(bars):
        group = tuple(keys.setdefault(Key(x, Name(x, x)), len(keys)) for x in bar.group)
        by_key: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[Product, Product]]] = {}
        for written in span(bar.terms, text_columns):
            numeric: list[tuple[Node, bool]] = []
            levels: dict[int, bool] = {}  # positions of categories, and whether they are reduced
            for factor, reduced in written:
                category = category_of(factor, text_columns) if bar.component else None
                if category is None:
                    numeric.append((factor, reduced))
                    continue
                _check_coding(bar, factor, category, reduced)
                at = keys.setdefault(key_of(category), len(keys))
                levels[at] = levels.get(at, False) or reduced
            key = (*group, *sorted(levels.keys() - set(group)))
            reduced_at = tuple(at for at in key if levels.get(at))
            by_key.setdefault((key, reduced_at), []).append((tuple(numeric), written))
        for (key, reduced_at), found in by_key.items():
            products, full = zip(*found, strict=True)
            terms.append(RandomTerm(block, key, products, reduced_at, full))
    return tuple(keys), tuple(terms)


def key_of(category: Category) -> Key:
    """Key whose levels are those of a category."""
    node = category.node
    return Key(node.column if isinstance(node, Name) else category.name, node)


def _check_coding(bar: Bar, factor: Node, category: Category, reduced: bool) -> None:
    """Refuse a category that a component cannot code level by level."""
    given = factor.option("contrasts") if isinstance(factor, Call) else None
    treatment = isinstance(given, Call) and given.function in ("contr.treatment", "Treatment")
    where = f"the variance component {bar.component!r}: {factor.text}"
    if isinstance(factor, Call) and factor.option("levels") is not None:
        raise NotSupportedError(
            f"{where}: levels= has no meaning there, every level that is met counts; leave it out"
        )
    if isinstance(given, Call) and (not treatment or (reduced and given.options)):
        raise NotSupportedError(
            f"{where}: contrasts other than treatment contrasts, whose base is the first level of "
            f"each group, are not supported there; write 0 + C({category.name}), which has a "
            "column for each level"
        )


def _plan(
    formula: ParsedFormula,
    text_columns: frozenset[str],
    fixed: Sequence[Product],
    terms: Sequence[RandomTerm],
    more: Sequence[Product],
) -> tuple[tuple[Input, ...], tuple[Input, ...], tuple[Need, ...]]:
    """Inputs, those of the fixed terms, and carried columns of a formula and of ``more``."""
    expansion = Expansion(Unknown())
    inputs: dict[Input, None] = {}
    needs: dict[tuple[str, ...], dict[Monomial, bool]] = {(): {ONE: True}}
    products = [(product, False) for product in fixed]
    fixed_inputs: tuple[Input, ...] = ()
    products += [(product, True) for term in terms for product in term.products]
    products += [(product, True) for product in more]
    for i, (product, random) in enumerate(products):
        carried: Polynomial = {ONE: 1.0}
        cells: set[str] = set()
        for factor, _ in product:
            category = category_of(factor, text_columns)
            if category is not None:
                inputs.setdefault(category)
                cells.add(category.name)
                continue
            union: Polynomial = {ONE: 1.0}
            for _, polynomial in expansion.columns(factor):
                union = plus(union, polynomial)
            carried = times(carried, union, factor)
            inputs.update(dict.fromkeys(expansion.variables.values()))
        need = needs.setdefault(tuple(sorted(cells)), {})
        for monomial in carried:
            need[monomial] = need.get(monomial, False) or random
        if i == len(fixed) - 1:
            fixed_inputs = tuple(inputs)
    for polynomial in expansion.learned:
        for monomial in polynomial:
            needs[()].setdefault(monomial, False)
    needs[()][((RESPONSE, 1),)] = False
    return (
        (Variable(RESPONSE, formula.response), *inputs),
        fixed_inputs,
        tuple(Need(c, tuple(m), tuple(m.values())) for c, m in needs.items()),
    )


def _pilot_values(rows: Rows, item: Input) -> Floats:
    """Values of a variable in the pilot; for a category only its type is checked."""
    if isinstance(item, Category):
        for name in columns_of(item.node):
            if kind_of(rows.column(name).type) is None:
                raise DataError(
                    f"column {name!r} has type {rows.column(name).type}: convert it to text or "
                    "a number"
                )
        return np.empty(0)
    return rows.variable(item)
