"""Minimise the profiled criterion: a re-based trust-region Newton, run through `scipy.optimize`.

Coordinates. Near a singular Psi fixed Cholesky coordinates become a curved valley, so every
iterate gets its own: ``Psi = V diag(s^2) V'`` and ``root = V (diag(s) + Delta)``, Delta lower
triangular. The sign of a column of the root is a symmetry; no coordinate is ever bounded: at
s_j = 0 the criterion is stationary in column j, a saddle or a minimum according to the gradient
with respect to Psi on that direction, which Newton's method sees in the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, brentq, minimize

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase, root_derivatives
from dmixed.likelihood import Criterion

SCIPY_METHODS = (
    "Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA", "COBYQA",
    "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact", "trust-krylov",
)  # fmt: skip
"""Methods of `scipy.optimize.minimize` that can be asked for by name."""

DECREMENT = 1e-10
"""Newton decrement g'H^-1 g, deviance units, at which to stop: 7e-6 standard errors."""

FLAT = 1e-6
"""Curvature in natural coordinates below which the data say nothing about a direction."""

ZERO = 1e-5
"""Relative standard deviation (reliability-1/2 units) below which a direction counts as zero."""


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluation on the optimiser's path.

    Attributes
    ----------
    value
        criterion, deviance units
    decrement
        Newton decrement there, deviance units (nan where it was not formed)
    theta
        natural coordinates
    """

    value: float
    decrement: float
    theta: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Evidence that a point is a minimum, in the last re-based coordinates.

    Attributes
    ----------
    gradient
        max |g| / sqrt(diag H) over the free coordinates; at most 1e-5
    boundary
        smallest eigenvalue of d criterion / d Psi where Psi is singular (inf if it is not);
        at least -1e-6
    curvature
        smallest eigenvalue of the scaled Hessian on the free coordinates; positive
    condition
        condition number of that Hessian
    digits_lost
        decimal digits of the criterion lost to rounding
    """

    gradient: float
    boundary: float
    curvature: float
    condition: float
    digits_lost: float

    @property
    def passed(self) -> bool:
        """All three conditions hold."""
        return self.gradient <= GRADIENT_LIMIT and self.boundary >= -1e-6 and self.curvature > 1e-10

    def __bool__(self) -> bool:
        return self.passed


GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True, slots=True)
class OptimizeSummary:
    """How the optimum was found.

    Attributes
    ----------
    method
        "newton" (this module's) or a scipy method's name
    converged
        the certificate passed
    reason
        why the optimiser stopped, in words
    evaluations
        evaluations of the sums over groups, starting steps included
    path
        every evaluation in order
    certificate
        see `Certificate`
    """

    method: str
    converged: bool
    reason: str
    evaluations: int
    path: tuple[Step, ...] = field(repr=False)
    certificate: Certificate = field(default_factory=lambda: Certificate(*(np.nan,) * 5))


@dataclass(slots=True)
class Objective:
    """The criterion as optimisers want it; counts evaluations and keeps the path.

    ``evaluate`` maps a root (q, q) of Psi to a `Criterion`; ``theta`` stands for the lower
    triangle of a root in the same (natural) basis.
    """

    evaluate: Callable[[Floats], Criterion]
    blocks: Blocks
    callback: Callable[[int, Step], None] | None = None
    path: list[Step] = field(default_factory=list)
    best: tuple[float, Floats] | None = None
    _recent: dict[bytes, Criterion | None] = field(default_factory=dict)

    def at(self, root: Floats) -> Criterion | None:
        """Criterion at a root, None where it is not defined; repeated calls cost nothing."""
        key = root.tobytes()
        if key in self._recent:
            return self._recent[key]
        try:
            found: Criterion | None = self.evaluate(root)
        except np.linalg.LinAlgError:
            found = None
        if found is not None and not np.isfinite(found.value):
            found = None
        value, decrement = np.inf, np.nan
        if found is not None:
            value = found.value
            decrement = newton_decrement(self.blocks, found, root)
            if self.best is None or value < self.best[0]:
                self.best = (value, root.copy())
        step = Step(value, decrement, tuple(self.blocks.theta(root).tolist()))
        self.path.append(step)
        if self.callback is not None:
            self.callback(len(self.path), step)
        self._recent[key] = found
        if len(self._recent) > 4:
            self._recent.pop(next(iter(self._recent)))
        return found

    def value(self, theta: Floats) -> float:
        """Criterion at theta."""
        found = self.at(self.blocks.root(theta))
        return np.inf if found is None else found.value

    def gradient(self, theta: Floats) -> Floats:
        """Gradient in theta."""
        return self._derivatives(theta)[0]

    def hessian(self, theta: Floats) -> Floats:
        """Hessian in theta."""
        return self._derivatives(theta)[1]

    def _derivatives(self, theta: Floats) -> tuple[Floats, Floats]:
        root = self.blocks.root(theta)
        found = self.at(root)
        if found is None:
            return np.zeros(len(theta)), np.eye(len(theta))
        eye = np.eye(self.blocks.q)
        g, H, _ = root_derivatives(self.blocks, found.gradient, found.hessian, eye, root)
        return g, H


