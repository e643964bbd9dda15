"""From moments to triangular factors in well-conditioned coordinates, subtracting early or never.

Each group's W is reduced to ``R`` with R'R = WtW and ``T = Q'F`` (W = Q R, Q never formed), and
what no group's W explains to one matrix ``F_w``. Formulas: moments are first centred within each
group, so that group means cancel before, not after, products are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import Column, Floats
from dmixed.covariance import Blocks
from dmixed.moments import GroupMoments

PIVOT = 1e-14
"""A pivot below this fraction of the uncentred second moment is a zero row of R (n_g < q)."""

DEPENDENT = 1e-11
"""Squared relative residual below which a column of X depends on those before it (sd: 3e-6)."""


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
    columns: Sequence[Column], gram: Floats, coefficients: Floats
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
        if pivot <= DEPENDENT * own or own <= DEPENDENT:
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
    names = [frozenset(factor for factor, _ in column.cell) for column in columns]
    order = sorted(range(len(columns)), key=lambda j: len(names[j]))
    for j in order:
        finer = [
            i
            for i in range(len(columns))
            if names[i] > names[j] and columns[i].powers == columns[j].powers
        ]
        if not finer or not T[j].any():
            continue
        chosen = min((names[i] for i in finer), key=lambda s: (len(s), sorted(s)))
        cell = set(columns[j].cell)
        inside = [i for i in finer if names[i] == chosen and cell <= set(columns[i].cell)]
        T[inside] += T[j]
        T[j] = 0.0
    return T


@dataclass(frozen=True, slots=True)
class Factors:
    """Per-group factors of a model in working coordinates; all that the likelihood needs.

    The group axis comes last and is contiguous. W_g = Q_g R_g, T_g = Q_g'F with F = [X y].

    Attributes
    ----------
    blocks
        sizes of the bars' covariance blocks, q in all
    RT
        (r, q + k, G): R and T side by side; k = p + 1, dimensionless
    Fw
        (k, k): cross-products of F outside the span of the groups' W
    nobs
        rows
    stored
        (k,): diagonal of F'F, the size of what was summed (for the error estimate)
    log_jacobian
        log|det| of the user's X columns in the working ones
    y_scale
        units of y per unit of the working response
    log_weights
        sum of log weights
    rank_random
        number of non-zero rows of all R
    """

    blocks: Blocks
    RT: Floats
    Fw: Floats
    nobs: int
    stored: Floats
    log_jacobian: float
    y_scale: float
    log_weights: float
    rank_random: int

    def __post_init__(self) -> None:
        q, k = self.blocks.q, len(self.Fw)
        assert self.RT.shape[1] == q + k
        assert self.Fw.shape == (k, k)
        assert self.stored.shape == (k,)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return len(self.Fw) - 1

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.RT.shape[2])


@dataclass(frozen=True, slots=True)
class _Carried:
    """Factors of the carried columns: R (r, r, G) upper, T (r, k, G), Fw (k, k)."""

    R: Floats
    T: Floats
    Fw: Floats


def _carried_factors(moments: GroupMoments) -> _Carried:
    """Centre each group and factor it; the constant is the first random column."""
    random = list(moments.random)
    r, k, G = len(random), len(moments.columns), moments.n_groups
    WtF = np.ascontiguousarray(np.moveaxis(moments.WtF, 0, -1))  # (r, k, G)
    n = WtF[0, random[0]]  # sum of the weights of each group
    s = WtF[0]
    mean_w = s[random] / n
    R, T = np.zeros((r, r, G)), np.empty((r, k, G))
    root = np.sqrt(n)
    R[0] = mean_w * root
    T[0] = s / root
    # WtF summed over groups is a block of FtF, but other roundings: where groups are large the
    # difference is systematic, and would be taken for residual variation.
    FtF, block = moments.FtF.copy(), WtF.sum(axis=2)
    FtF[random], FtF[:, random] = block, block.T
    Fw = FtF - T[0] @ T[0].T
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
    return _Carried(R, T, Fw)


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
    factors
        per-group factors
    """

    fixed: Basis
    response: Response
    natural: Floats
    factors: Factors


