"""From moments to what the likelihood is evaluated on, subtracting early or never.

With one grouping factor each group's W is reduced to ``R`` with R'R = WtW and ``T = Q'F``
(W = Q R, Q never formed), and what no group's W explains to one matrix ``F_w``. Moments are
first centred within each group, so that group means cancel before, not after, products are
taken. With several factors the moments of cells are put together in `levels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from operator import add
from typing import Any, Protocol, TypeAlias

import numpy as np

from dmixed.bases import Coordinates, coordinates
from dmixed.blocks import Floats
from dmixed.coordinates import Basis, Response
from dmixed.covariance import Blocks
from dmixed.levels import Cells, Term, buckets, leaves_are_cells
from dmixed.moments import GroupMoments, Totals
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS, OneLevel, merged, one_level_terms
from dmixed.products import gram
from dmixed.terms import ProfileTerms
from dmixed.whitening import matrix, original

Each: TypeAlias = Callable[[Callable[[GroupMoments], Any], Iterable[GroupMoments]], Iterable[Any]]

SAMPLED = 8
"""Shards from which the first is a small sample, to start from."""

PIVOT = 1e-14
"""A pivot below this fraction of the uncentred second moment is a zero row of R (n_g < q)."""


NOTHING = 1e-28
"""What is below this fraction of a sum of squares is none of its digits."""


class Elsewhere(Protocol):
    """Groups that are not in this process."""

    def terms(self, blocks: Blocks, root: Floats, order: int) -> ProfileTerms:
        """Terms of all groups at Psi = root root' (q, q), up to derivatives of an order."""

    def first(self) -> Elsewhere:
        """The groups of the first shard alone."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A model in working coordinates; all that the likelihood needs. k = p + 1, F = [X y].

    Attributes
    ----------
    blocks
        sizes of the blocks of Psi, q in all
    parts
        what the groups hold: `OneLevel` factors, or `Bucket` after bucket of clusters
    evaluated
        what has the same sums as the parts, in the same order, and is as short or shorter
    Fw
        (k, k): what the parts leave of F'F
    within
        (k, k): cross-products of F outside the span of the random columns of every cell
    rank_random
        dimension of that span
    nobs
        rows
    stored
        (k,): diagonal of F'F, the size of what was summed (for the error estimate): about the
        references, if there are any
    total
        (k,): diagonal of F'F about zero, for recoded columns of what they were made of
    log_jacobian
        log|det| of the user's X columns in the working ones
    y_scale
        units of y per unit of the working response
    log_weights
        sum of log weights
    elsewhere
        what evaluates the groups where they are, if they are not here: then there are no parts
    first
        rows of the first shard, and the dimension of the span of its random columns, where there
        are shards enough that it is a small sample of the groups; else None
    """

    blocks: Blocks
    parts: tuple[OneLevel | Bucket, ...]
    evaluated: tuple[OneLevel | Bucket, ...]
    Fw: Floats
    within: Floats
    rank_random: int
    nobs: int
    stored: Floats
    total: Floats
    log_jacobian: float
    y_scale: float
    log_weights: float
    elsewhere: Elsewhere | None = None
    first: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        k = len(self.Fw)
        assert self.Fw.shape == self.within.shape == (k, k)
        assert self.stored.shape == self.total.shape == (k,)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return len(self.Fw) - 1

    @property
    def sample(self) -> Factors | None:
        """The model on the groups of the first shard, about; None if there are few shards.

        A shard is a random sample of the groups, but F'F is known in total only: what groups do
        not explain of it is taken to be the shard's share.
        """
        if self.first is None:
            return None
        nobs, rank = self.first
        share = (nobs - rank) / max(self.nobs - self.rank_random, 1)
        return replace(
            self,
            parts=(),
            evaluated=self.evaluated[:1],
            Fw=self.Fw * share,
            within=self.within * share,
            rank_random=rank,
            nobs=nobs,
            stored=self.stored * nobs / self.nobs,
            total=self.total * nobs / self.nobs,
            elsewhere=None if self.elsewhere is None else self.elsewhere.first(),
            first=None,
        )


