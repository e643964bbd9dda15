"""Relative covariance of the random effects: blocks, roots, and lme4's theta.

Conventions. A model has bars j with q_j columns each; ``Psi`` (q, q) is block diagonal. ``theta``
is the concatenation, bar after bar, of the lower triangle of chol(Psi_j), column by column
(lme4's order). ``pairs`` lists entries (a, b), a >= b, of Psi within bars, row by row
(statsmodels' order): derivatives "with respect to Psi" are with respect to these, an off-diagonal
entry counted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats

ALMOST = 1e-6
"""Relative standard deviation, and distance of a correlation from one, that count as none."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes q_j of the bars' blocks.

    Attributes
    ----------
    sizes
        q_j
    held
        positions of bars whose covariance an optimiser keeps at zero: their columns lie within
        another bar's, whose covariance takes up all that theirs could say
    """

    sizes: tuple[int, ...]
    held: tuple[int, ...] = ()

    @property
    def q(self) -> int:
        """Number of random columns, all bars."""
        return sum(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each bar's columns stand among the q."""
        return _slices(self.sizes)

    @property
    def moving(self) -> NDArray[np.bool_]:
        """(q,) columns of a root that an optimiser may change."""
        found = np.ones(self.q, dtype=np.bool_)
        for bar in self.held:
            found[self.slices[bar]] = False
        return found

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Entries (a, b), a >= b, of Psi inside the blocks, row by row."""
        return _pairs(self.sizes)

    @property
    def theta_pairs(self) -> tuple[tuple[int, int], ...]:
        """Entries (row, column) of Lambda in lme4's order: column by column within a bar."""
        return tuple(
            (block.start + a, block.start + b)
            for block in self.slices
            for b in range(block.stop - block.start)
            for a in range(b, block.stop - block.start)
        )

    def split(self, matrix: Floats) -> Iterator[Floats]:
        """Diagonal blocks of a (q, q) matrix."""
        return (matrix[block, block] for block in self.slices)

    def join(self, parts: Iterator[Floats] | list[Floats]) -> Floats:
        """Block-diagonal (q, q) matrix of the bars' blocks."""
        matrix = np.zeros((self.q, self.q))
        for block, part in zip(self.slices, parts, strict=True):
            matrix[block, block] = part
        return matrix

    def root(self, theta: Floats) -> Floats:
        """Lambda (q, q), lower triangular, of theta."""
        Lambda = np.zeros((self.q, self.q))
        for value, (a, b) in zip(theta, self.theta_pairs, strict=True):
            Lambda[a, b] = value
        return Lambda

    def theta(self, root: Floats) -> Floats:
        """Theta with non-negative diagonal of any root: Psi = root root', by QR (never squared)."""
        Lambda = self.join([_lower(part) for part in self.split(root)])
        return np.array([Lambda[a, b] for a, b in self.theta_pairs])

    def symmetric(self, packed: Floats) -> Floats:
        """(q, q) symmetric matrix of a vector over ``pairs``."""
        matrix = np.zeros((self.q, self.q))
        for value, (a, b) in zip(packed, self.pairs, strict=True):
            matrix[a, b] = matrix[b, a] = value
        return matrix


@cache
def _slices(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    ends = np.cumsum(sizes)
    return tuple(slice(int(e) - s, int(e)) for e, s in zip(ends, sizes, strict=True))


@cache
def _pairs(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (block.start + a, block.start + b)
        for block in _slices(sizes)
        for a in range(block.stop - block.start)
        for b in range(a + 1)
    )


def _lower(root: Floats) -> Floats:
    """Lower-triangular L with non-negative diagonal and L L' = root root'."""
    L = np.asarray(np.linalg.qr(root.T, mode="r")).T
    sign = np.where(np.diag(L) < 0, -1.0, 1.0)
    return L * sign + 0.0


def root_derivatives(
    blocks: Blocks, gradient: Floats, hessian: Floats, left: Floats, root: Floats
) -> tuple[Floats, Floats, Floats]:
    """Chain rule from Psi to Delta: ``Psi = root root'`` and ``root`` moves by ``left Delta``.

    With v_c = left[:, c] and r_d = root[:, d]:
    ``dPsi/dDelta_cd = v_c r_d' + r_d v_c'`` and
    ``d2Psi/dDelta_cd dDelta_ef = [d == f] (v_c v_e' + v_e v_c')``.

    Parameters
    ----------
    gradient, hessian
        (m,), (m, m) with respect to ``blocks.pairs`` of Psi
    left, root
        (q, q), block diagonal

    Returns
    -------
    gradient, hessian
        with respect to Delta over ``blocks.theta_pairs``
    G
        (q, q): left' (d f/d Psi, symmetric) left
    """
    pairs, coordinates = blocks.pairs, blocks.theta_pairs
    m = len(pairs)
    J = np.empty((m, m))
    for y, (c, d) in enumerate(coordinates):
        D = np.outer(left[:, c], root[:, d])
        D += D.T
        J[:, y] = [D[a, b] for a, b in pairs]
    half = np.array([g if a == b else 0.5 * g for g, (a, b) in zip(gradient, pairs, strict=True)])
    G = left.T @ blocks.symmetric(half) @ left
    H = J.T @ hessian @ J
    for y, (c, d) in enumerate(coordinates):
        for z, (e, f) in enumerate(coordinates):
            if d == f:
                H[y, z] += 2.0 * G[c, e]
    return J.T @ gradient, H, G


def rebase(blocks: Blocks, root: Floats) -> tuple[Floats, Floats]:
    """Orthogonal V (q, q) and s (q,), descending within each bar, with Psi = V diag(s^2) V'."""
    V, s = np.zeros((blocks.q, blocks.q)), np.zeros(blocks.q)
    for block in blocks.slices:
        U, sizes, _ = np.linalg.svd(root[block, block])
        V[block, block], s[block] = U, sizes
    return V, s


def singular_parts(label: str, names: Sequence[str], cov: Floats) -> list[str]:
    """What is singular in the covariance (q, q) of a bar's effects, in words that end no sentence.

    Parameters
    ----------
    label
        of the bar
    names
        of its q columns
    """
    sd = np.sqrt(np.maximum(np.diag(cov), 0.0))
    zero = sd <= ALMOST * max(sd.max(initial=0.0), np.finfo(np.float64).tiny)
    own = [name for name, z in zip(names, zero, strict=True) if z]
    found = []
    if own:
        whose = label if len(names) == 1 else f"{', '.join(own)} by {label}"
        found.append(f"the variance of {whose} is zero")
    left = np.flatnonzero(~zero)
    R = cov[np.ix_(left, left)] / np.outer(sd[left], sd[left])
    pairs = [(a, b) for a in range(len(left)) for b in range(a) if abs(R[a, b]) > 1.0 - ALMOST]
    found += [
        f"{names[left[b]]} and {names[left[a]]} by {label} have the correlation "
        f"{round(float(R[a, b])):+d}"
        for a, b in pairs
    ]
    if len(left) > 2 and not pairs and np.linalg.eigvalsh(R)[0] < ALMOST:
        found.append(f"one of the {len(left)} effects by {label} is a combination of the others")
    return found
