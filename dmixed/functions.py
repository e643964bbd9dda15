"""The likelihood of a model as a function of its parameters, in statsmodels' words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.errors import DataError, NotSupportedError
from dmixed.fitting import criterion_at
from dmixed.inference.joint import Derivatives, along_root, joint, profiled
from dmixed.likelihood import Criterion, degrees_of_freedom, fixed_estimates
from dmixed.naming import Names
from dmixed.params import MixedLMParams, lower_root, numbers
from dmixed.prediction import fixed_part
from dmixed.preparation import Prepared

SINGULAR = 1e-10
"""Smallest eigenvalue of ``cov_re``, relative scale, that does not count as singular."""


class LikelihoodFunctions:
    """Log-likelihood, score and Hessian at any parameters; nothing is kept from call to call.

    Parameters are a `MixedLMParams`, or a vector in the model's own parameterisation:
    ``[fe_params, lower triangle by rows, vcomp]``, of the Cholesky factor and of square roots if
    ``use_sqrt``; relative scale. The error variance is always profiled out.

    ``reml`` decides the criterion: given, or that by which the `MixedLMParams` were estimated,
    else REML.
    """

    use_sqrt: bool
    _names: Names

    @property
    def _prepared(self) -> Prepared:
        raise AssertionError("made by the model")

    # ------------------------------------------------------------------ sizes

    @property
    def _blocks(self) -> Blocks:
        return self._prepared.problem.factors.blocks

    @property
    def k_fe(self) -> int:
        """Fixed effects (independent columns of X)."""
        return self._prepared.problem.factors.p

    @property
    def k_re(self) -> int:
        """Columns of the random coefficients."""
        return self._prepared.k_re

    @property
    def k_re2(self) -> int:
        """Distinct entries of ``cov_re``."""
        return self.k_re * (self.k_re + 1) // 2

    @property
    def k_vc(self) -> int:
        """Variance components."""
        return self._prepared.k_vc

    @property
    def k_params(self) -> int:
        """Parameters in all, the error variance left out."""
        return self.k_fe + self.k_re2 + self.k_vc

    # ------------------------------------------------------------------ parameters

    def _one_bar(self) -> None:
        if sum(bar.component is None for bar in self._prepared.bars) > 1:
            raise NotSupportedError(
                "MixedLMParams describe one bar and variance components; this model has several "
                "bars: use criterion(theta)"
            )

    def _unpacked(self, params: Any, needs_fe: bool) -> MixedLMParams:
        """Parameters of a call, checked."""
        self._one_bar()
        if not isinstance(params, MixedLMParams):
            values = numbers(params, "params")
            short = self.k_re2 + self.k_vc
            sizes = (self.k_fe + short,) if needs_fe else (short, self.k_fe + short)
            if values.ndim != 1 or len(values) not in sizes:
                raise DataError(
                    f"params has shape {values.shape}: it needs {' or '.join(map(str, sizes))} "
                    "values"
                )
            has_fe = len(values) != short or (needs_fe and self.k_fe == 0)
            params = MixedLMParams.from_packed(
                values, self.k_fe, self.k_re, self.use_sqrt, has_fe and self.k_fe > 0
            )
        if (len(params.cov_re), len(params.vcomp)) != (self.k_re, self.k_vc):
            raise DataError(
                f"params describe {len(params.cov_re)} random effects and {len(params.vcomp)} "
                f"variance components, the model has {self.k_re} and {self.k_vc}"
            )
        if needs_fe and len(params.fe_params) != self.k_fe:
            raise DataError(
                f"params have {len(params.fe_params)} fixed effects, the model has {self.k_fe}"
            )
        if needs_fe and not np.isfinite(params.fe_params).all():
            raise DataError(f"fe_params must be finite, not {params.fe_params}")
        return params

    def _Psi(self, params: MixedLMParams) -> Floats:
        Psi = np.zeros((self._blocks.q,) * 2)
        Psi[: self.k_re, : self.k_re] = params.cov_re
        Psi[self.k_re :, self.k_re :] = np.diag(params.vcomp)
        return Psi

    def _at(
        self, params: MixedLMParams, reml: bool | None, order: int = 2
    ) -> tuple[Criterion, bool]:
        if reml is None:
            reml = True if params.reml is None else params.reml
        return criterion_at(self._prepared, self._Psi(params), reml, order), reml

    def _derivatives(
        self, params: MixedLMParams, profile_fe: bool, reml: bool | None
    ) -> tuple[Derivatives, int]:
        """-2 log-likelihood along [beta, Psi] or Psi alone, and how many come before Psi."""
        at, by_reml = self._at(params, reml)
        if profile_fe:
            return profiled(self._prepared.problem, at), 0
        return joint(self._prepared.problem, at, params.fe_params, by_reml), self.k_fe

    def _rooted(self, params: MixedLMParams, found: Derivatives, p: int) -> Derivatives:
        """Gradient along [the p fixed effects, roots], Hessian along the roots."""
        L = np.zeros((self._blocks.q,) * 2)
        L[: self.k_re, : self.k_re] = lower_root(params.cov_re)
        L[self.k_re :, self.k_re :] = np.diag(np.sqrt(params.vcomp))
        own = Derivatives(found.value, found.gradient[p:], found.hessian[p:, p:])
        rooted = along_root(self._blocks, own, L)
        return replace(rooted, gradient=np.append(found.gradient[:p], rooted.gradient))

    # ------------------------------------------------------------------ functions

    def loglike(self, params: Any, profile_fe: bool = True, *, reml: bool | None = None) -> float:
        """Log-likelihood; maximised over the fixed effects too, or at those of ``params``.

        Raises
        ------
        DataError
            ``params`` are of another size, or ``cov_re`` is no covariance matrix
        """
        own = self._unpacked(params, not profile_fe)
        at, by_reml = self._at(own, reml, order=0)
        if profile_fe:
            return -0.5 * at.value
        return -0.5 * joint(self._prepared.problem, at, own.fe_params, by_reml).value

    def score(
        self, params: Any, profile_fe: bool = True, *, reml: bool | None = None
    ) -> NDArray[np.float64]:
        """Gradient of ``loglike``, in the model's own parameterisation.

        Returns
        -------
        (k_re2 + k_vc,), or (k_fe + k_re2 + k_vc,) without ``profile_fe``
        """
        own = self._unpacked(params, not profile_fe)
        found, p = self._derivatives(own, profile_fe, reml)
        if self.use_sqrt:
            found = self._rooted(own, found, p)
        return -0.5 * found.gradient

    def score_full(
        self, params: Any, calc_fe: bool = True, *, reml: bool | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Gradient at ``params`` along fixed effects, lower triangle of ``cov_re``, ``vcomp``.

        Parameters
        ----------
        calc_fe
            else zeros stand for the fixed effects
        """
        own = self._unpacked(params, True)
        found, _ = self._derivatives(own, False, reml)
        return self._split(-0.5 * found.gradient, calc_fe)

    def score_sqrt(
        self, params: Any, calc_fe: bool = True, *, reml: bool | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """``score_full`` along the Cholesky factor of ``cov_re`` and square roots of ``vcomp``."""
        own = self._unpacked(params, True)
        found, p = self._derivatives(own, False, reml)
        return self._split(-0.5 * self._rooted(own, found, p).gradient, calc_fe)

    def _split(
        self, gradient: Floats, calc_fe: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        fe, re, vc = np.split(gradient, [self.k_fe, self.k_fe + self.k_re2])
        return (fe if calc_fe else np.zeros(self.k_fe)), re, vc

    def hessian(self, params: Any, *, reml: bool | None = None) -> tuple[Floats, bool]:
        """Hessian along [fe_params, lower triangle of cov_re, vcomp], relative scale.

        Returns
        -------
        hessian (k_tot, k_tot), and whether ``cov_re`` is singular
        """
        own = self._unpacked(params, True)
        found, _ = self._derivatives(own, False, reml)
        return -0.5 * found.hessian, self._singular(own.cov_re)

    def profile_hessian(self, params: Any, *, reml: bool | None = None) -> Floats:
        """Hessian of ``loglike(params, profile_fe=True)``, in the model's parameterisation.

        The second derivative of what ``score(params)`` is the first of: fixed effects and scale
        profiled out, exactly.
        """
        own = self._unpacked(params, False)
        found, _ = self._derivatives(own, True, reml)
        if self.use_sqrt:
            found = self._rooted(own, found, 0)
        return -0.5 * found.hessian

    @staticmethod
    def _singular(cov_re: Floats, tol: float = SINGULAR) -> bool:
        return bool(len(cov_re) and np.linalg.eigvalsh(cov_re)[0] < tol)

    def _of_components(self, cov_re: Any, vcomp: Any) -> MixedLMParams:
        cov = np.zeros((0, 0)) if cov_re is None else np.atleast_2d(numbers(cov_re, "cov_re"))
        given = None if cov.size == 0 else cov
        vc = np.zeros(0) if vcomp is None else np.atleast_1d(numbers(vcomp, "vcomp"))
        return self._unpacked(MixedLMParams.from_components(None, given, vcomp=vc), False)

    def get_fe_params(
        self, cov_re: Any, vcomp: Any = None, tol: float = SINGULAR
    ) -> tuple[NDArray[np.float64], bool]:
        """Generalised least-squares fixed effects (k_fe,) at a relative covariance.

        Returns
        -------
        fe_params, and whether an eigenvalue of ``cov_re`` is below ``tol``
        """
        own = self._of_components(cov_re, vcomp)
        at, _ = self._at(own, True, order=0)
        problem = self._prepared.problem
        working = fixed_estimates(problem.factors, at, True).beta
        beta = np.linalg.solve(problem.fixed.to_work, working + problem.response.beta)
        return np.asarray(beta), self._singular(own.cov_re, tol)

    def get_scale(
        self, fe_params: Any, cov_re: Any, vcomp: Any = None, *, reml: bool = True
    ) -> float:
        """Error variance that maximises the likelihood at these parameters, relative scale."""
        own = self._of_components(cov_re, vcomp)
        beta = numbers(fe_params, "fe_params")
        if beta.shape != (self.k_fe,):
            raise DataError(f"fe_params has shape {beta.shape}, the model has {self.k_fe}")
        at, _ = self._at(own, reml, order=0)
        problem = self._prepared.problem
        v = np.append(problem.response.beta - problem.fixed.to_work @ beta, problem.response.scale)
        return float(v @ at.FtHiF @ v) / degrees_of_freedom(problem.factors, reml)

    def predict(self, params: Any, exog: Any = None) -> Any:
        """Fixed part X beta.

        Parameters
        ----------
        params
            `MixedLMParams`, a packed vector that begins with the fixed effects, or these alone
        exog
            (m, k_fe) design matrix; None for the rows of the model
        """
        beta = params.fe_params if isinstance(params, MixedLMParams) else numbers(params, "params")
        if beta.ndim != 1 or len(beta) < self.k_fe:
            raise DataError(
                f"params has shape {beta.shape}, the model has {self.k_fe} fixed effects"
            )
        beta = np.asarray(beta[: self.k_fe], dtype=np.float64)
        design = self._kept_exog() if exog is None else exog
        return fixed_part(design, beta, self._prepared.fixed_names)

    def _kept_exog(self) -> Floats:
        raise AssertionError("made by the model")
