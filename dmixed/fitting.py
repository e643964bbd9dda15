"""From moments to estimates: the four calls of a fit, each usable alone.

``prepare`` (coordinates and factors) -> ``start`` -> ``optimize`` -> ``estimate``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Floats
from dmixed.collect import Moments
from dmixed.covariance import root_derivatives
from dmixed.design import Design
from dmixed.errors import DataError
from dmixed.executor import Evaluator, one_blas_thread
from dmixed.factors import DependentColumns, Problem, problem
from dmixed.inference.variances import VarianceEstimates, variance_estimates
from dmixed.likelihood import (
    Criterion,
    criterion,
    degrees_of_freedom,
    fixed_estimates,
    scoring_step,
    within_variance,
)
from dmixed.optimizer import Objective, OptimizeSummary, Step, flat_bars, optimize, starting_root

UNRESOLVED = 1.0
"""Rounding error of the criterion, deviance units, above which no estimate means anything."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A model on its moments, ready to be evaluated.

    Attributes
    ----------
    moments, design
        what was collected and learned
    problem
        working coordinates and factors
    """

    moments: Moments
    design: Design
    problem: Problem

    @property
    def aliased(self) -> tuple[str, ...]:
        """Names of the columns of X that depend on those before them."""
        kept = set(self.problem.fixed.kept)
        return tuple(n for j, n in enumerate(self.design.fixed_names) if j not in kept)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """Names of the p independent columns of X."""
        return tuple(self.design.fixed_names[j] for j in self.problem.fixed.kept)


@one_blas_thread
def prepare(moments: Moments) -> Prepared:
    """Check what was collected and factor it.

    Raises
    ------
    DataError
        no rows, a constant response, or dependent columns in a random term
    """
    if moments.nobs == 0:
        reasons = ", ".join(f"{n} rows for {reason!r}" for reason, n in moments.dropped.items())
        raise DataError(
            f"no row is left to fit: dropped {reasons}" if reasons else "the data have no rows"
        )
    design = moments.design
    try:
        found = problem(
            moments.group, design.T_fixed, design.t_response, [bar.T for bar in design.bars]
        )
    except DependentColumns as err:
        bar = design.bars[err.bar]
        raise DataError(
            f"in {bar.text} the column {bar.names[err.column]!r} is a linear combination of the "
            "others (or zero): its variance cannot be told from theirs; leave it out"
        ) from None
    stored = float(found.factors.stored[-1]) if found.response.scale > 0 else 0.0
    if stored <= 0.0:
        raise DataError(
            f"the response {design.spec.formula.response_text!r} is constant: "
            "there is no variance to explain"
        )
    return Prepared(moments, design, found)


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """Estimates of one fit, in user units and in the working coordinates they came from.

    Attributes
    ----------
    reml
        REML or ML
    value
        -2 log-likelihood
    beta, cov_beta
        (p,), (p, p)
    working_beta
        (p,) in working coordinates, without the response's shift
    sigma2
        error variance
    root
        (q, q) root of the relative covariance, natural coordinates, zero directions exactly zero
    theta
        lme4's, user units
    variances
        see `VarianceEstimates`
    summary
        how the optimum was found
    """

    reml: bool
    value: float
    beta: Floats
    cov_beta: Floats
    working_beta: Floats
    sigma2: float
    root: Floats
    theta: Floats
    variances: VarianceEstimates
    summary: OptimizeSummary


def evaluate(prepared: Prepared, theta: Floats, reml: bool) -> tuple[float, Floats, Floats]:
    """-2 log-likelihood, gradient and Hessian at lme4's theta (user units)."""
    found = prepared.problem
    blocks, natural = found.factors.blocks, found.natural
    theta = np.asarray(theta, dtype=np.float64)
    if theta.shape != (len(blocks.theta_pairs),) or not np.isfinite(theta).all():
        raise DataError(f"theta must be {len(blocks.theta_pairs)} finite numbers, not {theta}")
    root = natural @ blocks.root(theta)
    with one_blas_thread:
        at = criterion(found.factors, Evaluator(found.factors)(root), reml)
    g, H, _ = root_derivatives(blocks, at.gradient, at.hessian, natural, root)
    return at.value, g, H


def fit(
    prepared: Prepared,
    reml: bool = True,
    method: str | None = None,
    callback: Callable[[int, Step], None] | None = None,
) -> Estimates:
    """Estimate by REML or ML.

    Raises
    ------
    DataError
        too few rows, a response without residual variance, or a variance that the data do not
        determine
    """
    factors = prepared.problem.factors
    df = degrees_of_freedom(factors, reml)
    if df <= 0:
        raise DataError(
            f"{factors.nobs} rows are too few for {factors.p} fixed effects: "
            "no degree of freedom is left for the error variance"
        )
    with one_blas_thread:
        terms = Evaluator(factors)
        objective = Objective(
            lambda root: criterion(factors, terms(root), reml), factors.blocks, callback
        )
        sigma2 = within_variance(factors)
        try:
            start = starting_root(objective, lambda at: scoring_step(factors, at, sigma2))
            root, summary, at = optimize(objective, start, method)
        except np.linalg.LinAlgError:
            raise DataError(_exact(prepared)) from None
        _check_identified(prepared, objective, at, root)
        if at.lost > UNRESOLVED:
            raise DataError(_exact(prepared))
        return _estimates(prepared, reml, root, summary, at)


def _exact(prepared: Prepared) -> str:
    return (
        f"the response {prepared.design.spec.formula.response_text!r} is, to rounding, an exact "
        "combination of the model's columns: its residual variance is lost among their digits; "
        "if one column dominates the response, subtract a known multiple of it with offset="
    )


def _check_identified(
    prepared: Prepared, objective: Objective, at: Criterion, root: Floats
) -> None:
    """Refuse a model whose likelihood is flat in the variances of a bar."""
    blocks = prepared.problem.factors.blocks
    flat = flat_bars(blocks, at, root)
    if any(flat):  # at zero, next to large variances, a curvature may look like none
        start = np.diag(blocks.moving.astype(np.float64))
        there = objective.at(start)
        if there is not None:
            flat = [a and b for a, b in zip(flat, flat_bars(blocks, there, start), strict=True)]
    for bar, undetermined in zip(prepared.design.bars, flat, strict=True):
        if not undetermined:
            continue
        groups = prepared.moments.group.n_groups
        why = (
            "there is only one group"
            if groups == 1
            else "each group has a single row"
            if groups == prepared.moments.nobs
            else "the likelihood does not depend on it"
        )
        raise DataError(
            f"the data do not determine the variance of {bar.text}: {why}, so it cannot be told "
            "from the error variance or the fixed effects"
        )


def _estimates(
    prepared: Prepared, reml: bool, root: Floats, summary: OptimizeSummary, at: Criterion
) -> Estimates:
    """User-unit estimates at an optimum."""
    found = prepared.problem
    factors, fixed = found.factors, found.fixed
    working = fixed_estimates(factors, at, reml)
    to_user = solve_triangular(fixed.to_work, np.eye(factors.p)) if factors.p else np.zeros((0, 0))
    variances = variance_estimates(
        factors.blocks, at, root, found.natural, working.sigma2, degrees_of_freedom(factors, reml)
    )
    return Estimates(
        reml=reml,
        value=at.value,
        beta=to_user @ (working.beta + found.response.beta),
        cov_beta=to_user @ working.cov_beta @ to_user.T,
        working_beta=working.beta,
        sigma2=working.sigma2,
        root=found.natural @ variances.root,
        theta=factors.blocks.theta(variances.root),
        variances=variances,
        summary=summary,
    )
