"""Iceberg tables: pyiceberg plans the data files of a snapshot and reads them.

Delete files, renamed columns and columns that files lack are its business. A filter lets it leave
out files when planning; rows are then filtered as those of all other files are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import pyarrow as pa
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.table import DataScan, FileScanTask

from dmixed.errors import DataError
from dmixed.sources.base import Fingerprint, Part, check_columns, concatenated, rows_per_part
from dmixed.sources.filters import Filter
from dmixed.sources.iceberg_files import (
    FileOpener,
    IcebergRead,
    bounds,
    n_bytes,
    n_rows,
    predicate,
)
from dmixed.sources.parquet import FILES
from dmixed.sources.reading import Probe, probe
from dmixed.sources.storages import reason, redact


@dataclass(frozen=True, slots=True)
class IcebergSource:
    """A snapshot of an Iceberg table, or what a scan wants of it.

    Attributes
    ----------
    scan
        which table, snapshot and rows; its filter, if any, is pyiceberg's
    name
        what messages call the table
    declared
        names and types of the columns
    snapshot
        see `Source`
    filter
        the rows that are wanted, of those of the scan
    """

    scan: DataScan
    name: str
    declared: pa.Schema
    snapshot: str | None
    filter: Filter | None = None
    kind: str = "iceberg"
    location: str = ""
    _planned: list[FileScanTask] = field(default_factory=list, repr=False, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.declared.names)

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """First rows, of as many files as it takes."""
        found: list[pa.Table] = []
        for part in self._parts(columns, (), 1):
            found.append(part.task())
            if sum(map(len, found)) >= rows:
                break
        return concatenated(found[0].schema, found).slice(0, rows)

    def parts(self, columns: Sequence[str], statistics: Collection[str] = ()) -> list[Part]:
        """One part per data file, small files together."""
        return list(self._parts(columns, statistics, FILES))

    def index(self) -> pd.Index | None:
        """Return None: tables have no row labels."""
        return None

    def probe(self, columns: Sequence[str]) -> Probe:
        """Probe of the first data file."""
        del columns
        tasks = self._tasks()
        if not tasks:
            return probe(self.name, _nothing)
        path = tasks[0].file.file_path
        return probe(redact(path), FileOpener(self.scan, path))

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """One for each data file; they never change, so that the name says enough.

        Of files from which rows were deleted, the stamp names the files of deletions.
        """
        return tuple(
            Fingerprint(
                redact(task.file.file_path),
                task.file.file_size_in_bytes,
                " ".join(sorted(redact(f.file_path) for f in task.delete_files)),
                None if task.delete_files else task.file.record_count,
            )
            for task in self._tasks()
        )

    def listed(self) -> dict[str, tuple[int | None, str]]:
        """Size and files of deletions of each data file, by name."""
        return {file.name: (file.size, file.stamp) for file in self.fingerprints()}

    def only(self, names: Collection[str]) -> IcebergSource:
        """The same with some of the data files, at least one."""
        tasks = [task for task in self._tasks() if redact(task.file.file_path) in names]
        return replace(self, _planned=tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        return IcebergSource, (self.scan, self.name, self.declared, self.snapshot, self.filter)

    def filter_columns(self) -> tuple[str, ...]:
        """Columns that the filter needs.

        Raises
        ------
        DataError
            one is not there, or the filter cannot be applied to it
        """
        if self.filter is None:
            return ()
        names = self.filter.columns(self.declared)
        self.filter.check(pa.schema([self.declared.field(name) for name in names]))
        return names

    def _tasks(self) -> list[FileScanTask]:
        """Data files, planned once, in the order of their paths."""
        if not self._planned:
            scan = self.scan
            wanted = predicate(self.filter, self.scan)
            if wanted is not None:
                scan = scan.filter(wanted)
            try:
                planned = sorted(scan.plan_files(), key=lambda task: task.file.file_path)
            except Exception as error:
                why = reason(error, scan.io.properties, kind=False)
                raise DataError(f"{self.name} cannot be planned: {why}") from None
            self._planned.extend(planned)
        return self._planned

    def _parts(
        self, columns: Sequence[str], statistics: Collection[str], files: int
    ) -> Iterator[Part]:
        names = check_columns(columns, self.declared.names)
        schema = pa.schema([self.declared.field(name) for name in names])
        asked = check_columns(statistics, names)
        others = tuple(n for n in self.filter_columns() if n not in names)
        limit = rows_per_part(len(names))
        batch: list[FileScanTask] = []
        total = 0
        for task in self._tasks():
            rows = task.file.record_count
            if batch and (total + rows > limit or len(batch) == files):
                yield self._part(batch, schema, asked, others)
                batch, total = [], 0
            batch.append(task)
            total += rows
        yield self._part(batch, schema, asked, others)

    def _part(
        self,
        tasks: Sequence[FileScanTask],
        schema: pa.Schema,
        asked: Sequence[str],
        others: tuple[str, ...],
    ) -> Part:
        paths = [redact(task.file.file_path) for task in tasks]
        name = " to ".join(dict.fromkeys([paths[0], paths[-1]])) if paths else self.name
        filtering = None if self.filter is None else (self.filter.expression, others)
        counts = [n_rows(task, self.filter, self.scan) for task in tasks]
        sizes = [n_bytes(task, schema.names, self.scan) for task in tasks]
        task = IcebergRead(self.scan, tuple(tasks), schema, filtering)
        return Part(
            name,
            None if None in counts else sum(n for n in counts if n is not None),
            task,
            tuple(schema.names),
            nbytes=None if None in sizes else sum(n for n in sizes if n is not None),
            ranges=bounds(tasks, asked, schema, self.scan),
        )


def iceberg_source(
    data: Any, wanted: Filter | None = None, snapshot: int | None = None
) -> IcebergSource:
    """Source from a pyiceberg Table, or from a DataScan with its filter, columns and snapshot."""
    if isinstance(data, DataScan):
        if snapshot is not None:
            raise DataError(
                "snapshot= goes with an Iceberg Table; a DataScan has its own, "
                "table.scan(snapshot_id=...)"
            )
        if data.limit is not None:
            raise DataError("a DataScan with limit cannot be read in parts: scan without it")
        scan, name = data, data.table_metadata.location
    elif hasattr(data, "scan") and hasattr(data, "metadata"):
        scan = data.scan(snapshot_id=None if snapshot is None else int(snapshot))
        name = ".".join(data.name())
    else:
        raise DataError(
            f"{type(data).__name__} of pyiceberg cannot be read: pass a Table or DataScan"
        )
    metadata = scan.table_metadata
    if scan.snapshot_id is not None and metadata.snapshot_by_id(scan.snapshot_id) is None:
        known = ", ".join(str(s.snapshot_id) for s in metadata.snapshots[-20:])
        raise DataError(f"{redact(name)} has no snapshot {scan.snapshot_id}; it has: {known}")
    state = scan.snapshot()
    if state is not None and state.schema_id is not None:
        # filters are bound to the table's schema, which must be that of the snapshot
        metadata = metadata.model_copy(update={"current_schema_id": state.schema_id})
    if state is not None:
        # parts travel with it: the history of a table that is written every minute is megabytes
        metadata = metadata.model_copy(
            update={"snapshots": [state], "snapshot_log": [], "metadata_log": [], "refs": {}}
        )
        scan = scan.update(snapshot_id=state.snapshot_id)
    scan = scan.update(table_metadata=metadata, **_local(scan))
    declared = schema_to_pyarrow(scan.projection(), include_field_ids=False)
    shown = None if state is None else f"iceberg snapshot {state.snapshot_id}"
    source = IcebergSource(scan, redact(name), declared, shown, wanted)
    source.filter_columns()
    return source


def _local(scan: DataScan) -> dict[str, Any]:
    """Arguments of a scan that let it plan and travel without its catalog."""
    return {key: None for key in ("catalog", "table_identifier") if hasattr(scan, key)}


def _nothing() -> None:
    """Opener of no file."""
