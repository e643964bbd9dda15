"""A growing index of labels agrees with numbering everything at once."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmixed import index as index_module
from dmixed import keys
from dmixed.errors import DataError
from dmixed.hashing import label_hashes, text_hashes
from dmixed.index import LabelIndex

KINDS = {
    "close": st.integers(-50, 50),
    "far": st.sampled_from(
        [int(x) for x in np.random.default_rng(0).integers(-(2**62), 2**62, 80)]
    ),
    "extreme": st.sampled_from([-(2**63), 2**63 - 1, 0, 1]),
    "text": st.sampled_from(["", "a", "b", "ab", "é", "日本" * 5, "x" * 8, "x" * 9, "x" * 16]),
    "float": st.sampled_from([0.5, -0.0, 0.0, 3.0, 1e300]),
    "bool": st.booleans(),
    "date": st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    "time": st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1)),
}


def check(batches, names):
    """Codes and labels of batches (lists of columns) against Python's own dictionary."""
    growing, seen = LabelIndex(names), {}
    for columns in batches:
        codes = growing.encode([pa.array(c) for c in columns])
        for row, code in zip(zip(*columns, strict=True), codes.tolist(), strict=True):
            if None in row:
                assert code == -1
            else:
                assert seen.setdefault(row, code) == code
    assert sorted(seen.values()) == list(range(len(growing)))
    labels = growing.labels
    assert len(labels) == len(growing)
    found = list(zip(*(a.to_pylist() for a in labels.arrays), strict=True))
    assert {row: i for i, row in enumerate(found)} == seen
    return growing


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_column(kind, data):
    values = st.one_of(st.none(), KINDS[kind])
    batches = data.draw(st.lists(st.lists(values, max_size=30), max_size=5))
    check([[batch] for batch in batches if any(x is not None for x in batch)], ["g"])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_several_columns(data):
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=3))
    row = st.tuples(*(st.one_of(st.none(), KINDS[kind]) for kind in kinds))
    batches = data.draw(st.lists(st.lists(row, min_size=1, max_size=30), max_size=4))
    found = [list(zip(*batch, strict=True)) for batch in batches]
    found = [b for b in found if all(any(x is not None for x in c) for c in b)]
    check(found, [f"g{j}" for j in range(len(kinds))])


@pytest.mark.parametrize("spread", [1, 7919, 2**40])
def test_many_integers(spread, monkeypatch):
    monkeypatch.setattr(index_module, "PART", 64)
    monkeypatch.setattr(index_module, "SMALL", 64)
    rng = np.random.default_rng(0)
    growing, before = LabelIndex(["g"]), {}
    for _ in range(6):
        values = rng.integers(0, 5_000, 3_000) * spread
        codes = growing.encode([pa.array(values)])
        labels = growing.labels.arrays[0].to_numpy()
        assert (labels[codes] == values).all()
        assert all(before.get(v, c) == c for v, c in zip(values, codes, strict=True))
        before |= dict(zip(values, codes, strict=True))
    assert len(growing) == len(before)


@pytest.mark.parametrize("spread", [1, 7919, 2**40])
@pytest.mark.parametrize("length", [1, 20])
def test_integers_that_lie_together(spread, length, monkeypatch):
    """Runs of equal integers, which come again; most of them are looked up once."""
    monkeypatch.setattr(index_module, "SMALL", 64)
    rng = np.random.default_rng(1)
    looked_up = []
    encoded = index_module._Integers._encoded
    monkeypatch.setattr(
        index_module._Integers,
        "_encoded",
        lambda self, values: looked_up.append(len(values)) or encoded(self, values),
    )
    heads = [rng.integers(0, 50, 40) * spread for _ in range(4)]
    runs = [np.repeat(h, rng.integers(length, 2 * length, 40)) for h in heads]
    check([[values.tolist()] for values in runs], ["g"])
    rows = sum(map(len, runs))
    assert sum(looked_up) == rows if length == 1 else 8 * sum(looked_up) < rows


def test_far_integers_after_close_ones():
    growing = LabelIndex(["g"])
    first = growing.encode([pa.array([3, 1, 2])])
    growing.encode([pa.array([2**62, -(2**62)])])
    assert growing.encode([pa.array([3, 1, 2])]).tolist() == first.tolist()
    assert sorted(growing.labels.arrays[0].to_pylist()) == [-(2**62), 1, 2, 3, 2**62]


def test_types_of_batches_are_joined():
    growing = LabelIndex(["g"])
    assert growing.encode([pa.nulls(2)]).tolist() == [-1, -1]
    assert growing.encode([pa.array([1, 2], pa.int8())]).tolist() == [0, 1]
    assert growing.encode([pa.array([2.0, np.nan, 3.0])]).tolist() == [1, -1, 2]
    assert growing.labels.arrays[0].type == pa.int64()
    assert growing.encode([pa.array([2.5, 1.0])]).tolist() == [3, 0]
    assert growing.labels.arrays[0].type == pa.float64()
    with pytest.raises(DataError, match="has type double in one part of the data and string"):
        growing.encode([pa.array(["a"])])


def test_two_texts_of_one_hash(monkeypatch):
    def poor(texts):
        lengths = np.array([len(x) for x in texts.to_pylist()], np.uint64)
        return lengths, text_hashes(texts)[1]

    monkeypatch.setattr(index_module, "text_hashes", poor)
    check([[["a", "bb"]], [["b", "bb", None]], [["cc", "a", "b"]]], ["g"])


def test_hashes_do_not_depend_on_types_or_neighbours():
    def hashes(*arrays):
        return label_hashes(keys.Labels(tuple("abc"[: len(arrays)]), arrays)).tolist()

    assert hashes(pa.array([1, -5])) == hashes(pa.array([1.0, -5.0]))
    assert hashes(pa.array([7])) == hashes(pa.array([7], pa.uint64()))
    whole, single = pa.array(["", "abc", "abcdefgh", "abcdefghi"], pa.large_string()), []
    for i in range(4):
        single += hashes(whole.slice(i, 1))
    assert single == hashes(whole) == hashes(pa.concat_arrays([whole, whole]).slice(4))
    time = dt.datetime(1960, 1, 1, 1, 2, 3)
    assert hashes(pa.array([time], pa.timestamp("s"))) == hashes(
        pa.array([time], pa.timestamp("ns"))
    )
    assert hashes(pa.array([1]), pa.array([2])) != hashes(pa.array([2]), pa.array([1]))


def test_hashes_are_those_of_every_other_day():
    found = label_hashes(keys.Labels(("a",), (pa.array([0, 1, -1]),)))
    assert found.tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 0xE4D971771B652C20]
    text = label_hashes(keys.Labels(("a",), (pa.array(["", "group 1"], pa.large_string()),)))
    assert text.tolist() == TEXT_HASHES


TEXT_HASHES = [16294208416658607535, 10034071478597671375]


def test_a_short_batch_keeps_the_table():
    """What is allowed for a large batch is not taken away by the last one of a file."""
    rng = np.random.default_rng(0)
    values = rng.choice(rng.permutation(10**6)[:20_000], 150_000)
    growing = LabelIndex(["g"])
    growing.encode([pa.array(values[:131_072])])
    growing.encode([pa.array(values[131_072:])])
    assert growing._columns[0]._engine._parts is None
