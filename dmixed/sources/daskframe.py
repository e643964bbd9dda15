"""Dask DataFrames: the columns are selected first, so that the reader reads no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
from dask import delayed

from dmixed.errors import DataError
from dmixed.sources.base import Part, check_columns
from dmixed.sources.frames import arrow_from_pandas

if TYPE_CHECKING:
    import dask.dataframe as dd


@dataclass(frozen=True, slots=True)
class DaskSource:
    """A Dask DataFrame; its partitions stay on the cluster."""

    data: dd.DataFrame
    kind: str = "dask"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.data.columns)

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """First rows, of ever more partitions until there are enough."""
        parts = self.parts(columns)
        tables: list[pa.Table] = []
        while len(tables) < len(parts) and sum(map(len, tables)) < rows:
            some = parts[len(tables) : 2 * len(tables) + 1]
            frames = dask.compute(*(delayed(_first)(part.task, rows) for part in some))
            tables += [from_partition(p, f) for p, f in zip(some, frames, strict=True)]
        try:
            filled = [t for t in tables if len(t)] or tables[:1]
            return pa.concat_tables(filled, promote_options="permissive").slice(0, rows)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"partitions hold different types: {error}") from error

    def parts(self, columns: Sequence[str]) -> list[Part]:
        """One part per partition."""
        selected = self._select(columns)
        names = tuple(selected.columns)
        return [
            Part(f"partition {i}", None, task, names)
            for i, task in enumerate(selected.to_delayed())
        ]

    def index(self) -> pd.Index | None:
        """Return None: the row labels are on the cluster."""
        return None

    def _select(self, columns: Sequence[str]) -> dd.DataFrame:
        """Return the frame with the columns asked for only."""
        selected = self.data[list(check_columns(columns, self.columns))]
        booleans = [name for name, dtype in selected.dtypes.items() if dtype == np.bool_]
        if not booleans:
            return selected
        return selected.map_partitions(_parse_booleans, booleans, enforce_metadata=False)


def _parse_booleans(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Booleans again, where nulls made objects of them and Dask text of the objects."""
    text = [name for name in names if isinstance(frame[name].dtype, pd.StringDtype)]
    parsed = {name: frame[name].map({"True": True, "False": False}) for name in text}
    return frame.assign(**parsed)


def from_partition(part: Part, frame: pd.DataFrame) -> pa.Table:
    """Rows of a computed partition; an error starts with the partition's name."""
    try:
        table = arrow_from_pandas(frame, part.columns)
    except DataError as error:
        raise DataError(f"{part.name}: {error}") from error
    # Text without a value may be the nulls of a column that is not text in other partitions.
    for i, column in enumerate(table.columns):
        if pa.types.is_large_string(column.type) and column.null_count == len(column):
            table = table.set_column(i, table.field(i).name, pa.nulls(len(column)))
    return table


def _first(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Return the first rows of a partition."""
    return frame.head(rows)
