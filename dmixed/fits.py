"""How a model is fitted: arguments in statsmodels' words to one of the fits, and its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from dmixed.blocks import Floats
from dmixed.constrained import fit_constrained
from dmixed.errors import ConvergenceWarning, DataError
from dmixed.fitting import Estimates, Search, fit
from dmixed.held import Held, Penalties
from dmixed.markup import counted, page
from dmixed.methods import search_methods, settings_of
from dmixed.optimizer import Step
from dmixed.params import MixedLMParams
from dmixed.progress import Progress, Report, open_progress
from dmixed.regularized import fit_elastic_net
from dmixed.results import MixedLMResults
from dmixed.rows import RowsOfModel


class FitsOfModel(RowsOfModel):
    """The fits of a model; none leaves anything behind on it."""

    progress: Progress | bool | None

    @property
    def formula(self) -> str:
        """The model's formula."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """The model, and what has been read of its rows."""
        moments = vars(self).get("moments")
        source = self.source
        pairs = [("Model", type(self).__name__), ("Formula", self.formula)]
        if source is not None:
            pairs.append(("Data", f"{source.kind}, {getattr(source, 'location', '')}".rstrip(", ")))
        if moments is None:
            pairs.append(("Rows", "not read yet: the first fit does"))
        else:
            pairs += [
                ("Rows", counted(moments.nobs, moments.summary.dropped.items())),
                ("Cells of the groups", f"{moments.n_cells:,}"),
            ]
        return page("Linear mixed model", pairs)

    def _read(self, report: Report) -> None:
        """Make the moments that the fits need."""
        raise NotImplementedError

    def _kept(self, search: Search, reml: bool) -> Search:
        """The search of a fit without constraints, kept on disk if that was asked for."""
        raise NotImplementedError

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
        progress: Progress | bool | None = None,
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
        progress
            see `lmer`; None for what the model was made with
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
        if free is not None and not isinstance(free, MixedLMParams):
            raise DataError(f"free must be MixedLMParams of 0 and 1, not {type(free).__name__}")
        settings = settings_of(fit_kwargs, stacklevel=3)
        with open_progress(self.progress if progress is None else progress) as report:
            self._read(report)
            report.stage("fit")
            start = None if start_params is None else self._start(start_params)
            penalties, watch = Penalties(fe_pen, cov_pen), report.watch(callback)
            found = None
            for name in search_methods(method):
                search = Search(name, settings.get(name or "", {}), None, watch)
                found = self._fit(bool(reml), search, start, free, do_cg, penalties)
                if found.summary.converged:
                    break
            assert found is not None
            report.fitted(found.summary)
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
            return fit(prepared, reml, self._kept(search, reml))
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
            beta = self._beta_at(Psi)
        elif free_beta.any():
            beta[free_beta] = self._beta_at(Psi)[free_beta]
        return fit_constrained(
            prepared, reml, search, Held(beta, Psi, free_beta, free_pairs), penalties
        )

    def _beta_at(self, Psi: Floats) -> Floats:
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
            penalty = copy(method)
            penalty.alpha = alpha
            return self.fit(start_params, fe_pen=penalty, **fit_kwargs)
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
