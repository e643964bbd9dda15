"""What the error of a prediction needs of each cell: its effects' covariance, and their slopes.

For ``b = Psi Z'V^-1 (y - X beta)`` at the estimated beta,

    b_hat - b = (b_tilde - b) - B (beta_hat - beta)        B = Psi Z'V^-1 X

where ``b_tilde``, the predictor at the true beta, has the error variance ``C = Var(b | y, beta)``
and ``b_tilde - b`` is uncorrelated with y, therefore with ``beta_hat`` (Henderson 1975, Biometrics
31, 423-447; Robinson 1991, Statistical Science 6, 15-32). So

    Var(x'beta_hat + z'b_hat - x'beta - z'b) = z'C z + (x - B'z)' Cov(beta_hat) (x - B'z)

which is the quadratic form in the inverse of the mixed model equations; no inverse of Psi appears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dmixed.blocks import Floats
from dmixed.factors import Problem
from dmixed.inference.random_effects import conditional_covariances
from dmixed.levels import Index, clusters
from dmixed.nested import Bucket, SparseMeans, predictor, solve
from dmixed.onelevel import GROUPS, OneLevel, solved

MAX_NUMBERS = 2**27
"""Numbers in the covariances of the leaves of one cluster with all its other levels."""


class TooManyCrossed(ValueError):
    """The leaves of crossed factors have too many covariances: ``numbers`` of them."""

    def __init__(self, numbers: int) -> None:
        super().__init__(numbers)
        self.numbers = numbers


@dataclass(frozen=True, slots=True, eq=False)
class CellErrors:
    """Of the c random columns that the rows of each of N cells have, all terms' side by side.

    Attributes
    ----------
    cov
        (N, c, c): conditional covariance of their effects given beta, user units; zero where a
        term leaves a cell out
    slope
        (N, c, p): B, effects per unit of each fixed effect
    """

    cov: Floats
    slope: Floats


def columns_of_terms(problem: Problem) -> list[slice]:
    """Columns of each term among the c of all."""
    ends = np.cumsum([term.T.shape[1] for term in problem.terms]).tolist()
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def cell_errors(problem: Problem, root: Floats, sigma2: float) -> CellErrors:
    """Covariances and slopes of every cell, at the relative covariance root root' (natural).

    Raises
    ------
    TooManyCrossed
        a cluster of crossed factors is too large
    """
    where = columns_of_terms(problem)
    N, c, p = len(problem.terms[0].codes), where[-1].stop, problem.factors.p
    cov, slope = np.zeros((N, c, c)), np.zeros((N, c, p))
    cluster, first = None if problem.one_level else clusters(problem.terms)[0], 0
    for part in problem.factors.parts:
        if isinstance(part, OneLevel):
            own = slice(first, first + part.n_groups)
            _one_level(part, root, cov[own], slope[own])
            first = own.stop
        else:
            assert cluster is not None
            _bucket(problem, part, root, cluster, cov, slope)
    D = np.zeros((c, c))
    for term, columns in zip(problem.terms, where, strict=True):
        block = problem.factors.blocks.slices[term.block]
        half = np.linalg.inv(problem.natural[block, block])
        size = columns.stop - columns.start
        D[columns, columns] = half[0, 0] * np.eye(size) if term.repeated else half
    to_work = problem.fixed.to_work
    for start in range(0, N, GROUPS):
        some = slice(start, start + GROUPS)
        cov[some] = sigma2 * (D @ cov[some] @ D.T)
        slope[some] = D @ slope[some] @ to_work
    return CellErrors(cov, slope)


def _one_level_roots(part: OneLevel, root: Floats, groups: slice) -> Floats:
    """H (q, q, g) with H'H the relative conditional covariance, natural: L (I + L'R'RL)^-1 L'."""
    q = len(root)
    M = np.matmul(root.T, part.RT[:, :q, groups])
    K = np.einsum("tag,tbg->abg", M, M)
    K[np.arange(q), np.arange(q)] += 1.0
    return _forward(K, root)


def _forward(K: Floats, root: Floats) -> Floats:
    """``chol(K)^-1 root'`` (q, q, g) for K (q, q, g), along the groups."""
    q = len(root)
    C, out = np.zeros_like(K), np.empty_like(K)
    for i in range(q):
        for j in range(i):
            C[i, j] = (K[i, j] - np.einsum("tg,tg->g", C[i, :j], C[j, :j])) / C[j, j]
        C[i, i] = np.sqrt(K[i, i] - np.einsum("tg,tg->g", C[i, :i], C[i, :i]))
        out[i] = (root[:, i, None] - np.einsum("tg,tag->ag", C[i, :i], out[:i])) / C[i, i]
    return out


