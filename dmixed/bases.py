"""Working coordinates of a whole model: of X, y and each random term, from sums over all groups."""

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
from dmixed.levels import Term
from dmixed.moments import Totals
from dmixed.whitening import matrix, original


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
    fixed, Q = _fixed_basis(totals, exog)
    response = working_response(columns, gram, Q, endog)
    naturals, own = _natural(totals, terms)
    blocks = Blocks(tuple(len(part) for part in naturals), _contained(totals, terms))
    F = coarsest_cells(columns, np.column_stack([fixed.work, response.work]))
    return Coordinates(fixed, response, blocks.join(naturals), blocks, own, F)


def _fixed_basis(totals: Totals, exog: Floats) -> tuple[Basis, Floats]:
    """`working_basis` of X; where columns are recoded, dependence is that of the columns before."""
    columns, gram, recoding = totals.columns, totals.gram, totals.recoding
    if recoding is None:
        return working_basis(columns, gram, exog)
    before = original(recoding, columns, gram), matrix(recoding, columns) @ exog
    independent = list(working_basis(columns, *before, DEPENDENT_RECODED)[0].kept)
    found, Q = working_basis(columns, gram, exog[:, independent], DEPENDENT_RECODED)
    return replace(found, kept=tuple(independent[j] for j in found.kept)), Q


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
