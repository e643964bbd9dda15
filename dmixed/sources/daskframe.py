"""Dask DataFrames: the columns are selected first, so that the reader reads no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dask
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
        kinds = {
            name: dtype.kind for name, dtype in selected.dtypes.items() if dtype.kind in "biuf"
        }
        return selected.map_partitions(_parse, kinds, enforce_metadata=False) if kinds else selected


def _parse(frame: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Numbers and booleans again, where nulls made objects of them and Dask text of the objects."""
    parsed = {}
    for name, kind in kinds.items():
        if isinstance(frame[name].dtype, pd.StringDtype):
            for target in [pa.bool_()] if kind == "b" else [pa.int64(), pa.float64()]:
                with suppress(pa.ArrowInvalid):
                    values = pa.array(frame[name]).cast(target)
                    parsed[name] = pd.Series(pd.arrays.ArrowExtensionArray(values), frame.index)
                    break
    return frame.assign(**parsed) if parsed else frame


def from_partition(part: Part, frame: pd.DataFrame) -> pa.Table:
    """Rows of a computed partition; an error starts with the partition's name."""
    try:
        table = arrow_from_pandas(frame, part.columns)
    except DataError as error:
        raise DataError(f"{part.name}: {error}") from error
    # Text without a value may be the nulls of a column that is not text in other partitions.
    for i, column in enumerate(table.columns):
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if text and column.null_count == len(column):
            table = table.set_column(i, table.field(i).name, pa.nulls(len(column)))
    return table


def _first(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Return the first rows of a partition."""
    return frame.head(rows)