@dataclass(frozen=True, slots=True)
class Within:
    """What some cells explain of the carried columns; adds.

    Attributes
    ----------
    block
        (r, k): WtF summed over the cells
    taken
        (k, k): cross-products in the span of the random columns, about the references
    rank
        dimension of that span
    nobs
        rows
    """

    block: Floats
    taken: Floats
    rank: int
    nobs: int

    def __add__(self, other: Within) -> Within:
        """Of both sets of cells."""
        names = [field.name for field in fields(self)]
        return Within(*(getattr(self, name) + getattr(other, name) for name in names))


def _centred(moments: GroupMoments, start: int, stop: int) -> tuple[Floats, Floats, Within]:
    """R (r, r, g) upper and T (r, k, g) of neighbouring groups, which are centred first.

    References cancel where groups are centred; only means know of them. The constant is the first
    random column.
    """
    random = list(moments.random)
    WtF = np.ascontiguousarray(np.moveaxis(moments.WtF[start:stop], 0, -1))  # (r, k, g)
    r, k, g = WtF.shape
    n = WtF[0, random[0]]  # sum of the weights of each group
    s = WtF[0]
    R, T = np.zeros((r, r, g)), np.empty((r, k, g))
    root = np.sqrt(n)
    sums = s / root
    T[0] = sums
    if moments.reference is not None:
        T[0] += moments.reference[start:stop].T * root
    R[0] = T[0, random]
    taken = gram(sums)
    for a in range(1, r):
        column = random[a]
        T[a] = WtF[a] - s[column] / n * s
        for t in range(1, a):
            T[a] -= R[t, a] * T[t]
        pivot = T[a, column].copy()
        ok = pivot > PIVOT * WtF[a, column]
        inverse = np.divide(1.0, np.sqrt(np.where(ok, pivot, 1.0)), where=ok, out=np.zeros(g))
        T[a] *= inverse
        R[a, a:] = T[a, random[a:]]
        taken += gram(T[a])
    rank = int(np.count_nonzero(np.einsum("aag->ag", R)))
    rows = int(moments.counts[start:stop].sum())
    return R, T, Within(WtF.sum(axis=2), taken, rank, rows)


def _within(moments: GroupMoments) -> Within:
    """Of all groups."""
    return reduce(add, (_centred(moments, a, b)[2] for a, b in _chunks(moments.n_groups)))


def _chunks(n_groups: int) -> Iterator[tuple[int, int]]:
    """Neighbouring groups that the processor's cache holds."""
    for start in range(0, max(n_groups, 1), GROUPS):
        yield start, min(start + GROUPS, n_groups)


def _residual(totals: Totals, within: Within) -> Floats:
    """Cross-products (k, k) of the carried columns outside the span."""
    Fw = _consistent(totals.FtF, totals.random, within.block) - within.taken
    random = list(totals.random)
    Fw[random] = Fw[:, random] = 0.0  # they are in the span
    return Fw


def _consistent(FtF: Floats, random: tuple[int, ...], block: Floats) -> Floats:
    """FtF with its random rows replaced by the sum of WtF over groups (r, k).

    They are the same but for rounding: where groups are large the difference is systematic, and
    would be taken for residual variation.
    """
    found, rows = FtF.copy(), list(random)
    found[rows], found[:, rows] = block, block.T
    return found


@dataclass(frozen=True, slots=True)
class Problem:
    """One model on one set of moments, in working coordinates.

    Attributes
    ----------
    fixed, response
        coordinates of X and y
    natural
        (q, q), block diagonal: ``b_natural = natural b_user`` for the random effects, so that
        ``Psi_natural = natural Psi natural'``
    terms
        random terms with their columns in natural coordinates
    factors
        what is evaluated
    """

    fixed: Basis
    response: Response
    natural: Floats
    terms: tuple[Term, ...]
    factors: Factors

    @property
    def one_level(self) -> bool:
        """Whether there is one grouping factor, each group for itself."""
        parts = self.factors.parts
        return not parts or isinstance(parts[0], OneLevel)


@dataclass(frozen=True, slots=True)
class Shard:
    """Factors of groups of which each stands for itself.

    Attributes
    ----------
    part, evaluated
        see `Factors`
    within
        what the groups explain
    """

    part: OneLevel
    evaluated: OneLevel
    within: Within


