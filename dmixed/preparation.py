"""From moments to a problem: levels of every random factor, and checks that it can be fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmixed import keys
from dmixed.bases import DependentColumns, coordinates
from dmixed.blocks import CONSTANT
from dmixed.cellmoments import CellMoments
from dmixed.design import BarDesign, Design, TermDesign
from dmixed.dispatch import in_threads, one_blas_thread
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteFactors, RemoteMoments, evaluated_here, remote_shards
from dmixed.factors import (
    Problem,
    Shard,
    assembled,
    problem,
)
from dmixed.levels import Index, Term, TooManyLevels
from dmixed.onelevel import OneLevel

MERGED = 2**26
"""Bytes of factors that are evaluated here although the groups are on workers."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A model on its moments, ready to be evaluated.

    Attributes
    ----------
    moments, design
        what was collected and learned
    bars
        bars and variance components in the order of the blocks of Psi: that of lme4 (factors
        with more levels first) for an lme4 formula, else as given
    terms
        random terms in the order of ``problem.terms``
    levels
        labels of the levels of each term
    groups, group_codes
        labels of the model's groups, and the group of each cell (N,)
    problem
        working coordinates and factors
    shards
        where the groups are on workers, futures of the `factors.Shard` of each
    """

    moments: CellMoments | RemoteMoments
    design: Design
    bars: tuple[BarDesign, ...]
    terms: tuple[TermDesign, ...]
    levels: tuple[keys.Labels, ...]
    groups: keys.Labels
    group_codes: Index
    problem: Problem
    shards: tuple[Any, ...] = ()

    @property
    def here(self) -> CellMoments:
        """The moments, if they are in this process.

        Raises
        ------
        NotSupportedError
            they are on the workers of a cluster
        """
        if isinstance(self.moments, CellMoments):
            return self.moments
        raise NotSupportedError(
            f"the {self.moments.n_cells:,} groups are on the workers of the cluster and do not "
            "come here one by one: write them with `ranef_table(out=...)` or "
            '`predict(data, groups=True, out=...)`, or fit with evaluate_on="driver"'
        )

    @property
    def outline(self) -> Outline:
        """What the workers need to make a `Prepared` of each shard."""
        factors = replace(self.problem.factors, parts=(), evaluated=(), elsewhere=None)
        problem = replace(self.problem, factors=factors)
        return Outline(self.design, self.bars, self.terms, problem)

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.moments.nobs

    @property
    def n_groups(self) -> int:
        """The model's groups."""
        if isinstance(self.moments, CellMoments):
            return len(self.groups)
        return self.moments.n_cells

    @property
    def group_sizes(self) -> tuple[int, int, float]:
        """Rows of the smallest and of the largest group, and their mean."""
        if isinstance(self.moments, CellMoments):
            sizes = np.bincount(self.group_codes, self.moments.group.counts, len(self.groups))
            return int(sizes.min()), int(sizes.max()), float(sizes.mean())
        totals = self.moments.summary.totals
        return totals.smallest, totals.largest, totals.nobs / totals.n_groups

    @property
    def aliased(self) -> tuple[str, ...]:
        """Names of the columns of X that depend on those before them."""
        kept = set(self.problem.fixed.kept)
        return tuple(n for j, n in enumerate(self.design.fixed_names) if j not in kept)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """Names of the p independent columns of X."""
        return tuple(self.design.fixed_names[j] for j in self.problem.fixed.kept)

    @property
    def k_re(self) -> int:
        """Columns of the bars."""
        return sum(len(bar.names) for bar in self.bars if bar.component is None)

    @property
    def k_vc(self) -> int:
        """Variance components."""
        return sum(bar.component is not None for bar in self.bars)

    def members(self, block: int) -> list[int]:
        """Positions of a block's terms."""
        return [i for i, term in enumerate(self.problem.terms) if term.block == block]


def check_rows(moments: CellMoments | RemoteMoments) -> None:
    """Refuse moments of no row."""
    if moments.nobs == 0:
        reasons = ", ".join(f"{n} rows for {reason!r}" for reason, n in moments.dropped.items())
        raise DataError(
            f"no row is left to fit: dropped {reasons}" if reasons else "the data have no rows"
        )


