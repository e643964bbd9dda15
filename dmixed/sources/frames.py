"""Columns of pandas and polars frames as Arrow, without copying numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dmixed.errors import DataError
from dmixed.sources.base import check_columns

# What conversions raise on values without an Arrow type; Arrow's own errors derive from these.
_UNCONVERTIBLE = (ValueError, TypeError, NotImplementedError, OverflowError)


def arrow_from_pandas(frame: pd.DataFrame, columns: Sequence[str]) -> pa.Table:
    """Columns of a pandas DataFrame as an Arrow Table; the index is left behind.

    Numbers of a plain numpy type are shared, not copied, and NaN stays NaN.
    """
    names = check_columns(columns, list(frame.columns))
    return pa.table({name: _pandas_column(frame[name], name) for name in names})


def arrow_from_polars(frame: Any, columns: Sequence[str]) -> pa.Table:
    """Columns of a polars DataFrame or LazyFrame as an Arrow Table."""
    frame = frame.select(list(columns))
    if hasattr(frame, "collect"):
        frame = frame.collect()
    arrays = {}
    for name in columns:
        try:
            arrays[name] = frame.get_column(name).to_arrow()
        except _UNCONVERTIBLE as error:
            raise _unconvertible(name, frame.get_column(name).dtype, error) from error
    return pa.table(arrays)


def _pandas_column(series: pd.Series, name: str) -> pa.Array | pa.ChunkedArray:
    """Return one column as Arrow."""
    dtype = series.dtype
    if isinstance(dtype, pd.SparseDtype):
        series = pd.Series(series.to_numpy())  # dense
        dtype = series.dtype
    try:
        if isinstance(dtype, np.dtype) and dtype.kind in "fiub":
            return pa.array(series.to_numpy(), from_pandas=False)
        return pa.Array.from_pandas(series)
    except _UNCONVERTIBLE as error:
        raise _unconvertible(name, dtype, error) from error


def _unconvertible(name: str, dtype: object, error: Exception) -> DataError:
    """Error for a column without an Arrow type."""
    reason = str(error).splitlines()[0]
    if isinstance(dtype, np.dtype) and dtype.kind == "O":
        return DataError(f"column {name!r} holds values of several or unknown types: {reason}")
    return DataError(f"column {name!r} has type {dtype}, which cannot be used: {reason}")
