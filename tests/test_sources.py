"""Sources: any kind of data gives the same rows, and only what is used is read."""

from __future__ import annotations

import datetime as dt
import pickle
import time
from decimal import Decimal
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dmixed import keys
from dmixed.errors import DataError
from dmixed.sources import base, load, memory, open_source, stream

ROWS = {
    "y": [1.0, 2.5, None, -4.0, 5.0],
    "n": [1, 2, 3, 4, 2**53 + 1],
    "g": ["a", "", "NA", None, "é"],
    "unused": [0, 0, 0, 0, 0],
}
WANTED = ["y", "n", "g"]


def table() -> pa.Table:
    """Five rows."""
    return pa.table(ROWS)


def read(data, columns=tuple(WANTED), **options) -> pa.Table:
    """All rows, through parts that have travelled."""
    source = open_source(data, **options)
    tables = []
    for part in source.parts(columns):
        assert part.columns == tuple(columns)
        if source.kind == "dask":
            rows = load(part, part.task.compute(scheduler="sync"))
        else:
            rows = load(pickle.loads(pickle.dumps(part)))
        assert rows.column_names == list(columns)
        assert part.rows in (None, len(rows))
        tables.append(rows)
    return pa.concat_tables(tables, promote_options="permissive")


def rows_of(table: pa.Table) -> dict:
    """Rows as Python objects, NaN taken as null."""
    return {
        name: [None if x != x else x for x in values] for name, values in table.to_pydict().items()
    }


def expected(columns=WANTED) -> dict:
    return {name: ROWS[name] for name in columns}


class TestEveryKind:
    """The same rows whatever holds them."""

    def check(self, data, kind, **options):
        source = open_source(data, **options)
        assert source.kind == kind
        assert source.columns == tuple(ROWS)
        assert rows_of(read(data, **options)) == expected()
        assert rows_of(read(data, ["g", "y"], **options)) == expected(["g", "y"])
        head = source.head(WANTED, 2)
        assert head.column_names == WANTED
        assert len(head) == 2
        everything = source.head(WANTED, 1000)
        assert rows_of(everything) == expected()
        return source

    def test_pandas(self):
        frame = table().to_pandas().set_index(pd.Index(list("vwxyz")))
        source = self.check(frame, "pandas")
        assert source.index().tolist() == list("vwxyz")

    def test_pandas_backed_by_arrow_or_nullable(self):
        self.check(table().to_pandas(types_mapper=pd.ArrowDtype), "pandas")
        self.check(table().to_pandas().convert_dtypes(), "pandas")
        self.check(table().to_pandas().astype({"g": object}), "pandas")

    def test_arrow(self):
        self.check(table(), "arrow")
        self.check(pa.concat_tables([table().slice(0, 2), table().slice(2)]), "arrow")
        self.check(table().to_batches()[0], "arrow")
        self.check(ds.dataset(table()), "arrow")

    def test_whatever_exports_an_arrow_stream(self):
        class Stream:
            def __arrow_c_stream__(self, requested_schema=None):
                return table().__arrow_c_stream__(requested_schema)

        self.check(Stream(), "arrow")

    def test_polars(self):
        pl = pytest.importorskip("polars")
        frame = pl.from_arrow(table())
        self.check(frame, "polars")
        self.check(frame.lazy(), "polars")

    def test_dask(self):
        dd = pytest.importorskip("dask.dataframe")
        frame = table().to_pandas()
        for npartitions in (1, 2, 5):
            self.check(dd.from_pandas(frame, npartitions=npartitions, sort=False), "dask")

    def test_parquet_file(self, tmp_path):
        pq.write_table(table(), tmp_path / "f.parquet", row_group_size=2)
        self.check(tmp_path / "f.parquet", "parquet")
        self.check(str(tmp_path / "f.parquet"), "parquet")
        self.check((tmp_path / "f.parquet").as_uri(), "parquet")
        self.check(ds.dataset(tmp_path / "f.parquet"), "arrow")

    def test_parquet_folder_and_patterns(self, tmp_path, monkeypatch):
        (tmp_path / "sub").mkdir()
        pq.write_table(table().slice(0, 2), tmp_path / "a.parquet")
        pq.write_table(table().slice(2, 0), tmp_path / "b.parquet")
        pq.write_table(table().slice(2, 1), tmp_path / "c.parquet")
        pq.write_table(table().slice(3), tmp_path / "sub" / "part-0")
        self.check(tmp_path, "parquet")
        self.check(f"{tmp_path}/", "parquet")
        self.check(f"{tmp_path}/*", "parquet")
        self.check(f"{tmp_path}/**/[a-p]*", "parquet")
        self.check(ds.dataset(tmp_path), "arrow")
        monkeypatch.chdir(tmp_path.parent)
        self.check(tmp_path.name, "parquet")
        assert rows_of(read(f"{tmp_path}/?.parquet", ["g"])) == {"g": ROWS["g"][:3]}

    def test_dataset_of_another_format(self, tmp_path):
        feather = pytest.importorskip("pyarrow.feather")
        feather.write_feather(table(), tmp_path / "f.arrow")
        self.check(ds.dataset(tmp_path / "f.arrow", format="feather"), "arrow")