@one_blas_thread
def prepare(moments: CellMoments | RemoteMoments) -> Prepared:
    """Check what was collected and factor it.

    Raises
    ------
    DataError
        no rows, a constant response, or dependent columns in a random term
    NotSupportedError
        crossed factors with more levels than dense algebra can take
    """
    check_rows(moments)
    if isinstance(moments, RemoteMoments):
        return _remote(moments)
    summary, shards = moments.summary, moments.shards
    design = summary.design
    group_codes, groups = keys.subset(moments.labels, group_key(design))
    projected = [keys.subset(moments.labels, term.key) for term in design.terms]
    order = _block_order(design, [len(labels) for _, labels in projected])
    place = {bar: block for block, bar in enumerate(order)}
    ranked = sorted(range(len(design.terms)), key=lambda i: place[design.terms[i].block])
    terms = []
    for i in ranked:
        term, (codes, labels) = design.terms[i], projected[i]
        left_out = reference_levels(moments.labels, term.reduced, group_codes)
        terms.append(
            Term(
                block=place[term.block],
                T=moments.group.coded(term.T),
                codes=np.where(left_out, -1, codes) if left_out is not None else codes,
                n_levels=len(labels),
                repeated=_repeated(design, term),
            )
        )
    bars = tuple(design.bars[j] for j in order)
    _check_single_rows(moments, bars, terms)
    exog, endog = moments.group.coded(design.T_fixed), moments.group.coded(design.t_response)
    with named_errors(bars, terms):
        found = problem(
            *(moments.group, exog, endog, terms, shards, in_threads),
            sampled=bool(moments.sizes),
            totals=summary.totals,
        )
    _check_response(design, found)
    return Prepared(
        moments,
        design,
        bars,
        tuple(design.terms[i] for i in ranked),
        tuple(projected[i][1] for i in ranked),
        groups,
        group_codes,
        found,
    )


