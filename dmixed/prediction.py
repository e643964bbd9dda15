"""Fitted values and predictions: the only work after the pass that looks at rows again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Column, Floats
from dmixed.design import Design, ModelRows, matrix
from dmixed.design.spans import category_of
from dmixed.errors import DataError
from dmixed.executor import each_part
from dmixed.formula.terms import display
from dmixed.preparation import Prepared
from dmixed.sources import Part, Source, load


@dataclass(frozen=True, slots=True)
class Rows:
    """Fitted values and responses of the rows used, in the order of the data."""

    fitted: pd.Series
    response: pd.Series


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Random effects by cell, so that a part of the rows needs no more than its cells.

    Attributes
    ----------
    labels
        of the N cells
    effects
        per term (N, c): the effects that the rows of each cell have
    """

    labels: keys.Labels
    effects: tuple[Floats, ...]


def _lookup(prepared: Prepared, modes: Sequence[Floats]) -> _Lookup:
    found, bases = [], dict.fromkeys(range(len(modes)), 0)
    for term in prepared.problem.terms:
        base, c = bases[term.block], term.T.shape[1]
        if term.repeated:
            at = base + term.codes[:, None] * c + np.arange(c)
            effects = modes[term.block][at, 0]
            bases[term.block] += term.n_levels * c
        else:
            effects = modes[term.block][base + term.codes]
            bases[term.block] += term.n_levels
        found.append(np.where(term.codes[:, None] >= 0, effects, 0.0))
    design = prepared.design.terms
    order = [next(i for i, t in enumerate(prepared.terms) if t is own) for own in design]
    return _Lookup(prepared.here.labels, tuple(found[i] for i in order))


def used_rows(
    prepared: Prepared, beta: Floats, modes: Sequence[Floats], source: Source, client: Any = None
) -> Rows:
    """Fixed part plus BLUPs plus offset, and the response, of the rows of a fit.

    Parameters
    ----------
    beta
        (p,) fixed effects of the independent columns
    modes
        per block (n_effects, q_j) BLUPs, see `inference.random_effects`
    """
    function = partial(
        _fitted, prepared.design, prepared.problem.fixed.kept, beta, _lookup(prepared, modes)
    )
    found = each_part(function, source.parts(prepared.design.spec.columns), client)
    kept = np.concatenate([part[2] for part in found])
    index = source.index()
    labels = pd.RangeIndex(len(kept)) if index is None else index
    return Rows(
        *(
            pd.Series(np.concatenate([part[j] for part in found])[kept], labels[kept])
            for j in (0, 1)
        )
    )


def _fitted(
    design: Design,
    kept: tuple[int, ...],
    beta: Floats,
    lookup: _Lookup,
    part: Part,
    value: Any,
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    rows = matrix(design, load(part, value), part.name, response=True)
    assert rows.codes is not None
    assert rows.labels is not None
    assert rows.response is not None
    position = np.append(keys.lookup(lookup.labels, rows.labels), -1)[rows.codes]
    complete = rows.complete & (position >= 0)
    fitted = rows.offset + rows.X[:, list(kept)] @ beta
    for Z, effects in zip(rows.Z, lookup.effects, strict=True):
        fitted += np.einsum("nc,nc->n", Z, effects[position])
    return fitted, rows.response, complete


def model_rows(prepared: Prepared, source: Source, client: Any = None) -> list[ModelRows]:
    """All columns of a model on the rows of a fit, part after part."""
    function = partial(_model_rows, prepared.design)
    return each_part(function, source.parts(prepared.design.spec.columns), client)


def _model_rows(design: Design, part: Part, value: Any) -> ModelRows:
    return matrix(design, load(part, value), part.name, response=True)


def population(prepared: Prepared, beta: Floats, source: Source, client: Any = None) -> pd.Series:
    """X beta of all rows of a source; NaN where a covariate is missing."""
    function: Callable[[Part, Any], Floats] = partial(
        _fixed_part, prepared.design, prepared.problem.fixed.kept, beta
    )
    columns = prepared.design.fixed_columns
    found = each_part(function, source.parts(columns), client)
    values = np.concatenate([np.empty(0), *found])
    index = source.index()
    return pd.Series(values, None if index is None else index.copy())


def _fixed_part(
    design: Design, kept: tuple[int, ...], beta: Floats, part: Part, value: Any
) -> Floats:
    rows = matrix(design, load(part, value), part.name, groups=False, bars=False)
    return np.asarray(rows.X[:, list(kept)] @ beta)


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
