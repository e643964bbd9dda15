"""A growing index of group labels: every label met gets a number, which it keeps.

One index lives as long as the task that reads rows, so that a label is looked up, not merged,
when it comes again. Integers that lie close together are found in a table; others in hash tables
small enough for the processor's cache, the rows being put in the order of the tables first:
twenty times as fast as one large hash table. Texts are known by two 64-bit hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.hashing import Hashes, text_hashes
from dmixed.keys import Codes, Labels

Whole = NDArray[np.int64]

RUN = 8
"""Equal integers one after the other, on average, from which one of each run is looked up."""

CHUNK = 2**14
"""Integers looked up at a time: their places stay in the processor's cache."""

SPARSE = 16
"""Numbers that a table may have for each label, or row of a batch; beyond are hash tables."""

SMALL, PART, PARTS = 2**16, 2**14, 256
"""Size of a table that is always allowed; labels of a hash table; hash tables at most."""

_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class LabelIndex:
    """Numbers 0..G-1 for the labels met, in an order that the batches decide.

    Parameters
    ----------
    names
        names of the key columns
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._columns = [_Column(name) for name in self.names]
        self._pairs = [_Integers(pa.int64()) for _ in self.names[1:]]

    def __len__(self) -> int:
        """Labels met."""
        return len(self._pairs[-1]) if self._pairs else len(self._columns[0])

    def encode(self, columns: Sequence[pa.ChunkedArray | pa.Array]) -> Codes:
        """(n,) number of each row's label, -1 where a key is null, NaN or infinite.

        Raises
        ------
        DataError
            a column cannot be a key, or its type does not go with that of earlier batches
        """
        first, *others = zip(self._columns, columns, strict=True)
        codes = first[0].encode(first[1])
        for pairs, (column, values) in zip(self._pairs, others, strict=True):
            right = column.encode(values)
            codes = _spread(pairs.encode, *_joint(codes, right))
        return codes

    @property
    def labels(self) -> Labels:
        """The labels, by number."""
        codes: NDArray[np.int64] | None = None
        arrays: list[pa.Array] = []
        for pairs, column in zip(self._pairs[::-1], self._columns[:0:-1], strict=True):
            joint = pairs.keys if codes is None else pairs.keys[codes]
            codes, right = joint >> 32, joint & 0xFFFFFFFF
            arrays.insert(0, column.array().take(pa.array(right)))
        array = self._columns[0].array()
        return Labels(
            self.names, (array if codes is None else array.take(pa.array(codes)), *arrays)
        )


def _joint(left: Codes, right: Codes) -> tuple[Whole, NDArray[np.bool_] | None]:
    """Pairs of codes as one integer, of the rows that have both, and which rows those are."""
    joint = (left.astype(np.int64) << 32) | right
    valid = (left >= 0) & (right >= 0)
    return (joint, None) if valid.all() else (joint[valid], valid)


def _spread(encode: object, values: object, valid: NDArray[np.bool_] | None) -> Codes:
    """Codes of the valid rows in their places, -1 elsewhere."""
    found: Codes = encode(values)  # type: ignore[operator]
    if valid is None:
        return found
    codes = np.full(len(valid), -1, np.int32)
    codes[valid] = found
    return codes


class _Engine(Protocol):
    """Numbers of the values of one type."""

    kind: pa.DataType

    def __len__(self) -> int: ...

    def start(self, array: pa.Array) -> None:
        """Number distinct values in their order; the engine is empty."""

    def find(self, array: pa.Array) -> Codes:
        """Number of each value (none is null); those not met before get the next ones."""

    def array(self) -> pa.Array:
        """Values by number."""


class _Column:
    """The values met of one key column."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._engine: _Engine | None = None

    def __len__(self) -> int:
        return 0 if self._engine is None else len(self._engine)

    def array(self) -> pa.Array:
        return pa.array([], pa.null()) if self._engine is None else self._engine.array()

    def start(self, array: pa.Array) -> None:
        if pa.types.is_null(array.type):
            return
        self._engine = _engine(array.type)
        try:
            self._engine.start(array)
        except _Collision:
            self._engine = _Others(array.type)
            self._engine.start(array)

    def encode(self, column: pa.ChunkedArray | pa.Array) -> Codes:
        kind = column.type
        plain = keys.plain_type(kind, self.name)
        if pa.types.is_null(kind) or len(column) == 0:
            if self._engine is None and not pa.types.is_null(plain):
                self._engine = _engine(plain)
            return np.full(len(column), -1, np.int32)
        codes: Codes | None = None
        if _direct(kind):
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            values = keys.plain_values(array, plain, self.name)
        else:
            codes, values = keys.hashed(column, self.name)
        valid = None
        if values.null_count:
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            values = values.drop_null()
        found = _spread(self._find, values, valid)
        return found if codes is None else np.append(found, np.int32(-1))[codes]

    def _find(self, values: pa.Array) -> Codes:
        if self._engine is None:
            self._engine = _engine(values.type)
        elif self._engine.kind != values.type:
            held, values = keys.one_type([self._engine.array(), values], self.name)
            if held.type != self._engine.kind:
                self.start(held)
        try:
            return self._engine.find(values)
        except _Collision:
            exact = _Others(self._engine.kind)
            exact.start(self._engine.array())
            self._engine = exact
            return exact.find(values)


