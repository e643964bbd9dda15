"""The sums of a model with one grouping factor, from per-group triangular factors.

With any root L of the relative covariance Psi, per group ``S = I + R L L'R' = C C'``,
``Y = C^-1 R``, ``U = C^-1 T``, ``P = Y'Y = W'H^-1 W``, ``Q = Y'U = W'H^-1 F``; no inverse of Psi
and no subtraction appears, so a zero variance is an ordinary point. Over groups

    logdet = sum 2 log|C|        FtHiF = F_w + sum U'U

and in the direction dH = w_a w_b' + w_b w_a' (a != b) the derivatives follow from P and Q alone
(Lindstrom & Bates 1988, J. Am. Stat. Assoc. 83, give them for the unprofiled likelihood).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.products import gram
from dmixed.terms import ProfileTerms

GROUPS = 4096
"""Groups evaluated at a time: their factors stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class OneLevel:
    """Factors of groups that share nothing: W_g = Q_g R_g, T_g = Q_g'F with F = [X y].

    Attributes
    ----------
    RT
        (r, q + k, G): R and T side by side, dimensionless; the group axis is contiguous
    times
        (G,) how many groups each stands for in what depends on R alone; None: one each
    """

    RT: Floats
    times: Floats | None = None

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.RT.shape[2])


def solved(RT: Floats, root: Floats) -> tuple[Floats, Floats]:
    """``[Y U]`` (r, q + k, g) and the diagonal of C (r, g) for a slice of groups."""
    r, q = RT.shape[0], len(root)
    M = [np.dot(root.T, R_j) for R_j in RT[:, :q]]  # rows of R L
    V, diagonal = np.empty_like(RT), np.empty((r, RT.shape[2]))
    C: dict[tuple[int, int], Floats] = {}
    for j in range(r):
        d = 1.0 + np.einsum("cg,cg->g", M[j], M[j])
        v = RT[j].copy() if j else RT[j]
        for t in range(j):
            c = np.einsum("cg,cg->g", M[j], M[t])
            for u in range(t):
                c -= C[j, u] * C[t, u]
            c /= diagonal[t]
            C[j, t] = c
            d -= c * c
            v -= c * V[t]
        np.sqrt(d, out=diagonal[j])
        np.multiply(v, 1.0 / diagonal[j], out=V[j])
    return V, diagonal


MANY = 2 * GROUPS
"""Groups from which those with equal R are put together."""


def merged(part: OneLevel, q: int) -> OneLevel:
    """The same sums from fewer columns, where many groups have the same R.

    The sums depend on the T of such groups through ``sum vec(T) vec(T)'`` alone, which is that of
    the r k rows of a triangular factor (QR, so that no digit is lost). With a random intercept
    and without weights there are as many R as sizes of groups.
    """
    r, width, G = part.RT.shape
    size = r * (width - q)
    if G < MANY or part.times is not None:
        return part
    kinds = _kinds(part.RT[:, :q].reshape(r * q, G))
    if kinds is None:
        return part
    order = np.argsort(kinds, kind="stable")
    counts = np.bincount(kinds)
    if np.minimum(counts, size).sum() > G // 2 or len(counts) > G // (4 * size):
        return part
    columns, times = [], []
    for groups in np.split(order, np.cumsum(counts)[:-1]):
        own = part.RT[:, :, groups]
        if len(groups) > size:
            T = own[:, q:].reshape(size, -1)
            rows = np.asarray(np.linalg.qr(T.T, mode="r"))
            own = own[:, :, : len(rows)]
            own[:, q:] = rows.T.reshape(r, width - q, -1)
        columns.append(own)
        alike = np.zeros(own.shape[2])
        alike[0] = len(groups)
        times.append(alike)
    return OneLevel(np.concatenate(columns, axis=2), np.concatenate(times))


