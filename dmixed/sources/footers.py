"""What footers of Parquet files say: sizes and bounds of columns, what a filter excludes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from dmixed.sources.base import is_text
from dmixed.sources.filters import Filter
from dmixed.sources.reading import secrets, unreadable


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
        (number, rows) of each row group to be read, or None if the format has none
    whole
        numbers of the row groups of which every row is known to be wanted
    complete
        whether `groups` are all row groups of the file
    """

    name: str
    fragment: ds.Fragment
    schema: pa.Schema
    groups: tuple[tuple[int, int], ...] | None
    whole: frozenset[int] = frozenset()
    complete: bool = True


def open_file(name: str, fragment: ds.Fragment, declared: pa.Schema | None = None) -> File:
    """Read a footer.

    Raises
    ------
    DataError
        the file is not there or broken
    """
    if not isinstance(fragment, ds.ParquetFileFragment):
        return File(name, fragment, declared, None)
    try:
        fragment.ensure_complete_metadata()
        schema = fragment.physical_schema
    except Exception as error:
        raise unreadable(name, error, secrets(fragment)) from None
    for key, value in folder_values(fragment).items():
        if key not in schema.names:
            field = pa.field(key, pa.scalar(value).type)
            if declared is not None and declared.get_field_index(key) >= 0:
                field = declared.field(key)
            schema = schema.append(field)
    groups = tuple((group.id, group.num_rows) for group in fragment.row_groups)
    return File(name, fragment, schema, groups, frozenset(i for i, _ in groups))


def folder_values(fragment: ds.Fragment) -> dict[str, Any]:
    """Values that all rows of a file share, by its folders."""
    return dict(ds.get_partition_keys(fragment.partition_expression))


def selected(file: File, wanted: Filter, schema: pa.Schema) -> File:
    """The file without the row groups that a filter excludes.

    Parameters
    ----------
    schema
        types of the columns of the filter
    """
    if file.groups is None:
        return file
    if not wanted.spares(schema):
        return File(file.name, file.fragment, file.schema, file.groups)
    some, others = (
        {group.id for group in file.fragment.subset(expression, schema=schema).row_groups}
        for expression in (wanted.expression, ~wanted.expression)
    )
    groups = tuple(group for group in file.groups if group[0] in some)
    columns = _columns(file, schema.names)
    whole = frozenset(i for i, _ in groups if i not in others and _has_no_null(file, columns, i))
    if any(pa.types.is_floating(kind) for kind in schema.types):
        whole = frozenset()  # NaN is wanted by no filter that spares, and in no statistics
    return File(file.name, file.fragment, file.schema, groups, whole, groups == file.groups)


def n_bytes(file: File, groups: Collection[int], columns: Sequence[str]) -> int | None:
    """Compressed bytes of some columns in some row groups; None if the format does not tell."""
    if file.groups is None:
        return None
    found = _columns(file, columns)
    if None in found.values():
        return None
    leaves = [j for numbers in found.values() for j in numbers or ()]
    metadata = file.fragment.metadata
    return sum(
        group.column(j).total_compressed_size
        for group in map(metadata.row_group, groups)
        for j in leaves
    )


def bounds(
    pieces: Sequence[tuple[File, Sequence[int]]], columns: Collection[str], schema: pa.Schema
) -> dict[str, tuple[Any, Any]]:
    """Smallest and largest value of columns, where statistics tell it of all row groups."""
    found = {}
    for name in columns:
        if not has_bounds(schema.field(name).type):
            continue
        pairs = [pair for file, groups in pieces for pair in _bounds(file, groups, name)]
        known = [pair for pair in pairs if pair != ()]
        if known and None not in known:
            found[name] = min(x[0] for x in known if x), max(x[1] for x in known if x)
    return found


def has_bounds(kind: pa.DataType) -> bool:
    """Whether a type is one of those whose bounds are looked up."""
    t = pa.types
    return bool(t.is_integer(kind) or t.is_date(kind) or t.is_timestamp(kind) or is_text(kind))


def _bounds(
    file: File, groups: Sequence[int], name: str
) -> Iterator[tuple[Any, Any] | tuple[()] | None]:
    """Smallest and largest value in each row group; () if it has none, None if it is not known."""
    if file.groups is None:
        yield None
        return
    leaves = _columns(file, [name])[name]
    if leaves is None:
        yield None
        return
    if not leaves:
        value = folder_values(file.fragment).get(name)
        yield () if value is None else (value, value)
        return
    nanoseconds = _is_nanoseconds(file.schema.field(name).type)
    for i in groups:
        chunk = file.fragment.metadata.row_group(i).column(leaves[0])
        statistics = chunk.statistics
        if statistics is None or nanoseconds:
            yield None
        elif statistics.has_null_count and statistics.null_count == chunk.num_values:
            yield ()
        else:
            yield _values(statistics)


def _values(statistics: Any) -> tuple[Any, Any] | None:
    """Bounds as Python values of one kind."""
    try:
        if not statistics.has_min_max:
            return None
        low, high = statistics.min, statistics.max
    except (ValueError, OverflowError):  # text cut in the middle of a letter, dates far away
        return None
    kinds = (int, str, dt.date)  # of which a datetime is one
    return (low, high) if isinstance(low, kinds) and isinstance(high, kinds) else None


def _is_nanoseconds(kind: pa.DataType) -> bool:
    """Whether a value may be one that Python's datetime rounds."""
    return bool(pa.types.is_timestamp(kind) and kind.unit == "ns")


def _has_no_null(file: File, columns: Mapping[str, Sequence[int] | None], group: int) -> bool:
    """Whether all rows of a row group are known to have values in some columns."""
    folder = folder_values(file.fragment)
    for name, leaves in columns.items():
        if leaves is None or len(leaves) > 1:
            return False
        if not leaves:
            if folder.get(name) is None:
                return False
            continue
        statistics = file.fragment.metadata.row_group(group).column(leaves[0]).statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return False
    return True


def _columns(file: File, names: Sequence[str]) -> dict[str, list[int] | None]:
    """Numbers of the leaves of each column in the file; none if its folder has it, None unknown."""
    physical = file.fragment.physical_schema
    leaves: dict[str, list[int]] = {}
    total = 0
    for field in physical:
        n = _n_leaves(field.type)
        leaves.setdefault(field.name, []).extend(range(total, total + n))
        total += n
    if total != file.fragment.metadata.num_columns:
        return dict.fromkeys(names)
    return {name: leaves.get(name, []) for name in names}


def _n_leaves(kind: pa.DataType) -> int:
    """How many columns of a Parquet file hold one column of a type."""
    t = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _n_leaves(kind.storage_type)
    if t.is_struct(kind):
        return sum(_n_leaves(kind.field(i).type) for i in range(kind.num_fields))
    if t.is_map(kind):
        return _n_leaves(kind.key_type) + _n_leaves(kind.item_type)
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return _n_leaves(kind.value_type)
    return 1
