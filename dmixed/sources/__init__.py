"""Where rows come from: any kind of data as named columns, a pilot, and parts to be read.

Planning reads metadata only; a part, when it is read, reads only the columns asked for. All rows
travel as pyarrow Tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from dmixed.errors import DataError
from dmixed.sources.base import Part, Source
from dmixed.sources.memory import arrow_source, pandas_source, polars_source
from dmixed.sources.parquet import dataset_source, path_source

__all__ = ["Part", "Source", "load", "open_source"]

ACCEPTED = (
    "a pandas, polars or Dask DataFrame, a pyarrow Table or Dataset, or the path or URI of Parquet "
    "files"
)


def open_source(data: Any, storage_options: Mapping[str, Any] | None = None) -> Source:
    """Source of rows.

    Parameters
    ----------
    data
        a pandas, polars or Dask DataFrame; a pyarrow Table, RecordBatch or Dataset; an object that
        exports an Arrow stream; a path or URI of Parquet: file, folder (with its sub-folders) or
        pattern
    storage_options
        for a URI: what fsspec's filesystem takes, as an endpoint or credentials

    Raises
    ------
    DataError
        the type is not one of these, or no Parquet file can be found or read
    """
    if isinstance(data, str | os.PathLike):
        location = os.fspath(data)
        if not location:
            raise DataError('the path is empty; "." is the current folder')
        return path_source(location, storage_options)
    if storage_options:
        raise DataError("storage_options go with a path or URI, not with data in memory")
    if isinstance(data, pd.DataFrame):
        return pandas_source(data)
    dask_dataframe = sys.modules.get("dask.dataframe")  # not imported for those who have none
    if dask_dataframe is not None and isinstance(data, dask_dataframe.DataFrame):
        from dmixed.sources.daskframe import DaskSource

        return DaskSource(data)
    if isinstance(data, ds.Dataset):
        return dataset_source(data)
    if isinstance(data, pa.RecordBatchReader):
        raise DataError("a RecordBatchReader can be read only once; pass its `read_all()`")
    if type(data).__module__.partition(".")[0] == "polars" and hasattr(data, "lazy"):
        return polars_source(data)
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
        return arrow_source(data)
    kind = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
    raise DataError(f"data of type {kind} cannot be read; pass {ACCEPTED}")


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
    if value is not None:
        from dmixed.sources.daskframe import from_partition

        return from_partition(part, value)
    table: pa.Table = part.task()
    return table
