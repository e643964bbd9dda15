"""The profiled (RE)ML criterion with exact gradient and Hessian, from sums over groups.

With F = [X y] and log rss = log|FtHiF| - log|XtHiX|,

    -2 loglik (ML)   = logdet + n (1 + log(2 pi rss / n))
    -2 loglik (REML) = logdet + log|XtHiX| + (n - p) (1 + log(2 pi rss / (n - p)))

Everything is a log-determinant, so the derivatives of the *profiled* criterion are traces. The
sums are made by `onelevel` (one grouping factor) and `nested` (several).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.factors import Factors
from dmixed.nested import Bucket, bucket_terms
from dmixed.onelevel import OneLevel, one_level_terms
from dmixed.terms import ProfileTerms


def profile_terms(
    blocks: Blocks, part: OneLevel | Bucket, root: Floats, order: int, groups: slice
) -> ProfileTerms:
    """Terms of some groups of a part at Psi = root root' (q, q), up to derivatives of an order."""
    if isinstance(part, Bucket):
        return bucket_terms(blocks, part, root, order, groups)
    return one_level_terms(blocks, part, root, order, groups)


@dataclass(frozen=True, slots=True)
class Criterion:
    """-2 log-likelihood (REML or ML) at one Psi, with derivatives over ``blocks.pairs``.

    Attributes
    ----------
    value
        deviance units; +inf where the matrices are not positive definite
    gradient, hessian
        (m,), (m, m), in deviance units per unit of Psi (dimensionless)
    d_log_rss
        (m,): gradient of log rss
    FtHiF, chol
        (k, k), and its lower Cholesky factor
    lost
        estimated absolute rounding error of ``value``
    terms
        the sums it was made of
    """

    value: float
    gradient: Floats
    hessian: Floats
    d_log_rss: Floats
    FtHiF: Floats
    chol: Floats
    lost: float
    terms: ProfileTerms


def degrees_of_freedom(factors: Factors, reml: bool) -> int:
    """Divisor of rss: n - p under REML, n under ML."""
    return factors.nobs - factors.p if reml else factors.nobs


def criterion(factors: Factors, terms: ProfileTerms, reml: bool) -> Criterion:
    """The criterion and its derivatives from the sums over all groups.

    Raises
    ------
    numpy.linalg.LinAlgError
        FtHiF is not positive definite: rss or a fixed effect's information is zero to rounding
    """
    p, df = factors.p, degrees_of_freedom(factors, reml)
    FtHiF = factors.Fw + terms.FtHiF
    chol = np.asarray(np.linalg.cholesky(FtHiF), dtype=np.float64)
    pivots = np.diag(chol)
    log_x = 2.0 * float(np.log(pivots[:p]).sum())
    log_rss = 2.0 * float(np.log(pivots[p] * factors.y_scale))
    value = terms.logdet + df * (log_rss + 1.0 + np.log(2.0 * np.pi / df)) - factors.log_weights
    if reml:
        value += log_x + 2.0 * factors.log_jacobian
    lost = _rounding(factors, FtHiF, pivots, df)
    empty = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
    gradient, hessian, d_log_rss = (
        _derivatives(factors, terms, FtHiF, df, reml) if terms.order else empty
    )
    return Criterion(float(value), gradient, hessian, d_log_rss, FtHiF, chol, lost, terms)


def _rounding(factors: Factors, FtHiF: Floats, pivots: Floats, df: int) -> float:
    """Estimated rounding error of the criterion, from the sizes of what is subtracted.

    Sums of squares are of size ``stored`` before groups are centred, and ``diag FtHiF`` before the
    Cholesky factorisation leaves the squares of its pivots. The rows themselves are rounded too,
    each for itself: relative to what others leave of a column, eps sqrt(total) / pivot.
    """
    p = factors.p
    squares = np.maximum(pivots**2, np.finfo(float).tiny)
    kappa = np.maximum(factors.stored, np.diag(FtHiF)) / squares
    rows = np.sqrt(factors.total / squares)
    lost = kappa[:p].sum() + rows[:p].sum() + df * kappa[p] + np.sqrt(df) * rows[p]
    return float(np.finfo(float).eps * lost)


