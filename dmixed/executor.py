"""The only module that moves things between threads, processes and machines.

The pass is a graph of pure tasks: each task makes the moments of a run of parts, and a tree
whose shape depends on the number of parts alone adds them, four at a time; no row is shuffled,
and what arrives is one `Moments`. Evaluations walk fixed slices of groups in threads and add the
terms in order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from dmixed.collect import Moments, Summary, join, merge, parts_moments, split
from dmixed.covariance import Blocks
from dmixed.design import DesignSpec
from dmixed.errors import DmixedError, NotSupportedError
from dmixed.factors import Coordinates, Factors, Shard, Within, one_level
from dmixed.formula.expressions import columns_of
from dmixed.likelihood import profile_terms
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS, OneLevel
from dmixed.planning import SAMPLE_ROWS, Layout, divisible, group_bytes, layout, sample_keys
from dmixed.progress import Report
from dmixed.sources import Part, Source, load
from dmixed.terms import ProfileTerms

S = TypeVar("S")
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

DRIVER = 200 * 10**6
"""Bytes of moments that are brought from a cluster and evaluated in this process."""

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
    parts = source.parts(spec.columns)
    remote = where == "workers"
    if remote:
        _check_remote(spec, client)
    plan = _layout(spec, source, parts, pilot, client, remote)
    numbered = list(zip(parts, _starts(parts), strict=True))
    with _told(report, len(parts), client) as topic:
        read = partial(_parts_moments, spec, plan.expected, topic)
        tasks = [_task(read, numbered[run.start : run.stop], MOMENTS) for run in plan.runs]
        shards = _shards(tasks, plan)
        if client is None:
            found = compute(shards)
        else:
            futures = _persisted(client, shards, report)
            summaries = gather(client, client.map(_summary, futures, pure=False, retries=RETRIES))
            nbytes = sum(summary.totals.nbytes for summary in summaries)
            if remote or (where == "auto" and plan.shards > 1 and nbytes > DRIVER):
                return RemoteMoments(reduce(add, summaries), tuple(futures), client)
            found = gather(client, futures)
    return found[0] if len(found) == 1 else join(found)


def _check_remote(spec: DesignSpec, client: Any) -> None:
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
        delayed(split, pure=False)(state, plan.shards, dask_key_name=_key("dmixed-split"))
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
        names = dict.fromkeys(name for key in spec.keys for name in columns_of(key.node))
        sample = source.head(tuple(names), SAMPLE_ROWS)
    elif len(parts) >= MANY_FRAMES:
        rows = len(parts) * each_part(_length, parts[:1], client)[0]
    keys = sample_keys(spec, sample, max(rows, len(sample)))
    return layout(spec, parts, rows, keys, group_bytes(spec, pilot), remote)


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
    return gather(client, _persisted(client, tasks, report))


def _persisted(client: Any, tasks: Sequence[Delayed], report: Report | None) -> list[Any]:
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
        return list(client.gather(list(futures)))
    except BaseException as error:
        client.cancel(list(futures))
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


def in_threads(function: Callable[[S], T], things: Iterable[S]) -> list[T]:
    """``list(map(function, things))`` in threads of this process."""
    calls = [partial(function, thing) for thing in things]
    if len(calls) == 1:
        return [calls[0]()]
    return list(dask.compute(*(delayed(call, pure=False)() for call in calls), scheduler="threads"))


class Evaluator:
    """`ProfileTerms` of all groups at a root of Psi.

    What one task evaluates is set by the data, and sums are added slice by slice, then part by
    part, so that they do not depend on the machine.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.small = sum(part.n_groups for part in factors.evaluated) <= FEW_CLUSTERS and all(
            isinstance(part, Bucket) and part.step >= part.n_groups for part in factors.evaluated
        )

    def __call__(self, root: Floats, order: int = 2) -> ProfileTerms:
        """Terms up to derivatives of an order."""
        factors = self.factors
        if factors.elsewhere is not None:
            return factors.elsewhere.terms(factors.blocks, root, order)
        evaluate = partial(_slice_terms, factors.blocks, root, order)
        calls = [(part, groups) for part in factors.evaluated for groups in slices(part)]
        if self.small:
            return reduce(add, map(evaluate, calls))
        found = iter(in_threads(evaluate, calls))
        return reduce(
            add,
            (reduce(add, (next(found) for _ in slices(part))) for part in factors.evaluated),
        )


def slices(part: OneLevel | Bucket) -> list[slice]:
    """Groups or clusters that one task evaluates."""
    step = TASK_CHUNKS * part.step if isinstance(part, Bucket) else SLICE
    n = part.n_groups
    return [slice(start, min(start + step, n)) for start in range(0, max(n, 1), step)]


