"""The only module that moves things between threads, processes and machines.

The pass is a graph of pure tasks: one task per part of the source makes its moments, and a tree
whose shape depends on the number of parts alone adds them, eight at a time; no row is shuffled,
and what arrives is one `Moments`. Evaluations walk fixed slices of groups in threads and add the
terms in order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar

import dask
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from threadpoolctl import threadpool_limits

from dmixed.blocks import Floats
from dmixed.collect import Moments, merge, part_moments
from dmixed.design import DesignSpec
from dmixed.errors import DmixedError
from dmixed.factors import Factors
from dmixed.likelihood import GROUPS, ProfileTerms, profile_terms
from dmixed.sources import Part, Source

T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("pass", "fit"), how much is done, and of how much (None: unknown)."""

SPLIT_EVERY = 8
"""States added by one task of the tree."""

RETRIES = 3
"""Times that a cluster repeats a task that failed for reasons of its own."""

SLICE = 16 * GROUPS
"""Groups evaluated by one task; set by the data, so that sums do not depend on the machine."""


def find_client(client: Any = None) -> Any:
    """The client to use: the one given, the current one, or None for threads in this process."""
    if client is None and "distributed" in sys.modules:
        from distributed import get_client

        with contextlib.suppress(ValueError):
            client = get_client()
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
    starts = _starts(parts)
    tasks = [
        _task(partial(part_moments, spec, part, row0), part, "dmixed-moments")
        for part, row0 in zip(parts, starts, strict=True)
    ]
    return compute(_tree(tasks), client, progress, len(tasks))


def each_part(
    function: Callable[[Part, Any], T], parts: Sequence[Part], client: Any = None
) -> list[T]:
    """``function(part, value)`` of every part, in order; ``value`` is Dask's frame if any."""
    tasks = [_task(partial(_swapped, function, part), part, "dmixed-rows") for part in parts]
    return list(compute(delayed(list)(tasks), client))


def _swapped(function: Callable[[Part, Any], T], part: Part, value: Any = None) -> T:
    return function(part, value)


def _starts(parts: Sequence[Part]) -> list[int]:
    """Number of the first row of each part; parts of unknown length count from their own start."""
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total = total + part.rows if part.rows is not None else 0
    return starts


def _task(function: Callable[..., T], part: Part, name: str) -> Delayed:
    """Delayed call of ``function()``, or of ``function(frame)`` where Dask makes the frame."""
    if isinstance(part.task, Delayed):
        without = Part(part.name, part.rows, None, part.columns)
        function = partial(function.func, *_replaced(function.args, part, without))  # type: ignore[attr-defined]
        return delayed(function, name=None, pure=False)(part.task, dask_key_name=_key(name))
    return delayed(function, pure=False)(dask_key_name=_key(name))


def _replaced(args: Iterable[Any], old: Part, new: Part) -> Iterator[Any]:
    """Arguments with a part's own graph taken out: it must not travel inside the task."""
    return (new if value is old else value for value in args)


def _key(name: str) -> str:
    from uuid import uuid4

    return f"{name}-{uuid4().hex}"


def _tree(tasks: list[Delayed]) -> Delayed:
    """Sum of all moments by a tree fixed by position."""
    add_up = delayed(_merge_all, pure=False)
    while len(tasks) > 1:
        tasks = [
            add_up(*tasks[i : i + SPLIT_EVERY], dask_key_name=_key("dmixed-merge"))
            for i in range(0, len(tasks), SPLIT_EVERY)
        ]
    return tasks[0]


def _merge_all(*parts: Moments) -> Moments:
    return merge(parts)


class _Counter(Callback):  # type: ignore[misc]
    """Tells how many parts of the pass are done, on Dask's local schedulers."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__()
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
    with watch, threadpool_limits(1):
        return task.compute(scheduler=scheduler)


class Evaluator:
    """`ProfileTerms` of all groups at a root of Psi, in threads of this process."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.slices = [
            slice(start, min(start + SLICE, factors.n_groups))
            for start in range(0, factors.n_groups, SLICE)
        ]

    def __call__(self, root: Floats, order: int = 2) -> ProfileTerms:
        """Terms up to derivatives of an order, added slice by slice in order."""
        one = partial(profile_terms, self.factors, root, order)
        if len(self.slices) == 1:
            return one(self.slices[0])
        tasks = [delayed(one, pure=False)(groups) for groups in self.slices]
        return reduce(add, dask.compute(*tasks, scheduler="threads"))
