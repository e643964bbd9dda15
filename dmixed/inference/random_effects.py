"""Conditional modes (BLUPs) and conditional covariances of the random effects.

``b_g = Psi W'H^-1 (y - X beta)`` and ``Var(b_g | y, beta) = sigma2 L (I + L'WtW L)^-1 L'`` with
Psi = L L' (Robinson 1991, Statistical Science 6, 15-32); no inverse of Psi, so a singular
covariance is an ordinary case.
"""

from __future__ import annotations

import numpy as np

from dmixed.blocks import Floats
from dmixed.factors import Problem
from dmixed.likelihood import GROUPS, solved


def conditional_modes(problem: Problem, root: Floats, beta: Floats) -> Floats:
    """BLUPs (G, q), user units of y per unit of each random column.

    Parameters
    ----------
    root
        (q, q) root of the relative covariance, natural coordinates
    beta
        (p,) estimates in working coordinates, see `likelihood.FixedEstimates`
    """
    factors, q = problem.factors, problem.factors.blocks.q
    v = np.append(-beta, factors.y_scale)
    out = np.empty((factors.n_groups, q))
    to_user = np.linalg.solve(problem.natural, root @ root.T)
    for start in range(0, factors.n_groups, GROUPS):
        V, _ = solved(factors.RT[:, :, start : start + GROUPS], root)
        residual = np.einsum("k,tkg->tg", v, V[:, q:])
        out[start : start + GROUPS] = np.einsum("tag,tg->ga", V[:, :q], residual) @ to_user.T
    return out


def conditional_covariances(problem: Problem, root: Floats, sigma2: float, groups: slice) -> Floats:
    """Conditional covariances (g, q, q) of some groups, user units."""
    q = problem.factors.blocks.q
    R = problem.factors.RT[:, :q, groups]
    M = np.matmul(root.T, R)
    K = np.eye(q) + np.einsum("tag,tbg->gab", M, M)
    half = np.linalg.solve(problem.natural, root)
    return np.asarray(sigma2 * half @ np.linalg.solve(K, np.broadcast_to(half.T, K.shape)))
