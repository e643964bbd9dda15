"""Conditional modes (BLUPs) and conditional covariances of the random effects.

``b = Psi W'H^-1 (y - X beta)`` and ``Var(b | y, beta) = sigma2 (Psi - Psi W'H^-1 W Psi)``
(Robinson 1991, Statistical Science 6, 15-32), from the factors of `onelevel` and `nested`; no
inverse of Psi, so a singular covariance is an ordinary case.

The effects of a block are numbered term after term, level by level (of a term whose columns are
independent effects of one variance: column by column within a level).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats
from dmixed.factors import Problem
from dmixed.nested import Bucket, predictor, solve
from dmixed.onelevel import GROUPS, OneLevel, solved


def n_effects(problem: Problem, block: int) -> int:
    """Number of effects of a block, each of the block's size."""
    terms = [term for term in problem.terms if term.block == block]
    return sum(term.size if term.repeated else term.n_levels for term in terms)


def _to_user(problem: Problem, block: int) -> Floats:
    """(q_j, q_j): user effects of natural ones."""
    where = problem.factors.blocks.slices[block]
    return np.asarray(np.linalg.inv(problem.natural[where, where]))


def conditional_modes(problem: Problem, root: Floats, beta: Floats) -> tuple[Floats, ...]:
    """BLUPs per block (n_effects, q_j), user units of y per unit of each random column.

    Parameters
    ----------
    root
        (q, q) root of the relative covariance, natural coordinates
    beta
        (p,) estimates in working coordinates, see `likelihood.FixedEstimates`
    """
    blocks = problem.factors.blocks
    v = np.append(-beta, problem.factors.y_scale)
    found = [np.zeros((n_effects(problem, j), size)) for j, size in enumerate(blocks.sizes)]
    first = 0
    for part in problem.factors.parts:
        if isinstance(part, OneLevel):
            own = [b[first : first + part.n_groups] for b in found]
            _one_level_modes(problem, part, root, v, own)
            first += part.n_groups
        else:
            _bucket_modes(problem, part, root, v, found)
    return tuple(b @ _to_user(problem, j).T for j, b in enumerate(found))


def _one_level_modes(
    problem: Problem, part: OneLevel, root: Floats, v: Floats, found: list[Floats]
) -> None:
    blocks = problem.factors.blocks
    Psi, q = root @ root.T, blocks.q
    for start in range(0, part.n_groups, GROUPS):
        V, _ = solved(part.RT[:, :, start : start + GROUPS], root)
        residual = np.einsum("k,tkg->tg", v, V[:, q:])
        b = np.einsum("tag,tg->ga", V[:, :q], residual) @ Psi
        for j, where in enumerate(blocks.slices):
            found[j][start : start + GROUPS] = b[:, where]


def _bucket_modes(
    problem: Problem, part: Bucket, root: Floats, v: Floats, found: list[Floats]
) -> None:
    blocks = problem.factors.blocks
    for start in range(0, part.n_groups, part.step):
        groups = slice(start, min(start + part.step, part.n_groups))
        at = solve(blocks, part, root, groups)
        b = at.E @ v
        for span, levels in zip(part.spans, part.rest_levels, strict=True):
            own = b[:, span.start : span.stop].reshape(len(b), span.levels, span.size)
            met = levels[groups] >= 0
            found[span.block][levels[groups][met]] = own[met]
        if part.leaf is not None:
            tau2 = _leaf_variance(problem, part.leaf, root)
            met = part.leaf_levels[groups] >= 0
            effects = tau2 * at.om * (at.rho @ v)
            found[part.leaf][part.leaf_levels[groups][met], 0] = effects[met]


def _leaf_variance(problem: Problem, leaf: int, root: Floats) -> float:
    at = problem.factors.blocks.slices[leaf].start
    return float(root[at, at] ** 2)


def conditional_covariances(problem: Problem, root: Floats, sigma2: float, block: int) -> Floats:
    """Conditional covariances (n_effects, q_j, q_j) of the effects of a block, user units."""
    size = problem.factors.blocks.sizes[block]
    out = np.zeros((n_effects(problem, block), size, size))
    first = 0
    for part in problem.factors.parts:
        if isinstance(part, OneLevel):
            where, own = problem.factors.blocks.slices[block], out[first : first + part.n_groups]
            for start in range(0, part.n_groups, GROUPS):
                groups = slice(start, min(start + GROUPS, part.n_groups))
                own[groups] = _one_level_covariances(part, root, groups)[:, where, where]
            first += part.n_groups
        else:
            _bucket_covariances(problem, part, root, block, out)
    half = _to_user(problem, block)
    return np.asarray(sigma2 * half @ out @ half.T)


def _one_level_covariances(part: OneLevel, root: Floats, groups: slice) -> Floats:
    """Relative conditional covariances (g, q, q), natural coordinates."""
    q = len(root)
    M = np.matmul(root.T, part.RT[:, :q, groups])
    K = np.eye(q) + np.einsum("tag,tbg->gab", M, M)
    return np.asarray(root @ np.linalg.solve(K, np.broadcast_to(root.T, K.shape)))


