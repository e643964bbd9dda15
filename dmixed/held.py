"""What a fit holds fixed and what it penalises; which parts of the covariance that leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from dmixed.blocks import Floats
from dmixed.covariance import Blocks
from dmixed.errors import DataError

Mask = NDArray[np.bool_]


class FixedPenalty(Protocol):
    """A penalty on the fixed effects (p,), subtracted from the log-likelihood."""

    def func(self, params: Floats) -> Any:
        """Value."""

    def deriv(self, params: Floats) -> Any:
        """Gradient (p,)."""


class CovariancePenalty(Protocol):
    """A penalty on the relative covariance of the first bar, subtracted likewise."""

    def func(self, mat: Floats, mat_inv: Floats) -> Any:
        """Value."""

    def deriv(self, mat: Floats, mat_inv: Floats) -> Any:
        """Gradient along the lower triangle by rows."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a fit keeps where it starts.

    Attributes
    ----------
    beta, Psi
        (p,), (q, q): values, user units, Psi relative
    free_beta, free_pairs
        (p,), (m,) over ``blocks.pairs``: what is estimated
    """

    beta: Floats
    Psi: Floats
    free_beta: Mask
    free_pairs: Mask


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties on fixed effects and on the covariance, or None."""

    fixed: FixedPenalty | None = None
    covariance: CovariancePenalty | None = None

    def __post_init__(self) -> None:
        for name, given in (("fe_pen", self.fixed), ("cov_pen", self.covariance)):
            if given is not None and not (hasattr(given, "func") and hasattr(given, "deriv")):
                raise DataError(
                    f"{name} must be a penalty with methods func and deriv, not "
                    f"{type(given).__name__}"
                )

    def __bool__(self) -> bool:
        return self.fixed is not None or self.covariance is not None


@dataclass(frozen=True, slots=True)
class Piece:
    """Random columns whose covariance with all others is held at zero: positions among the q."""

    columns: tuple[int, ...]
    block: int
    free: int
    held: int

    @property
    def kind(self) -> str:
        """Say "free", "held" or "mixed"."""
        return "held" if not self.free else "mixed" if self.held else "free"


def pieces(blocks: Blocks, held: Held) -> list[Piece]:
    """Finest division of the blocks of Psi that leaves only zeros, all held, between pieces."""
    place = {pair: x for x, pair in enumerate(blocks.pairs)}
    found = []
    for j, block in enumerate(blocks.slices):
        columns = range(block.start, block.stop)
        linked = np.zeros((len(columns),) * 2)
        for a in columns:
            for b in columns[: a - block.start]:
                if held.free_pairs[place[a, b]] or held.Psi[a, b] != 0.0:
                    linked[a - block.start, b - block.start] = 1
        _, labels = connected_components(linked, directed=False)
        for label in dict.fromkeys(labels):
            own = tuple(int(c) + block.start for c in np.flatnonzero(labels == label))
            inside = [held.free_pairs[place[a, b]] for a in own for b in own if b <= a]
            found.append(Piece(own, j, sum(inside), len(inside) - sum(inside)))
    return found
