"""How work gets to threads and clusters, and results back; knows nothing of models."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.metadata import version
from threading import Lock
from typing import Any, TypeVar
from uuid import uuid4

import dask
from dask import threaded
from dask.delayed import Delayed
from threadpoolctl import ThreadpoolController

from dmixed.errors import DmixedError
from dmixed.progress import Report

S = TypeVar("S")
T = TypeVar("T")

POLL = 0.5
"""Seconds after which a wait looks whether it is to be stopped."""

RETRIES = 3
"""Times that a cluster repeats a task that failed for reasons of its own."""


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process; finding them takes longer than a small fit."""
    return ThreadpoolController()


class _OneThread(contextlib.ContextDecorator):
    """One thread for BLAS while anybody computes: tasks are the parallelism.

    The limit belongs to the process: the first to enter sets it, the last to leave lifts it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._limit = Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit.enter_context(_blas().limit(limits=1))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.close()


one_blas_thread = _OneThread()


def find_client(client: Any = None) -> Any:
    """The client to use: the one given, the current one, or None for threads in this process."""
    if client is None and "distributed" in sys.modules:
        from distributed import get_client

        with contextlib.suppress(ValueError):
            client = get_client()
    if client is not None and not hasattr(client, "scheduler_info"):
        raise DmixedError(
            f"client is {client!r}: it must be a distributed.Client, made for example with "
            'Client("tcp://host:port")'
        )
    if client is not None and client.status in ("closed", "closing"):
        raise DmixedError("the client is closed: make a new one, or leave client= out for threads")
    if client is not None and getattr(client, "asynchronous", False):
        raise DmixedError(
            "the client is asynchronous: dmixed needs one made with Client(asynchronous=False)"
        )
    return client


def running(client: Any) -> Any:
    """The client if it still has a cluster, else the current one or None."""
    return client if getattr(client, "status", None) == "running" else find_client()


def check_workers(client: Any, probe: Callable[[], str | None]) -> None:
    """Refuse, before any work, a cluster whose workers cannot do it.

    Parameters
    ----------
    probe
        run on every worker: None, or why the data cannot be read there

    Raises
    ------
    DmixedError
        dmixed is missing there, or of another version; or the data cannot be read
    """
    own = version("dmixed")
    info = client.get_versions(packages=["dmixed"])
    others: dict[str | None, list[str]] = {}
    for address, found in info["workers"].items():
        there = found["packages"].get("dmixed")
        if there != own:
            others.setdefault(there, []).append(address)
    if others:
        what = "; ".join(
            f"{_named(places)} {'no dmixed' if there is None else f'dmixed {there}'}"
            for there, places in others.items()
        )
        raise DmixedError(f"here is dmixed {own}, but {what}: install the same on all workers")
    answers = client.run(probe, on_error="return")
    # a worker that is lost while it is asked raises OSError here; that costs the fit nothing
    refused = {a: r for a, r in answers.items() if r is not None and not isinstance(r, OSError)}
    for address, reason in refused.items():
        raise DmixedError(f"{_named(list(refused))} no access to the data: {reason} (at {address})")


def _named(places: Sequence[str]) -> str:
    """Some workers, as the subject of a sentence."""
    if len(places) == 1:
        return f"the worker {places[0]} has"
    return f"{len(places)} workers, such as {places[0]}, have"


def compute(
    tasks: Sequence[Delayed], client: Any = None, report: Report | None = None
) -> list[Any]:
    """Results of delayed tasks, on the client's cluster or in threads of this process."""
    if client is None:
        scheduler = dask.config.get("scheduler", None) or "threads"
        with one_blas_thread:
            return list(dask.compute(*tasks, scheduler=scheduler))
    return gather(client, persisted(client, tasks, report))


def persisted(client: Any, tasks: Sequence[Delayed], report: Report | None) -> list[Any]:
    """Futures of tasks that are done; results stay on the workers."""
    futures = client.compute(list(tasks), retries=RETRIES)
    try:
        _wait(client, futures, report)
    except BaseException:
        client.cancel(futures)
        raise
    return list(futures)


def gather(client: Any, futures: Sequence[Any]) -> list[Any]:
    """Results of futures; cancels them all if one fails."""
    try:
        return list(client.gather(list(futures), direct=_reached(client)))
    except BaseException as error:
        client.cancel(list(futures))
        raise _explained(error) from None


def _reached(client: Any) -> bool | None:
    """Whether workers can be asked for results: those that this process has started.

    From others they come as the client was told, through the scheduler by default.
    """
    from distributed import LocalCluster

    return True if isinstance(client.cluster, LocalCluster) else None


def _wait(client: Any, futures: list[Any], report: Report | None) -> None:
    """Until all are done or one fails, or the listener of the report does."""
    from distributed import wait

    while True:
        try:
            with client.as_current():
                wait(futures, timeout=POLL)
            return
        except TimeoutError:
            if report is not None:
                report.check()
            if any(future.status == "error" for future in futures):
                return


def _explained(error: BaseException) -> BaseException:
    """What a cluster says of lost workers, in words that help."""
    if type(error).__name__ != "KilledWorker":
        return error
    return DmixedError(
        "workers of the cluster died again and again while they ran the same task, most likely for "
        "want of memory: give them more of it or fewer threads each, or write the data in smaller "
        f"row groups or partitions ({error})"
    )


def in_threads(function: Callable[[S], T], things: Iterable[S]) -> list[T]:
    """``list(map(function, things))`` in threads of this process."""
    calls = [partial(function, thing) for thing in things]
    if len(calls) == 1:
        return [calls[0]()]
    graph = {i: (call,) for i, call in enumerate(calls)}  # `delayed` costs more than small tasks
    return list(threaded.get(graph, list(graph)))


def unique_key(name: str) -> str:
    """Key of a task, whose name Dask's dashboard shows."""
    return f"{name}-{uuid4().hex}"
