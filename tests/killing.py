"""Refits in processes of their own, which are killed at random instants, and what must be left."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import dmixed
from dmixed.folders import Folder
from dmixed.jobs import read_job
from dmixed.published import Published
from dmixed.refit import refit


def job_in_a_process(path: str) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    outcome = refit(read_job(path))
    os._exit(0 if outcome.status in ("published", "nothing new") else 9)


def started(path: Path) -> Any:
    """A process that runs a job, and begins at once: its modules are there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmixed.jobs", "dmixed.refit", "killing"])
    process = context.Process(target=job_in_a_process, args=(str(path),))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server looks for them
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def check_whole(folder: Path, nobs: Collection[int]) -> None:
    """Refuse half of anything: the store opens, the pointer names a version with its files."""
    store = folder / "moments"
    if any(name.startswith("manifest") for name in Folder.at(store).names()):
        assert dmixed.open_moments(store).moments.nobs in nobs
    results = Published(Folder.at(folder / "results"))
    pointer = results.current()
    if pointer is not None:
        version = results.version(pointer.version)
        assert version is not None
        results.check(version)


class Killer:
    """A folder with ``job.yaml`` and ``rows``, restored to one of two states before each run.

    State 0 is before the first run, state 1 before the second with a day more. The folder stays in
    its place, because stores know files by their paths.

    Attributes
    ----------
    killed
        processes that were still at work when they were killed
    instants
        how far each was, as a share of a whole run
    """

    def __init__(self, path: Path, nobs: Collection[int], seed: int) -> None:
        self.path, self.folder, self.nobs = path, path.parent, nobs
        self.states = [self.folder.with_name(f"{self.folder.name} {i}") for i in range(2)]
        self.rng = np.random.default_rng(seed)
        self.killed = 0
        self.instants: list[float] = []
        self._whole: list[tuple[float, dict[str, Any]]] = []

    def __enter__(self) -> Killer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for state in self.states:
            shutil.rmtree(state, ignore_errors=True)

    def prepare(self, another_day: Callable[[], object]) -> None:
        """Make both states, and note what undisturbed runs of them give and how long they take."""
        shutil.copytree(self.folder, self.states[0])
        self.run()  # the first process of a server takes its time
        another_day()
        shutil.copytree(self.folder, self.states[1])
        for state in range(2):
            self.restore(state)
            began = time.perf_counter()
            self.run()
            self._whole.append((time.perf_counter() - began, self.result()))

    def restore(self, state: int) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.states[state], self.folder)

    def run(self) -> None:
        """A run that nobody disturbs."""
        process = started(self.path)
        process.join(120)
        assert process.exitcode == 0

    def result(self) -> dict[str, Any]:
        """The estimates that are published."""
        pointer = json.loads((self.folder / "results" / "current.json").read_text())
        text = (self.folder / "results" / pointer["folder"] / "result.json").read_text()
        return {"result": json.loads(text), "versions": len(pointer["history"])}

    def kill(self, state: int) -> None:
        """Kill a run, look at what is left, and let the next one finish it."""
        self.restore(state)
        lasts, whole = self._whole[state]
        instant = float(self.rng.uniform(0, 1))
        process = started(self.path)
        time.sleep(instant * lasts)
        with contextlib.suppress(ProcessLookupError):  # it was faster this time
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        self.killed += process.exitcode == -signal.SIGKILL
        self.instants.append(instant)
        check_whole(self.folder, self.nobs)
        assert refit(read_job(self.path)).status in ("published", "nothing new")
        check_whole(self.folder, self.nobs)
        assert self.result() == whole
        assert refit(read_job(self.path)).status == "nothing new"
