"""Dense oracle for linear mixed models: forms H, factors it, imports nothing of dmixed.

Everything is textbook algebra on n x n matrices, for a few hundred rows. With row weights w and
relative covariances Psi_j,

    H = diag(1/w) + sum_j Z_j Psi_j Z_j'  (entries of rows in different groups of bar j are zero)
    -2 loglik, ML:    log|H| + n log(rss/n) + n (1 + log 2 pi)
    -2 loglik, REML:  log|H| + log|X'H^-1 X| + (n-p) log(rss/(n-p)) + (n-p) (1 + log 2 pi)

so that the row weights enter the log-likelihood as + sum(log w)/2 through log|H|, as in lme4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bar:
    """One random term: Z (n,q), the group each row belongs to (n,), and Psi (q,q) / sigma2."""

    Z: Floats
    codes: NDArray[np.intp]
    Psi: Floats


@dataclass(frozen=True)
class DenseFit:
    """The model at given relative covariances.

    Attributes
    ----------
    criterion
        -2 log-likelihood (ML or REML), beta and sigma2 profiled out
    beta, se, vcov
        (p,), (p,), (p,p): generalised least squares, covariance not allowing for Psi's estimation
    sigma2
        rss/n (ML) or rss/(n-p) (REML)
    blups, condcov
        per bar (G,q) conditional means and (G,q,q) conditional covariances given beta
    fitted
        (n,) offset + X beta + Z b
    """

    criterion: float
    beta: Floats
    se: Floats
    vcov: Floats
    sigma2: float
    blups: tuple[Floats, ...]
    condcov: tuple[Floats, ...]
    fitted: Floats


def covariance(bars: Sequence[Bar], n: int, weights: ArrayLike | None = None) -> Floats:
    """H (n,n), the marginal covariance of y divided by sigma2."""
    H = np.diag(np.ones(n) if weights is None else 1 / np.asarray(weights, float))
    for bar in bars:
        same = bar.codes[:, None] == bar.codes[None, :]
        H += same * (bar.Z @ bar.Psi @ bar.Z.T)
    return H


def evaluate(
    y: ArrayLike,
    X: ArrayLike,
    bars: Sequence[Bar],
    reml: bool = True,
    weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> DenseFit:
    """Profile the likelihood at the bars' relative covariances; X must have full column rank."""
    shift = 0.0 if offset is None else np.asarray(offset, float)
    y, X = np.asarray(y, float) - shift, np.asarray(X, float)
    n, p = X.shape
    root = np.linalg.cholesky(covariance(bars, n, weights))
    Xw, yw = np.linalg.solve(root, X), np.linalg.solve(root, y)
    Q, R = np.linalg.qr(Xw)  # never X'H^-1 X: its condition number is that of X squared
    beta = np.linalg.solve(R, Q.T @ yw)
    rw = yw - Xw @ beta
    df = n - p if reml else n
    sigma2 = float(rw @ rw) / df
    criterion = 2 * np.log(np.diag(root)).sum() + df * (np.log(2 * np.pi * sigma2) + 1)
    if reml:
        criterion += 2 * np.log(np.abs(np.diag(R))).sum()
    Ri = np.linalg.inv(R)
    vcov = sigma2 * Ri @ Ri.T
    Hir = np.linalg.solve(root.T, rw)
    fitted, blups, condcov = shift + X @ beta, [], []
    for bar in bars:
        b, C = _random_effects(bar, root, Hir)
        fitted = fitted + np.einsum("iq,iq->i", bar.Z, b[bar.codes])
        blups.append(b)
        condcov.append(sigma2 * C)
    se = np.sqrt(np.diag(vcov))
    return DenseFit(
        float(criterion), beta, se, vcov, sigma2, tuple(blups), tuple(condcov), np.asarray(fitted)
    )


