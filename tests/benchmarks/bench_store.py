"""Append 1% new rows to a store and fit again, against a fit of all rows from scratch.

    python tests/benchmarks/bench_store.py [--rows 20000000] [--groups 20000] [--files 20]
        [--runs 3] [--folder DIR]

Each run opens the store as a new process would, appends the new file from the folder of all files,
fits, and takes the file out again; the fit from scratch reads the whole folder. Both are timed in
turn in one process, after one warm-up; medians are compared. That only the new file is read is seen
from the names of the parts that are read. Fits must agree to 1e-12 in the log-likelihood, also the
one after the new rows were taken out with the one before they came.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import dmixed
from dmixed import cellmoments

FORMULA = "y ~ x1 + x2 + x3 + x4 + x5 + (1 + x1 | g)"


def write(path: Path, rows: int, groups: int, seed: int) -> None:
    """One file, unless it is there; effects of groups are the same in all files."""
    if path.exists():
        return
    b = np.random.default_rng(0).standard_normal((groups, 2)) @ [[1.0, 0.3], [0.0, 0.5]]
    rng = np.random.default_rng(seed)
    g, X = rng.integers(0, groups, rows), rng.standard_normal((rows, 5))
    y = 1 + X @ np.linspace(1, 2, 5) + b[g, 0] + b[g, 1] * X[:, 0] + rng.standard_normal(rows)
    columns = {"y": y, **{f"x{j}": x for j, x in enumerate(X.T, 1)}, "g": g}
    pq.write_table(pa.table(columns), path)


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def relative(a: float, b: float) -> float:
    """Relative difference."""
    return abs(a - b) / abs(b)


def main() -> None:
    """Print times, their ratio, and what was checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--groups", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        data, new = folder / "rows", folder / "new.parquet"
        data.mkdir(parents=True, exist_ok=True)
        for i in range(options.files):
            write(
                data / f"part-{i:04}.parquet", options.rows // options.files, options.groups, i + 1
            )
        write(new, options.rows // 100, options.groups, 1000)
        compare(data, new, Path(temporary) / "store", options.runs)


def compare(data: Path, new: Path, place: Path, runs: int) -> None:
    """Time both ways in turn."""
    added = data / "part-new.parquet"
    added.unlink(missing_ok=True)
    parts: list[str] = []
    stream = cellmoments.stream

    def watched(part: Any, value: Any = None) -> Any:
        parts.append(part.name)
        return stream(part, value)

    cellmoments.stream = watched
    dmixed.collect(FORMULA, str(data)).save(place)
    before = dmixed.open_moments(place).fit().llf
    shutil.copy(new, added)

    def append() -> float:
        store = dmixed.open_moments(place)
        store.append(str(data))
        return store.fit().llf

    def scratch() -> float:
        return dmixed.lmer(FORMULA, str(data)).llf

    times: dict[str, list[float]] = {"append": [], "scratch": []}
    for run in range(runs + 1):
        whole, expected = timed(scratch)
        parts.clear()
        some, found = timed(append)
        assert parts == [str(added)], parts
        assert relative(found, expected) < 1e-12, (found, expected)
        store = dmixed.open_moments(place)
        store.remove(added)
        assert relative(store.fit().llf, before) < 1e-12
        if run:
            times["scratch"].append(whole)
            times["append"].append(some)
    added.unlink()
    scratched, appended = (statistics.median(times[x]) for x in ("scratch", "append"))
    size = sum(file.stat().st_size for file in place.iterdir())
    print(f"store of {size / 1e6:.1f} MB")
    print(f"from scratch {scratched:.3f} s, append and refit {appended:.3f} s")
    print(f"ratio {scratched / appended:.1f} (at least 10 wanted)")


if __name__ == "__main__":
    main()
