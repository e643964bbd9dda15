"""The pass: from the parts of a source to moments, on any Dask scheduler.

A graph of pure tasks: each task makes the moments of a run of parts, and trees whose shape
depends on the data alone add them, shard by shard where they are large; no row is shuffled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add, getitem
from typing import Any, TypeVar

import pyarrow as pa
from dask.delayed import Delayed, delayed

from dmixed.collect import Moments, Summary, join, merge, parts_moments, split
from dmixed.design import DesignSpec
from dmixed.dispatch import RETRIES, compute, gather, one_blas_thread, persisted, unique_key
from dmixed.errors import DmixedError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.formula.expressions import columns_of
from dmixed.planning import (
    SAMPLE_ROWS,
    Layout,
    divisible,
    group_bytes,
    layout,
    sample_keys,
    with_ranges,
)
from dmixed.progress import Report
from dmixed.sources import Part, Source, load

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

DRIVER = 200 * 10**6
"""Bytes of moments that are brought from a cluster and evaluated in this process."""


def collect(
    spec: DesignSpec,
    source: Source,
    pilot: pa.Table,
    client: Any = None,
    report: Report | None = None,
    where: str = "auto",
) -> Moments | RemoteMoments:
    """One pass over the rows of a source.

    Parameters
    ----------
    pilot
        some rows with the columns of the spec
    where
        "driver" brings the moments here, "workers" leaves them on a cluster, "auto" decides by
        their size

    Raises
    ------
    DmixedError
        from the parts, naming the file or partition; or the cluster lost its workers
    """
    parts = source.parts(spec.columns, _key_columns(spec))
    remote = where == "workers"
    if remote:
        check_remote(spec, client)
    plan = _layout(spec, source, parts, pilot, client, remote)
    numbered = list(zip(parts, _starts(parts), strict=True))
    with _told(report, len(parts), client) as topic:
        read = partial(_parts_moments, spec, plan.expected, topic)
        tasks = [_task(read, numbered[run.start : run.stop], MOMENTS) for run in plan.runs]
        shards = _shards(tasks, plan)
        if client is None:
            found = compute(shards)
        else:
            futures = persisted(client, shards, report)
            summaries = gather(client, client.map(_summary, futures, pure=False, retries=RETRIES))
            nbytes = sum(summary.totals.nbytes for summary in summaries)
            if remote or (where == "auto" and plan.shards > 1 and nbytes > DRIVER):
                return RemoteMoments(reduce(add, summaries), tuple(futures), client)
            found = gather(client, futures)
    return found[0] if len(found) == 1 else join(found)


def check_remote(spec: DesignSpec, client: Any) -> None:
    """Refuse to leave moments on workers where there are none, or where the model forbids it."""
    if client is None:
        raise DmixedError('evaluate_on="workers" needs a cluster: pass client=, or make a Client')
    if not divisible(spec):
        raise NotSupportedError(
            'evaluate_on="workers" needs one grouping factor: the levels of several factors are '
            'solved for together; use evaluate_on="driver"'
        )


def _summary(moments: Moments) -> Summary:
    return moments.summary


def _shards(tasks: list[Delayed], plan: Layout) -> list[Delayed]:
    """The sum of all states, shard by shard."""
    if plan.shards == 1:
        return [_tree(tasks)]
    states = [_tree(tasks[i : i + plan.bunch]) for i in range(0, len(tasks), plan.bunch)]
    divided = [
        delayed(split, pure=False)(state, plan.shards, dask_key_name=unique_key("dmixed-split"))
        for state in states
    ]
    return [_tree([_piece(state, s) for state in divided]) for s in range(plan.shards)]


def _layout(
    spec: DesignSpec,
    source: Source,
    parts: Sequence[Part],
    pilot: pa.Table,
    client: Any,
    remote: bool,
) -> Layout:
    """How to divide the pass; from metadata, a sample of keys, and the pilot's columns."""
    rows = sum(part.rows or 0 for part in parts)
    sample = pilot
    if source.kind != "dask":
        sample = source.head(_key_columns(spec), SAMPLE_ROWS)
    elif len(parts) >= MANY_FRAMES:
        rows = len(parts) * each_part(_length, parts[:1], client)[0]
    keys = sample_keys(spec, sample, max(rows, len(sample)))
    if len(spec.keys) == 1:
        ranges = [part.ranges.get(spec.keys[0].name) for part in parts]
        keys = with_ranges(keys, [pair for pair in ranges if pair] if all(ranges) else [])
    return layout(spec, parts, rows, keys, group_bytes(spec, pilot), remote)


def _key_columns(spec: DesignSpec) -> tuple[str, ...]:
    """Data columns of the keys."""
    return tuple(dict.fromkeys(name for key in spec.keys for name in columns_of(key.node)))


def _length(part: Part, value: Any) -> int:
    return len(load(part, value))


def _piece(state: Delayed, shard: int) -> Delayed:
    return delayed(getitem, pure=False)(state, shard, dask_key_name=unique_key(PIECE))


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
    topic = unique_key("dmixed")
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
    key = unique_key(name)
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
            add_up(*tasks[i : i + SPLIT_EVERY], dask_key_name=unique_key("dmixed-merge"))
            for i in range(0, len(tasks), SPLIT_EVERY)
        ]
    return tasks[0]


@one_blas_thread
def _merge_all(*parts: Moments) -> Moments:
    return merge(parts)