@dataclass(frozen=True, slots=True)
class _Point:
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
    def of(cls, blocks: Blocks, at: Criterion, root: Floats) -> _Point:
        V, s = rebase(blocks, root)
        g, H, G = root_derivatives(blocks, at.gradient, at.hessian, V, V * s)
        size = np.array([max(s[c], 1.0) for c, _ in blocks.theta_pairs])
        return cls(at, root, V, s, g * size, H * np.outer(size, size), G, size)

    def moved(self, blocks: Blocks, step: Floats) -> Floats:
        """Root after a scaled step."""
        return self.V * self.s + self.V @ blocks.root(step * self.size)


def newton_decrement(blocks: Blocks, at: Criterion, root: Floats) -> float:
    """g'H^-1 g in deviance units, inf where H is not positive semi-definite."""
    point = _Point.of(blocks, at, root)
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
    shift = brentq(excess, low, 2 * high + tiny, xtol=1e-300, rtol=1e-10)
    return V @ (-a / (w + floor + shift))


def minimize_rebased(
    fun: Callable[..., float],
    x0: Floats,
    args: tuple[Any, ...] = (),
    *,
    objective: Objective,
    root: Floats,
    maxiter: int = 60,
    **_: Any,
) -> OptimizeResult:
    """Re-based trust-region Newton, as a custom method of `scipy.optimize.minimize`.

    Stops when the Hessian is positive semi-definite and the Newton decrement is at most
    `DECREMENT`; that last step is taken and evaluated. Below the rounding level of the criterion
    its differences mean nothing and steps are judged by the gradient.
    """
    del fun, x0, args
    blocks = objective.blocks
    start = objective.at(root)
    if start is None:
        raise np.linalg.LinAlgError("the criterion is not defined at the start")
    point = _Point.of(blocks, start, root)
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
        at = objective.at(root)
        if at is None:
            radius = 0.25 * length
            continue
        actual = point.at.value - at.value
        if last or predicted <= noise:
            moved = _Point.of(blocks, at, root)
            limit = max(1.01 * float(np.linalg.norm(point.g)), 1e-9)
            if actual >= -noise and float(np.linalg.norm(moved.g)) <= limit:
                point = moved
            success = True
            reason = "Newton decrement below tolerance" if last else "rounding level reached"
            break
        ratio = actual / predicted if predicted > 0 else -1.0
        if ratio > 1e-4:
            point = _Point.of(blocks, at, root)
        if ratio < 0.25:
            radius = 0.25 * min(radius, length)
        elif ratio > 0.75 and length > 0.8 * radius:
            radius = min((4.0 if ratio > 0.9 else 2.0) * radius, 1e12)
        if radius < 1e-13:
            reason = "the trust region shrank to nothing"
            break
    return OptimizeResult(
        x=blocks.theta(point.root),
        root=point.root,
        fun=point.at.value,
        jac=point.g,
        success=success,
        message=reason,
        nfev=len(objective.path),
        nit=_iteration + 1,
    )


