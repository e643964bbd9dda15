"""Group labels: one integer code per row, and the same label for the same group in every batch.

A label has one type whatever the batch it comes from made of it: integers are int64 (uint64 when
they do not fit), whether they arrived as int8, as a decimal without fraction, or as a float column
because nulls forced it; text is text however it is stored. Everything runs in Arrow's kernels,
which release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dmixed.errors import DataError

Codes: TypeAlias = NDArray[np.int32]
Positions: TypeAlias = NDArray[np.int64]

EXACT = 2**53  # beyond it a float64 no longer tells an integer from its neighbour
_UNITS = ("s", "ms", "us", "ns")


@dataclass(frozen=True, slots=True)
class Labels:
    """The distinct keys of G groups.

    Attributes
    ----------
    names
        name of each key column
    arrays
        one Arrow array (G,) per key column, without nulls; their combinations are unique
    """

    names: tuple[str, ...]
    arrays: tuple[pa.Array, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.arrays) > 0
        assert all(len(a) == len(self) and not a.null_count for a in self.arrays)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.arrays[0])

    def take(self, positions: NDArray[np.integer]) -> Labels:
        """Labels at these positions, in this order."""
        return Labels(self.names, tuple(a.take(pa.array(positions)) for a in self.arrays))

    def columns(self, positions: Sequence[int]) -> Labels:
        """Some of the key columns, which tell the groups apart as well."""
        names = tuple(self.names[j] for j in positions)
        return Labels(names, tuple(self.arrays[j] for j in positions))

    def first(self, n: int) -> Labels:
        """The first n labels."""
        return Labels(self.names, tuple(a.slice(0, n) for a in self.arrays))


def encode(
    columns: Sequence[pa.ChunkedArray | pa.Array], names: Sequence[str]
) -> tuple[Codes, Labels]:
    """Number the groups of a batch.

    Parameters
    ----------
    columns
        the key columns, n rows each
    names
        their names

    Returns
    -------
    codes
        (n,) position of each row's label; -1 where a key column is null, NaN or infinite
    labels
        each once, in an order that the batch decides

    Raises
    ------
    DataError
        a column's type cannot be a group key: lists, structs, binary, times, decimals with a
        fraction
    """
    return _encode(
        [_counted(c) or hashed(c, x) for c, x in zip(columns, names, strict=True)], names
    )


def _in_order(
    columns: Sequence[pa.ChunkedArray | pa.Array], names: Sequence[str]
) -> tuple[Codes, Labels]:
    """`encode`, labels in order of first appearance."""
    return _encode([hashed(c, x) for c, x in zip(columns, names, strict=True)], names)


def _encode(
    encoded: Sequence[tuple[Codes, pa.Array]], names: Sequence[str]
) -> tuple[Codes, Labels]:
    """Codes and labels of the combinations met of key columns."""
    codes, arrays = reduce(_cross, [(codes, (values,)) for codes, values in encoded])
    return codes, Labels(tuple(names), arrays)


def align(labels: Sequence[Labels]) -> tuple[Labels, list[Positions]]:
    """Union of the labels of several batches.

    Returns
    -------
    union
        in order of first appearance: it starts with the first input, as it is
    positions
        for each input, (G_i,) the position of its labels in the union

    Raises
    ------
    DataError
        a key column holds incompatible types in two batches, or integers that a float64 column of
        another batch cannot hold exactly
    """
    names = labels[0].names
    assert all(x.names == names for x in labels)
    columns = [
        pa.chunked_array(one_type([x.arrays[j] for x in labels], name))
        for j, name in enumerate(names)
    ]
    codes, union = _in_order(columns, names)
    ends = np.cumsum([len(x) for x in labels])
    return union, np.split(codes.astype(np.int64), ends[:-1])


def concatenate(labels: Sequence[Labels]) -> Labels:
    """Labels of several batches that have none in common, one after the other."""
    return Labels(labels[0].names, stacked(labels))


def stacked(labels: Sequence[Labels]) -> tuple[pa.Array, ...]:
    """Key columns of several batches, each in one type, one batch after the other."""
    columns = []
    for j, name in enumerate(labels[0].names):
        arrays = one_type([x.arrays[j] for x in labels], name)
        columns.append(pa.concat_arrays(arrays))
    return tuple(columns)


def lookup(labels: Labels, queries: Labels) -> Positions:
    """Position of each query in `labels`, -1 where there is no such label."""
    _, (_, positions) = align([labels, queries])
    positions[positions >= len(labels)] = -1  # the union starts with `labels`, in order
    return positions


def lookup_few(labels: Labels, queries: Labels) -> Positions:
    """`lookup` where the queries are few: labels are compared with them, and none is hashed."""
    candidates: NDArray[np.bool_] | None = None
    for name, own, asked in zip(labels.names, labels.arrays, queries.arrays, strict=True):
        array, values = one_type([own, asked], name)
        met = pc.is_in(array, value_set=values).to_numpy(zero_copy_only=False)
        candidates = met if candidates is None else candidates & met
    assert candidates is not None
    places = np.append(np.flatnonzero(candidates), -1)
    return np.asarray(places[lookup(labels.take(places[:-1]), queries)])


def subset(labels: Labels, positions: Sequence[int]) -> tuple[Positions, Labels]:
    """Projection of labels on some of their key columns.

    Parameters
    ----------
    labels
        N of them
    positions
        which key columns, and in which order

    Returns
    -------
    codes
        (N,) position of each label's projection
    projections
        distinct, in order of first appearance
    """
    names = tuple(labels.names[j] for j in positions)
    arrays = tuple(labels.arrays[j] for j in positions)
    if set(positions) == set(range(len(labels.arrays))):  # each label is its own projection
        return np.arange(len(labels)), Labels(names, arrays)
    codes, projections = _in_order(arrays, names)
    return codes.astype(np.int64), projections


def sort_index(labels: Labels) -> Positions:
    """Permutation that puts labels in their canonical order, column after column.

    Numbers numerically, text by code point (the byte order of UTF-8), False before True, dates in
    time.
    """
    keys = [str(j) for j in range(len(labels.arrays))]
    table = pa.table(dict(zip(keys, labels.arrays, strict=True)))
    if len(table) == 0:
        return np.empty(0, np.int64)  # an empty column may have type null, which has no order
    order = pc.sort_indices(table, sort_keys=[(key, "ascending") for key in keys])
    return order.to_numpy().astype(np.int64)


def to_pandas(labels: Labels) -> pd.Index:
    """Labels as a pandas Index, or a MultiIndex when the key has several columns.

    Dates become `datetime.date`, timestamps `pandas.Timestamp`.
    """
    levels = [
        pd.Index(array.to_pandas(date_as_object=True), name=name)
        for name, array in zip(labels.names, labels.arrays, strict=True)
    ]
    return levels[0] if len(levels) == 1 else pd.MultiIndex.from_arrays(levels, names=labels.names)


def hashed(column: pa.ChunkedArray | pa.Array, name: str) -> tuple[Codes, pa.Array]:
    """Codes (n,) and labels of one key column, in order of first appearance."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    kind = column.type
    plain = plain_type(kind, name)
    if pa.types.is_null(kind) or len(column) == 0:
        return np.full(len(column), -1, np.int32), pa.array([], plain)
    if pa.types.is_dictionary(kind):
        # Not by decoding: the rows are already numbered, only their numbers are encoded again.
        column = column.unify_dictionaries()
        dictionary = column.chunk(0).dictionary
        rows = pa.chunked_array([chunk.indices for chunk in column.chunks]).dictionary_encode()
        raw = dictionary.take(rows.chunk(0).dictionary)
    else:
        rows = column.dictionary_encode()
        raw = rows.chunk(0).dictionary  # Arrow gives every chunk the same dictionary
    indices = [chunk.indices.fill_null(-1).to_numpy() for chunk in rows.chunks]
    codes = indices[0] if len(indices) == 1 else np.concatenate(indices)
    values = plain_values(raw, plain, name)
    if pa.types.is_dictionary(kind) or pa.types.is_floating(kind):
        # A dictionary may repeat a value or hold nulls; a float column has NaN, and 0.0 twice.
        again = values.dictionary_encode()
        remap = np.append(again.indices.fill_null(-1).to_numpy(), np.int32(-1))
        codes, values = remap[codes], again.dictionary
    return codes, values


