"""25 simulated models that are hard for an optimiser: boundaries, scales, small and large.

`L` is the factor of the relative covariance of the random effects: their covariance is
sigma2 L L'. Vanishing variances (L with zero rows or columns), perfect correlations (rank below q),
variances 1e-4 to 1e8 times sigma2, a slope over an uncentred covariate or one in tiny units, few
rows in a group, and a negative intraclass correlation, whose best variance is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LARGE = 20_000
"""Models with as many groups or more are fitted for one seed only."""


@dataclass(frozen=True, eq=False)
class Spec:
    """How one model is simulated; sizes is the number of rows of a group, or (lowest, highest)."""

    name: str
    groups: int
    sizes: int | tuple[int, int]
    L: ArrayLike
    x_mean: float = 0.0
    x_scale: float = 1.0
    negative_icc: bool = False


@dataclass(frozen=True, eq=False)
class Data:
    """Response (n,), fixed design (n,p), group labels (n,) and random design (n,q)."""

    endog: Floats
    exog: Floats
    groups: NDArray[np.int64]
    exog_re: Floats


FULL3 = [[1, 0, 0], [0.3, 0.5, 0], [-0.2, 0.1, 0.7]]
FULL4 = np.tril(0.5 * np.eye(4) + 0.2)


def low_rank(q: int, rank: int) -> Floats:
    """A fixed q x rank factor."""
    return np.random.default_rng(0).standard_normal((q, rank))


MODELS = (
    Spec("intercept", 100, 10, [[1]]),
    Spec("intercept, no variance", 200, 10, [[0]]),
    Spec("intercept, tau 0.01", 500, 10, [[1e-2]]),
    Spec("intercept, tau 1e4", 50, 10, [[1e4]]),
    Spec("intercept, 10 groups of 5", 10, 5, [[0.5]]),
    Spec("intercept, 1e5 groups", 100_000, 5, [[0.7]]),
    Spec("intercept, negative icc", 100, 8, [[0]], negative_icc=True),
    Spec("slope", 100, 10, [[1, 0], [0.3, 0.5]]),
    Spec("slope, correlation 1", 200, 10, [[1, 0], [0.5, 0]]),
    Spec("slope, no intercept variance", 200, 10, [[0, 0], [0, 1]]),
    Spec("slope, no variance", 200, 10, [[0, 0], [0, 0]]),
    Spec("slope, tau 1e3", 100, 10, [[1e3, 0], [300, 500]]),
    Spec("slope, tau 100 and 0.01", 300, 10, [[100, 0], [0.002, 0.01]]),
    Spec("slope, 10 groups of 6", 10, 6, [[1, 0], [0.3, 0.5]]),
    Spec("slope, 1e5 groups of 4", 100_000, 4, [[1, 0], [0.3, 0.5]]),
    Spec("slope, x mean 100", 200, 10, [[1, 0], [0.3, 0.5]], x_mean=100.0),
    Spec("slope, x scale 1e-4", 200, 10, [[1, 0], [3000, 5000]], x_scale=1e-4),
    Spec("slope, 1000 groups of 2", 1000, 2, [[1, 0], [0.3, 0.5]]),
    Spec("three", 300, 12, FULL3),
    Spec("three, rank 1", 300, 12, low_rank(3, 1)),
    Spec("three, one vanishes", 300, 12, np.diag([1.0, 0, 0.5])),
    Spec("three, 2e4 unbalanced", 20_000, (1, 20), [[1, 0, 0], [0.3, 0.5, 0], [-0.2, 0.1, 0.2]]),
    Spec("four", 500, 15, FULL4),
    Spec("four, rank 2", 500, 15, low_rank(4, 2)),
    Spec("four, 30 groups of 6", 30, 6, FULL4),
)


def simulate(spec: Spec, seed: int) -> Data:
    """Draw y = 5 + X beta + Z b_g + e with sigma = 1; X holds Z and two more covariates."""
    rng = np.random.default_rng([seed, MODELS.index(spec)])
    L = np.asarray(spec.L, float)
    q = len(L)
    low, high = spec.sizes if isinstance(spec.sizes, tuple) else (spec.sizes, spec.sizes)
    rows = rng.integers(low, high + 1, spec.groups)
    groups = np.repeat(np.arange(spec.groups), rows)
    n = len(groups)
    Z = np.ones((n, q))
    Z[:, 1:] = spec.x_mean + spec.x_scale * rng.standard_normal((n, q - 1))
    X = np.column_stack([Z, rng.standard_normal((n, 2))])
    b = rng.standard_normal((spec.groups, L.shape[1])) @ L.T
    e = rng.standard_normal(n)
    if spec.negative_icc:
        e -= 0.9 * (np.bincount(groups, e) / rows)[groups]
    y = 5 + X @ np.linspace(1, 2, X.shape[1]) + np.einsum("iq,iq->i", Z, b[groups]) + e
    return Data(y, X, groups, Z)
