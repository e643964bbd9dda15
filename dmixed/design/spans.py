"""Products of factors that span terms without redundance; which factors are categories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd
from formulaic import Formula

from dmixed.formula.expressions import Call, Name, Node
from dmixed.formula.parsing import categorical
from dmixed.formula.terms import Term
from dmixed.formula.tokens import quoted

Product: TypeAlias = tuple[tuple[Node, bool], ...]
"""Factors, each with all its columns or (True) reduced by one, as by contrasts."""


@dataclass(frozen=True, slots=True)
class Category:
    """A set of levels that rows fall in: a column, or an expression under ``C()``."""

    name: str
    node: Node


def category_of(factor: Node, text_columns: frozenset[str]) -> Category | None:
    """Category that a factor codes; None for a numeric factor."""
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
    if not any(_spans(f, text_columns) for term in terms for f in term.factors):
        return tuple(tuple((f, False) for f in term.factors) for term in terms)
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
    if category_of(factor, text_columns) is not None:
        return True
    if isinstance(factor, Call) and factor.function == "bs":
        return bool(factor.value("include_intercept"))
    return False
