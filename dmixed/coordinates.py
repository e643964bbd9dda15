"""Well-conditioned coordinates of the columns of X, y and the random terms.

Shifts are taken off in the *coefficients*, exactly, before any product of data is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Column, Floats

DEPENDENT = 1e-11
"""Squared relative residual below which a column of X depends on those before it (sd: 3e-6)."""

DEPENDENT_RECODED = 1e-14
"""The same where recoded columns have kept the digits, as lme4 has it (sd: 1e-7)."""


@dataclass(frozen=True, slots=True)
class Basis:
    """Well-conditioned coordinates of a set of columns ``X = F coefficients``.

    Attributes
    ----------
    kept
        positions of the independent columns, in order; the others are aliased
    work
        (k, p): working columns ``X_work = F work``
    to_work
        (p, p), upper triangular: ``X[:, kept] = X_work to_work``
    """

    kept: tuple[int, ...]
    work: Floats
    to_work: Floats

    @property
    def log_jacobian(self) -> float:
        """log|det to_work|."""
        return float(np.log(np.abs(np.diag(self.to_work))).sum())


@dataclass(frozen=True, slots=True)
class Response:
    """The response in working coordinates: ``y = scale F work + X_work beta``.

    What the working columns of X can take up of it (its shift, if X has an intercept) is taken
    away in the coefficients, exactly, so that a large mean costs no digits.
    """

    work: Floats
    beta: Floats
    scale: float


def working_basis(
    columns: Sequence[Column], gram: Floats, coefficients: Floats, dependent: float = DEPENDENT
) -> tuple[Basis, Floats]:
    """Independent columns of ``F coefficients`` and a basis of their span that loses no digits.

    Orthogonalising the *coefficients* (scaled by the root mean square of their columns) removes
    shifts exactly: for x with mean/sd 1e8 next to an intercept the working column is the shifted
    x. Dependence in the data is judged on the Gram matrix of the working columns; as in lme4,
    of dependent columns the last ones go.

    Parameters
    ----------
    columns, gram, coefficients
        k labels of the carried columns, their (k, k) cross-products, and (k, p)
    dependent
        squared relative residual at which a column goes

    Returns
    -------
    basis
    Q
        (k, p'): orthonormal scaled coefficients of the working columns, for `working_response`
    """
    k, p = coefficients.shape
    size, inverse = _sizes(gram)
    correlation = gram * inverse[:, None] * inverse
    scaled = _finest_cells(columns, coefficients) * size[:, None]
    kept: list[int] = []
    Q, to_work = np.zeros((k, p)), np.zeros((p, p))
    R = np.zeros((p, p))  # Cholesky factor of the Gram matrix of the working columns
    for j in range(p):
        m = len(kept)
        r, h = _remainder(Q[:, :m], scaled[:, j])
        norm, whole = float(np.linalg.norm(r)), float(np.linalg.norm(scaled[:, j]))
        if norm <= 1e-13 * whole:
            continue
        q = r / norm
        cross = solve_triangular(R[:m, :m], Q[:, :m].T @ correlation @ q, trans="T")
        own = float(q @ correlation @ q)
        pivot = own - float(cross @ cross)
        if pivot <= dependent * own or own <= dependent:
            continue
        Q[:, m], R[:m, m], R[m, m] = q, cross, np.sqrt(pivot)
        to_work[:m, m], to_work[m, m] = h, norm
        kept.append(j)
    p = len(kept)
    return Basis(tuple(kept), Q[:, :p] * inverse[:, None], to_work[:p, :p]), Q[:, :p]


def working_response(
    columns: Sequence[Column], gram: Floats, Q: Floats, response: Floats
) -> Response:
    """The response (k,) in the coordinates of a working basis."""
    size, inverse = _sizes(gram)
    scaled = _finest_cells(columns, response[:, None])[:, 0] * size
    r, h = _remainder(Q, scaled)
    scale = float(np.linalg.norm(r))
    work = r / scale * inverse if scale > 0 else np.zeros(len(r))
    return Response(work, h, scale)


def _sizes(gram: Floats) -> tuple[Floats, Floats]:
    """Root diagonal of a Gram matrix and its inverse; zero for columns that are zero."""
    size = np.sqrt(np.diag(gram))
    return size, np.divide(1.0, size, out=np.zeros(len(size)), where=size > 0)


def _remainder(Q: Floats, v: Floats) -> tuple[Floats, Floats]:
    """Part of v outside the span of orthonormal Q, and coefficients inside; twice is enough."""
    h = Q.T @ v
    r = v - Q @ h
    again = Q.T @ r
    return r - Q @ again, h + again


def _finest_cells(columns: Sequence[Column], coefficients: Floats) -> Floats:
    """The same columns of X, written in the finest cells that are carried.

    A column over every row is the sum of its products with the indicators of all levels of a
    factor; written so, ``0 + f + x`` finds that the shift of x lies in the span of f.
    """
    T = coefficients.copy()
    for j, inside in _cells_of(columns):
        T[inside] += T[j]
        T[j] = 0.0
    return T


def coarsest_cells(columns: Sequence[Column], coefficients: Floats) -> Floats:
    """The same columns again, with what all cells of a column have in common in that column.

    The constant is written as such, not as a sum of indicators, and cancels within groups exactly.
    """
    T = coefficients.copy()
    for j, inside in reversed(_cells_of(columns)):
        common = T[inside].mean(axis=0)
        T[inside] -= common
        T[j] += common
    return T


def _cells_of(columns: Sequence[Column]) -> list[tuple[int, list[int]]]:
    """Columns that are sums of others, and which: coarse ones first."""
    found = []
    names = [frozenset(factor for factor, _ in column.cell) for column in columns]
    order = sorted(range(len(columns)), key=lambda j: len(names[j]))
    for j in order:
        finer = [
            i
            for i in range(len(columns))
            if names[i] > names[j] and columns[i].powers == columns[j].powers
        ]
        if not finer:
            continue
        chosen = min((names[i] for i in finer), key=lambda s: (len(s), sorted(s)))
        cell = set(columns[j].cell)
        found.append((j, [i for i in finer if names[i] == chosen and cell <= set(columns[i].cell)]))
    return found