def _counted(column: pa.ChunkedArray | pa.Array) -> tuple[Codes, pa.Array] | None:
    """Integers that lie close together are numbered through a table, not a hash: 4x faster.

    Labels are in order of size; None for any other column.
    """
    kind = column.type
    if not pa.types.is_integer(kind) or kind == pa.uint64():
        return None
    if len(column) == 0 or column.null_count:
        return None
    column = pa.chunked_array([column] if isinstance(column, pa.Array) else column.chunks)
    column = column.cast(pa.int64())
    low, high = (x.as_py() for x in pc.min_max(column).values())
    if high - low >= 2 * len(column):
        return None
    chunks = [chunk.to_numpy() - low for chunk in column.chunks]
    met = np.zeros(high - low + 1, np.bool_)
    for chunk in chunks:
        met[chunk] = True
    number = np.cumsum(met, dtype=np.int32) - np.int32(1)
    return np.concatenate([number[chunk] for chunk in chunks]), pa.array(np.flatnonzero(met) + low)


def _cross(
    left: tuple[Codes, tuple[pa.Array, ...]], right: tuple[Codes, tuple[pa.Array, ...]]
) -> tuple[Codes, tuple[pa.Array, ...]]:
    """Codes and labels of the combinations met of two keys."""
    (a, lefts), (b, rights) = left, right
    size = max(len(rights[0]), 1)
    pairs = pa.array(a.astype(np.int64) * size + b, mask=(a < 0) | (b < 0)).dictionary_encode()
    i, j = (pa.array(x) for x in np.divmod(pairs.dictionary.to_numpy(), size))
    labels = tuple(x.take(i) for x in lefts) + tuple(x.take(j) for x in rights)
    return pairs.indices.fill_null(-1).to_numpy(), labels


