"""The user's models: orchestration only; every number is made elsewhere."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from dmixed.arrays import aligned, array_model
from dmixed.blocks import Floats
from dmixed.caller import joined
from dmixed.collect import Moments
from dmixed.constrained import Held, Penalties, fit_constrained
from dmixed.design import DesignSpec, specify
from dmixed.errors import ConvergenceWarning, DataError
from dmixed.executor import Progress, collect, find_client
from dmixed.fitting import Estimates, Search, evaluate, fit
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.methods import search_methods, settings_of
from dmixed.moments import better_frame
from dmixed.naming import Names
from dmixed.optimizer import Step
from dmixed.params import MixedLMParams, VCSpec
from dmixed.preparation import Prepared, prepare
from dmixed.regularized import fit_elastic_net
from dmixed.results import MixedLMResults
from dmixed.rows import RowsOfModel
from dmixed.sources import Source, open_source

logger = logging.getLogger(__name__)

PILOT_ROWS = 2_000
"""Rows from which the shifts and scales of the variables are taken."""

_IN_MEMORY = ("pandas", "polars", "arrow")


class MixedLM(RowsOfModel):
    """A linear mixed model on some rows: ``y = X beta + Z b + sum V_l u_l + e``, b per group.

    Parameters
    ----------
    endog
        (n,) response
    exog
        (n, p) or (n,) fixed-effects design, constant included if wanted; None for no fixed effects
    groups
        (n,) group labels
    exog_re
        (n, k_re) or (n,) random-coefficient design; None for a random intercept, or for none
        beside variance components
    exog_vc
        `VCSpec` of variance components
    use_sqrt
        vectors of parameters hold the Cholesky factor of ``cov_re`` and square roots of ``vcomp``
    missing
        ``"none"`` (a missing value is an error), ``"drop"`` or ``"raise"``
    weights, offset
        (n,) error variance is sigma2 / weight; a known addition to the fixed part
    client
        `distributed.Client` to run on

    Notes
    -----
    Rows are read once, and only their moments are kept; every fit and every function of the
    parameters works on these. Fits leave nothing behind on the model.
    """

    def __init__(
        self,
        endog: Any,
        exog: Any,
        groups: Any,
        exog_re: Any = None,
        exog_vc: VCSpec | Mapping[str, Any] | None = None,
        use_sqrt: bool = True,
        missing: str = "none",
        *,
        weights: Any = None,
        offset: Any = None,
        client: Any = None,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        made = array_model(endog, exog, groups, exog_re, exog_vc)
        formula = parse_parts(made.formula, made.group, made.re_formula, (), made.vc_formula)
        self._set_up(formula, made.table, weights, offset, missing, client, None, None)
        self._names = made.names
        self.use_sqrt = bool(use_sqrt)
        self._read_now()

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        re_formula: str | None = None,
        vc_formula: Mapping[str, str] | None = None,
        subset: Any = None,
        use_sparse: bool = False,
        missing: str = "none",
        *,
        groups: Any = None,
        use_sqrt: bool = True,
        weights: Any = None,
        offset: Any = None,
        client: Any = None,
        context: Mapping[str, Callable[..., Any]] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> MixedLM:
        """Model in statsmodels' words.

        Parameters
        ----------
        formula
            response and fixed part, ``"y ~ x"``
        data
            a table in any form that `lmer` takes
        re_formula
            random coefficients, ``"~x"``; None is a random intercept, or none beside components
        vc_formula
            name -> formula of each variance component, ``{"cask": "0 + C(cask)"}``; levels are
            those within each group
        subset
            rows of a pandas DataFrame, for ``data.loc``
        use_sparse
            accepted and not needed
        groups
            name of the column of the groups (or of several), or an array in the order of the rows
        context
            row-wise functions that the formulas call; plain names are found in the caller's
            variables too

        Raises
        ------
        FormulaError, DataError
            naming what cannot be read
        """
        del use_sparse
        _refuse(unknown)
        texts = [formula, re_formula, *(vc_formula or {}).values()]
        own = joined(context, sys._getframe(1), [t for t in texts if isinstance(t, str)])
        data, key = _with_groups(data, groups)
        if subset is not None:
            if not isinstance(data, pd.DataFrame):
                raise DataError(
                    "subset= needs a pandas DataFrame: filter other data before the fit"
                )
            data = data.loc[subset]
        parsed = parse_parts(formula, key, re_formula, own, vc_formula)
        model = cls._of(parsed, data, weights, offset, missing, client, own, storage_options)
        model.use_sqrt = bool(use_sqrt)
        model._read_now()
        return model

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
        self.parsed: ParsedFormula = formula
        self.client = find_client(client)
        self.source: Source = open_source(data, storage_options)
        self._options: dict[str, Any] = {**names, "missing": missing, "context": context}
        self.progress: Progress | None = None
        self.use_sqrt = True
        self._names = Names()

    def _read_now(self) -> None:
        """Refuse what cannot be fitted where the model is made, if that costs no scan of files."""
        if self.source.kind in _IN_MEMORY:
            _ = self.moments

    @property
    def formula(self) -> str:
        """The model's formula as given."""
        return self.parsed.text

    @cached_property
    def spec(self) -> DesignSpec:
        """What is evaluated on each batch; learned from a pilot sample."""
        options = self._options
        formula = self.parsed.resolved(self.source.columns)
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

    # ------------------------------------------------------------------ fits

    def fit(
        self,
        start_params: Any = None,
        reml: bool = True,
        niter_sa: int = 0,
        do_cg: bool = True,
        fe_pen: Any = None,
        cov_pen: Any = None,
        free: MixedLMParams | None = None,
        full_output: bool = False,
        method: str | Sequence[str] | None = None,
        *,
        callback: Callable[[int, Step], None] | None = None,
        **fit_kwargs: Any,
    ) -> MixedLMResults:
        """Fit by REML or ML.

        Parameters
        ----------
        start_params
            `MixedLMParams`, or a vector of the covariance parameters (with or without the fixed
            effects before them) in the model's parameterisation
        reml
            restricted maximum likelihood (else maximum likelihood)
        niter_sa
            not used, as in statsmodels
        do_cg
            False: no search; estimates at ``start_params``
        fe_pen, cov_pen
            penalties on the fixed effects (``func(params)``, ``deriv(params)``) and on the relative
            ``cov_re`` (``func(mat, mat_inv)``, ``deriv``), subtracted from the log-likelihood
        free
            1 where a parameter is estimated, 0 where it keeps its value in ``start_params``
            (fixed effects zero, ``cov_re`` the identity, ``vcomp`` one without); entries of
            ``cov_re`` itself, not of a factor of it
        full_output
            keep ``hist`` on the result
        method
            None for the exact trust-region Newton; a method of `scipy.optimize.minimize`, or
            statsmodels' short name ("bfgs", "lbfgs", "cg", "nm", "powell", "ncg",
            "basinhopping"); of several the first that converges
        callback
            called with the number and `optimizer.Step` of each evaluation
        **fit_kwargs
            ``maxiter``, ``gtol``, ``ftol``, ``tol``, ``eps``, ``maxcor``, ``maxls``, ``disp`` for
            scipy's method

        Raises
        ------
        DataError
            naming what makes the model impossible on these data

        Warns
        -----
        ConvergenceWarning
            the optimum could not be certified
        """
        if not isinstance(reml, (bool, np.bool_)):
            raise DataError(f"reml={reml!r}: must be True (REML) or False (ML)")
        if niter_sa:
            warnings.warn("niter_sa is not used by MixedLM.fit", UserWarning, stacklevel=2)
        settings = settings_of(fit_kwargs, stacklevel=3)
        start = None if start_params is None else self._start(start_params)
        found = None
        for name in search_methods(method):
            search = Search(name, settings.get(name or "", {}), None, callback)
            found = self._fit(bool(reml), search, start, free, do_cg, Penalties(fe_pen, cov_pen))
            if found.summary.converged:
                break
        assert found is not None
        given = {
            "fe_pen": fe_pen,
            "cov_pen": cov_pen,
            "free": None if free is None else free.copy(),
        }
        return self._result(found, full_output, given, stacklevel=3)

    def _fit(
        self,
        reml: bool,
        search: Search,
        start: MixedLMParams | None,
        free: MixedLMParams | None,
        do_cg: bool,
        penalties: Penalties,
    ) -> Estimates:
        prepared = self._prepared
        if start is not None:
            search = replace(search, start=self._Psi(start))
        if free is None and do_cg and not penalties:
            return fit(prepared, reml, search)
        m, p = len(self._blocks.pairs), self.k_fe
        free_beta, free_pairs = np.ones(p, np.bool_), np.full(m, do_cg)
        if free is not None:
            free_beta, mask = self._mask(free)
            free_pairs &= mask
        Psi = np.eye(self._blocks.q) if start is None else self._Psi(start)
        if start is None and (penalties and free is None):
            Psi = fit(prepared, reml, replace(search, method=None)).variances.Psi
        beta = np.zeros(p)
        if start is not None and len(start.fe_params) == p and start.fe_params.any():
            beta = start.fe_params.copy()
        elif free_beta.all():
            beta = self._beta_at(Psi, reml)
        elif free_beta.any():
            beta[free_beta] = self._beta_at(Psi, reml)[free_beta]
        return fit_constrained(
            prepared, reml, search, Held(beta, Psi, free_beta, free_pairs), penalties
        )

    def _beta_at(self, Psi: Floats, reml: bool) -> Floats:
        del reml
        k = self.k_re
        if sum(bar.component is None for bar in self._prepared.bars) > 1:
            return np.zeros(self.k_fe)
        return self.get_fe_params(Psi[:k, :k], np.diag(Psi)[k:])[0]

    def _start(self, given: Any) -> MixedLMParams:
        """Starting values from what was given."""
        self._one_bar()
        try:
            start = self._unpacked(given, False)
        except DataError as error:
            raise DataError(f"invalid start_params: {error}") from None
        if len(start.fe_params) not in (0, self.k_fe):
            raise DataError(
                f"invalid start_params: {len(start.fe_params)} fixed effects, the model has "
                f"{self.k_fe}"
            )
        return start

    def _mask(self, free: MixedLMParams) -> tuple[Any, Any]:
        """Which fixed effects (p,) and entries of Psi (m,) are free."""
        own = self._unpacked(free, False)
        fe = np.asarray(own.fe_params) != 0
        if len(fe) != self.k_fe:
            if len(fe):
                raise DataError(f"free has {len(fe)} fixed effects, the model has {self.k_fe}")
            fe = np.ones(self.k_fe, np.bool_)
        Psi = self._Psi(own)
        pairs = np.array([bool(Psi[a, b] or Psi[b, a]) for a, b in self._blocks.pairs], np.bool_)
        return fe, pairs

    def fit_regularized(
        self,
        start_params: Any = None,
        method: Any = "l1",
        alpha: Any = 0.0,
        ceps: float = 1e-4,
        ptol: float = 1e-6,
        maxit: int = 200,
        *,
        l1_ratio: float = 1.0,
        **fit_kwargs: Any,
    ) -> MixedLMResults:
        """Shrink the fixed effects, the covariance kept at the fit without penalty.

        Minimises ``(y - X b)'V^-1 (y - X b) + sum alpha (r |b| + (1 - r) b^2 / 2)``, r the
        ``l1_ratio``, by coordinate descent (Friedman, Hastie & Tibshirani 2010, J. Stat. Softw.
        33(1)), V the marginal covariance.

        Parameters
        ----------
        start_params
            for the fit without penalty
        method
            "l1" or "elastic_net"; or a penalty object, which `fit` takes as ``fe_pen``, its
            weights times ``alpha``
        alpha
            penalty weight, or (k_fe,) one for each fixed effect
        ceps
            estimates smaller than this count as zero
        ptol, maxit
            when to stop: change of the estimates, sweeps
        l1_ratio
            share of the absolute value in the penalty

        Returns
        -------
        results whose standard errors are those of the model with the effects that are not zero
        """
        if not isinstance(method, str):
            method.alpha = alpha
            return self.fit(start_params, fe_pen=method, **fit_kwargs)
        if method.lower() not in ("l1", "elastic_net"):
            raise ValueError(f"method={method!r}: must be 'l1', 'elastic_net' or a penalty object")
        free = self.fit(start_params, **fit_kwargs)
        found = fit_elastic_net(
            self._prepared, free._estimates, alpha, 1.0 if method.lower() == "l1" else l1_ratio,
            ceps, ptol, maxit,
        )  # fmt: skip
        return self._result(found, False, {}, stacklevel=3)

    def _result(
        self, found: Estimates, full_output: bool, given: Mapping[str, Any], stacklevel: int
    ) -> MixedLMResults:
        if not found.summary.converged:
            warnings.warn(
                f"the fit is not certified as an optimum: {found.summary.reason}; "
                "rescale the columns or simplify the random part",
                ConvergenceWarning,
                stacklevel=stacklevel,
            )
        history = None
        if full_output:
            summary = found.summary
            history = (
                {
                    "method": summary.method,
                    "converged": summary.converged,
                    "fopt": 0.5 * found.value,
                    "fcalls": summary.evaluations,
                    "message": summary.reason,
                    "allvecs": [np.array(step.theta) for step in summary.path],
                },
            )
        options = {"use_sqrt": self.use_sqrt, **given}
        return MixedLMResults(
            self._prepared, found, self._names, self.source, self.client, self, history, options
        )