def optimize(
    objective: Objective, root: Floats, method: str | None = None
) -> tuple[Floats, OptimizeSummary, Criterion]:
    """Minimise from a root (q, q) of Psi in natural coordinates.

    Returns
    -------
    root
        at the minimum
    summary
    criterion
        at the minimum, with derivatives
    """
    blocks = objective.blocks
    x0 = blocks.theta(root)
    if method is None or method == "newton":
        found = minimize(
            objective.value, x0, method=minimize_rebased,  # type: ignore[call-overload]
            options={"objective": objective, "root": root},
        )  # fmt: skip
        root, name = found.root, "newton"
    else:
        found = minimize(objective.value, x0, method=method, **_derivatives(objective, method))
        root, name = blocks.root(np.asarray(found.x)), method
    at = objective.at(root)
    if at is None:
        raise np.linalg.LinAlgError("the criterion is not defined at the optimum")
    proof = certify(blocks, at, root)
    reason = str(found.message)
    if not proof.passed:
        reason += f"; not certified ({_failing(proof)})"
    summary = OptimizeSummary(
        name, proof.passed, reason, len(objective.path), tuple(objective.path), proof
    )
    return root, summary, at


def _derivatives(objective: Objective, method: str) -> dict[str, Any]:
    """The derivatives that a scipy method can use."""
    found: dict[str, Any] = {}
    if method not in {"Nelder-Mead", "Powell", "COBYLA", "COBYQA"}:
        found["jac"] = objective.gradient
    if method.startswith("trust-") or method in {"dogleg", "Newton-CG"}:
        found["hess"] = objective.hessian
    return found


def certify(blocks: Blocks, at: Criterion, root: Floats) -> Certificate:
    """Certificate of a point: first and second order conditions on the free coordinates."""
    point = _Point.of(blocks, at, root)
    free = free_coordinates(blocks, point.s)
    g, H = point.g[free], point.H[np.ix_(free, free)]
    diagonal = np.sqrt(np.maximum(np.diag(H), FLAT))
    w = np.linalg.eigvalsh(H / np.outer(diagonal, diagonal)) if len(g) else np.ones(1)
    boundary = np.inf
    for block in blocks.slices:
        zero = [j for j in range(block.start, block.stop) if point.s[j] <= ZERO]
        if zero:
            boundary = min(boundary, float(np.linalg.eigvalsh(point.G[np.ix_(zero, zero)])[0]))
    steep = float(np.abs(g / diagonal).max(initial=0.0))
    lost = np.log10(max(at.lost / (np.finfo(float).eps * max(abs(at.value), 1.0)), 1.0))
    return Certificate(steep, boundary, float(w[0]), float(w[-1] / max(w[0], 1e-300)), float(lost))


def free_coordinates(blocks: Blocks, s: Floats) -> list[int]:
    """Positions in ``blocks.theta_pairs`` of the columns of Delta that are not at zero."""
    return [x for x, (_, d) in enumerate(blocks.theta_pairs) if s[d] > ZERO]


def _failing(proof: Certificate) -> str:
    parts = []
    if not proof.gradient <= GRADIENT_LIMIT:
        parts.append(f"scaled gradient {proof.gradient:.1e}")
    if not proof.boundary >= -1e-6:
        parts.append(f"a zero variance wants to grow, slope {proof.boundary:.1e}")
    if not proof.curvature > 1e-10:
        parts.append("the likelihood is flat in some direction")
    return ", ".join(parts)


def starting_root(
    objective: Objective, scoring: Callable[[Criterion], Floats], steps: int = 2
) -> Floats:
    """Best of the identity and two scoring steps from it, eigenvalues clipped at 0.01."""
    blocks = objective.blocks
    root = np.eye(blocks.q)
    for _ in range(steps):
        at = objective.at(root)
        if at is None:
            break
        try:
            change = blocks.symmetric(scoring(at))
        except np.linalg.LinAlgError:
            break
        root = blocks.join([_clipped(part) for part in blocks.split(root @ root.T + change)])
    objective.at(root)
    if objective.best is None:
        raise np.linalg.LinAlgError("the criterion is not defined at any start")
    return objective.best[1]


def _clipped(Psi: Floats) -> Floats:
    w, V = np.linalg.eigh(Psi)
    return V * np.sqrt(np.maximum(w, 1e-2))