def one_level(moments: GroupMoments, model: Coordinates) -> Shard:
    """Factors of some groups."""
    W = np.column_stack([term.T for term in model.terms])[list(moments.random)]
    r, q = len(W), W.shape[1]
    RT = np.empty((r, q + model.F.shape[1], moments.n_groups))
    found: Within | None = None
    for start, stop in _chunks(moments.n_groups):
        R, T, own = _centred(moments, start, stop)
        for a in range(r):
            RT[a, :q, start:stop] = np.dot(W.T, R[a])
            RT[a, q:, start:stop] = np.dot(model.F.T, T[a])
        found = own if found is None else found + own
    assert found is not None
    part = OneLevel(RT)
    return Shard(part, merged(part, q), found)


def factored(moments: GroupMoments, model: Coordinates) -> tuple[OneLevel | Bucket, ...]:
    """What some cells hold, in coordinates that others have decided; see `Factors.parts`.

    Only sums by cell are used, none over all rows.

    Raises
    ------
    levels.TooManyLevels
        factors are crossed in more levels than dense algebra can take
    """
    if _each_for_itself(model.terms, moments.n_groups):
        return (one_level(moments, model).part,)
    return _clusters(moments, model, _centred_cells(moments, model.terms))[0]


def problem(
    moments: GroupMoments,
    exog: Floats,
    endog: Floats,
    terms: Sequence[Term],
    shards: Sequence[GroupMoments] | None = None,
    each: Each = map,
    sampled: bool = False,
    totals: Totals | None = None,
) -> Problem:
    """Coordinates and factors of the model with these columns.

    Parameters
    ----------
    moments
        of the k carried columns, per cell
    exog, endog
        (k, p), (k,): X and y as combinations of carried columns, see `GroupMoments.coded`
    terms
        random terms, in order of their blocks
    shards
        the same moments in pieces, which are summed one after the other; the first has the sums
        over all rows, the others zero
    each
        applies a function to all of some things, like ``map``
    sampled
        whether each shard is a random sample of the groups
    totals
        sums over all groups, if they are known

    Raises
    ------
    DependentColumns
        a bar's columns are linearly dependent
    levels.TooManyLevels
        factors are crossed in more levels than dense algebra can take
    """
    if totals is None:
        totals = reduce(add, (shard.totals for shard in shards or [moments]))
    model = coordinates(totals, exog, endog, terms)
    if _each_for_itself(terms, moments.n_groups):
        found: list[Shard] = list(each(partial(one_level, model=model), shards or [moments]))
        explained = [shard.within for shard in found]
        evaluated = tuple(shard.evaluated for shard in found)
        own = tuple(shard.part for shard in found)
        return assembled(totals, model, own, explained, evaluated=evaluated, sampled=sampled)
    within, centred = _within(moments), _centred_cells(moments, terms)
    parts, Fw = _clusters(moments, model, centred)
    return assembled(totals, model, parts, [within], Fw, centred=centred)


def assembled(
    totals: Totals,
    model: Coordinates,
    parts: tuple[OneLevel | Bucket, ...],
    shards: Sequence[Within],
    Fw: Floats | None = None,
    evaluated: tuple[OneLevel, ...] | None = None,
    centred: bool = True,
    sampled: bool = False,
) -> Problem:
    """The problem, once all groups have been looked at.

    Parameters
    ----------
    shards
        what the cells of each shard explain
    sampled
        whether a shard is a random sample of the groups
    Fw
        see `Factors`; None where the parts explain what the cells explain
    centred
        cells are centred, so that references, if there are any, cancel
    """
    within = reduce(add, shards)
    residual = model.F.T @ _residual(totals, within) @ model.F
    first = (shards[0].nobs, shards[0].rank) if sampled and len(shards) >= SAMPLED else None
    factors = Factors(
        blocks=model.blocks,
        parts=parts,
        evaluated=parts if evaluated is None else evaluated,
        Fw=residual if Fw is None else Fw,
        within=residual,
        rank_random=within.rank,
        nobs=totals.nobs,
        stored=_summed(totals, model.F, centred and totals.referenced),
        total=_made_of(totals, model.F),
        log_jacobian=model.fixed.log_jacobian,
        y_scale=model.response.scale,
        log_weights=totals.log_weights,
        first=first,
    )
    return Problem(model.fixed, model.response, model.natural, model.terms, factors)


