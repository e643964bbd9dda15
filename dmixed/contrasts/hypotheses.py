"""Tests of linear hypotheses R b = q: one at a time (t, z), or together (Wald, F)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dmixed.contrasts.written import Floats, constraint, written
from dmixed.errors import DataError

TIED = 1e-10
"""Distance of a hypothesis (unit length) from those before it at which it follows from them."""


# ---------------------------------------------------------------------------- one at a time


@dataclass(frozen=True, eq=False)
class ContrastResults:
    """Tests of single hypotheses, one per row of R.

    Attributes
    ----------
    effect
        (m,) R b; the units of the hypothesis
    sd
        (m,) its standard error; NaN where a parameter has none
    tvalue
        (m,) (R b - q) / sd
    pvalue
        (m,) two-sided; without a dimension where m is 1, as in statsmodels
    df_denom
        degrees of freedom, a number or (m,); infinite for the normal distribution
    distribution
        ``"norm"`` or ``"t"``
    c_names
        labels of the rows, ``c0``, ``c1``, ...
    """

    effect: Floats
    sd: Floats
    tvalue: Floats
    pvalue: Floats
    df_denom: Any
    distribution: str
    c_names: tuple[str, ...]

    @property
    def statistic(self) -> Floats:
        """(m,) the same as ``tvalue``."""
        return self.tvalue

    def conf_int(self, alpha: float = 0.05) -> Floats:
        """(m, 2) limits of ``effect`` at level 1 - alpha."""
        check_alpha(alpha)
        half = _distribution(self.df_denom).isf(alpha / 2.0) * self.sd
        return np.column_stack([self.effect - half, self.effect + half])

    def summary_frame(
        self, xname: Sequence[str] | None = None, alpha: float = 0.05
    ) -> pd.DataFrame:
        """Estimates, tests and limits, a row per hypothesis, called ``xname`` or ``c_names``."""
        labels = list(self.c_names if xname is None else xname)
        if len(labels) != len(self.effect):
            raise DataError(f"xname has {len(labels)} names for {len(self.effect)} hypotheses")
        letter = "t" if self.distribution == "t" else "z"
        low, high = self.conf_int(alpha).T
        columns = {
            "coef": self.effect,
            "std err": self.sd,
            letter: self.tvalue,
            f"P>|{letter}|": np.atleast_1d(self.pvalue),
            "Conf. Int. Low": low,
            "Conf. Int. Upp.": high,
        }
        return pd.DataFrame(columns, index=labels)

    def summary(
        self, xname: Sequence[str] | None = None, alpha: float = 0.05, title: str | None = None
    ) -> str:
        """The tests as text; an empty title leaves that line out."""
        frame = self.summary_frame(xname, alpha)
        digits = [".6g", ".6g", ".3f", ".3f", ".6g", ".6g"]
        frame.columns = pd.Index([*frame.columns[:4], f"[{alpha / 2:g}", f"{1 - alpha / 2:g}]"])
        shown = {
            name: [format(value, spec) for value in frame[name]]
            for name, spec in zip(frame, digits, strict=True)
        }
        head, *lines = pd.DataFrame(shown, frame.index).to_string().splitlines()
        width = max(map(len, [head, *lines]))
        title = "Test for Constraints" if title is None else title
        top = [title.center(width).rstrip()] if title else []
        return "\n".join([*top, "=" * width, head, "-" * width, *lines, "=" * width])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return self.summary()


def check_alpha(alpha: float) -> None:
    """Error unless a level is one."""
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha={alpha!r}: must be between 0 and 1, such as 0.05")


def _distribution(df: Any) -> Any:
    """Student's t, or the normal where the degrees of freedom are infinite."""
    return stats.norm() if np.all(np.isinf(df)) else stats.t(df)