class TestColumns:
    """Names, types and conversions."""

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "parquet", "dask"])
    def test_unknown_column(self, kind, tmp_path):
        source = open_source(as_kind(kind, table(), tmp_path))
        for ask in (lambda: source.parts(["y", "weight"]), lambda: source.head(["weight"], 5)):
            with pytest.raises(DataError, match=r"'weight' is not in the data.*y, n, g, unused"):
                ask()

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "parquet"])
    def test_duplicate_names_matter_only_where_used(self, kind, tmp_path):
        twice = pa.table([[1.0], [2.0], [3.0]], names=["x", "x", "y"])
        data = twice
        if kind == "pandas":
            data = pd.DataFrame([[1.0, 2.0, 3.0]], columns=["x", "x", "y"])
        if kind == "parquet":
            data = as_kind(kind, twice, tmp_path)
        assert read(data, ["y"]).to_pydict() == {"y": [3.0]}
        with pytest.raises(DataError, match="'x' occurs 2 times"):
            open_source(data).parts(["y", "x"])

    def test_names_with_dots_and_other_labels(self, tmp_path):
        dotted = pa.table({"a.b": [1], "a": [{"b": 2}], "mein Wert": [3]})
        assert read(dotted, ["a.b", "mein Wert"]).to_pydict() == {"a.b": [1], "mein Wert": [3]}
        path = as_kind("parquet", dotted, tmp_path)
        assert read(path, ["a.b", "mein Wert"]).to_pydict() == {"a.b": [1], "mein Wert": [3]}
        assert read(pd.DataFrame({"x": [1], 7: [2]}), ["x"]).to_pydict() == {"x": [1]}

    def test_floats_are_shared_not_copied(self):
        frame = pd.DataFrame({"x": np.arange(10.0), "n": np.arange(10)})
        (part,) = open_source(frame).parts(["x", "n"])
        for name in ("x", "n"):
            column = load(part).column(name).chunk(0).to_numpy()
            shared = np.shares_memory(column, frame[name].to_numpy())
            assert shared == memory._copy_on_write()  # before, a later change would show through

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            (np.array([1.5, np.nan]), pa.float64()),
            (np.array([1, 2], np.uint64), pa.uint64()),
            (np.array([True, False]), pa.bool_()),
            (pd.array([1, None], dtype="Int64"), pa.int64()),
            (pd.array([1, None], dtype="UInt8"), pa.uint8()),
            (pd.array([1.5, None], dtype="Float32"), pa.float32()),
            (pd.array([True, None], dtype="boolean"), pa.bool_()),
            (np.array([True, None], dtype=object), pa.bool_()),
            (np.array([dt.date(2020, 1, 1), None], dtype=object), pa.date32()),
            (np.array([Decimal("1.5"), None], dtype=object), pa.decimal128(2, 1)),
            (pd.to_datetime(["2020-01-01", None]).as_unit("us"), pa.timestamp("us")),
            (pd.arrays.SparseArray([0.0, 1.5]), pa.float64()),
            (np.array([None, None], dtype=object), pa.null()),
            (pd.Categorical([1, 2]), pa.dictionary(pa.int8(), pa.int64())),
        ],
        ids=lambda x: str(getattr(x, "dtype", x)),
    )
    def test_pandas_types(self, values, kind):
        column = read(pd.DataFrame({"x": values}), ["x"]).schema.field("x").type
        assert column == kind

    def test_nan_is_kept_where_it_is_not_null(self):
        column = read(pd.DataFrame({"x": [1.0, np.nan]}), ["x"]).column("x")
        assert column.null_count == 0
        assert np.isnan(column[1].as_py())

    def test_categories_keep_their_order(self):
        data = pd.DataFrame({"c": pd.Categorical(["b", "a"], ["z", "b", "a"], ordered=True)})
        column = read(data, ["c"]).column("c")
        assert column.chunk(0).dictionary.to_pylist() == ["z", "b", "a"]

    @pytest.mark.parametrize(
        "values",
        [
            np.array([1, "a"], dtype=object),
            np.array(["a", 1.5], dtype=object),
            np.array([True, 1], dtype=object),
            np.array([1, 2**64], dtype=object),
            np.array([Ellipsis], dtype=object),
            np.array([1 + 2j]),
            pd.Categorical([1, "a"]),
        ],
        ids=str,
    )
    def test_pandas_refusals_name_the_column(self, values):
        source = open_source(pd.DataFrame({"bad": values, "x": range(len(values))}))
        assert len(read(pd.DataFrame({"bad": values, "x": range(len(values))}), ["x"]))
        with pytest.raises(DataError, match="column 'bad' h"):
            source.parts(["x", "bad"])

    def test_polars_types(self):
        pl = pytest.importorskip("polars")
        frame = pl.DataFrame(
            {
                "e": pl.Series(["u", "v"], dtype=pl.Enum(["v", "u", "w"])),
                "c": pl.Series(["u", None], dtype=pl.Categorical),
                "d": [dt.date(2020, 1, 1), None],
                "u": pl.Series([2**64 - 1, None], dtype=pl.UInt64),
                "z": [None, None],
            }
        )
        found = read(frame, frame.columns)
        assert found.to_pydict() == frame.to_dict(as_series=False)
        assert found.column("e").chunk(0).dictionary.to_pylist() == ["v", "u", "w"]
        for name in frame.columns:
            keys.encode([found.column(name)], [name])

    def test_polars_reads_only_what_is_used(self):
        pl = pytest.importorskip("polars")

        def refuse(_):
            raise AssertionError

        lazy = pl.LazyFrame({"x": [1], "y": [2]}).with_columns(
            pl.col("y").map_batches(refuse, return_dtype=pl.Int64)
        )
        assert read(lazy, ["x"]).to_pydict() == {"x": [1]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (3, "type int cannot be read; pass a pandas"),
            ([[1, 2]], "type list"),
            ("", "the path is empty"),
            (np.zeros((2, 2)), "type numpy.ndarray"),
            (pd.Series([1.0], name="x"), r"type .*Series"),
            (pa.RecordBatchReader.from_batches(pa.schema([]), []), "only once"),
            ("rows.csv", "rows.csv: paths are read as Parquet, not .csv"),
            ("rows.csv.gz", "not .csv"),
            ("/nowhere/at/all.parquet", "no Parquet file found at /nowhere/at/all.parquet"),
            ("/nowhere/*.parquet", "no Parquet file found"),
            ("noprotocol://bucket/key", "cannot reach noprotocol://bucket/key"),
        ],
        ids=lambda x: None if isinstance(x, str) else type(x).__name__,
    )
    def test_types_and_paths(self, data, message):
        with pytest.raises(DataError, match=message):
            open_source(data)

    def test_dask_collections_that_are_not_frames(self):
        dd = pytest.importorskip("dask.dataframe")
        frame = dd.from_pandas(pd.DataFrame({"x": [1.0]}), npartitions=1)
        for data in (frame["x"], frame.to_dask_array(lengths=True), frame.to_bag()):
            with pytest.raises(DataError, match="type dask"):
                open_source(data)

    def test_filtered_dataset(self):
        with pytest.raises(DataError, match="cannot be read in parts"):
            open_source(ds.dataset(table()).filter(ds.field("n") > 2))

    def test_storage_options_without_a_path(self):
        with pytest.raises(DataError, match="storage_options go with a path"):
            open_source(table(), storage_options={"anon": True})

    def test_credentials_are_not_repeated(self):
        with pytest.raises(DataError) as caught:
            open_source("nope://user:hunter22@host/key?sig=s3cret", {"secret": "hunter22"})
        assert "hunter22" not in str(caught.value)
        assert "nope://host/key" in str(caught.value)

    def test_other_table_formats(self, tmp_path):
        pq.write_table(table(), tmp_path / "f.parquet")
        (tmp_path / "_delta_log").mkdir()
        (tmp_path / "_delta_log" / "0.json").touch()
        with pytest.raises(DataError, match=r"Delta table"):  # without deltalake, or with
            open_source(tmp_path)
        (tmp_path / "_delta_log").rename(tmp_path / ".hoodie")
        with pytest.raises(DataError, match="is a Hudi table"):
            open_source(tmp_path)
        (tmp_path / ".hoodie").rename(tmp_path / "metadata")
        (tmp_path / "metadata" / "0.json").rename(tmp_path / "metadata" / "v1.metadata.json")
        with pytest.raises(DataError, match="is an Iceberg table"):
            open_source(tmp_path)


