"""New rows of a fit's groups, without a fit: which cells they touch, and the model on these alone.

The effects of a cluster of levels (of a group, with one factor) follow from its own rows, beta and
the variances (`inference.random_effects`). So the sums of the new rows by cell, added to those that
the fit has of the same clusters, are enough: no other group is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from dmixed import keys
from dmixed.bases import Coordinates
from dmixed.blocks import Column, Floats
from dmixed.cellmoments import CellMoments, join, without_totals
from dmixed.coordinates import coarsest_cells
from dmixed.design import Design, TermDesign
from dmixed.dispatch import gather, one_blas_thread
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.factors import Problem, factored
from dmixed.levels import Term
from dmixed.lookup import Lookup
from dmixed.moments import GroupMoments, combine
from dmixed.preparation import Outline, Prepared, group_key, named_errors, reference_levels


def refuse_new_levels(design: Design, new: CellMoments) -> None:
    """Refuse levels of a categorical covariate that the fit has no coefficient for."""
    for name, found in new.levels.items():
        known = set(design.levels[name])
        strange = [level for level in found.levels if level not in known]
        if strange:
            raise DataError(
                f"{name!r} has the level {strange[0]!r} in the new rows, which was not in the data "
                "of the fit: there is no coefficient for it; leave its rows out, or fit again"
            )


# --------------------------------------------------------------------------- the fit's cells


@dataclass(frozen=True, slots=True, eq=False)
class Touched:
    """Cells of a fit whose effects change with new rows.

    Attributes
    ----------
    cells
        their moments, without sums over all rows
    known
        (n,) whether the fit has the group of each cell of the new rows
    """

    cells: CellMoments
    known: NDArray[np.bool_]


def touched_cells(prepared: Prepared, labels: keys.Labels) -> Touched:
    """Cells of a fit that share a level with some cells, directly or through others.

    Parameters
    ----------
    labels
        of n cells, all keys of the model
    """
    moments = prepared.moments
    if isinstance(moments, RemoteMoments):
        parts = gather(moments.client, moments.each(_cells_of_shard, queries=labels))
        met = [part for part in parts if part.n_cells]
        found = join(met) if met else parts[0]
        return Touched(found, keys.lookup(found.labels, labels) >= 0)
    group = group_key(prepared.design)
    relations = [(group, prepared.group_codes, prepared.groups)]
    if len(labels.names) > 1:
        terms = zip(prepared.terms, prepared.problem.terms, prepared.levels, strict=True)
        relations += [(list(own.key), term.codes, levels) for own, term, levels in terms]
    met_levels = []
    for key, _, levels in relations:
        own = keys.subset(labels, key)[1]
        places = keys.lookup_few(levels, own)
        met_levels.append(np.zeros(len(levels) + 1, np.bool_))  # the last: no level
        met_levels[-1][places] = True
        met_levels[-1][-1] = False
    cells = _linked([codes for _, codes, _ in relations], met_levels)
    codes, own = keys.subset(labels, group)
    known = keys.lookup_few(prepared.groups, own)[codes] >= 0
    return Touched(_alone(moments, cells), known)


def _linked(
    codes: Sequence[NDArray[np.intp]], met: Sequence[NDArray[np.bool_]]
) -> NDArray[np.intp]:
    """Cells that have a level among those met, or share one with such a cell, and so on.

    Parameters
    ----------
    codes
        per factor, (N,) level of each cell, -1 for none
    met
        per factor, (L + 1,) whether a level is met; the last is none, and False
    """
    while True:
        cells = np.zeros(len(codes[0]), np.bool_)
        for own, levels in zip(codes, met, strict=True):
            cells |= levels[own]
        found, grown = np.flatnonzero(cells), False
        for own, levels in zip(codes, met, strict=True):
            there = own[found]
            there = there[there >= 0]
            grown |= not levels[there].all()
            levels[there] = True
        if not grown:
            return found


def _alone(moments: CellMoments, cells: NDArray[np.intp]) -> CellMoments:
    found = moments.take(cells)
    return replace(found, group=without_totals(found.group), dropped={})


@one_blas_thread
def _cells_of_shard(moments: CellMoments, *, queries: keys.Labels) -> CellMoments:
    """Cells of a shard that are among some; there is one factor, and each stands for itself."""
    places = keys.lookup_few(moments.labels, queries)
    return _alone(moments, np.sort(places[places >= 0]))


def refuse_crossed(design: Design) -> None:
    """Refuse factors that are not nested in one by their formula: no rows are a group's own."""
    every = [set(term.key) for term in design.terms]
    if not any(all(key <= other for other in every) for key in every):
        names = design.spec.group
        shown = dict.fromkeys(":".join(names[k] for k in term.key) for term in design.terms)
        raise NotSupportedError(
            f'combine="replace" needs groups with rows of their own, but the factors '
            f"{', '.join(shown)} are crossed, so that rows of one level tell of those of others "
            'too: use combine="add", or write nested factors as (1 | a/b)'
        )