def _remote(moments: RemoteMoments) -> Prepared:
    """Of shards on the workers: they factor their groups, the sums over groups come here."""
    design, totals = moments.summary.design, moments.summary.totals
    order = _block_order(design, [totals.n_groups] * len(design.terms))
    place = {bar: block for block, bar in enumerate(order)}
    ranked = sorted(range(len(design.terms)), key=lambda i: place[design.terms[i].block])
    nowhere = np.empty(0, np.intp)
    terms = [
        Term(
            place[design.terms[i].block], totals.coded(design.terms[i].T), nowhere, totals.n_groups
        )
        for i in ranked
    ]
    bars = tuple(design.bars[j] for j in order)
    with named_errors(bars, terms):
        exog, endog = totals.coded(design.T_fixed), totals.coded(design.t_response)
        model = coordinates(totals, exog, endog, terms)
        futures, facts = remote_shards(moments, model)
    explained = [fact.within for fact in facts]
    elsewhere: RemoteFactors | None = RemoteFactors(futures, moments.client)
    evaluated: tuple[OneLevel, ...] = ()
    if sum(fact.nbytes for fact in facts) <= MERGED:
        elsewhere, evaluated = None, evaluated_here(moments.client, futures)
    found = assembled(totals, model, (), explained, evaluated=evaluated, sampled=True)
    found = replace(found, factors=replace(found.factors, elsewhere=elsewhere))
    _check_response(design, found)
    none = moments.no_labels()
    return Prepared(
        moments,
        design,
        bars,
        tuple(design.terms[i] for i in ranked),
        tuple(none.columns(design.terms[i].key) for i in ranked),
        none.columns(group_key(design)),
        nowhere,
        found,
        futures,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What is the same for every shard of a model, see `Prepared`."""

    design: Design
    bars: tuple[BarDesign, ...]
    terms: tuple[TermDesign, ...]
    problem: Problem

    def of(self, moments: CellMoments, shard: Shard) -> Prepared:
        """The model on the groups of one shard, in the coordinates of all."""
        codes = np.arange(moments.n_cells)
        whole, labels = self.problem, moments.labels
        terms = tuple(replace(t, codes=codes, n_levels=moments.n_cells) for t in whole.terms)
        factors = replace(
            whole.factors, parts=(shard.part,), evaluated=(shard.evaluated,), elsewhere=None
        )
        return Prepared(
            moments,
            self.design,
            self.bars,
            self.terms,
            tuple(labels.columns(term.key) for term in self.terms),
            labels.columns(group_key(self.design)),
            codes,
            replace(whole, terms=terms, factors=factors),
        )


def group_key(design: Design) -> list[int]:
    """Positions of the keys of the model's groups."""
    names = [key.name for key in design.spec.keys]
    return [names.index(name) for name in design.spec.formula.groups]


def _check_response(design: Design, found: Problem) -> None:
    total = float(found.factors.total[-1]) if found.response.scale > 0 else 0.0
    if total <= 0.0:
        raise DataError(
            f"the response {design.spec.formula.response_text!r} is constant: "
            "there is no variance to explain"
        )


def _check_single_rows(
    moments: CellMoments, bars: Sequence[BarDesign], terms: Sequence[Term]
) -> None:
    """Refuse an intercept per row beside other factors: it is the error under another name."""
    if len(bars) == 1 or moments.spec.weights is not None:
        return  # alone it is found by its flat likelihood; weights tell the two apart
    constant = moments.group.columns.index(CONSTANT)
    for term in terms:
        others = np.delete(term.T, constant, axis=0)
        if term.n_levels == moments.nobs and term.T.shape[1] == 1 and not others.any():
            bar = bars[term.block]
            what = bar.text if bar.component is None else f"the component {bar.component!r}"
            raise DataError(
                f"each level of {what} has a single row: its variance cannot be told from the "
                "error variance; leave it out"
            )


def _block_order(design: Design, n_levels: Sequence[int]) -> list[int]:
    """Bars in the order of lme4, or as given where there are variance components."""
    bars = list(range(len(design.bars)))
    if any(bar.component is not None for bar in design.bars):
        return bars
    levels = {term.block: n for term, n in zip(design.terms, n_levels, strict=True)}
    return sorted(bars, key=lambda j: -levels[j])


def _repeated(design: Design, term: TermDesign) -> bool:
    """Whether a term's columns, or another's of its component, share one variance."""
    if design.bars[term.block].component is None:
        return False
    members = [t for t in design.terms if t.block == term.block]
    return len(members) > 1 or term.T.shape[1] > 1 or bool(term.reduced)


def reference_levels(
    labels: keys.Labels, reduced: Sequence[int], group_codes: Index
) -> np.ndarray | None:
    """Cells whose level of a factor coded by contrasts is the first one met in their group."""
    out = None
    for position in reduced:
        codes, levels = keys.subset(labels, [position])
        rank = np.empty(len(levels), np.intp)
        rank[keys.sort_index(levels)] = np.arange(len(levels))
        own = rank[codes]
        first = np.full(int(group_codes.max(initial=-1)) + 1, len(levels), np.intp)
        np.minimum.at(first, group_codes, own)
        is_first = own == first[group_codes]
        out = is_first if out is None else out | is_first
    return out


@contextmanager
def named_errors(bars: Sequence[BarDesign], terms: Sequence[Term]) -> Iterator[None]:
    """Errors of the core, in the words of the formula."""
    try:
        yield
    except DependentColumns as err:
        bar = bars[err.block]
        if bar.component is not None:
            raise DataError(
                f"all columns of the variance component {bar.component!r} are zero: leave it out"
            ) from None
        raise DataError(
            f"in {bar.text} the column {bar.names[err.column]!r} is a linear combination of the "
            "others (or zero): its variance cannot be told from theirs; leave it out"
        ) from None
    except TooManyLevels as err:
        factors = ", ".join(
            f"{bar.label} ({term.n_levels:,} levels)"
            for bar, term in ((bars[term.block], term) for term in terms)
        )
        raise NotSupportedError(
            f"the factors {factors} are linked with each other through the data, so that "
            f"{err.columns:,} random effects have to be solved for together, beyond the one "
            "factor that is eliminated level by level; that is done by dense algebra, which "
            "ends at some thousands. Leave out a crossed factor, or make it a fixed effect"
        ) from None
