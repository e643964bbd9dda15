"""Group labels: the same label for the same group, whatever a batch's types made of it."""

from __future__ import annotations

import datetime as dt
import pickle
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dmixed.errors import DataError
from dmixed.keys import Labels, align, encode, lookup, lookup_few, sort_index, subset, to_pandas


def labels(values, type=None, name="g") -> Labels:
    """Labels of one key column."""
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, type)
    return encode([column], [name])[1]


def values(labels: Labels) -> list:
    """Labels as Python objects."""
    columns = [a.to_pylist() for a in labels.arrays]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


STRANGE = ["", "NA", "nan", "None", "é", "e\u0301", "日本", "a b", " a", "\U0001f600"]


class TestEncode:
    def test_first_appearance_and_missing(self):
        codes, found = encode([pa.array(["b", "a", None, "b", "c"])], ["g"])
        assert codes.tolist() == [0, 1, -1, 0, 2]
        assert codes.dtype == np.int32
        assert values(found) == ["b", "a", "c"]
        assert found.names == ("g",)

    @pytest.mark.parametrize(
        "type",
        [
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int64(), pa.large_string()),
        ],
        ids=str,
    )
    def test_text_however_stored(self, type):
        column = pa.array([*STRANGE, None, *STRANGE]).cast(type)
        codes, found = encode([column], ["g"])
        n = len(STRANGE)
        assert codes.tolist() == [*range(n), -1, *range(n)]
        assert values(found) == STRANGE
        assert found.arrays[0].type == pa.large_string()

    @pytest.mark.parametrize(
        "type",
        [pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.decimal128(20), pa.decimal256(40, 2)],
        ids=str,
    )
    def test_integers_become_int64(self, type):
        found = labels(pa.array([3, 1, None, 3]).cast(type))
        assert values(found) == [3, 1]
        assert found.arrays[0].type == pa.int64()

    def test_integers_beyond_floats_stay_distinct(self):
        big = [2**53, 2**53 + 1, 2**63 - 1, -(2**63)]
        assert values(labels(big)) == big
        assert values(labels(pd.array([*big, None], dtype="Int64"))) == big

    def test_uint64_beyond_int64(self):
        big = [2**64 - 1, 2**64 - 2, 5]
        found = labels(big, pa.uint64())
        assert values(found) == big
        assert found.arrays[0].type == pa.uint64()

    def test_floats(self):
        codes, found = encode([pa.array([0.5, np.nan, None, np.inf, -np.inf, 0.0, -0.0])], ["g"])
        assert codes.tolist() == [0, -1, -1, -1, -1, 1, 1]
        assert values(found) == [0.5, 0.0]

    def test_booleans_in_an_object_column(self):
        column = pa.Array.from_pandas(pd.Series([True, None, False, True], dtype=object))
        codes, found = encode([column], ["g"])
        assert codes.tolist() == [0, -1, 1, 0]
        assert values(found) == [True, False]

    def test_dates_and_timestamps(self):
        day, moment = dt.date(2020, 2, 29), dt.datetime(1999, 12, 31, 23, 59)
        assert values(labels([day, None, day])) == [day]
        assert values(labels([day], pa.date64())) == [day]
        assert values(labels([moment, None])) == [moment]

    def test_categorical(self):
        column = pd.Categorical(["x", "y", None, "x"], categories=["unused", "y", "x"])
        codes, found = encode([pa.Array.from_pandas(pd.Series(column))], ["g"])
        assert codes.tolist() == [0, 1, -1, 0]
        assert values(found) == ["x", "y"]

    def test_dictionary_that_repeats_values_and_holds_nulls(self):
        column = pa.DictionaryArray.from_arrays(
            pa.array([3, 0, 1, 2, None]), pa.array(["a", None, "b", "a"])
        )
        codes, found = encode([column], ["g"])
        assert codes.tolist() == [0, 0, -1, 1, -1]
        assert values(found) == ["a", "b"]

    def test_chunks_with_their_own_dictionaries(self):
        chunks = [pa.array(x).dictionary_encode() for x in (["a", "b"], ["b", "c"], ["a", None])]
        codes, found = encode([pa.chunked_array(chunks)], ["g"])
        assert codes.tolist() == [0, 1, 1, 2, 0, -1]
        assert values(found) == ["a", "b", "c"]

    def test_chunks_and_slices(self):
        column = pa.chunked_array([pa.array([9, 1, 2]).slice(1), pa.array([None, 2, 3])])
        codes, found = encode([column], ["g"])
        assert codes.tolist() == [0, 1, -1, 1, 2]
        assert values(found) == [1, 2, 3]

    def test_composite(self):
        a = pa.array(["x", "x", "y", None, "x", "y"])
        b = pa.array([1, 2, 1, 1, 1, None])
        codes, found = encode([a, b], ["a", "b"])
        assert codes.tolist() == [0, 1, 2, -1, 0, -1]
        assert values(found) == [("x", 1), ("x", 2), ("y", 1)]
        assert found.names == ("a", "b")

    def test_three_columns_keep_no_label_that_only_missing_rows_have(self):
        a, b, c = pa.array([1, 2]), pa.array(["x", "y"]), pa.array([None, True])
        codes, found = encode([a, b, c], ["a", "b", "c"])
        assert codes.tolist() == [-1, 0]
        assert values(found) == [(2, "y", True)]

    @pytest.mark.parametrize(
        "column",
        [
            pa.nulls(3),
            pa.array([None] * 3, pa.string()),
            pa.array([np.nan] * 3),
            pa.array([None] * 3).cast(pa.dictionary(pa.int32(), pa.string())),
        ],
        ids=lambda x: str(x.type),
    )
    def test_all_missing(self, column):
        codes, found = encode([column], ["g"])
        assert codes.tolist() == [-1] * 3
        assert len(found) == 0
        both, found = encode([column, pa.array([1, 2, 3])], ["g", "h"])
        assert both.tolist() == [-1] * 3
        assert len(found) == 0

    @pytest.mark.parametrize(
        "type",
        [
            pa.string(),
            pa.int64(),
            pa.float64(),
            pa.null(),
            pa.dictionary(pa.int32(), pa.string()),
        ],
        ids=str,
    )
    def test_no_rows(self, type):
        for column in (pa.array([], type), pa.chunked_array([], type)):
            codes, found = encode([column], ["g"])
            assert len(codes) == len(found) == 0
            assert codes.dtype == np.int32

    @pytest.mark.parametrize(
        "column",
        [
            pa.array([[1], [2]]),
            pa.array([{"a": 1}]),
            pa.array([b"a"]),
            pa.array([dt.time(1)]),
            pa.array([dt.timedelta(1)]),
            pa.array([b"a"]).dictionary_encode(),
        ],
        ids=lambda x: str(x.type),
    )
    def test_refused_types(self, column):
        with pytest.raises(DataError, match=r"'school'.*cannot be a group key"):
            encode([column], ["school"])

    def test_decimal_with_a_fraction_is_refused(self):
        with pytest.raises(DataError, match=r"'price' has type decimal128\(3, 2\)"):
            encode([pa.array([Decimal("1.25")])], ["price"])


