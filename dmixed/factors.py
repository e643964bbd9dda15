"""From moments to what the likelihood is evaluated on, subtracting early or never.

With one grouping factor each group's W is reduced to ``R`` with R'R = WtW and ``T = Q'F``
(W = Q R, Q never formed), and what no group's W explains to one matrix ``F_w``. Moments are
first centred within each group, so that group means cancel before, not after, products are
taken. With several factors the moments of cells are put together in `levels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, Protocol, TypeAlias

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Column, Floats
from dmixed.coordinates import Basis, Response, coarsest_cells, working_basis, working_response
from dmixed.covariance import Blocks
from dmixed.levels import Cells, Term, buckets
from dmixed.moments import GroupMoments, Totals
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS, OneLevel, merged
from dmixed.terms import ProfileTerms

Each: TypeAlias = Callable[[Callable[[GroupMoments], Any], Iterable[GroupMoments]], Iterable[Any]]

PIVOT = 1e-14
"""A pivot below this fraction of the uncentred second moment is a zero row of R (n_g < q)."""


NOTHING = 1e-28
"""What is below this fraction of a sum of squares is none of its digits."""


class Elsewhere(Protocol):
    """Groups that are not in this process."""

    def terms(self, blocks: Blocks, root: Floats, order: int) -> ProfileTerms:
        """Terms of all groups at Psi = root root' (q, q), up to derivatives of an order."""


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
        (k,): diagonal of F'F about zero
    log_jacobian
        log|det| of the user's X columns in the working ones
    y_scale
        units of y per unit of the working response
    log_weights
        sum of log weights
    elsewhere
        what evaluates the groups where they are, if they are not here: then there are no parts
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

    def __post_init__(self) -> None:
        k = len(self.Fw)
        assert self.Fw.shape == self.within.shape == (k, k)
        assert self.stored.shape == self.total.shape == (k,)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return len(self.Fw) - 1


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
    """

    block: Floats
    taken: Floats
    rank: int

    def __add__(self, other: Within) -> Within:
        """Of both sets of cells."""
        return Within(self.block + other.block, self.taken + other.taken, self.rank + other.rank)


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
    taken = sums @ sums.T
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
        taken += T[a] @ T[a].T
    rank = int(np.count_nonzero(np.einsum("aag->ag", R)))
    return R, T, Within(WtF.sum(axis=2), taken, rank)


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


class DependentColumns(ValueError):
    """Columns of a random term are linearly dependent; ``block`` and ``column`` are positions."""

    def __init__(self, block: int, column: int) -> None:
        super().__init__(block, column)
        self.block, self.column = block, column


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Working coordinates of a model: all that is decided before its groups are looked at.

    Attributes
    ----------
    fixed, response
        coordinates of X and y
    natural, blocks
        see `Problem` and `Factors`
    terms
        random terms with their columns in natural coordinates
    F
        (k, p + 1): [X y] as combinations of carried columns
    """

    fixed: Basis
    response: Response
    natural: Floats
    blocks: Blocks
    terms: tuple[Term, ...]
    F: Floats


def coordinates(totals: Totals, exog: Floats, endog: Floats, terms: Sequence[Term]) -> Coordinates:
    """Coordinates of the model with these columns, see `problem`."""
    columns, gram = totals.columns, totals.gram
    fixed, Q = working_basis(columns, gram, exog)
    response = working_response(columns, gram, Q, endog)
    naturals, own = _natural(totals, terms)
    blocks = Blocks(tuple(len(part) for part in naturals), _contained(totals, terms))
    F = coarsest_cells(columns, np.column_stack([fixed.work, response.work]))
    return Coordinates(fixed, response, blocks.join(naturals), blocks, own, F)


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
            RT[a, :q, start:stop] = W.T @ R[a]
            RT[a, q:, start:stop] = model.F.T @ T[a]
        found = own if found is None else found + own
    assert found is not None
    part = OneLevel(RT)
    return Shard(part, merged(part, q), found)


def problem(
    moments: GroupMoments,
    exog: Floats,
    endog: Floats,
    terms: Sequence[Term],
    shards: Sequence[GroupMoments] | None = None,
    each: Each = map,
) -> Problem:
    """Coordinates and factors of the model with these columns.

    Parameters
    ----------
    moments
        of the k carried columns, per cell
    exog, endog
        (k, p), (k,): X and y as combinations of carried columns
    terms
        random terms, in order of their blocks
    shards
        the same moments in pieces, which are summed one after the other; the first has the sums
        over all rows, the others zero
    each
        applies a function to all of some things, like ``map``

    Raises
    ------
    DependentColumns
        a bar's columns are linearly dependent
    levels.TooManyLevels
        factors are crossed in more levels than dense algebra can take
    """
    totals = reduce(add, (shard.totals for shard in shards or [moments]))
    model = coordinates(totals, exog, endog, terms)
    if _each_for_itself(terms, moments.n_groups):
        found: list[Shard] = list(each(partial(one_level, model=model), shards or [moments]))
        within = reduce(add, (shard.within for shard in found))
        evaluated = tuple(shard.evaluated for shard in found)
        own = tuple(shard.part for shard in found)
        return assembled(totals, model, own, within, evaluated=evaluated)
    within = _within(moments)
    absolute = moments.absolute
    parts, taken = buckets(model.blocks, model.terms, _cells(absolute, model.terms, model.F))
    FtF = _consistent(absolute.FtF, absolute.random, absolute.WtF.sum(axis=0))
    Fw = model.F.T @ FtF @ model.F - taken
    return assembled(totals, model, parts, within, Fw)


