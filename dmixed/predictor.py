"""Predictions of rows: what every task computes, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.design import Design, ModelRows, matrix
from dmixed.design.columns import Rows as DataRows
from dmixed.errors import DataError, NotSupportedError
from dmixed.formula.expressions import columns_of
from dmixed.lookup import Errors, Lookup

ROWS = 16_384
"""Rows whose standard errors are computed at a time."""


@dataclass(frozen=True, slots=True)
class Strange:
    """Rows with a level that the fit has not seen.

    Attributes
    ----------
    rows
        how many
    first
        what is not known in the first of them, for messages
    """

    rows: int = 0
    first: str = ""

    def __add__(self, other: Strange) -> Strange:
        return Strange(self.rows + other.rows, self.first or other.first)

    def refuse(self) -> None:
        """Raise an error if there are any."""
        if self.rows:
            raise DataError(
                f"{self.rows:,} rows are of groups that the fit has not seen, the first has "
                f'{self.first}; new_groups="population" gives them no random effect, '
                '"nan" no prediction'
            )


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """Numbers of n rows.

    Attributes
    ----------
    values
        (n, m), columns as in `Predictor.names`
    used
        (n,) whether all that was asked for is there
    strange
        rows of unknown groups
    """

    values: Floats
    used: NDArray[np.bool_]
    strange: Strange


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """What to predict of rows; with a `Lookup` all that a task needs. Small.

    Attributes
    ----------
    design, kept, beta
        of the fixed part
    cov_beta
        (p, p), or None without standard errors
    sigma2
        error variance
    groups
        data column of each key (None for one that is computed), or None for the population
    new_groups
        "population", "nan" or "error": rows of groups that the fit has not seen
    se
        whether standard errors are asked for
    interval
        None, "confidence" or "prediction"
    half
        normal quantile of the interval
    weights
        data column of weights, or None
    prior
        (c, c) covariance of the effects of a new group, for a new row of the population
    augment
        response, fitted values, residuals and population values instead
    """

    design: Design
    kept: tuple[int, ...]
    beta: Floats
    cov_beta: Floats | None = None
    sigma2: float = 0.0
    groups: tuple[str | None, ...] | None = None
    new_groups: str = "population"
    se: bool = False
    interval: str | None = None
    half: float = 0.0
    weights: str | None = None
    prior: Floats | None = None
    augment: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the result."""
        if self.augment:
            return "response", "fitted", "resid", "population"
        return (
            "predicted",
            *(("se",) if self.se else ()),
            *(("lower", "upper") if self.interval else ()),
        )

    @property
    def bars(self) -> bool:
        """Whether random columns are evaluated."""
        return self.groups is not None or self.interval == "prediction"

    @property
    def columns(self) -> tuple[str, ...]:
        """Data columns that are read."""
        spec = self.design.spec
        inputs = spec.fixed_inputs if not self.bars else spec.inputs[0 if self.augment else 1 :]
        names = [name for x in inputs for name in columns_of(x.node)]
        if self.groups is not None:
            for key, column in zip(spec.keys, self.groups, strict=True):
                names += columns_of(key.node) if column is None else [column]
            names += [spec.offset] if spec.offset is not None else []
        names += [self.weights] if self.weights is not None else []
        return tuple(dict.fromkeys(names))

    def __call__(self, lookup: Lookup | None, table: pa.Table, where: str) -> Predicted:
        """Numbers of some rows.

        Raises
        ------
        DataError
            a level of a covariate is not known, or a column is not what it must be
        NotSupportedError
            standard errors of levels of crossed factors that the fit has not seen together
        """
        spec = self.design.spec
        offset = spec.offset if self.groups is not None else None
        design = replace(self.design, spec=replace(spec, offset=offset, weights=self.weights))
        rows = matrix(design, table, where, response=self.augment, groups=False, bars=self.bars)
        X = rows.X[:, list(self.kept)]
        population, used, strange = np.asarray(X @ self.beta), rows.complete, Strange()
        cells: _Cells | None = None
        found = population
        if self.groups is not None:
            assert lookup is not None
            columns = self._keys(table, where)
            levels, present, strange = _levels(lookup, columns)
            used = used & present
            found = population + rows.offset
            for Z, term, level in zip(rows.Z, lookup.terms, levels, strict=True):
                effects = np.einsum("nc,nc->n", Z, term.effects[level])
                found += np.where(level >= 0, effects, 0.0)
            if self.cov_beta is not None:
                cells = _Cells.of(lookup, columns, levels, where)
            if self.new_groups == "nan":
                found[np.any([level < 0 for level in levels], axis=0)] = np.nan
        if self.augment:
            assert rows.response is not None
            y = rows.response
            return Predicted(np.column_stack([y, found, y - found, population]), used, strange)
        if self.cov_beta is None:
            return Predicted(found[:, None], used, strange)
        errors = None if lookup is None else lookup.errors
        return Predicted(self._with_errors(errors, cells, table, where, rows, found), used, strange)

    def _keys(self, table: pa.Table, where: str) -> list[pa.ChunkedArray]:
        """Values of each key, null where they are missing."""
        spec = self.design.spec
        rows, columns = DataRows(table, spec.context, where), []
        assert self.groups is not None
        for key, name in zip(spec.keys, self.groups, strict=True):
            values = rows.column(name) if name is not None else rows.key(key.node)
            if name is None:
                bad = [rows.missing(x) for x in columns_of(key.node)]
                for missing in (x for x in bad if x is not None):
                    values = pc.if_else(pa.array(missing), None, values)
            columns.append(values)
        return columns

    def _with_errors(
        self,
        errors: Errors | None,
        cells: _Cells | None,
        table: pa.Table,
        where: str,
        rows: ModelRows,
        found: Floats,
    ) -> Floats:
        """Predictions, standard errors and limits."""
        assert self.cov_beta is not None
        X = rows.X[:, list(self.kept)]
        if cells is not None:
            assert errors is not None
            variance = cells.variances(errors, self.cov_beta, X, np.hstack(rows.Z))
        else:
            variance = np.einsum("np,np->n", X @ self.cov_beta, X)
        variance = np.where(np.isnan(found), np.nan, np.maximum(variance, 0.0))
        out = [found]
        if self.se:
            out.append(np.sqrt(variance))
        if self.interval == "prediction":
            if cells is None:  # a new row of the population is one of a new group
                assert self.prior is not None
                Z = np.hstack(rows.Z)
                variance = variance + np.einsum("nc,nc->n", Z @ self.prior, Z)
            variance = variance + self.sigma2 / self._weights(table, where)
        if self.interval is not None:
            half = self.half * np.sqrt(variance)
            out += [found - half, found + half]
        return np.column_stack(out)

    def _weights(self, table: pa.Table, where: str) -> Floats | float:
        if self.weights is None:
            return 1.0
        rows = DataRows(table, {}, where)
        w = rows.number(self.weights)
        if (w <= 0).any():
            raise DataError(f"weights {self.weights!r} are not positive everywhere{rows.place}")
        return w


