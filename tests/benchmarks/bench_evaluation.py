"""What an evaluation of the likelihood costs: nanoseconds for each group and processor.

    python tests/benchmarks/bench_evaluation.py [--groups 10000 100000 1000000] [--threads 1 2]
        [--runs 5]

Random slopes (and, "merged", random intercepts, of which groups of equal size are put together),
with derivatives up to the gradient (order 1) and the Hessian (order 2). The factors are made from
synthetic moments of groups, so that no rows are needed; ten million groups take some GB.
Medians of some evaluations after one that does not count; nanoseconds are those of the evaluation
times the threads, over the groups.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial

import dask
import numpy as np

from dmixed.blocks import CONSTANT, Column, Frame
from dmixed.dispatch import one_blas_thread
from dmixed.evaluation import Evaluator
from dmixed.factors import Factors, problem
from dmixed.levels import Term
from dmixed.moments import GroupMoments

COVARIATES = 5


def moments(groups: int, slope: bool, seed: int = 0) -> GroupMoments:
    """Of groups of 3 to 12 rows: constant, five covariates, response."""
    rng = np.random.default_rng(seed)
    k, q = COVARIATES + 2, 2 if slope else 1
    counts = rng.integers(3, 13, groups)
    WtF, FtF = np.zeros((groups, q, k)), np.zeros((k, k))
    b = rng.standard_normal((groups, 2))
    for row in range(12):
        own = np.flatnonzero(counts > row)
        F = np.ones((len(own), k))
        F[:, 1:] = rng.standard_normal((len(own), k - 1))
        F[:, -1] += F[:, 1:-1].sum(axis=1) + b[own, 0] + (b[own, 1] * F[:, 1] if slope else 0.0)
        WtF[own] += F[:, :q, None] * F[:, None, :]
        FtF += F.T @ F
    names = (*(f"x{i}" for i in range(COVARIATES)), "y")
    columns = (CONSTANT, *(Column(powers=((name, 1),)) for name in names))
    frame = Frame(names, (0.0,) * len(names), (1.0,) * len(names))
    return GroupMoments(columns, tuple(range(q)), frame, WtF, FtF, FtF, counts, 0.0)


def factors(groups: int, slope: bool) -> Factors:
    """Of ``y ~ x0 + ... + x4 + (1 + x0 | g)`` or ``(1 | g)``."""
    T = np.eye(COVARIATES + 2)
    term = Term(0, T[:, : 2 if slope else 1], np.arange(groups), groups)
    with one_blas_thread:
        return problem(moments(groups, slope), T[:, :-1], T[:, -1], [term]).factors


def seconds(evaluate: Evaluator, order: int, threads: int, runs: int) -> float:
    """Of an evaluation, where Psi is half the identity."""
    root = np.sqrt(0.5) * np.eye(evaluate.factors.blocks.q)
    found = []
    with one_blas_thread, dask.config.set(num_workers=threads):
        call = partial(evaluate, root, order)
        call()
        for _ in range(runs):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main(arguments: list[str] | None = None) -> float:
    """Print the costs; return that of the Hessian of most groups with slopes on one thread, ns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    last = 0.0
    for slope in (False, True):
        for groups in options.groups:
            evaluate = Evaluator(factors(groups, slope))
            columns = sum(part.n_groups for part in evaluate.factors.evaluated)
            kind = "slopes" if slope else f"intercepts, merged to {columns:,}"
            print(f"{groups:,} groups, {kind}")
            for threads in options.threads:
                for order, name in ((1, "gradient"), (2, "Hessian")):
                    took = seconds(evaluate, order, threads, options.runs)
                    cost = 1e9 * took * threads / groups
                    print(f"  {threads} threads, {name:8} {1000 * took:9.2f} ms  {cost:8.1f} ns")
                    if slope and groups == options.groups[-1] and (threads, order) == (1, 2):
                        last = cost
    print(f"Hessian on one thread: {last:.1f} ns for each group")
    return last


if __name__ == "__main__":
    main()
