"""The profiled (RE)ML criterion with exact gradient and Hessian, from factors.

With any root L of the relative covariance Psi, per group ``S = I + R L L'R' = C C'``,
``Y = C^-1 R``, ``U = C^-1 T``, ``P = Y'Y = W'H^-1 W``, ``Q = Y'U = W'H^-1 F``; no inverse of Psi
and no subtraction appears, so a zero variance is an ordinary point. Over groups

    logdet = sum 2 log|C|        FtHiF = F_w + sum U'U

and with F = [X y], log rss = log|FtHiF| - log|XtHiX|, hence

    -2 loglik (ML)   = logdet + n (1 + log(2 pi rss / n))
    -2 loglik (REML) = logdet + log|XtHiX| + (n - p) (1 + log(2 pi rss / (n - p)))

Derivatives in direction dH = w_a w_b' + w_b w_a' (a != b) follow from P and Q alone
(DESIGN: Lindstrom & Bates 1988, J. Am. Stat. Assoc. 83, give them for the unprofiled likelihood).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from dmixed.blocks import Floats
from dmixed.factors import Factors

GROUPS = 2048
"""Groups evaluated at a time: their factors stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class ProfileTerms:
    """Sums over groups at one Psi; they add, and are kilobytes whatever the number of groups.

    Attributes
    ----------
    order
        0: value, 1: gradient, 2: Hessian can be had
    logdet
        sum of log|H_g|
    UtU
        (k, k)
    P
        (q, q): sum of P
    QtQ
        (q, k, q, k): sum of Q_a' Q_b
    PP
        (h, h): sum of P_ju P_vi over the h = q (q + 1) / 2 entries (j, u), j >= u
    PQtQ
        (h, q, k, q, k): sum of P_ju Q_i' Q_v
    """

    order: int
    logdet: float
    UtU: Floats
    P: Floats
    QtQ: Floats
    PP: Floats
    PQtQ: Floats

    def __add__(self, other: ProfileTerms) -> ProfileTerms:
        """Terms of both sets of groups."""
        assert self.order == other.order
        return ProfileTerms(
            self.order,
            self.logdet + other.logdet,
            self.UtU + other.UtU,
            self.P + other.P,
            self.QtQ + other.QtQ,
            self.PP + other.PP,
            self.PQtQ + other.PQtQ,
        )


def solved(RT: Floats, root: Floats) -> tuple[Floats, Floats]:
    """``[Y U]`` (r, q + k, g) and the diagonal of C (r, g) for a slice of groups."""
    r, q = RT.shape[0], len(root)
    M = np.matmul(root.T, RT[:, :q])  # rows of R L
    V, diagonal = np.empty_like(RT), np.empty((r, RT.shape[2]))
    C: dict[tuple[int, int], Floats] = {}
    for j in range(r):
        d = 1.0 + np.einsum("cg,cg->g", M[j], M[j])
        v = RT[j].copy() if j else RT[j]
        for t in range(j):
            c = np.einsum("cg,cg->g", M[j], M[t])
            for u in range(t):
                c -= C[j, u] * C[t, u]
            c /= diagonal[t]
            C[j, t] = c
            d -= c * c
            v -= c * V[t]
        np.sqrt(d, out=diagonal[j])
        np.multiply(v, 1.0 / diagonal[j], out=V[j])
    return V, diagonal


