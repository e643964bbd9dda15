"""DataFrame to converged fit, against the PyPI package `glmm`, in one process and one run.

    python tests/benchmarks/bench_glmm.py [--rows 2000000] [--groups 200000] [--runs 5]

Both get the same pandas DataFrame with string keys in shuffled order and the same formula, and both
fit by REML with standard errors of the fixed effects and of the variances. `glmm` also computes
Satterthwaite degrees of freedom by default, which is switched off here. After one warm-up of each
the two alternate; medians are compared, and so are the estimates. Needs `pip install glmm`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

import dmixed

FORMULA = "y ~ x1 + x2 + x3 + x4 + x5 + (1 + x1 | g)"


def simulate(rows: int, groups: int, seed: int = 0) -> pd.DataFrame:
    """Five covariates, correlated random intercept and slope, keys shuffled over the rows."""
    rng = np.random.default_rng(seed)
    g = rng.permutation(np.arange(rows) % groups)
    X = rng.standard_normal((rows, 5))
    b = rng.standard_normal((groups, 2)) @ [[1.0, 0.3], [0.0, 0.5]]
    y = 1 + X @ np.linspace(1, 2, 5) + b[g, 0] + b[g, 1] * X[:, 0] + rng.standard_normal(rows)
    columns: dict[str, Any] = {"y": y, **{f"x{j + 1}": X[:, j] for j in range(5)}}
    keys = np.array([f"customer-{i:07d}" for i in range(groups)])
    return pd.DataFrame({**columns, "g": keys[g]})


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result; garbage of earlier runs is collected before the clock starts."""
    gc.collect()
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def check(ours: dmixed.MixedLMResults, theirs: Any) -> None:
    """Same estimates: fixed effects to 1e-3 standard errors, variances to 1e-3."""
    assert ours.converged
    assert theirs.converged
    assert np.all(np.abs(ours.fe_params.to_numpy() - theirs.beta) <= 1e-3 * theirs.se)
    np.testing.assert_allclose(ours.bse_fe, theirs.se, rtol=1e-3)
    np.testing.assert_allclose(ours.scale, theirs.dispersion, rtol=1e-3)
    (cov,) = (frame.to_numpy() for frame in ours.varcorr().values())
    np.testing.assert_allclose(cov[[0, 1, 1], [0, 0, 1]], np.ravel(theirs.varcorr), rtol=1e-3)


def main(arguments: list[str] | None = None) -> float:
    """Print the times and return glmm's time over ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    import glmm

    data = simulate(options.rows, options.groups)
    fits: dict[str, Callable[[], Any]] = {
        "dmixed": lambda: dmixed.lmer(FORMULA, data),
        "glmm": lambda: glmm.fit(data, FORMULA, satterthwaite=False),
    }
    check(*(fit() for fit in fits.values()))  # the warm-up of each
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(options.runs):
        timings = {name: timed(fit) for name, fit in fits.items()}
        for name, (elapsed, _) in timings.items():
            seconds[name].append(elapsed)
        check(*(result for _, result in timings.values()))
    median = {name: statistics.median(all_) for name, all_ in seconds.items()}
    print(f"{options.rows:,} rows, {options.groups:,} groups, {os.cpu_count()} cores: {FORMULA}")
    for name, all_ in seconds.items():
        print(f"{name:8s} {median[name]:7.3f} s   ({', '.join(f'{s:.3f}' for s in all_)})")
    ratio = median["glmm"] / median["dmixed"]
    print(f"dmixed is {ratio:.2f} times as fast as glmm; estimates agree")
    return ratio


if __name__ == "__main__":
    main()
