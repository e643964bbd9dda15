"""Workers that die, and callers who stop: the same bits, a clear error, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dmixed
from dmixed import executor, planning, preparation
from dmixed.progress import Event
from dmixed.sources import base

FORMULA = "y ~ slowly(x) + (1 + x | g)"
ROWS, PARTS, GROUPS = 1600, 8, 60
NAP = 0.1
"""Seconds that a part takes: long enough to be interrupted."""

OURS = ("dmixed", "split-stage", "_summary", "_factored", "_facts", "_evaluated")
"""How the names of our tasks begin."""

pytestmark = pytest.mark.timeout(120)


def slowly(x: Any) -> Any:
    """The same numbers, but not at once."""
    time.sleep(NAP)
    return x


def dying(x: Any) -> Any:
    """No numbers: the worker dies instead (of this machine's memory, say)."""
    if threading.current_thread() is not threading.main_thread():
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    g, x = rng.integers(0, GROUPS, ROWS), rng.normal(size=ROWS)
    y = 1 + x + rng.normal(size=GROUPS)[g] * (1 + 0.5 * x) + rng.normal(size=ROWS)
    return pd.DataFrame({"y": y, "x": x, "g": g})


def partition(part: int) -> pd.DataFrame:
    """Rows of a Dask frame that takes its time."""
    time.sleep(NAP)
    step = ROWS // PARTS
    return table().iloc[part * step : (part + 1) * step]


@pytest.fixture(scope="module")
def clusters() -> Iterator[list[LocalCluster]]:
    """The one in use."""
    found: list[LocalCluster] = []
    yield found
    found[-1].close()


@pytest.fixture
def client(clusters: list[LocalCluster]) -> Iterator[Client]:
    """Of two processes with nannies, which start them again: that of the test before, if whole."""
    if clusters and not is_whole(clusters[-1]):
        clusters.pop().close()
    if not clusters:
        clusters.append(
            LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")
        )
    with Client(clusters[-1], set_as_default=False) as found:
        yield found


def is_whole(cluster: LocalCluster, patience: float = 60.0) -> bool:
    """Whether both workers are there again and the dead ones forgotten.

    A nanny now and then does not get its worker started again: that is not what is tested here.
    """
    end = time.monotonic() + patience
    with Client(cluster, set_as_default=False) as client:
        while time.monotonic() < end:
            there = {str(x.worker_address) for x in cluster.workers.values() if alive(x.pid)}
            if len(there) == 2 and set(client.scheduler_info(n_workers=-1)["workers"]) == there:
                return True
            time.sleep(0.05)
    return False


def alive(pid: int | None) -> bool:
    """Whether a process runs (one that was killed may not have been collected)."""
    try:
        return pid is not None and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    for i, rows in enumerate(np.array_split(np.arange(ROWS), PARTS)):
        table().iloc[rows].to_parquet(folder / f"part-{i}.parquet")
    return str(folder)


def data(kind: str, folder: str) -> Any:
    """Files, or a Dask frame that is slow itself."""
    if kind == "parquet":
        return folder
    return dd.from_map(partition, range(PARTS), meta=table().iloc[:0])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is a part, and moments on workers are evaluated there, however small."""
    monkeypatch.setattr(base, "ROWS", ROWS // PARTS)
    monkeypatch.setattr(preparation, "MERGED", 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task computes two partitions of the frame."""
    monkeypatch.setattr(executor, "MANY_FRAMES", 2)
    monkeypatch.setattr(planning, "FRAMES", 2)
    monkeypatch.setattr(planning, "FRAME_TASKS", 2)


def fit(source: Any, client: Client, **options: Any) -> dmixed.MixedLMResults:
    """A fit that takes its time over the rows."""
    context = {"slowly": slowly if isinstance(source, str) else at_once}
    given = {"progress": False, "context": context, **options}
    return dmixed.lmer(FORMULA, source, client=client, **given)


def at_once(x: Any) -> Any:
    """The same numbers at once."""
    return x


def bits(result: dmixed.MixedLMResults) -> dict[str, bytes]:
    """Numbers of a result, bit by bit."""
    names = ("llf", "theta", "fe_params", "cov_re", "bse_fe", "scale")
    return {name: np.asarray(getattr(result, name), dtype=np.float64).tobytes() for name in names}


_UNDISTURBED: dict[tuple[str, str], dict[str, bytes]] = {}


def undisturbed(source: Any, client: Client, where: str) -> dict[str, bytes]:
    """What comes out if nobody dies."""
    kind = "parquet" if isinstance(source, str) else "dask"
    if (kind, where) not in _UNDISTURBED:
        _UNDISTURBED[kind, where] = bits(fit(source, client, evaluate_on=where))
    return _UNDISTURBED[kind, where]


def process_ids(client: Client) -> dict[str, int]:
    """Process of each worker, by address."""
    nannies = client.cluster.workers.values()
    return {nanny.worker_address: nanny.pid for nanny in nannies}


class Killer:
    """A listener that kills a worker once, when some part of the pass has been read."""

    def __init__(self, pid: int, parts: int = 1) -> None:
        self.pid, self.parts, self.killed = pid, parts, False
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not self.killed and event.stage == "pass" and event.done >= self.parts:
            self.killed = True
            os.kill(self.pid, signal.SIGKILL)


def our_tasks(dask_scheduler: Any = None) -> dict[str, str]:
    """State of each of our tasks that the scheduler knows, by key; whose results are where."""
    found = {str(key): task.state for key, task in dask_scheduler.tasks.items()}
    return {k: state for k, state in found.items() if state != "forgotten" and k.startswith(OURS)}


def our_results(dask_worker: Any = None) -> list[str]:
    """Keys of our results that a worker has."""
    return [str(key) for key in dask_worker.data if str(key).startswith(OURS)]


def left_over(client: Client, seconds: float = 5.0) -> dict[str, Any]:
    """What the cluster still has of us after some time; nothing as soon as that is so."""
    end = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = client.run_on_scheduler(our_tasks)
        if not found:
            held = client.run(our_results)
            found = {address: keys for address, keys in held.items() if keys}
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


# ------------------------------------------------------------------------ workers die


@pytest.mark.parametrize(
    ("kind", "where"), [("parquet", "driver"), ("parquet", "workers"), ("dask", "workers")]
)
def test_a_worker_dies_during_the_pass(client: Client, folder: str, kind: str, where: str) -> None:
    source = data(kind, folder)
    before = undisturbed(source, client, where)
    pids = process_ids(client)
    killer = Killer(next(iter(pids.values())))
    result = fit(source, client, evaluate_on=where, progress=killer)
    assert killer.killed
    assert bits(result) == before
    assert_each_part_told_once(killer.events)


def test_a_worker_dies_that_computes_partitions(client: Client, folder: str, runs: None) -> None:
    source = data("dask", folder)
    before = bits(fit(source, client))
    killer = Killer(next(iter(process_ids(client).values())))
    result = fit(source, client, progress=killer)
    assert killer.killed
    assert bits(result) == before
    assert_each_part_told_once(killer.events)


def assert_each_part_told_once(events: list[Event]) -> None:
    """Although some were read twice."""
    done = [event.done for event in events if event.stage == "pass"]
    assert done == sorted(done)
    assert max(event.rows for event in events) == ROWS


@pytest.mark.parametrize(
    ("kind", "where"), [("parquet", "driver"), ("parquet", "workers"), ("dask", "workers")]
)
def test_a_worker_dies_between_evaluations(
    client: Client, folder: str, kind: str, where: str
) -> None:
    source = data(kind, folder)
    before = undisturbed(source, client, where)
    pids = process_ids(client)
    killed: list[str] = []

    def kill(number: int, step: Any) -> None:
        if number == 2:
            held = client.run_on_scheduler(shards_by_worker)
            assert bool(held) == (where == "workers")
            killed.append(next(iter(held or pids)))
            os.kill(pids[killed[0]], signal.SIGKILL)

    result = fit(source, client, evaluate_on=where, callback=kill)
    assert len(killed) == 1
    assert bits(result) == before


def shards_by_worker(dask_scheduler: Any = None) -> dict[str, int]:
    """How many shards of factors each worker has, if any."""
    found: dict[str, int] = {}
    for key, task in dask_scheduler.tasks.items():
        for worker in task.who_has or () if str(key).startswith("_factored") else ():
            found[worker.address] = found.get(worker.address, 0) + 1
    return found


def test_a_worker_dies_during_an_evaluation(client: Client, folder: str) -> None:
    """A worker that has stopped has certainly not finished when it is killed."""
    before = undisturbed(folder, client, "workers")
    pids = process_ids(client)
    late: list[threading.Timer] = []

    def stop(number: int, step: Any) -> None:
        if number == 2:
            pid = pids[next(iter(client.run_on_scheduler(shards_by_worker)))]
            os.kill(pid, signal.SIGSTOP)
            late.append(threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)))
            late[0].start()

    result = fit(folder, client, evaluate_on="workers", callback=stop)
    assert not late[0].is_alive()  # the evaluation did wait for it
    assert bits(result) == before