def profile_terms(factors: Factors, root: Floats, order: int, groups: slice) -> ProfileTerms:
    """Terms of some of the groups at Psi = root root' (q, q), up to derivatives of an order."""
    q, k = factors.blocks.q, len(factors.Fw)
    rows, columns = np.tril_indices(q)
    h = len(rows)
    logdet, UtU, P = 0.0, np.zeros((k, k)), np.zeros((q, q))
    QtQ, PP, PQtQ = np.zeros((q * k, q * k)), np.zeros((h, h)), np.zeros((h, q * k, q * k))
    start, stop, _ = groups.indices(factors.n_groups)
    for first in range(start, stop, GROUPS):
        V, diagonal = solved(factors.RT[:, :, first : min(first + GROUPS, stop)], root)
        logdet += 2.0 * float(np.log(diagonal).sum())
        for U_j in V[:, q:]:
            UtU += U_j @ U_j.T
        if order == 0:
            continue
        Y, U = V[:, :q], V[:, q:]
        P_g = np.einsum("tag,tag->ag", Y[:, rows], Y[:, columns])  # (h, g)
        Q = np.einsum("tag,tkg->akg", Y, U).reshape(q * k, -1)
        P[rows, columns] += P_g.sum(axis=1)
        QtQ += Q @ Q.T
        if order == 1:
            continue
        PP += P_g @ P_g.T
        for x in range(h):
            PQtQ[x] += (Q * P_g[x]) @ Q.T
    P = P + P.T - np.diag(np.diag(P))
    return ProfileTerms(
        order, logdet, UtU, P, QtQ.reshape(q, k, q, k), PP, PQtQ.reshape(h, q, k, q, k)
    )


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
    chol
        (k, k): lower Cholesky factor of FtHiF
    lost
        estimated absolute rounding error of ``value``
    terms
        the sums it was made of
    """

    value: float
    gradient: Floats
    hessian: Floats
    d_log_rss: Floats
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
    FtHiF = factors.Fw + terms.UtU
    chol = np.asarray(np.linalg.cholesky(FtHiF), dtype=np.float64)
    pivots = np.diag(chol)
    log_x = 2.0 * float(np.log(pivots[:p]).sum())
    log_rss = 2.0 * float(np.log(pivots[p] * factors.y_scale))
    value = terms.logdet + df * (log_rss + 1.0 + np.log(2.0 * np.pi / df)) - factors.log_weights
    if reml:
        value += log_x + 2.0 * factors.log_jacobian
    kappa = factors.stored / pivots**2
    lost = float(np.finfo(float).eps * (df * kappa[p] + kappa[:p].sum()))
    empty = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
    gradient, hessian, d_log_rss = (
        _derivatives(factors, terms, FtHiF, df, reml) if terms.order else empty
    )
    return Criterion(float(value), gradient, hessian, d_log_rss, chol, lost, terms)


def _derivatives(
    factors: Factors, terms: ProfileTerms, FtHiF: Floats, df: int, reml: bool
) -> tuple[Floats, Floats, Floats]:
    """Gradient and Hessian of the criterion, and gradient of log rss, over ``blocks.pairs``.

    ``d log|A| = tr(A^-1 dA)``, ``d2 log|A| = tr(A^-1 d2A) - tr(A^-1 dA A^-1 d'A)``, for
    A = FtHiF (weight df) and A = XtHiX (weight [REML] - df).
    """
    p, pairs = factors.p, factors.blocks.pairs
    m, k = len(pairs), len(FtHiF)
    first, dF = np.empty(m), np.empty((m, k, k))
    for x, (a, b) in enumerate(pairs):
        N = terms.QtQ[a, :, b, :]
        first[x] = terms.P[a, b] * (1.0 if a == b else 2.0)
        dF[x] = -N if a == b else -(N + N.T)
    second, d2F = np.zeros((m, m)), np.zeros((m, m, k, k))
    if terms.order == 2:
        for x, (a, b) in enumerate(pairs):
            for y, (c, d) in enumerate(pairs[: x + 1]):
                second[x, y], d2F[x, y] = _second(terms, (a, b), (c, d))
                second[y, x], d2F[y, x] = second[x, y], d2F[x, y]
    gradient, hessian, d_log_rss = first.copy(), second, np.zeros(m)
    for size, weight, sign in ((k, float(df), 1.0), (p, float(reml) - df, -1.0)):
        if size == 0:
            continue
        inverse = cho_solve(cho_factor(FtHiF[:size, :size]), np.eye(size))
        scaled = inverse @ dF[:, :size, :size]
        trace = np.einsum("xii->x", scaled)
        gradient += weight * trace
        d_log_rss += sign * trace
        hessian = hessian + weight * (
            np.einsum("ij,xyji->xy", inverse, d2F[:, :, :size, :size])
            - np.einsum("xij,yji->xy", scaled, scaled)
        )
    return gradient, hessian, d_log_rss


def _second(
    terms: ProfileTerms, left: tuple[int, int], right: tuple[int, int]
) -> tuple[float, Floats]:
    """d2 logdet and d2 FtHiF along two entries of Psi: sums over both symmetrised pairs."""
    value, k = 0.0, terms.UtU.shape[0]
    N = np.zeros((k, k))
    for i, j in {left, left[::-1]}:
        for u, v in {right, right[::-1]}:
            value -= terms.PP[_packed(j, u), _packed(v, i)]
            N += terms.PQtQ[_packed(j, u), i, :, v, :]
    return value, N + N.T


def _packed(a: int, b: int) -> int:
    """Position of entry (a, b) of a symmetric matrix in its lower triangle, row by row."""
    a, b = max(a, b), min(a, b)
    return a * (a + 1) // 2 + b


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
    """Residual variance of y on X within groups (working units), None if nothing is left.

    It depends on no variance component, so a scoring step taken at it is a moment step.
    """
    p = factors.p
    size = np.sqrt(np.maximum(factors.stored[:p], np.finfo(float).tiny))
    w, V = np.linalg.eigh(factors.Fw[:p, :p] / np.outer(size, size))
    ok = w > 1e-10 * max(float(w.max(initial=0.0)), np.finfo(float).tiny)
    z = V.T @ (factors.Fw[:p, p] / size)
    rss = float(factors.Fw[p, p] - (z[ok] ** 2 / w[ok]).sum())
    df = factors.nobs - factors.rank_random - int(ok.sum())
    return rss / df if df >= 1 and rss > 1e-12 * factors.stored[p] else None


def scoring_step(factors: Factors, at: Criterion, sigma2: float | None) -> Floats:
    """Fisher-scoring step for Psi (m,) at a fixed error variance (Henderson III, weighted).

    With v = [-beta; 1], ``(-d2 logdet) step = -(v' dFtHiF v / sigma2 + d logdet)``.
    """
    terms, pairs, p = at.terms, factors.blocks.pairs, factors.p
    beta = solve_triangular(at.chol[:p, :p], at.chol[p, :p], lower=True, trans="T")
    v = np.append(-beta, 1.0)
    if sigma2 is None:
        sigma2 = float(at.chol[p, p] ** 2 / max(factors.nobs - p, 1))
    m = len(pairs)
    right, information = np.empty(m), np.empty((m, m))
    for x, (a, b) in enumerate(pairs):
        twice = 1.0 if a == b else 2.0
        right[x] = twice * (float(v @ terms.QtQ[a, :, b, :] @ v) / sigma2 - terms.P[a, b])
        for y in range(m):
            information[x, y] = -_second(terms, (a, b), pairs[y])[0]
    step = np.linalg.lstsq(information, right, rcond=1e-13)[0]
    return np.asarray(step, dtype=np.float64)
