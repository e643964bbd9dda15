"""What every batch is turned into: decided once, from the formula and a pilot sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    formula = formula.resolved(pilot.column_names)
    rows = Rows(pilot, context or {})
    text = frozenset(x for x in formula.columns if kind_of(rows.column(x).type) == "category")
    fixed = span(formula.fixed, text)
    bars = tuple(span(bar.terms, text) for bar in formula.bars)
    inputs, fixed_inputs, needs = _plan(formula, text, fixed, bars)
    values = [_pilot_values(rows, x) for x in inputs]
    for name in (weights, offset):
        if name is not None:
            rows.number(name)
    if offset is not None:
        values[0] = values[0] - rows.number(offset)
    numeric = [(x.name, v) for x, v in zip(inputs, values, strict=True) if isinstance(x, Variable)]
    shifts = [_shift_and_scale(v) for _, v in numeric]
    frame = Frame(
        tuple(name for name, _ in numeric),
        tuple(shift for shift, _ in shifts),
        tuple(scale for _, scale in shifts),
    )
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


def _shift_and_scale(values: Floats) -> tuple[float, float]:
    """A power of two near the standard deviation, and a short number near the mean.

    Any finite shift and positive scale give the same fit but for rounding. A scale that is a power
    of two, and a shift that is a multiple of 1/16 of it, keep x - shift exact for most data.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    with np.errstate(all="ignore"):
        mean = float(finite.mean())
        sd = float(finite.std())
    if not math.isfinite(mean) or not math.isfinite(sd):  # beyond 1e154: sums overflow
        return 0.0, _power_of_two(float(np.abs(finite).max()))
    if sd <= 1e-14 * abs(mean):
        return float(finite[0]), _power_of_two(max(abs(mean), 1.0))
    scale = _power_of_two(sd)
    return round(mean / scale * 16) / 16 * scale, scale


def _power_of_two(value: float) -> float:
    return math.ldexp(1.0, min(max(round(math.log2(value)), -500), 500))