def plain_type(kind: pa.DataType, name: str) -> pa.DataType:
    """Type in which labels of an Arrow type are kept; refuses what cannot be a key."""
    t = pa.types
    if t.is_dictionary(kind):
        return plain_type(kind.value_type, name)
    if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return pa.large_string()
    if t.is_integer(kind) or t.is_decimal(kind):
        return pa.int64()
    if t.is_floating(kind):
        return pa.float64()
    if t.is_date(kind):
        return pa.date32()
    if t.is_boolean(kind) or t.is_timestamp(kind) or t.is_null(kind):
        return kind
    raise _refused(kind, name)


def plain_values(values: pa.Array, plain: pa.DataType, name: str) -> pa.Array:
    """Values in their plain type, null where they are missing."""
    if plain == pa.int64():
        return _integers(values, name)
    values = values.cast(plain)
    if plain == pa.float64():
        values = pc.if_else(pc.is_finite(values), pc.add(values, 0.0), None)  # -0.0 becomes 0.0
    return values


def _integers(values: pa.Array, name: str) -> pa.Array:
    """Int64, or uint64 when a value is beyond int64."""
    for wide in (pa.int64(), pa.uint64()):
        try:
            return values.cast(wide)
        except pa.ArrowInvalid:
            continue
    raise DataError(
        f"group key {name!r} has type {values.type} with values that are not integers of 64 bits; "
        "convert it to text"
    )


def one_type(arrays: Sequence[pa.Array], name: str) -> list[pa.Array]:
    """One key column of several batches in one type; batches without labels fit any type."""
    types = list(dict.fromkeys(a.type for a in arrays if len(a)))
    if not types:
        types = [next((a.type for a in arrays if not pa.types.is_null(a.type)), pa.null())]
    if len(types) == 1:
        target = types[0]
    elif all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in types):
        target = _one_number(arrays, types, name)
    elif all(pa.types.is_timestamp(t) for t in types):
        unit = max((t.unit for t in types), key=_UNITS.index)
        zones = {t.tz for t in types}
        if None in zones and len(zones) > 1:
            raise _clash(name, types)
        target = pa.timestamp(unit, "UTC" if len(zones) > 1 else zones.pop())
    else:
        raise _clash(name, types)
    try:
        return [a.cast(target) if len(a) else pa.array([], target) for a in arrays]
    except pa.ArrowInvalid as error:
        raise DataError(f"group key {name!r} does not fit type {target}: {error}") from error


def _one_number(arrays: Sequence[pa.Array], types: Sequence[pa.DataType], name: str) -> pa.DataType:
    """Type for numbers that came as integers in one batch and floats or uint64 in another."""
    whole = [a for a in arrays if len(a) and pa.types.is_integer(a.type)]
    floats = [a for a in arrays if len(a) and pa.types.is_floating(a.type)]
    fraction = any(pc.any(pc.not_equal(a, pc.floor(a))).as_py() for a in floats)
    bounded = floats + whole if fraction else floats
    if any(_largest(a) > EXACT for a in bounded):
        raise DataError(
            f"group key {name!r} is integer in one part of the data and float in another, with "
            "values beyond 2**53 that a float cannot tell apart; store it as a (nullable) integer "
            "or as text everywhere"
        )
    if fraction:
        return pa.float64()
    if pa.uint64() not in types:
        return pa.int64()
    if any(pc.min(a).as_py() < 0 for a in whole + floats):
        raise DataError(
            f"group key {name!r} has negative values and values beyond 2**63, which no integer of "
            "64 bits holds; convert it to text"
        )
    return pa.uint64()


def _largest(array: pa.Array) -> int | float:
    """Largest absolute value, exact for integers (Arrow's `abs` overflows at -2**63)."""
    ends = pc.min_max(array).as_py()
    return max(-ends["min"], ends["max"])


def _refused(kind: pa.DataType, name: str) -> DataError:
    """Error for a type that cannot be a key."""
    return DataError(
        f"column {name!r} has type {kind} and cannot be a group key; "
        "convert it to text, an integer or a date"
    )


def _clash(name: str, types: Sequence[pa.DataType]) -> DataError:
    """Error for a key column of two types."""
    a, b = (str(t).removeprefix("large_") for t in types[:2])
    return DataError(
        f"group key {name!r} has type {a} in one part of the data and {b} in another; "
        "give the column one type everywhere"
    )
