"""How long fifty sub-models take from moments that were collected once.

    python tests/benchmarks/bench_submodels.py [--rows 1000000] [--groups 100000] [--models 50]

Collects ``y ~ x0 + ... + x5 + (1 + x0 | g)`` from a frame in memory, then fits models with some of
the fixed columns, of each model one with random intercepts and one with random slopes, in turn by
REML and by ML. Prints seconds for collecting, for all fits, and for the slowest; the first fit of
a process, which loads what Python loads, is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import pandas as pd

import dmixed

COVARIATES = 6


def data(rows: int, groups: int, seed: int = 0) -> pd.DataFrame:
    """Rows of groups of a few rows each, in no order."""
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, rows)
    X = rng.standard_normal((rows, COVARIATES))
    b = rng.standard_normal((groups, 2))
    y = 1.0 + X @ np.linspace(0.5, 0.0, COVARIATES) + b[g, 0] + 0.5 * b[g, 1] * X[:, 0]
    y += rng.standard_normal(rows)
    return pd.DataFrame(X, columns=[f"x{i}" for i in range(COVARIATES)]).assign(g=g, y=y)


def formulas(models: int) -> list[str]:
    """Different models with x0, with a random intercept and with a random slope."""
    others = [f"x{i}" for i in range(1, COVARIATES)]
    sets = itertools.chain.from_iterable(
        itertools.combinations(others, size) for size in range(len(others), -1, -1)
    )
    found = (
        f"y ~ {' + '.join(['x0', *own])} + ({random} | g)"
        for own in sets
        for random in ("1 + x0", "1")
    )
    return list(itertools.islice(found, models))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--models", type=int, default=50)
    given = parser.parse_args()
    frame = data(given.rows, given.groups)
    largest = formulas(1)[0]
    dmixed.lmer(largest, frame.head(1000))
    start = time.perf_counter()
    moments = dmixed.collect(largest, frame)
    collecting = time.perf_counter() - start
    seconds, evaluations = [], 0
    for i, formula in enumerate(formulas(given.models)):
        start = time.perf_counter()
        result = moments.fit(formula=formula, reml=i % 4 < 2)
        seconds.append(time.perf_counter() - start)
        evaluations += result.optimizer_summary.evaluations
        if not result.converged:
            raise SystemExit(f"{formula}: not certified")
    total = sum(seconds)
    print(f"{given.rows:,} rows, {moments.n_cells:,} groups: collected in {collecting:.2f} s")
    print(
        f"{len(seconds)} sub-models: {total:.2f} s, {total / collecting:.2f} times collecting; "
        f"slowest {max(seconds):.3f} s, {evaluations / len(seconds):.1f} evaluations each"
    )


if __name__ == "__main__":
    main()
