"""Shrinkage of the fixed effects by coordinate descent, the covariance held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Floats
from dmixed.errors import DataError
from dmixed.fitting import Estimates, criterion_at
from dmixed.inference.joint import joint, natural_of_user
from dmixed.likelihood import degrees_of_freedom
from dmixed.params import numbers
from dmixed.preparation import Prepared


def fit_elastic_net(
    prepared: Prepared,
    free: Estimates,
    alpha: Any,
    l1_ratio: float,
    ceps: float,
    ptol: float,
    maxit: int,
) -> Estimates:
    """Minimise ``(y - X b)'V^-1 (y - X b) + sum alpha (r |b| + (1 - r) b^2 / 2)`` over b.

    Parameters
    ----------
    free
        estimates without penalty, whose V is kept
    alpha
        penalty weight or (p,) weights, in units of 1 / units of b
    l1_ratio
        r, between 0 and 1

    Raises
    ------
    DataError
        a negative weight, or too many sweeps
    """
    problem = prepared.problem
    p = problem.factors.p
    weights = np.broadcast_to(
        numbers(alpha, "alpha"), (p,) if np.ndim(alpha) == 0 else np.shape(alpha)
    )
    if weights.shape != (p,) or not (weights >= 0).all():
        raise DataError(f"alpha must be one weight, or {p}, none negative; not {alpha}")
    if not 0.0 <= l1_ratio <= 1.0:
        raise DataError(f"l1_ratio={l1_ratio}: must be between 0 and 1")
    at = criterion_at(prepared, free.variances.Psi, free.reml)
    # In user units: X = X_work to_work, and X'H^-1 (y - X b) = to_work' X_work'H^-1 (...)
    A = problem.fixed.to_work.T @ at.FtHiF[:p, :p] @ problem.fixed.to_work / free.sigma2
    gls = free.beta
    absolute, square = weights * l1_ratio, weights * (1.0 - l1_ratio)
    b = _descend(A, gls, absolute, square, ptol, maxit)
    b[np.abs(b) < ceps] = 0.0
    df = degrees_of_freedom(problem.factors, free.reml)
    v = np.append(problem.response.beta - problem.fixed.to_work @ b, problem.response.scale)
    sigma2 = float(v @ at.FtHiF @ v) / df
    active = np.flatnonzero(b)
    cov, slope = np.full((p, p), np.nan), np.zeros_like(free.beta_slope)
    if len(active):
        # Of what makes b a minimum: (X'H^-1 X + ridge) db = d X'H^-1 (y - X b), on the active set
        right = problem.fixed.to_work.T @ (at.terms.dF @ v)[:, :p].T @ natural_of_user(problem)
        ridge = A[np.ix_(active, active)] + np.diag(0.5 * square[active])
        slope[active] = np.linalg.solve(ridge * free.sigma2, right[active])
        half = np.linalg.cholesky(A[np.ix_(active, active)] * free.sigma2 / sigma2)
        inverse = solve_triangular(half, np.eye(len(active)), lower=True)
        cov[np.ix_(active, active)] = inverse.T @ inverse
    value = joint(problem, at, b, free.reml).value
    return replace(
        free, value=value, beta=b, working_beta=-v[:-1], sigma2=sigma2, cov_beta=cov,
        beta_slope=slope, shrunk=b == 0.0, penalised=True,
    )  # fmt: skip


def _descend(
    A: Floats, gls: Floats, absolute: Floats, square: Floats, ptol: float, maxit: int
) -> Floats:
    """Minimise ``(b - gls)'A (b - gls) + sum absolute |b| + square b^2 / 2``."""
    b, size = gls.copy(), np.diag(A)
    for _ in range(maxit):
        before = b.copy()
        for j in range(len(b)):
            slope = A[j] @ (gls - b) + size[j] * b[j]  # half the gradient of the rest at b_j = 0
            shrunk = np.sign(slope) * max(abs(slope) - 0.5 * absolute[j], 0.0)
            b[j] = shrunk / (size[j] + 0.5 * square[j])
        if np.abs(b - before).max(initial=0.0) < ptol:
            return b
    raise DataError(
        f"the penalised fixed effects still move after maxit={maxit} sweeps: raise it, or ptol"
    )