mixedlm = MixedLM.from_formula
"""`MixedLM.from_formula`, by the name that statsmodels' formula interface has."""


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
        such as ``"y ~ x1 + x2 + (1 + x1 | g)"``, ``"y ~ x + (1 | school/class)"``,
        ``"y ~ 1 + (1 | plate) + (1 | sample)"``
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
    if not isinstance(reml, (bool, np.bool_)):
        raise DataError(f"reml={reml!r}: must be True (REML) or False (ML)")
    (name,) = search_methods(method)
    found = model._fit(
        bool(reml), Search(name, None, None, callback), None, None, True, Penalties()
    )
    return model._result(found, False, {}, stacklevel=3)


def _refuse(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        raise DataError(f"argument {name} is not permitted for MixedLM: it is not known here")


def _with_groups(data: Any, groups: Any) -> tuple[Any, str | Sequence[str]]:
    """Table and name of the groups' column, which an array becomes."""
    if groups is None:
        raise DataError("groups= is needed: the column that names the groups, or an array")
    if isinstance(groups, str) or (
        isinstance(groups, list | tuple) and all(isinstance(x, str) for x in groups)
        and (not hasattr(data, "__len__") or len(groups) != len(data))
    ):  # fmt: skip
        return data, groups
    if not isinstance(data, pd.DataFrame):
        raise DataError("groups as an array needs a pandas DataFrame: else give the column's name")
    values = pd.Series(aligned(groups, data.index, "groups")).array
    if len(values) != len(data):
        raise DataError(f"groups has length {len(values)}, the data have {len(data)} rows")
    name = "Group"
    while name in data.columns:
        name += "_"
    return data.assign(**{name: values}), name


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
        values = np.asarray(aligned(given, data.index, role))
        if values.shape != (len(data),):
            raise DataError(f"{role} has shape {values.shape}, the data have {len(data)} rows")
        name = f"({role})"
        data = data.assign(**{name: values})
        names[role] = name
    return data, names
