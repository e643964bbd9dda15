"""Oracle of fifty digits for one grouping factor: sums of the stored doubles, exact for its ends.

It imports nothing of dmixed. Rows are y, X, Z; H = I + Z L L'Z' in each group (error variance 1):

    K = I + L'Z'Z L     F'H^-1 F = F'F - F'Z L K^-1 L'Z'F     log|H| = log|K|     for F = [X y]

in decimal arithmetic of `PRECISION` digits, in which subtracting costs nothing that is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np

PRECISION = 90
"""Means of 1e12 and scales of 1e8 take 40 digits when they are squared, conditions of 1e7 14."""

STEP = Decimal("1e-20")
"""Relative step of differences: errors of 1e-40 beside 1e-90 / 1e-40."""


def exact(values: Any) -> Any:
    """Doubles as decimals, exactly: an array of objects."""
    return np.vectorize(Decimal, otypes=[object])(np.asarray(values, dtype=np.float64))


@dataclass(frozen=True)
class Digits:
    """Sums of a model: per group Z'Z (q, q, G) and Z'F (q, k, G), in all F'F (k, k)."""

    n: int
    ZtZ: Any
    ZtF: Any
    FtF: Any

    @classmethod
    def of(cls, y: Any, X: Any, Z: Any, g: Any) -> Digits:
        with localcontext(Context(prec=PRECISION)):
            F, Z = exact(np.column_stack([X, y])), exact(Z)
            groups = [np.flatnonzero(g == i) for i in np.unique(g)]
            ZtZ = np.stack([Z[i].T @ Z[i] for i in groups], axis=-1)
            ZtF = np.stack([Z[i].T @ F[i] for i in groups], axis=-1)
            return cls(len(F), ZtZ, ZtF, F.T @ F)

    def fit(self, L: Any, reml: bool) -> tuple[Decimal, Any, Any, Decimal]:
        """Criterion, beta, their standard errors and sigma2 at a relative root L (q, q)."""
        with localcontext(Context(prec=PRECISION)):
            q, k = len(self.ZtZ), len(self.FtF)
            LtZ = lambda M: np.tensordot(L.T, M, axes=1)  # noqa: E731
            K = np.tensordot(LtZ(self.ZtZ), L, axes=([1], [0])).swapaxes(1, 2)
            B = LtZ(self.ZtF)
            FtHiF, logdet = self.FtF.copy(), Decimal(0)
            C: dict[tuple[int, int], Any] = {}
            for a in range(q):  # K = C C', U = C^-1 B, for all groups at once
                for b in range(a + 1):
                    d = K[a, b] + (1 if a == b else 0)
                    for t in range(b):
                        d = d - C[a, t] * C[b, t]
                    C[a, b] = np.vectorize(Decimal.sqrt)(d) if a == b else d / C[b, b]
                for t in range(a):
                    B[a] = B[a] - C[a, t] * B[t]
                B[a] = B[a] / C[a, a]
                logdet += 2 * np.prod(C[a, a]).ln()
                FtHiF = FtHiF - B[a] @ B[a].T
            R = _cholesky(FtHiF)
            p = k - 1
            df = self.n - p if reml else self.n
            sigma2 = R[p, p] ** 2 / df
            log_x = sum((2 * R[i, i].ln() for i in range(p)), Decimal(0))
            two_pi = 2 * Decimal("3.1415926535897932384626433832795028841971693993751")
            value = logdet + df * (1 + (two_pi * sigma2).ln()) + (log_x if reml else 0)
            inverse = _inverse(R[:p, :p])
            beta = inverse.T @ R[p, :p]
            se = [(sigma2 * (column @ column)).sqrt() for column in inverse.T]
            return value, beta, se, sigma2

    def excess(self, L: Any, reml: bool) -> float:
        """Criterion at a root above its minimum nearby: half the Newton decrement.

        By differences along entries that are not zero (a variance of zero stays).
        """
        with localcontext(Context(prec=PRECISION)):
            where = [(a, b) for a in range(len(L)) for b in range(a + 1) if L[a, a] and L[b, b]]
            sizes = [STEP * L[a, a] for a, b in where]

            def value(*moves: tuple[int, int]) -> Decimal:
                M = L.copy()
                for i, sign in moves:
                    M[where[i]] += sign * sizes[i]
                return self.fit(M, reml)[0]

            m, here = len(where), value()
            g, H = np.zeros(m), np.zeros((m, m))
            for i in range(m):
                up, down = value((i, 1)), value((i, -1))
                g[i] = float((up - down) / (2 * STEP))
                H[i, i] = float((up + down - 2 * here) / STEP**2)
                for j in range(i):
                    mixed = value((i, 1), (j, 1)) - value((i, 1), (j, -1))
                    mixed -= value((i, -1), (j, 1)) - value((i, -1), (j, -1))
                    H[i, j] = H[j, i] = float(mixed / (4 * STEP**2))
            return float(0.5 * g @ np.linalg.solve(H, g))


def _cholesky(A: Any) -> Any:
    """Lower factor of a matrix of decimals."""
    R = np.full(A.shape, Decimal(0), dtype=object)
    for i in range(len(A)):
        for j in range(i + 1):
            d = A[i, j] - R[i, :j] @ R[j, :j]
            R[i, j] = d.sqrt() if i == j else d / R[j, j]
    return R


def _inverse(R: Any) -> Any:
    """Inverse of a lower triangular matrix."""
    out = np.full(R.shape, Decimal(0), dtype=object)
    for j in range(len(R)):
        for i in range(j, len(R)):
            d = (Decimal(1) if i == j else Decimal(0)) - R[i, j:i] @ out[j:i, j]
            out[i, j] = d / R[i, i]
    return out