def test_workers_that_die_again_and_again(folder: str) -> None:
    """A clear error; in a cluster of its own, whose nanny may give up."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        with pytest.raises(dmixed.DmixedError, match=r"died again and again.*smaller row groups"):
            fit(folder, client, context={"slowly": dying})
        end = time.monotonic() + 5
        while client.run_on_scheduler(our_tasks):
            assert time.monotonic() < end
            time.sleep(0.05)


# ------------------------------------------------------------------------ callers stop


class Stopped(Exception):
    """Raised by a listener."""


def interrupt() -> None:
    """What Ctrl-C does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def assert_usable(client: Client) -> None:
    """Nothing of ours is left, and the client works."""
    assert left_over(client) == {}
    assert client.submit(sum, [1, 2], pure=False).result() == 3


@pytest.mark.parametrize("kind", ["parquet", "dask"])
def test_interrupted_during_the_pass(client: Client, folder: str, kind: str) -> None:
    started = threading.Event()

    def once(event: Event) -> None:
        if event.stage == "pass" and event.done == 1 and not started.is_set():
            started.set()
            interrupt()

    with pytest.raises(KeyboardInterrupt) as caught:  # kept, as an interpreter keeps the last one
        fit(data(kind, folder), client, progress=once, evaluate_on="workers")
    assert started.is_set()
    assert_usable(client)
    del caught