class TestMemoryParts:
    def test_slices_pickle_alone(self, monkeypatch):
        monkeypatch.setattr(base, "ROWS", 100)
        data = pa.table({"x": np.arange(10_000.0), "g": [f"group {i}" for i in range(10_000)]})
        parts = open_source(data).parts(["x", "g"])
        assert [p.rows for p in parts] == [100] * 100
        assert parts[1].name == "rows 100-199"
        assert len(pickle.dumps(parts[1])) < 5000
        assert load(pickle.loads(pickle.dumps(parts[1]))) == data.slice(100, 100)
        assert rows_of(read(data, ["g", "x"])) == rows_of(data.select(["g", "x"]))

    def test_parts_are_smaller_when_there_are_many_columns(self, monkeypatch):
        monkeypatch.setattr(base, "CELLS", 100)
        data = pa.table({f"x{i}": np.arange(50.0) for i in range(10)})
        assert [p.rows for p in open_source(data).parts(data.column_names)] == [10] * 5

    def test_head_is_strided(self):
        source = open_source(pd.DataFrame({"x": np.arange(1000)}))
        assert source.head(["x"], 10).column("x").to_pylist() == list(range(0, 1000, 100))
        assert len(source.head(["x"], 300)) <= 300

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "parquet", "dask"])
    def test_no_rows(self, kind, tmp_path):
        empty = table().slice(0, 0)
        data = as_kind(kind, empty, tmp_path)
        assert len(read(data)) == 0
        assert open_source(data).head(WANTED, 10).column_names == WANTED
        assert len(open_source(data).parts(WANTED)) >= 1

    def test_later_changes_of_a_frame_are_not_seen(self):
        columns = ["x", "n", "c", "i", "s"]
        frame = pd.DataFrame(
            {
                "x": [1.0, 2.0],
                "n": [1, 2],
                "c": pd.Categorical(["a", "b"]),
                "i": pd.array([1, 2], "Int64"),
                "s": ["a", "b"],
            }
        )
        before = pa.Table.from_pandas(frame, preserve_index=False).to_pydict()
        early, late = open_source(frame), open_source(frame)
        parts = early.parts(columns)
        frame.loc[:, "x"] = 0.0
        frame.iloc[0, 1] = 7
        frame.loc[0, "c"] = "b"
        frame.loc[:, "i"] = 0
        frame.loc[0, "s"] = "z"
        frame["x"] = 3.0
        assert load(parts[0]).to_pydict() == before
        assert load(early.parts(columns[:2])[0]).to_pydict() == {k: before[k] for k in columns[:2]}
        if memory._copy_on_write():
            assert load(late.parts(columns)[0]).to_pydict() == before

    def test_frames_without_copy_on_write_are_copied(self, monkeypatch):
        monkeypatch.setattr(memory, "_copy_on_write", lambda: False)
        frame = pd.DataFrame({"x": np.arange(10.0), "n": np.arange(10)})
        (part,) = open_source(frame).parts(["x", "n"])
        for name in ("x", "n"):
            column = load(part).column(name).chunk(0).to_numpy()
            assert column.tolist() == frame[name].tolist()
            assert not np.shares_memory(column, frame[name].to_numpy())

    def test_later_changes_of_a_polars_frame_are_not_seen(self):
        pl = pytest.importorskip("polars")
        frame = pl.DataFrame({"x": [1.0, 2.0]})
        source = open_source(frame)
        frame[0, "x"] = 7.0
        assert load(source.parts(["x"])[0]).to_pydict() == {"x": [1.0, 2.0]}

    def test_uncommon_storage(self):
        values = ["a", "a", None, "b"]
        data = pa.table(
            {
                "view": pa.array(values, pa.string_view()),
                "runs": pc.run_end_encode(pa.array(values)),
                "numbers": pc.run_end_encode(pa.array([1, 1, 2, None])),
            }
        )
        source = open_source(pa.concat_tables([data, data]))
        head = source.head(data.column_names, 4)
        assert head.to_pydict() == {k: v[::2] * 2 for k, v in data.to_pydict().items()}
        assert head.schema.types == [pa.large_string(), pa.string(), pa.int64()]
        assert read(data, data.column_names).to_pydict() == data.to_pydict()

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "polars", "lazy", "dask", "parquet"])
    def test_sources_pickle(self, kind, tmp_path):
        if kind in ("polars", "lazy"):
            data = pytest.importorskip("polars").from_arrow(table())
            data = data.lazy() if kind == "lazy" else data
        else:
            data = as_kind(kind, table(), tmp_path)
        source = open_source(data)
        for _ in range(2):  # before and after a conversion
            again = pickle.loads(pickle.dumps(source))
            assert again.columns == source.columns
            assert rows_of(again.head(WANTED, 10)) == expected()
            source.parts(WANTED)

    def test_duplicate_index(self):
        frame = pd.DataFrame({"x": [1, 2]}, index=["same", "same"])
        assert read(frame, ["x"]).to_pydict() == {"x": [1, 2]}


