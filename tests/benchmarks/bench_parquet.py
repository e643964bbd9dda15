"""Parquet to converged fit on a cluster, against a bare read-and-sum of the same columns.

    python tests/benchmarks/bench_parquet.py [--rows 20000000] [--groups 200000] [--files 20]
        [--workers 2] [--runs 3] [--strings] [--folder DIR]

The bare pass is one task per file on the same workers: read the columns with Arrow, sum each one
(for text keys, their lengths). After one warm-up of each the two alternate; medians are compared.
`--folder` keeps the data for the next run. Peak memory is what the operating system saw of each
worker process from its start to the end of the last run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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
SLOPES = np.linspace(1, 2, 5)


def write(folder: Path, rows: int, groups: int, files: int, strings: bool) -> None:
    """Files of equal size; every group is spread over all of them, in random order."""
    recipe = {"rows": rows, "groups": groups, "files": files, "strings": strings}
    note = folder / "_recipe.json"
    if note.exists() and json.loads(note.read_text()) == recipe:
        return
    rng = np.random.default_rng(0)
    b = rng.standard_normal((groups, 2)) @ [[1.0, 0.3], [0.0, 0.5]]
    keys = pa.array([f"customer-{i:07d}" for i in range(groups)]) if strings else None
    for i, part in enumerate(np.array_split(np.arange(rows), files)):
        n = len(part)
        g, X = rng.integers(0, groups, n), rng.standard_normal((n, 5))
        y = 1 + X @ SLOPES + b[g, 0] + b[g, 1] * X[:, 0] + rng.standard_normal(n)
        label = pa.array(g) if keys is None else keys.take(pa.array(g))
        table = pa.table([pa.array(y), *(pa.array(x) for x in X.T), label], names=COLUMNS)
        pq.write_table(table, folder / f"part-{i:03d}.parquet")
    note.write_text(json.dumps(recipe))


def read_and_sum(path: str) -> list[float]:
    """The least that any pass over these columns must do."""
    table = pq.read_table(path, columns=COLUMNS)
    return [
        float(pc.sum(pc.binary_length(c) if pa.types.is_string(c.type) else c).as_py())
        for c in table.columns
    ]


def peak_memory() -> float:
    """Peak resident memory of this process, GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def data_folder(given: str | None) -> Iterator[Path]:
    """The folder asked for, or one that goes away."""
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def check(result: dmixed.MixedLMResults, rows: int) -> None:
    """Converged near the truth."""
    assert result.converged
    assert result.nobs == rows
    error = (result.fe_params.iloc[1:] - SLOPES) / result.bse_fe.iloc[1:]
    assert np.abs(error).max() < 5


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Print the times; return our time over the bare pass's, and the peak memory in GB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--strings", action="store_true", help="text keys instead of integers")
    parser.add_argument("--folder", help="where the data are kept (default: temporary)")
    options = parser.parse_args(arguments)
    with (
        data_folder(options.folder) as folder,
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        write(folder, options.rows, options.groups, options.files, options.strings)
        paths = [str(path) for path in sorted(folder.glob("*.parquet"))]

        def bare() -> Any:
            return client.gather(client.map(read_and_sum, paths, pure=False))

        def fit() -> Any:
            return dmixed.lmer(FORMULA, str(folder), client=client)

        bare()  # the warm-up of each
        check(fit(), options.rows)
        pairs = [(timed(bare)[0], timed(fit)[0]) for _ in range(options.runs)]
        memory = max(client.run(peak_memory).values())
    least, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{options.rows:,} rows, {options.groups:,} groups, {options.files} files: {FORMULA}")
    print(f"read and sum {least:7.3f} s   ({', '.join(f'{a:.3f}' for a, _ in pairs)})")
    print(f"dmixed       {ours:7.3f} s   ({', '.join(f'{b:.3f}' for _, b in pairs)})")
    print(f"ratio {ours / least:.2f}; peak memory of a worker {memory:.2f} GB")
    return ours / least, memory


if __name__ == "__main__":
    main()
