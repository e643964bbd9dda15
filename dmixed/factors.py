"""From moments to what the likelihood is evaluated on, subtracting early or never.

With one grouping factor each group's W is reduced to ``R`` with R'R = WtW and ``T = Q'F``
(W = Q R, Q never formed), and what no group's W explains to one matrix ``F_w``. Moments are
first centred within each group, so that group means cancel before, not after, products are
taken. With several factors the moments of cells are put together in `levels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Column, Floats
from dmixed.coordinates import (
    DEPENDENT_RECODED,
    Basis,
    Response,
    coarsest_cells,
    working_basis,
    working_response,
)
from dmixed.covariance import Blocks
from dmixed.levels import Cells, Term, buckets, leaves_are_cells
from dmixed.moments import GroupMoments
from dmixed.nested import Bucket
from dmixed.onelevel import OneLevel, one_level_terms
from dmixed.whitening import matrix, original

PIVOT = 1e-14
"""A pivot below this fraction of the uncentred second moment is a zero row of R (n_g < q)."""


NOTHING = 1e-28
"""What is below this fraction of a sum of squares is none of its digits."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A model in working coordinates; all that the likelihood needs. k = p + 1, F = [X y].

    Attributes
    ----------
    blocks
        sizes of the blocks of Psi, q in all
    parts
        what the groups hold: `OneLevel` factors, or `Bucket` after bucket of clusters
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
    """

    blocks: Blocks
    parts: tuple[OneLevel | Bucket, ...]
    Fw: Floats
    within: Floats
    rank_random: int
    nobs: int
    stored: Floats
    total: Floats
    log_jacobian: float
    y_scale: float
    log_weights: float

    def __post_init__(self) -> None:
        k = len(self.Fw)
        assert self.Fw.shape == self.within.shape == (k, k)
        assert self.stored.shape == self.total.shape == (k,)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return len(self.Fw) - 1


@dataclass(frozen=True, slots=True)
class _Carried:
    """Factors of the carried columns: R (r, r, G) upper, T (r, k, G), Fw (k, k)."""

    R: Floats
    T: Floats
    Fw: Floats


def _carried_factors(moments: GroupMoments) -> _Carried:
    """Centre each group and factor it; the constant is the first random column.

    References cancel where groups are centred; only means know of them.
    """
    random = list(moments.random)
    r, k, G = len(random), len(moments.columns), moments.n_groups
    WtF = np.ascontiguousarray(np.moveaxis(moments.WtF, 0, -1))  # (r, k, G)
    n = WtF[0, random[0]]  # sum of the weights of each group
    s = WtF[0]
    R, T = np.zeros((r, r, G)), np.empty((r, k, G))
    root = np.sqrt(n)
    sums = s / root
    T[0] = sums
    if moments.reference is not None:
        T[0] += moments.reference.T * root
    R[0] = T[0, random]
    Fw = _consistent(moments, WtF.sum(axis=2)) - sums @ sums.T
    for a in range(1, r):
        column = random[a]
        T[a] = WtF[a] - s[column] / n * s
        for t in range(1, a):
            T[a] -= R[t, a] * T[t]
        pivot = T[a, column].copy()
        ok = pivot > PIVOT * WtF[a, column]
        inverse = np.divide(1.0, np.sqrt(np.where(ok, pivot, 1.0)), where=ok, out=np.zeros(G))
        T[a] *= inverse
        R[a, a:] = T[a, random[a:]]
        Fw -= T[a] @ T[a].T
    Fw[random] = Fw[:, random] = 0.0  # they are in the span
    return _Carried(R, T, Fw)


def marginal_products(moments: GroupMoments, found: Problem, root: Floats) -> Floats:
    """F'H^-1 F (k, k) of all carried columns of a one-level problem at a root of Psi (q, q)."""
    carried = _carried_factors(moments)
    W = np.column_stack([term.T for term in found.terms])[list(moments.random)]
    part = OneLevel(_recoded(carried, W, np.eye(len(moments.columns))))
    terms = one_level_terms(found.factors.blocks, part, root, 0, slice(None))
    return np.asarray(carried.Fw + terms.FtHiF)


