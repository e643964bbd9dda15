"""What a source of rows is, whatever it is made of: names, a pilot, and parts to be read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import pyarrow as pa

from dmixed.errors import DataError

ROWS = 2**20  # rows of a part at most, unless a single Parquet row group has more
CELLS = 2**25  # rows times columns of a part at most: 256 MB of float64


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the rows, not read yet.

    Attributes
    ----------
    name
        for messages: "rows 0-999", "partition 3", "s3://bucket/f.parquet row groups 0-3"
    rows
        number of rows, or None where only reading would tell
    task
        a zero-argument callable that returns a pyarrow Table, or for a Dask partition a pandas
        frame, and pickles small; or the Dask Delayed of a pandas partition
    columns
        the columns it reads
    numbers
        for a Dask partition, the declared types of its columns of numbers and booleans
    nbytes
        compressed bytes of the columns it reads, None where no metadata tells
    ranges
        (smallest, largest) value of columns whose statistics were asked for: bounds that no value
        is outside of, not always attained; nulls do not count. Whole numbers, dates, timestamps
        and text only, where metadata tell it of all rows
    """

    name: str
    rows: int | None
    task: Any
    columns: tuple[str, ...]
    numbers: Mapping[str, str] = field(default_factory=dict)
    nbytes: int | None = None
    ranges: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one state of a file from another.

    Attributes
    ----------
    name
        path or URI, as messages show it
    size
        bytes, or None where the storage does not say
    stamp
        its etag or time of modification, or "" where the storage does not say
    rows
        number of rows, or None where only reading would tell
    """

    name: str
    size: int | None
    stamp: str
    rows: int | None


class Source(Protocol):
    """Rows in any form, of which only the columns asked for are ever read."""

    @property
    def kind(self) -> str:
        """One of "pandas", "polars", "arrow", "dask", "parquet", "delta", "iceberg"."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order; a name that occurs twice is listed twice."""

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """At most `rows` rows to learn types and sizes from.

        The first rows, past empty parts; in memory an evenly strided sample.
        """

    def parts(self, columns: Sequence[str], statistics: Collection[str] = ()) -> list[Part]:
        """All rows as parts, at least one, planned without reading any row.

        `Part.ranges` are looked up for the columns in `statistics`, which are some of `columns`.
        """

    def index(self) -> pd.Index | None:
        """Row labels, if the data is a pandas DataFrame."""

    def probe(self, columns: Sequence[str]) -> Callable[[], str | None]:
        """What a worker calls before a pass, small when pickled.

        It returns None if the first file can be opened there, else one line that says why not;
        for data that travels to the workers it returns None.
        """

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """One for each file that holds rows; none for data in memory or on a cluster."""

    @property
    def snapshot(self) -> str | None:
        """State of a table that has several, such as "delta version 3"."""


@runtime_checkable
class FilesSource(Source, Protocol):
    """Rows in files that are listed without opening them."""

    @property
    def location(self) -> str:
        """Path or URI of the data, without credentials; "" without one."""

    def listed(self) -> dict[str, tuple[int | None, str]]:
        """Size and stamp of each file, see `Fingerprint`, by name."""

    def only(self, names: Collection[str]) -> FilesSource:
        """The same with some of the files, at least one."""


def always_there() -> str | None:
    """Probe of data that travels to the workers."""
    return None


def check_columns(columns: Collection[str], available: Sequence[object]) -> tuple[str, ...]:
    """Columns asked for, each once; refuses those that are absent or ambiguous."""
    for name in columns:
        if name not in available:
            shown = ", ".join(str(x) for x in list(available)[:20])
            more = ", ..." if len(available) > 20 else ""
            raise DataError(f"column {name!r} is not in the data, which has: {shown}{more}")
        if available.count(name) > 1:
            raise DataError(f"column {name!r} occurs {available.count(name)} times; rename one")
    return tuple(dict.fromkeys(columns))


def rows_per_part(n_columns: int) -> int:
    """Rows of a part at most, for so many columns."""
    return max(1, min(ROWS, CELLS // max(n_columns, 1)))


def gathered(tables: Iterable[pa.Table], limit: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most `limit` rows, each column in one piece of memory.

    Small tables are joined and large ones cut; without rows there is one empty table.

    Parameters
    ----------
    tables
        at least one, all of one schema
    """
    held: list[pa.Table] = []
    rows, empty, found = 0, None, False
    for table in tables:
        empty = table
        for start in range(0, len(table), limit):
            some = table.slice(start, limit)
            if rows + len(some) > limit:
                yield _joined(held)
                held, rows, found = [], 0, True
            held.append(some)
            rows += len(some)
    if held:
        yield _joined(held)
    elif not found and empty is not None:
        yield empty.slice(0, 0)


def concatenated(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    """All rows of tables of a schema; empty ones leave no trace in the chunks of the columns."""
    filled = [table for table in tables if len(table)]
    return pa.concat_tables(filled) if filled else schema.empty_table()


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One table, of one array for each column; nothing is copied where there is one already."""
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables)
    if all(column.num_chunks == 1 for column in table.columns):
        return table
    return table.combine_chunks()


def join_types(a: pa.DataType, b: pa.DataType, numbers: bool = False) -> pa.DataType | None:
    """Type that holds the values of both, None if they differ in meaning.

    With `numbers`, any two types of numbers go together; as float64, which rounds.
    """
    t = pa.types
    if a == b or t.is_null(b):
        return a
    if t.is_null(a):
        return b
    for same, joined in (
        (t.is_integer, pa.int64()),
        (t.is_floating, pa.float64()),
        (is_text, pa.large_string()),
        (t.is_date, pa.date32()),
    ):
        if same(a) and same(b):
            return joined
    if numbers and _is_number(a) and _is_number(b):
        return pa.float64()
    if numbers and t.is_dictionary(a) and t.is_dictionary(b):
        values = join_types(a.value_type, b.value_type, numbers)
        return None if values is None else pa.dictionary(pa.int32(), values, a.ordered)
    if t.is_timestamp(a) and t.is_timestamp(b) and a.tz == b.tz:
        return max(a, b, key=lambda x: ("s", "ms", "us", "ns").index(x.unit))
    return None


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, or categories of text."""
    t = pa.types
    if t.is_dictionary(kind):
        kind = kind.value_type
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    """Whether a type is one of numbers."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )
