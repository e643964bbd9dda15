"""Fits as a smooth problem in the free coordinates.

For entries held inside a block of the covariance, fixed effects held, and penalties. The
likelihood's derivatives are exact; the second ones of a penalty are differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase
from dmixed.errors import DataError
from dmixed.fitting import Estimates, Search, criterion_at, estimates_at, psd_root
from dmixed.held import CovariancePenalty, Held, Penalties, Piece
from dmixed.inference.joint import Derivatives, joint, natural_of_user, profiled
from dmixed.inference.variances import VarianceEstimates
from dmixed.likelihood import Criterion, degrees_of_freedom
from dmixed.optimizer import ZERO, Certificate, OptimizeSummary, Step, named_minimize
from dmixed.parametrisation import Coordinates
from dmixed.preparation import Prepared


@dataclass(slots=True)
class _Smooth:
    """Penalised -2 log-likelihood in scaled free coordinates, for scipy; keeps the path."""

    prepared: Prepared
    reml: bool
    coordinates: Coordinates
    penalties: Penalties
    scale: Floats
    callback: Callable[[int, Step], None] | None
    path: list[Step]
    ceiling: float = np.inf
    _last: tuple[bytes, Derivatives | None] | None = None

    def at(self, u: Floats) -> Derivatives | None:
        """Derivatives along the scaled coordinates, None where the criterion is not defined."""
        key = np.asarray(u, dtype=np.float64).tobytes()
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        x = u * self.scale
        beta, Psi = self.coordinates.values(x)
        try:
            criterion = criterion_at(self.prepared, Psi, self.reml)
            found: Derivatives | None = self._penalised(criterion, beta, Psi, x)
        except (DataError, np.linalg.LinAlgError, FloatingPointError):
            found = None
        if found is not None and not (
            np.isfinite(found.value) and np.isfinite(found.hessian).all()
        ):
            found = None
        value = np.inf if found is None else found.value
        self.path.append(Step(value, np.nan, tuple(x.tolist())))
        if self.callback is not None:
            self.callback(len(self.path), self.path[-1])
        self._last = (key, found)
        return found

    def _penalised(self, criterion: Criterion, beta: Floats, Psi: Floats, x: Floats) -> Derivatives:
        problem = self.prepared.problem
        p = problem.factors.p if self.coordinates.with_beta else 0
        at = joint(problem, criterion, beta, self.reml) if p else profiled(problem, criterion)
        g, H, value = at.gradient.copy(), at.hessian.copy(), at.value
        if self.penalties.fixed is not None:
            pen = self.penalties.fixed
            value += 2.0 * float(np.sum(pen.func(beta)))
            g[:p] += 2.0 * _vector(pen.deriv(beta), p)
            H[:p, :p] += 2.0 * _jacobian(lambda b: _vector(pen.deriv(b), p), beta)
        if self.penalties.covariance is not None:
            size = problem.factors.blocks.sizes[0]
            m0 = size * (size + 1) // 2
            value += 2.0 * _covariance_value(self.penalties.covariance, Psi[:size, :size])
            own = slice(p, p + m0)
            packed = Psi[:size, :size][np.tril_indices(size)]
            gradient = _covariance_gradient(self.penalties.covariance, size)
            g[own] += 2.0 * gradient(packed)
            H[own, own] += 2.0 * _jacobian(gradient, packed)
        pulled = self.coordinates.pull(x, Derivatives(value, g, H))
        s = self.scale
        return Derivatives(value, pulled.gradient * s, pulled.hessian * np.outer(s, s))

    def value(self, u: Floats) -> float:
        """Value for scipy: ``ceiling`` where it is not defined; line searches stop at inf."""
        found = self.at(u)
        return self.ceiling if found is None else found.value

    def gradient(self, u: Floats) -> Floats:
        """Gradient for scipy."""
        found = self.at(u)
        return np.zeros(len(u)) if found is None else found.gradient

    def hessian(self, u: Floats) -> Floats:
        """Hessian for scipy."""
        found = self.at(u)
        return np.eye(len(u)) if found is None else found.hessian


def _vector(values: Any, p: int) -> Floats:
    return np.broadcast_to(np.asarray(values, dtype=np.float64), (p,))


def _jacobian(function: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Symmetric derivative of a gradient by central differences."""
    out = np.empty((len(x), len(x)))
    for j in range(len(x)):
        step = np.zeros(len(x))
        step[j] = 1e-5 * max(abs(x[j]), 1e-3)
        out[j] = (function(x + step) - function(x - step)) / (2.0 * step[j])
    return 0.5 * (out + out.T)


