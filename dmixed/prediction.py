"""Parts of predictions that no group enters: rows of a design, X beta, rows of coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dmixed.blocks import Column, Floats
from dmixed.design import Design, ModelRows, matrix
from dmixed.design.spans import category_of
from dmixed.errors import DataError
from dmixed.executor import each_part
from dmixed.formula.terms import display
from dmixed.preparation import Prepared
from dmixed.sources import Part, Source, load


def model_rows(prepared: Prepared, source: Source, client: Any = None) -> list[ModelRows]:
    """All columns of a model on the rows of a fit, part after part."""
    function = partial(_model_rows, prepared.design)
    return each_part(function, source.parts(prepared.design.spec.columns), client)


def _model_rows(design: Design, part: Part, value: Any) -> ModelRows:
    return matrix(design, load(part, value), part.name, response=True)


def fixed_part(exog: Any, beta: Floats, names: Sequence[str]) -> Any:
    """X beta of a design matrix (n, p), a Series if it is a DataFrame.

    Raises
    ------
    DataError
        it has not one column for each fixed effect
    """
    X = np.asarray(exog, dtype=np.float64)
    X = X[:, None] if X.ndim == 1 and len(beta) == 1 else np.atleast_2d(X)
    if X.ndim != 2 or X.shape[1] != len(beta):
        raise DataError(
            f"exog has shape {np.shape(exog)}: it needs {len(beta)} columns, one for each of "
            f"{', '.join(names)}"
        )
    values = X @ beta
    return pd.Series(values, exog.index) if isinstance(exog, pd.DataFrame) else values


def level_rows(prepared: Prepared, term: str) -> tuple[Floats, list[Any]]:
    """Each level's row (L, p) of coefficients of a categorical fixed term, and the levels.

    Raises
    ------
    DataError
        there is no such term, or it is not one categorical factor
    """
    design, kept = prepared.design, prepared.problem.fixed.kept
    known = list(dict.fromkeys(design.fixed_terms))
    if term not in known:
        raise DataError(f"no fixed term is called {term!r}: they are {', '.join(known)}")
    factors = [product[0][0] for product in design.spec.fixed if len(product) == 1]
    factor = next((f for f in factors if display(f) == term), None)
    category = None if factor is None else category_of(factor, design.spec.text_columns)
    if category is None:
        raise DataError(f"{term} is not one categorical factor: its levels cannot be compared")
    levels = list(design.levels[category.name])
    position = {column: i for i, column in enumerate(design.columns)}
    columns = [j for j, name in enumerate(design.fixed_terms) if name == term]
    rows = np.zeros((len(levels), len(kept)))
    for at, j in enumerate(kept):
        if j in columns:
            for i, level in enumerate(levels):
                rows[i, at] = design.T_fixed[position[Column(((category.name, level),), ())], j]
    return rows, levels
