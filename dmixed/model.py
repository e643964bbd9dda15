"""The user's models: orchestration only; every number is made elsewhere."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from dmixed.blocks import Floats
from dmixed.collect import Moments
from dmixed.design import DesignSpec, specify
from dmixed.errors import ConvergenceWarning, DataError
from dmixed.executor import Progress, collect, find_client
from dmixed.fitting import Prepared, evaluate, fit, prepare
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.moments import better_frame
from dmixed.optimizer import SCIPY_METHODS, Step
from dmixed.results import MixedLMResults
from dmixed.sources import Source, open_source

logger = logging.getLogger(__name__)

PILOT_ROWS = 2_000
"""Rows from which the shifts and scales of the variables are taken."""


class MixedLM:
    """A linear mixed model on some rows: ``y = X beta + Z b + e`` with b per group.

    Parameters
    ----------
    endog
        (n,) response
    exog
        (n, p) or (n,) fixed-effects design, constant included if wanted; None for no fixed effects
    groups
        (n,) group labels
    exog_re
        (n, k_re) or (n,) random-coefficient design; None for a random intercept
    missing
        ``"none"`` (a missing value is an error), ``"drop"`` or ``"raise"``

    Notes
    -----
    Rows are read once, when ``moments`` is first needed; every fit works on the moments.
    """

    def __init__(
        self,
        endog: Any,
        exog: Any,
        groups: Any,
        exog_re: Any = None,
        *,
        weights: Any = None,
        offset: Any = None,
        missing: str = "none",
        client: Any = None,
    ) -> None:
        table, fixed, group, re_formula = _table_of_arrays(endog, exog, groups, exog_re)
        formula = parse_parts(fixed, group, re_formula)
        self._set_up(formula, table, weights, offset, missing, client, None, None)

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        groups: str | Sequence[str],
        re_formula: str | None = None,
        *,
        weights: Any = None,
        offset: Any = None,
        missing: str = "none",
        client: Any = None,
        context: Mapping[str, Callable[..., Any]] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> MixedLM:
        """Model in statsmodels' words: a fixed formula, a grouping column, a one-sided re_formula.

        Raises
        ------
        FormulaError, DataError
            naming what cannot be read
        """
        parsed = parse_parts(formula, groups, re_formula, context or ())
        return cls._of(parsed, data, weights, offset, missing, client, context, storage_options)

    @classmethod
    def _of(cls, *arguments: Any) -> MixedLM:
        model = cls.__new__(cls)
        model._set_up(*arguments)
        return model

    def _set_up(
        self,
        formula: ParsedFormula,
        data: Any,
        weights: Any,
        offset: Any,
        missing: str,
        client: Any,
        context: Mapping[str, Callable[..., Any]] | None,
        storage_options: Mapping[str, Any] | None,
    ) -> None:
        if missing not in ("drop", "raise", "none"):
            raise DataError(f'missing={missing!r}: must be "drop", "raise" or "none"')
        data, names = _with_columns(data, {"weights": weights, "offset": offset})
        self.formula: ParsedFormula = formula
        self.client = find_client(client)
        self.source: Source = open_source(data, storage_options)
        self._options: dict[str, Any] = {**names, "missing": missing, "context": context}
        self.progress: Progress | None = None

    @cached_property
    def spec(self) -> DesignSpec:
        """What is evaluated on each batch; learned from a pilot sample."""
        options = self._options
        formula = self.formula.resolved(self.source.columns)
        needed = [*formula.columns]
        for role in ("weights", "offset"):
            name = options[role]
            if name is not None and name not in self.source.columns:
                raise DataError(f"the data have no column {name!r}, which is to be the {role}")
            needed += [name] if name is not None else []
        pilot = self.source.head(tuple(dict.fromkeys(needed)), PILOT_ROWS)
        return specify(formula, pilot, **options)

    @cached_property
    def moments(self) -> Moments:
        """Moments of the rows: the one pass over the data.

        Only if the pilot rows were nothing like the rest (a mean 100 standard deviations away)
        is there a second one, with shifts and scales that the first has taught.
        """
        found = collect(self.spec, self.source, self.client, self.progress)
        frame = better_frame(found.group)
        if frame is None:
            return found
        logger.info("the first rows are not like the rest: reading again with better shifts")
        return collect(replace(self.spec, frame=frame), self.source, self.client, self.progress)

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self.moments)

    def criterion(self, theta: Any, reml: bool = True) -> tuple[float, Floats, Floats]:
        """-2 log-likelihood profiled over the fixed effects and the scale, and its derivatives.

        Parameters
        ----------
        theta
            lme4's: lower triangles of the relative Cholesky factors, column by column, bar by bar

        Returns
        -------
        value, gradient (m,), hessian (m, m)
        """
        return evaluate(self._prepared, theta, reml)

    def fit(
        self,
        reml: bool = True,
        method: str | None = None,
        callback: Callable[[int, Step], None] | None = None,
    ) -> MixedLMResults:
        """Fit by REML or ML.

        Parameters
        ----------
        reml
            restricted maximum likelihood (else maximum likelihood)
        method
            None for the exact trust-region Newton, or a method of `scipy.optimize.minimize`
        callback
            called with the number and `optimizer.Step` of each evaluation

        Raises
        ------
        DataError
            naming what makes the model impossible on these data

        Warns
        -----
        ConvergenceWarning
            the optimum could not be certified
        """
        if method is not None and method not in (*SCIPY_METHODS, "newton"):
            raise ValueError(
                f"method={method!r} is not known: use None (Newton) or one of "
                + ", ".join(SCIPY_METHODS)
            )
        if not isinstance(reml, (bool, np.bool_)):
            raise DataError(f"reml={reml!r}: must be True (REML) or False (ML)")
        estimates = fit(self._prepared, bool(reml), method, callback)
        if not estimates.summary.converged:
            warnings.warn(
                f"the fit is not certified as an optimum: {estimates.summary.reason}; "
                "rescale the columns or simplify the random part",
                ConvergenceWarning,
                stacklevel=2,
            )
        return MixedLMResults(self._prepared, estimates, self.source, self.client)


def lmer(
    formula: str,
    data: Any,
    reml: bool = True,
    weights: Any = None,
    offset: Any = None,
    missing: str = "drop",
    client: Any = None,
    context: Mapping[str, Callable[..., Any]] | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    method: str | None = None,
    progress: Progress | None = None,
    callback: Callable[[int, Step], None] | None = None,
) -> MixedLMResults:
    """Fit a linear mixed model written as in lme4.

    Parameters
    ----------
    formula
        such as ``"y ~ x1 + x2 + (1 + x1 | g)"``
    data
        pandas or polars DataFrame, pyarrow Table or Dataset, Dask DataFrame, or the path or URI
        of Parquet data (file, directory, glob); only the columns used are read, once
    reml
        restricted maximum likelihood (else maximum likelihood)
    weights, offset
        name of a column (or, for data in memory, an array): error variance sigma2 / weight; a
        known addition to the fixed part
    missing
        ``"drop"`` rows with missing values and count them, ``"raise"`` or ``"none"``
    client
        `distributed.Client` to run on; the current one by default, else threads
    context
        row-wise functions that the formula may call by name
    storage_options
        for fsspec, with a URI
    method, callback
        see `MixedLM.fit`
    progress
        called with stage, done, total as the pass goes on

    Examples
    --------
    >>> import numpy as np, pandas as pd, dmixed
    >>> rng = np.random.default_rng(1)
    >>> g = np.repeat(np.arange(50), 10)
    >>> x = rng.standard_normal(500)
    >>> y = 1 + 2 * x + rng.standard_normal(50)[g] + rng.standard_normal(500)
    >>> result = dmixed.lmer("y ~ x + (1 | g)", pd.DataFrame({"y": y, "x": x, "g": g}))
    >>> result.converged
    True
    >>> result.fe_params.round(1).to_dict()
    {'Intercept': 1.0, 'x': 2.1}
    """
    model = MixedLM._of(
        parse(formula, context or ()),
        data,
        weights,
        offset,
        missing,
        client,
        context,
        storage_options,
    )
    model.progress = progress
    return model.fit(reml, method, callback)


def _with_columns(data: Any, extra: Mapping[str, Any]) -> tuple[Any, dict[str, str | None]]:
    """Name the columns of weights and offset; arrays become columns of data in memory."""
    names: dict[str, str | None] = {}
    for role, given in extra.items():
        if given is None or isinstance(given, str):
            names[role] = given
            continue
        if not isinstance(data, pd.DataFrame):
            raise DataError(
                f"{role} as an array needs a pandas DataFrame: for other data give the name of a "
                "column"
            )
        values = np.asarray(_aligned(given, data.index, role))
        if values.shape != (len(data),):
            raise DataError(f"{role} has shape {values.shape}, the data have {len(data)} rows")
        name = f"({role})"
        data = data.assign(**{name: values})
        names[role] = name
    return data, names


def _aligned(given: Any, index: pd.Index | None, argument: str) -> Any:
    """What was given, if its row labels (when it has any) are those of the data."""
    own = given.index if isinstance(given, (pd.Series, pd.DataFrame)) else None
    if own is not None and index is not None and not own.equals(index):
        raise DataError(
            f"the index of {argument} is not that of the data: rows would be mixed up; align it "
            "with .reindex or pass plain arrays"
        )
    return given


def _numbers(values: Any, argument: str, name: str) -> Any:
    """A column of a design: booleans as 0 and 1, everything else must be a number."""
    array = np.asarray(values)
    if array.dtype == object:
        array = pd.Series(array).infer_objects().to_numpy()
    if array.dtype == np.bool_:
        return array.astype(np.float64)
    if array.dtype.kind not in "iuf":
        raise DataError(
            f"column {name!r} of {argument} has type {array.dtype}: a design matrix holds numbers; "
            "from_formula codes categories"
        )
    return array


def _table_of_arrays(
    endog: Any, exog: Any, groups: Any, exog_re: Any
) -> tuple[pd.DataFrame, str, str, str]:
    """One frame of all arrays, and the formulas that name its columns as they are."""
    y, name = np.asarray(endog), str(getattr(endog, "name", None) or "y")
    if y.ndim != 1:
        raise DataError(f"endog has shape {y.shape}: it must be one-dimensional")
    index = endog.index if isinstance(endog, pd.Series) else None
    n = len(y)
    columns: dict[str, Any] = {name: y}
    fixed = _add_columns(columns, _aligned(exog, index, "exog"), "exog", "x", n)
    random = _add_columns(columns, _aligned(exog_re, index, "exog_re"), "exog_re", "z", n)
    group = str(getattr(groups, "name", None) or "Group")
    while group in columns:
        group += "_"
    if np.ndim(groups) != 1 or len(groups) != n:
        raise DataError(f"groups has shape {np.shape(groups)}, endog has {n} rows")
    frame = pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})
    frame[group] = pd.Series(_aligned(groups, index, "groups")).array
    if index is not None:
        frame.index = index
    quoted = [f"`{name}`" for name in fixed]
    formula = f"`{name}` ~ " + " + ".join(["0", *quoted])
    re_formula = "1" if exog_re is None else " + ".join(["0", *(f"`{name}`" for name in random)])
    return frame, formula, group, re_formula


def _add_columns(
    columns: dict[str, Any], design: Any, argument: str, stem: str, n: int
) -> list[str]:
    """Add a design's columns under unique names; a column already there is used again."""
    if design is None:
        return []
    if isinstance(design, pd.DataFrame):
        given = [(str(name), design.iloc[:, j]) for j, name in enumerate(design.columns)]
    elif np.ndim(design) == 1:
        given = [(str(getattr(design, "name", None) or f"{stem}1"), design)]
    elif np.ndim(design) == 2:
        given = [(f"{stem}{j + 1}", column) for j, column in enumerate(np.asarray(design).T)]
    else:
        raise DataError(f"{argument} has shape {np.shape(design)}, endog has {n} rows")
    found: list[str] = []
    for given_name, values in given:
        if len(values) != n:
            raise DataError(f"{argument} has shape {np.shape(design)}, endog has {n} rows")
        if "`" in given_name:
            raise DataError(f"{argument} has a column called {given_name!r}: rename it")
        column, name = _numbers(values, argument, given_name), given_name
        while name in columns and not (
            name in found or np.array_equal(columns[name], column, equal_nan=True)
        ):
            name += "_"
        if name in found:
            raise DataError(f"{argument} has two columns called {given_name!r}: rename one")
        columns[name] = column
        found.append(name)
    return found
