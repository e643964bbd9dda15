"""A re-based trust-region Newton method for covariance parameters.

Coordinates. Near a singular Psi fixed Cholesky coordinates become a curved valley, so every
iterate gets its own: ``Psi = V diag(s^2) V'`` and ``root = V (diag(s) + Delta)``, Delta lower
triangular. The sign of a column of the root is a symmetry; no coordinate is ever bounded: at
s_j = 0 the criterion is stationary in column j, a saddle or a minimum according to the gradient
with respect to Psi on that direction, which Newton's method sees in the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import OptimizeResult, brentq

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase, root_derivatives
from dmixed.likelihood import Criterion

DECREMENT = 1e-10
"""Newton decrement g'H^-1 g, deviance units, at which to stop: 7e-6 standard errors."""

CLOSE = 1e-8
"""Last step, relative to standard deviations, after which the criterion is expanded."""


class Evaluations(Protocol):
    """What the method needs of an objective."""

    @property
    def blocks(self) -> Blocks:
        """Sizes of the bars' blocks."""
        ...

    @property
    def evaluations(self) -> int:
        """Evaluations so far."""
        ...

    def at(self, root: Floats) -> Criterion | None:
        """Criterion at a root of Psi, None where it is not defined."""
        ...

    def near(self, at: Criterion, root: Floats, new: Floats) -> Criterion | None:
        """Criterion at a root ``new`` within `CLOSE` of another, from the criterion there."""
        ...


@dataclass(frozen=True, slots=True)
class Point:
    """A point in its own re-based coordinates, scaled: Delta = size * step."""

    at: Criterion
    root: Floats
    V: Floats
    s: Floats
    g: Floats
    H: Floats
    G: Floats
    size: Floats

    @classmethod
    def of(cls, blocks: Blocks, at: Criterion, root: Floats) -> Point:
        """Point at a root, with the derivatives of the criterion there."""
        V, s = rebase(blocks, root)
        g, H, G = root_derivatives(blocks, at.gradient, at.hessian, V, V * s)
        size = np.array([max(s[c], 1.0) for c, _ in blocks.theta_pairs])
        g, H = g * size, H * np.outer(size, size)
        held = ~blocks.moving[[d for _, d in blocks.theta_pairs]]
        g[held] = H[held] = H[:, held] = 0.0
        H[held, held] = 1.0
        return cls(at, root, V, s, g, H, G, size)

    def moved(self, blocks: Blocks, step: Floats) -> Floats:
        """Root after a scaled step."""
        return np.asarray(self.V * self.s + self.V @ blocks.root(step * self.size))


def newton_decrement(blocks: Blocks, at: Criterion, root: Floats) -> float:
    """g'H^-1 g in deviance units, inf where H is not positive semi-definite."""
    point = Point.of(blocks, at, root)
    return _decrement(*np.linalg.eigh(point.H), point.g)


def _decrement(w: Floats, V: Floats, g: Floats) -> float:
    big = max(1.0, float(np.abs(w).max()))
    if w[0] <= -1e-8 * big:
        return np.inf
    return float(((V.T @ g) ** 2 / np.maximum(w, 1e-10 * big)).sum())


