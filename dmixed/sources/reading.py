"""Rows of files, piece by piece: what the task of a part does, wherever it runs."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from dmixed.errors import DataError
from dmixed.sources.base import concatenated, gathered
from dmixed.sources.filters import kept
from dmixed.sources.storages import reason

ONE_BATCH = 2**30  # rows; a row group is decoded into one array, which numpy can then share
BUFFER = 2**22  # bytes of a column fetched at a time, where rows come in batches
LOCAL = 2**19  # the same of a local file: small, so that they stay in the processor's cache
PEEK = 2**16  # rows looked through at a time for the first that are wanted


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is and how it is read.

    Arrow's fragment of a Parquet file reads the footer when it is pickled, also on a scheduler
    that has no access to it; this does not.

    Attributes
    ----------
    path, filesystem
        of the file
    folder
        values that all its rows share
    form, expression
        format and partition of Arrow's fragment, None for Parquet without options
    buffer
        the file itself, if it is in memory
    """

    path: str
    filesystem: pa.fs.FileSystem
    folder: Mapping[str, Any]
    form: ds.FileFormat | None = None
    expression: ds.Expression | None = None
    buffer: pa.Buffer | None = None

    @classmethod
    def of(cls, fragment: ds.Fragment) -> Place:
        """Place of a fragment."""
        folder = dict(ds.get_partition_keys(fragment.partition_expression))
        given = fragment.path, fragment.filesystem, folder
        if not _has_options(fragment) and fragment.buffer is None:
            return cls(*given)
        return cls(*given, fragment.format, fragment.partition_expression, fragment.buffer)

    @property
    def plain(self) -> bool:
        """Whether it is Parquet without options."""
        return self.form is None

    def open(self) -> pa.NativeFile:
        """The file, open for reading."""
        return self.filesystem.open_input_file(self.path)

    def fragment(self, groups: Sequence[int] | None) -> ds.Fragment:
        """Arrow's fragment, of some row groups."""
        assert self.form is not None
        where = self.path if self.buffer is None else self.buffer
        options: dict[str, Any] = {"partition_expression": self.expression}
        if groups is not None:
            options["row_groups"] = list(groups)
        if self.buffer is None:
            options["filesystem"] = self.filesystem
        return self.form.make_fragment(where, **options)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one file.

    Attributes
    ----------
    name
        for messages
    place
        where the file is
    groups
        the row groups, None for the whole file
    rows
        number of rows before any filter, None if the format does not tell
    whole
        whether every row is known to be wanted
    nullable
        whether a column that the file lacks is one of nulls, as in tables that gained columns
    """

    name: str
    place: Place
    groups: tuple[int, ...] | None
    rows: int | None
    whole: bool = True
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """Task of a part.

    Attributes
    ----------
    pieces
        what to read; there may be none
    schema
        names and types to read as
    filtering
        the rows that are wanted, and the columns it needs that are not in `schema`
    """

    pieces: tuple[Piece, ...]
    schema: pa.Schema
    filtering: tuple[pc.Expression, pa.Schema] | None = None

    def __call__(self) -> pa.Table:
        """Read the rows, each row group into one array."""
        return concatenated(self.schema, self._tables(ONE_BATCH))

    def tables(self, limit: int) -> Iterator[pa.Table]:
        """Read the rows in tables of at most `limit` rows, one at a time."""
        return gathered(self._with_types(limit), limit)

    def first(self, rows: int) -> pa.Table:
        """Read the first rows that are wanted."""
        found: list[pa.Table] = []
        count = 0
        size = rows if self.filtering is None else max(rows, PEEK)
        for table in self._tables(size):
            found.append(table)
            count += len(table)
            if count >= rows:
                break
        return concatenated(self.schema, found).slice(0, rows)

    def _with_types(self, limit: int) -> Iterator[pa.Table]:
        yield self.schema.empty_table()
        yield from self._tables(limit)

    def _tables(self, size: int) -> Iterator[pa.Table]:
        for piece in self.pieces:
            filtering = None if piece.whole else self.filtering
            yield from _piece_tables(piece, self.schema, filtering, size)


def _piece_tables(
    piece: Piece,
    schema: pa.Schema,
    filtering: tuple[pc.Expression, pa.Schema] | None,
    size: int,
) -> Iterator[pa.Table]:
    """Rows of a piece; an error starts with its name."""
    wanted = schema if filtering is None else pa.unify_schemas([schema, filtering[1]])
    count = 0
    try:
        read = _decoded if piece.place.plain else _scanned
        tables = read(piece, wanted, size)
        for table in tables:
            count += len(table)
            if filtering is not None:
                table = kept(table, filtering[0])
            yield table.select(schema.names)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(piece.name, error, secrets(piece.place)) from None
    if piece.rows is not None and count != piece.rows:
        raise DataError(
            f"{piece.name} has changed while it was in use: {count} rows, not {piece.rows}; "
            "start again when nothing writes there"
        )


def _has_options(fragment: ds.Fragment) -> bool:
    """Whether only Arrow's Dataset knows how the file is to be read."""
    if not isinstance(fragment, ds.ParquetFileFragment):
        return True
    form = fragment.format
    options = form.default_fragment_scan_options
    return form.read_options != ds.ParquetReadOptions() or any(
        getattr(options, name, None) is not None
        for name in ("decryption_properties", "parquet_decryption_config")
    )