def _kinds(R: Floats) -> np.ndarray | None:
    """(G,) number of each column (bit by bit) among the distinct ones; None if there are many."""
    if any(len(np.unique(row[:MANY])) > MANY // 4 for row in R):
        return None
    found = np.zeros(R.shape[1], np.intp)
    for row in R:
        values, codes = np.unique(row, return_inverse=True)
        _, found = np.unique(found * len(values) + codes, return_inverse=True)
    return found


def one_level_terms(
    blocks: Blocks, part: OneLevel, root: Floats, order: int, groups: slice
) -> ProfileTerms:
    """Terms of some of the groups at Psi = root root' (q, q), up to derivatives of an order."""
    q = blocks.q
    k = part.RT.shape[1] - q
    rows, columns = np.tril_indices(q)
    h = len(rows)
    logdet, UtU, P = 0.0, np.zeros((k, k)), np.zeros((q, q))
    QtQ, PP, PQtQ = np.zeros((q * k, q * k)), np.zeros((h, h)), np.zeros((h, q * k, q * k))
    start, stop, _ = groups.indices(part.n_groups)
    for first in range(start, stop, GROUPS):
        last = min(first + GROUPS, stop)
        V, diagonal = solved(part.RT[:, :, first:last], root)
        logs = np.log(diagonal)
        if part.times is not None:
            logs *= part.times[first:last]
        logdet += 2.0 * float(logs.sum())
        for U_j in V[:, q:]:
            UtU += gram(U_j)
        if order == 0:
            continue
        Y, U = V[:, :q], V[:, q:]
        P_g = np.einsum("tag,tag->ag", Y[:, rows], Y[:, columns])  # (h, g)
        Q = np.einsum("tag,tkg->akg", Y, U).reshape(q * k, -1)
        own = P_g if part.times is None else P_g * part.times[first:last]
        P[rows, columns] += own.sum(axis=1)
        QtQ += gram(Q)
        if order == 1:
            continue
        PP += gram(P_g) if part.times is None else np.dot(own, P_g.T)
        for x in range(h):
            PQtQ[x] += np.dot(Q * P_g[x], Q.T)
    sums = _Sums(P + np.tril(P, -1).T, QtQ.reshape(q, k, q, k), PP, PQtQ.reshape(h, q, k, q, k))
    return _along_pairs(blocks, order, logdet, UtU, sums)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of P (q, q), of Q_a'Q_b, and of their products with P_ju over pairs j >= u."""

    P: Floats
    QtQ: Floats
    PP: Floats
    PQtQ: Floats


def _along_pairs(
    blocks: Blocks, order: int, logdet: float, UtU: Floats, sums: _Sums
) -> ProfileTerms:
    """Derivatives along the entries of Psi: an off-diagonal entry moves both its places."""
    pairs, k = blocks.pairs, len(UtU)
    m = len(pairs)
    first, dF = np.zeros(m), np.zeros((m, k, k))
    second, d2F = np.zeros((m, m)), np.zeros((m, m, k, k))
    for x, (a, b) in enumerate(pairs if order else ()):
        N = sums.QtQ[a, :, b, :]
        first[x] = sums.P[a, b] * (1.0 if a == b else 2.0)
        dF[x] = -N if a == b else -(N + N.T)
        for y, (c, d) in enumerate(pairs[: x + 1] if order == 2 else ()):
            second[x, y], d2F[x, y] = _second(sums, (a, b), (c, d))
            second[y, x], d2F[y, x] = second[x, y], d2F[x, y]
    return ProfileTerms(order, logdet, UtU, first, second, dF, d2F)


def _second(sums: _Sums, left: tuple[int, int], right: tuple[int, int]) -> tuple[float, Floats]:
    """d2 logdet and d2 FtHiF along two entries of Psi: sums over both symmetrised pairs."""
    value, N = 0.0, np.zeros((sums.PQtQ.shape[2],) * 2)
    for i, j in {left, left[::-1]}:
        for u, v in {right, right[::-1]}:
            value -= sums.PP[_packed(j, u), _packed(v, i)]
            N += sums.PQtQ[_packed(j, u), i, :, v, :]
    return value, N + N.T


def _packed(a: int, b: int) -> int:
    """Position of entry (a, b) of a symmetric matrix in its lower triangle, row by row."""
    a, b = max(a, b), min(a, b)
    return a * (a + 1) // 2 + b