def t_test(
    params: ArrayLike,
    cov: ArrayLike,
    R: ArrayLike,
    q: ArrayLike = 0.0,
    df: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> ContrastResults:
    """Test of each hypothesis R b = q by itself.

    Parameters
    ----------
    params, cov
        (K,) estimates and their (K, K) covariance, NaN for a parameter without one
    R, q
        (m, K) and (m,) or a number, as from `constraint`
    df
        degrees of freedom, a number or (m,); None means the normal distribution
    names
        (K,) names of the parameters, for errors

    Raises
    ------
    DataError
        shapes do not fit, or a row of R is zero
    """
    b, cov, R, q, names = _checked(params, cov, R, q, names)
    effect = R @ b
    sd = np.sqrt(np.clip(_covariance(R, cov).diagonal(), 0.0, None))
    sd[(R[:, _without(b, cov, R)] != 0.0).any(axis=1)] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (effect - q) / sd
    degrees = np.asarray(np.inf if df is None else df, dtype=np.float64)
    if degrees.shape not in ((), (len(R),)):
        raise DataError(f"df of shape {degrees.shape} for {len(R)} hypotheses: one, or one each")
    return ContrastResults(
        effect=effect,
        sd=sd,
        tvalue=t,
        pvalue=np.squeeze(2.0 * _distribution(degrees).sf(np.abs(t))),
        df_denom=degrees if degrees.ndim else float(degrees),
        distribution="norm" if df is None else "t",
        c_names=tuple(f"c{k}" for k in range(len(R))),
    )


def _checked(
    params: ArrayLike, cov: ArrayLike, R: ArrayLike, q: ArrayLike, names: Sequence[str] | None
) -> tuple[Floats, Floats, Floats, Floats, list[str]]:
    """Arrays whose shapes fit; every hypothesis is about some parameter."""
    b, cov = np.asarray(params, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    names = [f"parameter {k}" for k in range(len(b))] if names is None else list(names)
    if cov.shape != (len(b), len(b)) or len(names) != len(b):
        raise DataError(
            f"{len(b)} parameters, a covariance of shape {cov.shape} and {len(names)} names do not "
            "belong together"
        )
    R, q = constraint((R, q), names)
    if not R.any(axis=1).all():
        k = int(np.argmin(R.any(axis=1)))
        raise DataError(f"row {k} of R is zero: it says nothing about any parameter; leave it out")
    return b, cov, R, q, names


def _covariance(R: Floats, cov: Floats) -> Floats:
    """(m, m) covariance of R b; parameters without one count as known."""
    return R @ np.nan_to_num(cov) @ R.T


def _without(b: Floats, cov: Floats, R: Floats) -> NDArray[np.intp]:
    """Parameters of the hypotheses that have no estimate or no covariance."""
    tested = np.flatnonzero(R.any(axis=0))
    own = tested[np.isnan(b[tested]) | np.isnan(cov.diagonal()[tested])]
    others = tested[np.isnan(cov[np.ix_(tested, tested)]).any(axis=1)]
    return own if len(own) else others


# ---------------------------------------------------------------------------- together


@dataclass(frozen=True)
class WaldResults:
    """Joint test of hypotheses.

    Attributes
    ----------
    statistic
        chi-squared, or F; a number, or (1, 1) with ``scalar=False``
    pvalue
        probability of a larger one
    df_num
        hypotheses
    df_denom
        denominator degrees of freedom of F; of chi-squared those of the test, as in statsmodels
    distribution
        ``"chi2"`` or ``"F"``
    """

    statistic: Any
    pvalue: float
    df_num: int
    df_denom: float
    distribution: str

    @property
    def fvalue(self) -> Any:
        """The same as ``statistic``, for F only."""
        if self.distribution != "F":
            raise AttributeError("a chi-squared test has no fvalue: see statistic")
        return self.statistic

    def summary(self) -> str:
        """The test in one line."""
        value = float(np.squeeze(self.statistic))
        if self.distribution == "F":
            return (
                f"<F test: F={value!r}, p={self.pvalue!r}, df_denom={self.df_denom:.6g}, "
                f"df_num={self.df_num}>"
            )
        return f"<Wald test (chi2): statistic={value!r}, p-value={self.pvalue!r}, df={self.df_num}>"

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return self.summary()


def wald_test(
    params: ArrayLike,
    cov: ArrayLike,
    R: ArrayLike,
    q: ArrayLike = 0.0,
    use_f: bool = False,
    df_denom: float | None = None,
    scalar: bool = True,
    names: Sequence[str] | None = None,
) -> WaldResults:
    """Test of all hypotheses R b = q together.

    Parameters
    ----------
    params, cov, R, q, names
        as in `t_test`
    use_f, df_denom
        F distribution with these denominator degrees of freedom, instead of chi-squared
    scalar
        the statistic as a number, else (1, 1)

    Raises
    ------
    DataError
        a hypothesis follows from (or contradicts) the others, or a parameter has no covariance
    """
    b, cov, R, q, names = _checked(params, cov, R, q, names)
    without = _without(b, cov, R)
    if len(without):
        raise DataError(
            f"no covariance is known for {', '.join(repr(names[k]) for k in without)}, as of a "
            "variance at its boundary: leave it out of the hypotheses"
        )
    if use_f and df_denom is None:
        raise DataError("use_f=True needs df_denom, the denominator degrees of freedom")
    _refuse_redundant(R, q, cov, names)
    V = _covariance(R, cov)
    sd = np.sqrt(V.diagonal())
    u = (R @ b - q) / sd
    m, value = len(R), float(u @ np.linalg.solve(V / np.outer(sd, sd), u))
    degrees = float(df_denom) if use_f and df_denom is not None else float(m)
    value = value / m if use_f else value
    p = stats.f.sf(value, m, degrees) if use_f else stats.chi2.sf(value, m)
    return WaldResults(
        statistic=value if scalar else np.array([[value]]),
        pvalue=float(p),
        df_num=m,
        df_denom=degrees,
        distribution="F" if use_f else "chi2",
    )


def _refuse_redundant(R: Floats, q: Floats, cov: Floats, names: Sequence[str]) -> None:
    """Error naming the first hypothesis that R, or the covariance, ties to those before it."""
    sd = np.sqrt(np.clip(cov.diagonal(), 0.0, None))
    rows = R * np.where(sd > 0.0, sd, 1.0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    V = _covariance(R, cov)
    own = np.sqrt(np.clip(V.diagonal(), 0.0, None))
    C = V / np.outer(own, own).clip(np.finfo(float).tiny)
    for k in range(len(R)):
        text = written(R[k], q[k], names)
        if np.linalg.matrix_rank(rows[: k + 1], tol=TIED) <= k:
            raise DataError(f"the hypothesis {text!r} repeats those before it: leave it out")
        rounding = 10.0 * (k + 1) * np.finfo(float).eps
        if np.linalg.matrix_rank(C[: k + 1, : k + 1], hermitian=True, tol=rounding) <= k:
            raise DataError(
                f"the hypothesis {text!r} cannot be tested together with those before it: given "
                "them, its estimate has no variance; leave it out"
            )
