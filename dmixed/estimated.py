"""What a fit estimated, in pandas with names (or in numpy, for a model of plain arrays)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from dmixed.design import BarDesign
from dmixed.effects import Effects
from dmixed.errors import DataError, NotSupportedError
from dmixed.fitting import Estimates
from dmixed.naming import Names
from dmixed.optimizer import OptimizeSummary
from dmixed.params import MixedLMParams, numbers
from dmixed.preparation import Prepared
from dmixed.summary import quantile


@dataclass(frozen=True, eq=False)
class Estimated:
    """Estimates of a linear mixed model.

    Scales. ``params``, ``bse``, ``cov_params()``, ``tvalues``, ``pvalues`` and ``conf_int()`` hold
    the fixed effects followed by the *relative* covariance parameters (divided by ``scale``), as
    statsmodels has them; ``params_user``, ``bse_user``, ``cov_params_user()``, ``cov_re``,
    ``vcomp``, ``bse_re``, ``varcorr()`` and ``summary()`` are in the user's units. Tests are
    large-sample (z).
    """

    _prepared: Prepared = field(repr=False)
    _estimates: Estimates = field(repr=False)
    _names: Names = field(repr=False, default=Names())

    # ----------------------------------------------------------------------------- the model

    @property
    def reml(self) -> bool:
        """Whether REML (else ML) was maximised."""
        return self._estimates.reml

    @property
    def method(self) -> str:
        """``"REML"`` or ``"ML"``."""
        return "REML" if self.reml else "ML"

    @property
    def formula(self) -> str:
        """The model's formula as given; of a model of arrays, its columns."""
        if self._names.fixed is not None:
            return f"{self.endog_name} ~ {' + '.join(self._names.fixed) or '0'}"
        return str(self._prepared.design.spec.formula.text)

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._prepared.moments.nobs

    @property
    def n_groups(self) -> int:
        """The model's groups: in an lme4 formula those of the first bar."""
        return self._prepared.n_groups

    @property
    def group_name(self) -> str:
        """Columns that name the model's groups."""
        return ":".join(self._prepared.groups.names)

    @property
    def group_sizes(self) -> NDArray[np.int64]:
        """(G,) rows per group, in the order of the labels."""
        return self._effects.group_sizes.copy()

    @property
    def group_size_range(self) -> tuple[int, int, float]:
        """Rows of the smallest and of the largest group, and their mean."""
        return self._prepared.group_sizes

    @property
    def factors(self) -> dict[str, int]:
        """Number of levels of each random factor, by its label."""
        terms = zip(self._prepared.problem.terms, self._prepared.levels, strict=True)
        return {self._factor_label(t.block, labels.names): t.n_levels for t, labels in terms}

    def _factor_label(self, block: int, names: tuple[str, ...]) -> str:
        component = self._prepared.bars[block].component
        return ":".join(names) if component is None else component

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows dropped, by reason; each row counts once."""
        return MappingProxyType(dict(self._prepared.moments.dropped))

    @property
    def aliased(self) -> tuple[str, ...]:
        """Columns of X left out because they depend on those before them."""
        kept = set(self._prepared.problem.fixed.kept)
        names = self._names.fixed or self._prepared.design.fixed_names
        return tuple(name for j, name in enumerate(names) if j not in kept)

    @property
    def endog_name(self) -> str:
        """The response as written."""
        return str(self._prepared.design.spec.formula.response_text).strip("`")

    @property
    def k_fe(self) -> int:
        """Fixed effects, p."""
        return self._prepared.problem.factors.p

    @property
    def k_re(self) -> int:
        """Columns of the bars."""
        return self._prepared.k_re

    @property
    def k_re2(self) -> int:
        """Covariance parameters of the bars."""
        return len(self._prepared.problem.factors.blocks.pairs) - self.k_vc

    @property
    def k_vc(self) -> int:
        """Variance components."""
        return self._prepared.k_vc

    @property
    def df_resid(self) -> int:
        """Rows less the rank of X."""
        return self.nobs - self.k_fe

    @property
    def df_modelwc(self) -> int:
        """Fixed effects and covariance parameters."""
        return len(self._user_values)

    @property
    def use_t(self) -> bool:
        """Tests are normal (z), not Student's."""
        return False

    # ----------------------------------------------------------------------------- estimates

    def _vector(self, values: Any, names: list[str], name: str | None = None) -> Any:
        values = np.array(values, dtype=np.float64)
        return values if self._names.plain else pd.Series(values, names, name=name)

    def _matrix(self, values: Any, names: list[str]) -> Any:
        values = np.array(values, dtype=np.float64)
        return values if self._names.plain else pd.DataFrame(values, names, names)

    @property
    def fe_params(self) -> Any:
        """(p,) fixed effects; units of y per unit of the column."""
        return self._vector(self._estimates.beta, self._fixed_names, "fe")

    @property
    def cov_fe(self) -> Any:
        """(p, p) covariance of the fixed effects given the variances, sigma2 (X'H^-1 X)^-1."""
        return self._matrix(self._estimates.cov_beta, self._fixed_names)

    @property
    def bse_fe(self) -> Any:
        """(p,) standard errors of the fixed effects."""
        return self._vector(np.sqrt(np.diag(self._estimates.cov_beta)), self._fixed_names)

    @property
    def scale(self) -> float:
        """Error variance, units of y squared."""
        return self._estimates.sigma2

    @property
    def theta(self) -> NDArray[np.float64]:
        """lme4's theta: lower triangles of the relative Cholesky factors, bar after bar."""
        return self._estimates.theta.copy()

    def varcorr(self) -> dict[str, pd.DataFrame]:
        """Covariance matrix of each bar's random effects, user units; ``"g"``, ``"g.1"``, ...

        A variance component is a matrix of one entry.
        """
        Psi = self._estimates.variances.Psi * self.scale
        shown = iter(self._names.random or [n for bar in self._prepared.bars for n in bar.names])
        found = {}
        for bar, block in self._bars():
            own = [bar.label] if bar.component is not None else [next(shown) for _ in bar.names]
            found[bar.label] = pd.DataFrame(Psi[block, block].copy(), own, own)
        return found

    @property
    def cov_re(self) -> Any:
        """(k_re, k_re) covariance of the random effects, user units; bars are independent."""
        return self._matrix(self._bar_block(self.scale), self._re_names)

    @property
    def cov_re_unscaled(self) -> Any:
        """(k_re, k_re) covariance of the random effects divided by ``scale``."""
        return self._matrix(self._bar_block(1.0), self._re_names)

    @property
    def vcomp(self) -> NDArray[np.float64]:
        """(k_vc,) variances of the components, user units."""
        return self._relative_vcomp * self.scale

    def _bar_block(self, scale: float) -> NDArray[np.float64]:
        return self._estimates.variances.Psi[: self.k_re, : self.k_re] * scale

    @property
    def _relative_vcomp(self) -> NDArray[np.float64]:
        return np.diag(self._estimates.variances.Psi)[self.k_re :].copy()

    @property
    def bse_re(self) -> Any:
        """Standard errors of the entries of ``cov_re`` and of ``vcomp``, user units.

        From the joint information with ``scale``; NaN for a parameter at the boundary or held.
        """
        return self._vector(self._bse_pairs, self._pair_names)

    @property
    def _bse_pairs(self) -> NDArray[np.float64]:
        variance = np.diag(self._estimates.variances.cov_user)[:-1]
        return np.asarray(self.scale * np.sqrt(variance))

    @property
    def bse_scale(self) -> float:
        """Standard error of ``scale``, units of y squared."""
        return float(self.scale * np.sqrt(self._estimates.variances.cov_user[-1, -1]))

    @property
    def _pairs(self) -> NDArray[np.float64]:
        Psi = self._estimates.variances.Psi
        return np.array([Psi[a, b] for a, b in self._prepared.problem.factors.blocks.pairs])

    @property
    def params(self) -> Any:
        """Fixed effects, then the relative covariance parameters (statsmodels' ratio scale)."""
        return self._vector(np.append(self._estimates.beta, self._pairs), self._all_names)

    @property
    def _user_values(self) -> NDArray[np.float64]:
        return np.append(self._estimates.beta, self._pairs * self.scale)

    @property
    def params_user(self) -> pd.Series:
        """Fixed effects, then covariance parameters, all in user units."""
        return pd.Series(self._user_values, self._all_names)

    @property
    def bse_user(self) -> pd.Series:
        """Standard errors of ``params_user``; NaN at a boundary."""
        return pd.Series(np.sqrt(np.diag(self.cov_params_user())), self._all_names)

    @property
    def params_object(self) -> MixedLMParams:
        """Estimates as `MixedLMParams`, relative scale.

        Raises
        ------
        NotSupportedError
            several bars, which no one matrix ``cov_re`` describes
        """
        if sum(bar.component is None for bar in self._prepared.bars) > 1:
            raise NotSupportedError(
                "MixedLMParams describe one bar and variance components; of a model with several "
                "bars theta and varcorr() have the parameters"
            )
        made = MixedLMParams.from_components(
            self._estimates.beta, self._bar_block(1.0), vcomp=self._relative_vcomp
        )
        made.reml = self.reml
        return made

    def cov_params(self, r_matrix: Any = None) -> Any:
        """Covariance of ``params`` (ratio scale): the inverse of minus the Hessian, as statsmodels.

        The fixed effects' part allows for the estimation of the variances, ``cov_fe`` plus
        (d beta / d Psi) cov(Psi) (d beta / d Psi)'; tests, ``bse_fe`` and ``summary()`` are given
        the variances, as lme4's. NaN where a variance is at its boundary or held.

        Parameters
        ----------
        r_matrix
            (m, K) or (K,): the covariance of these linear combinations instead
        """
        cov = self._cov_ratio
        if r_matrix is not None:
            R = numbers(r_matrix, "r_matrix")
            if R.ndim not in (1, 2) or R.shape[-1] != len(cov):
                raise DataError(
                    f"r_matrix has shape {R.shape}: it needs {len(cov)} columns, one for each of "
                    f"{', '.join(self._all_names)}"
                )
            return R @ cov @ R.T
        return self._matrix(cov, self._all_names)

    @property
    def normalized_cov_params(self) -> NDArray[np.float64]:
        """``cov_params() / scale``, as statsmodels has it."""
        return self._cov_ratio / self.scale

    @property
    def _cov_ratio(self) -> NDArray[np.float64]:
        found = self._estimates
        ratio, p = found.variances.cov_ratio, len(found.beta)
        cov = _diagonal(found.cov_beta, ratio)
        cross = found.beta_slope @ np.nan_to_num(ratio)
        cov[:p, :p] += cross @ found.beta_slope.T
        cov[:p, p:] = np.where(np.isnan(np.diag(ratio)), np.nan, cross)
        cov[p:, :p] = cov[:p, p:].T
        return cov

    def cov_params_user(self) -> pd.DataFrame:
        """Covariance of ``params_user``: ``cov_fe``, and the joint information with ``scale``."""
        variances = self._estimates.variances.cov_user[:-1, :-1] * self.scale**2
        cov = _diagonal(self._estimates.cov_beta, variances)
        return pd.DataFrame(cov, self._all_names, self._all_names)

    @property
    def bse(self) -> Any:
        """Standard errors of ``params``."""
        return self._vector(np.sqrt(np.diag(self._cov_ratio)), self._all_names)

    @property
    def tvalues(self) -> Any:
        """``params / bse``: z statistics, large-sample."""
        return self.params / self.bse

    @property
    def pvalues(self) -> Any:
        """Two-sided p-values of ``tvalues``, normal."""
        return self._vector(2.0 * norm.sf(np.abs(self.tvalues)), self._all_names)

    def conf_int(self, alpha: float = 0.05) -> Any:
        """Normal confidence limits of ``params`` at level 1 - alpha, columns 0 and 1.

        Raises
        ------
        ValueError
            alpha is not between 0 and 1
        """
        half = quantile(alpha) * self.bse
        limits = pd.DataFrame({0: self.params - half, 1: self.params + half})
        return limits.to_numpy() if self._names.plain else limits

    # ----------------------------------------------------------------------------- the criterion

    @property
    def llf(self) -> float:
        """Log-likelihood, restricted under REML."""
        return -0.5 * self._estimates.value

    @property
    def aic(self) -> float:
        """Akaike's criterion; NaN under REML."""
        return np.nan if self.reml else -2.0 * self.llf + 2.0 * self._estimates.n_free

    @property
    def bic(self) -> float:
        """Schwarz's criterion with log(nobs); NaN under REML."""
        n = self._estimates.n_free
        return np.nan if self.reml else -2.0 * self.llf + np.log(self.nobs) * n

    @property
    def converged(self) -> bool:
        """The optimum is certified, see ``optimizer_summary.certificate``."""
        return self._estimates.summary.converged

    @property
    def singular(self) -> bool:
        """A variance is exactly zero, or a covariance matrix has not full rank."""
        return any(self._estimates.variances.zero)

    @property
    def optimizer_summary(self) -> OptimizeSummary:
        """Path, evaluations, reason and certificate of the optimisation."""
        return self._estimates.summary

    # ----------------------------------------------------------------------------- names

    @cached_property
    def _effects(self) -> Effects:
        return Effects(self._prepared)

    def _bars(self) -> Iterator[tuple[BarDesign, slice]]:
        blocks = self._prepared.problem.factors.blocks
        yield from zip(self._prepared.bars, blocks.slices, strict=True)

    @property
    def _fixed_names(self) -> list[str]:
        names = self._names.fixed or self._prepared.design.fixed_names
        return [names[j] for j in self._prepared.problem.fixed.kept]

    @property
    def _column_names(self) -> list[str]:
        """Names of the columns of the bars."""
        return list(self._names.random or [n for bar in self._prepared.bars for n in bar.names])

    @property
    def _re_names(self) -> list[str]:
        """Names of the random columns as in statsmodels: the intercept is called the group."""
        if self._names.random is not None:
            return list(self._names.random)
        found, labels = [], []
        for block, bar in enumerate(self._prepared.bars):
            if bar.component is None:
                group = ":".join(self._prepared.levels[self._prepared.members(block)[0]].names)
                found += [group if name == "Intercept" else str(name) for name in bar.names]
                labels += [bar.label] * len(bar.names)
        if len(set(found)) == len(found):
            return found
        return [f"{label}: {name}" for label, name in zip(labels, self._column_names, strict=True)]

    @property
    def _pair_names(self) -> list[str]:
        names = [*self._re_names, *(b.label for b in self._prepared.bars if b.component)]
        return [
            f"{names[a]} Var" if a == b else f"{names[b]} x {names[a]} Cov"
            for a, b in self._prepared.problem.factors.blocks.pairs
        ]

    @property
    def _all_names(self) -> list[str]:
        return [*self._fixed_names, *self._pair_names]


def _diagonal(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.zeros((len(a) + len(b),) * 2)
    out[: len(a), : len(a)], out[len(a) :, len(a) :] = a, b
    return out
