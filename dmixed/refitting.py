"""A fit that begins where the one before ended, and whether it would have stayed there."""

from __future__ import annotations

from dataclasses import replace

from dmixed.blocks import Floats
from dmixed.collected import MomentsModel
from dmixed.fitting import Estimates, Search, criterion_at, natural_root
from dmixed.held import Penalties
from dmixed.inference.score import ScoreTest, score_test
from dmixed.optimizer import zero_blocks
from dmixed.preparation import Prepared
from dmixed.progress import Report
from dmixed.published import Version


def labels_of(prepared: Prepared) -> tuple[str, ...]:
    """Of the random columns, in the order of Psi."""
    found = []
    for bar in prepared.bars:
        names = bar.names if bar.component is None else (bar.label,)
        found += [f"{bar.label}: {name}" for name in names]
    return tuple(found)


def known_covariance(before: Version, prepared: Prepared) -> Floats | None:
    """The relative covariance (q, q) of a version, if it is of the same random columns."""
    q = prepared.problem.factors.blocks.q
    if before.labels != labels_of(prepared) or before.Psi.shape != (q, q):
        return None
    return before.Psi


def covariance_test(prepared: Prepared, Psi: Floats, reml: bool) -> ScoreTest:
    """Test of a covariance on the rows of a model."""
    problem = prepared.problem
    at = criterion_at(prepared, Psi, reml)
    return score_test(problem.factors, at, natural_root(problem, Psi), reml)


def fitted_from(model: MomentsModel, reml: bool, Psi: Floats | None, report: Report) -> Estimates:
    """Estimates, searched for from a covariance; from anew if that leads nowhere.

    From a variance of zero nothing leads back: then the search begins anew as well.
    """
    report.stage("fit")
    search = Search(callback=report.watch())
    problem = model._prepared.problem
    if Psi is not None:
        root = natural_root(problem, Psi)
        if not zero_blocks(problem.factors.blocks, root):
            found = model._fit(reml, replace(search, start=Psi), None, None, True, Penalties())
            if found.summary.converged:
                report.fitted(found.summary)
                return found
    found = model._fit(reml, search, None, None, True, Penalties())
    report.fitted(found.summary)
    return found