class DependentColumns(ValueError):
    """Columns of a random term are linearly dependent; ``bar`` and ``column`` are positions."""

    def __init__(self, bar: int, column: int) -> None:
        super().__init__(bar, column)
        self.bar, self.column = bar, column


def problem(
    moments: GroupMoments, exog: Floats, endog: Floats, exog_re: Sequence[Floats]
) -> Problem:
    """Coordinates and factors of the model with these columns.

    Parameters
    ----------
    moments
        of the k carried columns
    exog, endog, exog_re
        (k, p), (k,) and one (k, q_j) per bar: X, y and Z_j as combinations of carried columns

    Raises
    ------
    DependentColumns
        a bar's columns are linearly dependent
    """
    columns, gram = moments.columns, moments.FtF
    fixed, Q = working_basis(columns, gram, exog)
    response = working_response(columns, gram, Q, endog)
    rows = list(moments.random)
    columns_re, gram_re = [columns[i] for i in rows], gram[np.ix_(rows, rows)]
    W, natural = [], []
    for j, coefficients in enumerate(exog_re):
        basis, _ = working_basis(columns_re, gram_re, coefficients[rows])
        missing = set(range(coefficients.shape[1])) - set(basis.kept)
        if missing:
            raise DependentColumns(j, min(missing))
        # B'B = mean of WtW over the groups: in the basis W B^-1 a relative covariance of I means
        # reliability 1/2, whatever the units.
        mean = basis.work.T @ gram_re @ basis.work / moments.n_groups
        B = np.linalg.cholesky(mean).T
        W.append(solve_triangular(B.T, basis.work.T, lower=True).T)
        natural.append(B @ basis.to_work)
    held = _contained(columns_re, gram_re, [coefficients[rows] for coefficients in exog_re])
    blocks = Blocks(tuple(part.shape[1] for part in natural), held)
    F = np.column_stack([fixed.work, response.work])
    carried = _carried_factors(moments)
    factors = Factors(
        blocks=blocks,
        RT=_recoded(carried, np.column_stack(W), F),
        Fw=F.T @ carried.Fw @ F,
        nobs=moments.nobs,
        stored=np.einsum("ij,ik,kj->j", F, gram, F),
        log_jacobian=fixed.log_jacobian,
        y_scale=response.scale,
        log_weights=moments.log_weights,
        rank_random=int(np.count_nonzero(np.einsum("aag->ag", carried.R))),
    )
    return Problem(fixed, response, blocks.join(natural), factors)


def _contained(columns: Sequence[Column], gram: Floats, bars: Sequence[Floats]) -> tuple[int, ...]:
    """Bars whose columns lie in the span of another bar's; of two equal ones the first.

    Psi_j + E Psi_i E' is again a covariance of bar j, so the likelihood cannot tell the two
    apart, and its optimum is reached with Psi_i = 0.
    """
    held: list[int] = []
    for i, inner in enumerate(bars):
        for j, outer in enumerate(bars):
            if i == j or j in held or inner.shape[1] > outer.shape[1]:
                continue
            together, _ = working_basis(columns, gram, np.hstack([outer, inner]))
            if len(together.kept) == outer.shape[1]:
                held.append(i)
                break
    return tuple(held)


def _recoded(carried: _Carried, W: Floats, F: Floats) -> Floats:
    """R W and T F side by side, (r, q + k, G)."""
    r, q = len(carried.R), W.shape[1]
    RT = np.empty((r, q + F.shape[1], carried.R.shape[2]))
    for a in range(r):
        np.matmul(W.T, carried.R[a], out=RT[a, :q])
        np.matmul(F.T, carried.T[a], out=RT[a, q:])
    return RT
