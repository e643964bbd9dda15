"""The only module that moves things between threads, processes and machines.

The pass is a graph of pure tasks: each task makes the moments of a run of parts, and a tree
whose shape depends on the number of parts alone adds them, four at a time; no row is shuffled,
and what arrives is one `Moments`. Evaluations walk fixed slices of groups in threads and add the
terms in order.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from operator import add
from threading import Lock
from typing import Any, TypeVar
from uuid import uuid4

import dask
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from threadpoolctl import ThreadpoolController

from dmixed.blocks import Floats
from dmixed.collect import Moments, merge, parts_moments
from dmixed.design import DesignSpec
from dmixed.errors import DmixedError
from dmixed.factors import Factors
from dmixed.likelihood import profile_terms
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS
from dmixed.sources import Part, Source
from dmixed.terms import ProfileTerms

T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("pass", "fit"), how much is done, and of how much (None: unknown)."""

TASKS, TASK_ROWS = 8, 64_000_000
"""The pass has `TASKS` tasks for every `TASK_ROWS` rows."""

SPLIT_EVERY = 4
"""States added by one task of the tree."""

RETRIES = 3
"""Times that a cluster repeats a task that failed for reasons of its own."""

SLICE = 16 * GROUPS
"""Groups of one factor evaluated by one task."""

FEW_CLUSTERS = 1024
"""Clusters in all that are not worth the threads, if every bucket is a single chunk."""

TASK_CHUNKS = 16
"""Chunks of clusters evaluated by one task."""


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


def collect(
    spec: DesignSpec, source: Source, client: Any = None, progress: Progress | None = None
) -> Moments:
    """One pass over the rows of a source.

    Raises
    ------
    DmixedError
        from the parts, naming the file or partition
    """
    parts = source.parts(spec.columns)
    numbered = list(zip(parts, _starts(parts), strict=True))
    tasks = [_moments_task(spec, numbered[run.start : run.stop]) for run in _runs(parts)]
    return compute(_tree(tasks), client, progress, len(tasks))


def _moments_task(spec: DesignSpec, parts: Sequence[tuple[Part, int]]) -> Delayed:
    """Moments of some parts in one task."""
    return _task(partial(_parts_moments, spec), parts, "dmixed-moments")


@one_blas_thread
def _parts_moments(
    spec: DesignSpec, parts: Sequence[tuple[Part, int]], value: Any = None
) -> Moments:
    return parts_moments(spec, parts, value)


def _runs(parts: Sequence[Part]) -> list[range]:
    """Neighbouring parts that one task reads into one state: set by the data alone.

    Eight tasks for every 64 million rows. Frames that Dask makes come one at a time: a task
    would hold all those it waits for.
    """
    n = len(parts)
    rows = sum(part.rows or 0 for part in parts)
    tasks = min(n, TASKS * max(1, math.ceil(rows / TASK_ROWS)))
    if any(isinstance(part.task, Delayed) for part in parts):
        tasks = n
    ends = [round(n * (i + 1) / tasks) for i in range(tasks)]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def each_part(
    function: Callable[[Part, Any], T], parts: Sequence[Part], client: Any = None
) -> list[T]:
    """``function(part, value)`` of every part, in order; ``value`` is Dask's frame if any."""
    tasks = [_task(partial(_one, function), [(part, 0)], "dmixed-rows") for part in parts]
    return list(compute(delayed(list)(tasks), client))


def _one(
    function: Callable[[Part, Any], T], parts: Sequence[tuple[Part, int]], value: Any = None
) -> T:
    return function(parts[0][0], value)


def _starts(parts: Sequence[Part]) -> list[int]:
    """Number of the first row of each part; parts of unknown length count from their own start."""
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total = total + part.rows if part.rows is not None else 0
    return starts


def _task(function: Callable[..., T], parts: Sequence[tuple[Part, int]], name: str) -> Delayed:
    """Delayed ``function(parts)``, or ``function([part], frame)`` where Dask makes the frame."""
    key = f"{name}-{uuid4().hex}"
    frame = parts[0][0].task
    if not isinstance(frame, Delayed):
        return delayed(partial(function, parts), pure=False)(dask_key_name=key)
    bare = [(replace(part, task=None), row0) for part, row0 in parts]  # the graph stays outside
    return delayed(partial(function, bare), pure=False)(frame, dask_key_name=key)


def _tree(tasks: list[Delayed]) -> Delayed:
    """Sum of all moments by a tree fixed by position."""
    add_up = delayed(_merge_all, pure=False)
    while len(tasks) > 1:
        tasks = [
            add_up(*tasks[i : i + SPLIT_EVERY], dask_key_name=f"dmixed-merge-{uuid4().hex}")
            for i in range(0, len(tasks), SPLIT_EVERY)
        ]
    return tasks[0]


@one_blas_thread
def _merge_all(*parts: Moments) -> Moments:
    return merge(parts)


class _Counter(Callback):
    """Tells how many parts of the pass are done, on Dask's local schedulers."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.progress, self.total, self.done = progress, total, 0

    def _posttask(self, key: Any, *_: Any) -> None:
        if str(key).startswith("dmixed-moments"):
            self.done += 1
            self.progress("pass", self.done, self.total)


def compute(
    task: Delayed, client: Any = None, progress: Progress | None = None, total: int = 0
) -> Any:
    """Result of a delayed task, on the client's cluster or in threads of this process."""
    if client is not None:
        if progress is not None:
            progress("pass", 0, None)
        future = client.compute(task, retries=RETRIES)
        try:
            result = future.result()
        except BaseException:
            future.cancel()
            raise
        if progress is not None:
            progress("pass", total, total)
        return result
    watch = contextlib.nullcontext() if progress is None else _Counter(progress, total)
    scheduler = dask.config.get("scheduler", None) or "threads"
    with watch, one_blas_thread:
        return task.compute(scheduler=scheduler)


class Evaluator:
    """`ProfileTerms` of all groups at a root of Psi, in threads of this process.

    What one task evaluates is set by the data, so that sums do not depend on the machine.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.slices = [
            (part, slice(start, min(start + step, part.n_groups)))
            for part in factors.parts
            for step in [TASK_CHUNKS * part.step if isinstance(part, Bucket) else SLICE]
            for start in range(0, part.n_groups, step)
        ]
        self.small = sum(part.n_groups for part in factors.parts) <= FEW_CLUSTERS and all(
            isinstance(part, Bucket) and part.step >= part.n_groups for part in factors.parts
        )

    def __call__(self, root: Floats, order: int = 2) -> ProfileTerms:
        """Terms up to derivatives of an order, added slice by slice in order."""
        blocks = self.factors.blocks
        calls = [
            partial(profile_terms, blocks, part, root, order, groups)
            for part, groups in self.slices
        ]
        if len(calls) == 1 or self.small:
            return reduce(add, (call() for call in calls))
        tasks = [delayed(call, pure=False)() for call in calls]
        return reduce(add, dask.compute(*tasks, scheduler="threads"))
