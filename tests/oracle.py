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
class Component:
    """Effects that share one variance: columns V (n,m), and the variance / sigma2."""

    V: Floats
    variance: float


Term = Bar | Component


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
        per bar (G,q) conditional means and (G,q,q) conditional covariances given beta; for a
        component its m columns are m groups with q = 1
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


def covariance(terms: Sequence[Term], n: int, weights: ArrayLike | None = None) -> Floats:
    """H (n,n), the marginal covariance of y divided by sigma2."""
    H = np.diag(np.ones(n) if weights is None else 1 / np.asarray(weights, float))
    for term in terms:
        if isinstance(term, Component):
            H += term.variance * term.V @ term.V.T
        else:
            same = term.codes[:, None] == term.codes[None, :]
            H += same * (term.Z @ term.Psi @ term.Z.T)
    return H


def effects(term: Term) -> tuple[Floats, Floats]:
    """All columns of a term, level by level (n,M), and the covariance of their effects (M,M)."""
    if isinstance(term, Component):
        return term.V, term.variance * np.eye(term.V.shape[1])
    levels = np.arange(int(term.codes.max()) + 1)
    V = (term.codes[:, None] == levels)[:, :, None] * term.Z[:, None, :]
    return V.reshape(len(term.Z), -1), np.kron(np.eye(len(levels)), term.Psi)


@dataclass(frozen=True)
class _Whitened:
    """Least squares of y on X given H: root of H, whitened residual, R of X = QR, beta."""

    root: Floats
    R: Floats
    beta: Floats
    residual: Floats

    @classmethod
    def of(cls, y: Floats, X: Floats, H: Floats, beta: ArrayLike | None) -> _Whitened:
        root = np.linalg.cholesky(H)
        both = np.linalg.solve(root, np.column_stack([X, y]))
        Xw, yw = both[:, :-1], both[:, -1]
        Q, R = np.linalg.qr(Xw)  # never X'H^-1 X: its condition number is that of X squared
        b = np.linalg.solve(R, Q.T @ yw) if beta is None else np.asarray(beta, float)
        return cls(root, R, b, yw - Xw @ b)

    def deviance(self, reml: bool, sigma2: float | None) -> float:
        (n, p), rss = (len(self.root), len(self.R)), float(self.residual @ self.residual)
        df = n - p if reml else n
        if sigma2 is None:
            sigma2 = rss / df
        value = 2 * np.log(np.diag(self.root)).sum()
        value += df * np.log(2 * np.pi * sigma2) + rss / sigma2
        if reml:
            value += 2 * np.log(np.abs(np.diag(self.R))).sum()
        return float(value)


def deviance(
    y: ArrayLike,
    X: ArrayLike,
    H: Floats,
    reml: bool = True,
    beta: ArrayLike | None = None,
    sigma2: float | None = None,
) -> float:
    """-2 log-likelihood at a marginal covariance H sigma2; what is None is profiled out.

    Under REML it is the criterion of the model with all its fixed effects, also at a given beta:
    log|X'H^-1 X| stays.
    """
    y, X = np.asarray(y, float), np.asarray(X, float)
    return _Whitened.of(y, X, H, beta).deviance(reml, sigma2)


def evaluate(
    y: ArrayLike,
    X: ArrayLike,
    bars: Sequence[Term],
    reml: bool = True,
    weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> DenseFit:
    """Profile the likelihood at the bars' relative covariances; X must have full column rank."""
    shift = 0.0 if offset is None else np.asarray(offset, float)
    y, X = np.asarray(y, float) - shift, np.asarray(X, float)
    n, p = X.shape
    found = _Whitened.of(y, X, covariance(bars, n, weights), None)
    sigma2 = float(found.residual @ found.residual) / (n - p if reml else n)
    Ri = np.linalg.inv(found.R)
    vcov = sigma2 * Ri @ Ri.T
    Hir = np.linalg.solve(found.root.T, found.residual)
    fitted, blups, condcov = shift + X @ found.beta, [], []
    for bar in bars:
        b, C = _random_effects(bar, found.root, Hir)
        if isinstance(bar, Component):
            fitted = fitted + bar.V @ b[:, 0]
        else:
            fitted = fitted + np.einsum("iq,iq->i", bar.Z, b[bar.codes])
        blups.append(b)
        condcov.append(sigma2 * C)
    se = np.sqrt(np.diag(vcov))
    return DenseFit(
        found.deviance(reml, None), found.beta, se, vcov, sigma2, tuple(blups), tuple(condcov),
        np.asarray(fitted),
    )  # fmt: skip


def _random_effects(term: Term, root: Floats, Hir: Floats) -> tuple[Floats, Floats]:
    """b = Psi V'H^-1 r and Var(b | y, beta) / sigma2 = Psi - Psi V'H^-1 V Psi, level by level."""
    V, Psi = effects(term)
    q = 1 if isinstance(term, Component) else term.Z.shape[1]
    half = np.linalg.solve(root, V @ Psi)
    C = (Psi - half.T @ half).reshape(-1, q, len(Psi) // q, q)
    return (Psi @ (V.T @ Hir)).reshape(-1, q), np.einsum("gagb->gab", C)


def joint_condcov(
    terms: Sequence[Term], sigma2: float, n: int, weights: ArrayLike | None = None
) -> Floats:
    """Conditional covariance given beta of the effects of all terms, one term after the other."""
    found = [effects(term) for term in terms]
    V, Psi = np.hstack([v for v, _ in found]), block_diagonal([c for _, c in found])
    half = np.linalg.solve(np.linalg.cholesky(covariance(terms, n, weights)), V @ Psi)
    return sigma2 * (Psi - half.T @ half)


def joint_criterion(
    y: ArrayLike,
    X: ArrayLike,
    bars: Sequence[Term],
    sigma2: float,
    reml: bool = True,
    weights: ArrayLike | None = None,
) -> float:
    """-2 log-likelihood with beta profiled but sigma2 given; the bars' Psi in *user units*.

    Its Hessian is the joint information on (covariances, sigma2), from which alone the standard
    errors of the covariances follow.
    """
    relative = [
        Component(bar.V, bar.variance / sigma2)
        if isinstance(bar, Component)
        else Bar(bar.Z, bar.codes, bar.Psi / sigma2)
        for bar in bars
    ]
    H = covariance(relative, len(np.asarray(y)), weights)
    return deviance(y, X, H, reml, sigma2=sigma2)


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
