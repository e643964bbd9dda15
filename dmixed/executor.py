"""The pass: from the parts of a source to moments, on any Dask scheduler.

A graph of pure tasks: each task makes the moments of a run of parts, and trees whose shape
depends on the data alone add them, shard by shard where they are large; no row is shuffled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add, getitem
from threading import Lock
from typing import Any, TypeVar

import pyarrow as pa
from dask.delayed import Delayed, delayed

from dmixed.cellmoments import CellMoments, Summary, join, merge, parts_moments, split
from dmixed.design import DesignSpec
from dmixed.dispatch import (
    RETRIES,
    check_workers,
    compute,
    gather,
    one_blas_thread,
    persisted,
    unique_key,
)
from dmixed.errors import DataError, DmixedError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.formula.expressions import columns_of
from dmixed.planning import (
    SAMPLE_ROWS,
    SMALL_FRAME,
    Layout,
    PassPlan,
    divisible,
    group_bytes,
    layout,
    sample_keys,
    with_ranges,
)
from dmixed.progress import Report
from dmixed.sources import Part, Source, load
from dmixed.sources.partitions import on_their_own

T = TypeVar("T")

MANY_FRAMES = 32
"""Dask partitions from which one is counted to estimate the rows of all.

Fewer stay tasks of their own.
"""

MOMENTS = "dmixed-moments"
"""Name of the tasks of a pass in Dask's dashboard."""

HEAVY = 2**26
"""Bytes of a task's state from which not too many are to wait for each other."""

PIECE = "split-stage"
"""Name of the tasks that take a shard of a state: one that distributed knows to be short.

Tasks of unknown length are moved to idle workers, and here the whole state with them.
"""

DRIVER = 200 * 10**6
"""Bytes of moments that are brought from a cluster and evaluated in this process."""


def check_evaluate_on(evaluate_on: str) -> None:
    """Refuse a word for where moments are evaluated that is none."""
    if evaluate_on not in ("auto", "driver", "workers"):
        raise DataError(f'evaluate_on={evaluate_on!r}: must be "auto", "driver" or "workers"')


def collect(
    spec: DesignSpec,
    source: Source,
    pilot: pa.Table,
    client: Any = None,
    report: Report | None = None,
    where: str = "auto",
) -> CellMoments | RemoteMoments:
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
    if client is not None:
        check_workers(client, source.probe(spec.columns))
    remote = where == "workers"
    if remote:
        check_remote(spec, client)
    parts, planned = plan_pass(spec, source, pilot, client, remote)
    plan = planned.layout
    numbered = list(zip(parts, _starts(parts), strict=True))
    with _told(report, len(parts), client) as topic:
        read = partial(_parts_moments, spec, plan.expected, topic)

        def task(run: range, after: Delayed | None) -> Delayed:
            return _task(partial(read, run.start), numbered[run.start : run.stop], MOMENTS, after)

        shards = _shards(task, plan, _ahead(planned, client))
        if client is None:
            found = compute(shards)
        else:
            futures = persisted(client, shards, report)
            summary = _summaries(client, futures)
            large = plan.shards > 1 and summary.totals.nbytes > DRIVER
            if remote or (where == "auto" and large):
                return RemoteMoments(summary, tuple(futures), client)
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


def _summaries(client: Any, futures: Sequence[Any]) -> Summary:
    """Sum of the summaries of shards; releases the shards if it is stopped."""
    try:
        found = gather(client, client.map(_summary, futures, pure=False, retries=RETRIES))
    except BaseException:
        client.cancel(list(futures))
        raise
    return reduce(add, found)


def _summary(moments: CellMoments) -> Summary:
    return moments.summary