def _unpacked(packed: Floats, size: int) -> Floats:
    mat = np.zeros((size, size))
    mat[np.tril_indices(size)] = packed
    return mat + np.tril(mat, -1).T


def _covariance_value(penalty: CovariancePenalty, mat: Floats) -> float:
    value = float(np.sum(penalty.func(mat, np.asarray(np.linalg.inv(mat)))))
    if not np.isfinite(value):
        raise FloatingPointError("the covariance penalty is not finite")
    return value


def _covariance_gradient(penalty: CovariancePenalty, size: int) -> Callable[[Floats], Floats]:
    def gradient(packed: Floats) -> Floats:
        mat = _unpacked(packed, size)
        return np.asarray(penalty.deriv(mat, np.asarray(np.linalg.inv(mat))), dtype=np.float64)

    return gradient


def fit_smooth(
    prepared: Prepared,
    reml: bool,
    search: Search,
    held: Held,
    penalties: Penalties,
    parts: list[Piece],
) -> Estimates:
    """Minimise the penalised criterion over the free coordinates.

    Raises
    ------
    DataError
        the likelihood or a penalty is not defined at the start
    """
    blocks = prepared.problem.factors.blocks
    with_beta = penalties.fixed is not None or not held.free_beta.all()
    coordinates = Coordinates(blocks, held, tuple(parts), with_beta)
    x0 = coordinates.start()
    smooth = _Smooth(prepared, reml, coordinates, penalties, np.ones(len(x0)), search.callback, [])
    here = smooth.at(x0)
    if here is None:
        raise DataError("the likelihood (or a penalty) is not defined at the starting values")
    smooth.scale = 1.0 / np.sqrt(np.maximum(np.abs(np.diag(here.hessian)), 1e-12))
    smooth.ceiling = here.value + 1e3 * (1.0 + abs(here.value))
    smooth._last = None
    method = search.method or "trust-exact"
    settings = search.options or ({"gtol": 1e-7, "maxiter": 500} if search.method is None else {})
    found = named_minimize(smooth, x0 / smooth.scale, method, settings) if len(x0) else None
    u = x0 if found is None else np.asarray(found.x)
    end = smooth.at(u)
    if end is None:
        raise DataError("the likelihood (or a penalty) is not defined at the optimum")
    message = "nothing is free" if found is None else str(found.message)
    proof = _proof(end, prepared, reml, coordinates.values(u * smooth.scale)[1])
    if not proof.passed:
        message += f"; not certified ({', '.join(proof.failing)})"
    summary = OptimizeSummary(
        method, proof.passed, message, len(smooth.path), tuple(smooth.path), proof
    )
    return _smooth_estimates(
        prepared, reml, coordinates, u * smooth.scale, penalties, end, smooth, summary
    )


def _proof(end: Derivatives, prepared: Prepared, reml: bool, Psi: Floats) -> Certificate:
    H = end.hessian
    size = np.sqrt(np.maximum(np.abs(np.diag(H)), 1e-12))
    w = np.linalg.eigvalsh(H / np.outer(size, size)) if len(H) else np.ones(1)
    lost = criterion_at(prepared, Psi, reml).lost
    digits = np.log10(max(lost / (np.finfo(float).eps * max(abs(end.value), 1.0)), 1.0))
    condition = float(w[-1] / w[0]) if w[0] > 0 else np.inf
    steep = float(np.abs(end.gradient / size).max(initial=0.0))
    return Certificate(steep, np.inf, float(w[0]), condition, float(digits), lost)