def _derivatives(
    factors: Factors, terms: ProfileTerms, FtHiF: Floats, df: int, reml: bool
) -> tuple[Floats, Floats, Floats]:
    """Gradient and Hessian of the criterion, and gradient of log rss, over ``blocks.pairs``.

    ``d log|A| = tr(A^-1 dA)``, ``d2 log|A| = tr(A^-1 d2A) - tr(A^-1 dA A^-1 d'A)``, for
    A = FtHiF (weight df) and A = XtHiX (weight [REML] - df).
    """
    p, m, k = factors.p, len(terms.first), len(FtHiF)
    gradient, hessian, d_log_rss = terms.first.copy(), terms.second, np.zeros(m)
    for size, weight, sign in ((k, float(df), 1.0), (p, float(reml) - df, -1.0)):
        if size == 0:
            continue
        inverse = cho_solve(cho_factor(FtHiF[:size, :size]), np.eye(size))
        scaled = inverse @ terms.dF[:, :size, :size]
        trace = np.einsum("xii->x", scaled)
        gradient += weight * trace
        d_log_rss += sign * trace
        hessian = hessian + weight * (
            np.einsum("ij,xyji->xy", inverse, terms.d2F[:, :, :size, :size])
            - np.einsum("xij,yji->xy", scaled, scaled)
        )
    return gradient, hessian, d_log_rss


@dataclass(frozen=True, slots=True)
class FixedEstimates:
    """Estimates given Psi, in working coordinates of X, units of y.

    Attributes
    ----------
    beta
        (p,): coefficients of the working response, times its scale
    cov_beta
        (p, p): sigma2 (XtHiX)^-1
    sigma2
        error variance, units of y squared
    """

    beta: Floats
    cov_beta: Floats
    sigma2: float


def fixed_estimates(factors: Factors, at: Criterion, reml: bool) -> FixedEstimates:
    """Generalised least squares from the Cholesky factor of FtHiF, F = [X y]."""
    p = factors.p
    sigma = at.chol[p, p] * factors.y_scale / np.sqrt(degrees_of_freedom(factors, reml))
    L = at.chol[:p, :p]
    if p == 0:
        return FixedEstimates(np.zeros(0), np.zeros((0, 0)), float(sigma**2))
    beta = solve_triangular(L, at.chol[p, :p], lower=True, trans="T") * factors.y_scale
    half = solve_triangular(L, np.eye(p), lower=True) * sigma
    return FixedEstimates(beta, half.T @ half, float(sigma**2))


def within_variance(factors: Factors) -> float | None:
    """Residual variance of y on X within cells (working units), None if nothing is left.

    It depends on no variance component, so a scoring step taken at it is a moment step.
    """
    p, within = factors.p, factors.within
    size = np.sqrt(np.maximum(factors.stored[:p], np.finfo(float).tiny))
    w, V = np.linalg.eigh(within[:p, :p] / np.outer(size, size))
    ok = w > 1e-10 * max(float(w.max(initial=0.0)), np.finfo(float).tiny)
    z = V.T @ (within[:p, p] / size)
    rss = float(within[p, p] - (z[ok] ** 2 / w[ok]).sum())
    df = factors.nobs - factors.rank_random - int(ok.sum())
    return rss / df if df >= 1 and rss > 1e-12 * factors.stored[p] else None


def scoring_step(factors: Factors, at: Criterion, sigma2: float | None) -> Floats:
    """Fisher-scoring step for Psi (m,) at a fixed error variance (Henderson III, weighted).

    With v = [-beta; 1], ``(-d2 logdet) step = -(v' dFtHiF v / sigma2 + d logdet)``.
    """
    terms, p = at.terms, factors.p
    beta = solve_triangular(at.chol[:p, :p], at.chol[p, :p], lower=True, trans="T")
    v = np.append(-beta, 1.0)
    if sigma2 is None:
        sigma2 = float(at.chol[p, p] ** 2 / max(factors.nobs - p, 1))
    right = -(np.einsum("i,xij,j->x", v, terms.dF, v) / sigma2 + terms.first)
    step = np.linalg.lstsq(-terms.second, right, rcond=1e-13)[0]
    return np.asarray(step, dtype=np.float64)
