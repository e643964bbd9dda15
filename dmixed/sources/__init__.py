"""Where rows come from: any kind of data as named columns, a pilot, and parts to be read.

Planning reads metadata only; a part, when it is read, reads only the columns asked for. All rows
travel as pyarrow Tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from dmixed.errors import DataError
from dmixed.sources.base import (
    FilesSource,
    Fingerprint,
    Part,
    Source,
    gathered,
    rows_per_part,
)
from dmixed.sources.files import DeltaFolder, FileSet, find_files, find_several
from dmixed.sources.filters import Filter, make_filter, parse_filter
from dmixed.sources.memory import arrow_source, pandas_source, polars_source
from dmixed.sources.parquet import dataset_source, files_source

__all__ = [
    "FilesSource",
    "Fingerprint",
    "Part",
    "Source",
    "load",
    "open_source",
    "parse_filter",
    "paths_of",
    "stream",
]

ACCEPTED = (
    "a pandas, polars or Dask DataFrame, a pyarrow Table or Dataset, a DeltaTable, an Iceberg "
    "Table or DataScan, the path or URI of Parquet files or of a Delta table, or a list of paths"
)


def open_source(
    data: Any,
    storage_options: Mapping[str, Any] | None = None,
    *,
    filters: Any = None,
    version: int | None = None,
    snapshot: int | None = None,
) -> Source:
    """Source of rows.

    Parameters
    ----------
    data
        a pandas, polars or Dask DataFrame; a pyarrow Table, RecordBatch or Dataset; an object that
        exports an Arrow stream; a path or URI of Parquet: file, folder (with its sub-folders) or
        pattern, or a list of them, whose files must be on one storage; the folder of a Delta table,
        or a ``deltalake.DeltaTable``; a pyiceberg ``Table`` or ``DataScan``
    storage_options
        for a path or URI: what fsspec's filesystem takes, as an endpoint or credentials
    filters
        rows to read of files and tables, in the form that ``pandas.read_parquet`` takes,
        ``[("year", ">=", 2024)]``, or a ``pyarrow.compute.Expression``; a row is read where it is
        true, so not where it is null
    version
        of a Delta table, the latest by default
    snapshot
        id of the snapshot of an Iceberg table, the current one by default

    Raises
    ------
    DataError
        the type is not one of these, no file can be found or read, an argument has no meaning for
        this kind of data
    """
    wanted = None if filters is None else make_filter(filters)
    numbers: dict[str, Any] = {"version": version, "snapshot": snapshot}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise DataError(f"{name}={value!r}: must be a whole number")
    paths = paths_of(data)
    if isinstance(data, list | tuple) and not data:
        raise DataError("the list of paths is empty")
    if paths:
        _refuse("the files of a path", snapshot=snapshot)
        return _path_source(paths, storage_options, wanted, version)
    if storage_options:
        raise DataError("storage_options go with a path or URI, not with data in memory")
    package = type(data).__module__.partition(".")[0]
    if package == "deltalake" and hasattr(data, "to_pyarrow_dataset"):
        from dmixed.sources.delta import table_source

        _refuse("a DeltaTable", snapshot=snapshot)
        return table_source(data, wanted, version)
    if package == "pyiceberg" and (hasattr(data, "scan") or hasattr(data, "plan_files")):
        from dmixed.sources.iceberg import iceberg_source

        _refuse("an Iceberg table", version=version)
        return iceberg_source(data, wanted, snapshot)
    _refuse(f"data of type {_kind(data)}", version=version, snapshot=snapshot)
    if isinstance(data, ds.Dataset):
        return dataset_source(data, wanted)
    source = _frame_source(data)
    if wanted is not None:
        raise DataError(
            f"filters= go with files and tables of a lake, not with data of type {_kind(data)}: "
            "filter the rows of this data itself before the fit"
        )
    return source


def paths_of(data: Any) -> list[str]:
    """Paths and URIs that data are given as; none for data that are not."""
    given = data if isinstance(data, list | tuple) else [data]
    if not all(isinstance(one, str | os.PathLike) for one in given):
        return []
    return [os.fspath(one) for one in given]


def _path_source(
    paths: Sequence[str],
    storage_options: Mapping[str, Any] | None,
    wanted: Filter | None,
    version: int | None,
) -> Source:
    """Source from paths or URIs."""
    if not all(paths):
        raise DataError('the path is empty; "." is the current folder')
    if len(paths) > 1:
        found: FileSet | DeltaFolder = find_several(paths, storage_options)
    else:
        found = find_files(paths[0], storage_options)
    if isinstance(found, DeltaFolder):
        from dmixed.sources.delta import folder_source

        return folder_source(found, wanted, version)
    _refuse("Parquet files, which have no versions", version=version)
    source = files_source(found, wanted)
    _ = source.filter_columns
    return source


def _frame_source(data: Any) -> Source:
    """Source from a table in memory or on a cluster."""
    if isinstance(data, pd.DataFrame):
        return pandas_source(data)
    dask_dataframe = sys.modules.get("dask.dataframe")  # not imported for those who have none
    if dask_dataframe is not None and isinstance(data, dask_dataframe.DataFrame):
        from dmixed.sources.daskframe import DaskSource

        return DaskSource(data)
    if isinstance(data, pa.RecordBatchReader):
        raise DataError("a RecordBatchReader can be read only once; pass its `read_all()`")
    if type(data).__module__.partition(".")[0] == "polars" and hasattr(data, "lazy"):
        return polars_source(data)
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
        return arrow_source(data)
    raise DataError(f"data of type {_kind(data)} cannot be read; pass {ACCEPTED}")


def _kind(data: Any) -> str:
    return f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")


def _refuse(kind: str, **given: Any) -> None:
    """Refuse arguments that mean nothing for a kind of data."""
    for name, value in given.items():
        if value is not None:
            owner = {"version": "a Delta table", "snapshot": "an Iceberg table"}[name]
            raise DataError(f"{name}= goes with {owner}, not with {kind}")


def load(part: Part, value: pd.DataFrame | None = None) -> pa.Table:
    """Rows of a part.

    Parameters
    ----------
    part
        the part; for a Dask partition its `task` is not used and may be None
    value
        the computed partition, if the part is one of a Dask DataFrame

    Raises
    ------
    DataError
        the rows cannot be read or converted; the message starts with the part or file
    """
    rows: pa.Table | pd.DataFrame = part.task() if value is None else value
    if isinstance(rows, pa.Table):
        return rows
    from dmixed.sources.daskframe import from_partition

    return from_partition(part, rows)


def stream(part: Part, value: pd.DataFrame | None = None) -> Iterator[pa.Table]:
    """Rows of a part in their order, in tables of bounded size.

    Each table has at most as many rows as an ordinary part, and each of its columns is one array,
    which numpy can share; there is at least one table. Of Parquet files no more than one table
    is decoded at a time, however long their row groups are; of an Iceberg table, one data file.

    Parameters and errors are those of `load`.
    """
    limit = rows_per_part(len(part.columns))
    if value is None and hasattr(part.task, "tables"):
        yield from part.task.tables(limit)
    else:
        yield from gathered([load(part, value)], limit)