class TestAlign:
    def test_union_and_positions(self):
        parts = [labels(["b", "a"]), labels(["c", "a"]), labels([], pa.string())]
        union, positions = align(parts)
        assert values(union) == ["b", "a", "c"]
        assert [p.tolist() for p in positions] == [[0, 1], [2, 1], []]
        assert all(p.dtype == np.int64 for p in positions)

    def test_nulls_in_some_partitions_only(self):
        frames = [
            pd.DataFrame({"g": [1, 2]}),
            pd.DataFrame({"g": [2, np.nan, 3]}),  # float64 because of the null
            pd.DataFrame({"g": [None, None]}),  # nothing but nulls
            pd.DataFrame({"g": pd.array([None, 4], dtype="Int64")}),
        ]
        union, positions = align([labels(pa.Array.from_pandas(f["g"])) for f in frames])
        assert values(union) == [1, 2, 3, 4]
        assert union.arrays[0].type == pa.int64()
        assert [p.tolist() for p in positions] == [[0, 1], [1, 2], [], [3]]

    def test_text_types_are_one(self):
        kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
        union, positions = align([labels(pa.array(["a", "é"]).cast(k)) for k in kinds])
        assert values(union) == ["a", "é"]
        assert [p.tolist() for p in positions] == [[0, 1]] * 3

    def test_floats_in_every_batch_stay_floats(self):
        union, _ = align([labels([1.0]), labels([2.0])])
        assert union.arrays[0].type == pa.float64()

    def test_one_fraction_makes_all_floats(self):
        union, positions = align([labels([1, 2]), labels([2.5, 2.0])])
        assert values(union) == [1.0, 2.0, 2.5]
        assert positions[1].tolist() == [2, 1]

    def test_uint64_with_int64(self):
        union, _ = align([labels([1, 2]), labels([2**64 - 1, 2], pa.uint64())])
        assert values(union) == [1, 2, 2**64 - 1]
        with pytest.raises(DataError, match=r"'g' has negative values"):
            align([labels([-1]), labels([2**64 - 1], pa.uint64())])

    @pytest.mark.parametrize(
        ("whole", "floats"), [([2**53 + 1], [0.5]), ([1], [2.0**53 + 2]), ([-(2**63)], [0.5])]
    )
    def test_integers_that_a_float_cannot_hold(self, whole, floats):
        with pytest.raises(DataError, match=r"'g' is integer in one part.*float in another"):
            align([labels(whole), labels(floats)])

    def test_integers_beyond_floats_beside_whole_floats(self):
        union, _ = align([labels([2**60 + 1]), labels([7.0])])
        assert values(union) == [2**60 + 1, 7]

    def test_timestamps_of_several_units_and_zones(self):
        moment = dt.datetime(2020, 1, 1, 12)
        union, positions = align([labels([moment], pa.timestamp(u)) for u in ("s", "ns", "us")])
        assert len(union) == 1
        assert [p.tolist() for p in positions] == [[0]] * 3
        paris = pa.array([moment], pa.timestamp("us", "Europe/Paris"))
        union, _ = align([labels(paris), labels(paris.cast(pa.timestamp("us", "Asia/Tokyo")))])
        assert len(union) == 1
        with pytest.raises(DataError, match="timestamp"):
            align([labels(paris), labels([moment])])

    def test_timestamp_too_far_for_the_finest_unit(self):
        far = labels([dt.datetime(9999, 1, 1)], pa.timestamp("s"))
        with pytest.raises(DataError, match=r"'g' does not fit type timestamp\[ns\]"):
            align([far, labels([dt.datetime(2020, 1, 1)], pa.timestamp("ns"))])

    @pytest.mark.parametrize(
        ("a", "b", "types"),
        [
            (["1"], [1], "string.*int64"),
            ([True], [1], "bool.*int64"),
            ([dt.date(2020, 1, 1)], ["2020-01-01"], r"date32\[day\].*string"),
        ],
    )
    def test_clash(self, a, b, types):
        with pytest.raises(DataError, match=f"'school' has type {types}"):
            align([labels(a, name="school"), labels(b, name="school")])

    def test_composite(self):
        a, b = pa.array(["x", "y", "x"]), pa.array([1, 1, 2])
        left = encode([a, b], ["a", "b"])[1]
        right = encode([pa.array(["x", "z"]), pa.array([2.0, np.nan])], ["a", "b"])[1]
        union, positions = align([left, right])
        assert values(union) == [("x", 1), ("y", 1), ("x", 2)]
        assert positions[1].tolist() == [2]

    def test_nothing_but_missing(self):
        union, positions = align([labels(pa.nulls(2)), labels([None], pa.string())])
        assert len(union) == 0
        assert [len(p) for p in positions] == [0, 0]
        assert len(sort_index(union)) == 0
        assert len(to_pandas(labels(pa.nulls(1)))) == 0

    def test_the_union_starts_with_the_first(self):
        """Integers close together too, which are numbered by size within a batch."""
        first, second = labels([3, 1]), labels([2, 0, 3])
        union, positions = align([first, second])
        assert values(union)[: len(first)] == values(first)
        assert positions[0].tolist() == [0, 1]
        assert [values(union)[i] for i in positions[1]] == values(second)

    def test_order_of_merging_does_not_matter(self):
        parts = [labels([1, 2]), labels([2.0, 3.0]), labels([0.5]), labels(pa.nulls(1))]
        left = align([align([align(parts[:2])[0], parts[2]])[0], parts[3]])[0]
        right = align([parts[0], align([parts[1], align(parts[2:])[0]])[0]])[0]
        for union in (left, right):
            assert union.take(sort_index(union)).arrays[0].to_pylist() == [0.5, 1.0, 2.0, 3.0]


