"""The sums of a model with several random factors: leaves in closed form, the rest dense.

Rows fall into *clusters* that share no level of any factor. In each, W = [W_r V]: V are the
indicators of the levels of one scalar component (its *leaves*), times a weight per row, so that
V'V is diagonal; W_r are all other random columns (*rest*). With d = v'v and the leaf means
abar = W_r'v / d, bbar = F'v / d, and the moments A, B of W_r and F within leaves,

    om = d / (1 + tau2 d)    A1 = A + sum om abar abar'    B1 = B + sum om abar bbar'
    K = I + L'A1 L = C C'    Z = K^-1 L'A1    z = K^-1 L'B1    E = L z    rho = bbar - E'abar
    logdet = sum log(1 + tau2 d) + 2 log|C|
    FtHiF  = F_w + z'z - B'E - E'B + E'A E + sum om rho rho'

E are the best linear predictors of the rest, so FtHiF is a sum of squares at its minimum over E:
rounding of E enters squared. In the same way, with T = I - L Z and M = L K^-1 L',

    P = W_r'H^-1 W_r = T'A1 T + Z'Z            Q = W_r'H^-1 F = T'(B1 - A1 E) + Z'z

and for the leaves Q_l = om rho, P_lr = om abar'T, P_ll = diag(om) - om abar'M abar om. No Psi is
inverted. A column of zeros (padding, where clusters differ in their numbers of levels)
contributes log 1 = 0 and P = Q = 0 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.terms import ProfileTerms

CELLS = 2**17
"""Numbers in the arrays evaluated at a time: they stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where the columns of one block of Psi stand among the r columns of the rest.

    ``levels`` copies of its ``size`` columns, level by level, from ``start``.
    """

    block: int
    start: int
    levels: int
    size: int

    @property
    def stop(self) -> int:
        """End of the span."""
        return self.start + self.levels * self.size

    def column(self, a: int) -> slice:
        """Positions of column a of the block at all levels."""
        return slice(self.start + a, self.stop, self.size)


@dataclass(frozen=True, slots=True)
class DenseMeans:
    """Means abar of the rest's columns over the leaves, (G, n, r)."""

    values: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """Clusters, leaves, columns."""
        return self.values.shape

    def products(self, groups: slice, weights: Floats, right: Floats | None = None) -> Floats:
        """Sum over leaves of weights (g, n) times abar right', (g, r, c); abar by default."""
        abar = self.values[groups]
        return np.asarray(_T(weights[:, :, None] * abar) @ (abar if right is None else right))

    def times(self, groups: slice, E: Floats) -> Floats:
        """``abar E`` (g, n, c) for E (g, r, c)."""
        return np.asarray(self.values[groups] @ E)


