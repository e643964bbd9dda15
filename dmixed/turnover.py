"""Levels of random factors that are new, and that are gone, from tables of random effects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from dmixed.drift import NAMED, Turnover
from dmixed.errors import DataError
from dmixed.folders import Folder
from dmixed.places import MANIFEST
from dmixed.preparation import Prepared
from dmixed.published import SIZE, Factor


def factors_of(prepared: Prepared, folder: Folder) -> tuple[Factor, ...]:
    """The tables that `MixedLMResults.ranef_table` has written to a folder.

    Raises
    ------
    DataError
        the folder is not such a one
    """
    keys: dict[str, int] = {}
    for block, bar in enumerate(prepared.bars):
        if bar.component is None:
            names = prepared.levels[prepared.members(block)[0]].names
            keys.setdefault(":".join(names), len(names))
        else:
            keys.setdefault(bar.label, len(prepared.groups.names) + 1)  # and the effect
    manifest = json.loads(folder.read(MANIFEST, SIZE))
    columns: dict[str, list[str]] = {}
    for path in manifest["columns"]:
        place, slash, name = path.partition("/") if len(keys) > 1 else ("", "", path)
        columns.setdefault(place + slash, []).append(name)
    files = {entry["file"]: entry["bytes"] for entry in manifest["files"]}
    if len(columns) != len(keys):
        raise DataError(f"{folder.file(MANIFEST)}: has {len(columns)} tables, not {len(keys)}")
    return tuple(
        Factor(
            label,
            tuple(file for file in files if file.startswith(place)),
            tuple(size for file, size in files.items() if file.startswith(place)),
            tuple(columns[place][:count]),
        )
        for (label, count), place in zip(keys.items(), columns, strict=True)
    )


def turnover_of(
    now: Sequence[Factor], folder: Folder, before: Sequence[Factor], folder_before: Folder
) -> Mapping[str, Turnover]:
    """Levels of each factor that both versions have.

    Parameters
    ----------
    folder, folder_before
        where the tables are

    Raises
    ------
    DataError
        naming a file that cannot be read
    """
    known = {factor.label: factor for factor in before}
    found = {}
    for factor in now:
        other = known.get(factor.label)
        if other is None:
            continue
        a, b = _levels(folder, factor), _levels(folder_before, other)
        if a.schema != b.schema:
            if len(a.schema) != len(b.schema):
                continue
            a, b = (_as_text(x).rename_columns(a.schema.names) for x in (a, b))
        new, gone = _without(a, b), _without(b, a)
        found[factor.label] = Turnover(len(a), len(new), len(gone), _first(new), _first(gone))
    return found


def _levels(folder: Folder, factor: Factor) -> pa.Table:
    """Labels of the levels of a factor."""
    return pa.concat_tables(list(_tables(folder, factor)))


def _tables(folder: Folder, factor: Factor) -> Iterator[pa.Table]:
    for file in factor.files:
        content = folder.read(file)
        try:
            yield pq.read_table(io.BytesIO(content), columns=list(factor.keys))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{folder.file(file)}: cannot be read: {error}") from None


def _as_text(table: pa.Table) -> pa.Table:
    """Labels of whatever type as text, to compare those of different types."""
    return pa.table([column.cast(pa.string()) for column in table.columns], table.schema.names)


def _without(a: pa.Table, b: pa.Table) -> pa.Table:
    """Levels of one table that are not in another, sorted."""
    names = a.schema.names
    left = a.join(b, keys=names, join_type="left anti")
    return left.sort_by([(name, "ascending") for name in names])


def _first(levels: pa.Table) -> tuple[str, ...]:
    """The first labels as text; of several keys joined by ":"."""
    rows = levels.slice(0, NAMED).to_pylist()
    return tuple(":".join(str(value) for value in row.values()) for row in rows)