def _slice_terms(
    blocks: Blocks, root: Floats, order: int, call: tuple[OneLevel | Bucket, slice]
) -> ProfileTerms:
    part, groups = call
    return profile_terms(blocks, part, root, order, groups)


def part_terms(blocks: Blocks, root: Floats, order: int, part: OneLevel) -> ProfileTerms:
    """Terms of a whole part, summed as an `Evaluator` does."""
    evaluate = partial(_slice_terms, blocks, root, order)
    return reduce(add, (evaluate((part, groups)) for groups in slices(part)))


# --------------------------------------------------------------- moments that stay on workers


@dataclass(frozen=True, eq=False)
class RemoteMoments:
    """Moments in shards on the workers of a cluster, which hold them as long as this is held.

    They are results of pure tasks: a worker that is lost costs the time to make its shards again.

    Attributes
    ----------
    summary
        what is known of all cells together
    futures
        of the `Moments` of each shard
    """

    summary: Summary
    futures: tuple[Any, ...]
    client: Any

    @property
    def spec(self) -> DesignSpec:
        """What was evaluated on the rows."""
        return self.summary.spec

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows dropped, by reason."""
        return self.summary.dropped

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.summary.totals.nobs

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.summary.totals.n_groups

    def each(self, function: Callable[..., Any], *others: Sequence[Any], **options: Any) -> Any:
        """Futures of ``function(moments, *other, **options)`` of every shard."""
        return self.client.map(
            function, self.futures, *others, pure=False, retries=RETRIES, **options
        )

    def __reduce__(self) -> Any:
        raise NotSupportedError(
            "moments on the workers of a cluster cannot be pickled: fit with "
            'evaluate_on="driver", or write what you need (`ranef_table(out=...)`, `to_dict()`)'
        )


@dataclass(frozen=True, eq=False)
class RemoteFactors:
    """Factors of shards on the workers; evaluations travel there, `ProfileTerms` come back."""

    futures: tuple[Any, ...]
    client: Any

    def terms(self, blocks: Blocks, root: Floats, order: int) -> ProfileTerms:
        """Terms of all groups, added shard by shard in order.

        Each thread of a worker gets one task for the shards that are there.
        """
        runs = _by_thread(self.client, self.futures)
        tasks = [
            self.client.submit(
                *(_shards_terms, blocks, root, order, [self.futures[i] for i in run]),
                key=_key("dmixed-evaluate"),
                pure=False,
                retries=RETRIES,
            )
            for run in runs
        ]
        found: dict[int, ProfileTerms] = {}
        for run, terms in zip(runs, gather(self.client, tasks), strict=True):
            found.update(zip(run, terms, strict=True))
        return reduce(add, (found[i] for i in range(len(self.futures))))


@one_blas_thread
def _shards_terms(
    blocks: Blocks, root: Floats, order: int, shards: Sequence[Shard]
) -> list[ProfileTerms]:
    return [part_terms(blocks, root, order, shard.evaluated) for shard in shards]


def _by_thread(client: Any, futures: Sequence[Any]) -> list[list[int]]:
    """Positions of futures by the worker that has them, one list for each of its threads."""
    holders, threads = client.who_has(list(futures)), client.nthreads()
    place: dict[str, list[int]] = {}
    for i, future in enumerate(futures):
        place.setdefault(next(iter(holders.get(future.key, ())), ""), []).append(i)
    runs = []
    for worker, own in place.items():
        n = max(1, min(threads.get(worker, 1), len(own)))
        runs += [own[j::n] for j in range(n)]
    return runs


def remote_shards(moments: RemoteMoments, model: Coordinates) -> tuple[Any, list[ShardFacts]]:
    """Futures of the factors of every shard, and what is to be known of them here."""
    futures = moments.each(_factored, model=model)
    facts = gather(moments.client, moments.client.map(_facts, futures, pure=False))
    return tuple(futures), facts


@one_blas_thread
def _factored(moments: Moments, model: Coordinates) -> Shard:
    return one_level(moments.group, model)


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What is known of a shard's factors: what its groups explain, and bytes to evaluate."""

    within: Within
    nbytes: int


def _facts(shard: Shard) -> ShardFacts:
    return ShardFacts(shard.within, shard.evaluated.RT.nbytes)


def _evaluated(shard: Shard) -> OneLevel:
    return shard.evaluated


def evaluated_here(client: Any, futures: Sequence[Any]) -> tuple[OneLevel, ...]:
    """What is evaluated of some shards, brought to this process."""
    return tuple(gather(client, client.map(_evaluated, list(futures), pure=False)))