def test_interrupted_during_an_evaluation(client: Client, folder: str) -> None:
    pids = process_ids(client)
    late: list[threading.Timer] = []

    def stop(number: int, step: Any) -> None:
        if number == 2:
            for pid in pids.values():
                os.kill(pid, signal.SIGSTOP)
            late.append(threading.Timer(0.5, interrupt))
            late[0].start()

    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            fit(folder, client, evaluate_on="workers", callback=stop)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
    assert not late[0].is_alive()
    assert_usable(client)
    del caught


@pytest.mark.parametrize("stage", ["pass", "fit"])
def test_a_listener_fails(client: Client, folder: str, stage: str) -> None:
    def fail(event: Event) -> None:
        if event.stage == stage and event.done == 2:
            raise Stopped

    with pytest.raises(Stopped) as caught:
        fit(folder, client, progress=fail, evaluate_on="workers")
    assert_usable(client)
    del caught


def test_results_hold_their_shards_and_nothing_else_does(client: Client, folder: str) -> None:
    result = fit(folder, client, evaluate_on="workers")
    held = client.run_on_scheduler(our_tasks)
    assert sum(key.startswith("_factored") for key in held) == planning.SHARDS
    again = result.model.fit(reml=False)
    del result, again
    gc.collect()
    assert left_over(client) == {}
