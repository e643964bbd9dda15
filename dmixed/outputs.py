"""Where the numbers of rows go: to the caller, to a lazy Dask DataFrame, or to Parquet files.

Tasks compute them part by part. What they share, a `Job` and a `Lookup`, are two nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
from dask.delayed import Delayed, delayed

from dmixed.dispatch import compute
from dmixed.errors import DataError
from dmixed.formula.expressions import columns_of
from dmixed.lookup import Lookup
from dmixed.places import File, Place, new_place, part_name
from dmixed.predictor import Predicted, Predictor, Strange
from dmixed.sources import Part, Source, load
from dmixed.sources.daskframe import DaskSource
from dmixed.sources.memory import MemorySource

T = TypeVar("T")

SENT_AHEAD = 2**20
"""Bytes of a lookup from which it is sent to a cluster at once, past the scheduler."""

ADDED = 8
"""Summaries that one task adds."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is made of each part of a source, beside the lookup.

    Attributes
    ----------
    predictor
        the numbers
    carried
        data columns that go along
    names
        of the numbers
    types
        Arrow types of columns carried, for parts where they have no value
    used_only
        leave out rows that a fit would not use
    place
        where files go, or None
    """

    predictor: Predictor
    carried: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    types: Mapping[str, pa.DataType] | None = None
    used_only: bool = False
    place: Place | None = None

    def __post_init__(self) -> None:
        assert not self.names or len(self.names) == len(self.predictor.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """Data columns that are read."""
        return tuple(dict.fromkeys([*self.carried, *self.predictor.columns]))

    def table(self, rows: pa.Table, found: Predicted) -> pa.Table:
        """Rows of a part with their numbers; a column has one type in all parts."""
        columns = [_typed(rows.column(x), (self.types or {}).get(x)) for x in self.carried]
        columns += [pa.array(x) for x in found.values.T]
        table = pa.table(columns, [*self.carried, *(self.names or self.predictor.names)])
        return table.filter(pa.array(found.used)) if self.used_only else table


def make_job(
    predictor: Predictor,
    source: Source,
    carried: Sequence[str],
    response: str | None,
    known: Mapping[str, pa.DataType],
    used_only: bool = False,
) -> Job:
    """Job that carries columns of a source along.

    Parameters
    ----------
    response
        name for the first number of a predictor with ``augment``
    known
        types of the key columns, where the data do not tell

    Raises
    ------
    DataError
        a column has the name of a result
    """
    names = predictor.names if response is None else (response, *predictor.names[1:])
    carried = tuple(dict.fromkeys(x for x in carried if x != response))
    for name in names:
        if name in carried or names.count(name) > 1:
            raise DataError(f"the column {name!r} of the data has the name of a result: rename it")
    return Job(predictor, carried, names, {**known, **_declared(source, carried)}, used_only)


def _declared(source: Source, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """Types of columns as the data declare them, without reading any row."""
    if isinstance(source, DaskSource):
        meta = source.data._meta[list(columns)]
        schema = pa.Schema.from_pandas(meta, preserve_index=False)
    elif isinstance(source, MemorySource):
        return {}
    else:
        schema = source.head(columns, 0).schema
    return {field.name: field.type for field in schema if not pa.types.is_null(field.type)}


def _typed(column: pa.ChunkedArray, kind: pa.DataType | None) -> pa.ChunkedArray:
    """A column without dictionary, of a declared type where it has no value."""
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(kind) if pa.types.is_null(column.type) and kind is not None else column


# --------------------------------------------------------------------------- tasks


class _Alive:
    """Keeps a future on the cluster for as long as something that will be computed holds this.

    Of a future in a graph Dask keeps no more than the key. It does not travel.
    """

    def __init__(self, future: Any = None) -> None:
        self.future = future

    def __reduce__(self) -> tuple[Any, ...]:
        return _Alive, ()

    def __dask_tokenize__(self) -> str:
        return str(getattr(self.future, "key", None))


def _node(value: Any, client: Any = None) -> tuple[Any, _Alive]:
    """A value as one node of a graph; a large one is sent to the client's cluster at once."""
    if value is None:
        return None, _Alive()
    key, future = f"dmixed-shared-{uuid4().hex}", None
    if hasattr(value, "client") and hasattr(value, "status"):  # a future already
        return delayed(value, name=key, pure=False, traverse=False), _Alive(value)
    if client is not None and getattr(value, "nbytes", 0) > SENT_AHEAD:
        value = future = client.scatter([value], hash=False)[0]
    return delayed(value, name=key, pure=False, traverse=False), _Alive(future)


