"""Stable hashes of group labels: the same for the same label on any machine, in any batch.

Integers go through the finaliser of splitmix64 (Steele, Lea & Flood 2014, OOPSLA), texts through
rounds of it over their bytes, eight at a time. Nothing here depends on the seed, the platform or
the version of Python or pandas.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmixed.keys import Labels

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_SECOND_HASH = np.uint64(0xD6E8FEB86659FD93)


def mix(values: NDArray[np.generic]) -> Hashes:
    """Hash of 64-bit integers, taken as bits."""
    h = values.view(np.uint64) + _GOLDEN
    h ^= h >> np.uint64(30)
    h *= _A
    h ^= h >> np.uint64(27)
    h *= _B
    h ^= h >> np.uint64(31)
    return h


def text_hashes(texts: pa.Array) -> tuple[Hashes, Hashes]:
    """Two independent hashes of each text of a large_string array without nulls."""
    n = len(texts)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + n + 1]
    first, last = (int(ends[0]), int(ends[-1])) if n else (0, 0)
    raw = np.zeros(last - first + 8, np.uint8)  # eight bytes can be read from any start
    if last > first:
        raw[: last - first] = np.frombuffer(data, np.uint8)[first:last]
    words = np.ndarray((last - first + 1,), "<u8", raw, strides=(1,))
    starts, length = ends[:-1] - first, np.diff(ends)
    h = mix(length.astype(np.int64))
    g = h ^ _SECOND_HASH
    keep = np.array([2 ** (8 * i) - 1 for i in range(9)], np.uint64)  # the first i bytes
    at: NDArray[np.intp] | slice = slice(None)
    for done in range(0, int(length.max(initial=0)), 8):
        left = length[at] - done
        if (left <= 0).any():
            at = np.flatnonzero(length > done)
            left = length[at] - done
        word = words[starts[at] + done] & keep[np.minimum(left, 8)]
        h[at] = mix(h[at] ^ word)
        g[at] = mix((g[at] ^ word) * _SECOND_HASH)
    return h, g


def label_hashes(labels: Labels) -> Hashes:
    """(G,) hash of each label: of its value, not of the type it happens to have in a batch."""
    hashes = [_column(array) for array in labels.arrays]
    h = hashes[0]
    for other in hashes[1:]:
        h = mix(h ^ (other * _SECOND_HASH))
    return h


def _column(array: pa.Array) -> Hashes:
    kind, t = array.type, pa.types
    if t.is_null(kind) or len(array) == 0:
        return np.zeros(len(array), np.uint64)
    if t.is_large_string(kind):
        return text_hashes(array)[0]
    if t.is_floating(kind):
        return _floats(array.to_numpy(zero_copy_only=False))
    if t.is_timestamp(kind):  # units differ between batches
        unit = _PER_SECOND[kind.unit]
        seconds, rest = np.divmod(array.cast(pa.int64()).to_numpy(), unit)
        return mix(mix(seconds) + (rest * (10**9 // unit)).view(np.uint64))
    if t.is_date(kind):
        array = array.cast(pa.int32())
    elif t.is_boolean(kind):
        array = array.cast(pa.uint8())
    wide = pa.uint64() if kind == pa.uint64() else pa.int64()
    return mix(array.cast(wide).to_numpy())


def _floats(values: NDArray[np.float64]) -> Hashes:
    """Whole numbers hash as integers: nulls elsewhere in a column turn integers into floats."""
    whole = (np.abs(values) < 2.0**63) & (values == np.floor(values))
    bits = values.view(np.int64).copy()
    bits[whole] = values[whole].astype(np.int64)
    return mix(bits)