def trust_region_step(g: Floats, w: Floats, V: Floats, radius: float) -> Floats:
    """Minimiser of ``g's + s'Hs/2`` over ``|s| <= radius``, H = V diag(w) V'.

    Moré & Sorensen (1983, SIAM J. Sci. Stat. Comput. 4, 553-572), by the eigendecomposition,
    the hard case included.
    """
    a = V.T @ g
    tiny = 1e-14 * max(1.0, float(np.abs(w).max()))
    if w[0] > tiny:
        step = -a / w
        if np.linalg.norm(step) <= radius:
            return V @ step
    lowest = w - w[0] <= tiny
    floor = max(0.0, -float(w[0]))

    def excess(shift: float) -> float:
        return float(np.linalg.norm(a / (w + floor + shift))) - radius

    if float(np.linalg.norm(a[lowest])) <= 1e-14 * max(1.0, float(np.linalg.norm(a))):
        rest = np.where(lowest, 0.0, -a / np.where(lowest, 1.0, w + floor))
        inside = radius**2 - float(rest @ rest)
        if inside >= 0:  # hard case: fill up along the lowest eigenvector (either sign)
            rest[np.argmax(lowest)] += np.sqrt(inside) if w[0] < -tiny else 0.0
            return V @ rest
    high = max(float(np.linalg.norm(g)) / radius, tiny)
    low = tiny
    while low > 1e-300 and excess(low) <= 0:
        low *= 1e-3
    if excess(low) <= 0:  # H is singular to rounding and the step inside all the same
        return V @ (-a / (w + floor + tiny))
    shift = brentq(excess, low, 2 * high + tiny, xtol=1e-300, rtol=1e-10, maxiter=1000)
    return V @ (-a / (w + floor + shift))


def minimize_rebased(
    fun: Callable[..., float],
    x0: Floats,
    args: tuple[Any, ...] = (),
    *,
    objective: Evaluations,
    root: Floats,
    maxiter: int = 60,
    **_: Any,
) -> OptimizeResult:
    """Re-based trust-region Newton, as a custom method of `scipy.optimize.minimize`.

    Stops when the Hessian is positive semi-definite and the Newton decrement is at most
    `DECREMENT`; that last step is taken and evaluated, or expanded if it is within `CLOSE`. Below
    the rounding level of the criterion its differences mean nothing and steps are judged by the
    gradient.
    """
    del fun, x0, args
    blocks = objective.blocks
    start = objective.at(root)
    if start is None:
        raise np.linalg.LinAlgError("the criterion is not defined at the start")
    point = Point.of(blocks, start, root)
    radius = max(1.0, float(np.linalg.norm(point.s / np.maximum(point.s, 1.0))))
    reason, success = f"no optimum within {maxiter} iterations", False
    for _iteration in range(maxiter):
        w, V = np.linalg.eigh(point.H)
        step = trust_region_step(point.g, w, V, radius)
        predicted = -float(point.g @ step + 0.5 * step @ point.H @ step)
        decrement = _decrement(w, V, point.g)
        noise = max(16 * np.finfo(float).eps * abs(point.at.value), point.at.lost)
        last = decrement <= DECREMENT
        length = float(np.linalg.norm(step))
        root = point.moved(blocks, step)
        near = objective.near(point.at, point.root, root) if last and length <= CLOSE else None
        if near is not None:
            point = Point.of(blocks, near, root)
            reason, success = "Newton decrement below tolerance", True
            break
        at = objective.at(root)
        if at is None:
            radius = 0.25 * length
            continue
        actual = point.at.value - at.value
        if last or predicted <= noise:
            moved = Point.of(blocks, at, root)
            limit = max(1.01 * float(np.linalg.norm(point.g)), 1e-9)
            if actual >= -noise and float(np.linalg.norm(moved.g)) <= limit:
                point = moved
            success = True
            reason = "Newton decrement below tolerance" if last else "rounding level reached"
            break
        ratio = actual / predicted if predicted > 0 else -1.0
        if ratio > 1e-4:
            point = Point.of(blocks, at, root)
        if ratio < 0.25:
            radius = 0.25 * min(radius, length)
        elif ratio > 0.75 and length > 0.8 * radius:
            radius = min((4.0 if ratio > 0.9 else 2.0) * radius, 1e12)
        if radius < 1e-13:
            reason = "the trust region shrank to nothing"
            break
    return OptimizeResult(  # type: ignore[call-arg]
        x=blocks.theta(point.root),
        root=point.root,
        fun=point.at.value,
        jac=point.g,
        success=success,
        message=reason,
        nfev=objective.evaluations,
        nit=_iteration + 1,
    )
