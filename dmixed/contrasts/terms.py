"""Tests of whole terms, and of all pairs of levels of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dmixed.contrasts.hypotheses import check_alpha, t_test, wald_test
from dmixed.contrasts.written import Floats, constraint
from dmixed.errors import DataError


@dataclass(frozen=True, eq=False)
class WaldTermsResults:
    """Wald tests of terms.

    Attributes
    ----------
    table
        a row per term: statistic, pvalue, df_constraint and, for F, df_denom
    distribution
        ``"chi2"`` or ``"F"``
    """

    table: pd.DataFrame
    distribution: str

    @property
    def statistic(self) -> Floats:
        """(terms,) test statistics."""
        return self.table["statistic"].to_numpy(copy=True)

    @property
    def pvalues(self) -> Floats:
        """(terms,) p-values."""
        return self.table["pvalue"].to_numpy(copy=True)

    @property
    def df_constraints(self) -> NDArray[np.int64]:
        """(terms,) numbers of parameters."""
        return self.table["df_constraint"].to_numpy(copy=True)

    def summary_frame(self) -> pd.DataFrame:
        """The table under the names of the distribution."""
        names = [self.distribution, f"P>{self.distribution}", "df constraint", "df denom"]
        return self.table.set_axis(names[: self.table.shape[1]], axis=1)

    def __str__(self) -> str:
        return str(self.summary_frame().to_string())

    def __repr__(self) -> str:
        return str(self)


def wald_terms(
    params: ArrayLike,
    cov: ArrayLike,
    slices: Mapping[str, Sequence[int]],
    names: Sequence[str] | None = None,
    *,
    use_f: bool = False,
    df_denom: float | None = None,
    skip_single: bool = False,
    extra_constraints: Iterable[tuple[str, Any]] = (),
    combine_terms: Iterable[str] = (),
) -> WaldTermsResults:
    """Test, for each term, that all its coefficients are zero.

    Parameters
    ----------
    params, cov
        (K,) estimates and their (K, K) covariance
    slices
        positions in ``params`` of each term's coefficients; a term without any, because all its
        columns are aliased, has a row of NaN
    names
        (K,) names of the parameters, for hypotheses in words and for errors
    use_f, df_denom
        as in `wald_test`
    skip_single
        leave out terms of one coefficient
    extra_constraints
        further tests, pairs of a name and anything that `constraint` reads
    combine_terms
        texts; the terms whose names contain one are tested together under that text

    Raises
    ------
    DataError
        a text of ``combine_terms`` is in no term's name; a parameter has no covariance
    """
    names = [f"parameter {k}" for k in range(len(np.asarray(params)))] if names is None else names
    wanted = [
        *_terms(slices, len(names), skip_single, combine_terms),
        *((name, *constraint(r, names)) for name, r in extra_constraints),
    ]
    rows = []
    for _, R, q in wanted:
        if len(R):
            found = wald_test(params, cov, R, q, use_f, df_denom, names=names)
            rows.append((found.statistic, found.pvalue, len(R)))
        else:
            rows.append((np.nan, np.nan, 0))
    columns = ["statistic", "pvalue", "df_constraint"]
    table = pd.DataFrame(rows, index=[name for name, _, _ in wanted], columns=columns)
    if use_f:
        table["df_denom"] = df_denom
    return WaldTermsResults(table, "F" if use_f else "chi2")


def _terms(
    slices: Mapping[str, Sequence[int]], K: int, skip_single: bool, combine_terms: Iterable[str]
) -> Iterable[tuple[str, Floats, Any]]:
    """Name, R and q of each term, then of terms taken together."""
    unit = np.eye(K)
    for term, columns in slices.items():
        if not (skip_single and len(columns) == 1):
            yield term, unit[list(columns)], 0.0
    for text in combine_terms:
        union = sorted({k for term, columns in slices.items() if text in term for k in columns})
        if not union:
            raise DataError(
                f"combine_terms: {text!r} is in no term's name; the terms are {', '.join(slices)}"
            )
        yield text, unit[union], 0.0


# ---------------------------------------------------------------------------- pairs of levels


def _step_down(p: Floats, adjusted: Callable[[Floats, Floats], Floats]) -> Floats:
    """Adjust each p-value for those not smaller than it, the smallest first."""
    order = np.argsort(p, kind="stable")
    left = np.arange(len(p), 0, -1.0)
    out = np.empty_like(p)
    out[order] = np.maximum.accumulate(adjusted(p[order], left))
    return out


def _bonferroni(p: Floats, m: Floats | float) -> Floats:
    return np.minimum(m * p, 1.0)


def _sidak(p: Floats, m: Floats | float) -> Floats:
    with np.errstate(divide="ignore"):
        return -np.expm1(m * np.log1p(-p))


ADJUSTMENTS: Mapping[str, Callable[[Floats], Floats]] = {
    "hs": lambda p: _step_down(p, _sidak),
    "holm": lambda p: _step_down(p, _bonferroni),
    "bonferroni": lambda p: _bonferroni(p, len(p)),
    "sidak": lambda p: _sidak(p, len(p)),
    "fdr_bh": lambda p: np.asarray(stats.false_discovery_control(p, method="bh")),
}
"""p-values of several tests, adjusted: Holm-Sidak, Holm, Bonferroni, Sidak, Benjamini-Hochberg."""


@dataclass(frozen=True, eq=False)
class PairwiseResults:
    """Comparisons of all pairs of levels of a term.

    Attributes
    ----------
    result_frame
        a row ``b-a`` per pair: difference, test, 95% limits (not adjusted), and for each method
        the adjusted p-value and whether it is at most alpha
    contrasts
        (pairs, K) matrix of the differences
    term
        the term's name
    contrast_labels
        labels of the rows
    """

    result_frame: pd.DataFrame
    contrasts: Floats
    term: str
    contrast_labels: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.result_frame.to_string())

    def __repr__(self) -> str:
        return str(self)


def pairwise(
    params: ArrayLike,
    cov: ArrayLike,
    rows: ArrayLike,
    levels: Sequence[Any],
    *,
    term: str = "",
    method: str | Sequence[str] = "hs",
    alpha: float = 0.05,
    df: ArrayLike | None = None,
) -> PairwiseResults:
    """Tests of the differences between all pairs of levels of a categorical term.

    Parameters
    ----------
    params, cov
        (K,) estimates and their (K, K) covariance
    rows
        (L, K) coefficients of each level: its part of the prediction is ``rows @ params``. With
        treatment coding the reference has a row of zeros and the others have a single one
    levels
        L labels
    term
        name of the term, for the result and for errors
    method
        one or several of `ADJUSTMENTS`
    alpha
        level at which adjusted p-values reject
    df
        degrees of freedom as in `t_test`

    Raises
    ------
    DataError
        fewer than two levels, two of them with the same row, or an unknown method
    """
    rows = np.asarray(rows, dtype=np.float64)
    methods = [method] if isinstance(method, str) else list(method)
    for name in methods:
        if name not in ADJUSTMENTS:
            raise DataError(f"method={name!r}: must be one of {', '.join(ADJUSTMENTS)}")
    check_alpha(alpha)
    if len(levels) < 2 or len(rows) != len(levels):
        raise DataError(
            f"term {term!r} has {len(levels)} levels and {len(rows)} rows of coefficients: "
            "comparisons need two levels or more, and a row for each"
        )
    first, second = np.triu_indices(len(levels), 1)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    labels = [f"{levels[b]}-{levels[a]}" for a, b in pairs]
    R = rows[second] - rows[first]
    for k in np.flatnonzero(~R.any(axis=1)).tolist():
        raise DataError(
            f"term {term!r}: the levels of {labels[k]} have the same "
            "coefficients, as where a column is aliased: they cannot be compared"
        )
    tests = t_test(params, cov, R, df=df)
    frame = tests.summary_frame(labels)
    p = np.atleast_1d(tests.pvalue)
    for name in methods:
        adjusted = ADJUSTMENTS[name](p)
        frame[f"pvalue-{name}"], frame[f"reject-{name}"] = adjusted, adjusted <= alpha
    return PairwiseResults(frame, R, term, tuple(labels))
