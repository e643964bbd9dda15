"""Parquet files and Arrow Datasets: planned from footers, read by row groups, only what is used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from operator import and_
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from dmixed.errors import DataError
from dmixed.sources.base import (
    Fingerprint,
    Part,
    check_columns,
    concatenated,
    join_types,
    rows_per_part,
)
from dmixed.sources.files import FileSet, State
from dmixed.sources.filters import Filter
from dmixed.sources.footers import File, bounds, folder_values, n_bytes, open_file, selected
from dmixed.sources.memory import MemorySource
from dmixed.sources.reading import Opener, Piece, Place, Probe, Read, probe
from dmixed.sources.storages import redact

Groups: TypeAlias = tuple[File, list[int]]

THREADS = 16  # footers read at a time
FILES = 64  # files of a part at most


@dataclass(frozen=True)
class FileSource:
    """Files in a folder of any storage, those of an Arrow Dataset, or those of a table's snapshot.

    Attributes
    ----------
    kind
        see `Source`
    name
        what messages call all of it
    fragments
        (name for messages, fragment) of each file, in order
    declared
        names and types that a Dataset or table declares; None where the first file's count
    filter
        the rows that are wanted
    states
        size and stamp of each file, if they were listed
    snapshot
        see `Source`
    nullable
        whether files may lack columns, which are then of nulls
    location
        path or URI from which the files were found, without credentials
    """

    kind: str
    name: str
    fragments: tuple[tuple[str, ds.Fragment], ...]
    declared: pa.Schema | None = None
    filter: Filter | None = None
    states: tuple[State, ...] = ()
    snapshot: str | None = None
    nullable: bool = False
    location: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, the first file's."""
        return tuple(self._outline.names)

    @cached_property
    def files(self) -> tuple[File, ...]:
        """Footers of all files, but of those that their folders exclude."""
        given = [self.fragments[i] for i in self._kept]
        with ThreadPoolExecutor(THREADS) as pool:
            return tuple(pool.map(lambda f: open_file(f[0], f[1], self.declared), given))

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """First rows, of as many row groups as it takes."""
        schema = self._schema(columns)
        tables: list[pa.Table] = []
        for some in _batches(self._selected, 1):
            missing = rows - sum(map(len, tables))
            if missing <= 0:
                break
            tables.append(self._read(some, schema).first(missing))
        return concatenated(schema, tables)

    def parts(self, columns: Sequence[str], statistics: Collection[str] = ()) -> list[Part]:
        """Row groups of one file together, small files together."""
        schema = self._schema(columns)
        names = tuple(schema.names)
        asked = check_columns(statistics, names)
        parts = []
        for some in _batches(self._selected, rows_per_part(len(schema))):
            task = self._read(some, schema)
            first, last = task.pieces[0].name, task.pieces[-1].name
            counts = [piece.rows if piece.whole else None for piece in task.pieces]
            sizes = [n_bytes(file, groups, names) for file, groups in some]
            parts.append(
                Part(
                    first if len(some) == 1 else f"{first} to {last}",
                    _total(counts),
                    task,
                    names,
                    nbytes=_total(sizes),
                    ranges=bounds(some, asked, schema),
                )
            )
        return parts or [Part(self.name, 0, Read((), schema), names, nbytes=0)]

    def listed(self) -> dict[str, State]:
        """Size and stamp of each file whose folder is not excluded, by name; opens none."""
        return {
            self.fragments[i][0]: self.states[i] if self.states else _state(self.fragments[i][1])
            for i in self._kept
        }

    def only(self, names: Collection[str]) -> FileSource:
        """The same with some of the files."""
        chosen = [i for i, (name, _) in enumerate(self.fragments) if name in names]
        return replace(
            self,
            fragments=tuple(self.fragments[i] for i in chosen),
            states=tuple(self.states[i] for i in chosen) if self.states else (),
        )

    def index(self) -> pd.Index | None:
        """Return None: files have no row labels."""
        return None

    def probe(self, columns: Sequence[str]) -> Probe:
        """Probe of the first file to be read."""
        del columns
        if not self._kept:
            return probe(self.name, _nothing)
        name, fragment = self.fragments[self._kept[0]]
        return probe(name, Opener(Place.of(fragment)))

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """One for each file whose folder is not excluded."""
        found = []
        for i, file in zip(self._kept, self.files, strict=True):
            size, stamp = self.states[i] if self.states else _state(file.fragment)
            metadata = None if file.groups is None else file.fragment.metadata
            rows = None if metadata is None else metadata.num_rows
            found.append(Fingerprint(file.name, size, stamp, rows))
        return tuple(found)

    @cached_property
    def _outline(self) -> pa.Schema:
        """Names and types that are declared, or the first file's."""
        if self.declared is not None:
            return self.declared
        return open_file(*self.fragments[0]).schema

    @cached_property
    def filter_columns(self) -> tuple[str, ...]:
        """Columns that the filter needs.

        Raises
        ------
        DataError
            one is not there, or the filter cannot be applied to it
        """
        if self.filter is None:
            return ()
        names = self.filter.columns(self._outline)
        self.filter.check(pa.schema([self._outline.field(name) for name in names]))
        return names

    @cached_property
    def _kept(self) -> tuple[int, ...]:
        """Positions of the files whose folders are not excluded."""
        wanted = self.filter
        if wanted is None:
            return tuple(range(len(self.fragments)))
        types = pa.schema([self._outline.field(name) for name in self.filter_columns])
        return tuple(
            i
            for i, (_, fragment) in enumerate(self.fragments)
            if not wanted.excludes(folder_values(fragment), types)
        )

    @cached_property
    def _filtering(self) -> tuple[pc.Expression, pa.Schema] | None:
        """The filter and the types of its columns."""
        if self.filter is None:
            return None
        schema = self._schema(self.filter_columns)
        self.filter.check(schema)
        return self.filter.expression, schema

    @cached_property
    def _selected(self) -> tuple[File, ...]:
        """Files without the row groups that the filter excludes."""
        if self.filter is None or self._filtering is None:
            return self.files
        return tuple(selected(file, self.filter, self._filtering[1]) for file in self.files)

    def _read(self, some: Sequence[Groups], schema: pa.Schema) -> Read:
        """Task that reads some row groups of some files."""
        filtering = self._filtering
        pieces = tuple(
            _piece(file, groups, filtering is not None, self.nullable) for file, groups in some
        )
        if filtering is None or all(piece.whole for piece in pieces):
            return Read(pieces, schema)
        others = pa.schema([field for field in filtering[1] if field.name not in schema.names])
        return Read(pieces, schema, (filtering[0], others))

    @property
    def _schemas(self) -> list[tuple[str, pa.Schema]]:
        """Names and types in each file, after those declared."""
        declared = [] if self.declared is None else [("the dataset's schema", self.declared)]
        if self.nullable and declared:
            return declared
        found = declared + [(file.name, file.schema) for file in self.files]
        return found or [(self.name, self._outline)]

    def _schema(self, columns: Sequence[str]) -> pa.Schema:
        """Types to read the columns as, after each file has been looked at.

        Types are compatible between files, and joined, where a value means the same in both:
        integers of different widths (read as int64), floats of different widths (float64), texts
        however stored, categories included (text), dates (date32), timestamps of one zone (finest
        unit), and a column of nulls only with any other. All others must be equal. What a table
        declares that may lack columns prevails.
        """
        schemas = self._schemas
        names = check_columns(columns, schemas[0][1].names)
        return pa.schema([(name, _common_type(name, schemas)) for name in names])