def centred_products(moments: GroupMoments) -> Floats:
    """Cross-products (k, k) of the carried columns within groups."""
    sums = moments.WtF[:, 0] / np.sqrt(moments.WtF[:, 0, moments.random[0]])[:, None]
    return np.asarray(moments.FtF - sums.T @ sums)


def _consistent(moments: GroupMoments, block: Floats) -> Floats:
    """FtF with its random rows replaced by the sum of WtF over groups (q, k).

    They are the same but for rounding: where groups are large the difference is systematic, and
    would be taken for residual variation.
    """
    random, FtF = list(moments.random), moments.FtF.copy()
    FtF[random], FtF[:, random] = block, block.T
    return FtF


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
        return isinstance(self.factors.parts[0], OneLevel)


class DependentColumns(ValueError):
    """Columns of a random term are linearly dependent; ``block`` and ``column`` are positions."""

    def __init__(self, block: int, column: int) -> None:
        super().__init__(block, column)
        self.block, self.column = block, column


def problem(moments: GroupMoments, exog: Floats, endog: Floats, terms: Sequence[Term]) -> Problem:
    """Coordinates and factors of the model with these columns.

    Parameters
    ----------
    moments
        of the k carried columns, per cell
    exog, endog
        (k, p), (k,): X and y as combinations of carried columns, see `GroupMoments.coded`
    terms
        random terms, in order of their blocks, likewise

    Raises
    ------
    DependentColumns
        a bar's columns are linearly dependent
    levels.TooManyLevels
        factors are crossed in more levels than dense algebra can take
    """
    columns, gram = moments.columns, moments.gram
    fixed, Q = _fixed_basis(moments, gram, exog)
    response = working_response(columns, gram, Q, endog)
    naturals, own = _natural(moments, gram, terms)
    held = _contained(moments, gram, terms)
    blocks = Blocks(tuple(len(part) for part in naturals), held)
    F = coarsest_cells(columns, np.column_stack([fixed.work, response.work]))
    carried = _carried_factors(moments)
    within = F.T @ carried.Fw @ F
    parts: tuple[OneLevel | Bucket, ...]
    one_level = _each_for_itself(terms, moments.n_groups)
    if one_level:
        W = np.column_stack([term.T for term in own])[list(moments.random)]
        parts, Fw = (OneLevel(_recoded(carried, W, F)),), within
    else:
        parts, Fw = _clusters(moments, blocks, own, F)
    total = _diagonal(F, gram) if moments.recoding is None else _made_of(moments, gram, F)
    as_used = moments if one_level or _centred(moments, own) else moments.absolute
    factors = Factors(
        blocks=blocks,
        parts=parts,
        Fw=Fw,
        within=within,
        rank_random=int(np.count_nonzero(np.einsum("aag->ag", carried.R))),
        nobs=moments.nobs,
        stored=_summed(as_used, F, gram),
        total=total,
        log_jacobian=fixed.log_jacobian,
        y_scale=response.scale,
        log_weights=moments.log_weights,
    )
    return Problem(fixed, response, blocks.join(naturals), own, factors)


def _fixed_basis(moments: GroupMoments, gram: Floats, exog: Floats) -> tuple[Basis, Floats]:
    """`working_basis` of X; where columns are recoded, dependence is that of the columns before."""
    columns, recoding = moments.columns, moments.recoding
    if recoding is None:
        return working_basis(columns, gram, exog)
    before = original(recoding, columns, gram), matrix(recoding, columns) @ exog
    independent = list(working_basis(columns, *before, DEPENDENT_RECODED)[0].kept)
    found, Q = working_basis(columns, gram, exog[:, independent], DEPENDENT_RECODED)
    return replace(found, kept=tuple(independent[j] for j in found.kept)), Q


def _diagonal(F: Floats, gram: Floats) -> Floats:
    """Diagonal of F'F in working coordinates F (k, p + 1)."""
    return np.asarray(np.einsum("ij,ik,kj->j", F, gram, F))


