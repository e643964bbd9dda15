"""Data in memory: pandas and polars frames, Arrow tables, and whatever exports an Arrow stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dmixed.errors import DataError
from dmixed.sources.base import Fingerprint, Part, always_there, check_columns, rows_per_part
from dmixed.sources.frames import arrow_from_pandas, arrow_from_polars


@dataclass(frozen=True, slots=True)
class MemorySource:
    """A table in memory, converted to Arrow once and cut into slices.

    Attributes
    ----------
    kind, columns
        see `Source`
    convert
        columns asked for -> Arrow Table
    labels
        row labels, or None
    """

    kind: str
    columns: tuple[str, ...]
    convert: Callable[[Sequence[str]], pa.Table]
    labels: pd.Index | None = None
    _converted: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False)

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """Evenly strided sample."""
        table = self._table(columns)
        stride = -(-len(table) // max(rows, 1))
        rows_taken = pa.array(np.arange(0, len(table), max(stride, 1)))
        return pa.table({n: _take(table.column(n), rows_taken, n) for n in table.column_names})

    def parts(self, columns: Sequence[str], statistics: Collection[str] = ()) -> list[Part]:
        """Slices; they share the memory of the whole."""
        del statistics
        table = self._table(columns)
        step = rows_per_part(table.num_columns)
        slices = [table.slice(i, step) for i in range(0, max(len(table), 1), step)]
        return [
            Part(f"rows {i * step}-{i * step + len(s) - 1}", len(s), Slice(s), tuple(columns))
            for i, s in enumerate(slices)
        ]

    def index(self) -> pd.Index | None:
        """Row labels, if the data is a pandas DataFrame."""
        return self.labels

    def probe(self, columns: Sequence[str]) -> Callable[[], str | None]:
        """Return a function that returns None: the rows travel with the parts."""
        del columns
        return always_there

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """Return none: there are no files."""
        return ()

    @property
    def snapshot(self) -> str | None:
        """None."""
        return None

    def _table(self, columns: Sequence[str]) -> pa.Table:
        """Return the columns as Arrow; each is converted once and stays what it was then."""
        wanted = check_columns(columns, self.columns)
        missing = [name for name in wanted if name not in self._converted]
        if missing:
            table = _plain(self.convert(missing))
            self._converted.update({name: table.column(name) for name in missing})
        return pa.table({name: self._converted[name] for name in wanted})


@dataclass(frozen=True, slots=True)
class Slice:
    """Task of a part in memory."""

    table: pa.Table

    def __call__(self) -> pa.Table:
        """Return the rows."""
        return self.table

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a slice of an Arrow table sends all of the table; Arrow's own stream does not.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table)
        return _unpickle, (sink.getvalue(),)


def _unpickle(buffer: pa.Buffer) -> Slice:
    """Restore a slice from its stream."""
    return Slice(pa.ipc.open_stream(buffer).read_all())


def _plain(table: pa.Table) -> pa.Table:
    """Table whose columns are stored in the usual way: Arrow computes little with other ones."""
    for i, field_ in enumerate(table.schema):
        column = table.column(i)
        if pa.types.is_run_end_encoded(column.type):
            column = pa.chunked_array(
                [pc.run_end_decode(chunk) for chunk in column.chunks], column.type.value_type
            )
        if pa.types.is_string_view(column.type):
            column = _cast(column, pa.large_string(), field_.name)
        if column.type != field_.type:
            table = table.set_column(i, field_.name, column)
    return table


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    """Return the column in another type."""
    try:
        return column.cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise _unusable(name, column.type, error) from error


def _take(column: pa.ChunkedArray, rows: pa.Array, name: str) -> pa.ChunkedArray:
    """Some rows of a column."""
    try:
        return column.take(rows)
    except pa.ArrowNotImplementedError as error:
        raise _unusable(name, column.type, error) from error


def _unusable(name: str, kind: pa.DataType, error: Exception) -> DataError:
    """Error for a type that Arrow itself cannot handle."""
    return DataError(f"column {name!r} has type {kind}, which cannot be used: {error}")


def _copy_on_write() -> bool:
    """Whether changes of a pandas frame leave its shallow copies as they are."""
    return int(pd.__version__.split(".")[0]) >= 3 or pd.options.mode.copy_on_write is True


def _from_copied_pandas(frame: pd.DataFrame, columns: Sequence[str]) -> pa.Table:
    """Columns of a pandas DataFrame whose memory the user may change."""
    names = check_columns(columns, list(frame.columns))
    return arrow_from_pandas(frame[list(names)].copy(), names)


def pandas_source(data: pd.DataFrame) -> MemorySource:
    """Source from a pandas DataFrame, whose index is kept as row labels.

    Later changes of the frame do not reach the source.
    """
    # The Arrow columns look into the memory of this frame. Under copy-on-write, pandas moves the
    # user's frame elsewhere before it is changed, as long as this one lives.
    frame = data.copy(deep=False)
    convert = partial(arrow_from_pandas if _copy_on_write() else _from_copied_pandas, frame)
    return MemorySource("pandas", tuple(data.columns), convert, data.index)


def polars_source(data: Any) -> MemorySource:
    """Source from a polars DataFrame or LazyFrame, which is collected, its needed columns only."""
    lazy = hasattr(data, "collect_schema") and hasattr(data, "collect")
    names = data.collect_schema().names() if lazy else data.columns
    return MemorySource("polars", tuple(names), partial(arrow_from_polars, data.clone()))


def arrow_source(data: Any) -> MemorySource:
    """Source from an Arrow Table or RecordBatch, or an object that exports an Arrow stream."""
    try:
        table = data if isinstance(data, pa.Table) else pa.table(data)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"data of type {type(data).__name__} is not a table: {error}") from error
    return MemorySource("arrow", tuple(table.column_names), table.select)