def _direct(kind: pa.DataType) -> bool:
    """Types whose rows are looked up as they are, without numbering the batch first."""
    t = pa.types
    whole = t.is_integer(kind) and kind != pa.uint64()
    text = t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)
    return bool(whole or t.is_date32(kind) or t.is_timestamp(kind) or text)


def _engine(kind: pa.DataType) -> _Engine:
    if pa.types.is_large_string(kind):
        return _Texts()
    if kind == pa.int64() or pa.types.is_date32(kind) or pa.types.is_timestamp(kind):
        return _Integers(kind)
    return _Others(kind)


class _Integers:
    """Integers of 64 bits, and dates and times as such."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self._keys, self._n = np.empty(0, np.int64), 0
        self._low, self._table = 0, np.empty(0, np.int32)
        self._parts: list[_Part] | None = None

    def __len__(self) -> int:
        return self._n

    @property
    def keys(self) -> Whole:
        """Integers by number."""
        return self._keys[: self._n]

    def array(self) -> pa.Array:
        if pa.types.is_date32(self.kind):
            return pa.array(self.keys.astype(np.int32)).cast(self.kind)
        return pa.array(self.keys).cast(self.kind)

    def find(self, array: pa.Array) -> Codes:
        return self.encode(_integers(array))

    def start(self, array: pa.Array | Whole) -> None:
        values = array if isinstance(array, np.ndarray) else _integers(array)
        self._append(values)
        if len(values) and self._room(values):
            self._table[values - self._low] = np.arange(len(values), dtype=np.int32)
        elif len(values):
            self._divide()

    def encode(self, values: Whole) -> Codes:
        """Number of each integer; those not met before get the next ones."""
        if len(values) == 0:
            return np.empty(0, np.int32)
        ends = _runs(values) if _runs(values[:CHUNK]) is not None else None
        if ends is None:
            return self._encoded(values)
        return np.repeat(self._encoded(values[ends - 1]), np.diff(ends, prepend=0))

    def _encoded(self, values: Whole) -> Codes:
        if self._parts is None and not self._room(values):
            self._divide()
        return self._by_table(values) if self._parts is None else self._by_hash(values)

    def _append(self, values: Whole) -> None:
        n = self._n + len(values)
        if n > len(self._keys):
            larger = np.empty(max(n, n + self._n // 2), np.int64)
            larger[: self._n] = self.keys
            self._keys = larger
        self._keys[self._n : n] = values
        self._n = n

    # ------------------------------------------------------------------ close together

    def _room(self, values: Whole) -> bool:
        """Make the table cover these values too, unless it would be too large."""
        low, high = int(values.min()), int(values.max())
        held = len(self._table)
        if held:
            low, high = min(low, self._low), max(high, self._low + held - 1)
        size = high - low + 1
        if size == held:
            return True
        if size > max(SMALL, SPARSE * max(self._n, len(values))):
            return False
        table = np.full(size, -1, np.int32)
        table[self._low - low : self._low - low + held] = self._table
        self._low, self._table = low, table
        return True

    def _by_table(self, values: Whole) -> Codes:
        codes = self._looked_up(values)
        if codes.min() < 0:
            fresh = np.zeros(len(self._table), np.bool_)
            fresh[values[codes < 0] - self._low] = True
            new = np.flatnonzero(fresh)
            self._table[new] = np.arange(self._n, self._n + len(new), dtype=np.int32)
            self._append(new + self._low)
            codes = self._looked_up(values)
        return codes

    def _looked_up(self, values: Whole) -> Codes:
        codes, at = np.empty(len(values), np.int32), np.empty(CHUNK, np.int64)
        for start in range(0, len(values), CHUNK):
            some = values[start : start + CHUNK]
            place = np.subtract(some, self._low, out=at[: len(some)])
            self._table.take(place, out=codes[start : start + CHUNK], mode="clip")
        return codes

    # ------------------------------------------------------------------ anywhere

    def _divide(self) -> None:
        """Hash tables of about `PART` labels each, of the integers held."""
        count = 1
        while count < PARTS and count * PART < self._n:
            count *= 2
        self._table = np.empty(0, np.int32)
        self._parts = [_Part() for _ in range(count)]
        numbers = np.arange(self._n, dtype=np.int32)
        order, ends = _by_part(self.keys, count)
        for part, own in zip(self._parts, np.split(numbers[order], ends[:-1]), strict=True):
            part.extend(self.keys[own], own)

    def _by_hash(self, values: Whole) -> Codes:
        assert self._parts is not None
        if len(self._parts) < PARTS and self._n > 2 * PART * len(self._parts):
            self._divide()
        if len(self._parts) == 1:
            return self._in_part(self._parts[0], values)
        order, ends = _by_part(values, len(self._parts))
        grouped = values.take(order)
        found = np.empty(len(values), np.int32)
        start = 0
        for part, end in zip(self._parts, ends.tolist(), strict=True):
            if end > start:
                found[start:end] = self._in_part(part, grouped[start:end])
            start = end
        codes = np.empty(len(values), np.int32)
        codes[order] = found
        return codes

    def _in_part(self, part: _Part, values: Whole) -> Codes:
        at = part.index.get_indexer(pd.Index(values, copy=False))
        missing = at < 0
        if missing.any():
            own, new = pd.factorize(values[missing])
            at[missing] = len(part.numbers) + own
            part.extend(new, np.arange(self._n, self._n + len(new), dtype=np.int32))
            self._append(new)
        return part.numbers.take(at)


def _runs(values: Whole) -> NDArray[np.intp] | None:
    """Where runs of equal integers end; None where they are short."""
    last = np.flatnonzero(values[1:] != values[:-1])
    return np.append(last + 1, len(values)) if RUN * len(last) < len(values) else None


class _Part:
    """A hash table: integers, and their numbers."""

    def __init__(self) -> None:
        self.index = pd.Index(np.empty(0, np.int64))
        self.numbers = np.empty(0, np.int32)

    def extend(self, values: Whole, numbers: Codes) -> None:
        self.index = pd.Index(np.concatenate([self.index.to_numpy(), values]), copy=False)
        self.numbers = np.concatenate([self.numbers, numbers])


def _by_part(values: Whole, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Order that puts integers table by table, and where each table's end."""
    if count == 1:
        return np.arange(len(values)), np.array([len(values)])
    h = values.view(np.uint64) * _SPREAD
    h >>= np.uint64(64 - count.bit_length() + 1)
    part = h.astype(np.uint8)
    return np.argsort(part, kind="stable"), np.cumsum(np.bincount(part, minlength=count))


