"""Data frame to summary, against the PyPI packages `glmm` and `mixedlm`, in one process and run.

    python tests/benchmarks/bench_several.py customers [--runs 3]
    python tests/benchmarks/bench_several.py schools [--runs 3]
    python tests/benchmarks/bench_several.py linear

``customers`` is the case of statsmodels issue 9097 (41 minutes there): 125,066 groups, 1.25 million
rows, two categorical covariates and a numeric one, a random intercept; our time includes the
summary. ``schools``: 1,000 schools of 50 classes of 20 pupils, ``(1 | school/class)``. ``linear``:
our time for the same model with 10,000 to 1,000,000 classes, per class. All fit by REML; glmm
without Satterthwaite degrees of freedom. After one warm-up of each they alternate; medians are
compared, and so are the estimates. Needs ``pip install glmm mixedlm``.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

import dmixed


def customers(groups: int = 125_066, rows: int = 1_250_000, seed: int = 0) -> pd.DataFrame:
    """Repeated purchases: unbalanced integer keys in shuffled order."""
    rng = np.random.default_rng(seed)
    g = np.concatenate([np.arange(groups), rng.integers(0, groups, rows - groups)])
    rng.shuffle(g)
    region, channel = rng.integers(0, 8, rows), rng.integers(0, 4, rows)
    x = rng.standard_normal(rows)
    y = 2 + 0.3 * x + 0.1 * region + 0.2 * channel
    y += rng.standard_normal(groups)[g] + 1.5 * rng.standard_normal(rows)
    names = np.array(["north", "south", "east", "west", "centre", "coast", "hills", "isles"])
    return pd.DataFrame(
        {
            "y": y,
            "region": names[region],
            "channel": np.array(["web", "shop", "phone", "mail"])[channel],
            "x": x,
            "g": g,
        }
    )


def schools(
    schools: int = 1_000, classes: int = 50, pupils: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Pupils in classes in schools, class labels used again in every school, rows shuffled."""
    rng = np.random.default_rng(0)
    n = schools * classes * pupils
    at = rng.permutation(n)
    school, room = at // (classes * pupils), at // pupils % classes
    x = rng.standard_normal(n)
    y = 1 + 0.5 * x + 0.6 * rng.standard_normal(schools)[school]
    y += 0.8 * rng.standard_normal(schools * classes)[school * classes + room]
    y += 1.3 * rng.standard_normal(n)
    # glmm and mixedlm get the class's own key, which spares them the interaction
    return pd.DataFrame(
        {"y": y, "x": x, "school": school, "room": room, "klass": school * classes + room}
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result; garbage of earlier runs is collected before the clock starts."""
    gc.collect()
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def with_summary(result: dmixed.MixedLMResults) -> dmixed.MixedLMResults:
    """The result, its summary printed to nowhere."""
    assert result.converged
    assert str(result.summary())
    return result


def same(ours: dmixed.MixedLMResults, other: Any, name: str) -> None:
    """The other's log-likelihood is ours."""
    theirs = other.loglik if hasattr(other, "loglik") else other.logLik()
    value = theirs() if callable(theirs) else theirs
    value = float(getattr(value, "value", value))
    assert abs(value - ours.llf) <= 1e-3, (name, value, ours.llf)


def compare(fits: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Medians of alternated runs; the first of ``fits`` is ours."""
    warm = {name: fit() for name, fit in fits.items()}
    ours = next(iter(warm.values()))
    for name, result in warm.items():
        if result is not ours:
            same(ours, result, name)
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(runs):
        for name, fit in fits.items():
            seconds[name].append(timed(fit)[0])
    median = {name: statistics.median(all_) for name, all_ in seconds.items()}
    for name, all_ in seconds.items():
        print(f"{name:8s} {median[name]:8.3f} s   ({', '.join(f'{s:.3f}' for s in all_)})")
    for name in list(fits)[1:]:
        print(f"dmixed is {median[name] / median['dmixed']:.2f} times as fast as {name}")
    return median


def main(arguments: Sequence[str] | None = None) -> None:
    """Print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=["customers", "schools", "linear"])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"{options.case}, {os.cpu_count()} cores")
    if options.case == "linear":
        for count in (10_000, 30_000, 100_000, 300_000, 1_000_000):
            data = schools(count // 50, 50, 4)
            dmixed.lmer("y ~ x + (1 | school/room)", data)
            best = min(
                timed(lambda d=data: dmixed.lmer("y ~ x + (1 | school/room)", d))[0]
                for _ in range(options.runs)
            )
            print(f"{count:9,} classes {best:7.3f} s  {1e6 * best / count:6.2f} us a class")
        return
    import glmm
    import mixedlm

    if options.case == "customers":
        data, ours = customers(), "y ~ region + channel + x + (1 | g)"
        theirs = ours
    else:
        data, ours = schools(), "y ~ x + (1 | school/room)"
        theirs = "y ~ x + (1 | school) + (1 | klass)"
    compare(
        {
            "dmixed": lambda: with_summary(dmixed.lmer(ours, data)),
            "glmm": lambda: glmm.fit(data, theirs, satterthwaite=False),
            "mixedlm": lambda: mixedlm.lmer(theirs, data),
        },
        options.runs,
    )


if __name__ == "__main__":
    main()
