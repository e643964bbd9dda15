"""Parquet files and Arrow Datasets: planned from footers, read by row groups, only what is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import and_
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from dmixed.errors import DataError
from dmixed.sources.base import Part, check_columns, join_types, rows_per_part
from dmixed.sources.files import FileSet, find_files, redact
from dmixed.sources.memory import MemorySource

Piece: TypeAlias = tuple[str, ds.Fragment, int | None]

THREADS = 16  # footers read at a time
FILES = 64  # files of a part at most
ONE_BATCH = 2**30  # rows; a row group is decoded into one array, which numpy can then share


@dataclass(frozen=True, slots=True)
class File:
    """One file, of which the footer has been read.

    Attributes
    ----------
    name
        for messages
    fragment
        what Arrow reads it with
    schema
        names and types of its columns, those of its folders included
    groups
        rows of each row group, or None if the format has none
    """

    name: str
    fragment: ds.Fragment
    schema: pa.Schema
    groups: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Read:
    """Task of a part: (name for messages, fragment) of each file, and the types to read as."""

    fragments: tuple[tuple[str, ds.Fragment], ...]
    schema: pa.Schema

    def __call__(self) -> pa.Table:
        """Read the rows."""
        return pa.concat_tables([_read(name, f, self.schema) for name, f in self.fragments])


@dataclass(frozen=True)
class FileSource:
    """Files in a folder of any storage, or those of an Arrow Dataset.

    Attributes
    ----------
    kind
        see `Source`
    fragments
        (name for messages, fragment) of each file, in order
    declared
        names and types that an Arrow Dataset declares; None where the first file's count
    """

    kind: str
    fragments: tuple[tuple[str, ds.Fragment], ...]
    declared: pa.Schema | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, the first file's."""
        return tuple(self._schemas[0][1].names)

    @cached_property
    def files(self) -> tuple[File, ...]:
        """Footers of all files."""
        with ThreadPoolExecutor(THREADS) as pool:
            return tuple(pool.map(lambda f: _open(f[0], f[1], self.declared), self.fragments))

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """First rows, of as many row groups as it takes."""
        schema = self._schema(columns)
        tables = [schema.empty_table()]
        for name, fragment, _ in (piece for some in _batches(self.files, 1) for piece in some):
            missing = rows - sum(map(len, tables))
            if missing <= 0:
                break
            tables.append(_read(name, fragment, schema, missing))
        return pa.concat_tables(tables)

    def parts(self, columns: Sequence[str]) -> list[Part]:
        """Row groups of one file together, small files together."""
        schema = self._schema(columns)
        parts = []
        for some in _batches(self.files, rows_per_part(len(schema))):
            counts = [rows for _, _, rows in some if rows is not None]
            parts.append(
                Part(
                    some[0][0] if len(some) == 1 else f"{some[0][0]} to {some[-1][0]}",
                    sum(counts) if len(counts) == len(some) else None,
                    Read(tuple((name, fragment) for name, fragment, _ in some), schema),
                    tuple(schema.names),
                )
            )
        return parts

    def index(self) -> pd.Index | None:
        """Return None: files have no row labels."""
        return None

    @property
    def _schemas(self) -> list[tuple[str, pa.Schema]]:
        """Names and types in each file, after those declared."""
        declared = [] if self.declared is None else [("the dataset's schema", self.declared)]
        return declared + [(file.name, file.schema) for file in self.files]

    def _schema(self, columns: Sequence[str]) -> pa.Schema:
        """Types to read the columns as, after each file has been looked at.

        Types are compatible between files, and joined, where a value means the same in both:
        integers of different widths (read as int64), floats of different widths (float64), texts
        however stored, categories included (text), dates (date32), timestamps of one zone (finest
        unit), and a column of nulls only with any other. All others must be equal.
        """
        schemas = self._schemas
        names = check_columns(columns, schemas[0][1].names)
        return pa.schema([(name, _common_type(name, schemas)) for name in names])


def path_source(location: str, storage_options: Mapping[str, Any] | None = None) -> FileSource:
    """Source from a path, pattern or URI of Parquet files."""
    files = find_files(location, storage_options)
    parquet = ds.ParquetFileFormat()
    names = [redact(files.prefix + path) for path in files.paths]
    first = _open(names[0], parquet.make_fragment(files.paths[0], files.filesystem))
    keys = [key for key in files.folders[0] if key not in first.schema.names]
    fragments = [
        parquet.make_fragment(path, files.filesystem, expression)
        for path, expression in zip(files.paths, _expressions(files, keys), strict=True)
    ]
    return FileSource("parquet", tuple(zip(names, fragments, strict=True)))


