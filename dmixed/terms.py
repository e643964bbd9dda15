"""What leaves a set of groups at one covariance: small sums that add."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from dmixed.blocks import Floats


@dataclass(frozen=True, slots=True)
class ProfileTerms:
    """Sums over groups at one Psi; kilobytes whatever the number of groups.

    Derivatives are with respect to the m entries ``blocks.pairs`` of Psi, natural coordinates.

    Attributes
    ----------
    order
        0: value, 1: gradient, 2: Hessian can be had
    logdet
        sum of log|H_g|
    FtHiF
        (k, k): what the groups add to F'H^-1 F
    first, second
        (m,), (m, m): first and second derivatives of logdet
    dF, d2F
        (m, k, k), (m, m, k, k): those of F'H^-1 F
    """

    order: int
    logdet: float
    FtHiF: Floats
    first: Floats
    second: Floats
    dF: Floats
    d2F: Floats

    def __post_init__(self) -> None:
        k, m = len(self.FtHiF), len(self.first)
        assert self.FtHiF.shape == (k, k)
        assert self.second.shape == (m, m)
        assert self.dF.shape == (m, k, k)
        assert self.d2F.shape == (m, m, k, k)

    def __add__(self, other: ProfileTerms) -> ProfileTerms:
        """Terms of both sets of groups."""
        assert self.order == other.order
        names = [field.name for field in fields(self)][1:]
        sums = [getattr(self, name) + getattr(other, name) for name in names]
        return ProfileTerms(self.order, *sums)

    def expanded(self, step: Floats) -> ProfileTerms:
        """The terms after a step (m,) in the entries of Psi so small that its cube is rounding.

        A Taylor expansion; the second derivatives stay as they are.
        """
        assert self.order == 2
        return ProfileTerms(
            self.order,
            self.logdet + float((self.first + 0.5 * self.second @ step) @ step),
            self.FtHiF + np.tensordot(step, self.dF + 0.5 * np.tensordot(step, self.d2F, 1), 1),
            self.first + self.second @ step,
            self.second,
            self.dF + np.tensordot(step, self.d2F, 1),
            self.d2F,
        )
