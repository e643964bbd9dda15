"""Minimise the profiled criterion through `scipy.optimize`, and certify what was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, basinhopping, minimize

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase, root_derivatives
from dmixed.likelihood import Criterion
from dmixed.newton import Point, minimize_rebased, newton_decrement
from dmixed.terms import ProfileTerms

SCIPY_METHODS = (
    "Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA", "COBYQA",
    "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact", "trust-krylov",
)  # fmt: skip
"""Methods of `scipy.optimize.minimize` that can be asked for by name."""

TIGHT: dict[str, dict[str, Any]] = {
    "Nelder-Mead": {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 20_000, "maxfev": 20_000},
    "Powell": {"xtol": 1e-9, "ftol": 1e-14, "maxiter": 2_000},
    "CG": {"gtol": 1e-6, "maxiter": 2_000},
    "BFGS": {"gtol": 1e-6, "maxiter": 2_000},
    "L-BFGS-B": {"gtol": 1e-6, "ftol": 1e-15, "maxiter": 2_000},
}
"""Settings with which methods that stop early by default reach what a certificate asks for."""

DWARFED = 10.0
"""Relative standard deviation of group effects (reliability-1/2 units) that dwarfs the noise."""

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
    rounding
        estimated rounding error of the criterion, deviance units; at most 0.01, a tenth of a
        standard error
    """

    gradient: float
    boundary: float
    curvature: float
    condition: float
    digits_lost: float
    rounding: float

    @property
    def passed(self) -> bool:
        """All conditions hold."""
        return not self.failing

    @property
    def failing(self) -> tuple[str, ...]:
        """Conditions that do not hold, in words."""
        found = []
        if not self.gradient <= GRADIENT_LIMIT:
            found.append(f"scaled gradient {self.gradient:.1e}")
        if not self.boundary >= BOUNDARY_LIMIT:
            found.append(f"a zero variance wants to grow, slope {self.boundary:.1e}")
        if not self.curvature > CURVATURE_LIMIT:
            found.append("the likelihood is flat in some direction")
        if not self.rounding <= ROUNDING_LIMIT:
            found.append(f"rounding hides differences of the criterion below {self.rounding:.1g}")
        return tuple(found)

    def __bool__(self) -> bool:
        return self.passed