def _ahead(plan: PassPlan, client: Any) -> int | None:
    """Batches of `fan` states that may be under way; None for any number.

    A worker that waits for pieces of others to add begins with another state meanwhile, and the
    pieces wait until it is done: the more rows, the more pieces. What is under way is bounded, but
    no thread is left without work for it. The sums are the same.
    """
    if plan.layout.expected * plan.group_bytes < HEAVY:
        return None
    there = {} if client is None else client.nthreads()
    threads = sum(there.values()) or os.cpu_count() or 1
    fan = plan.layout.fan
    batches = max(1, threads // fan)
    return batches if fan * batches % threads == 0 else batches + 1


def _nothing(*_: Any) -> None:
    """What a state waits for: of one shard each where it is, and of all these."""


def _nothing_of(tasks: list[Delayed]) -> Delayed:
    return delayed(_nothing, pure=False)(*tasks, dask_key_name=unique_key(PIECE))


def _shards(
    task: Callable[[range, Delayed | None], Delayed], plan: Layout, ahead: int | None = None
) -> list[Delayed]:
    """The sum of all states, shard by shard.

    Parameters
    ----------
    task
        makes the task of a run, which begins after another one
    ahead
        batches of states that may be under way
    """
    fan = plan.fan
    if plan.shards == 1:
        return [_tree([task(run, None) for run in plan.runs], fan)]
    bunches = [plan.runs[i : i + plan.bunch] for i in range(0, len(plan.runs), plan.bunch)]
    if plan.coarse == plan.shards:
        batches: list[list[Delayed]] = []  # of each its shards
        done: list[Delayed] = []
        for i in range(0, len(bunches), fan):
            n = len(done)
            after = None if ahead is None or n < ahead else done[n - ahead]
            states = [_tree([task(x, after) for x in runs], fan) for runs in bunches[i : i + fan]]
            pieces = [_divided(state, plan.coarse) for state in states]
            batches.append([_tree(list(column), fan) for column in zip(*pieces, strict=True)])
            done.append(_nothing_of([_nothing_of([shard]) for shard in batches[-1]]))
        return [_tree(list(column), fan) for column in zip(*batches, strict=True)]
    states = [_tree([task(run, None) for run in runs], fan) for runs in bunches]
    pieces = [_divided(state, plan.coarse) for state in states]
    # Too many states times shards: in two stages, as a radix exchange. Runs of states are added
    # coarse shard by coarse shard, which are no larger than a state, and those are divided again.
    fine = plan.shards // plan.coarse
    runs = [pieces[i : i + plan.coarse] for i in range(0, len(pieces), plan.coarse)]
    found = []
    for c in range(plan.coarse):
        added = [_tree([state[c] for state in run], fan) for run in runs]
        again = [_divided(state, fine, plan.coarse) for state in added]
        found += [_tree(list(column), fan) for column in zip(*again, strict=True)]
    return found


def _divided(state: Delayed, shards: int, of: int = 1) -> list[Delayed]:
    """The shards of a state, of which it is one of so many itself."""
    whole = delayed(split, pure=False)(state, shards, of, dask_key_name=unique_key("dmixed-split"))
    return [_piece(whole, shard) for shard in range(shards)]


def plan_pass(
    spec: DesignSpec, source: Source, pilot: pa.Table, client: Any = None, remote: bool = False
) -> tuple[list[Part], PassPlan]:
    """Parts of a source and how to divide them.

    From metadata, a sample of keys, and the pilot's columns; of Dask DataFrames of many
    partitions one is counted.
    """
    parts = source.parts(spec.columns, _key_columns(spec))
    rows = sum(_rows(part) for part in parts)
    sample = pilot
    if source.kind != "dask":
        sample = source.head(_key_columns(spec), SAMPLE_ROWS)
    elif len(parts) >= MANY_FRAMES:
        first = each_part(_length, parts[:1], client)[0]
        rows = len(parts) * first
        if first <= SMALL_FRAME:
            parts = on_their_own(parts)
    keys = sample_keys(spec, sample, max(rows, len(sample)))
    if len(spec.keys) == 1:
        ranges = [part.ranges.get(spec.keys[0].name) for part in parts]
        keys = with_ranges(keys, [pair for pair in ranges if pair] if all(ranges) else [])
    size = group_bytes(spec, pilot)
    counted = all(part.rows is not None for part in parts)
    known = [part.nbytes for part in parts if part.nbytes is not None]
    nbytes = sum(known) if len(known) == len(parts) else None
    divided = layout(spec, parts, rows, keys, size, remote)
    return parts, PassPlan(len(parts), rows, counted, nbytes, keys, divided, size)


def _key_columns(spec: DesignSpec) -> tuple[str, ...]:
    """Data columns of the keys."""
    return tuple(dict.fromkeys(name for key in spec.keys for name in columns_of(key.node)))


def _rows(part: Part) -> int:
    """Rows of a part: counted, or as many as its bytes would be of numbers, or 0."""
    if part.rows is not None:
        return part.rows
    return (part.nbytes or 0) // (8 * len(part.columns))


def _length(part: Part, value: Any) -> int:
    return len(load(part, value))


def _piece(state: Delayed, shard: int) -> Delayed:
    return delayed(getitem, pure=False)(state, shard, dask_key_name=unique_key(PIECE))


@one_blas_thread
def _parts_moments(
    spec: DesignSpec,
    expected: int,
    topic: str | None,
    first: int,
    parts: Sequence[tuple[Part, int]],
    value: Any = None,
) -> CellMoments:
    told = None if topic is None else partial(_tell, topic, first)
    return parts_moments(spec, parts, value, expected, told)


class _Listening:
    """Tells a report of each part once: what a lost worker has read is read again."""

    def __init__(self, report: Report) -> None:
        self.report, self._read, self._lock = report, set[int](), Lock()

    def __call__(self, part: int, rows: int, nbytes: int) -> None:
        with self._lock:
            if part in self._read:
                return
            self._read.add(part)
        self.report.task(rows, nbytes)


_LISTENING: dict[str, _Listening] = {}
"""Who listens to the passes that go on in this process, by topic."""


def _tell(topic: str, first: int, part: int, rows: int, nbytes: int) -> None:
    """Tell that a part has been read (``part`` counts from the first of the run), from anywhere."""
    told = _LISTENING.get(topic)
    if told is not None:
        told(first + part, rows, nbytes)
        return
    from distributed import get_worker

    get_worker().log_event(topic, {"part": first + part, "rows": rows, "bytes": nbytes})


@contextlib.contextmanager
def _told(report: Report | None, parts: int, client: Any) -> Iterator[str | None]:
    """Topic on which the parts of a pass are told to a report; None if nobody listens."""
    if report is None or not report.heard:
        yield None
        return
    topic = unique_key("dmixed")
    report.stage("pass", parts)

    told = _Listening(report)

    def event(message: tuple[float, dict[str, int]]) -> None:
        if topic in _LISTENING:  # events may come late
            told(message[1]["part"], message[1]["rows"], message[1]["bytes"])

    _LISTENING[topic] = told
    try:
        if client is not None:
            client.subscribe_topic(topic, event)
        yield topic
    finally:
        del _LISTENING[topic]
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


def _task(
    function: Callable[..., T],
    parts: Sequence[tuple[Part, int]],
    name: str,
    after: Delayed | None = None,
) -> Delayed:
    """Delayed ``function(parts)``, or ``function([part], frame)`` where Dask makes the frame.

    It begins when ``after``, a task that gives None, is done; a frame does not wait.
    """
    key = unique_key(name)
    frame = parts[0][0].task
    if not isinstance(frame, Delayed):
        return delayed(partial(function, parts), pure=False)(after, dask_key_name=key)
    bare = [(replace(part, task=None), row0) for part, row0 in parts]  # the graph stays outside
    return delayed(partial(function, bare), pure=False)(frame, dask_key_name=key)


def _tree(tasks: list[Delayed], fan: int) -> Delayed:
    """Sum of all moments by a tree fixed by position."""
    add_up = delayed(_merge_all, pure=False)
    while len(tasks) > 1:
        tasks = [
            add_up(*tasks[i : i + fan], dask_key_name=unique_key("dmixed-merge"))
            for i in range(0, len(tasks), fan)
        ]
    return tasks[0]


@one_blas_thread
def _merge_all(*parts: CellMoments) -> CellMoments:
    return merge(parts)