@dataclass(frozen=True, slots=True)
class SparseMeans:
    """The same for one cluster of crossed factors, where most means are zero."""

    matrix: Any  # scipy.sparse.csr_array (n, r)

    @property
    def shape(self) -> tuple[int, ...]:
        """Clusters, leaves, columns."""
        return (1, *self.matrix.shape)

    def products(self, groups: slice, weights: Floats, right: Floats | None = None) -> Floats:
        """See `DenseMeans.products`."""
        del groups
        left = self.matrix.T.multiply(weights[0]).tocsr()
        found = left @ (self.matrix if right is None else right[0])
        return np.asarray(found.toarray() if right is None else found)[None]

    def times(self, groups: slice, E: Floats) -> Floats:
        """See `DenseMeans.times`."""
        del groups
        return np.asarray(self.matrix @ E[0])[None]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Clusters of about equal numbers of levels, padded with zeros to the same shape.

    Attributes
    ----------
    leaf
        block of Psi of the leaves, or None
    spans
        columns of the rest, r in all
    A, B
        (G, r, r), (G, r, k): moments of W_r and [W_r'F] within leaves
    d, abar, bbar
        (G, n), (G, n, r), (G, n, k): size and means of the leaves
    clusters
        (G,) number of each cluster
    rest_levels
        per span (G, levels): number of the level in its block, -1 where padded
    leaf_levels
        (G, n), likewise
    """

    leaf: int | None
    spans: tuple[Span, ...]
    A: Floats
    B: Floats
    d: Floats
    abar: DenseMeans | SparseMeans
    bbar: Floats
    clusters: np.ndarray
    rest_levels: tuple[np.ndarray, ...]
    leaf_levels: np.ndarray

    def __post_init__(self) -> None:
        G, r, k = self.B.shape
        n = self.d.shape[1]
        assert self.A.shape == (G, r, r)
        assert self.d.shape == self.leaf_levels.shape == (G, n)
        assert self.abar.shape == (G, n, r)
        assert self.bbar.shape == (G, n, k)
        assert r == (self.spans[-1].stop if self.spans else 0)
        assert self.leaf is not None or n == 0

    @property
    def n_groups(self) -> int:
        """Number of clusters, G."""
        return len(self.d)

    @property
    def step(self) -> int:
        """Clusters evaluated at a time."""
        r, n, k = self.A.shape[1], self.d.shape[1], self.B.shape[2]
        return max(1, CELLS // (2 * r * (r + k) + 2 * n * (r + k) + 1))


@dataclass(frozen=True, slots=True)
class Solved:
    """A slice of a bucket, solved at one Psi; see the module's formulas."""

    bucket: Bucket
    groups: slice
    logdet: float
    om: Floats  # (g, n)
    A1: Floats  # (g, r, r)
    B1: Floats  # (g, r, k)
    LtA1: Floats  # (g, r, r): L'A1
    K: Floats  # (g, r, r)
    z: Floats  # (g, r, k)
    E: Floats  # (g, r, k)
    rho: Floats  # (g, n, k)

    def products(self, weights: Floats, right: Floats | None = None) -> Floats:
        """See `DenseMeans.products`."""
        return self.bucket.abar.products(self.groups, weights, right)


def solve(blocks: Blocks, bucket: Bucket, root: Floats, groups: slice) -> Solved:
    """Solve a slice of the clusters at Psi = root root' (q, q)."""
    d, bbar = bucket.d[groups], bucket.bbar[groups]
    tau2 = 0.0 if bucket.leaf is None else float(root[(blocks.slices[bucket.leaf].start,) * 2] ** 2)
    om = d / (1.0 + tau2 * d)
    A1 = bucket.A[groups] + bucket.abar.products(groups, om)
    B1 = bucket.B[groups] + bucket.abar.products(groups, om, bbar)
    LtA1 = scaled(blocks, bucket.spans, root, A1)
    K = _T(scaled(blocks, bucket.spans, root, _T(LtA1)))
    r = K.shape[1]
    K[:, np.arange(r), np.arange(r)] += 1.0
    diagonal = np.einsum("gii->gi", np.linalg.cholesky(K))
    logdet = float(np.log1p(tau2 * d).sum() + 2.0 * np.log(diagonal).sum())
    z = _solve(K, scaled(blocks, bucket.spans, root, B1))
    E = scaled(blocks, bucket.spans, root.T, z)
    return Solved(
        bucket, groups, logdet, om, A1, B1, LtA1, K, z, E, bbar - bucket.abar.times(groups, E)
    )


def _T(M: Floats) -> Floats:
    return M.swapaxes(1, 2)


def _solve(K: Floats, right: Floats) -> Floats:
    return np.asarray(np.linalg.solve(K, right), dtype=np.float64)


def scaled(blocks: Blocks, spans: tuple[Span, ...], root: Floats, M: Floats) -> Floats:
    """``L'M`` for M (g, r, c) and L the root of each block of Psi repeated over its levels."""
    out = np.empty(M.shape)
    for span in spans:
        block = blocks.slices[span.block]
        part = M[:, span.start : span.stop]
        if span.size == 1:
            np.multiply(part, root[block.start, block.start], out=out[:, span.start : span.stop])
        else:
            by_level = part.reshape(len(M), span.levels, span.size, M.shape[2])
            product = np.matmul(root[block, block].T, by_level)
            out[:, span.start : span.stop] = product.reshape(part.shape)
    return out


def bucket_terms(
    blocks: Blocks, bucket: Bucket, root: Floats, order: int, groups: slice
) -> ProfileTerms:
    """Terms of some of the clusters at Psi = root root', up to derivatives of an order."""
    start, stop, _ = groups.indices(bucket.n_groups)
    total: ProfileTerms | None = None
    for first in range(start, stop, bucket.step):
        chunk = slice(first, min(first + bucket.step, stop))
        found = _terms(blocks, solve(blocks, bucket, root, chunk), root, order)
        total = found if total is None else total + found
    assert total is not None
    return total


def _terms(blocks: Blocks, at: Solved, root: Floats, order: int) -> ProfileTerms:
    bucket, m, k = at.bucket, len(blocks.pairs), at.B1.shape[2]
    rest = bucket.A[at.groups] @ at.E - 2.0 * bucket.B[at.groups]
    own = _T(at.z) @ at.z + _T(at.E) @ rest + _T(at.om[:, :, None] * at.rho) @ at.rho
    # Large sums that cancel against F_w: numpy adds pairwise along contiguous memory.
    FtHiF = np.ascontiguousarray(own.reshape(len(own), -1).T).sum(axis=1).reshape(k, k)
    FtHiF = 0.5 * (FtHiF + FtHiF.T)
    first, dF = np.zeros(m), np.zeros((m, k, k))
    second, d2F = np.zeros((m, m)), np.zeros((m, m, k, k))
    if order:
        rest_sums = _Rest.of(blocks, at, root)
        rest_sums.first(blocks, first, dF)
        if bucket.leaf is not None:
            leaf = _Leaf.of(blocks, at, root)
            leaf.first(first, dF)
        if order == 2:
            rest_sums.second(blocks, second, d2F)
            if bucket.leaf is not None:
                leaf.second(blocks, rest_sums, second, d2F)
    return ProfileTerms(order, at.logdet, FtHiF, first, second, dF, d2F)


def _gram(left: Floats, right: Floats) -> Floats:
    """Sum over clusters and columns of left' right, (k, k)."""
    k = left.shape[2]
    return np.asarray(np.dot(left.reshape(-1, k).T, right.reshape(-1, k)))


def _pairs_of(blocks: Blocks, block: int) -> list[tuple[int, int, int]]:
    """(position in ``blocks.pairs``, a, b) of the entries of one block, a and b within it."""
    where = blocks.slices[block]
    return [
        (x, a - where.start, b - where.start)
        for x, (a, b) in enumerate(blocks.pairs)
        if where.start <= a < where.stop
    ]


@dataclass(frozen=True, slots=True)
class _Rest:
    """P (g, r, r), Q (g, r, k) and T (g, r, r) of the rest, and their sums."""

    at: Solved
    P: Floats
    Q: Floats
    T: Floats

    @classmethod
    def of(cls, blocks: Blocks, at: Solved, root: Floats) -> _Rest:
        spans = at.bucket.spans
        Z = _solve(at.K, at.LtA1)
        T = -scaled(blocks, spans, root.T, Z)
        r = T.shape[1]
        T[:, np.arange(r), np.arange(r)] += 1.0
        P = _T(T) @ (at.A1 @ T) + _T(Z) @ Z
        Q = _T(T) @ (at.B1 - at.A1 @ at.E) + _T(Z) @ at.z
        return cls(at, P, Q, T)

    def first(self, blocks: Blocks, first: Floats, dF: Floats) -> None:
        """Derivatives along the entries of the rest's blocks."""
        for span in self.at.bucket.spans:
            for x, a, b in _pairs_of(blocks, span.block):
                i, j = span.column(a), span.column(b)
                trace = float(np.einsum("gtt->", self.P[:, i, j]))
                N = _gram(self.Q[:, i], self.Q[:, j])
                first[x] += trace if a == b else 2.0 * trace
                dF[x] -= N if a == b else N + N.T

    def second(self, blocks: Blocks, second: Floats, d2F: Floats) -> None:
        """Second derivatives along two entries of the rest's blocks."""
        spans = self.at.bucket.spans
        for s, left in enumerate(spans):
            for right in spans[: s + 1]:
                for x, a, b in _pairs_of(blocks, left.block):
                    for y, c, d in _pairs_of(blocks, right.block):
                        if y > x and left is right:
                            continue
                        value, N = self._along(left, (a, b), right, (c, d))
                        second[x, y] += value
                        d2F[x, y] += N
                        if x != y:
                            second[y, x] += value
                            d2F[y, x] += N

    def _along(
        self, left: Span, ab: tuple[int, int], right: Span, cd: tuple[int, int]
    ) -> tuple[float, Floats]:
        value, N = 0.0, np.zeros((self.Q.shape[2],) * 2)
        for i, j in {ab, ab[::-1]}:
            for u, v in {cd, cd[::-1]}:
                P_ju = self.P[:, left.column(j), right.column(u)]
                P_iv = self.P[:, left.column(i), right.column(v)]
                value -= float(np.einsum("gts,gts->", P_ju, P_iv))
                N += _gram(self.Q[:, left.column(i)], P_ju @ self.Q[:, right.column(v)])
        return value, N + N.T


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Sums over the leaves of each cluster, and over all of them.

    C2, C3 (g, r, r): sums of om^2, om^3 times abar abar'; D2 (g, r, k): of om^2 abar rho'.
    """

    at: Solved
    x: int
    M: Floats
    C2: Floats
    C3: Floats
    D2: Floats

    @classmethod
    def of(cls, blocks: Blocks, at: Solved, root: Floats) -> _Leaf:
        assert at.bucket.leaf is not None
        om2 = at.om * at.om
        return cls(
            at,
            _pairs_of(blocks, at.bucket.leaf)[0][0],
            predictor(blocks, at, root),
            at.products(om2),
            at.products(at.om * om2),
            at.products(om2, at.rho),
        )

    def first(self, first: Floats, dF: Floats) -> None:
        """Derivatives along the leaves' variance."""
        first[self.x] += float(self.at.om.sum() - np.einsum("gab,gab->", self.M, self.C2))
        q = self.at.om[:, :, None] * self.at.rho
        dF[self.x] -= _gram(q, q)

    def second(self, blocks: Blocks, rest: _Rest, second: Floats, d2F: Floats) -> None:
        """Second derivatives along the leaves' variance, and along it and the rest's entries."""
        at, x = self.at, self.x
        MC = self.M @ self.C2
        square = np.einsum("gab,gba->", MC, MC) - 2.0 * np.einsum("gab,gab->", self.M, self.C3)
        second[x, x] -= float((at.om**2).sum() + square)
        q = at.om[:, :, None] * at.rho
        d2F[x, x] += 2.0 * (_gram(at.om[:, :, None] * q, q) - _gram(self.D2, self.M @ self.D2))
        TD, TCT = _T(rest.T) @ self.D2, _T(rest.T) @ (self.C2 @ rest.T)
        for span in at.bucket.spans:
            for y, a, b in _pairs_of(blocks, span.block):
                value, N = 0.0, np.zeros(d2F.shape[2:])
                for i, j in {(a, b), (b, a)}:
                    value -= float(np.einsum("gtt->", TCT[:, span.column(i), span.column(j)]))
                    N += _gram(rest.Q[:, span.column(i)], TD[:, span.column(j)])
                second[x, y] += value
                second[y, x] += value
                d2F[x, y] += N + N.T
                d2F[y, x] += N + N.T


def predictor(blocks: Blocks, at: Solved, root: Floats) -> Floats:
    """``M = L K^-1 L'`` (g, r, r): conditional covariance of the rest, over sigma2."""
    spans, r = at.bucket.spans, at.K.shape[1]
    eye = np.broadcast_to(np.eye(r), at.K.shape)
    half = _solve(at.K, scaled(blocks, spans, root, eye))
    M = scaled(blocks, spans, root.T, half)
    return 0.5 * (M + _T(M))
