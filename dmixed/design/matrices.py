"""The columns of a learned design on any rows: for fitted values and for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Codes, Floats, Level
from dmixed.design.columns import Rows
from dmixed.design.recoding import Design
from dmixed.design.spans import Category
from dmixed.design.spec import Input, Key
from dmixed.errors import DataError
from dmixed.formula.expressions import Name, columns_of
from dmixed.formula.polynomials import Monomial

CHUNK = 65_536
"""Rows of X and Z evaluated at a time."""

Locate: TypeAlias = Callable[[Sequence[Codes]], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class ModelRows:
    """The columns of a model, evaluated on some rows.

    Attributes
    ----------
    X
        (n, p); NaN where something that the terms use is missing
    Z
        per random term (n, c), likewise; empty if not asked for
    offset
        (n,), zero without an offset, or if not asked for
    response
        (n,) the response, the offset not taken off, or None if it was not asked for
    codes, labels
        (n,) cell of each row in `labels`, -1 where a key is missing; None if not asked for
    complete
        (n,) whether nothing that was asked for is missing
    """

    X: Floats
    Z: tuple[Floats, ...]
    offset: Floats
    response: Floats | None
    codes: Codes | None
    labels: keys.Labels | None
    complete: NDArray[np.bool_]


def matrix(
    design: Design,
    table: pa.Table,
    where: str = "",
    *,
    response: bool = False,
    groups: bool = True,
    bars: bool = True,
) -> ModelRows:
    """Evaluate the columns of a model on any rows.

    Parameters
    ----------
    design
        learned in a fit
    table
        n rows
    where
        name of the batch, for messages
    response
        evaluate the response and require weights: `complete` then says which rows a fit uses
    groups
        find the cells, the combinations of all keys; all key columns are needed
    bars
        evaluate Z and the offset; without them only `Design.fixed_columns` are needed

    Raises
    ------
    DataError
        a level was not in the data of the fit, or a column is not there
    """
    spec = design.spec
    rows = Rows(table, spec.context, where)
    missing = _Missing(rows)
    values: dict[str, Floats] = {}
    codes: dict[str, Codes] = {}
    for item in spec.inputs[1:] if bars else spec.fixed_inputs:
        missing.columns(item)
        if isinstance(item, Category):
            codes[item.name] = _known_levels(rows, item, design.levels[item.name])
            missing.rows |= codes[item.name] < 0
        else:
            values[item.name] = rows.variable(item)
            missing.rows |= ~np.isfinite(values[item.name])
    with np.errstate(all="ignore"):  # in rows that become NaN
        X, Z = _evaluate(design, values, codes, missing.rows, bars)
    offset = np.zeros(len(rows))
    if bars and spec.offset is not None:
        offset = rows.number(spec.offset)
        missing.rows |= ~np.isfinite(offset)
    y = group = labels = None
    if response:
        missing.columns(spec.inputs[0])
        y = rows.evaluate(spec.inputs[0].node)
        missing.rows |= ~np.isfinite(y)
        if spec.weights is not None:
            missing.rows |= ~np.isfinite(rows.number(spec.weights))
    if groups:
        for key in spec.keys:
            if not isinstance(key.node, Name):
                missing.columns(key)
        group, labels = keys.encode([rows.key(key.node) for key in spec.keys], spec.group)
        missing.rows |= group < 0
    return ModelRows(X, Z, offset, y, group, labels, ~missing.rows)


def fixed_rows(
    design: Design, table: pa.Table, held: Mapping[str, float | Level], n: int
) -> Floats:
    """X (n, p) of rows of which only some inputs of the fixed terms have a value of their own.

    Parameters
    ----------
    table
        n rows of the data columns of the other inputs
    held
        by the name of an input, the one value that a variable has in all rows, or the level of a
        category

    Raises
    ------
    DataError
        a level was not in the data of the fit, or a column is not there
    """
    rows = Rows(table, design.spec.context)
    values: dict[str, Floats] = {}
    codes: dict[str, Codes] = {}
    missing = np.zeros(n, np.bool_)
    for item in design.spec.fixed_inputs:
        if isinstance(item, Category):
            levels = design.levels[item.name]
            codes[item.name] = (
                np.full(n, levels.index(held[item.name]), np.int32)
                if item.name in held
                else _known_levels(rows, item, levels)
            )
            missing |= codes[item.name] < 0
        else:
            values[item.name] = (
                np.full(n, float(held[item.name])) if item.name in held else rows.variable(item)
            )
            missing |= ~np.isfinite(values[item.name])
    with np.errstate(all="ignore"):  # in rows that become NaN
        X, _ = _evaluate(design, values, codes, missing, False)
    return X


class _Missing:
    """Rows where something is missing, by the rules of `design.block`."""

    def __init__(self, rows: Rows) -> None:
        self.data = rows
        self.rows = np.zeros(len(rows), dtype=np.bool_)

    def columns(self, item: Input | Key) -> None:
        """Data columns of an input or a key; an expression may hide that they are missing."""
        for name in columns_of(item.node):
            bad = self.data.missing(name)
            if bad is not None:
                self.rows |= bad


def _known_levels(rows: Rows, item: Category, levels: tuple[Level, ...]) -> Codes:
    """(n,) positions of the rows' levels among those of the fit, -1 where missing."""
    factor = rows.factor(item.node)
    position = {level: i for i, level in enumerate(levels)}
    known = np.array([position.get(level, -1) for level in factor.levels] + [-1], dtype=np.int32)
    codes: Codes = known[factor.codes]
    strange = (codes < 0) & (factor.codes >= 0)
    if strange.any():
        level = factor.levels[factor.codes[int(np.argmax(strange))]]
        raise DataError(
            f"{item.name!r} has the level {level!r}{rows.place}, which was not in the data of "
            "the fit"
        )
    return codes