class TestDask:
    dd = pytest.importorskip("dask.dataframe")

    def test_head_walks_past_empty_partitions(self):
        frame = pd.DataFrame({"x": np.arange(100.0), "g": ["a"] * 100})
        data = self.dd.from_pandas(frame, npartitions=10, sort=False)
        source = open_source(data[data["x"] >= 55])
        assert source.head(["g", "x"], 8).column("x").to_pylist() == list(range(55, 63))
        assert len(source.head(["x"], 1000)) == 45
        assert len(open_source(data[data["x"] < 0]).head(["x"], 10)) == 0

    def test_only_needed_columns_are_read(self):
        asked = []

        def make(i, columns=None):
            asked.append(tuple(columns or ()))
            return pd.DataFrame({c: [float(i)] for c in columns or "abcd"})

        data = self.dd.from_map(make, range(3), meta=pd.DataFrame({c: [0.0] for c in "abcd"}))
        asked.clear()
        assert read(data, ["c", "a"]).to_pydict() == {"c": [0.0, 1.0, 2.0], "a": [0.0, 1.0, 2.0]}
        assert {frozenset(x) for x in asked} == {frozenset("ac")}

    def test_partition_is_named_in_errors(self):
        frames = [pd.DataFrame({"x": [1.0], "g": [x]}) for x in ("a", 1 + 2j)]
        data = self.dd.from_delayed(
            [dask.delayed(f) for f in frames], meta=frames[0], verify_meta=False
        )
        part = open_source(data).parts(["g", "x"])[1]
        with pytest.raises(DataError, match=r"partition 1: column 'g'"):
            load(part, part.task.compute(scheduler="sync"))

    def test_keys_agree_whatever_type_nulls_force(self):
        frames = [
            pd.DataFrame({"g": [1, 2], "b": [True, False]}),
            pd.DataFrame({"g": [2, np.nan], "b": [True, None]}),
            pd.DataFrame({"g": [None, None], "b": [None, None]}),
            pd.DataFrame({"g": pd.array([3, None], "Int64"), "b": pd.array([True, None])}),
            pd.DataFrame({"g": pd.Series([4, None], dtype=object), "b": [None, False]}),
            pd.DataFrame({"g": [], "b": []}),
        ]
        data = self.dd.from_map(lambda i: frames[i], range(6), meta=frames[0])
        parts = open_source(data).parts(["g", "b"])
        rows = [load(p, p.task.compute(scheduler="sync")) for p in parts]
        for name, found in (("g", [1, 2, 3, 4]), ("b", [True, False])):
            labels = [keys.encode([r.column(name)], [name])[1] for r in rows]
            assert keys.align(labels)[0].arrays[0].to_pylist() == found
        assert open_source(data).head(["g", "b"], 100).column("g").to_pylist()[:3] == [1, 2, 2]

    def frame(self, *frames):
        """Dask DataFrame of these partitions, unchecked."""
        return self.dd.from_delayed(
            [dask.delayed(f) for f in frames], meta=frames[0].head(0), verify_meta=False
        )

    def rows(self, data, columns):
        """Rows of each partition."""
        parts = open_source(data).parts(columns)
        return [load(p, p.task.compute(scheduler="sync")) for p in parts]

    VALUES = pytest.mark.parametrize(
        "values",
        [
            np.array(["a", "b"], dtype=object),
            pd.array(["a", "b"], dtype="string"),
            np.array([True, False]),
            np.array([dt.date(2020, 1, 1), dt.date(2020, 1, 2)], dtype=object),
            pd.to_datetime(["2020-01-01", "2020-01-02"]),
            pd.Categorical(["b", "a"]),
            np.array([1.5, 2.5]),
            np.array([2**60, 2**60 + 1]),
            pd.array([2**60, 2**60 + 1], "Int64"),
        ],
        ids=lambda x: str(x.dtype),
    )

    @VALUES
    @pytest.mark.parametrize("missing", [np.nan, None, pd.NaT, "own"])
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("rows", [1, 100])
    def test_partition_without_a_value(self, values, missing, first, rows):
        full = pd.DataFrame({"g": values, "x": [1.0, 2.0]})
        empty = full.assign(g=full["g"].where([False, False]) if missing == "own" else missing)
        frames = [empty, full] if first else [full, empty]
        data = self.dd.from_delayed(
            [dask.delayed(f) for f in frames], meta=full.head(0), verify_meta=False
        )
        nulls, kept = self.rows(data, ["x", "g"])[:: 1 if first else -1]
        assert pa.types.is_null(nulls.column("g").type)
        head = open_source(data).head(["x", "g"], rows)
        assert head.column_names == ["x", "g"]
        assert len(head) == min(rows, 4)
        wanted = kept.column("g").to_pylist()
        found = head.column("g").to_pylist()
        assert [x for x in found if x is not None] == wanted[:rows]
        assert head.column("g").type.equals(kept.column("g").type)

    def test_head_looks_for_values(self):
        a = pd.DataFrame({"x": np.arange(50.0), "g": np.r_[[np.nan] * 40, np.arange(10.0)]})
        head = open_source(self.frame(a)).head(["x", "g"], 8)
        assert head.column("x").to_pylist() == list(range(40, 48))
        head = open_source(self.frame(a)).head(["x", "g"], 12)
        assert head.column("x").to_pylist() == [0, 1, *range(40, 50)]
        nothing = open_source(self.frame(*[a.assign(g=np.nan)] * 9)).head(["x", "g"], 8)
        assert nothing.column("x").to_pylist() == list(range(8))
        assert pa.types.is_null(nothing.column("g").type)

    @pytest.mark.parametrize("how", ["from_delayed", "from_map"])
    @pytest.mark.parametrize("declared", [np.int64, np.float64, np.bool_])
    def test_text_is_never_a_number(self, how, declared):
        good = pd.DataFrame({"g": np.array([0, 1], declared), "s": ["a", "b"]})
        frames = [good, good.assign(g=["007", None])]
        data = (
            self.frame(*frames)
            if how == "from_delayed"
            else self.dd.from_map(lambda i: frames[i], range(2), meta=good)
        )
        for some in (data, data[data["s"] != "b"]):
            with pytest.raises(DataError) as caught:
                self.rows(some, ["s", "g"])
            with pytest.raises(DataError, match="partition 1: column 'g'"):
                open_source(some).head(["s", "g"], 100)
            for text in ("partition 1", "'g'", "string", np.dtype(declared).name):
                assert text in str(caught.value)

    def test_objects_that_dask_declares_to_be_text(self):
        frames = [
            pd.DataFrame({"d": [dt.date(2020, 1, i), None], "n": [i, 2]}, dtype=object).astype(
                {"n": int}
            )
            for i in (1, 2)
        ]
        data = self.dd.from_map(lambda i: frames[i], range(2), meta=frames[0])
        found = [r.column("d").to_pylist() for r in self.rows(data, ["n", "d"])]
        assert found == [[x or None for x in f["d"].astype("string").fillna("")] for f in frames]

    def test_types_that_clash_are_named(self):
        good = pd.DataFrame({"x": [1.0], "g": ["a"]})
        for value in (5, True, 1.5):
            with pytest.raises(DataError) as caught:
                open_source(self.frame(good, good.assign(g=value))).head(["x", "g"], 9)
            for text in ("'g'", "partition 0", "partition 1", "string", str(pa.scalar(value).type)):
                assert text in str(caught.value)

    def test_types_that_go_together(self):
        good = pd.DataFrame({"g": [2**60 + 1, 2]})
        for other, kind in (
            ([Decimal(1), Decimal(2)], pa.float64()),
            ([1.0, np.nan], pa.float64()),
            (np.array([1, 2], np.int8), pa.int64()),
            (pd.array([1, None], "UInt16"), pa.int64()),
        ):
            data = self.frame(good, pd.DataFrame({"g": other}))
            assert open_source(data).head(["g"], 9).column("g").type == kind
        one, two = (pd.DataFrame({"g": pd.Categorical(list(x))}) for x in ("ab", "bcd"))
        found = open_source(self.frame(one, two)).head(["g"], 9).column("g")
        assert found.to_pylist() == list("abbcd")

    def test_partition_without_a_column_is_named(self):
        frames = [pd.DataFrame({"x": [1.0], "g": ["a"]}), pd.DataFrame({"x": [1.0]})]
        delayed = self.frame(*frames)
        mapped = self.dd.from_map(lambda i: frames[i], range(2), meta=frames[0])
        for data in (delayed, mapped):
            with pytest.raises(DataError, match="partition 1: column 'g' is not in the data"):
                self.rows(data, ["x", "g"])
            with pytest.raises(DataError, match="partition 1: column 'g' is not in the data"):
                open_source(data).head(["x", "g"], 9)
            assert len(self.rows(data, ["x"])) == 2

    def test_graph_is_built_once(self, monkeypatch):
        built = []
        kind = self.dd.DataFrame
        build = kind.to_delayed
        monkeypatch.setattr(
            kind, "to_delayed", lambda self, *a, **k: built.append(1) or build(self, *a, **k)
        )
        made = []

        def make(i):
            made.append(i)
            return pd.DataFrame({"x": [float(i)] * 10, "g": ["a"] * 10})

        source = open_source(self.dd.from_map(make, range(20), meta=make(0)))
        made.clear()
        assert len(source.head(["x", "g"], 25)) == 25
        assert sorted(made) == [0, 1, 2]
        assert source.parts(["g", "x"])[0].columns == ("g", "x")
        assert len(source.parts(["x", "g"])) == 20
        assert len(built) == 1