def _scanned(piece: Piece, schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """Rows through Arrow's Dataset, which decodes a row group at a time."""
    scanner = ds.Scanner.from_fragment(
        piece.place.fragment(piece.groups),
        schema=schema,
        columns=schema.names,
        batch_size=size,
        batch_readahead=0,
        fragment_readahead=0,
    )
    for batch in scanner.to_batches():
        yield pa.Table.from_batches([batch])


def _decoded(piece: Piece, schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """Rows through the Parquet reader, which decodes no more than it is asked for.

    What fits into one table is fetched at once, the columns side by side, unless it is on a disk.
    """
    local = isinstance(piece.place.filesystem, pyarrow.fs.LocalFileSystem)
    at_once = not local and piece.rows is not None and piece.rows <= size
    buffer = LOCAL if local else 0 if at_once else BUFFER
    folder = piece.place.folder
    with piece.place.open() as source:
        file = pq.ParquetFile(source, pre_buffer=at_once, buffer_size=buffer)
        present = file.schema_arrow.names
        stored = [name for name in schema.names if name in present]
        fixed = {
            field.name: _constant(piece, field, folder)
            for field in schema
            if field.name not in present
        }
        groups = range(file.num_row_groups) if piece.groups is None else piece.groups
        if not stored:
            for group in groups:
                rows = file.metadata.row_group(group).num_rows
                for start in range(0, rows, size):
                    yield _assembled({}, fixed, schema, min(size, rows - start))
            return
        for batch in file.iter_batches(size, list(groups), stored):
            columns = {name: batch.column(name) for name in stored}
            yield _assembled(columns, fixed, schema, batch.num_rows)


def _constant(piece: Piece, field: pa.Field, folder: Mapping[str, Any]) -> pa.Scalar:
    """Value that a column has in all rows of a file which does not store it."""
    name, kind = field.name, field.type
    if name not in folder and not piece.nullable:
        raise DataError(f"{piece.name} has no column {name!r}, which other files have")
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.scalar(folder.get(name)).cast(kind)


def _assembled(
    columns: Mapping[str, pa.Array],
    fixed: Mapping[str, pa.Scalar],
    schema: pa.Schema,
    rows: int,
) -> pa.Table:
    """Columns in the types of the plan."""
    arrays = []
    for wanted in schema:
        if wanted.name in columns:
            array = columns[wanted.name]
        else:
            array = pa.repeat(fixed[wanted.name], rows)
            if pa.types.is_dictionary(wanted.type):
                array = array.dictionary_encode()
        arrays.append(array if array.type == wanted.type else array.cast(wanted.type))
    return pa.Table.from_arrays(arrays, schema=schema)


# --------------------------------------------------------------------------- probes and errors


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a file can be opened, tried where it is called.

    What opens the file travels as bytes, so that a library which a worker lacks is a reason too.
    They are not shown: storage options are among them, if there are any.
    """

    name: str
    opener: bytes = field(repr=False)

    def __call__(self) -> str | None:
        """Return the reason why not, in one line."""
        found: Any = None
        try:
            found = pickle.loads(self.opener)
            found()
        except Exception as error:
            return str(unreadable(self.name, error, secrets(getattr(found, "place", None))))
        return None


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens a file and reads what it says of itself."""

    place: Place

    def __call__(self) -> None:
        """Read the footer, or the first bytes of other formats."""
        if self.place.buffer is not None:
            return
        with self.place.open() as source:
            if self.place.plain:
                pq.ParquetFile(source)
            else:
                source.read(1)


def probe(name: str, opener: Any) -> Probe:
    """Probe of a file through a small callable that opens it."""
    return Probe(name, pickle.dumps(opener))


def secrets(place: Any) -> Mapping[str, Any]:
    """Storage options of the filesystem of a place or fragment, which a message must not repeat."""
    filesystem: Any = getattr(place, "filesystem", None)
    while hasattr(filesystem, "base_fs"):
        filesystem = filesystem.base_fs
    storage = getattr(getattr(filesystem, "handler", None), "fs", None)
    options = getattr(storage, "storage_options", None)
    return options if isinstance(options, Mapping) else {}


def unreadable(name: str, error: Exception, options: Mapping[str, Any] | None = None) -> DataError:
    """Error for a file; storages raise errors of their own, which may not even pickle."""
    if isinstance(error, DataError) and str(error).startswith(name):
        return error
    text = reason(error, options, kind=False)
    text = re.sub(r"Could not open Parquet input source '.*?': ", "", text)
    return DataError(f"{name} cannot be read: {text}")