def _tasks(
    function: Callable[[Job, Lookup | None, Part, Any, int], T],
    job: Job,
    lookup: Lookup | None,
    parts: Sequence[Part],
    client: Any,
) -> list[Delayed]:
    """Delayed ``function(job, lookup, part, value, number)`` of every part, in order."""
    (same, _), (shared, alive), found = _node(job), _node(lookup, client), []
    for number, part in enumerate(parts):
        frame = part.task if isinstance(part.task, Delayed) else None
        bare = part if frame is None else replace(part, task=None)
        call = partial(_called, function, alive, bare, number)
        task = delayed(call, pure=False, traverse=False)
        found.append(task(same, shared, frame, dask_key_name=f"dmixed-rows-{uuid4().hex}"))
    return found


def _called(
    function: Callable[[Job, Lookup | None, Part, Any, int], T],
    alive: _Alive,
    part: Part,
    number: int,
    job: Job,
    lookup: Lookup | None,
    value: Any,
) -> T:
    del alive
    return function(job, lookup, part, value, number)


def _predicted(job: Job, lookup: Lookup | None, part: Part, value: Any, number: int) -> Predicted:
    del number
    return job.predictor(lookup, load(part, value), part.name)


def _read(job: Job, source: Source) -> tuple[str, ...]:
    """Data columns to read; one where none is needed, since rows without columns have no number."""
    return job.columns or tuple(source.columns[:1])


def _all(job: Job, lookup: Lookup | None, parts: Sequence[Part], client: Any) -> list[Predicted]:
    found = compute(_tasks(_predicted, job, lookup, parts, client), client)
    if job.predictor.new_groups == "error":
        sum((part.strange for part in found), Strange()).refuse()
    return found


# --------------------------------------------------------------------------- to the caller


def collected(
    job: Job, lookup: Lookup | None, source: Source, client: Any = None
) -> tuple[pd.DataFrame, Any]:
    """Numbers of the rows of a source in this process, and whether a fit uses each row.

    Raises
    ------
    DataError
        with ``new_groups="error"``: the first group that is not known, and how many rows
    """
    found = _all(job, lookup, source.parts(_read(job, source)), client)
    values = np.concatenate([part.values for part in found])
    index = source.index()
    names = list(job.names or job.predictor.names)
    table = pd.DataFrame(values, None if index is None else index.copy(), names)
    return table, np.concatenate([part.used for part in found])


def with_columns(
    job: Job, lookup: Lookup | None, source: Source, client: Any = None
) -> pd.DataFrame:
    """Rows of a source in memory with their numbers."""
    parts = source.parts(_read(job, source))
    found = _all(job, lookup, parts, client)
    whole = replace(job, used_only=False)
    tables = [whole.table(load(x), y) for x, y in zip(parts, found, strict=True)]
    table = pa.concat_tables(tables).to_pandas()
    index = source.index()
    table.index = pd.RangeIndex(len(table)) if index is None else index.copy()
    return table[np.concatenate([part.used for part in found])] if job.used_only else table


def summed(
    job: Job,
    lookup: Lookup | None,
    source: Source,
    summary: Callable[[Predicted, pa.Table, str], T],
    client: Any = None,
) -> T:
    """Sum over the parts of ``summary(numbers, rows, name)``, which adds; rows stay where they are.

    The tasks that read make the summaries, and others add them, `ADDED` at a time.
    """
    parts = source.parts(_read(job, source))
    tasks = _tasks(partial(_summary, summary), job, lookup, parts, client)
    while len(tasks) > 1:
        tasks = [
            delayed(_sum, pure=False)(tasks[i : i + ADDED]) for i in range(0, len(tasks), ADDED)
        ]
    found: T = compute(tasks, client)[0]
    return found


def _summary(
    summary: Callable[[Predicted, pa.Table, str], T],
    job: Job,
    lookup: Lookup | None,
    part: Part,
    value: Any,
    number: int,
) -> T:
    del number
    rows = load(part, value)
    return summary(job.predictor(lookup, rows, part.name), rows, part.name)


def _sum(found: Sequence[Any]) -> Any:
    return reduce(add, found)


# --------------------------------------------------------------------------- to Dask


def lazy(job: Job, lookup: Lookup | None, source: Source, client: Any = None) -> Any:
    """Dask DataFrame of the columns carried and the numbers; nothing is computed.

    That of a Dask DataFrame has its partitions, divisions and index; that of files has a
    partition for every part, and numbers the rows.
    """
    made = _of_dask if isinstance(source, DaskSource) else _of_files
    return made(job, lookup, source, client)


