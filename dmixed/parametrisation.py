"""Free coordinates of fixed effects and of covariances some entries of which are held."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.held import Held, Piece
from dmixed.inference.joint import Derivatives
from dmixed.params import lower_root

SMALL = 1e-3
"""Free variances start at least this (root) away from zero, where the gradient along them is."""


@dataclass(frozen=True, slots=True)
class _Root:
    """Lower triangle of the Cholesky factor, but for its first ``fixed`` rows.

    With the held entries those of the first columns, Psi stays what it is there and is a
    covariance whatever the other rows of the factor are.
    """

    columns: tuple[int, ...]
    fixed: int

    @property
    def entries(self) -> list[tuple[int, int]]:
        """Free entries (row, column) of the factor."""
        return [(a, b) for a in range(self.fixed, len(self.columns)) for b in range(a + 1)]

    def start(self, Psi: Floats) -> Floats:
        L = lower_root(Psi[np.ix_(self.columns, self.columns)])
        diagonal = np.arange(self.fixed, len(L))
        L = L.copy()
        L[diagonal, diagonal] = np.maximum(L[diagonal, diagonal], SMALL)
        return np.array([L[entry] for entry in self.entries])

    def factor(self, x: Floats, Psi: Floats) -> Floats:
        L = np.zeros((len(self.columns),) * 2)
        own = self.columns[: self.fixed]
        L[: self.fixed, : self.fixed] = lower_root(Psi[np.ix_(own, own)])
        for value, entry in zip(x, self.entries, strict=True):
            L[entry] = value
        return L

    def put(self, x: Floats, held: Floats, Psi: Floats) -> None:
        L = self.factor(x, held)
        Psi[np.ix_(self.columns, self.columns)] = L @ L.T

    def derivatives(self, x: Floats, held: Floats, g: Floats) -> tuple[Floats, Floats]:
        """D Psi (q, q) along each coordinate, and sum of g_ab d2 Psi_ab along two; g symmetric."""
        L, q = self.factor(x, held), len(held)
        D = np.zeros((len(x), q, q))
        for s, (c, d) in enumerate(self.entries):
            D[s, self.columns[c], self.columns] += L[:, d]
            D[s, self.columns, self.columns[c]] += L[:, d]
        own = g[np.ix_(self.columns, self.columns)]
        second = np.array(
            [[2.0 * own[c, e] * (d == f) for e, f in self.entries] for c, d in self.entries]
        ).reshape(len(x), len(x))
        return D, second


@dataclass(frozen=True, slots=True)
class _Entries:
    """Free entries of Psi themselves, where held ones lie between them."""

    pairs: tuple[tuple[int, int], ...]

    def start(self, Psi: Floats) -> Floats:
        return np.array([Psi[pair] for pair in self.pairs])

    def put(self, x: Floats, held: Floats, Psi: Floats) -> None:
        del held
        for value, (a, b) in zip(x, self.pairs, strict=True):
            Psi[a, b] = Psi[b, a] = value

    def derivatives(self, x: Floats, held: Floats, g: Floats) -> tuple[Floats, Floats]:
        del g
        D = np.zeros((len(x), len(held), len(held)))
        for s, (a, b) in enumerate(self.pairs):
            D[s, a, b] = D[s, b, a] = 1.0
        return D, np.zeros((len(x), len(x)))


def _of(part: Piece, free: Floats) -> _Root | _Entries | None:
    """How a piece moves; ``free`` (q, q) is one where an entry is free."""
    if part.kind == "held":
        return None
    inside = free[np.ix_(part.columns, part.columns)] > 0
    # Columns with a held entry; if all their mutual entries are held and no others, they go first
    with_held = (~inside).any(axis=1)
    block = np.outer(with_held, with_held)
    if not (block & inside).any() and not (~block & ~inside).any():
        order = np.argsort(~with_held, kind="stable")
        return _Root(tuple(part.columns[i] for i in order), int(with_held.sum()))
    own = part.columns
    pairs = [(a, b) for a in own for b in own if b <= a and free[a, b] > 0]
    return _Entries(tuple(pairs))


@dataclass(frozen=True)
class Coordinates:
    """Free coordinates x: free fixed effects (if they are coordinates), then those of Psi.

    Attributes
    ----------
    with_beta
        the fixed effects are coordinates; else they are profiled out
    """

    blocks: Blocks
    held: Held
    parts: tuple[Piece, ...]
    with_beta: bool

    @cached_property
    def _moving(self) -> list[_Root | _Entries]:
        free = self.blocks.symmetric(self.held.free_pairs.astype(np.float64))
        return [found for part in self.parts if (found := _of(part, free)) is not None]

    @cached_property
    def _slices(self) -> list[slice]:
        sizes = [len(piece.start(self.held.Psi)) for piece in self._moving]
        ends = np.cumsum([self._n_beta, *sizes]).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    @property
    def _n_beta(self) -> int:
        return int(self.held.free_beta.sum()) if self.with_beta else 0

    def start(self) -> Floats:
        """Coordinates of the held values, free variances of zero moved a little off zero."""
        beta = self.held.beta[self.held.free_beta] if self.with_beta else np.zeros(0)
        return np.concatenate([beta, *(piece.start(self.held.Psi) for piece in self._moving)])

    def values(self, x: Floats) -> tuple[Floats, Floats]:
        """Fixed effects (p,) and Psi (q, q) at coordinates."""
        beta, Psi = self.held.beta.copy(), self.held.Psi.copy()
        if self.with_beta:
            beta[self.held.free_beta] = x[: self._n_beta]
        for piece, where in zip(self._moving, self._slices, strict=True):
            piece.put(x[where], self.held.Psi, Psi)
        return beta, Psi

    def pull(self, x: Floats, at: Derivatives) -> Derivatives:
        """Derivatives along x from those along [beta (if with_beta), entries of Psi]."""
        J, second = self.jacobian(x, at.gradient)
        return Derivatives(at.value, J.T @ at.gradient, J.T @ at.hessian @ J + second)

    def jacobian(self, x: Floats, gradient: Floats) -> tuple[Floats, Floats]:
        """J (K, n) of [beta, entries of Psi] along x, and the sum of gradient times d2 (n, n)."""
        p = len(self.held.beta) if self.with_beta else 0
        pairs = self.blocks.pairs
        J, second = np.zeros((len(gradient), len(x))), np.zeros((len(x), len(x)))
        if self.with_beta:
            J[np.flatnonzero(self.held.free_beta), np.arange(self._n_beta)] = 1.0
        half = [v if a == b else 0.5 * v for v, (a, b) in zip(gradient[p:], pairs, strict=True)]
        g = self.blocks.symmetric(np.array(half))
        for piece, where in zip(self._moving, self._slices, strict=True):
            D, own = piece.derivatives(x[where], self.held.Psi, g)
            J[p:, where] = np.array([D[:, a, b] for a, b in pairs])
            second[where, where] = own
        return J, second
