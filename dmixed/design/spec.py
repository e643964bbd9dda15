"""What every batch is turned into: decided once, from the formula and a pilot sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from formulaic import Formula

from dmixed.blocks import RESPONSE, Floats, Frame
from dmixed.design.columns import Context, Rows, kind_of
from dmixed.errors import DataError
from dmixed.formula.expressions import Call, Name, Node, columns_of
from dmixed.formula.parsing import ParsedFormula, categorical
from dmixed.formula.polynomials import (
    ONE,
    Expansion,
    Monomial,
    Polynomial,
    Unknown,
    Variable,
    check_size,
    plus,
    times,
)
from dmixed.formula.terms import Term
from dmixed.formula.tokens import quoted

Product: TypeAlias = tuple[tuple[Node, bool], ...]
"""Factors, each with all its columns or (True) reduced by one, as by contrasts."""


@dataclass(frozen=True, slots=True)
class Category:
    """A set of levels that rows fall in: a column, or an expression under ``C()``."""

    name: str
    node: Node


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
    bars
        likewise for each bar
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
    """

    formula: ParsedFormula
    text_columns: frozenset[str]
    frame: Frame
    inputs: tuple[Input, ...]
    fixed_inputs: tuple[Input, ...]
    fixed: tuple[Product, ...]
    bars: tuple[tuple[Product, ...], ...]
    needs: tuple[Need, ...]
    weights: str | None
    offset: str | None
    missing: str
    context: Context
    columns: tuple[str, ...]

    @property
    def group(self) -> tuple[str, ...]:
        """Key columns of the grouping factor."""
        return self.formula.group

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Numeric inputs, aligned with the frame."""
        return tuple(x for x in self.inputs if isinstance(x, Variable))

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categorical inputs."""
        return tuple(x for x in self.inputs if isinstance(x, Category))

    def category_of(self, factor: Node) -> Category | None:
        """The category that a factor codes; None for a numeric factor."""
        return _category(factor, self.text_columns)

    def compatible(self, other: DesignSpec) -> bool:
        """Whether moments made by both specs may be added."""
        return _key(self) == _key(other)


def _key(spec: DesignSpec) -> tuple[object, ...]:
    """What decides the meaning of the carried columns."""
    return (  # not the frame: shifts and scales may differ, moments are moved to one of them
        *(spec.inputs, spec.fixed, spec.bars, spec.needs),
        *(spec.group, spec.weights, spec.offset),
    )