def files_source(files: FileSet, wanted: Filter | None = None) -> FileSource:
    """Source from Parquet files that were found."""
    parquet = ds.ParquetFileFormat()
    names = [redact(files.prefix + path) for path in files.paths]
    first = open_file(names[0], parquet.make_fragment(files.paths[0], files.filesystem))
    keys = [key for key in files.folders[0] if key not in first.schema.names]
    fragments = [
        parquet.make_fragment(path, files.filesystem, expression)
        for path, expression in zip(files.paths, _expressions(files, keys), strict=True)
    ]
    found = tuple(zip(names, fragments, strict=True))
    return FileSource(
        "parquet", names[0], found, None, wanted, files.states, location=files.location
    )


def dataset_source(data: ds.Dataset, wanted: Filter | None = None) -> FileSource | MemorySource:
    """Source from an Arrow Dataset, without reading it if it is one of files."""
    try:
        fragments = list(data.get_fragments())
    except ValueError as error:
        raise DataError(
            f"this Dataset cannot be read in parts: {error} "
            "Pass its `to_table(columns=[...])`, or a Dataset without filter, and filters="
        ) from error
    if fragments and all(isinstance(f, ds.FileFragment) for f in fragments):
        found = tuple((f.path, f) for f in fragments)
        return FileSource("arrow", found[0][0], found, data.schema, wanted)
    if wanted is not None:
        raise DataError("filters go with files; filter this Dataset's rows with its `to_table`")
    return MemorySource("arrow", tuple(data.schema.names), partial(_dataset_table, data))