def _integers(array: pa.Array) -> Whole:
    """Values of integers, dates or times as int64."""
    if pa.types.is_date32(array.type):
        array = array.cast(pa.int32())
    values: Whole = array.cast(pa.int64()).to_numpy()
    return values


class _Collision(Exception):
    """Two texts with one hash."""


class _Texts:
    """Texts, known by their hashes."""

    kind = pa.large_string()

    def __init__(self) -> None:
        self._hashes = _Integers(pa.int64())
        self._second: Hashes = np.empty(0, np.uint64)
        self._chunks: list[pa.Array] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def array(self) -> pa.Array:
        if len(self._chunks) > 1:
            self._chunks = [pa.concat_arrays(self._chunks)]
        return self._chunks[0] if self._chunks else pa.array([], self.kind)

    def start(self, array: pa.Array) -> None:
        first, self._second = text_hashes(array)
        if len(np.unique(first)) < len(first):
            raise _Collision
        self._hashes.start(first.view(np.int64))
        self._chunks = [array]

    def find(self, array: pa.Array) -> Codes:
        first, second = text_hashes(array)
        held = len(self)
        codes = self._hashes.encode(first.view(np.int64))
        if len(self) > held:
            rows = np.flatnonzero(codes >= held)[::-1]
            where = np.empty(len(self) - held, np.int64)
            where[codes[rows] - held] = rows  # of several rows the first one stays
            self._chunks.append(array.take(pa.array(where)))
            self._second = np.concatenate([self._second, second[where]])
        if not np.array_equal(self._second.take(codes), second):
            raise _Collision
        return codes


class _Others:
    """Values of any other type, numbered by Arrow together with those held."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self._array = pa.array([], kind)

    def __len__(self) -> int:
        return len(self._array)

    def array(self) -> pa.Array:
        return self._array

    def start(self, array: pa.Array) -> None:
        self._array = array

    def find(self, array: pa.Array) -> Codes:
        both = pa.chunked_array([self._array, array]).dictionary_encode()
        self._array = both.chunk(0).dictionary
        codes: Codes = both.chunk(both.num_chunks - 1).indices.to_numpy()
        return codes
