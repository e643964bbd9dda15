"""Fits with parameters held, and with penalties.

Where whole independent blocks of the covariance are free or held, the blocks become blocks of
Psi of their own and the exact Newton method runs as always. Everything else is left to `smooth`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dmixed.covariance import Blocks
from dmixed.dispatch import in_threads, one_blas_thread
from dmixed.factors import Problem, problem
from dmixed.fitting import (
    Estimates,
    Search,
    check_degrees_of_freedom,
    criterion_at,
    estimates_at,
    find_optimum,
    psd_root,
)
from dmixed.held import Held, Penalties, Piece, pieces
from dmixed.inference.variances import VarianceEstimates, variance_estimates
from dmixed.levels import Term
from dmixed.likelihood import degrees_of_freedom
from dmixed.preparation import Prepared
from dmixed.smooth import fit_smooth


def fit_constrained(
    prepared: Prepared,
    reml: bool,
    search: Search,
    held: Held,
    penalties: Penalties | None = None,
) -> Estimates:
    """Estimate the free parameters, the others where ``held`` has them.

    Raises
    ------
    DataError
        a held covariance is not positive semi-definite, or the model cannot be fitted
    """
    check_degrees_of_freedom(prepared, reml)
    penalties = penalties or Penalties()
    psd_root(held.Psi)
    parts = pieces(prepared.problem.factors.blocks, held)
    simple = held.free_beta.all() and not penalties and all(p.kind != "mixed" for p in parts)
    with one_blas_thread:
        if simple:
            found = _fit_pieces(prepared, reml, search, held, parts)
        else:
            found = fit_smooth(prepared, reml, search, held, penalties, parts)
    return replace(
        found,
        free_beta=held.free_beta,
        free_pairs=held.free_pairs,
        penalised=bool(penalties),
    )


# --------------------------------------------------------------- whole pieces free or held


def _fit_pieces(
    prepared: Prepared, reml: bool, search: Search, held: Held, parts: list[Piece]
) -> Estimates:
    split = _split(prepared, parts)
    blocks = split.factors.blocks
    kept = blocks.join(
        [
            split.natural[where, where] @ psd_root(held.Psi[np.ix_(p.columns, p.columns)])
            if p.kind == "held"
            else np.zeros((len(p.columns),) * 2)
            for p, where in zip(parts, blocks.slices, strict=True)
        ]
    )
    if search.start is not None:
        order = [c for p in parts for c in p.columns]
        search = replace(search, start=search.start[np.ix_(order, order)])
    found = find_optimum(prepared, split, reml, search, kept)
    df = degrees_of_freedom(split.factors, reml)
    sigma2 = float((found.at.chol[-1, -1] * split.factors.y_scale) ** 2 / df)
    own = variance_estimates(blocks, found.at, found.root, split.natural, sigma2, df)
    variances = _joined(prepared.problem.factors.blocks, blocks, own, parts)
    Psi = variances.Psi
    at = criterion_at(prepared, Psi, reml)
    root = prepared.problem.natural @ variances.root
    return estimates_at(prepared, reml, at, root, variances, found.summary)


def _split(prepared: Prepared, parts: list[Piece]) -> Problem:
    """The same model with every piece a block of its own; held pieces do not move."""
    whole = prepared.problem
    blocks = whole.factors.blocks
    terms = []
    for j, part in enumerate(parts):
        where = blocks.slices[part.block]
        N = whole.natural[where, where]
        own = [c - where.start for c in part.columns]
        for term in (t for t in whole.terms if t.block == part.block):
            T = term.T * N[0, 0] if term.repeated else (term.T @ N)[:, own]
            terms.append(Term(j, T, term.codes, term.n_levels, term.repeated))
    moments, design = prepared.here.group, prepared.design
    exog, endog = moments.coded(design.T_fixed), moments.coded(design.t_response)
    found = problem(moments, exog, endog, terms, prepared.here.shards, in_threads)
    still = tuple(j for j, part in enumerate(parts) if part.kind == "held")
    moving = Blocks(found.factors.blocks.sizes, tuple(sorted({*found.factors.blocks.held, *still})))
    return replace(found, factors=replace(found.factors, blocks=moving))


def _joined(
    blocks: Blocks, split: Blocks, own: VarianceEstimates, parts: list[Piece]
) -> VarianceEstimates:
    """Estimates of pieces as estimates of the blocks they came from; NaN where held."""
    order = np.array([c for p in parts for c in p.columns], dtype=np.intp)
    root, zero = np.zeros((blocks.q, blocks.q)), np.zeros(blocks.q, dtype=np.bool_)
    root[np.ix_(order, order)] = own.root
    free = [c for p in parts if p.kind == "free" for c in p.columns]
    zero[order] = own.zero
    zero &= np.isin(np.arange(blocks.q), free)
    place = {pair: x for x, pair in enumerate(blocks.pairs)}
    where = [place[max(order[a], order[b]), min(order[a], order[b])] for a, b in split.pairs]
    m = len(blocks.pairs)
    cov_ratio, cov_user = np.full((m, m), np.nan), np.full((m + 1, m + 1), np.nan)
    cov_ratio[np.ix_(where, where)] = own.cov_ratio
    where = [*where, m]
    cov_user[np.ix_(where, where)] = own.cov_user
    return VarianceEstimates(root @ root.T, root, tuple(zero.tolist()), cov_ratio, cov_user)