GRADIENT_LIMIT, BOUNDARY_LIMIT, CURVATURE_LIMIT, ROUNDING_LIMIT = 1e-5, -1e-6, 1e-10, 1e-2
"""What a certificate asks for; see `Certificate`."""


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
        every one of them in order
    certificate
        see `Certificate`
    checks
        evaluations of a second search, whose end was not lower
    sampled
        evaluations on a sample of the groups, from whose optimum the search started
    """

    method: str
    converged: bool
    reason: str
    evaluations: int
    path: tuple[Step, ...] = field(repr=False)
    certificate: Certificate = field(default_factory=lambda: Certificate(*(np.nan,) * 6))
    checks: int = 0
    sampled: int = 0


@dataclass(slots=True)
class Objective:
    """The criterion as optimisers want it; counts evaluations and keeps the path.

    ``terms`` maps a root (q, q) of Psi to the sums over groups, ``criterion`` these to a
    `Criterion`; ``theta`` stands for the free entries of the lower triangle of a root in the same
    (natural) basis, ``kept`` (q, q) for a root of the blocks that are held (zero by default).
    """

    terms: Callable[[Floats], ProfileTerms]
    criterion: Callable[[ProfileTerms], Criterion]
    blocks: Blocks
    callback: Callable[[int, Step], None] | None = None
    kept: Floats | None = None
    path: list[Step] = field(default_factory=list)
    best: tuple[float, Floats] | None = None
    _recent: dict[bytes, Criterion | None] = field(default_factory=dict)

    def at(self, root: Floats) -> Criterion | None:
        """Criterion at a root, None where it is not defined; repeated calls cost nothing."""
        key = root.tobytes()
        if key in self._recent:
            return self._recent[key]
        try:
            found: Criterion | None = self.criterion(self.terms(root))
        except np.linalg.LinAlgError:
            found = None
        if found is not None and not (
            np.isfinite(found.value)
            and np.isfinite(found.gradient).all()
            and np.isfinite(found.hessian).all()
        ):
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
        self._keep(key, found)
        return found

    def near(self, at: Criterion, root: Floats, new: Floats) -> Criterion | None:
        """Criterion at a root next to another one, expanded from the criterion there.

        None where it is not defined.
        """
        change = new @ new.T - root @ root.T
        step = np.array([change[a, b] for a, b in self.blocks.pairs])
        try:
            found = self.criterion(at.terms.expanded(step))
        except np.linalg.LinAlgError:
            return None
        self._keep(new.tobytes(), found)
        return found

    def _keep(self, key: bytes, found: Criterion | None) -> None:
        self._recent[key] = found
        if len(self._recent) > 4:
            self._recent.pop(next(iter(self._recent)))

    @property
    def evaluations(self) -> int:
        """Evaluations so far."""
        return len(self.path)

    @property
    def held(self) -> Floats:
        """(q, q) root of the blocks that are held, zero elsewhere."""
        return np.zeros((self.blocks.q,) * 2) if self.kept is None else self.kept

    @property
    def _free(self) -> NDArray[np.bool_]:
        """Entries of theta that move."""
        return self.blocks.moving[[d for _, d in self.blocks.theta_pairs]]

    def theta(self, root: Floats) -> Floats:
        """Free entries of theta of a root."""
        return self.blocks.theta(root)[self._free]

    def root(self, theta: Floats) -> Floats:
        """Root of the free entries of theta."""
        whole = np.zeros(len(self._free))
        whole[self._free] = theta
        return self.blocks.root(whole) + self.held

    def value(self, theta: Floats) -> float:
        """Criterion at theta."""
        found = self.at(self.root(theta))
        return np.inf if found is None else found.value

    def gradient(self, theta: Floats) -> Floats:
        """Gradient in theta."""
        return self._derivatives(theta)[0]

    def hessian(self, theta: Floats) -> Floats:
        """Hessian in theta."""
        return self._derivatives(theta)[1]

    def _derivatives(self, theta: Floats) -> tuple[Floats, Floats]:
        root = self.root(theta)
        found = self.at(root)
        if found is None:
            return np.zeros(len(theta)), np.eye(len(theta))
        eye = np.eye(self.blocks.q)
        g, H, _ = root_derivatives(self.blocks, found.gradient, found.hessian, eye, root)
        return g[self._free], H[np.ix_(self._free, self._free)]


def optimize(
    objective: Objective,
    root: Floats,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
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
    x0 = objective.theta(root)
    if method is None or method == "newton" or not len(x0):
        run: Any = minimize_rebased
        options: Any = {"objective": objective, "root": root}
        found: Any = minimize(objective.value, x0, method=run, options=options)
        root, name = found.root, "newton"
    else:
        found = named_minimize(objective, x0, method, settings)
        root, name = objective.root(np.asarray(found.x)), method
    at = objective.at(root)
    if at is None:
        raise np.linalg.LinAlgError("the criterion is not defined at the optimum")
    proof = certify(blocks, at, root)
    reason = str(found.message)
    if not proof.passed:
        reason += f"; not certified ({', '.join(proof.failing)})"
    summary = OptimizeSummary(
        name, proof.passed, reason, len(objective.path), tuple(objective.path), proof
    )
    return root, summary, at


def named_minimize(
    objective: Any, x0: Floats, method: str, settings: Mapping[str, Any] | None
) -> Any:
    """Run a method of scipy by name; ``objective`` has value, gradient and hessian."""
    options = {**TIGHT.get(method, {}), **dict(settings or {})}
    common = {"tol": options.pop("tol")} if "tol" in options else {}
    derivatives = _derivatives(objective, method if method != "basinhopping" else "L-BFGS-B")
    if method == "basinhopping":
        local: Any = {"method": "L-BFGS-B", "options": TIGHT["L-BFGS-B"], **derivatives, **common}
        allowed = {k: v for k, v in options.items() if k in ("niter", "T", "stepsize")}
        # scipy 1.15 renamed the argument
        seed = "rng" if "rng" in signature(basinhopping).parameters else "seed"
        hops: Any = {"niter": 10, seed: 0, **allowed}
        return basinhopping(
            objective.value, x0, minimizer_kwargs=local, **hops
        ).lowest_optimization_result
    given: Any = {"method": method, "options": options, **derivatives, **common}
    with warnings.catch_warnings():  # the certificate says what the fit is worth
        warnings.simplefilter("ignore", (OptimizeWarning, RuntimeWarning))
        return minimize(objective.value, x0, **given)


def _derivatives(objective: Any, method: str) -> dict[str, Any]:
    """The derivatives that a scipy method can use."""
    found: dict[str, Any] = {}
    if method not in {"Nelder-Mead", "Powell", "COBYLA", "COBYQA"}:
        found["jac"] = objective.gradient
    if method.startswith("trust-") or method in {"dogleg", "Newton-CG"}:
        found["hess"] = objective.hessian
    return found


def certify(blocks: Blocks, at: Criterion, root: Floats) -> Certificate:
    """Certificate of a point: first and second order conditions on the free coordinates."""
    point = Point.of(blocks, at, root)
    free = free_coordinates(blocks, point.s)
    g, H = point.g[free], point.H[np.ix_(free, free)]
    diagonal = np.sqrt(np.maximum(np.diag(H), FLAT))
    w = np.linalg.eigvalsh(H / np.outer(diagonal, diagonal)) if len(g) else np.ones(1)
    boundary = np.inf
    for block in blocks.slices:
        zero = [j for j in range(block.start, block.stop) if point.s[j] <= ZERO]
        zero = [j for j in zero if blocks.moving[j]]
        if zero:
            boundary = min(boundary, float(np.linalg.eigvalsh(point.G[np.ix_(zero, zero)])[0]))
    steep = float(np.abs(g / diagonal).max(initial=0.0))
    lost = np.log10(max(at.lost / (np.finfo(float).eps * max(abs(at.value), 1.0)), 1.0))
    condition = float(w[-1] / w[0]) if w[0] > 1e-16 else np.inf
    return Certificate(steep, boundary, float(w[0]), condition, float(lost), at.lost)


def zero_blocks(blocks: Blocks, root: Floats) -> list[int]:
    """Blocks of Psi, among those that move, that are singular."""
    _, s = rebase(blocks, root)
    return [
        j
        for j, block in enumerate(blocks.slices)
        if j not in blocks.held and (s[block] <= ZERO).any()
    ]


def free_coordinates(blocks: Blocks, s: Floats) -> list[int]:
    """Positions in ``blocks.theta_pairs`` of the columns of Delta that are not at zero."""
    moving = blocks.moving
    return [x for x, (_, d) in enumerate(blocks.theta_pairs) if s[d] > ZERO and moving[d]]


def flat_bars(blocks: Blocks, at: Criterion, root: Floats) -> list[bool]:
    """For each bar, whether the criterion does not change with its covariance at all."""
    H = np.abs(Point.of(blocks, at, root).H)
    rows = np.array([a for a, _ in blocks.theta_pairs])
    own = [(rows >= block.start) & (rows < block.stop) for block in blocks.slices]
    return [bool(H[np.ix_(bar, bar)].max() < FLAT) for bar in own]


def starting_root(objective: Objective, scoring: Callable[[Criterion], Floats]) -> Floats:
    """Best of the identity and two scoring steps, eigenvalues clipped at 0.01.

    Where group effects dwarf the noise, the steps start from a multiple of the identity as large
    as they are: there P_g is the same for all groups of full rank, and the step is the unweighted
    mean of b_g b_g'. From the identity its errors are of the order of the largest variance.
    """
    identity = identity_root(objective)
    root = _scored(objective, scoring, identity)
    if root is not None and float(np.linalg.norm(root, 2)) > DWARFED:
        large = identity - objective.held
        root = _scored(objective, scoring, large * np.linalg.norm(root, 2) + objective.held)
    if root is not None:
        root = _scored(objective, scoring, root)
    if root is not None:
        objective.at(root)
    if objective.best is None:
        raise np.linalg.LinAlgError("the criterion is not defined at any start")
    return objective.best[1]


def identity_root(objective: Objective) -> Floats:
    """Reliability 1/2 for everything that moves."""
    return np.diag(objective.blocks.moving.astype(np.float64)) + objective.held


def _scored(
    objective: Objective, scoring: Callable[[Criterion], Floats], root: Floats
) -> Floats | None:
    """Root after a scoring step from a root, None where there is no step."""
    blocks, at = objective.blocks, objective.at(root)
    if at is None:
        return None
    try:
        change = blocks.symmetric(scoring(at))
    except np.linalg.LinAlgError:
        return None
    stepped = blocks.join([_clipped(part) for part in blocks.split(root @ root.T + change)])
    return stepped * blocks.moving + objective.held


def _clipped(Psi: Floats) -> Floats:
    w, V = np.linalg.eigh(Psi)
    return V * np.sqrt(np.maximum(w, 1e-2))
