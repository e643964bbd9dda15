"""Dask DataFrames: the columns are selected first, so that the reader reads no others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
from dask import delayed

from dmixed.errors import DataError
from dmixed.sources.base import (
    Fingerprint,
    Part,
    always_there,
    check_columns,
    is_text,
    join_types,
)
from dmixed.sources.frames import arrow_from_pandas

if TYPE_CHECKING:
    import dask.dataframe as dd


@dataclass(frozen=True, slots=True)
class DaskSource:
    """A Dask DataFrame; its partitions stay on the cluster."""

    data: dd.DataFrame
    kind: str = "dask"
    _built: dict[frozenset[str], list[Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.data.columns)

    def head(self, columns: Sequence[str], rows: int) -> pa.Table:
        """First rows, of ever more partitions until there are enough.

        Rows with all their values are preferred to those before them, and a column without any
        value is looked for in all partitions: its type is not known before.
        """
        parts = self.parts(columns)
        found: list[tuple[str, pa.Table]] = []
        missing = set(parts[0].columns)
        done = 0
        while done < len(parts) and (missing or sum(len(t) for _, t in found) < rows):
            some = parts[done : 2 * done + 1]
            tables = dask.compute(
                *(delayed(_first)(replace(p, task=None), p.task, rows) for p in some)
            )
            for part, table in zip(some, tables, strict=True):
                learned = {c for c in missing if not pa.types.is_null(table.column(c).type)}
                if sum(len(t) for _, t in found) < rows or (learned and len(table)):
                    found.append((part.name, table))
                missing -= learned if len(table) else set()
            done += len(some)
        filled = [(name, t) for name, t in found if len(t)]
        return _with_values(_concatenated(filled or found[:1]), rows)

    def parts(self, columns: Sequence[str], statistics: Collection[str] = ()) -> list[Part]:
        """One part per partition."""
        del statistics
        names = check_columns(columns, self.columns)
        wanted = frozenset(names)
        if wanted not in self._built:  # the graph takes seconds, the pilot and the pass share it
            self._built.clear()
            self._built[wanted] = self._select(names).to_delayed()
        dtypes = self.data.dtypes
        numbers = {name: str(dtypes[name]) for name in names if dtypes[name].kind in "biuf"}
        return [
            Part(f"partition {i}", None, task, names, numbers)
            for i, task in enumerate(self._built[wanted])
        ]

    def index(self) -> pd.Index | None:
        """Return None: the row labels are on the cluster."""
        return None

    def probe(self, columns: Sequence[str]) -> Callable[[], str | None]:
        """Return a function that returns None: Dask makes the partitions."""
        del columns
        return always_there

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """Return none: what the partitions are made of is not known here."""
        return ()

    @property
    def snapshot(self) -> str | None:
        """None."""
        return None

    def selected(self, columns: Sequence[str]) -> dd.DataFrame:
        """Return the frame with some columns only, read as they are declared."""
        return self._select(check_columns(columns, self.columns))

    def _select(self, names: Sequence[str]) -> dd.DataFrame:
        """Return the frame with some columns only, of which a partition may lack some.

        Dask makes text of every object column, also of the numbers and booleans that are objects
        because of nulls; here only columns that are declared to be text become text.
        """
        selected = self.data[list(names)]
        meta = selected._meta
        expression = selected.simplify().expr
        text = type(expression).__name__ == "ArrowStringConversion"
        if text:
            expression = expression.frame
        if type(expression).__name__ == "Projection":
            expression = expression.frame
        elif not text:
            return selected
        from dask.dataframe.dask_expr._collection import new_collection

        texts = [c for c, d in meta.dtypes.items() if isinstance(d, pd.StringDtype)] if text else []
        frame: dd.DataFrame = new_collection(expression)
        return frame.map_partitions(_as_declared, names, texts, meta=meta, enforce_metadata=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return DaskSource, (self.data,)  # without the graph, which is as large again


def _as_declared(frame: pd.DataFrame, names: Sequence[str], texts: Collection[str]) -> pd.DataFrame:
    """Those of the columns that a partition has, its objects as text where that is declared."""
    own = [name for name in names if name in frame.columns]
    if own != list(frame.columns):  # or else it takes longer than the rows of a small partition
        frame = frame[own]
    objects = {
        c: "string[pyarrow]" for c, d in frame.dtypes.items() if c in texts and d.kind == "O"
    }
    return frame.astype(objects) if objects else frame


def from_partition(part: Part, frame: pd.DataFrame) -> pa.Table:
    """Rows of a computed partition; an error starts with the partition's name.

    A column without a value becomes one of nulls, whatever type the nulls have here: that of the
    other partitions is another.
    """
    try:
        table = arrow_from_pandas(frame, part.columns)
    except DataError as error:
        raise DataError(f"{part.name}: {error}") from error
    for i, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not len(column):
            has_values = not is_text(column.type)
        else:  # a glance at the first row is enough for most columns
            has_values = not (_is_missing(column.slice(0, 1)).all() and _is_missing(column).all())
        if not has_values:
            table = table.set_column(i, name, pa.nulls(len(column)))
        elif name in part.numbers and is_text(column.type):
            raise DataError(
                f"{part.name}: column {name!r} has type {column.type}, "
                f"but the DataFrame declares {part.numbers[name]}; give it one type everywhere"
            )
    return table


def _first(part: Part, frame: pd.DataFrame, rows: int) -> pa.Table:
    """Return some rows of a partition, preferably the first."""
    return _with_values(from_partition(part, frame), rows)


def _with_values(table: pa.Table, rows: int) -> pa.Table:
    """At most `rows` rows in their order: the first, but those with all values before others."""
    if len(table) <= rows:
        return table
    missing = np.zeros(len(table), np.bool_)
    for column in table.columns:
        if not pa.types.is_null(column.type):
            missing |= _is_missing(column)
    return table.take(pa.array(np.sort(np.argsort(missing, kind="stable")[:rows])))


def _is_missing(column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,) where a column is null or NaN."""
    missing: np.ndarray[Any, np.dtype[np.bool_]] = column.is_null(nan_is_null=True).to_numpy()
    return missing


def _concatenated(tables: Sequence[tuple[str, pa.Table]]) -> pa.Table:
    """Rows of several partitions, each with its name, for a look at them.

    Raises
    ------
    DataError
        a column has types that do not go together; names it, two partitions and their types
    """
    columns = {}
    for name in tables[0][1].column_names:
        common, since = pa.null(), ""
        for where, table in tables:
            kind = table.column(name).type
            joined = join_types(common, kind, numbers=True)
            if joined is None:
                raise DataError(
                    f"{where}: column {name!r} has type {kind}, but {common} in {since}; "
                    "give it one type everywhere"
                )
            if joined != common:
                common, since = joined, where
        try:
            cast = [table.column(name).cast(common, safe=False) for _, table in tables]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"column {name!r} differs between partitions: {error}") from error
        columns[name] = pa.chunked_array([c for x in cast for c in x.chunks], common)
    return pa.table(columns)
