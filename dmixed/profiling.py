"""Profile likelihood: everything else maximised while one parameter is held in user units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from dmixed.blocks import Floats
from dmixed.constrained import fit_constrained
from dmixed.dispatch import one_blas_thread
from dmixed.errors import DataError, NotSupportedError
from dmixed.fitting import Estimates, Search, criterion_at
from dmixed.held import Held, pieces
from dmixed.inference.joint import natural_of_user
from dmixed.likelihood import degrees_of_freedom
from dmixed.params import lower_root
from dmixed.preparation import Prepared

STEEP = 1e-2
"""Slope of the criterion, deviance units per standard deviation, that is no maximum."""


class ProfilePoint(NamedTuple):
    """Log-likelihood maximised over the rest, and whether the maximum was reached."""

    llf: float
    reached: bool


def profile_fixed(prepared: Prepared, found: Estimates, j: int, value: float) -> ProfilePoint:
    """Log-likelihood maximised with fixed effect j held at a value.

    Under REML the likelihood is that of the model with all its fixed effects, so that values
    compare with the fit's.
    """
    held = _held(prepared, found)
    beta = found.beta.copy()
    beta[j] = value
    held = replace(held, beta=beta, free_beta=held.free_beta & (np.arange(len(beta)) != j))
    fit = fit_constrained(prepared, found.reml, Search(), held)
    return ProfilePoint(-0.5 * fit.value, fit.summary.converged)


def profile_variance(prepared: Prepared, found: Estimates, at: int, value: float) -> ProfilePoint:
    """Log-likelihood maximised with the variance of random column ``at`` held at a value.

    The variance Phi_aa = Psi_aa sigma2 is held in user units. With Phi = Lambda Lambda', the
    column first in its block so that its root is Lambda_00, the criterion is minimised over the
    other entries of Lambda and t = log sigma2:

        f = logdet(Phi / sigma2) + [REML] log|XtHiX| + df (log 2 pi + t) + rss / sigma2
    """
    problem = _Profile(prepared, found, at, value)
    with one_blas_thread:
        end = minimize(
            problem.value, problem.start(), jac=True, method="BFGS", options={"gtol": 1e-6}
        )
        end = minimize(problem.value, end.x, jac=True, method="BFGS", options={"gtol": 1e-8})
    return ProfilePoint(-0.5 * float(end.fun), float(np.abs(end.jac).max()) <= STEEP)


def _held(prepared: Prepared, found: Estimates) -> Held:
    """What the fit held, which a profile holds as well.

    Raises
    ------
    NotSupportedError
        the fit was penalised
    """
    if found.penalised:
        raise NotSupportedError("a penalised fit has no profile likelihood: fit without penalty")
    p, m = len(found.beta), len(prepared.problem.factors.blocks.pairs)
    return Held(
        found.beta,
        found.variances.Psi,
        np.ones(p, np.bool_) if found.free_beta is None else found.free_beta,
        np.ones(m, np.bool_) if found.free_pairs is None else found.free_pairs,
    )


class _Profile:
    """The criterion in the free entries of Lambda (relative to the estimate's size) and t."""

    def __init__(self, prepared: Prepared, found: Estimates, at: int, value: float) -> None:
        self.prepared, self.found, self.value_held = prepared, found, value
        blocks = prepared.problem.factors.blocks
        self.blocks = blocks
        kept = _held(prepared, found)
        parts = pieces(blocks, kept)
        if not kept.free_beta.all() or any(part.kind != "free" for part in parts):
            raise NotSupportedError(
                "a variance is profiled over all other parameters, of which this fit held some: "
                "fit with all of them free, or with whole covariances held at zero"
            )
        groups = [list(part.columns) for part in parts]
        for own in groups:
            own.sort(key=lambda c: c != at)  # the column itself first
        self.order = [c for own in groups for c in own]
        held = {c for j in blocks.held for c in range(*blocks.slices[j].indices(blocks.q))}
        self.entries = [
            (own[i], own[j])
            for own in groups
            for i in range(len(own))
            for j in range(i + 1)
            if own[i] != at and own[i] not in held
        ]
        self.df = degrees_of_freedom(prepared.problem.factors, found.reml)
        self.J = natural_of_user(prepared.problem)
        self.at = at

    def start(self) -> Floats:
        """At the estimate, the held root at its value."""
        order = self.order
        Phi = self.found.variances.Psi[np.ix_(order, order)] * self.found.sigma2
        L = np.zeros(Phi.shape)
        L[np.ix_(order, order)] = lower_root(Phi)
        size = np.sqrt(np.diag(self.found.variances.Psi)) * np.sqrt(self.found.sigma2)
        inner = np.sqrt(
            np.diag(np.linalg.inv(self.prepared.problem.natural.T @ self.prepared.problem.natural))
        )
        self.size = np.maximum(size, inner * np.sqrt(self.found.sigma2) * 0.1)
        x = [L[a, b] / self.size[a] for a, b in self.entries]
        for i, (a, b) in enumerate(self.entries):
            if a == b:
                x[i] = max(abs(x[i]), 0.05)
        return np.array([*x, np.log(self.found.sigma2)])

    def value(self, x: Floats) -> tuple[float, Floats]:
        """Criterion and its gradient."""
        t = float(x[-1])
        L = np.zeros((self.blocks.q,) * 2)
        for value, (a, b) in zip(x, self.entries, strict=False):
            L[a, b] = value * self.size[a]
        L[self.at, self.at] = np.sqrt(self.value_held)
        Phi = L @ L.T
        if not abs(t) < 700:
            return np.inf, np.zeros(len(x))
        sigma2 = np.exp(t)
        try:
            f, g, slope = self._at(Phi / sigma2, t)
        except (DataError, np.linalg.LinAlgError):
            return np.inf, np.zeros(len(x))
        G = self.blocks.symmetric(
            np.array(
                [v if a == b else 0.5 * v for v, (a, b) in zip(g, self.blocks.pairs, strict=True)]
            )
        )
        packed = np.array([Phi[a, b] for a, b in self.blocks.pairs]) / sigma2
        DL = 2.0 * G @ L / sigma2
        gradient = [DL[a, b] * self.size[a] for a, b in self.entries]
        return f, np.array([*gradient, slope - float(g @ packed)])

    def _at(self, Psi: Floats, t: float) -> tuple[float, Floats, float]:
        """f, its gradient along the entries of Psi at fixed t, and along t at fixed Psi."""
        reml, factors = self.found.reml, self.prepared.problem.factors
        at = criterion_at(self.prepared, Psi, reml)
        p, sigma2 = factors.p, float(np.exp(t))
        rss = float((at.chol[p, p] * factors.y_scale) ** 2)
        f = at.value - self.df * (np.log(rss / self.df) + 1.0) + self.df * t + rss / sigma2
        # d profiled = d logdet (+ d log|XtHiX|) + df d log rss; here rss / sigma2 takes its place
        natural: Any = at.gradient + (rss / sigma2 - self.df) * at.d_log_rss
        return float(f), self.J.T @ natural, self.df - rss / sigma2