def _one_level(part: OneLevel, root: Floats, cov: Floats, slope: Floats) -> None:
    Psi, q, p = root @ root.T, len(root), slope.shape[2]
    for start in range(0, part.n_groups, GROUPS):
        groups = slice(start, min(start + GROUPS, part.n_groups))
        V, _ = solved(part.RT[:, :, groups], root)
        Q = np.einsum("tag,tkg->gak", V[:, :q], V[:, q : q + p])
        half = _one_level_roots(part, root, groups)
        cov[groups], slope[groups] = np.einsum("tag,tbg->gab", half, half), Psi @ Q


def effect_variances(problem: Problem, root: Floats, sigma2: float) -> list[Floats]:
    """Per block (n_effects, q_j) conditional variances of its effects given beta, user units."""
    parts, blocks = problem.factors.parts, problem.factors.blocks
    found = [_one_level_variances(problem, x, root) for x in parts if isinstance(x, OneLevel)]
    if len(found) == len(parts):
        variances = sigma2 * np.concatenate(found)
        return [variances[:, where] for where in blocks.slices]
    number = range(len(blocks.sizes))
    covariances = (conditional_covariances(problem, root, sigma2, block) for block in number)
    return [np.einsum("naa->na", cov).copy() for cov in covariances]


def _one_level_variances(problem: Problem, part: OneLevel, root: Floats) -> Floats:
    """Relative conditional variances (G, q), user units."""
    half, out = np.linalg.inv(problem.natural), np.empty((part.n_groups, len(root)))
    for start in range(0, part.n_groups, GROUPS):
        groups = slice(start, min(start + GROUPS, part.n_groups))
        user = half @ _one_level_roots(part, root, groups).T  # (g, q, q) from (q, q, g)
        out[groups] = np.einsum("gat,gat->ga", user, user)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where the c columns of some cells stand in their bucket.

    Attributes
    ----------
    cells
        (m,) which cells, in the order of their clusters
    position
        (m,) place of each one's cluster in the bucket
    rest
        (m, c) column of the rest, -1 for the leaves' and where a cell is left out
    leaf
        (m,) number of the leaf, -1 for none
    leaf_column
        which of the c columns is the leaves'
    """

    cells: Index
    position: Index
    rest: Index
    leaf: Index
    leaf_column: int | None

    def of(self, groups: slice) -> _Places:
        """Those of a slice of clusters, counted from its start."""
        some = slice(*np.searchsorted(self.position, [groups.start, groups.stop]).tolist())
        position = self.position[some] - groups.start
        return _Places(
            self.cells[some], position, self.rest[some], self.leaf[some], self.leaf_column
        )


def _places(problem: Problem, part: Bucket, cluster: Index) -> _Places:
    position = np.searchsorted(part.clusters, cluster)
    position[position == part.n_groups] = 0
    here = np.flatnonzero(part.clusters[position] == cluster)
    here = here[np.argsort(position[here], kind="stable")]
    where = columns_of_terms(problem)
    rest = np.full((len(here), where[-1].stop), -1, np.intp)
    leaf, leaf_column = np.full(len(here), -1, np.intp), None
    for term, own, base in zip(problem.terms, where, _bases(problem), strict=True):
        codes, c = term.codes[here], term.T.shape[1]
        used = codes >= 0
        if term.block == part.leaf:
            place = _inverse(part.leaf_levels, np.arange(part.d.shape[1]), term.n_levels)
            leaf[used], leaf_column = place[codes[used]], own.start
            continue
        span, levels = next(
            ((s, x) for s, x in zip(part.spans, part.rest_levels, strict=True)
             if s.block == term.block), (None, None)
        )  # fmt: skip
        if span is None or levels is None:  # no level of the block in these clusters
            continue
        at = span.start + span.size * np.arange(span.levels)
        place = _inverse(levels, at, base + term.size)
        for a in range(c):
            number = base + (codes * c + a if term.repeated else codes)
            found = place[number[used]]
            rest[used, own.start + a] = found + (0 if term.repeated else a)
    return _Places(here, position[here], rest, leaf, leaf_column)


def _bases(problem: Problem) -> Iterator[int]:
    """Number of each term's first effect among those of its block."""
    bases = dict.fromkeys((term.block for term in problem.terms), 0)
    for term in problem.terms:
        yield bases[term.block]
        bases[term.block] += term.size if term.repeated else term.n_levels


