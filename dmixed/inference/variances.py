"""Standard errors of variance parameters from the joint information with the error variance.

With t = log sigma2, l = d log rss / d Delta and H the Hessian of the profiled criterion, the
inverse of the joint information of (Delta, t) has the blocks ``2 H^-1``, ``2 H^-1 l`` and
``2 / df + 2 l'H^-1 l`` (partitioned inverse; H is a Schur complement of the joint Hessian).
Variances in user units follow by the delta method. Only free coordinates enter: a direction at
zero variance has no standard error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase, root_derivatives
from dmixed.likelihood import Criterion
from dmixed.optimizer import ZERO, free_coordinates


@dataclass(frozen=True, slots=True)
class VarianceEstimates:
    """Variance parameters with their covariance; m entries over ``blocks.pairs``.

    Attributes
    ----------
    Psi
        (q, q) relative covariance of the random effects, user coordinates, dimensionless
        once multiplied by the units of W squared
    root
        (q, q): Psi = root root'
    zero
        (q,): whether a direction of a bar's Psi is exactly zero
    cov_ratio
        (m, m) covariance of the relative parameters; NaN where a parameter is not free
    cov_user
        (m + 1, m + 1) covariance of [Psi sigma2, sigma2], divided by sigma2 squared
    """

    Psi: Floats
    root: Floats
    zero: tuple[bool, ...]
    cov_ratio: Floats
    cov_user: Floats


def variance_estimates(
    blocks: Blocks, at: Criterion, root: Floats, natural: Floats, sigma2: float, df: int
) -> VarianceEstimates:
    """Estimates at the optimum ``root`` (natural coordinates), ``natural`` mapping user to natural.

    A direction whose relative standard deviation is below `optimizer.ZERO` is set to zero.
    """
    pairs, coordinates = blocks.pairs, blocks.theta_pairs
    V, s = rebase(blocks, root)
    _, H, _ = root_derivatives(blocks, at.gradient, at.hessian, V, V * s)
    free = free_coordinates(blocks, s)
    zero = tuple((s <= ZERO).tolist())
    s = np.where(zero, 0.0, s)
    left = np.asarray(np.linalg.solve(natural, V), dtype=np.float64)
    user_root = left * s
    Psi = user_root @ user_root.T
    J, J_natural = (
        np.array([_direction(pairs, L, L * s, *coordinates[x]) for x in free]).reshape(
            len(free), len(pairs)
        ).T
        for L in (left, V)
    )  # fmt: skip
    inverse = 2.0 * _inverse(H[np.ix_(free, free)])
    slope = inverse @ (J_natural.T @ at.d_log_rss)
    variance_t = 2.0 / df + float(at.d_log_rss @ J_natural @ slope)
    packed = np.array([Psi[a, b] for a, b in pairs])
    joint = np.block([[inverse, slope[:, None]], [slope[None], np.array([[variance_t]])]])
    gradient = np.block([[J, packed[:, None]], [np.zeros((1, len(free))), np.ones((1, 1))]])
    cov_ratio, cov_user = J @ inverse @ J.T, gradient @ joint @ gradient.T
    fixed = _fixed(J, left, blocks)
    cov_ratio[fixed] = cov_ratio[:, fixed] = np.nan
    fixed = np.append(fixed, False)
    cov_user[fixed] = cov_user[:, fixed] = np.nan
    return VarianceEstimates(Psi, user_root, zero, cov_ratio, cov_user)


def _fixed(J: Floats, left: Floats, blocks: Blocks) -> NDArray[np.bool_]:
    """Entries of Psi that no free direction moves, but for rounding."""
    every = [_direction(blocks.pairs, left, left, c, d) for c, d in blocks.theta_pairs]
    reach = np.abs(np.array(every)).max(axis=0)
    return np.asarray(np.abs(J).max(axis=1, initial=0.0) <= 1e-9 * reach)


def _direction(
    pairs: tuple[tuple[int, int], ...], left: Floats, root: Floats, c: int, d: int
) -> list[float]:
    """DPsi / dDelta_cd over the pairs."""
    D = np.outer(left[:, c], root[:, d])
    return [float(D[a, b] + D[b, a]) for a, b in pairs]


def _inverse(H: Floats) -> Floats:
    """Inverse of a positive definite matrix scaled by its diagonal; NaN if it is not."""
    if not len(H):
        return H
    if not (np.diag(H) > 0).all():
        return np.full_like(H, np.nan)
    scale = np.sqrt(np.diag(H))
    w, V = np.linalg.eigh(H / np.outer(scale, scale))
    if w[0] <= 1e-12:
        return np.full_like(H, np.nan)
    return np.asarray((V / w) @ V.T / np.outer(scale, scale))