def _smooth_estimates(
    prepared: Prepared,
    reml: bool,
    coordinates: Coordinates,
    x: Floats,
    penalties: Penalties,
    end: Derivatives,
    smooth: _Smooth,
    summary: OptimizeSummary,
) -> Estimates:
    """Estimates at the end of a smooth problem; covariances from its Hessian."""
    problem, held, blocks = prepared.problem, coordinates.held, coordinates.blocks
    beta, Psi = coordinates.values(x)
    root = blocks.join([psd_root(part) for part in blocks.split(Psi)])
    at = criterion_at(prepared, Psi, reml)
    df = degrees_of_freedom(problem.factors, reml)
    covariance = _covariance_of(coordinates, x, end, smooth.scale)
    p = len(beta) if coordinates.with_beta else 0
    m = len(blocks.pairs)
    cov_user = np.full((m + 1, m + 1), np.nan)
    zero = tuple((rebase(blocks, problem.natural @ root)[1] <= ZERO).tolist())
    variances = VarianceEstimates(Psi, root, zero, covariance[p:, p:], cov_user)
    found = estimates_at(prepared, reml, at, problem.natural @ root, variances, summary)
    value, d_log_rss = at.value, natural_of_user(problem).T @ at.d_log_rss
    if coordinates.with_beta:
        full = joint(problem, at, beta, reml)
        value = full.value
        v = np.append(problem.response.beta - problem.fixed.to_work @ beta, problem.response.scale)
        sigma2 = float(v @ at.FtHiF @ v) / df
        along_beta = -2.0 * problem.fixed.to_work.T @ (at.FtHiF @ v)[:p]
        d_rss = np.append(along_beta, natural_of_user(problem).T @ (at.terms.dF @ v @ v))
        d_log_rss = d_rss / (sigma2 * df)
        cov_beta = covariance[:p, :p]
        if penalties.fixed is None:
            inside = np.flatnonzero(held.free_beta)
            information = found.sigma2 * np.linalg.inv(found.cov_beta) if p else found.cov_beta
            cov_beta = np.full((p, p), np.nan)
            cov_beta[np.ix_(inside, inside)] = sigma2 * np.linalg.inv(
                information[np.ix_(inside, inside)]
            )
        found = replace(
            found,
            value=value,
            beta=beta,
            working_beta=-v[:-1],
            sigma2=sigma2,
            cov_beta=cov_beta,
            beta_slope=np.zeros((p, m)),
        )
    cov_user[:] = _user_covariance(found, covariance, d_log_rss, blocks, df)
    return found


def _covariance_of(coordinates: Coordinates, x: Floats, end: Derivatives, scale: Floats) -> Floats:
    """Covariance along [beta, entries of Psi]: NaN where a parameter does not move."""
    m = len(coordinates.blocks.pairs)
    p = len(coordinates.held.beta) if coordinates.with_beta else 0
    out = np.full((p + m, p + m), np.nan)
    if not len(x):
        return out
    J, _ = coordinates.jacobian(x, np.zeros(p + m))
    try:
        half = np.linalg.cholesky(0.5 * end.hessian)
    except np.linalg.LinAlgError:
        return out
    K = solve_triangular(half, (J * scale).T, lower=True)
    moved = np.abs(J).max(axis=1) > 0
    out[np.ix_(moved, moved)] = (K.T @ K)[np.ix_(moved, moved)]
    return out


def _user_covariance(
    found: Estimates, covariance: Floats, d_log_rss: Floats, blocks: Blocks, df: int
) -> Floats:
    """Covariance of [Psi sigma2, sigma2] over sigma2 squared, by the joint information.

    Parameters
    ----------
    covariance, d_log_rss
        (K, K), (K,) along [beta (if a coordinate), entries of Psi]
    """
    m = len(blocks.pairs)
    known = ~np.isnan(np.diag(covariance))[-m:]
    ratio = np.where(np.isnan(covariance), 0.0, covariance)
    slope = ratio @ d_log_rss
    variance_t = 2.0 / df + float(d_log_rss @ slope)
    ratio, slope = ratio[-m:, -m:], slope[-m:]
    Psi = np.array([found.variances.Psi[a, b] for a, b in blocks.pairs])
    joint_cov = np.block([[ratio, slope[:, None]], [slope[None], np.array([[variance_t]])]])
    G = np.block([[np.eye(m), Psi[:, None]], [np.zeros((1, m)), np.ones((1, 1))]])
    out = G @ joint_cov @ G.T
    out[:m][~known] = np.nan
    out[:, :m][:, ~known] = np.nan
    return np.asarray(out)