def _inverse(levels: Index, at: Index, n: int) -> Index:
    """Place (n,) of each effect, given the effects (G, L) at the places (L,) of each cluster."""
    place = np.full(max(n, int(levels.max(initial=-1)) + 1), -1, np.intp)
    met = levels >= 0
    place[levels[met]] = np.broadcast_to(at, levels.shape)[met]
    return place


def _bucket(
    problem: Problem, part: Bucket, root: Floats, cluster: Index, cov: Floats, slope: Floats
) -> None:
    blocks, p = problem.factors.blocks, slope.shape[2]
    numbers = part.d.shape[1] * part.A.shape[1]
    if isinstance(part.abar, SparseMeans) and numbers > MAX_NUMBERS:
        raise TooManyCrossed(numbers)
    places = _places(problem, part, cluster)
    for start in range(0, part.n_groups, part.step):
        groups = slice(start, min(start + part.step, part.n_groups))
        at, own = solve(blocks, part, root, groups), places.of(groups)
        M, g, columns = predictor(blocks, at, root), own.position, range(own.rest.shape[1])
        for i in columns:
            met = own.rest[:, i] >= 0
            slope[own.cells[met], i] = at.E[g[met], own.rest[met, i], :p]
            for j in columns:
                both = met & (own.rest[:, j] >= 0)
                values = M[g[both], own.rest[both, i], own.rest[both, j]]
                cov[own.cells[both], i, j] = values
        if own.leaf_column is None or part.leaf is None:
            continue
        tau2 = float(root[(blocks.slices[part.leaf].start,) * 2] ** 2)
        met, l_ = own.leaf >= 0, own.leaf_column
        cells, g, leaf, rest = own.cells[met], g[met], own.leaf[met], own.rest[met]
        weight = tau2 * at.om[g, leaf]
        slope[cells, l_] = weight[:, None] * at.rho[g, leaf, :p]
        Ma = part.abar.times(groups, M)  # (g, n, r)
        spread = _quadratic(part, groups, Ma)
        own_variance = tau2 / (1.0 + tau2 * part.d[groups][g, leaf])
        cov[cells, l_, l_] = own_variance + weight**2 * spread[g, leaf]
        for i in columns:
            both = rest[:, i] >= 0
            cross = -weight[both] * Ma[g[both], leaf[both], rest[both, i]]
            cov[cells[both], i, l_] = cov[cells[both], l_, i] = cross


def _quadratic(part: Bucket, groups: slice, Ma: Floats) -> Floats:
    """``abar'M abar`` of each leaf (g, n), given ``abar M`` (g, n, r)."""
    if isinstance(part.abar, SparseMeans):
        return np.asarray(part.abar.matrix.multiply(Ma[0]).sum(axis=1)).reshape(1, -1)
    return np.asarray(np.einsum("gnr,gnr->gn", Ma, part.abar.values[groups]))
