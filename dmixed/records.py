"""Files with checksums: dataclasses as JSON, tables as Parquet, both to the last bit.

A record is an object of fields, one a line; NaN is null, infinities are "inf" and "-inf", arrays
are lists. What is read is not trusted: nothing in it is run, and whatever is not of the type it
should be is a `DataError` that names the file. Directories appear complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dmixed.errors import DataError

T = TypeVar("T")

ROW_GROUP = 2**26
"""Bytes of numbers in one row group of a file."""


# --------------------------------------------------------------------------- directories


def check_free(path: Path, called: str) -> None:
    """Refuse a place where there is something already; an empty directory is nothing."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{called}: exists and is not a directory")
    if path.exists() and any(path.iterdir()):
        raise DataError(
            f"{called}: the directory is not empty; results are never overwritten, "
            "give a new directory"
        )


@contextmanager
def new_directory(path: Path, last: str) -> Iterator[Path]:
    """Directory to fill, whose files appear at ``path`` when all are written, or never.

    A new directory appears complete, by renaming; in one that exists (it may be a mount point) the
    file called ``last`` appears last.

    Raises
    ------
    DataError
        there is something already
    OSError
        the directory cannot be written; nothing is left behind
    """
    check_free(path, str(path))
    path = path.resolve()
    exists = path.exists()
    staging = (path if exists else path.parent) / f".{uuid4().hex}.dmixed"
    try:
        staging.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{path}: lies inside something that is not a directory") from None
    try:
        yield staging
        if exists:
            for file in sorted(staging.iterdir(), key=lambda x: x.name == last):
                file.replace(path / file.name)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --------------------------------------------------------------------------- records


def record_bytes(record: Any) -> bytes:
    """A dataclass as JSON."""
    plain = _plain(record)
    items = {**plain, "sha256": _checksum(plain)}.items()
    lines = [f"{json.dumps(x)}: {json.dumps(y, allow_nan=False)}" for x, y in items]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def record_checksum(record: Any) -> str:
    """The ``sha256`` of a record: that of its values, not of its bytes."""
    return _checksum(_plain(record))


def made_record(kind: type[T], content: bytes, file: str, schema: str) -> T:
    """The dataclass that `record_bytes` was given; its field ``schema`` must be the one given.

    Parameters
    ----------
    content, file
        of the file, and what messages call it

    Raises
    ------
    DataError
        naming the file, and what is damaged or of another type
    """
    try:
        found = json.loads(content, parse_constant=_no_constant)
        plain = found if isinstance(found, dict) else {}
        given, checksum = plain.pop("sha256", None), _checksum(plain)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is damaged, it is not JSON: {error}") from error
    if plain.get("schema") != schema:
        raise DataError(
            f"{file}: its schema is {reprlib.repr(plain.get('schema'))}; this version of dmixed "
            f"reads {schema!r}"
        )
    if given != checksum:
        raise DataError(f"{file}: is damaged or was changed: its checksum is not right")
    made: T = _made(kind, _Found(plain, f"{file}: "))
    return made


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain).encode("ascii")).hexdigest()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} stands there")