def _bucket_covariances(
    problem: Problem, part: Bucket, root: Floats, block: int, out: Floats
) -> None:
    blocks = problem.factors.blocks
    for start in range(0, part.n_groups, part.step):
        groups = slice(start, min(start + part.step, part.n_groups))
        at = solve(blocks, part, root, groups)
        M = predictor(blocks, at, root)
        for span, levels in zip(part.spans, part.rest_levels, strict=True):
            if span.block != block:
                continue
            own = M[:, span.start : span.stop, span.start : span.stop]
            own = own.reshape(len(M), span.levels, span.size, span.levels, span.size)
            met = levels[groups] >= 0
            out[levels[groups][met]] = np.einsum("gtatb->gtab", own)[met]
        if part.leaf == block:
            tau2 = _leaf_variance(problem, block, root)
            spread = _spread(part, groups, M)
            variance = tau2 / (1.0 + tau2 * part.d[groups]) + (tau2 * at.om) ** 2 * spread
            met = part.leaf_levels[groups] >= 0
            out[part.leaf_levels[groups][met], 0, 0] = variance[met]


def _rows(part: Bucket, groups: slice) -> Floats:
    """The leaves' means abar (g, n, r), dense."""
    eye = np.eye(part.A.shape[1])
    count = len(range(*groups.indices(part.n_groups)))
    return part.abar.times(groups, np.broadcast_to(eye, (count, *eye.shape)))


def _spread(part: Bucket, groups: slice, M: Floats) -> Floats:
    """``abar'M abar`` of each leaf, (g, n)."""
    return np.asarray(np.einsum("gnr,gnr->gn", part.abar.times(groups, M), _rows(part, groups)))


@dataclass(frozen=True, slots=True)
class JointCovariance:
    """Conditional covariance of all effects of one cluster, user units.

    Attributes
    ----------
    effects
        (c, 3): block, number of the effect in its block, column
    cov
        (c, c)
    """

    effects: NDArray[np.intp]
    cov: Floats


def joint_covariance(
    problem: Problem, root: Floats, sigma2: float, cluster: int
) -> JointCovariance:
    """Conditional covariance of all effects of one cluster (of a group, with one factor)."""
    blocks, first = problem.factors.blocks, 0
    for part in problem.factors.parts:
        if isinstance(part, OneLevel):
            place = cluster - first
            first += part.n_groups
            if place >= part.n_groups:
                continue
            half = np.linalg.inv(problem.natural)
            cov = _one_level_covariances(part, root, slice(place, place + 1))[0]
            effects = [(j, cluster, a) for j, size in enumerate(blocks.sizes) for a in range(size)]
            return JointCovariance(np.array(effects, dtype=np.intp), sigma2 * half @ cov @ half.T)
        position = np.searchsorted(part.clusters, cluster)
        if position < part.n_groups and part.clusters[position] == cluster:
            return _bucket_joint(problem, part, root, sigma2, int(position))
    raise IndexError(cluster)


def _bucket_joint(
    problem: Problem, part: Bucket, root: Floats, sigma2: float, position: int
) -> JointCovariance:
    blocks, one = problem.factors.blocks, slice(position, position + 1)
    at = solve(blocks, part, root, one)
    M = predictor(blocks, at, root)[0]
    effects: list[tuple[int, int, int]] = []
    scales: list[Floats] = []
    for span, levels in zip(part.spans, part.rest_levels, strict=True):
        effects += [(span.block, int(t), a) for t in levels[position] for a in range(span.size)]
        scales.append(np.asarray(np.kron(np.eye(span.levels), _to_user(problem, span.block))))
    cov = M
    if part.leaf is not None:
        tau2, om, abar = _leaf_variance(problem, part.leaf, root), at.om[0], _rows(part, one)[0]
        P_lr = tau2 * om[:, None] * abar
        leaves = np.diag(tau2 / (1.0 + tau2 * part.d[position])) + P_lr @ M @ P_lr.T
        cov = np.block([[M, -M @ P_lr.T], [-P_lr @ M, leaves]])
        effects += [(part.leaf, int(t), 0) for t in part.leaf_levels[position]]
        scales.append(np.eye(len(om)) * _to_user(problem, part.leaf)[0, 0])
    half = _join(scales)
    found = np.array(effects, dtype=np.intp)
    met = found[:, 1] >= 0
    return JointCovariance(found[met], (sigma2 * half @ cov @ half.T)[np.ix_(met, met)])


def _join(parts: list[Floats]) -> Floats:
    size = sum(map(len, parts))
    out, start = np.zeros((size, size)), 0
    for part in parts:
        out[start : start + len(part), start : start + len(part)] = part
        start += len(part)
    return out
