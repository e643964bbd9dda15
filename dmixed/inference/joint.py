"""The likelihood at any fixed effects and any covariance, with exact derivatives.

With v = [-beta; 1] and rss = v'F'H^-1 F v, scale profiled out,

    -2 loglik = logdet + [REML] log|XtHiX| + df (1 + log(2 pi rss / df)),    df = n - [REML] p

(Lindstrom & Bates 1988, J. Am. Stat. Assoc. 83, 1014-1022). Derivatives are with respect to beta
and the entries of Psi, an off-diagonal entry counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, root_derivatives
from dmixed.factors import Problem
from dmixed.likelihood import Criterion, degrees_of_freedom


@dataclass(frozen=True, slots=True)
class Derivatives:
    """A value in deviance units with gradient (K,) and Hessian (K, K) in some coordinates."""

    value: float
    gradient: Floats
    hessian: Floats


def joint(problem: Problem, at: Criterion, beta: Floats, reml: bool) -> Derivatives:
    """-2 log-likelihood at ``beta`` (p,) and the Psi of ``at``, along [beta, Psi], user units."""
    factors, p = problem.factors, problem.factors.p
    terms, F, df = at.terms, at.FtHiF, degrees_of_freedom(problem.factors, reml)
    to_work = problem.fixed.to_work
    v = np.append(problem.response.beta - to_work @ beta, problem.response.scale)
    Fv = F @ v
    rss = float(v @ Fv)
    dFv = terms.dF @ v  # (m, k)
    r_beta = -2.0 * to_work.T @ Fv[:p]
    r_psi = dFv @ v
    r = np.append(r_beta, r_psi)
    m = len(r_psi)
    r2 = np.empty((p + m, p + m))
    r2[:p, :p] = 2.0 * to_work.T @ F[:p, :p] @ to_work
    r2[:p, p:] = -2.0 * to_work.T @ dFv[:, :p].T
    r2[p:, :p] = r2[:p, p:].T
    r2[p:, p:] = np.einsum("i,xyij,j->xy", v, terms.d2F, v)
    value = terms.logdet + df * (np.log(2.0 * np.pi * rss / df) + 1.0) - factors.log_weights
    gradient = df * r / rss
    hessian = df * (r2 / rss - np.outer(r, r) / rss**2)
    gradient[p:] += terms.first
    hessian[p:, p:] += terms.second
    if reml and p:
        value += 2.0 * float(np.log(np.diag(at.chol)[:p]).sum()) + 2.0 * factors.log_jacobian
        inverse = cho_solve(cho_factor(F[:p, :p]), np.eye(p))
        scaled = inverse @ terms.dF[:, :p, :p]
        gradient[p:] += np.einsum("xii->x", scaled)
        hessian[p:, p:] += np.einsum("ij,xyji->xy", inverse, terms.d2F[:, :, :p, :p])
        hessian[p:, p:] -= np.einsum("xij,yji->xy", scaled, scaled)
    return to_user(problem, Derivatives(float(value), gradient, hessian), p)


def profiled(problem: Problem, at: Criterion) -> Derivatives:
    """-2 log-likelihood profiled over beta as well, along the entries of Psi, user units."""
    return to_user(problem, Derivatives(at.value, at.gradient, at.hessian), 0)


def to_user(problem: Problem, at: Derivatives, p: int) -> Derivatives:
    """Derivatives along Psi in user units; the first p coordinates stay as they are."""
    J = np.eye(len(at.gradient))
    J[p:, p:] = natural_of_user(problem)
    return Derivatives(at.value, J.T @ at.gradient, _symmetric(J.T @ at.hessian @ J))


def _symmetric(H: Floats) -> Floats:
    return 0.5 * (H + H.T)


def beta_slope(problem: Problem, at: Criterion) -> Floats:
    """(p, m): derivative of the GLS fixed effects along the entries of Psi, user units.

    ``d beta = (XtHiX)^-1 (d XtHiy - d XtHiX beta)``
    """
    p, dF = problem.factors.p, at.terms.dF
    if p == 0:
        return np.zeros((0, len(dF)))
    factor = cho_factor(at.FtHiF[:p, :p])
    beta = cho_solve(factor, at.FtHiF[:p, p])
    right = dF[:, :p, p] - dF[:, :p, :p] @ beta
    working = cho_solve(factor, right.T) * problem.factors.y_scale
    return np.asarray(np.linalg.solve(problem.fixed.to_work, working) @ natural_of_user(problem))


def natural_of_user(problem: Problem) -> Floats:
    """J (m, m): entries of ``natural Psi natural'`` along entries of Psi."""
    blocks, N = problem.factors.blocks, problem.natural
    J = np.empty((len(blocks.pairs),) * 2)
    for y, (c, d) in enumerate(blocks.pairs):
        D = np.outer(N[:, c], N[:, d])
        D = D if c == d else D + D.T
        J[:, y] = [D[a, b] for a, b in blocks.pairs]
    return J


def along_root(blocks: Blocks, at: Derivatives, L: Floats) -> Derivatives:
    """Derivatives along the lower triangle of L, Psi = L L', in the order of ``blocks.pairs``."""
    g, H, _ = root_derivatives(blocks, at.gradient, at.hessian, np.eye(blocks.q), L)
    to_pairs = [blocks.theta_pairs.index(pair) for pair in blocks.pairs]
    return Derivatives(at.value, g[to_pairs], _symmetric(H[np.ix_(to_pairs, to_pairs)]))
