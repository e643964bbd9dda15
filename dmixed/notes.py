"""What a reader should know of a fit, as sentences for its summary."""

from __future__ import annotations

import numpy as np

from dmixed.fitting import Estimates
from dmixed.inference.random_effects import n_effects
from dmixed.preparation import Prepared
from dmixed.summary import few_rows, held_at_zero

NOTABLE = 1e-6
"""Rounding of the criterion, deviance units, that a summary mentions."""

GIANT = 0.2
"""Share of the rows in one group that a summary mentions, where there are many groups."""


def fit_notes(prepared: Prepared, estimates: Estimates) -> tuple[str, ...]:
    """Sentences on rows that are too few, and on parameters that were held."""
    problem = prepared.problem
    blocks = problem.factors.blocks
    effects = sum(n_effects(problem, j) * size for j, size in enumerate(blocks.sizes))
    notes = list(few_rows(prepared.nobs, effects, problem.factors.p))
    notes += giant_group(prepared)
    notes += [held_at_zero(prepared.bars[j].text) for j in blocks.held]
    held = [
        name
        for name, free in zip(
            prepared.fixed_names,
            np.ones(len(estimates.beta), bool)
            if estimates.free_beta is None
            else estimates.free_beta,
            strict=True,
        )
        if not free
    ]
    pairs = 0 if estimates.free_pairs is None else int((~estimates.free_pairs).sum())
    if held or pairs:
        what = [f"fixed effects {', '.join(held)}"] * bool(held)
        what += [f"{pairs} covariance parameter(s)"] * bool(pairs)
        notes.append(f"Held at their starting values: {' and '.join(what)}.")
    if estimates.shrunk is not None and estimates.shrunk.any():
        zero = [n for n, z in zip(prepared.fixed_names, estimates.shrunk, strict=True) if z]
        notes.append(f"Fixed effects that the penalty has put to zero: {', '.join(zero)}.")
    notes += _digits_lost(estimates)
    return tuple(notes)


def _digits_lost(estimates: Estimates) -> tuple[str, ...]:
    """Say so where rounding reaches what is printed of the log-likelihood."""
    proof = estimates.summary.certificate
    if not proof.rounding > NOTABLE:
        return ()
    return (
        f"The log-likelihood is uncertain by about {0.5 * proof.rounding:.1g}: "
        f"{proof.digits_lost:.0f} of its 16 digits were lost to rounding, because columns are "
        "nearly dependent, or effects are far larger than the noise.",
    )


def giant_group(prepared: Prepared) -> list[str]:
    """Whether one of many groups has a large share of the rows."""
    _, largest, _ = prepared.group_sizes
    share = largest / prepared.nobs
    if share < GIANT or prepared.n_groups * GIANT < 1.0:
        return []
    return [
        f"One group has {share:.0%} of the rows. That does no harm to the estimates; see whether "
        "its key stands for missing ones."
    ]