# --------------------------------------------------------------------------- the model on cells


@one_blas_thread
def prepare_cells(outline: Outline, parts: Sequence[CellMoments]) -> Prepared:
    """A fit's model on some cells alone, in the fit's own coordinates.

    Of its sums over all rows (`Problem.factors`: Fw, within, total and others) it has the fit's.

    Parameters
    ----------
    outline
        see `Prepared.outline`
    parts
        moments of disjoint rows, the first by the fit's own specification (it may have no cell);
        together they hold all rows of every cluster of levels in them

    Raises
    ------
    NotSupportedError
        crossed factors with more levels than dense algebra can take
    """
    labels, positions = keys.align([part.labels for part in parts])
    group = combine([part.group for part in parts], positions, len(labels))
    moments = replace(parts[0], labels=labels, group=group, sizes=())
    design, whole = outline.design, outline.problem
    group_codes, groups = keys.subset(labels, group_key(design))
    terms, levels = [], []
    for own, term in zip(outline.terms, whole.terms, strict=True):
        T = _random_columns(design, whole, own, term, group)
        codes, found = keys.subset(labels, own.key)
        left_out = reference_levels(labels, own.reduced, group_codes)
        codes = np.where(left_out, -1, codes) if left_out is not None else codes
        terms.append(Term(term.block, T, codes, len(found), term.repeated))
        levels.append(found)
    model = Coordinates(
        whole.fixed,
        whole.response,
        whole.natural,
        whole.factors.blocks,
        tuple(terms),
        _columns_of_model(design, whole, group),
    )
    with named_errors(outline.bars, terms):
        held = factored(group, model)
    factors = replace(whole.factors, parts=held, evaluated=held, elsewhere=None, first=None)
    return Prepared(
        moments,
        design,
        outline.bars,
        outline.terms,
        tuple(levels),
        groups,
        group_codes,
        replace(whole, terms=model.terms, factors=factors),
    )


def _placed(columns: Sequence[Column], known: Sequence[Column], T: Floats) -> Floats:
    """Rows of T (k, ...), of some carried columns, at the places of others; zero where missing."""
    found = np.zeros((len(columns), *T.shape[1:]))
    place = {column: i for i, column in enumerate(columns)}
    met = [i for i, column in enumerate(known) if column in place]
    found[[place[known[i]] for i in met]] = T[met]
    return found


def _all_met(design: Design, group: GroupMoments) -> bool:
    """Whether the fit has all columns of some cells.

    Then its own coefficients in working coordinates serve. They are written in those combinations
    of categories that the fit has met, and say nothing of rows of others.
    """
    return set(group.columns) <= set(design.columns)


def _columns_of_model(design: Design, whole: Problem, group: GroupMoments) -> Floats:
    """[X y] (k, p + 1) in working coordinates from the columns of some cells."""
    columns, fixed, response = group.columns, whole.fixed, whole.response
    if _all_met(design, group):
        work = np.column_stack([fixed.work, response.work])
        return _placed(columns, design.columns, coarsest_cells(design.columns, work))
    p = len(design.fixed_names)
    every = (*design.columns, *design.unmet)
    T = np.vstack([design.T_fixed, design.T_unmet[:, :p]])[:, list(fixed.kept)]
    X = _placed(columns, every, solve_triangular(fixed.to_work, T.T, trans="T").T)
    y = (_placed(columns, design.columns, design.t_response) - X @ response.beta) / response.scale
    return group.coded(np.column_stack([X, y]))


def _random_columns(
    design: Design, whole: Problem, own: TermDesign, term: Term, group: GroupMoments
) -> Floats:
    """Columns (k, c) of a random term in natural coordinates from the columns of some cells.

    Combinations of levels without rows in the fit have no part in them: a bar with one would have
    dependent columns, which the fit refuses.
    """
    if _all_met(design, group):
        return _placed(group.columns, design.columns, term.T)
    block = whole.factors.blocks.slices[term.block]
    T = _placed(group.columns, design.columns, own.T)
    natural = whole.natural[block, block]
    T = T / natural[0, 0] if term.repeated else T @ np.linalg.inv(natural)
    return group.coded(T)


# --------------------------------------------------------------------------- lookups


def updated_lookup(fit: Lookup, touched: keys.Labels, own: Lookup) -> Lookup:
    """Lookup of a fit in which the levels of some of its cells are replaced."""
    return Lookup.concatenate([fit.without(touched), own])