class TestParquetFiles:
    def test_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(base, "ROWS", 10)
        data = pa.table({"x": np.arange(100.0)})
        for i, (start, rows) in enumerate([(0, 36), (36, 3), (39, 3), (42, 0), (42, 4), (46, 30)]):
            pq.write_table(data.slice(start, rows), tmp_path / f"{i}.parquet", row_group_size=4)
        parts = open_source(tmp_path).parts(["x"])
        names = [p.name.replace(f"{tmp_path}/", "") for p in parts]
        assert names[:4] == [f"0.parquet row groups {i}-{i + 1}" for i in (0, 2, 4, 6)]
        assert names[4] == "0.parquet row group 8 to 3.parquet"
        assert names[5] == "4.parquet to 5.parquet row group 0"
        assert all(p.rows <= 10 for p in parts)
        assert sum(p.rows for p in parts) == 76
        assert read(tmp_path, ["x"]).column("x").to_pylist() == list(range(76))
        assert all(len(pickle.dumps(p)) < 6000 for p in parts)

    def test_a_row_group_is_one_array(self, tmp_path):
        path = as_kind("parquet", pa.table({"x": np.arange(500_000.0)}), tmp_path)
        assert read(path, ["x"]).column("x").num_chunks == 1

    def test_any_filesystem_of_fsspec(self):
        fs = pytest.importorskip("fsspec").filesystem("memory")
        with fs.open("/lake/a.parquet", "wb") as file:
            pq.write_table(table(), file)
        (part,) = open_source("memory://lake").parts(["y"])
        assert part.name == "memory:///lake/a.parquet"
        assert rows_of(read("memory://lake/*.parquet")) == expected()

    def test_hive_folders(self, tmp_path):
        for folder, x in (("year=2019/site=a", 1), ("year=2020/site=B%20c", 2)):
            (tmp_path / folder).mkdir(parents=True)
            pq.write_table(pa.table({"x": [x]}), tmp_path / folder / "f.parquet")
        found = {"x": [1, 2], "year": [2019, 2020], "site": ["a", "B c"]}
        assert set(open_source(tmp_path).columns) == set(found)
        for location in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/year=*/**/*.parquet"):
            assert read(location, ["x", "year", "site"]).to_pydict() == found
            assert read(location, ["site"]).to_pydict() == {"site": ["a", "B c"]}
        assert read(ds.dataset(tmp_path, partitioning="hive"), ["year", "x"]).to_pydict() == {
            "year": [2019, 2020],
            "x": [1, 2],
        }
        assert open_source(tmp_path / "year=2019").columns == ("x", "site")

    def test_hive_null_and_mixed_values(self, tmp_path):
        for folder in ("g=1", "g=x", "g=__HIVE_DEFAULT_PARTITION__"):
            (tmp_path / folder).mkdir()
            pq.write_table(pa.table({"x": [1]}), tmp_path / folder / "f.parquet")
        assert read(tmp_path, ["g"]).to_pydict() == {"g": ["1", None, "x"]}

    def test_a_column_in_the_file_prevails_over_its_folder(self, tmp_path):
        (tmp_path / "g=7").mkdir()
        pq.write_table(pa.table({"g": ["007"], "x": [1]}), tmp_path / "g=7" / "f.parquet")
        assert open_source(tmp_path).columns == ("g", "x")
        assert read(tmp_path, ["g"]).to_pydict() == {"g": ["007"]}

    def test_hidden_files_are_passed_over(self, tmp_path):
        pq.write_table(table(), tmp_path / "f.parquet")
        for name in ("_SUCCESS", ".f.parquet.crc", "_metadata"):
            (tmp_path / name).write_bytes(b"no parquet")
        (tmp_path / "_temporary").mkdir()
        (tmp_path / "_temporary" / "g.parquet").write_bytes(b"no parquet")
        assert rows_of(read(tmp_path)) == expected()
        (tmp_path / "f.parquet").rename(tmp_path / "_f.parquet")
        with pytest.raises(DataError, match="no Parquet file found"):
            open_source(tmp_path)
        assert rows_of(read(tmp_path / "_f.parquet")) == expected()  # asked for by name

    def test_name_with_wildcard_characters(self, tmp_path):
        pq.write_table(table(), tmp_path / "f[1].parquet")
        assert rows_of(read(tmp_path / "f[1].parquet")) == expected()

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"a,b\n1,2\n" * 10, "truncated"])
    def test_broken_file_is_named(self, content, tmp_path):
        pq.write_table(table(), tmp_path / "a.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
        content = whole[: len(whole) // 2] if content == "truncated" else content
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.parquet cannot be read: Parquet"):
            open_source(tmp_path).parts(["y"])
        with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
            open_source(tmp_path / "b.parquet")

    def test_broken_rows_are_named(self, tmp_path):
        pq.write_table(table(), tmp_path / "a.parquet")
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[4:60] = bytes(56)
        (tmp_path / "a.parquet").write_bytes(content)
        (part,) = open_source(tmp_path).parts(["y"])
        with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
            load(part)

    def test_file_that_went_away(self, tmp_path):
        path = as_kind("parquet", table(), tmp_path)
        (part,) = open_source(path).parts(["y"])
        Path(path).unlink()
        with pytest.raises(DataError, match=r"f\.parquet cannot be read"):
            load(part)

    def test_only_needed_columns_are_read(self, tmp_path):
        """The bytes of the other columns are destroyed, and nobody notices."""
        path = as_kind("parquet", table(), tmp_path)
        group = pq.read_metadata(path).row_group(0)
        content = bytearray(Path(path).read_bytes())
        for i in range(group.num_columns):
            chunk = group.column(i)
            if chunk.path_in_schema not in ("y", "g"):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                content[start : start + chunk.total_compressed_size] = bytes(
                    chunk.total_compressed_size
                )
        Path(path).write_bytes(content)
        assert rows_of(read(path, ["y", "g"])) == expected(["y", "g"])
        assert rows_of(open_source(path).head(["g"], 9)) == expected(["g"])
        with pytest.raises(DataError, match="cannot be read"):
            read(path, ["unused"])

    def test_planning_reads_no_rows(self, tmp_path):
        path = as_kind("parquet", table(), tmp_path)
        content = bytearray(Path(path).read_bytes())
        content[4:40] = bytes(36)
        Path(path).write_bytes(content)
        assert [p.rows for p in open_source(path).parts(WANTED)] == [5]

    def test_missing_column_names_the_file(self, tmp_path):
        pq.write_table(table(), tmp_path / "a.parquet")
        pq.write_table(table().drop_columns(["n"]), tmp_path / "b.parquet")
        assert rows_of(read(tmp_path, ["y"])) == {"y": ROWS["y"] * 2}
        for data in (tmp_path, ds.dataset(tmp_path)):
            with pytest.raises(DataError, match=r"b\.parquet has no column 'n', which .*has"):
                open_source(data).parts(["y", "n"])

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (pa.int64(), pa.float64()),
            (pa.int64(), pa.string()),
            (pa.string(), pa.date32()),
            (pa.bool_(), pa.int8()),
            (pa.timestamp("us"), pa.timestamp("us", "UTC")),
            (pa.decimal128(5, 1), pa.float64()),
        ],
        ids=str,
    )
    def test_other_type_names_file_column_and_types(self, first, second, tmp_path):
        for name, kind in (("a", first), ("b", second), ("c", second)):
            pq.write_table(
                pa.table({"x": pa.array([None], kind), "y": [1]}), tmp_path / f"{name}.parquet"
            )
        assert read(tmp_path, ["y"]).num_rows == 3
        with pytest.raises(DataError) as caught:
            open_source(tmp_path).parts(["x"])
        for text in ("'x'", "b.parquet", "a.parquet", str(first), str(second)):
            assert text in str(caught.value)

    @pytest.mark.parametrize(
        ("columns", "kind"),
        [
            ([pa.array([1], pa.int32()), pa.array([2**40])], pa.int64()),
            ([pa.array([1], pa.uint8()), pa.array([2], pa.int16())], pa.int64()),
            ([pa.array([0.5], pa.float32()), pa.array([0.1])], pa.float64()),
            ([pa.array(["a"]), pa.array(["b"]).dictionary_encode()], pa.large_string()),
            ([pa.array(["a"], pa.large_string()), pa.array(["b"])], pa.large_string()),
            ([pa.nulls(1), pa.array(["b"]), pa.nulls(1)], pa.string()),
            ([pa.nulls(1), pa.array([1]), pa.nulls(1)], pa.int64()),
            ([pa.array([0], pa.timestamp(u)).cast(pa.timestamp(u)) for u in ("ms", "us")],
             pa.timestamp("us")),
            ([pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()],
             pa.dictionary(pa.int32(), pa.string())),
        ],
        ids=lambda x: str(x) if isinstance(x, pa.DataType) else "",
    )  # fmt: skip
    def test_compatible_types_are_joined(self, columns, kind, tmp_path):
        for i, column in enumerate(columns):
            pq.write_table(pa.table({"x": column}), tmp_path / f"{i}.parquet")
        found = read(tmp_path, ["x"]).column("x")
        assert found.type == kind
        assert found.to_pylist() == [x for c in columns for x in c.to_pylist()]

    def test_value_beyond_the_joined_type(self, tmp_path):
        pq.write_table(pa.table({"x": pa.array([-1])}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"x": pa.array([2**64 - 1], pa.uint64())}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match=r"b\.parquet cannot be read.*18446744073709551615"):
            read(tmp_path, ["x"])

    def test_head_of_many_small_files(self, tmp_path):
        for i in range(20):
            pq.write_table(pa.table({"x": [i] * (i % 3)}), tmp_path / f"{i:02}.parquet")
        source = open_source(tmp_path)
        assert source.head(["x"], 5).column("x").to_pylist() == [1, 2, 2, 4, 5]
        assert len(source.head(["x"], 100)) == 19
        assert len(source.parts(["x"])) == 1