def _plain(value: Any) -> Any:
    """The value as JSON has it; `_made` is the inverse."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        finite = value.dtype.kind != "f" or bool(np.isfinite(value).all())
        return value.tolist() if finite else _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

_types = cache(get_type_hints)


@dataclass(frozen=True, slots=True)
class _Found:
    """A value that JSON holds, and where it stands, for messages."""

    value: Any
    where: str

    def refused(self, wanted: str) -> DataError:
        return DataError(f"{self.where}must be {wanted}, not {reprlib.repr(self.value)}")

    def of(self, kind: type, wanted: str) -> Any:
        """The value, of this type."""
        if type(self.value) is not kind:
            raise self.refused(wanted)
        return self.value


def _made(kind: Any, found: _Found) -> Any:
    """What `_plain` was given, by the annotation of its type."""
    value, origin, of = found.value, get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _made_of_fields(kind, found)
    if origin in (Union, UnionType):
        if value is None and NoneType in of:
            return None
        kinds = [x for x in of if x is not NoneType]
        same = [x for x in kinds if x is type(value)]
        return _made((same or kinds)[0], found)
    if origin is dict:
        items = found.of(dict, "an object").items()
        return {x: _made(of[1], _Found(y, f"{found.where}{x}: ")) for x, y in items}
    if origin is tuple:
        items = found.of(list, "a list")
        kinds = list(of[:1] * len(items) if of[-1] is ... else of)
        if len(kinds) != len(items):
            raise found.refused(f"a list of {len(kinds)}")
        return tuple(_made(x, _Found(y, found.where)) for x, y in zip(kinds, items, strict=True))
    if kind is np.ndarray or origin in (np.ndarray, NDArray):  # an alias of its own since numpy 2.5
        return _array(found.of(list, "a list"), found)
    if kind is float and (type(value) in (int, NoneType) or value in ("inf", "-inf")):
        return float(_array(value, found))
    return found.of(kind, _NAMES[kind])


def _made_of_fields(kind: Any, found: _Found) -> Any:
    types, values = _types(kind), found.of(dict, "an object")
    if types.keys() != values.keys():
        raise found.refused(f"an object of {', '.join(types)}")
    made = {x: _made(t, _Found(values[x], f"{found.where}{x}: ")) for x, t in types.items()}
    try:
        return kind(**made)
    except AssertionError:
        raise found.refused("an object whose lists match in length") from None


def _array(value: Any, found: _Found) -> NDArray[Any]:
    """Array of a number or of lists of numbers, or of lists of true and false."""
    try:
        array = np.array(value)
        return array if array.dtype == np.bool_ else np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise found.refused("lists of numbers") from None


# --------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class TableFile:
    """Number of rows of a Parquet file, its bytes, and their checksum."""

    rows: int
    size: int
    sha256: str


def list_type(size: int, of: pa.DataType | None = None) -> pa.DataType:
    """Type of `lists` of this many numbers."""
    return pa.list_(of or pa.float64(), size)


def lists(numbers: NDArray[Any]) -> pa.Array:
    """An array (n, ...) as n lists of numbers."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(numbers.reshape(-1)), math.prod(numbers.shape[1:])
    )


def table_bytes(table: pa.Table) -> tuple[pa.Buffer, TableFile]:
    """A table as Parquet, and what tells these bytes from others."""
    rows = max(1, ROW_GROUP * len(table) // max(table.nbytes, 1))
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, row_group_size=rows, compression="zstd")
    content = stream.getvalue()
    return content, TableFile(len(table), content.size, hashlib.sha256(content).hexdigest())


def _kept(type_: pa.DataType) -> pa.DataType:
    """Type in which Parquet keeps a column: it has no timestamps of whole seconds."""
    return pa.timestamp("ms", type_.tz) if str(type_).startswith("timestamp[s") else type_


def table_arrays(
    content: bytes, file: str, known: TableFile, wanted: Sequence[tuple[str, pa.DataType]]
) -> list[Any]:
    """Columns of a Parquet file: arrays of Arrow, and (n, m) of numpy where there are lists.

    Raises
    ------
    DataError
        naming the file, which is not the one that is known, or does not have what is wanted
    """
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise DataError(f"{file}: is damaged or was changed: its checksum is not right")
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        names, types = parquet.schema_arrow.names, parquet.schema_arrow.types
        if [*zip(names, types, strict=True)] != [(name, _kept(x)) for name, x in wanted]:
            raise DataError(f"{file}: must have columns {wanted}")
        if parquet.metadata.num_rows != known.rows:
            raise DataError(f"{file}: has {parquet.metadata.num_rows} rows, not {known.rows}")
        table = parquet.read()
        arrays = [
            x.combine_chunks() if x.type == type_ else x.combine_chunks().cast(type_)
            for x, (_, type_) in zip(table.columns, wanted, strict=True)
        ]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if any(x.null_count for x in arrays):
        raise DataError(f"{file}: must not have nulls")
    return [_matrix(file, x) if pa.types.is_fixed_size_list(x.type) else x for x in arrays]


def _matrix(file: str, lists: pa.Array) -> NDArray[Any]:
    """Lists of numbers as an array (n, m)."""
    numbers = lists.flatten().to_numpy(zero_copy_only=False)
    if not np.isfinite(numbers).all():
        raise DataError(f"{file}: must hold finite numbers")
    return np.asarray(numbers.reshape(len(lists), lists.type.list_size))