def _dataset_table(data: ds.Dataset, columns: Sequence[str]) -> pa.Table:
    """Columns of a Dataset that is not one of files."""
    return data.to_table(columns=list(columns))


def _nothing() -> None:
    """Opener of no file."""


def _state(fragment: ds.Fragment) -> State:
    """Size and time of modification of a file of a Dataset, where its storage tells."""
    try:
        info = fragment.filesystem.get_file_info(fragment.path)
    except Exception:  # a fingerprint without them is one still
        return None, ""
    return info.size, "" if info.mtime_ns is None else str(info.mtime_ns)


def _total(values: Sequence[int | None]) -> int | None:
    """Sum, None where one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _batches(files: Sequence[File], limit: int) -> Iterator[list[Groups]]:
    """Consecutive row groups of together at most `limit` rows, files by files; at least one."""
    batch: list[Groups] = []
    total = 0
    for file in files:
        for i, rows in ((0, limit),) if file.groups is None else file.groups:
            if batch and rows and (total + rows > limit or len(batch) == FILES):
                yield batch
                batch, total = [], 0
            if not batch or batch[-1][0] is not file:
                batch.append((file, []))
            batch[-1][1].append(i)
            total += rows
    if batch:
        yield batch


def _piece(file: File, groups: list[int], filtered: bool, nullable: bool) -> Piece:
    """Some row groups of a file."""
    place = Place.of(file.fragment)
    if file.groups is None:
        return Piece(file.name, place, None, None, not filtered)
    counts = dict(file.groups)
    rows = sum(counts[i] for i in groups)
    whole = not filtered or file.whole.issuperset(groups)
    if file.complete and len(groups) == len(counts):
        if file.fragment.metadata.num_row_groups != len(counts):  # a Dataset's own selection
            return Piece(file.name, place, tuple(groups), rows, whole, nullable)
        return Piece(file.name, place, None, rows, whole, nullable)
    a, b = groups[0], groups[-1]
    some = "" if b - a + 1 == len(groups) else f"{len(groups)} of "
    name = f"{file.name} {some}row group{f's {a}-{b}' if a < b else f' {a}'}"
    return Piece(name, place, tuple(groups), rows, whole, nullable)


def equations(values: Mapping[str, Any], schema: pa.Schema) -> ds.Expression | None:
    """What is true of a file all of whose rows have these values; None if there are none."""
    found = [
        ds.field(key).is_null()
        if value is None
        else ds.field(key) == pa.scalar(value, schema.field(key).type)
        for key, value in values.items()
    ]
    return reduce(and_, found) if found else None


def _expressions(files: FileSet, keys: Sequence[str]) -> list[ds.Expression | None]:
    """Values of the folders of each file, whole numbers where all values of a key are."""
    whole = {key: all(_is_integer(values.get(key)) for values in files.folders) for key in keys}
    types = pa.schema([(key, pa.int64() if whole[key] else pa.string()) for key in keys])

    def typed(key: str, value: str | None) -> Any:
        return int(value) if whole[key] and value is not None else value

    return [
        equations({key: typed(key, values[key]) for key in keys if key in values}, types)
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