def assembled(
    totals: Totals,
    model: Coordinates,
    parts: tuple[OneLevel | Bucket, ...],
    within: Within,
    Fw: Floats | None = None,
    evaluated: tuple[OneLevel, ...] | None = None,
) -> Problem:
    """The problem, once all groups have been looked at.

    Parameters
    ----------
    Fw
        see `Factors`; None where the parts explain what the cells explain
    """
    residual = model.F.T @ _residual(totals, within) @ model.F
    total = _diagonal(model.F, totals.gram)
    referenced = Fw is None and totals.referenced
    factors = Factors(
        blocks=model.blocks,
        parts=parts,
        evaluated=parts if evaluated is None else evaluated,
        Fw=residual if Fw is None else Fw,
        within=residual,
        rank_random=within.rank,
        nobs=totals.nobs,
        stored=_summed(totals, model.F, total) if referenced else total,
        total=total,
        log_jacobian=model.fixed.log_jacobian,
        y_scale=model.response.scale,
        log_weights=totals.log_weights,
    )
    return Problem(model.fixed, model.response, model.natural, model.terms, factors)


def _diagonal(F: Floats, gram: Floats) -> Floats:
    """Diagonal of F'F in working coordinates F (k, p + 1)."""
    return np.asarray(np.einsum("ij,ik,kj->j", F, gram, F))


def _summed(totals: Totals, F: Floats, total: Floats) -> Floats:
    """Diagonal of F'F about the references, (p + 1,): they have all of the constant."""
    varying = F.copy()
    varying[totals.random[0]] = 0.0
    return np.maximum(_diagonal(varying, totals.FtF), NOTHING * total)


def _each_for_itself(terms: Sequence[Term], n_cells: int) -> bool:
    """Whether every cell is a group of its own for every term: one factor."""
    return all(
        term.n_levels == n_cells and term.codes.min(initial=0) >= 0 and not term.repeated
        for term in terms
    )


def _natural(totals: Totals, terms: Sequence[Term]) -> tuple[list[Floats], tuple[Term, ...]]:
    """Per block the map to natural coordinates, and the terms in them.

    B'B = mean of WtW over the levels: in the basis W B^-1 a relative covariance of I means
    reliability 1/2, whatever the units.
    """
    rows = list(totals.random)
    columns = [totals.columns[i] for i in rows]
    gram = totals.gram[np.ix_(rows, rows)]
    naturals, own = [], []
    for block in dict.fromkeys(term.block for term in terms):
        members = [term for term in terms if term.block == block]
        if members[0].repeated:
            sizes = sum(float(np.einsum("ij,ik,kj->", t.T[rows], gram, t.T[rows])) for t in members)
            if sizes <= 0.0:
                raise DependentColumns(block, 0)
            B = np.sqrt(np.array([[sizes / sum(t.size for t in members)]]))
            naturals.append(B)
            own += [Term(block, t.T / B[0, 0], t.codes, t.n_levels, True) for t in members]
            continue
        (term,) = members
        basis, _ = working_basis(columns, gram, term.T[rows])
        missing = set(range(term.T.shape[1])) - set(basis.kept)
        if missing:
            raise DependentColumns(block, min(missing))
        mean = basis.work.T @ gram @ basis.work / term.n_levels
        B = np.linalg.cholesky(mean).T
        T = np.zeros(term.T.shape)
        T[rows] = solve_triangular(B.T, basis.work.T, lower=True).T
        naturals.append(B @ basis.to_work)
        own.append(Term(block, T, term.codes, term.n_levels))
    return naturals, tuple(own)


def _cells(moments: GroupMoments, terms: Sequence[Term], F: Floats) -> Cells:
    """Cross-products of the terms' columns in each cell, in working coordinates."""
    rows = list(moments.random)
    W = np.column_stack([term.T for term in terms])
    KtF = np.matmul(W[rows].T, moments.WtF)  # (N, c, k), carried
    return Cells(KtF @ W, KtF @ F)


def _contained(totals: Totals, terms: Sequence[Term]) -> tuple[int, ...]:
    """Blocks whose columns lie in the span of another's of the same levels; of two the first.

    Psi_j + E Psi_i E' is again a covariance of block j, so the likelihood cannot tell the two
    apart, and its optimum is reached with Psi_i = 0.
    """
    rows = list(totals.random)
    columns: list[Column] = [totals.columns[i] for i in rows]
    gram = totals.gram[np.ix_(rows, rows)]
    simple = [t for t in terms if not t.repeated]
    held: list[int] = []
    for inner in simple:
        for outer in simple:
            if inner is outer or outer.block in held or inner.T.shape[1] > outer.T.shape[1]:
                continue
            if not _same_levels(inner, outer):
                continue
            together, _ = working_basis(columns, gram, np.hstack([outer.T[rows], inner.T[rows]]))
            if len(together.kept) == outer.T.shape[1]:
                held.append(inner.block)
                break
    return tuple(held)


def _same_levels(a: Term, b: Term) -> bool:
    """Whether two factors divide the rows alike."""
    if a.codes is b.codes:
        return True
    if a.n_levels != b.n_levels or (a.codes < 0).any() or (b.codes < 0).any():
        return False
    image = np.full(a.n_levels, -1, np.intp)
    image[a.codes] = b.codes
    return bool((image[a.codes] == b.codes).all())
