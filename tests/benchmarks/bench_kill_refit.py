"""SIGKILL at random instants of `dmixed refit`: is anything half, and is the next result the same?

    python tests/benchmarks/bench_kill_refit.py [TIMES]     # 100 by default

Half of the runs are first ones, half have a day before. After each kill the store must open and the
pointer name a complete version; the next run must publish what an undisturbed run does, bit by bit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from killing import Killer
from test_refit import Place


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "place")
        place.add(0)
        began = time.perf_counter()
        with Killer(place.path, (298, 596), seed=1) as killer:
            killer.prepare(lambda: place.add(1))
            for number in range(times):
                killer.kill(number % 2)
        seconds = time.perf_counter() - began
        tenths = np.bincount((10 * np.array(killer.instants)).astype(int), minlength=10)
        print(f"{times} runs, {killer.killed} killed at work, in {seconds:.0f} s: all whole after")
        print(f"instants, by tenth of an undisturbed run: {tenths.tolist()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
