"""Files to converged fit on two workers of 4 GB, against a bare read-and-sum; or memory by rows.

    python tests/benchmarks/bench_scale.py [--rows 100000000] [--groups 1000000] [--files 100]
        [--clustered] [--links N] [--runs 3] [--folder DIR]

The bare pass is one task per file on the same workers: read the columns with Arrow, sum each one.
After one warm-up of each the two alternate; medians are compared. Peak memory is what the
operating system saw of each worker process (VmHWM) from its start to the end of the last run.

With `--links N` no time is compared. Each of three fits has a cluster of its own: a tenth of the
files, all of them, and all of them N times over, by links with other names. Memory must not grow
with the rows; groups are the same in all three if they are spread over all files, and a tenth in
the first if they are clustered.

`--folder` keeps the data for the next run; data of the same form that are there are used as they
are. `--clustered` writes the rows of a group together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from distributed import Client, LocalCluster

import dmixed

FORMULA = "y ~ x1 + x2 + x3 + x4 + x5 + (1 + x1 | g)"
COLUMNS = ["y", "x1", "x2", "x3", "x4", "x5", "g"]
WORKERS, MEMORY = 2, "4GB"


def write(folder: Path, rows: int, groups: int, files: int, clustered: bool) -> None:
    """Files of equal size, unless there are files already."""
    if any(folder.glob("*.parquet")):
        return
    rng = np.random.default_rng(0)
    b = rng.standard_normal((groups, 2)) @ [[1.0, 0.3], [0.0, 0.5]]
    for i in range(files):
        start, stop = rows * i // files, rows * (i + 1) // files
        n = stop - start
        g = np.arange(start, stop) * groups // rows if clustered else rng.integers(0, groups, n)
        X = rng.standard_normal((n, 5))
        y = 1 + X @ np.linspace(1, 2, 5) + b[g, 0] + b[g, 1] * X[:, 0] + rng.standard_normal(n)
        table = pa.table([pa.array(y), *(pa.array(x) for x in X.T), pa.array(g)], names=COLUMNS)
        pq.write_table(table, folder / f"part-{i:04d}.parquet")


def read_and_sum(path: str) -> list[float]:
    """The least that any pass over these columns must do."""
    return [float(pc.sum(column).as_py()) for column in pq.read_table(path, columns=COLUMNS)]


def peak_memory() -> float:
    """Peak resident memory of this process, GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def workers() -> Iterator[Client]:
    """A fresh cluster."""
    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            processes=True,
            memory_limit=MEMORY,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def link(paths: Sequence[Path], times: int, folder: Path) -> int:
    """Links to the files, so many times each under other names; the number of their rows."""
    rows = 0
    for i in range(times):
        for path in paths:
            os.symlink(path.resolve(), folder / f"copy-{i}-{path.name}")
            rows += pq.read_metadata(path).num_rows
    return rows


def fit(folder: Path | str, client: Client, rows: int) -> dmixed.MixedLMResults:
    """A fit, which is checked."""
    result = dmixed.lmer(FORMULA, str(folder), client=client, progress=False)
    assert result.converged
    assert result.nobs == rows
    return result


def memory_by_rows(paths: Sequence[Path], times: int) -> list[float]:
    """Peak memory of a worker, GB, for a tenth of the files, all, and all so many times."""
    peaks = []
    for some, n in ((paths[: max(1, len(paths) // 10)], 1), (paths, 1), (paths, times)):
        with tempfile.TemporaryDirectory() as folder, workers() as client:
            rows = link(some, n, Path(folder))
            seconds, result = timed(lambda: fit(folder, client, rows))  # noqa: B023
            peaks.append(max(client.run(peak_memory).values()))
            n_groups = result.n_groups
            del result
        print(
            f"{rows:13,} rows, {n_groups:9,} groups: peak {peaks[-1]:.2f} GB in a worker, "
            f"{seconds:6.1f} s (first fit of the cluster)",
            flush=True,
        )
    return peaks


def ratio(folder: Path, paths: Sequence[Path], runs: int) -> tuple[float, float]:
    """Our time over the bare pass's, and the peak memory of a worker in GB."""
    names, rows = [str(path) for path in paths], sum(pq.read_metadata(p).num_rows for p in paths)
    with workers() as client:

        def bare() -> Any:
            return client.gather(client.map(read_and_sum, names, pure=False))

        bare()  # the warm-up of each
        n_groups = fit(folder, client, rows).n_groups
        pairs = [(timed(bare)[0], timed(lambda: fit(folder, client, rows))[0]) for _ in range(runs)]
        memory = max(client.run(peak_memory).values())
    least, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{rows:,} rows, {n_groups:,} groups, {len(names)} files: {FORMULA}")
    print(f"read and sum {least:7.3f} s   ({', '.join(f'{a:.3f}' for a, _ in pairs)})")
    print(f"dmixed       {ours:7.3f} s   ({', '.join(f'{b:.3f}' for _, b in pairs)})")
    print(f"ratio {ours / least:.2f}; peak memory of a worker {memory:.2f} GB of {MEMORY}")
    return ours / least, memory


def main(arguments: list[str] | None = None) -> float:
    """Print what was measured; return the ratio of times, or that of memory for most to fewer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--clustered", action="store_true", help="rows of a group together")
    parser.add_argument("--links", type=int, help="measure memory, with the files linked N times")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the data are kept (default: temporary)")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        given = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, options.rows, options.groups, options.files, options.clustered)
        paths = sorted(folder.glob("*.parquet"))
        print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        if not options.links:
            return ratio(folder, paths, options.runs)[0]
        _, once, often = memory_by_rows(paths, options.links)
        print(f"memory with {options.links} times the rows: {often / once:.2f} times")
        return often / once


if __name__ == "__main__":
    main()
