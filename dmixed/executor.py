"""The only module that moves things between threads, processes and machines.

The pass is a graph of pure tasks: each task makes the moments of a run of parts, and a tree
whose shape depends on the number of parts alone adds them, four at a time; no row is shuffled,
and what arrives is one `Moments`. Evaluations walk fixed slices of groups in threads and add the
terms in order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from operator import add, getitem
from threading import Lock
from typing import Any, TypeVar
from uuid import uuid4

import dask
import pyarrow as pa
from dask.delayed import Delayed, delayed
from threadpoolctl import ThreadpoolController

from dmixed.blocks import Floats
from dmixed.collect import Moments, join, merge, parts_moments, split
from dmixed.design import DesignSpec
from dmixed.errors import DmixedError
from dmixed.factors import Factors
from dmixed.formula.expressions import columns_of
from dmixed.likelihood import profile_terms
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS
from dmixed.planning import SAMPLE_ROWS, Layout, group_bytes, layout, sample_keys
from dmixed.progress import Report
from dmixed.sources import Part, Source, load
from dmixed.terms import ProfileTerms

T = TypeVar("T")
SPLIT_EVERY = 4
"""States added by one task of the tree."""

MANY_FRAMES = 32
"""Dask partitions from which one is counted to estimate the rows of all."""

MOMENTS = "dmixed-moments"
"""Name of the tasks of a pass in Dask's dashboard."""

PIECE = "split-stage"
"""Name of the tasks that take a shard of a state: one that distributed knows to be short.

Tasks of unknown length are moved to idle workers, and here the whole state with them.
"""

POLL = 0.5
"""Seconds after which a pass looks whether it is to be stopped."""

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
    spec: DesignSpec,
    source: Source,
    pilot: pa.Table,
    client: Any = None,
    report: Report | None = None,
) -> Moments:
    """One pass over the rows of a source.

    Parameters
    ----------
    pilot
        some rows with the columns of the spec

    Raises
    ------
    DmixedError
        from the parts, naming the file or partition; or the cluster lost its workers
    """
    parts = source.parts(spec.columns)
    plan = _layout(spec, source, parts, pilot, client)
    numbered = list(zip(parts, _starts(parts), strict=True))
    with _told(report, len(parts), client) as topic:
        read = partial(_parts_moments, spec, plan.expected, topic)
        tasks = [_task(read, numbered[run.start : run.stop], MOMENTS) for run in plan.runs]
        found = compute(_shards(tasks, plan), client, report)
    return found[0] if len(found) == 1 else join(found)


def _shards(tasks: list[Delayed], plan: Layout) -> list[Delayed]:
    """The sum of all states, shard by shard."""
    if plan.shards == 1:
        return [_tree(tasks)]
    states = [_tree(tasks[i : i + plan.bunch]) for i in range(0, len(tasks), plan.bunch)]
    divided = [
        delayed(split, pure=False)(state, plan.shards, dask_key_name=_key("dmixed-split"))
        for state in states
    ]
    return [_tree([_piece(state, s) for state in divided]) for s in range(plan.shards)]


def _layout(
    spec: DesignSpec, source: Source, parts: Sequence[Part], pilot: pa.Table, client: Any
) -> Layout:
    """How to divide the pass; from metadata, a sample of keys, and the pilot's columns."""
    rows = sum(part.rows or 0 for part in parts)
    sample = pilot
    if source.kind != "dask":
        names = dict.fromkeys(name for key in spec.keys for name in columns_of(key.node))
        sample = source.head(tuple(names), SAMPLE_ROWS)
    elif len(parts) >= MANY_FRAMES:
        rows = len(parts) * each_part(_length, parts[:1], client)[0]
    keys = sample_keys(spec, sample, max(rows, len(sample)))
    return layout(spec, parts, rows, keys, group_bytes(spec, pilot))


def _length(part: Part, value: Any) -> int:
    return len(load(part, value))


def _piece(state: Delayed, shard: int) -> Delayed:
    return delayed(getitem, pure=False)(state, shard, dask_key_name=_key(PIECE))


def _key(name: str) -> str:
    return f"{name}-{uuid4().hex}"


@one_blas_thread
def _parts_moments(
    spec: DesignSpec,
    expected: int,
    topic: str | None,
    parts: Sequence[tuple[Part, int]],
    value: Any = None,
) -> Moments:
    told = None if topic is None else partial(_tell, topic)
    return parts_moments(spec, parts, value, expected, told)


_REPORTS: dict[str, Report] = {}
"""Reports of passes that go on in this process, by topic."""


def _tell(topic: str, rows: int, nbytes: int) -> None:
    """Tell the report of a pass that a part has been read, from wherever this runs."""
    report = _REPORTS.get(topic)
    if report is not None:
        report.task(rows, nbytes)
        return
    from distributed import get_worker

    get_worker().log_event(topic, {"rows": rows, "bytes": nbytes})


@contextlib.contextmanager
def _told(report: Report | None, parts: int, client: Any) -> Iterator[str | None]:
    """Topic on which the parts of a pass are told to a report; None if nobody listens."""
    if report is None or not report.heard:
        yield None
        return
    topic = _key("dmixed")
    report.stage("pass", parts)

    def event(message: tuple[float, dict[str, int]]) -> None:
        if topic in _REPORTS:  # events may come late
            report.task(message[1]["rows"], message[1]["bytes"])

    _REPORTS[topic] = report
    try:
        if client is not None:
            client.subscribe_topic(topic, event)
        yield topic
    finally:
        del _REPORTS[topic]
        if client is not None and client.status == "running":
            client.unsubscribe_topic(topic)


def each_part(
    function: Callable[[Part, Any], T], parts: Sequence[Part], client: Any = None
) -> list[T]:
    """``function(part, value)`` of every part, in order; ``value`` is Dask's frame if any."""
    tasks = [_task(partial(_one, function), [(part, 0)], "dmixed-rows") for part in parts]
    return list(compute(tasks, client))


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
    key = _key(name)
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
            add_up(*tasks[i : i + SPLIT_EVERY], dask_key_name=_key("dmixed-merge"))
            for i in range(0, len(tasks), SPLIT_EVERY)
        ]
    return tasks[0]


@one_blas_thread
def _merge_all(*parts: Moments) -> Moments:
    return merge(parts)


def compute(
    tasks: Sequence[Delayed], client: Any = None, report: Report | None = None
) -> list[Any]:
    """Results of delayed tasks, on the client's cluster or in threads of this process."""
    if client is None:
        scheduler = dask.config.get("scheduler", None) or "threads"
        with one_blas_thread:
            return list(dask.compute(*tasks, scheduler=scheduler))
    futures = client.compute(list(tasks), retries=RETRIES)
    try:
        _wait(client, futures, report)
        return list(client.gather(futures))
    except BaseException as error:
        client.cancel(futures)
        raise _explained(error) from None


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
