"""Fitted values and predictions of a fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dmixed import outputs, prediction
from dmixed.dispatch import RETRIES, running
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.formula.expressions import Name
from dmixed.grouped import Grouped
from dmixed.lookup import Errors, Lookup, make_errors, make_lookup, prior_covariance
from dmixed.predictor import Predictor
from dmixed.scoring import BlupTable, scoring
from dmixed.sources import Source, open_source, paths_of
from dmixed.sources.daskframe import DaskSource
from dmixed.sources.memory import MemorySource
from dmixed.summary import quantile


@dataclass(frozen=True, eq=False)
class Predicted(Grouped):
    """Estimates, and what they say of rows."""

    _source: Source | None = field(repr=False, default=None)
    _client: Any = field(repr=False, default=None)

    @property
    def fittedvalues(self) -> Any:
        """Fixed part plus BLUPs plus offset, of the rows used; reads the rows again."""
        return self._plain(self._rows["fitted"].rename(None))

    @property
    def resid(self) -> Any:
        """Response minus ``fittedvalues``."""
        return self._plain(self._rows["resid"].rename(None))

    def _plain(self, values: pd.Series) -> Any:
        return values.to_numpy(copy=True) if self._names.plain else values.copy()

    @cached_property
    def _rows(self) -> pd.DataFrame:
        """Columns ``response``, ``fitted``, ``resid``, ``population`` of the rows used."""
        weights = self._prepared.design.spec.weights
        job = outputs.Job(replace(self._predictor(True), augment=True, weights=weights))
        lookup, source = self._lookup(False), self._rows_of_fit()
        found, used = outputs.collected(job, lookup, source, running(self._client))
        return found[used]

    def _rows_of_fit(self) -> Source:
        if self._source is None:
            raise AttributeError(
                "the rows do not travel with a stored result, nor with one of moments: "
                "give new data, predict(data)"
            )
        return self._source

    @cached_property
    def _effects_by_level(self) -> Lookup:
        return make_lookup(self._prepared, self._modes)

    @cached_property
    def _errors(self) -> Errors:
        found = self._estimates
        return make_errors(self._prepared, found.root, found.sigma2, found.variances.Psi)

    def _lookup(self, errors: bool) -> Any:
        """Random effects by level, with what standard errors need if it is asked for.

        Where the groups are on workers it is a future of their lookups, put together there.
        """
        moments = self._prepared.moments
        if isinstance(moments, RemoteMoments):
            parts = self._each_shard("_lookup", [errors] * len(self._prepared.shards))
            return moments.client.submit(Lookup.concatenate, parts, pure=False, retries=RETRIES)
        found = self._effects_by_level
        return replace(found, errors=self._errors) if errors else found

    def _predictor(self, groups: Any) -> Predictor:
        """What predicts rows, with the random effects of their groups or without."""
        design, found = self._prepared.design, self._estimates
        columns: tuple[str | None, ...] | None = None
        if groups is not None and groups is not False:
            columns = tuple(x.node.column if isinstance(x.node, Name) else None
                            for x in design.spec.keys)  # fmt: skip
        if columns is not None and groups is not True:
            given = [groups] if isinstance(groups, str) else groups
            names = design.spec.group
            if not isinstance(given, list | tuple) or not all(isinstance(x, str) for x in given):
                raise DataError(
                    f"groups={groups!r}: must be True, False, or the columns of the groups' keys"
                )
            if None in columns or len(given) != len(columns):
                raise DataError(
                    f"groups={groups!r}: the model has the keys {', '.join(names)}; "
                    + ("give True: some are computed from columns" if None in columns
                       else "name a column for each, in this order")
                )  # fmt: skip
            columns = tuple(given)
        return Predictor(design, self._prepared.problem.fixed.kept, found.beta, groups=columns)

    def predict(
        self,
        data: Any = None,
        groups: Any = None,
        new_groups: str = "population",
        se: bool = False,
        interval: str | None = None,
        alpha: float = 0.05,
        out: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        *,
        transform: bool = True,
        exog: Any = None,
    ) -> Any:
        """Predictions of rows: of the population, or with the random effects of their groups.

        Parameters
        ----------
        data
            anything that can be fitted; only the columns that are needed are read. With a model
            of arrays, or ``transform=False``, an (n, p) design matrix. None means the rows of the
            fit. ``exog`` is statsmodels' name for it.
        groups
            None or False: the fixed part ``x'beta``, without offset. True: ``x'beta + z'b`` plus
            the offset, as ``fittedvalues``, b the BLUPs of the row's groups, by the model's key
            columns; or the names of the columns that hold the keys.
        new_groups
            rows whose group the fit has not seen, or whose key is missing: ``"population"`` gives
            them no random effect (with several factors those of the levels that are known),
            ``"nan"`` no prediction, ``"error"`` refuses them
        se
            add standard errors of the row's mean, see Notes
        interval
            ``"confidence"``: add normal limits of the mean; ``"prediction"``: of a new response
        alpha
            limits are at level 1 - alpha
        out
            path or URI of a new or empty directory: write ``part-00000.parquet``, ..., one file
            for each part of the data by the task that reads it, with the key columns, and
            ``_manifest.json`` when all are there
        storage_options
            for URIs, of ``data`` and ``out``

        Returns
        -------
        (n,) Series (array for a model of arrays), units of y, NaN where a covariate is missing;
        with ``se`` or ``interval`` a DataFrame with columns ``predicted``, ``se``, ``lower``,
        ``upper``. Of a Dask DataFrame they are lazy, with its partitions and index. With ``out``
        its path.

        Raises
        ------
        DataError
            a level of a covariate that the fit has not seen, a missing column, an argument that
            makes no sense
        NotSupportedError
            standard errors of crossed levels that the fit has not seen together

        Notes
        -----
        The standard error is the root of the prediction error variance given the variances,

            z'C z + (x - B'z)' Cov(beta) (x - B'z),   C = Var(b | y, beta), B = Psi Z'V^-1 X

        which is the quadratic form in the inverse of the mixed model equations (Henderson 1975,
        Biometrics 31, 423-447; Robinson 1991, Statistical Science 6, 15-32): the errors of
        beta and b are correlated. Effects of levels that the fit has not seen add
        ``z'Psi z sigma2``. Without ``groups`` it is the error of the population's mean,
        ``x'Cov(beta)x``, and a new response is one of a new group. A new response adds
        ``sigma2``, divided by the row's weight if the data have the model's column of weights.
        Fixed effects that were held have no error.
        """
        data = exog if data is None else data
        plain = groups in (None, False) and not se and interval is None and out is None
        if data is not None and (self._names.plain or self._names.fixed or not transform):
            if not plain:
                raise NotSupportedError(
                    "a design matrix has neither groups nor random columns: groups=, se=, "
                    "interval= and out= need data= with the columns of a formula"
                )
            return prediction.fixed_part(data, self._estimates.beta, self._fixed_names)
        source, options = self._data(data, out, storage_options)
        predictor = self._wanted(groups, new_groups, se, interval, alpha, source)
        lookup = None
        if predictor.groups is not None:
            lookup = self._lookup(predictor.cov_beta is not None)
        client = running(self._client)
        if out is not None:
            carried = outputs.key_columns(predictor, source.columns)
            job = outputs.make_job(predictor, source, carried, None, self._key_types(predictor))
            return outputs.written(job, lookup, source, out, options, client)
        job = outputs.Job(predictor)
        if isinstance(source, DaskSource):
            found = outputs.lazy(job, lookup, source, client)
        else:
            found, _ = outputs.collected(job, lookup, source, client)
        if len(predictor.names) > 1:
            return found
        found = found["predicted"]
        return self._plain(found) if isinstance(found, pd.Series) else found

    def _wanted(
        self, groups: Any, new_groups: str, se: Any, interval: Any, alpha: float, source: Source
    ) -> Predictor:
        """What predicts rows, the arguments checked."""
        if new_groups not in ("population", "nan", "error"):
            raise DataError(f'new_groups={new_groups!r}: must be "population", "nan" or "error"')
        if interval not in (None, "confidence", "prediction"):
            raise DataError(f'interval={interval!r}: must be "confidence" or "prediction"')
        if not isinstance(se, bool | np.bool_):
            raise DataError(f"se={se!r}: must be True or False")
        predictor, half = self._predictor(groups), quantile(alpha)
        if predictor.groups is None and new_groups != "population":
            raise DataError(f"new_groups={new_groups!r} goes with groups=True")
        if not se and interval is None:
            return replace(predictor, new_groups=new_groups)
        weights = self._prepared.design.spec.weights
        if interval != "prediction" or weights not in source.columns:
            weights = None
        found = self._estimates
        return replace(
            predictor,
            cov_beta=np.nan_to_num(found.cov_beta),  # an effect that was held
            sigma2=found.sigma2,
            prior=prior_covariance(self._prepared, found.sigma2, found.variances.Psi),
            new_groups=new_groups,
            se=bool(se),
            interval=interval,
            half=half,
            weights=weights,
        )

    def _data(
        self, data: Any, out: Any, storage_options: Mapping[str, Any] | None
    ) -> tuple[Source, Mapping[str, Any] | None]:
        """Source of the rows, and the options of the place that is written to."""
        uri = out is not None and "://" in str(out)
        remote = any("://" in path for path in paths_of(data))
        options = storage_options if uri else None
        if data is None:
            return self._rows_of_fit(), options
        return open_source(data, None if uri and not remote else storage_options), options

    def _key_types(self, predictor: Predictor) -> dict[str, pa.DataType]:
        """Types of the key columns by the names they have in the data."""
        prepared = self._prepared
        labels = prepared.groups if prepared.shards else prepared.here.labels
        columns = predictor.groups or labels.names
        found = zip(columns, labels.arrays, strict=True)
        return {name: array.type for name, array in found if name is not None}

    def augment(
        self,
        data: Any = None,
        columns: Sequence[str] | None = None,
        out: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Rows with what the fit says of them, as broom's ``augment``.

        Parameters
        ----------
        data
            rows with all columns of the model; None: the rows used by the fit
        columns
            further data columns to carry along
        out, storage_options
            as in ``predict``

        Returns
        -------
        the key columns, ``columns``, the response, and ``fitted`` (as ``fittedvalues``: with
        BLUPs and offset, of unknown groups without BLUPs), ``resid`` and ``population`` (as
        ``predict(data)``); NaN where something is missing. A pandas DataFrame for data in memory, a
        lazy Dask one for a Dask DataFrame and for files; with ``out`` its path.

        Raises
        ------
        DataError
            a column is not there, or has the name of a result
        """
        if data is not None and (self._names.plain or self._names.fixed):
            raise NotSupportedError("a model of arrays has no columns that data could have")
        source, options = self._data(data, out, storage_options)
        if isinstance(columns, str):
            raise DataError(f"columns={columns!r}: must be a list of names")
        weights = self._prepared.design.spec.weights
        weights = weights if weights in source.columns else None
        predictor = replace(self._predictor(True), augment=True, weights=weights)
        carried = [*outputs.key_columns(predictor, source.columns), *(columns or ())]
        job = outputs.make_job(
            predictor, source, carried, self.endog_name, self._key_types(predictor), data is None
        )
        lookup, client = self._lookup(False), running(self._client)
        if out is not None:
            return outputs.written(job, lookup, source, out, options, client)
        if isinstance(source, MemorySource):
            return outputs.with_columns(job, lookup, source, client)
        return outputs.lazy(job, lookup, source, client)

    def to_sql(
        self,
        dialect: str = "ansi",
        table: str | Sequence[str] = "new_data",
        groups: bool = True,
        effects: str | Mapping[str, str] = "ranef",
    ) -> str:
        """A SELECT that predicts the rows of a table in a database, as ``predict`` does.

        Parameters
        ----------
        dialect
            ``"ansi"``, or one that sqlglot writes: ``"duckdb"``, ``"postgres"``, ``"snowflake"``
        table
            name of the table of rows, or (schema, name); it has the columns of the formula
        groups
            as in ``predict``: with the random effects of the row's groups and the offset
        effects
            name of the table with what ``ranef_table(out=...)`` wrote; with several factors a name
            for each by its label, such as ``{"school": "schools", "class:school": "classes"}``

        Returns
        -------
        the statement: all columns of the table, and ``predicted`` (NULL where a covariate is
        missing, or has a level that the fit has not seen). Rows of groups that the fit has not
        seen, or whose key is missing, have no random effect.

        Raises
        ------
        DmixedError
            sqlglot is not installed (``pip install 'dmixed[sql]'``)
        DataError
            an argument that makes no sense
        NotSupportedError
            a term that SQL has no words for, named: splines, functions of the caller's,
            hyperbolic inverses; random effects of variance components

        Notes
        -----
        Names and strings are quoted, wherever they come from. Columns of numbers are read as
        doubles; comparisons of text are the database's, which may ignore case.
        """
        if self._names.plain or self._names.fixed:
            raise NotSupportedError("a model of arrays has no columns that a table could have")
        design, kept = self._prepared.design, self._prepared.problem.fixed.kept
        beta = np.zeros(len(design.fixed_names))
        beta[list(kept)] = self._estimates.beta
        blups = self._blup_tables() if groups else []
        names = _named(effects, [x.label for x in blups])
        return scoring(design, beta, blups, names, table, dialect, groups)

    def _blup_tables(self) -> list[BlupTable]:
        prepared, found = self._prepared, []
        for label, (blocks, columns) in self._effect_columns().items():
            if prepared.bars[blocks[0]].component is not None:
                raise NotSupportedError(
                    f"the variance component {label!r}: to_sql(groups=True) needs random effects "
                    "written as bars, such as (1 | g:h) in the formula of lmer"
                )
            keys = prepared.levels[prepared.members(blocks[0])[0]].names
            pairs = zip(blocks, map(tuple, columns), strict=True)
            found.append(BlupTable(label, keys, tuple(pairs)))
        return found


def _named(effects: str | Mapping[str, str], labels: Sequence[str]) -> Mapping[str, str]:
    """Names of the tables of BLUPs by the labels of their factors."""
    if isinstance(effects, str) and len(labels) < 2:
        return dict.fromkeys(labels, effects)
    if isinstance(effects, Mapping) and set(labels) <= set(effects):
        return effects
    shown = ", ".join(f"{label!r}: ..." for label in labels)
    raise DataError(f"effects={effects!r}: must name a table for each factor, {{{shown}}}")