def specify(
    formula: ParsedFormula,
    pilot: pa.Table,
    *,
    weights: str | None = None,
    offset: str | None = None,
    missing: str = "drop",
    context: Context | None = None,
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

    Raises
    ------
    DataError
        a column is not there, or its type cannot be used where the formula has it
    """
    if missing not in ("drop", "raise", "none"):
        raise DataError(f'missing must be "drop", "raise" or "none", not {missing!r}')
    if context is not None and not (
        isinstance(context, Mapping) and all(callable(f) for f in context.values())
    ):
        raise DataError("context must map names to functions, as {'f': f}")
    formula = formula.resolved(pilot.column_names)
    rows = Rows(pilot, context or {})
    text = frozenset(x for x in formula.columns if kind_of(rows.column(x).type) == "category")
    fixed = span(formula.fixed, text)
    bars = tuple(span(bar.terms, text) for bar in formula.bars)
    inputs, fixed_inputs, needs = _plan(formula, text, fixed, bars)
    values = {x.name: _pilot_values(rows, x) for x in inputs}
    for name in (weights, offset):
        if name is not None:
            rows.number(name)
    if offset is not None:
        with np.errstate(over="ignore"):  # such rows are refused, or are not used
            values[RESPONSE] = values[RESPONSE] - rows.number(offset)
    numeric = {x.name: values[x.name] for x in inputs if isinstance(x, Variable)}
    frame = _frame(numeric, formula.response_text)
    extra = [x for x in (weights, offset) if x is not None]
    return DesignSpec(
        formula,
        text,
        frame,
        inputs,
        fixed_inputs,
        fixed,
        bars,
        needs,
        weights,
        offset,
        missing,
        dict(context or {}),
        tuple(dict.fromkeys([*formula.columns, *extra])),
    )


def _category(factor: Node, text_columns: frozenset[str]) -> Category | None:
    data = categorical(factor)
    if data is None:
        if not (isinstance(factor, Name) and factor.column in text_columns):
            return None
        data = factor
    if isinstance(data, Name):
        return Category(quoted(data.column), Name(data.column, data.column))
    return Category(data.text, data)


def span(terms: Sequence[Term], text_columns: frozenset[str]) -> tuple[Product, ...]:
    """Products of factors that span some terms without redundance.

    Which factors are coded by contrasts and which by all their levels is formulaic's decision,
    taken here on placeholders.
    """
    if not terms:
        return ()
    factors = list(dict.fromkeys(f for term in terms for f in term.factors))
    names = {factor: f"f{i}" for i, factor in enumerate(factors)}
    frame = {
        names[f]: pd.Categorical(["a", "b"]) if _spans(f, text_columns) else [1.0, 2.0]
        for f in factors
    }
    written = ["0"] if all(term.factors for term in terms) else []
    written += [":".join(names[f] for f in term.factors) or "1" for term in terms]
    matrix = Formula(" + ".join(written), _ordering="none").get_model_matrix(
        pd.DataFrame(frame, index=range(2))
    )
    by_name = {name: factor for factor, name in names.items()}
    return tuple(
        tuple((by_name[f.factor.expr], f.reduced) for f in scoped.factors)
        for entry in matrix.model_spec.structure
        for scoped in entry.scoped_terms
    )


def _spans(factor: Node, text_columns: frozenset[str]) -> bool:
    """Whether the columns of a factor add up to the intercept."""
    if _category(factor, text_columns) is not None:
        return True
    if isinstance(factor, Call) and factor.function == "bs":
        return bool(factor.value("include_intercept"))
    return False


def _plan(
    formula: ParsedFormula,
    text_columns: frozenset[str],
    fixed: Sequence[Product],
    bars: Sequence[Sequence[Product]],
) -> tuple[tuple[Input, ...], tuple[Input, ...], tuple[Need, ...]]:
    """Inputs, those of the fixed terms, and carried columns of a formula."""
    expansion = Expansion(Unknown())
    inputs: dict[Input, None] = {}
    needs: dict[tuple[str, ...], dict[Monomial, bool]] = {(): {ONE: True}}
    products = [(product, False) for product in fixed]
    fixed_inputs: tuple[Input, ...] = ()
    products += [(product, True) for bar in bars for product in bar]
    for i, (product, random) in enumerate(products):
        carried: Polynomial = {ONE: 1.0}
        cells: set[str] = set()
        for factor, _ in product:
            category = _category(factor, text_columns)
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


def _frame(values: Mapping[str, Floats], response: str) -> Frame:
    """Shifts and scales from the rows in which every variable is finite, if there are any."""
    complete = np.logical_and.reduce([np.isfinite(v) for v in values.values()])
    frame = {}
    for name, of_name in values.items():
        used = of_name[complete if complete.any() else np.isfinite(of_name)]
        frame[name] = _shift_and_scale(response if name == RESPONSE else name, used)
    return Frame(
        tuple(frame),
        tuple(shift for shift, _ in frame.values()),
        tuple(scale for _, scale in frame.values()),
    )


def _shift_and_scale(name: str, values: Floats) -> tuple[float, float]:
    """A power of two near the standard deviation, and a short number near the mean.

    Any finite shift and positive scale give the same fit but for rounding. A scale that is a power
    of two, and a shift that is a multiple of 1/16 of it, keep x - shift exact for most data.
    """
    if not values.any():
        return 0.0, 1.0
    unit = int(np.frexp(np.abs(values).max())[1])
    near = np.ldexp(values, -unit)  # exact, at most 1: no sum of squares overflows
    mean, sd = float(near.mean()), float(near.std())
    if sd <= 1e-14 * abs(mean):
        shift, exponent = float(near[0]), round(math.log2(abs(mean)))
    else:
        exponent = round(math.log2(sd))
        shift = math.ldexp(round(math.ldexp(mean, 4 - exponent)), exponent - 4)
    check_size(name, {ONE: math.ldexp(1.0, min(max(unit + exponent, -1000), 1000))})
    shift, scale = math.ldexp(shift, unit), math.ldexp(1.0, unit + exponent)
    check_size(name, {ONE: max(abs(shift), scale)})
    return shift, scale
