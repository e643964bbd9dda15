"""What a source of rows is, whatever it is made of: names, a pilot, and parts to be read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa

from dmixed.errors import DataError

ROWS = 2**20  # rows of a part at most, unless a single Parquet row group has more
CELLS = 2**25  # rows times columns of a part at most: 256 MB of float64


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the rows, not read yet.

    Attributes
    ----------
    name
        for messages: "rows 0-999", "partition 3", "s3://bucket/f.parquet row groups 0-3"
    rows
        number of rows, or None where only reading would tell
    task
        a zero-argument callable that returns a pyarrow Table and pickles small, or the Dask
        Delayed of a pandas partition
    columns
        the columns it reads
    """

    name: str
    rows: int | None
    task: Any
    columns: tuple[str, ...]


class Source(Protocol):
    """Rows in any form, of which only the columns asked for are ever read."""

    @property
    def kind(self) -> str:
        """One of "pandas", "polars", "arrow", "dask", "parquet"."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order; a name that occurs twice is listed twice."""

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """At most `rows` rows to learn types and sizes from.

        The first rows, past empty parts; in memory an evenly strided sample.
        """

    def parts(self, columns: Sequence[str]) -> list[Part]:
        """All rows as parts, at least one, planned without reading any row."""

    def index(self) -> pd.Index | None:
        """Row labels, if the data is a pandas DataFrame."""


def check_columns(columns: Collection[str], available: Sequence[object]) -> tuple[str, ...]:
    """Columns asked for, each once; refuses those that are absent or ambiguous."""
    for name in columns:
        if name not in available:
            shown = ", ".join(str(x) for x in list(available)[:20])
            more = ", ..." if len(available) > 20 else ""
            raise DataError(f"column {name!r} is not in the data, which has: {shown}{more}")
        if available.count(name) > 1:
            raise DataError(f"column {name!r} occurs {available.count(name)} times; rename one")
    return tuple(dict.fromkeys(columns))


def rows_per_part(n_columns: int) -> int:
    """Rows of a part at most, for so many columns."""
    return max(1, min(ROWS, CELLS // max(n_columns, 1)))