def _levels(
    lookup: Lookup, columns: Sequence[pa.ChunkedArray]
) -> tuple[list[NDArray[np.int64]], NDArray[np.bool_], Strange]:
    """Level (n,) of each row in each term, -1 where it is not known; rows whose keys are there."""
    found: dict[tuple[int, ...], NDArray[np.int64]] = {}
    present = np.ones(len(columns[0]), np.bool_)
    for term in lookup.terms:
        if term.key not in found:
            names = [lookup.names[k] for k in term.key]
            codes, labels = keys.encode([columns[k] for k in term.key], names)
            found[term.key] = np.append(term.known.find(labels), -1)[codes]
            present &= codes >= 0
    levels = [found[term.key] for term in lookup.terms]
    unknown = np.any([level < 0 for level in found.values()], axis=0)
    if not unknown.any():
        return levels, present, Strange()
    row = int(np.argmax(unknown))
    key = next(key for key, level in found.items() if level[row] < 0)
    shown = ", ".join(f"{lookup.names[k]}={columns[k][row].as_py()!r}" for k in key)
    shown += "" if present[row] else " (missing)"
    return levels, present, Strange(int(unknown.sum()), shown)


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """For each row a cell of the fit with the same known levels, -1 where none is known.

    ``known`` (n, c) says which of the random columns belong to known levels.
    """

    cell: NDArray[np.int64]
    known: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        lookup: Lookup,
        columns: Sequence[pa.ChunkedArray],
        levels: Sequence[NDArray[np.int64]],
        where: str,
    ) -> _Cells:
        assert lookup.errors is not None
        known = np.stack([level >= 0 for level in levels], axis=1)
        width = [term.effects.shape[1] for term in lookup.terms]
        if all(len(term.key) == len(lookup.names) for term in lookup.terms):
            return cls(levels[0], np.repeat(known, width, axis=1))  # the levels are the cells
        pattern = known @ (1 << np.arange(len(levels)))
        cell = np.full(len(pattern), -1, np.int64)
        for some in np.unique(pattern[pattern > 0]).tolist():
            rows = np.flatnonzero(pattern == some)
            terms = [t for j, t in enumerate(lookup.terms) if some >> j & 1]
            key = tuple(sorted({k for term in terms for k in term.key}))
            own = [columns[k].take(pa.array(rows)) for k in key]
            codes, labels = keys.encode(own, [lookup.names[k] for k in key])
            cell[rows] = lookup.errors.find(key, labels)[codes]
            if (cell[rows] < 0).any():
                row = rows[int(np.argmax(cell[rows] < 0))]
                shown = ", ".join(f"{lookup.names[k]}={columns[k][row].as_py()!r}" for k in key)
                raise NotSupportedError(
                    f"{shown} ({where}): the fit has seen these levels, but not together in a "
                    "row; standard errors of such rows are not there yet: predict them without "
                    "se= and interval="
                )
        return cls(cell, np.repeat(known, width, axis=1))

    def variances(self, errors: Errors, cov_beta: Floats, X: Floats, Z: Floats) -> Floats:
        """Variances (n,) of the errors of ``x'beta + z'b``, see `inference.cells`."""
        out = np.empty(len(X))
        for start in range(0, len(X), ROWS):
            some = slice(start, start + ROWS)
            known, cell = self.known[some], self.cell[some]
            z, new = np.where(known, Z[some], 0.0), np.where(known, 0.0, Z[some])
            cov, slope = errors.cov[cell], errors.slope[cell]  # of any cell where z is zero
            own = np.matmul(z[:, None], cov)[:, 0]
            d = X[some] - np.matmul(z[:, None], slope)[:, 0]
            out[some] = np.einsum("nc,nc->n", own, z) + np.einsum("np,np->n", d @ cov_beta, d)
            out[some] += np.einsum("nc,nc->n", new @ errors.prior, new)
        return out
