"""The rows of a model as statsmodels shows them: arrays, names, groups. They are read when asked.

For data in memory; nothing that dmixed fits needs any of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.effects import Effects
from dmixed.errors import DataError, NotSupportedError
from dmixed.functions import LikelihoodFunctions
from dmixed.inference.random_effects import n_effects
from dmixed.params import MixedLMParams, lower_root
from dmixed.prediction import model_rows
from dmixed.sources import Source


@dataclass(frozen=True, slots=True)
class ModelNames:
    """Names of a model's columns and parameters, as ``model.data`` has them in statsmodels."""

    ynames: str
    xnames: list[str]
    exog_re_names: list[str]
    exog_re_names_full: list[str]
    vcomp_names: list[str]

    @property
    def param_names(self) -> list[str]:
        """Names of ``params``."""
        return [*self.xnames, *self.exog_re_names_full, *(f"{n} Var" for n in self.vcomp_names)]


@dataclass(frozen=True, slots=True)
class _Used:
    """The rows used: endog (n,), exog (n, p), Z per term, cell (n,), and their labels."""

    endog: Floats
    exog: Floats
    Z: tuple[Floats, ...]
    cell: NDArray[np.int64]
    index: pd.Index


class RowsOfModel(LikelihoodFunctions):
    """Row-level attributes of a model."""

    source: Source | None
    client: Any

    @cached_property
    def _effects(self) -> Effects:
        return Effects(self._prepared)

    @cached_property
    def _used(self) -> _Used:
        source = self.source
        if source is None:
            raise NotSupportedError(
                "this model was made of moments, which hold no rows: make it of the data for "
                "methods that read them"
            )
        parts = model_rows(self._prepared, source, self.client)
        found = []
        for rows in parts:
            assert rows.codes is not None
            assert rows.labels is not None
            assert rows.response is not None
            cell = np.append(keys.lookup(self._prepared.here.labels, rows.labels), -1)[rows.codes]
            found.append((rows.response, rows.X, rows.Z, cell, rows.complete & (cell >= 0)))
        kept = np.concatenate([f[4] for f in found])
        index = source.index()
        labels = pd.RangeIndex(len(kept)) if index is None else index
        return _Used(
            np.concatenate([f[0] for f in found])[kept],
            np.concatenate([f[1] for f in found])[kept],
            tuple(np.concatenate(z)[kept] for z in zip(*(f[2] for f in found), strict=True)),
            np.concatenate([f[3] for f in found])[kept],
            labels[kept],
        )

    def _kept_exog(self) -> Floats:
        return self._used.exog[:, list(self._prepared.problem.fixed.kept)]

    # ------------------------------------------------------------------ arrays

    @property
    def endog(self) -> NDArray[np.float64]:
        """(n,) response of the rows used, without the offset taken off."""
        return self._used.endog.copy()

    @property
    def exog(self) -> NDArray[np.float64]:
        """(n, p) fixed-effects design of the rows used."""
        return self._used.exog.copy()

    @property
    def exog_re(self) -> NDArray[np.float64] | None:
        """(n, k_re) random-coefficient design of the rows used; None without one."""
        parts = [
            Z
            for Z, term in zip(self._used.Z, self._prepared.design.terms, strict=True)
            if self._prepared.design.bars[term.block].component is None
        ]
        return np.hstack(parts) if parts else None

    @property
    def groups(self) -> NDArray[Any]:
        """(n,) group label of each row used."""
        return np.asarray(self._effects.group_index)[self._group_of_row]

    @cached_property
    def _group_of_row(self) -> NDArray[np.intp]:
        """(n,) place of each row's group in canonical order."""
        place = np.empty(len(self._prepared.groups), np.intp)
        place[self._effects.group_order] = np.arange(len(place))
        return place[self._prepared.group_codes[self._used.cell]]

    @property
    def group_labels(self) -> list[Any]:
        """Labels of the groups, sorted."""
        return list(self._effects.group_index)

    @cached_property
    def row_indices(self) -> dict[Any, NDArray[np.intp]]:
        """Positions of each group's rows among the rows used."""
        order = np.argsort(self._group_of_row, kind="stable")
        ends = np.cumsum(np.bincount(self._group_of_row, minlength=self.n_groups))[:-1]
        return dict(zip(self.group_labels, np.split(order, ends), strict=True))

    def group_list(self, array: Any) -> list[NDArray[Any]] | None:
        """Rows of an array by group, in the order of ``group_labels``; None of None."""
        if array is None:
            return None
        values = np.asarray(array)
        if len(values) != self.nobs:
            raise DataError(f"the array has {len(values)} rows, the model uses {self.nobs}")
        return [values[rows] for rows in self.row_indices.values()]

    @property
    def endog_li(self) -> Any:
        """``endog`` by group."""
        return self.group_list(self.endog)

    @property
    def exog_li(self) -> Any:
        """``exog`` by group."""
        return self.group_list(self.exog)

    @property
    def exog_re_li(self) -> Any:
        """``exog_re`` by group."""
        return self.group_list(self.exog_re)

    # ------------------------------------------------------------------ numbers and names

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._prepared.moments.nobs

    @property
    def n_totobs(self) -> int:
        """Rows used, by statsmodels' name."""
        return self.nobs

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return self._prepared.n_groups

    @property
    def data(self) -> ModelNames:
        """Names of columns and parameters."""
        prepared, names = self._prepared, self._names
        bars = [bar for bar in prepared.bars if bar.component is None]
        group = ":".join(prepared.groups.names)
        columns = names.random or tuple(
            group if name == "Intercept" else name for bar in bars for name in bar.names
        )
        full = [
            f"{columns[a]} Var" if a == b else f"{columns[b]} x {columns[a]} Cov"
            for a, b in prepared.problem.factors.blocks.pairs
            if a < len(columns)
        ]
        return ModelNames(
            str(prepared.design.spec.formula.response_text).strip("`"),
            list(names.fixed or prepared.design.fixed_names),
            list(columns),
            full,
            [bar.label for bar in prepared.bars if bar.component is not None],
        )

    @property
    def exog_names(self) -> list[str]:
        """Names of the columns of ``exog``."""
        return self.data.xnames

    @property
    def endog_names(self) -> str:
        """Name of the response."""
        return self.data.ynames

    # ------------------------------------------------------------------ simulation

    def get_distribution(self, params: Any, scale: float, exog: Any = None) -> Distribution:
        """Distribution of the response given parameters.

        Parameters
        ----------
        params
            packed ``[fe_params, lower triangle of cov_re, vcomp]``, relative scale, no roots
        scale
            error variance
        exog
            (n, k_fe) other values of the fixed-effects columns for the same rows
        """
        own = params
        if not isinstance(params, MixedLMParams):
            own = MixedLMParams.from_packed(params, self.k_fe, self.k_re, False, True)
        own = self._unpacked(own, True)
        design = self._kept_exog() if exog is None else np.asarray(exog, dtype=np.float64)
        if design.shape != (self.nobs, self.k_fe):
            raise DataError(
                f"exog has shape {design.shape}: the groups are known for the model's own "
                f"{self.nobs} rows with {self.k_fe} columns only"
            )
        if not (isinstance(scale, int | float | np.number) and 0 < scale < np.inf):
            raise DataError(f"scale={scale!r}: an error variance is positive")
        return Distribution(self, own, float(scale), design)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Simulates responses of the rows of a model in memory."""

    model: RowsOfModel
    params: MixedLMParams
    scale: float
    exog: Floats

    def rvs(self, n: int | None = None, rng: Any = None) -> NDArray[np.float64]:
        """One response for every row of the model, units of y.

        Parameters
        ----------
        n
            not used; statsmodels has it for scipy's sake
        rng
            seed, `numpy.random.Generator` or `numpy.random.RandomState`

        Notes
        -----
        Random coefficients are drawn group by group, then the components by name and group, then
        the errors, as statsmodels draws them.
        """
        del n
        if not isinstance(rng, np.random.Generator | np.random.RandomState):
            rng = np.random.default_rng(rng)
        model, params = self.model, self.params
        prepared = model._prepared
        y = self.exog @ params.fe_params
        u = rng.normal(size=(model.n_groups, model.k_re))
        if model.k_re:
            u = u @ lower_root(self.scale * params.cov_re).T
            y = y + (u[model._group_of_row] * np.asarray(model.exog_re)).sum(axis=1)
        components = [j for j, bar in enumerate(prepared.bars) if bar.component is not None]
        for j, variance in zip(components, params.vcomp, strict=True):
            order, _ = model._effects.component_order(j)
            effects = np.zeros(n_effects(prepared.problem, j))
            effects[order] = np.sqrt(self.scale * variance) * rng.normal(size=len(order))
            y = y + self._component(j, effects)
        return np.asarray(y + np.sqrt(self.scale) * rng.normal(size=len(y)))

    def _component(self, block: int, effects: Floats) -> Floats:
        prepared, used, base = self.model._prepared, self.model._used, 0
        y = np.zeros(len(used.cell))
        for i in prepared.members(block):
            term = prepared.problem.terms[i]
            c = term.T.shape[1]
            Z = used.Z[
                next(k for k, t in enumerate(prepared.design.terms) if t is prepared.terms[i])
            ]
            codes = term.codes[used.cell]
            at = base + codes[:, None] * c + np.arange(c)
            y += np.where(codes >= 0, np.einsum("nc,nc->n", Z, effects[at]), 0.0)
            base += term.n_levels * c
        return y