def _of_dask(job: Job, lookup: Lookup | None, source: Any, client: Any) -> Any:
    columns = _read(job, source)
    frame = source.selected(columns)
    numbers = {x: str(d) for x, d in frame.dtypes.items() if d.kind in "biuf"}
    part = Part("", None, None, columns, numbers)
    meta = frame._meta[list(job.carried)].copy()
    for name in job.names or job.predictor.names:
        meta[name] = np.empty(0)
    from dask.dataframe.dask_expr._expr import _DelayedExpr

    (same, _), (shared, alive) = _node(job), _node(lookup, client)
    # older releases of Dask do not do this themselves
    nodes = [None if node is None else _DelayedExpr(node) for node in (shared, same)]
    return frame.map_partitions(_partition, *nodes, part, alive, meta=meta, enforce_metadata=False)


def _partition(
    frame: pd.DataFrame,
    lookup: Lookup | None,
    job: Job,
    part: Part,
    alive: _Alive,
    partition_info: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """A partition's columns carried, as they are, and its numbers."""
    del alive
    number = partition_info.get("number") if partition_info else None
    part = replace(part, name="a partition" if number is None else f"partition {number}")
    found = job.predictor(lookup, load(part, frame), part.name)
    if job.predictor.new_groups == "error":
        found.strange.refuse()
    out = frame[list(job.carried)].copy()
    for name, values in zip(job.names or job.predictor.names, found.values.T, strict=True):
        out[name] = values
    return out[found.used] if job.used_only else out


def _of_files(job: Job, lookup: Lookup | None, source: Source, client: Any) -> Any:
    import dask.dataframe as dd  # seconds to import, and this is the only use

    parts = source.parts(_read(job, source))
    counts = [part.rows or 0 for part in parts]
    starts = np.cumsum([0, *counts]).tolist()
    known = min(counts) > 0
    none = Predicted(np.empty((0, len(job.names))), np.empty(0, np.bool_), Strange())
    meta = job.table(source.head(_read(job, source), 0), none).to_pandas()
    meta.index = pd.RangeIndex(0)
    tasks = _tasks(partial(_frame, starts if known else None), job, lookup, parts, client)
    divisions = (*starts[:-1], starts[-1] - 1) if known else None
    return dd.from_delayed(tasks, meta=meta, divisions=divisions, verify_meta=False)


def _frame(
    starts: Sequence[int] | None,
    job: Job,
    lookup: Lookup | None,
    part: Part,
    value: Any,
    number: int,
) -> pd.DataFrame:
    rows = load(part, value)
    found = job.predictor(lookup, rows, part.name)
    if job.predictor.new_groups == "error":
        found.strange.refuse()
    frame = replace(job, used_only=False).table(rows, found).to_pandas()
    if starts is not None:
        frame.index = pd.RangeIndex(starts[number], starts[number] + len(frame))
    return frame[found.used] if job.used_only else frame


# --------------------------------------------------------------------------- to files


def written(
    job: Job,
    lookup: Lookup | None,
    source: Source,
    out: Any,
    storage_options: Mapping[str, Any] | None,
    client: Any = None,
) -> str:
    """Write a Parquet file per part, by its task, and a manifest at the end; the path.

    Raises
    ------
    DataError
        there is something at ``out``, or it cannot be written; or as `collected`
    """
    spec = job.predictor.design.spec
    parts = source.parts(_read(job, source))
    with new_place(out, storage_options) as place:
        tasks = _tasks(_write, replace(job, place=place), lookup, parts, client)
        found = compute(tasks, client)
        if job.predictor.new_groups == "error":
            sum((strange for _, strange, _ in found), Strange()).refuse()
        columns = found[0][2]
        for part, (_, _, types) in zip(parts, found, strict=True):
            for name, kind in types.items():
                if kind != columns[name]:
                    raise DataError(
                        f"{part.name}: column {name!r} has type {kind}, but {columns[name]} in "
                        f"{parts[0].name}; give it one type everywhere"
                    )
        place.finish([file for file, _, _ in found], columns, spec.formula.text)
    return place.location


def _write(
    job: Job, lookup: Lookup | None, part: Part, value: Any, number: int
) -> tuple[File, Strange, dict[str, str]]:
    rows = load(part, value)
    found = job.predictor(lookup, rows, part.name)
    table = job.table(rows, found)
    assert job.place is not None
    types = {field.name: str(field.type) for field in table.schema}
    return job.place.write(part_name(number), table), found.strange, types


def key_columns(predictor: Predictor, available: Sequence[object]) -> list[str]:
    """Data columns of a model's keys, those given for them or else those there are."""
    spec = predictor.design.spec
    groups = predictor.groups or (None,) * len(spec.keys)
    names: list[str] = []
    for key, column in zip(spec.keys, groups, strict=True):
        names += [column] if column is not None else columns_of(key.node)
    return [x for x in dict.fromkeys(names) if x in available]
