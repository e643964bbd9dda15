"""What a small partition costs: seconds of a fit for each, above the same rows in one.

    python tests/benchmarks/bench_partitions.py [--partitions 10000] [--rows 200] [--workers 2]
        [--runs 3] [--profile]

For a Dask DataFrame (`dd.from_map`) and for Parquet files, each of so many partitions with
``--rows`` rows. After a warm-up of each, fits of many and of one alternate; medians are compared.
`--profile` prints instead where the client's process spends its time in one fit of the DataFrame.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client, LocalCluster

import dmixed

FORMULA = "y ~ x + (1 + x | g)"
GROUPS = 100


def table(rows: int, partition: int) -> pd.DataFrame:
    """Rows of one partition; all of them have all groups."""
    rng = np.random.default_rng(partition)
    b = np.random.default_rng(0).standard_normal((GROUPS, 2))
    g, x = rng.integers(0, GROUPS, rows), rng.standard_normal(rows)
    y = 1 + x + b[g, 0] + 0.5 * b[g, 1] * x + rng.standard_normal(rows)
    return pd.DataFrame({"y": y, "x": x, "g": g})


def everything(rows: int, partitions: int, _: int) -> pd.DataFrame:
    """The rows of all partitions."""
    return pd.concat([table(rows, i) for i in range(partitions)], ignore_index=True)


def files(rows: int, partitions: int, folder: Path) -> tuple[str, str]:
    """Folders of many files and of one with the same rows."""
    many, one = folder / "many", folder / "one"
    many.mkdir()
    one.mkdir()
    for i in range(partitions):
        table(rows, i).to_parquet(many / f"part-{i:05d}.parquet")
    everything(rows, partitions, 0).to_parquet(one / "part.parquet")
    return str(many), str(one)


def seconds(data: Any, client: Client, rows: int) -> float:
    """Of a fit, which is checked."""
    start = time.perf_counter()
    result = dmixed.lmer(FORMULA, data, client=client, progress=False)
    found = time.perf_counter() - start
    assert result.converged
    assert result.nobs == rows
    return found


def main(arguments: list[str] | None = None) -> float:
    """Print the times; return the larger of the two costs of a partition, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    n, rows = options.partitions, options.rows
    meta = table(1, 0).iloc[:0]

    def frames() -> tuple[Any, Any]:  # new ones: a fit must not find the graph of another
        many = dd.from_map(partial(table, rows), range(n), meta=meta)
        return many, one

    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        # the rows are there already: making them is not what is measured
        one = dd.from_map(partial(everything, rows, n), range(1), meta=meta).persist()
        print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        if options.profile:
            seconds(one, client, n * rows)
            with cProfile.Profile() as profile:
                seconds(frames()[0], client, n * rows)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
            return 0.0
        paths = files(rows, n, Path(folder))
        costs = []
        for name, make in (("Dask DataFrame", frames), ("Parquet files", lambda: paths)):
            pairs = [
                tuple(seconds(data, client, n * rows) for data in make())
                for _ in range(options.runs + 1)
            ][1:]
            many, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
            costs.append((many - alone) / n)
            print(f"{name}: {n:,} partitions of {rows} rows, {FORMULA}")
            print(f"  {n:,} partitions {many:8.3f} s   ({', '.join(f'{a:.2f}' for a, _ in pairs)})")
            print(f"  1 partition  {alone:10.3f} s   ({', '.join(f'{b:.2f}' for _, b in pairs)})")
            print(f"  {1000 * costs[-1]:.3f} ms for each partition", flush=True)
    print(f"at most {1000 * max(costs):.2f} ms for each partition")
    return max(costs)


if __name__ == "__main__":
    main()
