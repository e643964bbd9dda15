"""Data files of Iceberg tables: how they are read, and what manifests say of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import (
    AlwaysTrue,
    And,
    BooleanExpression,
    EqualTo,
    GreaterThan,
    GreaterThanOrEqual,
    In,
    LessThan,
    LessThanOrEqual,
    NotEqualTo,
    NotIn,
    Or,
)
from pyiceberg.expressions.visitors import bind
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.table import DataScan, FileScanTask

from dmixed.errors import DataError
from dmixed.sources.base import concatenated, gathered
from dmixed.sources.filters import Filter, kept
from dmixed.sources.footers import has_bounds
from dmixed.sources.reading import unreadable
from dmixed.sources.storages import redact

_PREDICATES = {
    "==": EqualTo,
    "!=": NotEqualTo,
    "<": LessThan,
    "<=": LessThanOrEqual,
    ">": GreaterThan,
    ">=": GreaterThanOrEqual,
    "in": In,
    "not in": NotIn,
}
_EPOCH = dt.datetime(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class IcebergRead:
    """Task of a part: data files of a snapshot.

    Attributes
    ----------
    scan
        a scan of the table, without its history
    tasks
        what pyiceberg planned
    schema
        names and types to read as
    filtering
        the rows that are wanted and the further columns it needs, if there is a filter
    """

    scan: DataScan
    tasks: tuple[FileScanTask, ...]
    schema: pa.Schema
    filtering: tuple[pc.Expression, tuple[str, ...]] | None = None

    def __call__(self) -> pa.Table:
        """Read the rows."""
        return concatenated(self.schema, self._files())

    def tables(self, limit: int) -> Iterator[pa.Table]:
        """Read the rows in tables of at most `limit` rows."""
        return gathered(self._with_types(), limit)

    def _with_types(self) -> Iterator[pa.Table]:
        yield self.schema.empty_table()
        yield from self._files()

    def _files(self) -> Iterator[pa.Table]:
        others = () if self.filtering is None else self.filtering[1]
        for task in self.tasks:
            try:
                table = _task_table(self.scan, task, (*self.schema.names, *others))
                if self.filtering is not None:
                    table = kept(table, self.filtering[0])
                yield table.select(self.schema.names).cast(self.schema)
            except (DataError, MemoryError):
                raise
            except Exception as error:
                raise _unreadable(task, error, self.scan) from None


@dataclass(frozen=True, slots=True)
class FileOpener:
    """Opens a data file where it is called."""

    scan: DataScan
    path: str

    def __call__(self) -> None:
        """Read its first bytes."""
        try:
            with self.scan.io.new_input(self.path).open() as source:
                source.read(4)
        except Exception as error:
            raise DataError(redact(str(error), self.scan.io.properties)) from None


def _task_table(scan: DataScan, task: FileScanTask, names: Sequence[str]) -> pa.Table:
    """Rows of a data file that were not deleted and that the scan wants."""
    schema = scan.projection().select(*names)
    reader = ArrowScan(scan.table_metadata, scan.io, schema, scan.row_filter, scan.case_sensitive)
    return reader.to_table([task]).select(list(names))


def _unreadable(task: FileScanTask, error: Exception, scan: DataScan) -> DataError:
    return unreadable(redact(task.file.file_path), error, scan.io.properties)


def predicate(wanted: Filter | None, scan: DataScan) -> BooleanExpression | None:
    """What pyiceberg may leave out files by; None if that is nothing.

    It keeps all files that may have wanted rows, and perhaps others.
    """
    if wanted is None or wanted.alternatives is None:
        return None
    schema = scan.table_metadata.schema()
    alternatives = []
    for some in wanted.alternatives:
        conditions = []
        for column, operator, value in some:
            condition = _PREDICATES[operator](column, _literal(value))
            try:
                bind(schema, condition, case_sensitive=True)
            except (ValueError, TypeError):  # a number with decimals and a column of whole ones
                continue
            conditions.append(condition)
        if not conditions:
            return None
        alternatives.append(conditions[0] if len(conditions) == 1 else And(*conditions))
    return alternatives[0] if len(alternatives) == 1 else Or(*alternatives)


def _literal(value: Any) -> Any:
    """Value as pyiceberg takes it in all its releases."""
    if isinstance(value, list):
        return [_literal(x) for x in value]
    return value.isoformat() if isinstance(value, dt.date) else value


def n_rows(task: FileScanTask, wanted: Filter | None, scan: DataScan) -> int | None:
    """Rows of a file that are read, if that is known: by partition, the filter may keep all."""
    if task.delete_files or not isinstance(scan.row_filter, AlwaysTrue):
        return None
    if wanted is not None:
        if wanted.alternatives is None or not isinstance(task.residual, AlwaysTrue):
            return None
        # a partition of nulls differs from a value, here as for a row it would not be wanted
        if any(op in ("!=", "not in") for some in wanted.alternatives for _, op, _ in some):
            return None
    return int(task.file.record_count)


def n_bytes(task: FileScanTask, names: Sequence[str], scan: DataScan) -> int | None:
    """Compressed bytes of some columns of a file, as far as the manifest tells."""
    sizes = dict((task.file.column_sizes or {}).items())
    schema = scan.projection()
    found = [sizes.get(schema.find_field(name).field_id) for name in names]
    return None if None in found or not sizes else sum(n for n in found if n is not None)


def bounds(
    tasks: Sequence[FileScanTask], names: Sequence[str], schema: pa.Schema, scan: DataScan
) -> dict[str, tuple[Any, Any]]:
    """Bounds of columns, where manifests tell them of all files."""
    found = {}
    for name in names:
        if not has_bounds(schema.field(name).type):
            continue
        own = scan.projection().find_field(name)
        kind = schema.field(name).type
        pairs = [_pair(task, own, kind) for task in tasks]
        known = [pair for pair in pairs if pair is not None]
        if known and len(known) == len(pairs):
            found[name] = min(x[0] for x in known), max(x[1] for x in known)
    return found


def _pair(task: FileScanTask, own: Any, kind: pa.DataType) -> tuple[Any, Any] | None:
    """Bounds of a column in a file, None if they are not known."""
    low = (task.file.lower_bounds or {}).get(own.field_id)
    high = (task.file.upper_bounds or {}).get(own.field_id)
    if low is None or high is None:
        return None
    return _value(own.field_type, low, kind), _value(own.field_type, high, kind)


def _value(iceberg: Any, stored: bytes, kind: pa.DataType) -> Any:
    """A bound as a Python value."""
    value = from_bytes(iceberg, stored)
    if pa.types.is_date(kind):
        return _EPOCH.date() + dt.timedelta(days=value)
    if pa.types.is_timestamp(kind):
        moment = _EPOCH + dt.timedelta(microseconds=value)
        return moment if kind.tz is None else moment.replace(tzinfo=dt.UTC)
    return value