def marginal_products(moments: GroupMoments, found: Problem, root: Floats) -> Floats:
    """F'H^-1 F (k, k) of all carried columns of a one-level problem at a root of Psi (q, q)."""
    blocks = found.factors.blocks
    every = Coordinates(
        found.fixed,
        found.response,
        found.natural,
        blocks,
        found.terms,
        np.eye(len(moments.columns)),
    )
    shard = one_level(moments, every)
    terms = one_level_terms(blocks, shard.part, root, 0, slice(None))
    return np.asarray(_residual(moments.totals, shard.within) + terms.FtHiF)


def _diagonal(F: Floats, gram: Floats) -> Floats:
    """Diagonal of F'F in working coordinates F (k, p + 1)."""
    return np.asarray(np.einsum("ij,ik,kj->j", F, gram, F))


def _made_of(totals: Totals, F: Floats) -> Floats:
    """Diagonal of F'F (p + 1,); of recoded columns, squared sizes of what makes them up."""
    if totals.recoding is None:
        return _diagonal(F, totals.gram)
    size = np.sqrt(np.diag(original(totals.recoding, totals.columns, totals.gram)))
    return np.asarray((size @ np.abs(matrix(totals.recoding, totals.columns) @ F)) ** 2)


def _summed(totals: Totals, F: Floats, referenced: bool) -> Floats:
    """Diagonal of F'F as it was summed, (p + 1,): references have all of the constant."""
    total = _diagonal(F, totals.gram)
    if not referenced:
        return total
    varying = F.copy()
    varying[totals.random[0]] = 0.0
    return np.maximum(_diagonal(varying, totals.FtF), NOTHING * total)


def _each_for_itself(terms: Sequence[Term], n_cells: int) -> bool:
    """Whether every cell is a group of its own for every term: one factor."""
    return all(
        term.n_levels == n_cells and term.codes.min(initial=0) >= 0 and not term.repeated
        for term in terms
    )


def _clusters(
    moments: GroupMoments, model: Coordinates, centred: bool
) -> tuple[tuple[Bucket, ...], Floats]:
    """Clusters of cells, and what their leaves leave of F'F (k, k), in working coordinates."""
    terms, F, absolute = model.terms, model.F, moments.absolute
    cells = _cells(absolute.WtF, moments.random, terms, F)
    if not centred:
        parts, taken = buckets(model.blocks, terms, cells)
        FtF = _consistent(absolute.FtF, absolute.random, absolute.WtF.sum(axis=0))
        return parts, F.T @ FtF @ F - taken
    random = list(moments.random)
    s = moments.WtF[:, 0]
    means = s / s[:, random[0], None]
    within = moments.WtF - s[:, random, None] * means[:, None, :]
    own = _cells(within, moments.random, terms, F)
    parts, _ = buckets(model.blocks, terms, replace(cells, centred=(own.KtK, own.KtF)))
    totals = moments.totals
    products = totals.FtF - totals.between
    products[random] = within.sum(axis=0)
    products[:, random] = products[random].T
    products[random[0]] = products[:, random[0]] = 0.0
    return parts, F.T @ products @ F


def _centred_cells(moments: GroupMoments, terms: Sequence[Term]) -> bool:
    """Whether cells are centred by the leaves' column, so that references cancel."""
    if moments.reference is None:
        return False
    leaf = leaves_are_cells(terms)
    constant = moments.random[0]
    return leaf is not None and not np.delete(terms[leaf].T, constant, axis=0).any()


def _cells(WtF: Floats, random: Sequence[int], terms: Sequence[Term], F: Floats) -> Cells:
    """Cross-products of the terms' columns in each cell, in working coordinates."""
    W = np.column_stack([term.T for term in terms])
    KtF = np.matmul(W[list(random)].T, WtF)  # (N, c, k), carried
    return Cells(KtF @ W, KtF @ F)