@pytest.fixture(scope="module")
def s3():
    """S3 file system of a server on this machine, and its options."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import fsspec

    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "AKIDEXAMPLE",
        "secret": "wJalrXUtnFEMI",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
    }
    fs = fsspec.filesystem("s3", **options)
    fs.mkdir("lake")
    with fs.open("lake/t/year=2020/a.parquet", "wb") as file:
        pq.write_table(table().slice(0, 3), file)
    with fs.open("lake/t/year=2021/b.parquet", "wb") as file:
        pq.write_table(table().slice(3), file)
    yield fs, options
    server.stop()


class TestObjectStore:
    """S3 through fsspec, against moto's server."""

    @pytest.mark.parametrize(
        "location", ["lake/t", "lake/t/", "lake/t/*", "lake/t/year=*/?.parquet"]
    )
    def test_folders_and_patterns(self, s3, location):
        found = read(f"s3://{location}", [*WANTED, "year"], storage_options=s3[1])
        assert rows_of(found) == expected() | {"year": [2020] * 3 + [2021] * 2}

    def test_file_and_names(self, s3):
        source = open_source("s3://lake/t/year=2021/b.parquet", s3[1])
        (part,) = source.parts(["y"])
        assert part.name == "s3://lake/t/year=2021/b.parquet"
        assert len(pickle.dumps(part)) < 5000
        assert source.head(["y"], 1).column("y").to_pylist() == [-4.0]

    @pytest.mark.parametrize("location", ["nobucket/t", "lake/nothing", "lake/*.parquet"])
    def test_nothing_there(self, s3, location):
        with pytest.raises(DataError) as caught:
            open_source(f"s3://{location}", s3[1])
        assert f"s3://{location}" in str(caught.value)
        assert "wJalr" not in str(caught.value)

    def test_files_that_came_later_are_seen(self, s3):
        fs, options = s3
        elsewhere = type(fs)(**options, skip_instance_cache=True)
        for found in ([1], [1, 1]):
            with elsewhere.open(f"lake/growing/{len(found)}.parquet", "wb") as file:
                pq.write_table(pa.table({"x": [1]}), file)
            assert (
                read("s3://lake/growing", ["x"], storage_options=options)["x"].to_pylist() == found
            )

    def test_broken_file(self, s3):
        fs, options = s3
        fs.pipe("lake/broken/a.parquet", b"PAR1 and then nothing")
        with pytest.raises(DataError, match=r"s3://lake/broken/a\.parquet cannot be read"):
            open_source("s3://lake/broken", options)

    def test_only_needed_bytes_travel(self, s3, monkeypatch):
        fs, options = s3
        rng = np.random.default_rng(1)
        wide = pa.table({f"x{i}": rng.random(50_000) for i in range(40)})
        with fs.open("lake/wide.parquet", "wb") as file:
            pq.write_table(wide, file, compression="none", use_dictionary=False)
        source = open_source("s3://lake/wide.parquet", options)
        (part,) = source.parts(["x3"])
        travelled = []
        s3file = type(fs.open("lake/wide.parquet", "rb"))
        fetch = s3file._fetch_range

        def counted(self, start, end):
            travelled.append(end - start)
            return fetch(self, start, end)

        monkeypatch.setattr(s3file, "_fetch_range", counted)
        assert load(part).column("x3").equals(wide.column("x3"))
        assert 400_000 <= sum(travelled) < 600_000  # of 16 MB

    @pytest.mark.parametrize("get", [load, lambda part: list(stream(part))], ids=["load", "stream"])
    def test_credentials_that_expire_on_the_way(self, s3, monkeypatch, get):
        fs, options = s3
        (part,) = open_source("s3://lake/t/year=2021", options).parts(["y"])

        def refuse(self, start, end):
            raise PermissionError("The token of wJalrXUtnFEMI has expired\nat https://a/b?sig=c")

        kind = type(fs.open("lake/t/year=2021/b.parquet", "rb"))
        probe = open_source("s3://lake/t/year=2021", options).probe(["y"])
        monkeypatch.setattr(kind, "_fetch_range", refuse)
        assert "The token of *** has expired" in pickle.loads(pickle.dumps(probe))()
        message = (
            r"s3://lake/t/year=2021/b\.parquet cannot be read: The token of \*\*\* has expired; "
            r"check the credentials, and what they are allowed to do$"
        )
        with pytest.raises(DataError, match=message):
            get(pickle.loads(pickle.dumps(part)))

    def test_refused_access_names_the_uri_only(self, s3, monkeypatch):
        fs, options = s3

        def refuse(*args, **kwargs):
            raise PermissionError("Forbidden for wJalrXUtnFEMI")

        monkeypatch.setattr(fs, "info", refuse)
        with pytest.raises(DataError) as caught:
            open_source("s3://lake/t", options)
        assert str(caught.value) == (
            "cannot reach s3://lake/t: PermissionError: Forbidden for ***; check the credentials, "
            "and what they are allowed to do"
        )
        assert caught.value.__cause__ is None