def dataset_source(data: ds.Dataset) -> FileSource | MemorySource:
    """Source from an Arrow Dataset, without reading it if it is one of files."""
    try:
        fragments = list(data.get_fragments())
    except ValueError as error:
        raise DataError(
            f"this Dataset cannot be read in parts: {error} "
            "Pass its `to_table(columns=[...])`, or a Dataset without filter"
        ) from error
    if fragments and all(isinstance(f, ds.FileFragment) for f in fragments):
        return FileSource("arrow", tuple((f.path, f) for f in fragments), data.schema)
    return MemorySource("arrow", tuple(data.schema.names), partial(_dataset_table, data))


def _dataset_table(data: ds.Dataset, columns: Sequence[str]) -> pa.Table:
    """Columns of a Dataset that is not one of files."""
    return data.to_table(columns=list(columns))


def _open(name: str, fragment: ds.Fragment, declared: pa.Schema | None = None) -> File:
    """Read a footer."""
    if not isinstance(fragment, ds.ParquetFileFragment):
        return File(name, fragment, declared, None)
    try:
        fragment.ensure_complete_metadata()
        schema = fragment.physical_schema
    except Exception as error:
        raise _unreadable(name, error) from None
    for key, value in ds.get_partition_keys(fragment.partition_expression).items():
        if key not in schema.names:
            schema = schema.append(pa.field(key, pa.scalar(value).type))
    return File(name, fragment, schema, tuple(group.num_rows for group in fragment.row_groups))


def _read(name: str, fragment: ds.Fragment, schema: pa.Schema, rows: int | None = None) -> pa.Table:
    """Rows of a file or of its row groups, the first ones if `rows` is given."""
    try:
        scanner = ds.Scanner.from_fragment(
            fragment, schema=schema, columns=schema.names, batch_size=rows or ONE_BATCH
        )
        return scanner.to_table() if rows is None else scanner.head(rows)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    """Error for a file; storages raise errors of their own, which may not even pickle."""
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    reason = re.sub(r"Could not open Parquet input source '.*?': ", "", lines[0])
    return DataError(f"{name} cannot be read: {reason}")


def _batches(files: Sequence[File], limit: int) -> Iterator[list[Piece]]:
    """Consecutive row groups of together at most `limit` rows, files by files; at least one."""
    batch: list[tuple[File, list[int]]] = []
    total = 0
    for file in files:
        for i, rows in enumerate(file.groups or (limit,)):
            if batch and rows and (total + rows > limit or len(batch) == FILES):
                yield [_piece(*some) for some in batch]
                batch, total = [], 0
            if not batch or batch[-1][0] is not file:
                batch.append((file, []))
            batch[-1][1].append(i)
            total += rows
    yield [_piece(*some) for some in batch]


def _piece(file: File, groups: list[int]) -> Piece:
    """Some row groups of a file: name, fragment, rows."""
    if file.groups is None:
        return file.name, file.fragment, None
    if len(groups) == len(file.groups) or not file.groups:
        return file.name, file.fragment, sum(file.groups)
    a, b = groups[0], groups[-1]
    name = f"{file.name} row group{f's {a}-{b}' if a < b else f' {a}'}"
    return name, file.fragment.subset(row_group_ids=groups), sum(file.groups[i] for i in groups)


def _expressions(files: FileSet, keys: Sequence[str]) -> list[ds.Expression | None]:
    """Values of the folders of each file, whole numbers where all values of a key are."""
    whole = {key: all(_is_integer(values.get(key)) for values in files.folders) for key in keys}

    def equation(key: str, value: str | None) -> ds.Expression:
        if value is None:
            return ds.field(key).is_null()
        return ds.field(key) == pa.scalar(int(value) if whole[key] else value)

    return [
        reduce(and_, [equation(key, values[key]) for key in keys if key in values])
        if any(key in values for key in keys)
        else None
        for values in files.folders
    ]


def _is_integer(value: str | None) -> bool:
    """Whether a folder's value is null or an integer of 64 bits."""
    return value is None or (re.fullmatch(r"-?\d{1,18}", value) is not None)


def _common_type(name: str, schemas: Sequence[tuple[str, pa.Schema]]) -> pa.DataType:
    """Type to read one column as."""
    first, schema = schemas[0]
    common, since = schema.field(name).type, first
    for file, schema in schemas[1:]:
        count = schema.names.count(name)
        if count != 1:
            what = "has no column" if count == 0 else "has more than one column"
            raise DataError(f"{file} {what} {name!r}, which {first} has")
        kind = schema.field(name).type
        joined = join_types(common, kind)
        if joined is None:
            raise DataError(
                f"column {name!r} has type {kind} in {file}, but {common} in {since}; "
                "write the files with one type"
            )
        if joined != common:
            common, since = joined, file
    return common