def _random_effects(bar: Bar, root: Floats, Hir: Floats) -> tuple[Floats, Floats]:
    """b_g = Psi Z_g' H^-1 r and Var(b_g | y, beta) / sigma2 = Psi - Psi Z_g' H^-1 Z_g Psi."""
    groups, q = int(bar.codes.max()) + 1, bar.Z.shape[1]
    b, C = np.empty((groups, q)), np.empty((groups, q, q))
    for g in range(groups):
        Zg = bar.Z * (bar.codes == g)[:, None]
        half = np.linalg.solve(root, Zg @ bar.Psi)
        b[g] = bar.Psi @ (Zg.T @ Hir)
        C[g] = bar.Psi - half.T @ half
    return b, C


def joint_criterion(
    y: ArrayLike, X: ArrayLike, bars: Sequence[Bar], sigma2: float, reml: bool = True
) -> float:
    """-2 log-likelihood with beta profiled but sigma2 given; the bars' Psi in *user units*.

    Its Hessian is the joint information on (covariances, sigma2), from which alone the standard
    errors of the covariances follow.
    """
    y, X = np.asarray(y, float), np.asarray(X, float)
    n, p = X.shape
    relative = [Bar(bar.Z, bar.codes, bar.Psi / sigma2) for bar in bars]
    fit = evaluate(y, X, relative, reml)
    df = n - p if reml else n
    # the profiled value has rss/df in place of sigma2
    profiled = df * (np.log(fit.sigma2) + 1)
    return fit.criterion - profiled + df * (np.log(sigma2) + fit.sigma2 / sigma2)


def unpack(theta: ArrayLike, sizes: Sequence[int]) -> list[Floats]:
    """lme4's theta to the lower-triangular factors, bar after bar, columns first."""
    theta, factors, at = np.asarray(theta, float), [], 0
    for q in sizes:
        L = np.zeros((q, q))
        for j in range(q):
            L[j:, j] = theta[at : at + q - j]
            at += q - j
        factors.append(L)
    assert at == len(theta)
    return factors


def block_diagonal(blocks: Sequence[Floats]) -> Floats:
    """Square blocks along the diagonal."""
    q = sum(len(b) for b in blocks)
    out, at = np.zeros((q, q)), 0
    for b in blocks:
        out[at : at + len(b), at : at + len(b)] = b
        at += len(b)
    return out


# Finite differences. The five-point stencil f' ~ (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h has a
# truncation error of order h^4 and a rounding error of order eps |f| / h. They balance at
# h = eps^(1/5) ~ 7e-4 times the scale on which f varies, which leaves about eps^(4/5) ~ 3e-13 |f|.
# A second derivative divides by h twice: there h = eps^(1/6) ~ 2.5e-3 leaves eps^(2/3) ~ 4e-11 |f|.
FIRST_STEP = float(np.finfo(float).eps) ** (1 / 5)
SECOND_STEP = float(np.finfo(float).eps) ** (1 / 6)
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def difference(
    f: Callable[[Floats], ArrayLike], x: ArrayLike, scale: ArrayLike = 1.0, step: float = FIRST_STEP
) -> Floats:
    """Derivative of f, (..., m), at x (m,): one more axis than f, one entry per coordinate."""
    x = np.asarray(x, float)
    columns = []
    for i, h in enumerate(step * np.broadcast_to(np.asarray(scale, float), x.shape)):
        e = np.zeros_like(x)
        e[i] = h
        # the exact distance between the two floats, not h
        columns.append(
            sum(c * np.asarray(f(x + k * e)) / (((x + k * e) - x)[i] / k) for k, c in STENCIL)
        )
    return np.stack(columns, axis=-1)


def second_difference(f: Callable[[Floats], float], x: ArrayLike, scale: ArrayLike = 1.0) -> Floats:
    """Hessian (m,m) of a scalar f from its values alone, by the stencil applied twice."""
    H = difference(lambda z: difference(f, z, scale, SECOND_STEP), x, scale, SECOND_STEP)
    return (H + H.T) / 2