class TestLists:
    """Several paths."""

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b", "a", "more/c", "more/d"):
            path = tmp_path / f"{name}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({"y": [name]}), path)
        return tmp_path

    def names(self, *paths, **options):
        return read(list(paths), ("y",), **options).column("y").to_pylist()

    def test_files_folders_and_patterns_in_the_order_given(self, folder):
        assert self.names(folder / "b.parquet", f"{folder}/a.parquet") == ["b", "a"]
        found = self.names(folder / "more", str(folder / "a.parq*"), f"file://{folder}/b.parquet")
        assert found == ["more/c", "more/d", "a", "b"]
        assert self.names(folder / "more") == ["more/c", "more/d"]
        assert open_source((folder / "a.parquet", folder / "more")).location == ""

    def test_one_storage(self, folder, monkeypatch):
        fsspec = pytest.importorskip("fsspec").filesystem("memory")
        for name in ("x", "z"):
            with fsspec.open(f"/list/{name}.parquet", "wb") as file:
                pq.write_table(pa.table({"y": [name]}), file)
        slow = type(fsspec).info
        monkeypatch.setattr(  # long enough for several threads
            type(fsspec), "info", lambda *args, **kw: (time.sleep(0.02), slow(*args, **kw))[1]
        )
        assert self.names("memory://list/z.parquet", "memory://list/x.parquet") == ["z", "x"]
        with pytest.raises(DataError, match=r"on different storages: the paths of a list must"):
            open_source(["memory://list/z.parquet", str(folder / "a.parquet")])

    def test_no_row_counts_twice(self, folder):
        with pytest.raises(DataError, match=r"more/c\.parquet is twice in the list"):
            open_source([folder / "more", folder / "more" / "c.parquet"])
        (folder / "link").symlink_to(folder / "more")
        (folder / "one.parquet").symlink_to(folder / "a.parquet")
        for pair in (
            [folder / "more", folder / "link"],
            [folder / "a.parquet", folder / "one.parquet"],
            [folder / "a.parquet", f"file://{folder}//a.parquet"],
            [folder / "a.parquet", f"file://{folder}/more/../a.parquet"],
        ):
            with pytest.raises(DataError, match=r"its rows would count twice"):
                open_source(pair)

    def test_what_cannot_be_in_a_list(self, folder):
        with pytest.raises(DataError, match=r"^the list of paths is empty$"):
            open_source([])
        with pytest.raises(DataError, match="the path is empty"):
            open_source([folder / "a.parquet", ""])
        with pytest.raises(DataError, match=r"data of type list cannot be read.*a list of paths"):
            open_source([folder / "a.parquet", 1])
        with pytest.raises(DataError, match=r"no Parquet file found at .*/none\.parquet"):
            open_source([folder / "a.parquet", folder / "none.parquet"])
        with pytest.raises(DataError, match="version= goes with a Delta table"):
            open_source([folder / "a.parquet", folder / "b.parquet"], version=1)

    def test_folders_that_are_columns_of_some_only(self, folder):
        (folder / "year=2024").mkdir()
        pq.write_table(pa.table({"y": ["e"]}), folder / "year=2024" / "e.parquet")
        whole = open_source([folder / "year=2024", folder / "a.parquet"])
        assert "year" not in whole.columns  # the folder itself is what was asked for
        (folder / "all" / "year=2024").mkdir(parents=True)
        pq.write_table(pa.table({"y": ["e"]}), folder / "all" / "year=2024" / "e.parquet")
        some = [folder / "all", folder / "a.parquet"]
        assert read(some, ("y",)).column("y").to_pylist() == ["e", "a"]
        with pytest.raises(DataError, match=r"a\.parquet has no column 'year'"):
            read(some, ("y", "year"))


def as_kind(kind: str, data: pa.Table, folder: Path):
    """The table as data of some kind."""
    if kind == "pandas":
        return data.to_pandas()
    if kind == "dask":
        dd = pytest.importorskip("dask.dataframe")
        return dd.from_pandas(data.to_pandas(), npartitions=1, sort=False)
    if kind == "parquet":
        pq.write_table(data, folder / "f.parquet")
        return str(folder / "f.parquet")
    return data
