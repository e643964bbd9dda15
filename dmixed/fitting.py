"""From a prepared model to estimates: ``start`` -> ``optimize`` -> ``estimate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Floats
from dmixed.covariance import root_derivatives
from dmixed.dispatch import one_blas_thread
from dmixed.errors import DataError
from dmixed.evaluation import Evaluator
from dmixed.factors import Factors, Problem
from dmixed.inference.joint import beta_slope
from dmixed.inference.variances import VarianceEstimates, variance_estimates
from dmixed.likelihood import (
    Criterion,
    criterion,
    degrees_of_freedom,
    fixed_estimates,
    scoring_step,
    within_variance,
)
from dmixed.optimizer import (
    Objective,
    OptimizeSummary,
    Step,
    flat_bars,
    identity_root,
    optimize,
    starting_root,
    zero_blocks,
)
from dmixed.preparation import Prepared

UNRESOLVED = 1.0
"""Rounding error of the criterion, deviance units, above which no estimate means anything."""

FEW_ROWS = 200
"""Rows below which a singular optimum is checked from a second start, whatever its shape."""


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
        (p,), (p, p); NaN in the covariance where an effect was held
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
    beta_slope
        (p, m): derivative of beta along the entries of Psi
    free_beta, free_pairs
        (p,), (m,) which fixed effects and entries of Psi were estimated; None: all
    shrunk
        (p,) fixed effects that a penalty has put to zero; None: none was
    penalised
        the likelihood was penalised
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
    beta_slope: Floats
    free_beta: np.ndarray | None = None
    free_pairs: np.ndarray | None = None
    shrunk: np.ndarray | None = None
    penalised: bool = False

    @property
    def n_free(self) -> int:
        """Estimated parameters, sigma2 included."""
        beta = len(self.beta) if self.free_beta is None else int(self.free_beta.sum())
        beta -= 0 if self.shrunk is None else int(self.shrunk.sum())
        pairs = len(self.variances.cov_ratio)
        return 1 + beta + (pairs if self.free_pairs is None else int(self.free_pairs.sum()))


@dataclass(frozen=True, slots=True)
class Search:
    """How to look for the optimum.

    Attributes
    ----------
    method
        None for Newton, or the name of a method of `scipy.optimize.minimize`
    options
        for that method
    start
        (q, q) relative covariance Psi to start from, user units, or None
    callback
        called with number and `Step` of each evaluation
    """

    method: str | None = None
    options: Mapping[str, Any] | None = None
    start: Floats | None = None
    callback: Callable[[int, Step], None] | None = None


@dataclass(frozen=True, slots=True)
class Optimum:
    """Where the search ended: a root of Psi (natural coordinates) and the criterion there."""

    root: Floats
    summary: OptimizeSummary
    at: Criterion
    objective: Objective


def psd_root(Psi: Floats) -> Floats:
    """A root R with R R' = Psi, of any positive semi-definite matrix.

    Raises
    ------
    DataError
        Psi has a negative eigenvalue, or is not finite
    """
    if not np.isfinite(Psi).all():
        raise DataError("a covariance matrix must hold finite numbers")
    w, V = np.linalg.eigh(0.5 * (Psi + Psi.T))
    if len(w) and w[0] < -1e-10 * max(float(w[-1]), np.finfo(float).tiny):
        raise DataError(
            f"a covariance matrix is not positive semi-definite: smallest eigenvalue {w[0]:g}"
        )
    return np.asarray(V * np.sqrt(np.maximum(w, 0.0)))


def natural_root(problem: Problem, Psi: Floats) -> Floats:
    """Root (q, q) in natural coordinates of a relative covariance in user units."""
    blocks = problem.factors.blocks
    return problem.natural @ blocks.join([psd_root(part) for part in blocks.split(Psi)])


@one_blas_thread
def criterion_at(prepared: Prepared, Psi: Floats, reml: bool, order: int = 2) -> Criterion:
    """The criterion, natural coordinates, at a relative covariance Psi (q, q) in user units.

    With order 0 it has no derivatives.

    Raises
    ------
    DataError
        Psi is not positive semi-definite, or the response has no residual variance there
    """
    problem = prepared.problem
    terms = Evaluator(problem.factors)(natural_root(problem, Psi), order)
    try:
        return criterion(problem.factors, terms, reml)
    except np.linalg.LinAlgError:
        raise DataError(_exact(prepared)) from None


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


def fit(prepared: Prepared, reml: bool = True, search: Search | None = None) -> Estimates:
    """Estimate by REML or ML.

    Raises
    ------
    DataError
        too few rows, a response without residual variance, or a variance that the data do not
        determine
    """
    check_degrees_of_freedom(prepared, reml)
    search = search or Search()
    with one_blas_thread:
        found = find_optimum(prepared, prepared.problem, reml, search)
        _check_identified(prepared, found)
        if found.at.lost > UNRESOLVED:
            raise DataError(_exact(prepared))
        return _estimates(prepared, reml, found)


def check_degrees_of_freedom(prepared: Prepared, reml: bool) -> None:
    """Refuse a model with as many fixed effects as rows."""
    factors = prepared.problem.factors
    if degrees_of_freedom(factors, reml) <= 0:
        raise DataError(
            f"{factors.nobs} rows are too few for {factors.p} fixed effects: "
            "no degree of freedom is left for the error variance"
        )


def find_optimum(
    prepared: Prepared, problem: Problem, reml: bool, search: Search, kept: Floats | None = None
) -> Optimum:
    """Minimise the criterion of a problem; ``kept`` (q, q) is the root of the held blocks.

    Where two or more terms end singular, or few rows do, there may be several minima: a second
    search starts elsewhere, and the lower certified optimum counts.
    """
    factors = problem.factors
    terms = Evaluator(factors)

    def objective() -> Objective:
        return Objective(
            terms,
            lambda found: criterion(factors, found, reml),
            factors.blocks,
            search.callback,
            kept,
        )

    try:
        found = _search(problem, reml, objective(), search)
        zero = zero_blocks(factors.blocks, found.root)
        if len(zero) >= 2 or (zero and factors.nobs <= FEW_ROWS):
            found = _checked(found, objective(), search)
    except np.linalg.LinAlgError:
        raise DataError(_exact(prepared)) from None
    return found


def _search(problem: Problem, reml: bool, objective: Objective, search: Search) -> Optimum:
    factors, sampled = problem.factors, 0
    if search.start is not None:
        start = natural_root(problem, search.start) * factors.blocks.moving + objective.held
    else:
        found = _of_a_sample(factors, reml, objective.kept)
        if found is None:
            start = _started(factors, objective)
        else:
            start, sampled = found
    root, summary, at = optimize(objective, start, search.method, search.options)
    return Optimum(root, replace(summary, sampled=sampled), at, objective)


def _started(factors: Factors, objective: Objective) -> Floats:
    sigma2 = within_variance(factors)
    return starting_root(objective, lambda at: scoring_step(factors, at, sigma2))


def _of_a_sample(factors: Factors, reml: bool, kept: Floats | None) -> tuple[Floats, int] | None:
    """Optimum of the first shard, and evaluations; None if it is no place to start from.

    An evaluation of a shard costs a fraction, and its optimum is off by what the estimates of a
    sample are: two Newton steps of the whole.
    """
    sample = factors.sample
    if sample is None or sample.nobs - sample.rank_random <= FEW_ROWS:
        return None
    terms = Evaluator(sample)
    own = Objective(terms, lambda found: criterion(sample, found, reml), sample.blocks, None, kept)
    try:
        root, summary, _ = optimize(own, _started(sample, own))
    except np.linalg.LinAlgError:
        return None
    if not summary.converged or zero_blocks(sample.blocks, root):
        return None  # from a variance of zero nothing leads back
    return root, summary.evaluations


def _checked(first: Optimum, objective: Objective, search: Search) -> Optimum:
    """The lower of a first optimum and one found from where everything is large."""
    large = 3.0 * identity_root(objective) - 2.0 * objective.held
    try:
        root, summary, at = optimize(objective, large, search.method, search.options)
    except np.linalg.LinAlgError:
        return first
    second = Optimum(root, summary, at, objective)
    best, other = (second, first) if _better(second, first) else (first, second)
    return replace(best, summary=replace(best.summary, checks=other.summary.evaluations))


def _better(new: Optimum, old: Optimum) -> bool:
    """Certified and lower, beyond rounding."""
    if new.summary.converged != old.summary.converged:
        return new.summary.converged
    return new.at.value < old.at.value - max(1e-9, old.at.lost)


def _exact(prepared: Prepared) -> str:
    return (
        f"the response {prepared.design.spec.formula.response_text!r} is, to rounding, an exact "
        "combination of the model's columns: its residual variance is lost among their digits; "
        "if one column dominates the response, subtract a known multiple of it with offset="
    )


def _check_identified(prepared: Prepared, found: Optimum) -> None:
    """Refuse a model whose likelihood is flat in the variances of a bar."""
    objective, blocks = found.objective, prepared.problem.factors.blocks
    flat = flat_bars(blocks, found.at, found.root)
    if any(flat):  # at zero, next to large variances, a curvature may look like none
        start = identity_root(objective)
        there = objective.at(start)
        if there is not None:
            flat = [a and b for a, b in zip(flat, flat_bars(blocks, there, start), strict=True)]
    for block, undetermined in enumerate(flat):
        if not undetermined:
            continue
        bar = prepared.bars[block]
        levels = max(prepared.problem.terms[i].n_levels for i in prepared.members(block))
        why = (
            "there is only one group"
            if levels == 1
            else "each group has a single row"
            if levels == prepared.moments.nobs
            else "the likelihood does not depend on it"
        )
        what = bar.text if bar.component is None else f"the component {bar.component!r}"
        raise DataError(
            f"the data do not determine the variance of {what}: {why}, so it cannot be told "
            "from the error variance or the fixed effects"
        )


def _estimates(prepared: Prepared, reml: bool, found: Optimum) -> Estimates:
    """User-unit estimates at an optimum."""
    problem, at = prepared.problem, found.at
    df = degrees_of_freedom(problem.factors, reml)
    working = fixed_estimates(problem.factors, at, reml)
    variances = variance_estimates(
        problem.factors.blocks, at, found.root, problem.natural, working.sigma2, df
    )
    return estimates_at(
        prepared, reml, at, problem.natural @ variances.root, variances, found.summary
    )


def estimates_at(
    prepared: Prepared,
    reml: bool,
    at: Criterion,
    root: Floats,
    variances: VarianceEstimates,
    summary: OptimizeSummary,
) -> Estimates:
    """Estimates from a criterion at a root (natural coordinates) and what is known of its Psi."""
    problem = prepared.problem
    factors, fixed = problem.factors, problem.fixed
    working = fixed_estimates(factors, at, reml)
    to_user = solve_triangular(fixed.to_work, np.eye(factors.p)) if factors.p else np.zeros((0, 0))
    return Estimates(
        reml=reml,
        value=at.value,
        beta=to_user @ (working.beta + problem.response.beta),
        cov_beta=to_user @ working.cov_beta @ to_user.T,
        working_beta=working.beta,
        sigma2=working.sigma2,
        root=root,
        theta=factors.blocks.theta(variances.root),
        variances=variances,
        summary=summary,
        beta_slope=beta_slope(problem, at),
    )