def _made_of(moments: GroupMoments, gram: Floats, F: Floats) -> Floats:
    """Squared sums of the sizes of the columns that make up recoded ones, (p + 1,)."""
    size = np.sqrt(np.diag(original(moments.recoding, moments.columns, gram)))
    return np.asarray((size @ np.abs(matrix(moments.recoding, moments.columns) @ F)) ** 2)


def _summed(moments: GroupMoments, F: Floats, gram: Floats) -> Floats:
    """Diagonal of F'F as it was summed, (p + 1,): references have all of the constant."""
    total = _diagonal(F, gram)
    if moments.reference is None:
        return total
    varying = F.copy()
    varying[moments.random[0]] = 0.0
    return np.maximum(_diagonal(varying, moments.FtF), NOTHING * total)


def _each_for_itself(terms: Sequence[Term], n_cells: int) -> bool:
    """Whether every cell is a group of its own for every term: one factor."""
    return all(
        term.n_levels == n_cells and term.codes.min(initial=0) >= 0 and not term.repeated
        for term in terms
    )


def _natural(
    moments: GroupMoments, total: Floats, terms: Sequence[Term]
) -> tuple[list[Floats], tuple[Term, ...]]:
    """Per block the map to natural coordinates, and the terms in them.

    B'B = mean of WtW over the levels: in the basis W B^-1 a relative covariance of I means
    reliability 1/2, whatever the units.
    """
    rows = list(moments.random)
    columns = [moments.columns[i] for i in rows]
    gram = total[np.ix_(rows, rows)]
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


def _clusters(
    moments: GroupMoments, blocks: Blocks, terms: Sequence[Term], F: Floats
) -> tuple[tuple[Bucket, ...], Floats]:
    """Clusters of cells, and what their leaves leave of F'F (k, k), in working coordinates."""
    absolute = moments.absolute
    cells = _cells(absolute.WtF, moments.random, terms, F)
    if not _centred(moments, terms):
        parts, taken = buckets(blocks, terms, cells)
        FtF = _consistent(absolute, absolute.WtF.sum(axis=0))
        return parts, F.T @ FtF @ F - taken
    random = list(moments.random)
    s = moments.WtF[:, 0]
    means = s / s[:, random[0], None]
    within = moments.WtF - s[:, random, None] * means[:, None, :]
    centred = _cells(within, moments.random, terms, F)
    parts, _ = buckets(blocks, terms, replace(cells, centred=(centred.KtK, centred.KtF)))
    products = centred_products(moments)
    products[random] = within.sum(axis=0)
    products[:, random] = products[random].T
    products[random[0]] = products[:, random[0]] = 0.0
    return parts, F.T @ products @ F


def _centred(moments: GroupMoments, terms: Sequence[Term]) -> bool:
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


def _contained(moments: GroupMoments, total: Floats, terms: Sequence[Term]) -> tuple[int, ...]:
    """Blocks whose columns lie in the span of another's of the same levels; of two the first.

    Psi_j + E Psi_i E' is again a covariance of block j, so the likelihood cannot tell the two
    apart, and its optimum is reached with Psi_i = 0.
    """
    rows = list(moments.random)
    columns: list[Column] = [moments.columns[i] for i in rows]
    gram = total[np.ix_(rows, rows)]
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
    if a.n_levels != b.n_levels or (a.codes < 0).any() or (b.codes < 0).any():
        return False
    image = np.full(a.n_levels, -1, np.intp)
    image[a.codes] = b.codes
    return bool((image[a.codes] == b.codes).all())


def _recoded(carried: _Carried, W: Floats, F: Floats) -> Floats:
    """R W and T F side by side, (r, q + k, G)."""
    r, q = len(carried.R), W.shape[1]
    RT = np.empty((r, q + F.shape[1], carried.R.shape[2]))
    for a in range(r):
        np.matmul(W.T, carried.R[a], out=RT[a, :q])
        np.matmul(F.T, carried.T[a], out=RT[a, q:])
    return RT