def _evaluate(
    design: Design,
    values: Mapping[str, Floats],
    codes: Mapping[str, Codes],
    missing: NDArray[np.bool_],
    bars: bool,
) -> tuple[Floats, tuple[Floats, ...]]:
    """X and every Z: F T, without making F; rows that are missing are NaN.

    F T is a sum over sets of categories and monomials u: u times the row of T of the row's cell.
    """
    widths = [len(design.fixed_names), *(len(term.names) for term in design.terms)]
    if not bars:
        widths = widths[:1]
    tables = list(_tables(design, sum(widths)))
    whole = np.zeros((len(missing), sum(widths)))
    for start in range(0, len(missing), CHUNK):
        part = slice(start, start + CHUNK)
        for categories, powers, W, position in tables:
            weights = W[0]
            if categories:
                weights = W[position([codes[name][part] for name in categories])]
            for name, power in powers:
                shift, scale = design.spec.frame.of(name)
                weights = weights * (((values[name][part] - shift) / scale) ** power)[:, None]
            whole[part] += weights
    whole[missing] = np.nan
    X, *Z = np.split(whole, np.cumsum(widths)[:-1], axis=1)
    return X, tuple(Z)


def _tables(
    design: Design, width: int
) -> Iterator[tuple[tuple[str, ...], Monomial, Floats, Locate]]:
    """Per set of categories and monomial: rows of T by cell, and how to find a row's cell."""
    T = np.hstack([design.T_fixed, *(term.T for term in design.terms)])
    T = np.vstack([T, design.T_unmet])[:, :width]
    entries: dict[tuple[tuple[str, ...], Monomial], dict[int, Floats]] = {}
    for column, row in zip((*design.columns, *design.unmet), T, strict=True):
        if not row.any():
            continue
        names = tuple(name for name, _ in column.cell)
        joint = 0
        for name, level in column.cell:
            joint = joint * len(design.levels[name]) + design.levels[name].index(level)
        entries.setdefault((names, column.powers), {})[joint] = row
    for (names, powers), rows in entries.items():
        known = np.array(sorted(rows), dtype=np.int64)
        W = np.vstack([*(rows[joint] for joint in known), np.zeros(T.shape[1])])
        sizes = [len(design.levels[name]) for name in names]
        yield names, powers, W, _locator(known, sizes)


def _locator(known: NDArray[np.int64], sizes: Sequence[int]) -> Locate:
    """Position of each row's combination of levels in `known`; the last where it is not there."""

    def locate(codes: Sequence[Codes]) -> NDArray[np.int64]:
        joint = codes[0].astype(np.int64)
        for size, code in zip(sizes[1:], codes[1:], strict=True):
            joint = joint * size + code
        place = np.searchsorted(known, joint)
        place[place == len(known)] = 0
        return np.where(known[place] == joint, place, len(known))

    return locate