class TestOrderAndUse:
    def test_canonical_order(self):
        assert values(ordered(labels([10, 9, -1]))) == [-1, 9, 10]
        assert values(ordered(labels(["b", "é", "", "B", "10", "9"]))) == [
            "", "10", "9", "B", "b", "é",
        ]  # fmt: skip
        beyond = ["\ue000", "\U00010000", "a"]  # UTF-16 would order these otherwise
        assert values(ordered(labels(beyond))) == sorted(beyond)
        assert values(ordered(labels([True, False]))) == [False, True]
        assert values(ordered(labels([2**64 - 1, 3], pa.uint64()))) == [3, 2**64 - 1]

    def test_canonical_order_of_composites(self):
        keys = encode([pa.array([2, 1, 1]), pa.array(["a", "b", "a"])], ["i", "s"])[1]
        assert values(ordered(keys)) == [(1, "a"), (1, "b"), (2, "a")]
        assert sort_index(keys).dtype == np.int64

    def test_to_pandas(self):
        index = to_pandas(labels([2**53 + 1, 2]))
        assert index.tolist() == [2**53 + 1, 2]
        assert index.name == "g"
        assert isinstance(to_pandas(labels(["a", ""]))[1], str)
        assert to_pandas(labels(["a", ""])).tolist() == ["a", ""]
        assert to_pandas(labels([2**64 - 1], pa.uint64())).tolist() == [2**64 - 1]
        assert to_pandas(labels([True])).tolist() == [True]
        day = dt.date(2020, 1, 1)
        assert to_pandas(labels([day])).tolist() == [day]
        moment = dt.datetime(2020, 1, 1)
        assert to_pandas(labels([moment])).tolist() == [pd.Timestamp(moment)]

    def test_to_pandas_composite(self):
        index = to_pandas(encode([pa.array(["x"]), pa.array([1])], ["a", "b"])[1])
        assert isinstance(index, pd.MultiIndex)
        assert list(index.names) == ["a", "b"]
        assert index.tolist() == [("x", 1)]

    @pytest.mark.parametrize("lookup", [lookup, lookup_few])
    def test_lookup(self, lookup):
        known = labels(["b", "a", "c"])
        assert lookup(known, labels(["c", "zz", "b"])).tolist() == [2, -1, 0]
        assert lookup(labels([1, 2]), labels([2.0, 1.5, np.nan])).tolist() == [1, -1]
        assert lookup(labels([1, 2]), labels(pa.nulls(1))).tolist() == []
        with pytest.raises(DataError, match="'g' has type string"):
            lookup(known, labels([1]))

    @pytest.mark.parametrize("lookup", [lookup, lookup_few])
    def test_lookup_of_integers_between(self, lookup):
        found = labels([3, 1])
        assert lookup(found, labels([0, 2])).tolist() == [-1, -1]
        merged, _ = align([labels([5, 4]), labels([1, 2, 3])])
        queries = labels([2, 6, 5, 4, 0])
        at = lookup(merged, queries)
        expected = [values(merged).index(x) if x in values(merged) else -1 for x in values(queries)]
        assert at.tolist() == expected

    def test_few_queries_of_several_columns(self):
        columns = [pa.array(["a", "a", "b", "b"]), pa.array([1, 2, 1, 3])]
        known = encode(columns, ["a", "b"])[1]
        asked = encode([pa.array(["b", "b", "a", "c"]), pa.array([2, 3, 2, 1])], ["a", "b"])[1]
        assert lookup_few(known, asked).tolist() == lookup(known, asked).tolist() == [-1, 3, 1, -1]
        assert lookup_few(known.first(0), asked).tolist() == [-1] * 4
        assert lookup_few(known, asked.first(0)).tolist() == []
        days = labels(pa.array([0, 86_400], pa.timestamp("s")))
        assert lookup_few(days, labels(pa.array([86_400_000], pa.timestamp("ms")))).tolist() == [1]

    def test_take_and_pickle(self):
        keys = labels(pa.array([f"group {i}" for i in range(10_000)]))
        few = keys.take(np.array([3, 1]))
        assert values(few) == ["group 3", "group 1"]
        assert len(pickle.dumps(few)) < 1000
        assert pickle.loads(pickle.dumps(few)) == few


