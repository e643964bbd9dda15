"""A result as a column of a publication table, in the words of ``maketables``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from dmixed.estimated import Estimated
from dmixed.summary import quantile

_LABELS = {
    "N": "Observations",
    "method": "Method",
    "ll": "Log-likelihood",
    "aic": "AIC",
    "bic": "BIC",
}


@dataclass(frozen=True, slots=True, eq=False)
class PublicationColumn:
    """What ``maketables`` (0.2) reads of a model, by its plug-in attributes.

    A result itself looks to maketables like one of statsmodels, whose covariance parameters are
    relative and stand among the coefficients; so this has nothing else.

    Attributes
    ----------
    response
        name of y
    coefficients
        (p rows) ``b``, ``se``, ``t`` (normal: z), ``p``, ``ci95l``, ``ci95u`` of fixed effects
    statistics
        those that a table shows, by key, in order
    others
        those that it shows if they are asked for
    method
        REML or ML
    """

    response: str
    coefficients: pd.DataFrame
    statistics: dict[str, Any]
    others: dict[str, Any]
    method: str

    @property
    def __maketables_coef_table__(self) -> pd.DataFrame:
        return self.coefficients.copy()

    @property
    def __maketables_depvar__(self) -> str:
        return self.response

    @property
    def __maketables_fixef_string__(self) -> None:
        return None  # nothing is absorbed: random effects stand among the statistics

    @property
    def __maketables_vcov_info__(self) -> dict[str, Any]:
        return {"vcov_type": f"model-based ({self.method})", "clustervar": None}

    @property
    def __maketables_default_stat_keys__(self) -> list[str]:
        return list(self.statistics)

    @property
    def __maketables_stat_labels__(self) -> dict[str, str]:
        return dict(_LABELS)

    def __maketables_stat__(self, key: str) -> Any:
        value = {**self.others, **self.statistics}.get(key)
        return None if isinstance(value, float) and not np.isfinite(value) else value


def publication_column(result: Estimated) -> PublicationColumn:
    """A result as maketables takes it."""
    return PublicationColumn(
        result.endog_name,
        _coefficients(result),
        _statistics(result),
        _others(result),
        result.method,
    )


def _coefficients(result: Estimated) -> pd.DataFrame:
    """Fixed effects, tested given the variances as in ``summary()``."""
    b, se = np.asarray(result.fe_params), np.asarray(result.bse_fe)
    with np.errstate(all="ignore"):  # a held effect has no standard error
        z = b / se
    half = quantile(0.05) * se
    columns = {"b": b, "se": se, "t": z, "p": 2.0 * norm.sf(np.abs(z))}
    columns |= {"ci95l": b - half, "ci95u": b + half}
    return pd.DataFrame(columns, pd.Index(result._fixed_names, name="Coefficient"))


def _statistics(result: Estimated) -> dict[str, Any]:
    """Statistics of a table by key, in order.

    Keys of the random effects are labels too, since tables of several models take labels from
    the first alone. Standard deviations and correlations are in the units of y and the columns.
    """
    found: dict[str, Any] = {"N": result.nobs}
    for label, levels in result.factors.items():
        found[f"Groups: {label}"] = levels
    for label, cov in result.varcorr().items():
        names, sd = list(map(str, cov.index)), np.sqrt(np.diag(cov.to_numpy()))
        component = names == [label]
        for a, name in enumerate(names):
            shown = f"SD: {label}" if component else f"SD: {name} | {label}"
            found[shown] = float(sd[a])
            for b in range(a):
                with np.errstate(all="ignore"):  # a standard deviation of zero
                    value = float(cov.iloc[a, b] / (sd[a] * sd[b]))
                found[f"Corr: {names[b]}, {name} | {label}"] = value
    found["SD: Residual"] = float(np.sqrt(result.scale))
    found |= {
        "method": result.method,
        "ll": result.llf,
        "aic": result.aic,
        "bic": result.bic,
    }
    return found


def _others(result: Estimated) -> dict[str, Any]:
    """Statistics that a table shows if they are asked for."""
    return {
        "nobs": result.nobs,
        "n_groups": result.n_groups,
        "llf": result.llf,
        "df_resid": result.df_resid,
        "df_model": result.df_modelwc,
        "scale": result.scale,
        "sigma": float(np.sqrt(result.scale)),
        "converged": str(result.converged),
        "singular": str(result.singular),
        "formula": result.formula,
    }
