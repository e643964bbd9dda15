"""The result of a fit: immutable, independent of the model, in pandas with names."""

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

from dmixed import keys, prediction
from dmixed.executor import running
from dmixed.fitting import Estimates, Prepared
from dmixed.inference.random_effects import conditional_covariances, conditional_modes
from dmixed.optimizer import OptimizeSummary
from dmixed.sources import Source, open_source
from dmixed.summary import Summary, quantile, summarise


@dataclass(frozen=True, eq=False)
class MixedLMResults:
    """Estimates of a linear mixed model.

    Scales. ``params``, ``bse``, ``cov_params()``, ``tvalues``, ``pvalues`` and ``conf_int()`` hold
    the fixed effects followed by the *relative* covariance parameters (divided by ``scale``), as
    statsmodels has them; ``cov_re``, ``varcorr()``, ``bse_re`` and ``summary()`` are in the user's
    units. Tests are large-sample (z).

    Attributes
    ----------
    reml
        estimated by REML (else ML)
    """

    _prepared: Prepared = field(repr=False)
    _estimates: Estimates = field(repr=False)
    _source: Source | None = field(repr=False, default=None)
    _client: Any = field(repr=False, default=None)

    def __getstate__(self) -> dict[str, Any]:
        """State without the rows, the connection and what is cheap to compute again."""
        return {
            "_prepared": self._prepared,
            "_estimates": self._estimates,
            "_source": None,
            "_client": None,
        }

    def __copy__(self) -> MixedLMResults:
        """Itself: nothing in it changes, and a copy would lose the rows as a pickle does."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedLMResults:
        """Itself, see ``__copy__``."""
        del memo
        return self

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
        """The model's formula in lme4's spelling."""
        return str(self._prepared.design.spec.formula.text)

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._prepared.moments.nobs

    @property
    def n_groups(self) -> int:
        """Groups."""
        return self._prepared.moments.group.n_groups

    @property
    def group_sizes(self) -> NDArray[np.int64]:
        """(G,) rows per group, in the order of ``ranef()``."""
        return self._prepared.moments.group.counts[self._order]

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows dropped, by reason; each row counts once."""
        return MappingProxyType(dict(self._prepared.moments.dropped))

    @property
    def aliased(self) -> tuple[str, ...]:
        """Columns of X left out because they depend on those before them."""
        return self._prepared.aliased

    @property
    def endog_name(self) -> str:
        """The response as written."""
        return str(self._prepared.design.spec.formula.response_text)

    # ----------------------------------------------------------------------------- estimates

    @property
    def fe_params(self) -> pd.Series:
        """(p,) fixed effects; units of y per unit of the column."""
        return pd.Series(self._estimates.beta.copy(), list(self._prepared.fixed_names), name="fe")

    @property
    def cov_fe(self) -> pd.DataFrame:
        """(p, p) covariance of the fixed effects given the variances, sigma2 (X'H^-1 X)^-1."""
        names = list(self._prepared.fixed_names)
        return pd.DataFrame(self._estimates.cov_beta.copy(), names, names)

    @property
    def bse_fe(self) -> pd.Series:
        """(p,) standard errors of the fixed effects."""
        return pd.Series(np.sqrt(np.diag(self.cov_fe)), self.fe_params.index)

    @property
    def scale(self) -> float:
        """Error variance, units of y squared."""
        return self._estimates.sigma2

    @property
    def theta(self) -> NDArray[np.float64]:
        """lme4's theta: lower triangles of the relative Cholesky factors, bar after bar."""
        return self._estimates.theta.copy()

    def varcorr(self) -> dict[str, pd.DataFrame]:
        """Covariance matrix of each bar's random effects, user units; ``"g"``, ``"g.1"``, ..."""
        Psi = self._estimates.variances.Psi * self.scale
        return {
            label: pd.DataFrame(Psi[block, block].copy(), list(bar.names), list(bar.names))
            for label, bar, block in self._bars()
        }

    @property
    def cov_re(self) -> pd.DataFrame:
        """(q, q) covariance of the random effects, user units; bars are independent blocks."""
        names = self._re_names
        return pd.DataFrame(self._estimates.variances.Psi * self.scale, names, names)

    @property
    def cov_re_unscaled(self) -> pd.DataFrame:
        """(q, q) covariance of the random effects divided by ``scale``."""
        names = self._re_names
        return pd.DataFrame(self._estimates.variances.Psi.copy(), names, names)

    @property
    def bse_re(self) -> pd.Series:
        """Standard errors of the entries of ``cov_re``, user units, from the joint information.

        NaN for a parameter at the boundary.
        """
        variance = np.diag(self._estimates.variances.cov_user)[:-1]
        return pd.Series(self.scale * np.sqrt(variance), self._pair_names)

    @property
    def bse_scale(self) -> float:
        """Standard error of ``scale``, units of y squared."""
        return float(self.scale * np.sqrt(self._estimates.variances.cov_user[-1, -1]))

    @property
    def params(self) -> pd.Series:
        """Fixed effects, then the relative covariance parameters (statsmodels' ratio scale)."""
        Psi = self._estimates.variances.Psi
        pairs = self._prepared.problem.factors.blocks.pairs
        ratio = pd.Series([Psi[a, b] for a, b in pairs], self._pair_names)
        return pd.concat([self.fe_params, ratio]).rename(None)

    def cov_params(self) -> pd.DataFrame:
        """Covariance of ``params`` (ratio scale); fixed effects and variances uncorrelated."""
        names, p = self.params.index, len(self.fe_params)
        cov = np.zeros((len(names), len(names)))
        cov[:p, :p] = self._estimates.cov_beta
        cov[p:, p:] = self._estimates.variances.cov_ratio
        return pd.DataFrame(cov, names, names)

    @property
    def bse(self) -> pd.Series:
        """Standard errors of ``params``."""
        return pd.Series(np.sqrt(np.diag(self.cov_params())), self.params.index)

    @property
    def tvalues(self) -> pd.Series:
        """``params / bse``: z statistics, large-sample."""
        return self.params / self.bse

    @property
    def pvalues(self) -> pd.Series:
        """Two-sided p-values of ``tvalues``, normal."""
        return pd.Series(2.0 * norm.sf(np.abs(self.tvalues)), self.params.index)

    def conf_int(self, alpha: float = 0.05) -> pd.DataFrame:
        """Normal confidence limits of ``params`` at level 1 - alpha, columns 0 and 1.

        Raises
        ------
        ValueError
            alpha is not between 0 and 1
        """
        half = quantile(alpha) * self.bse
        return pd.DataFrame({0: self.params - half, 1: self.params + half})

    # ----------------------------------------------------------------------------- the criterion

    @property
    def llf(self) -> float:
        """Log-likelihood, restricted under REML."""
        return -0.5 * self._estimates.value

    @property
    def aic(self) -> float:
        """Akaike's criterion; NaN under REML."""
        return np.nan if self.reml else -2.0 * self.llf + 2.0 * self._n_params

    @property
    def bic(self) -> float:
        """Schwarz's criterion with log(nobs); NaN under REML."""
        return np.nan if self.reml else -2.0 * self.llf + np.log(self.nobs) * self._n_params

    @property
    def _n_params(self) -> int:
        return len(self.params) + 1

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

    # ----------------------------------------------------------------------------- random effects

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return keys.sort_index(self._prepared.moments.labels)

    @cached_property
    def _index(self) -> pd.Index:
        return keys.to_pandas(self._prepared.moments.labels.take(self._order))

    @cached_property
    def _modes(self) -> NDArray[np.float64]:
        found = self._estimates
        return conditional_modes(self._prepared.problem, found.root, found.working_beta)

    def ranef(self) -> pd.DataFrame:
        """(G, q) conditional modes (BLUPs), one row per group, user units.

        Groups in canonical order: numbers numerically, text by code point.
        """
        return pd.DataFrame(self._modes[self._order], self._index.copy(), self._column_names)

    @property
    def random_effects(self) -> Mapping[Any, pd.Series]:
        """BLUPs by group label."""
        return _ByLabel(self._index, self._series)

    @property
    def random_effects_cov(self) -> Mapping[Any, pd.DataFrame]:
        """Conditional covariance of the random effects given y and the estimates, by label."""
        return _ByLabel(self._index, self._covariance)

    def _series(self, position: int, label: Any) -> pd.Series:
        modes = self._modes[self._order[position]].copy()
        return pd.Series(modes, self._re_names, name=label)

    def _covariance(self, position: int, label: Any) -> pd.DataFrame:
        del label
        g = int(self._order[position])
        found = self._estimates
        cov = conditional_covariances(
            self._prepared.problem, found.root, found.sigma2, slice(g, g + 1)
        )
        return pd.DataFrame(cov[0], self._re_names, self._re_names)

    # ----------------------------------------------------------------------------- rows

    @property
    def fittedvalues(self) -> pd.Series:
        """Fixed part plus BLUPs plus offset, of the rows used; reads the rows again."""
        return self._rows.fitted.copy()

    @property
    def resid(self) -> pd.Series:
        """Response minus ``fittedvalues``."""
        return self._rows.response.copy() - self._rows.fitted

    @cached_property
    def _rows(self) -> prediction.Rows:
        if self._source is None:
            raise AttributeError(
                "the rows do not travel with a stored result: use predict(data) on them"
            )
        found = self._estimates
        return prediction.used_rows(
            self._prepared, found.beta, self._modes, self._source, running(self._client)
        )

    def predict(self, new_data: Any = None, storage_options: Any = None) -> pd.Series:
        """Fixed part X beta of new rows (population level, without offset and random effects).

        Parameters
        ----------
        new_data
            anything that can be fitted; None means the rows of the fit. Only the columns of the
            fixed part are needed.

        Returns
        -------
        (n,) Series, NaN where a covariate is missing; units of y

        Raises
        ------
        DataError
            a level that the fit has not seen, a missing column
        """
        source = self._source if new_data is None else open_source(new_data, storage_options)
        if source is None:
            raise AttributeError("the rows do not travel with a stored result: give new_data")
        return prediction.population(
            self._prepared, self._estimates.beta, source, running(self._client)
        )

    # ----------------------------------------------------------------------------- presentation

    def summary(self, alpha: float = 0.05) -> Summary:
        """Tables in the user's units, with flags explained in words; limits at level 1 - alpha.

        Raises
        ------
        ValueError
            alpha is not between 0 and 1
        """
        return summarise(self, alpha)

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the random effects as plain Python values, ready for JSON."""
        return {
            "schema": "dmixed-result/1",
            "formula": self.formula,
            "method": self.method,
            "nobs": self.nobs,
            "n_groups": self.n_groups,
            "llf": self.llf,
            "scale": self.scale,
            "bse_scale": self.bse_scale,
            "fe_params": self.fe_params.to_dict(),
            "bse_fe": self.bse_fe.to_dict(),
            "cov_fe": self.cov_fe.to_numpy().tolist(),
            "varcorr": {
                label: {"names": list(map(str, cov.index)), "cov": cov.to_numpy().tolist()}
                for label, cov in self.varcorr().items()
            },
            "bse_re": self.bse_re.to_numpy().tolist(),
            "theta": self.theta.tolist(),
            "aic": self.aic,
            "bic": self.bic,
            "converged": self.converged,
            "singular": self.singular,
            "dropped": dict(self.dropped),
            "aliased": list(self.aliased),
            "optimizer": {
                "method": self.optimizer_summary.method,
                "evaluations": self.optimizer_summary.evaluations,
                "reason": self.optimizer_summary.reason,
                "digits_lost": self.optimizer_summary.certificate.digits_lost,
            },
        }

    # ----------------------------------------------------------------------------- names

    def _bars(self) -> Iterator[tuple[str, Any, slice]]:
        blocks = self._prepared.problem.factors.blocks
        for bar, block in zip(self._prepared.design.bars, blocks.slices, strict=True):
            yield bar.label, bar, block

    @property
    def _column_names(self) -> list[str]:
        names = [str(name) for bar in self._prepared.design.bars for name in bar.names]
        repeated = len(set(names)) < len(names)
        if not repeated:
            return names
        return [f"{label}: {name}" for label, bar, _ in self._bars() for name in bar.names]

    @property
    def _re_names(self) -> list[str]:
        """Names of the random columns as in statsmodels: the intercept is called the group."""
        group = ":".join(self._prepared.design.spec.group)
        return [group if n == "Intercept" else n for n in self._column_names]

    @property
    def _pair_names(self) -> list[str]:
        names = self._re_names
        return [
            f"{names[a]} Var" if a == b else f"{names[b]} x {names[a]} Cov"
            for a, b in self._prepared.problem.factors.blocks.pairs
        ]


class _ByLabel(Mapping[Any, Any]):
    """A value per group label, made when it is asked for."""

    def __init__(self, index: pd.Index, make: Any) -> None:
        self._index, self._make = index, make

    def __getitem__(self, label: Any) -> Any:
        try:
            hash(label)
            position = self._index.get_loc(label)
            found = bool(self._index[position] == label)
        except Exception:  # pandas has many ways to say that a thing is no label
            raise KeyError(label) from None
        # get_loc also takes a part of a composite key or of a date: a slice, or another label
        if not (isinstance(position, int | np.integer) and found is True):
            raise KeyError(label)
        return self._make(position, label)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<{len(self)} groups: {', '.join(map(repr, self._index[:3]))}, ...>"