def ordered(labels: Labels) -> Labels:
    """Labels in canonical order."""
    return labels.take(sort_index(labels))


class TestSubset:
    cells = encode(
        [
            pa.array(["b", "a", "b", "a", None, "b"]),
            pa.array([1, 1, 2, 1, 3, 1]),
            pa.array([2.5, 0.5, 2.5, -0.5, 0.5, 0.5]),
        ],
        ["g", "h", "k"],
    )[1]

    def test_projections_in_order_of_first_appearance(self):
        assert len(self.cells) == 5
        codes, found = subset(self.cells, [0])
        assert codes.tolist() == [0, 1, 0, 1, 0]
        assert codes.dtype == np.int64
        assert values(found) == ["b", "a"]
        codes, found = subset(self.cells, [2, 0])
        assert found.names == ("k", "g")
        assert values(found) == [(2.5, "b"), (0.5, "a"), (-0.5, "a"), (0.5, "b")]
        assert codes.tolist() == [0, 1, 0, 2, 3]

    @pytest.mark.parametrize("positions", [(0, 1, 2), (2, 0, 1)])
    def test_all_columns(self, positions):
        codes, found = subset(self.cells, positions)
        assert codes.tolist() == [0, 1, 2, 3, 4]
        assert codes.dtype == np.int64
        assert found.names == tuple(self.cells.names[j] for j in positions)
        assert all(found.arrays[i] is self.cells.arrays[j] for i, j in enumerate(positions))

    @pytest.mark.parametrize("whole", [-(2**63), 2**64 - 1, 2**53 + 1])
    def test_types_stay(self, whole):
        type = pa.uint64() if whole >= 2**63 else pa.int64()
        columns = [pa.array([whole, 5, whole], type), pa.array([1, 2, 3])]
        cells = encode(columns, ["g", "h"])[1]
        codes, found = subset(cells, [0])
        assert values(found) == [whole, 5]
        assert found.arrays[0].type == cells.arrays[0].type
        assert codes.tolist() == [0, 1, 0]

    def test_no_labels(self):
        cells = encode([pa.array([], pa.string()), pa.array([], pa.int8())], ["g", "h"])[1]
        codes, found = subset(cells, [1])
        assert len(codes) == len(found) == 0
