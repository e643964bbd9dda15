"""Filters, tables of a lake, rows in batches: the same rows and fits as from pandas."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import dmixed
from dmixed.cli import app
from dmixed.errors import DataError
from dmixed.sources import base, load, open_source, parse_filter, reading, stream

FORMULA = "y ~ x + (1 | g)"


def rows(n: int = 600, seed: int = 1) -> pd.DataFrame:
    """Rows of a small model, with columns to filter by."""
    rng = np.random.default_rng(seed)
    g = rng.integers(0, 20, n)
    x = rng.standard_normal(n)
    return pd.DataFrame(
        {
            "y": 1 + 2 * x + rng.standard_normal(20)[g] + rng.standard_normal(n),
            "x": x,
            "g": g,
            "year": np.sort(rng.integers(2020, 2026, n)),
            "site": rng.choice(["a b", "é", "x=y"], n),
            "day": pd.to_datetime(rng.integers(18000, 18100, n), unit="D").date,
        }
    )


def arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def read(source, columns=("x", "g")) -> pa.Table:
    """All rows, by parts that have travelled; streams and loads agree."""
    tables = []
    for part in source.parts(columns):
        travelled = pickle.loads(pickle.dumps(part))
        table = load(travelled)
        streamed = list(stream(travelled))
        assert all(some.schema == table.schema for some in streamed)
        assert pa.concat_tables(streamed).combine_chunks() == table.combine_chunks()
        assert part.rows in (None, len(table))
        tables.append(table)
    return pa.concat_tables(tables)


def same_rows(found: pa.Table, expected: pd.DataFrame) -> None:
    """Equal but for the order of the rows."""
    keys = list(expected.columns)
    left = found.to_pandas().sort_values(keys, ignore_index=True)
    right = arrow(expected).to_pandas().sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(left, right, check_dtype=False)


def same_fit(data, frame: pd.DataFrame, **options) -> dmixed.MixedLMResults:
    """A fit is that of the rows from pandas; sums in another order differ in the last digits."""
    found, expected = dmixed.lmer(FORMULA, data, **options), dmixed.lmer(FORMULA, frame)
    assert found.nobs == len(frame)
    np.testing.assert_allclose(found.fe_params, expected.fe_params, rtol=1e-8)
    np.testing.assert_allclose(found.cov_re, expected.cov_re, rtol=1e-6)
    assert found.llf == pytest.approx(expected.llf, abs=1e-8)
    return found


@pytest.fixture
def lake(tmp_path):
    """Parquet in folders by year, of four row groups each."""
    frame = rows()
    for year, some in frame.groupby("year"):
        folder = tmp_path / "lake" / f"year={year}"
        folder.mkdir(parents=True)
        table = arrow(some.drop(columns="year").sort_values("x"))
        pq.write_table(table, folder / "f.parquet", row_group_size=25)
    return tmp_path / "lake", frame


FILTERS = [
    ([("year", ">=", 2024)], lambda d: d.year >= 2024),
    ([("x", ">", 1.0)], lambda d: d.x > 1),
    ([("x", "!=", 1.0), ("year", "=", 2021)], lambda d: d.year == 2021),
    ([("site", "in", ["é", "x=y"])], lambda d: d.site.isin(["é", "x=y"])),
    ([("site", "not in", {"é"}), ("g", "<", 5)], lambda d: (d.site != "é") & (d.g < 5)),
    ([[("year", "==", 2020)], [("g", "==", 3)]], lambda d: (d.year == 2020) | (d.g == 3)),
    (("day", "<=", dt.date(2019, 5, 1)), lambda d: d.day <= dt.date(2019, 5, 1)),
    ([("g", "<", np.int64(7))], lambda d: d.g < 7),
]


class TestFilters:
    @pytest.mark.parametrize(("filters", "mask"), FILTERS, ids=range(len(FILTERS)))
    def test_rows_are_those_of_pandas(self, lake, filters, mask):
        path, frame = lake
        expected = frame[mask(frame)]
        assert 0 < len(expected) < len(frame)
        for columns in (["x", "g"], ["g", "year", "site"], ["day", "x", "year"]):
            same_rows(read(open_source(path, filters=filters), columns), expected[columns])
        source = open_source(ds.dataset(path, partitioning="hive"), filters=filters)
        same_rows(read(source), expected[["x", "g"]])
        head = source.head(["x", "g"], 5)
        assert len(head) == 5
        assert set(head["x"].to_pylist()) <= set(expected["x"])
        assert len(source.head(["x"], 10**6)) == len(expected)

    def test_expressions(self, lake):
        path, frame = lake
        for expression, mask in (
            (pc.field("x") > 1, frame.x > 1),
            (~(pc.field("site") == "é") & (pc.field("year") < 2022),
             (frame.site != "é") & (frame.year < 2022)),
            (pc.field("g") + pc.field("year") > 2030, frame.g + frame.year > 2030),
        ):  # fmt: skip
            same_rows(read(open_source(path, filters=expression)), frame[mask][["x", "g"]])

    def test_a_fit(self, lake):
        path, frame = lake
        kept = frame[(frame.year >= 2022) & (frame.site != "é")]
        filters = [("year", ">=", 2022), ("site", "!=", "é")]
        found = same_fit(path, kept, filters=filters)
        assert len(found.fittedvalues) == len(kept)
        model = dmixed.MixedLM.from_formula("y ~ x", path, groups="g", filters=filters)
        assert model.fit().llf == pytest.approx(found.llf, abs=1e-8)

    def test_what_is_excluded_is_not_read(self, lake):
        """The bytes of other row groups are destroyed, and of other folders even the footers."""
        path, frame = lake
        kept = frame[(frame.year == 2023) & (frame.x > 1)]
        for file in path.glob("*/f.parquet"):
            if "2023" not in str(file):
                if "2020" not in str(file):  # the first file tells the types
                    file.write_bytes(b"nothing")
                continue
            content = bytearray(file.read_bytes())
            metadata = pq.read_metadata(file)
            for i in range(metadata.num_row_groups):
                group = metadata.row_group(i)
                if group.column(1).statistics.max <= 1:
                    chunk = group.column(1)
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    content[start : start + 20] = bytes(20)
            file.write_bytes(content)
        filters = [("year", "==", 2023), ("x", ">", 1.0)]
        same_rows(read(open_source(path, filters=filters)), kept[["x", "g"]])
        with pytest.raises(DataError, match="cannot be read"):
            read(open_source(path, filters=[("year", "==", 2023)]))

    def test_numbers_of_rows(self, lake):
        path, frame = lake
        (part, *_) = open_source(path, filters=[("year", "==", 2023)]).parts(["x"])
        assert part.rows == (frame.year == 2023).sum()
        assert part.task.filtering is None
        for filters in ([("site", "==", "é")], [("x", ">", -100.0)]):  # NaN is in no statistics
            assert open_source(path, filters=filters).parts(["x"])[0].rows is None
        assert open_source(path, filters=[("g", ">=", 0)]).parts(["x"])[0].rows == len(frame)
        (part,) = open_source(path, filters=[("year", ">", 2030)]).parts(["x"])
        assert (part.rows, part.nbytes) == (0, 0)
        assert load(part).schema == pa.schema([("x", pa.float64())])

    def test_nulls_and_nan(self, tmp_path):
        """Statistics say nothing of NaN, and a row group of nulls may be wanted."""
        data = pa.table({"x": [3.0, np.nan, 3.0, None], "n": [1, 1, None, 1]})
        pq.write_table(data, tmp_path / "f.parquet")
        x, n = pc.field("x"), pc.field("n")
        for filters in (
            [("x", "!=", 3.0)], ~(x < 5), x.is_nan(), x > 1, n >= 1, n.is_null(), n == 1,
            x.is_null(nan_is_null=True), [("n", "not in", [2])],
        ):  # fmt: skip
            expression = filters if isinstance(filters, pc.Expression) else None
            if expression is None:
                expression = pq.filters_to_expression(filters)
            found = read(open_source(tmp_path, filters=filters), ["n"])
            assert found.to_pydict() == {"n": data.filter(expression)["n"].to_pylist()}

    def test_types_that_differ_between_files(self, tmp_path):
        for name, kind in (("a", pa.int32()), ("b", pa.int64())):
            table = pa.table({"n": pa.array([1, 2, 3], kind), "x": [1.0, 2.0, 3.0]})
            pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=1)
        found = read(open_source(tmp_path, filters=[("n", ">=", 2)]), ["n", "x"])
        assert found["n"].to_pylist() == [2, 3, 2, 3]
        assert found.schema.field("n").type == pa.int64()

    @pytest.mark.parametrize(
        ("filters", "message"),
        [
            ([("yaer", ">=", 2024)], r"filters: column 'yaer' is not in the data.* year"),
            (pc.field("yaer") > 1, r"filters: column 'yaer' is not in the data"),
            (pc.field(0) > 1, "filters must name their columns"),
            (pc.field("x") + 1, "Filter expression must evaluate to bool"),
            ([("site", ">", 3)], "cannot be applied to these columns"),
            ("year > 3", "filters='year > 3' cannot be read: filters are a list"),
            ([], r"filters=\[\] cannot be read"),
            ([[]], r"filters=\[\[\]\] cannot be read"),
            ([("year", 3)], "cannot be read: filters are"),
            ([("year", "~", 3)], "operator '~' in filters must be one of"),
            ([("year", "in", 3)], "needs a list of values"),
            ([("year", "in", [])], "at least one value"),
            ([("x", "==", None)], "a missing value equals nothing"),
            ([("x", "in", [1.0, np.nan])], "a missing value equals nothing"),
        ],
        ids=str,
    )
    def test_refusals(self, lake, filters, message):
        with pytest.raises(DataError, match=message):
            open_source(lake[0], filters=filters)

    def test_data_in_memory(self):
        pl = pytest.importorskip("polars")
        dd = pytest.importorskip("dask.dataframe")
        frame = rows(10)
        for data in (
            frame, arrow(frame), pl.from_pandas(frame.drop(columns="day")),
            dd.from_pandas(frame, npartitions=2), ds.dataset(arrow(frame)),
        ):  # fmt: skip
            with pytest.raises(DataError, match="filter"):
                dmixed.lmer(FORMULA, data, filters=[("year", ">=", 2024)])

    def test_command_line(self, lake):
        path, frame = lake
        kept = frame[(frame.year >= 2024) & (frame.site == "x=y")]
        args = ["fit", "--data", str(path), "--formula", FORMULA]
        run = CliRunner().invoke(
            app, [*args, "--filter", "year >= 2024", "--filter", "site=='x=y'"]
        )
        assert run.exit_code == 0, run.output
        assert re.search(rf"\b{len(kept)}\b", run.output)
        run = CliRunner().invoke(app, [*args, "--filter", "year is 2024"])
        assert run.exit_code == 2
        run = CliRunner().invoke(app, [*args, "--filter", "yaer == 2024"])
        assert run.exit_code == 1
        assert "'yaer' is not in the data" in run.output

    @pytest.mark.parametrize(
        ("text", "condition"),
        [
            ("year >= 2024", ("year", ">=", 2024)),
            (" x<-1.5e3 ", ("x", "<", -1500.0)),
            ("mein Wert != 'it''s'", ("mein Wert", "!=", "it's")),
            ('a.b == "true"', ("a.b", "==", "true")),
            ("ok==true", ("ok", "==", True)),
            ("day <= 2024-02-29", ("day", "<=", dt.date(2024, 2, 29))),
            ("`a<b` > 0", ("a<b", ">", 0)),
            ("x > 'a > b'", ("x", ">", "a > b")),
        ],
    )
    def test_text(self, text, condition):
        assert parse_filter(text) == condition
        assert type(parse_filter(text)[2]) is type(condition[2])

    @pytest.mark.parametrize(
        "text",
        ["", "x", "x >", "> 3", "x = 3", "x == y", "x == __import__('os')", "x == 'a", "x === 3",
         "x in (1, 2)", "x > 1 and y > 2", "day == 2024-13-01", "x == [1]", "x == 1; y"],
    )  # fmt: skip
    def test_text_refused(self, text):
        with pytest.raises(DataError, match="filter"):
            parse_filter(text)


class TestStream:
    def test_long_row_groups_come_in_tables(self, tmp_path, monkeypatch):
        monkeypatch.setattr(base, "ROWS", 1000)
        data = pa.table({"x": np.arange(5500.0), "g": [f"g{i % 7}" for i in range(5500)]})
        pq.write_table(data.slice(0, 5000), tmp_path / "a.parquet")
        pq.write_table(data.slice(5000), tmp_path / "b.parquet", row_group_size=40)
        parts = open_source(tmp_path).parts(["g", "x"])
        tables = [table for part in parts for table in stream(part)]
        assert max(map(len, tables)) == 1000
        assert pa.concat_tables(tables).combine_chunks() == data.select(["g", "x"]).combine_chunks()
        for table in tables:
            assert {column.num_chunks for column in table.columns} == {1}
            table["x"].chunk(0).to_numpy(zero_copy_only=True)

    def test_a_row_group_is_never_whole_in_memory(self, tmp_path, monkeypatch):
        rng = np.random.default_rng(1)
        n = 2_000_000
        data = pa.table({"x": rng.random(n), "z": rng.random(n)})
        pq.write_table(data, tmp_path / "f.parquet", row_group_size=n)
        del data
        monkeypatch.setattr(base, "ROWS", 2**15)
        monkeypatch.setattr(reading, "BUFFER", 2**16)
        (part,) = open_source(tmp_path).parts(["x", "z"])
        before, most, count = pa.total_allocated_bytes(), 0, 0
        for table in stream(part):
            most = max(most, pa.total_allocated_bytes() - before)
            count += len(table)
        assert count == n
        assert most < 16 * n / 3  # a page of each column is 1 MB, packed and unpacked

    def test_cells_bound_the_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(base, "CELLS", 100)
        data = pa.table({f"x{i}": np.arange(50.0) for i in range(10)})
        pq.write_table(data, tmp_path / "f.parquet")
        (part,) = open_source(tmp_path).parts(data.column_names)
        assert [len(table) for table in stream(part)] == [10] * 5

    def test_other_kinds(self, tmp_path, monkeypatch):
        dd = pytest.importorskip("dask.dataframe")
        feather = pytest.importorskip("pyarrow.feather")
        frame = pd.DataFrame({"x": np.arange(25.0), "g": list("abcde") * 5})
        parts = [(p, None) for p in open_source(frame).parts(["g"])]
        lazy = open_source(dd.from_pandas(frame, npartitions=1, sort=False)).parts(["g"])[0]
        parts.append((lazy, lazy.task.compute(scheduler="sync")))
        feather.write_feather(frame, tmp_path / "f.arrow")
        data = ds.dataset(tmp_path / "f.arrow", format="feather")
        parts += [(p, None) for p in open_source(data).parts(["g"])]
        monkeypatch.setattr(base, "ROWS", 10)
        for part, value in parts:
            tables = list(stream(part, value))
            assert [len(table) for table in tables] == [10, 10, 5]
            assert [x for t in tables for x in t["g"].to_pylist()] == frame["g"].to_list()

    @pytest.mark.parametrize("kind", ["memory", "parquet", "folder"])
    def test_no_rows(self, kind, tmp_path):
        data = pa.table({"x": pa.array([], pa.float64())})
        (tmp_path / "k=1").mkdir()
        pq.write_table(data, tmp_path / "k=1" / "f.parquet")
        source = open_source(data if kind == "memory" else tmp_path)
        columns = ["k"] if kind == "folder" else ["x"]
        ((table,),) = [list(stream(part)) for part in source.parts(columns)]
        assert (len(table), table.column_names) == (0, columns)

    def test_folder_columns_categories_and_options(self, tmp_path):
        (tmp_path / "k=1").mkdir()
        data = pa.table({"g": pa.array(["a", "b"] * 5).dictionary_encode(), "s": ["u"] * 10})
        pq.write_table(data, tmp_path / "k=1" / "f.parquet", row_group_size=3)
        assert read(open_source(tmp_path), ["k", "g"]).to_pydict() == {
            "k": [1] * 10, "g": ["a", "b"] * 5,
        }  # fmt: skip
        form = ds.ParquetFileFormat(read_options=ds.ParquetReadOptions(dictionary_columns=["s"]))
        part = ds.HivePartitioning.discover(infer_dictionary=True)
        source = open_source(ds.dataset(tmp_path, format=form, partitioning=part))
        found = read(source, ["s", "k"])
        assert [pa.types.is_dictionary(kind) for kind in found.schema.types] == [True, True]
        assert found.to_pydict() == {"s": ["u"] * 10, "k": [1] * 10}
        plain = open_source(ds.dataset(tmp_path, partitioning=part))
        assert read(plain, ["k", "s"]).to_pydict() == {"k": [1] * 10, "s": ["u"] * 10}


class TestFacts:
    def test_bytes_and_ranges(self, tmp_path):
        moment = dt.datetime(2024, 5, 1, 12)
        data = pa.table(
            {
                "nested": [{"a": 1, "b": [1, 2]}] * 4,
                "n": [3, None, -7, 5],
                "s": ["b", "a", None, "z"],
                "d": [dt.date(2024, 1, 1), None, dt.date(2023, 1, 1), None],
                "t": pa.array([moment] * 4, pa.timestamp("us")),
                "ns": pa.array([1, 2, 3, 4], pa.timestamp("ns")),
                "x": [1.0] * 4,
                "c": pa.array(["u", "v", "u", "v"]).dictionary_encode(),
                "z": pa.array([None] * 4, pa.int64()),
            }
        )
        (tmp_path / "k=9").mkdir()
        pq.write_table(data, tmp_path / "k=9" / "f.parquet", row_group_size=2)
        metadata = pq.read_metadata(tmp_path / "k=9" / "f.parquet")
        source = open_source(tmp_path)
        columns = [*data.column_names[1:], "k"]
        (part,) = source.parts(columns, columns)
        assert part.ranges == {
            "n": (-7, 5), "s": ("a", "z"), "d": (dt.date(2023, 1, 1), dt.date(2024, 1, 1)),
            "t": (moment, moment), "c": ("u", "v"), "k": (9, 9),
        }  # fmt: skip
        assert not source.parts(columns)[0].ranges
        own = [
            group.column(j).total_compressed_size
            for group in map(metadata.row_group, range(2))
            for j in range(group.num_columns)
            if not group.column(j).path_in_schema.startswith("nested")
        ]
        assert part.nbytes == sum(own)
        pq.write_table(data, tmp_path / "k=9" / "g.parquet", write_statistics=False)
        (part,) = open_source(tmp_path).parts(["n", "k"], ["n", "k"])
        assert part.ranges == {"k": (9, 9)}

    def test_many_row_groups_are_planned_fast(self, tmp_path):
        data = pa.table({"n": np.arange(10_000), "x": np.arange(10_000.0), "g": ["a"] * 10_000})
        pq.write_table(data, tmp_path / "f.parquet", row_group_size=1)
        source = open_source(tmp_path, filters=[("n", ">=", 10)])
        begin = time.perf_counter()
        parts = source.parts(["x", "g", "n"], ["g", "n"])
        assert time.perf_counter() - begin < 2
        assert sum(p.rows for p in parts) == 9990
        assert parts[0].ranges["n"][0] == 10

    def test_probe(self, tmp_path):
        pq.write_table(arrow(rows(10)), tmp_path / "f.parquet")
        source = open_source(tmp_path / "f.parquet")
        probe = pickle.loads(pickle.dumps(source.probe(["x"])))
        assert len(pickle.dumps(probe)) < 5000
        assert probe() is None
        (tmp_path / "f.parquet").unlink()
        reason = probe()
        assert "f.parquet cannot be read" in reason
        assert "\n" not in reason
        assert open_source(rows(10)).probe(["x"])() is None
        dd = pytest.importorskip("dask.dataframe")
        assert open_source(dd.from_pandas(rows(10), npartitions=1)).probe(["x"])() is None

    def test_fingerprints(self, lake):
        path, frame = lake
        source = open_source(path)
        found = source.fingerprints()
        assert [f.name for f in found] == [str(p) for p in sorted(path.glob("*/f.parquet"))]
        assert [f.size for f in found] == [Path(f.name).stat().st_size for f in found]
        assert [f.rows for f in found] == frame.groupby("year").size().tolist()
        assert all(f.stamp for f in found)
        assert source.snapshot is None
        assert open_source(path).fingerprints() == found
        Path(found[2].name).touch()
        now = open_source(path).fingerprints()
        assert [a == b for a, b in zip(found, now, strict=True)] == [i != 2 for i in range(6)]
        filtered = open_source(path, filters=[("year", ">", 2023)]).fingerprints()
        assert filtered == now[4:]
        dataset = open_source(ds.dataset(path)).fingerprints()
        assert [f.size for f in dataset] == [f.size for f in found]
        for data in (frame, arrow(frame)):
            assert open_source(data).fingerprints() == ()
            assert open_source(data).snapshot is None


class TestFaults:
    """What goes wrong between planning and reading is one message that names the file."""

    @pytest.fixture
    def part(self, tmp_path):
        for name in "ab":
            pq.write_table(arrow(rows(50)), tmp_path / f"{name}.parquet")
        (part,) = open_source(tmp_path).parts(["x", "g"])
        return part

    def check(self, part, message):
        for get in (load, lambda p: list(stream(p))):
            with pytest.raises(DataError, match=message) as caught:
                get(part)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
            assert "\n" not in str(caught.value)

    def test_vanished(self, part, tmp_path):
        (tmp_path / "b.parquet").unlink()
        self.check(part, r"b\.parquet cannot be read: .*[Nn]o such file")

    def test_truncated(self, part, tmp_path):
        whole = (tmp_path / "b.parquet").read_bytes()
        (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
        self.check(part, r"b\.parquet cannot be read: ")

    def test_replaced_by_other_rows(self, part, tmp_path):
        pq.write_table(arrow(rows(51)), tmp_path / "b.parquet")
        self.check(part, r"b\.parquet has changed while it was in use: 51 rows, not 50")

    def test_replaced_by_other_columns(self, part, tmp_path):
        pq.write_table(arrow(rows(50)).drop_columns(["g"]), tmp_path / "b.parquet")
        self.check(part, r"b\.parquet has no column 'g'")

    def test_replaced_by_another_type(self, part, tmp_path):
        table = arrow(rows(50).assign(g="a"))
        pq.write_table(table, tmp_path / "b.parquet")
        self.check(part, r"b\.parquet cannot be read: .*'a'")

    def test_through_a_cluster(self, tmp_path):
        """The error of a worker process arrives as it was raised."""
        distributed = pytest.importorskip("distributed")
        pq.write_table(arrow(rows(50)), tmp_path / "a.parquet")
        source = open_source(tmp_path)
        (part,) = source.parts(["x"])
        probe = source.probe(["x"])
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            assert client.run(probe) == dict.fromkeys(client.scheduler_info()["workers"])
            (tmp_path / "a.parquet").unlink()
            with pytest.raises(DataError, match=r"a\.parquet cannot be read: .*[Nn]o such file"):
                client.submit(load, part, pure=False).result()
            (reason,) = client.run(probe).values()
            assert "a.parquet cannot be read" in reason


# --------------------------------------------------------------------------- Delta


@contextmanager
def server():
    """S3 in a process of its own: deltalake waits for answers with Python's lock in its hands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def delta(tmp_path):
    """Delta table of two versions by site, and what it held."""
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    one, two = rows(400, 1), rows(300, 2)
    path = tmp_path / "delta"
    deltalake.write_deltalake(path, arrow(one), partition_by=["site"])
    deltalake.write_deltalake(path, arrow(two), mode="append")
    return path, [one, pd.concat([one, two], ignore_index=True)]


class TestDelta:
    def test_versions(self, delta):
        from deltalake import DeltaTable

        path, states = delta
        for data in (path, str(path), path.as_uri(), DeltaTable(str(path))):
            same_fit(data, states[1])
            same_fit(data, states[0], version=0)
        source = open_source(path, version=0)
        assert (source.kind, source.snapshot) == ("delta", "delta version 0")
        assert source.columns == tuple(states[0].columns)
        assert open_source(path).snapshot == "delta version 1"
        table = DeltaTable(str(path), version=0)
        same_rows(read(open_source(table)), states[0][["x", "g"]])
        open_source(table, version=1)
        assert table.version() == 0

    def test_filters(self, delta):
        path, states = delta
        filters = [("site", "!=", "é"), ("year", "<", 2023)]
        kept = states[1][(states[1].site != "é") & (states[1].year < 2023)]
        same_fit(path, kept, filters=filters)
        same_rows(read(open_source(path, filters=filters), ["site", "g"]), kept[["site", "g"]])
        (part,) = open_source(path, filters=[("site", "==", "x=y")]).parts(["x"])
        assert part.rows == (states[1].site == "x=y").sum()
        with pytest.raises(DataError, match="column 'sight' is not in the data"):
            open_source(path, filters=[("sight", "==", "a b")])

    def test_removed_rows_and_files(self, delta):
        from deltalake import DeltaTable, write_deltalake

        path, states = delta
        DeltaTable(str(path)).delete("year = 2022")
        same_rows(read(open_source(path)), states[1][states[1].year != 2022][["x", "g"]])
        same_rows(read(open_source(path, version=1)), states[1][["x", "g"]])
        three = rows(100, 3)
        write_deltalake(path, arrow(three), mode="overwrite")
        same_fit(path, three)
        pq.write_table(arrow(three), next(path.glob("site=*")) / "stray.parquet")
        same_rows(read(open_source(path)), three[["x", "g"]])
        DeltaTable(str(path)).delete()
        assert read(open_source(path)).num_rows == 0
        with pytest.raises(DataError):
            dmixed.lmer(FORMULA, path)

    def test_columns_that_came_later(self, delta):
        from deltalake import write_deltalake

        path, states = delta
        more = rows(50, 4).assign(late=np.arange(50))
        write_deltalake(path, arrow(more), mode="append", schema_mode="merge")
        both = pd.concat([states[1], more], ignore_index=True)
        same_rows(read(open_source(path), ["late", "x"]), both[["late", "x"]])
        kept = both[both.late > 10]
        same_rows(read(open_source(path, filters=[("late", ">", 10)])), kept[["x", "g"]])
        nulls = open_source(path, filters=pc.field("late").is_null())
        same_rows(read(nulls), states[1][["x", "g"]])

    def test_nulls_in_partitions_and_statistics(self, tmp_path):
        deltalake = pytest.importorskip("deltalake")
        data = pa.table({"p": ["a", None, "a"], "x": [1.0, 2.0, None], "n": [1, 2, 3]})
        deltalake.write_deltalake(tmp_path / "t", data, partition_by=["p"])
        for expression in (pc.field("p").is_null(), pc.field("x").is_null(), pc.field("x") >= 1):
            found = read(open_source(tmp_path / "t", filters=expression), ["n"])
            assert sorted(found["n"].to_pylist()) == data.filter(expression)["n"].to_pylist()

    def test_fingerprints_and_probe(self, delta):
        path, states = delta
        source = open_source(path)
        found = source.fingerprints()
        assert sum(f.rows for f in found) == len(states[1])
        assert [f.size for f in found] == [Path(f.name).stat().st_size for f in found]
        assert all(f.stamp for f in found)
        old = open_source(path, version=0).fingerprints()
        assert set(old) < set(found)
        assert pickle.loads(pickle.dumps(source.probe(["x"])))() is None
        assert len(pickle.dumps(source.parts(["x", "g"])[0])) < 3000 * len(found)
        Path(found[0].name).unlink()
        assert "cannot be read" in source.probe(["x"])()
        with pytest.raises(DataError, match=r"cannot be read: .*[Nn]o such file"):
            read(open_source(path))

    def test_refusals(self, delta, monkeypatch):
        path, states = delta
        with pytest.raises(DataError, match=r"version 9 of .*delta cannot be opened"):
            open_source(path, version=9)
        for part in (next(path.glob("site=*")), f"{path}/*/*.parquet", f"{path}/site=*"):
            with pytest.raises(DataError, match="some files of the Delta table"):
                open_source(part)
        for value in (1.0, "1", True):
            with pytest.raises(DataError, match=r"version=.*must be a whole number"):
                open_source(path, version=value)
        with pytest.raises(DataError, match=r"snapshot= goes with an Iceberg table"):
            open_source(path, snapshot=1)
        with pytest.raises(DataError, match=r"version= goes with a Delta table, not with data of"):
            dmixed.lmer(FORMULA, states[0], version=1)
        monkeypatch.setitem(sys.modules, "deltalake", None)
        with pytest.raises(DataError, match=r'needs deltalake, pip install "dmixed\[delta\]"'):
            open_source(path)

    @pytest.mark.parametrize("how", ["deletionVectors", "columnMapping", "property"])
    def test_features_that_change_what_files_mean(self, how, delta):
        path, _ = delta
        log = path / "_delta_log" / "00000000000000000000.json"
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        for action in actions:
            if "protocol" in action and how == "property":
                action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
            elif "protocol" in action:
                action["protocol"] = {
                    "minReaderVersion": 3, "minWriterVersion": 7,
                    "readerFeatures": [how], "writerFeatures": [how],
                }  # fmt: skip
            if "metaData" in action and how != "deletionVectors":
                action["metaData"]["configuration"]["delta.columnMapping.mode"] = "name"
                schema = json.loads(action["metaData"]["schemaString"])
                for i, field in enumerate(schema["fields"]):
                    field["metadata"] = {
                        "delta.columnMapping.id": i + 1,
                        "delta.columnMapping.physicalName": f"col-{i}",
                    }
                action["metaData"]["schemaString"] = json.dumps(schema)
        log.write_text("\n".join(json.dumps(action) for action in actions))
        with pytest.raises(DataError, match=r"Delta table"):
            open_source(path)

    def test_object_store(self, delta):
        pytest.importorskip("s3fs", reason="s3fs is not installed")
        pytest.importorskip("moto.server", reason="moto[server] is not installed")
        import fsspec
        from deltalake import DeltaTable

        path, states = delta
        with server() as endpoint:
            options = {
                "key": "AKIDEXAMPLE",
                "secret": "wJalrXUtnFEMI",
                "client_kwargs": {"endpoint_url": endpoint, "region_name": "eu-west-1"},
            }
            fs = fsspec.filesystem("s3", **options)
            fs.mkdir("lake")
            fs.put(str(path), "lake/delta", recursive=True)
            source = open_source("s3://lake/delta", options, version=0)
            same_rows(read(source), states[0][["x", "g"]])
            assert source.fingerprints()[0].name.startswith("s3://lake/delta/")
            table = DeltaTable(
                "s3://lake/delta",
                storage_options={
                    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
                    "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "eu-west-1",
                    "AWS_ALLOW_HTTP": "true",
                },
            )  # fmt: skip
            source = open_source(table)
            same_rows(read(source), states[1][["x", "g"]])
            assert source.probe(["x"])() is None


# --------------------------------------------------------------------------- Iceberg


@pytest.fixture
def iceberg(tmp_path):
    """Iceberg table of two snapshots, and what it held."""
    pytest.importorskip("pyiceberg", reason="pyiceberg is not installed")
    sql = pytest.importorskip("pyiceberg.catalog.sql", reason="sqlalchemy is not installed")
    catalog = sql.SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}")
    catalog.create_namespace("lake")
    one, two = rows(400, 1), rows(300, 2)
    table = catalog.create_table("lake.t", schema=arrow(one).schema)
    table.append(arrow(one))
    first = table.current_snapshot().snapshot_id
    table.append(arrow(two))
    yield table, [one, pd.concat([one, two], ignore_index=True)], first
    catalog.engine.dispose()


class TestIceberg:
    def test_snapshots(self, iceberg):
        table, states, first = iceberg
        same_fit(table, states[1])
        same_fit(table, states[0], snapshot=first)
        same_fit(table.scan(snapshot_id=first), states[0])
        source = open_source(table, snapshot=first)
        assert (source.kind, source.snapshot) == ("iceberg", f"iceberg snapshot {first}")
        assert source.columns == tuple(states[0].columns)
        assert len(source.head(["x"], 7)) == 7
        assert sum(p.rows for p in open_source(table).parts(["x"])) == len(states[1])
        assert all(len(pickle.dumps(p)) < 20_000 for p in open_source(table).parts(["x", "g"]))

    @pytest.mark.parametrize(("filters", "mask"), FILTERS, ids=range(len(FILTERS)))
    def test_filters(self, iceberg, filters, mask):
        table, states, _ = iceberg
        kept = states[1][mask(states[1])]
        source = open_source(table, filters=filters)
        same_rows(read(source), kept[["x", "g"]])
        assert len(source.head(["x"], 10**6)) == len(kept)

    def test_filters_of_other_forms(self, iceberg):
        table, states, _ = iceberg
        kept = states[1][states[1].g > 10]
        same_fit(table, kept, filters=pc.field("g") > 10)
        same_fit(table, kept, filters=[("g", ">", 10.5)])
        same_fit(table.scan(row_filter="g > 10"), kept)
        both = open_source(table.scan(row_filter="g > 10"), filters=[("year", "<", 2023)])
        same_rows(read(both), kept[kept.year < 2023][["x", "g"]])
        assert open_source(table.scan(selected_fields=("x", "y"))).columns == ("y", "x")
        with pytest.raises(DataError, match="filters: column 'yaer' is not in the data"):
            open_source(table, filters=[("yaer", ">", 3)])

    def test_files_are_left_out(self, tmp_path, iceberg):
        table = iceberg[0]
        table.append(arrow(rows(50, 5).assign(year=1999)))
        source = open_source(table, filters=[("year", "==", 1999)])
        assert len(source.fingerprints()) == 1
        assert read(source).num_rows == 50

    def test_partitions(self, iceberg):
        from pyiceberg.partitioning import PartitionField, PartitionSpec
        from pyiceberg.transforms import IdentityTransform

        table, states, _ = iceberg
        column = table.schema().find_field("site").field_id
        spec = PartitionSpec(PartitionField(column, 1000, IdentityTransform(), "site"))
        other = table.catalog.create_table("lake.p", schema=table.schema(), partition_spec=spec)
        frame = states[0].assign(site=states[0].site.where(states[0].g > 2, None))
        other.append(arrow(frame))
        kept = frame[frame.site == "é"]
        source = open_source(other, filters=[("site", "==", "é")])
        assert [p.rows for p in source.parts(["x"])] == [len(kept)]
        same_rows(read(source), kept[["x", "g"]])
        same_rows(read(open_source(other), ["site"]), frame[["site"]])
        kept = frame[frame.site.notna() & (frame.site != "é")]
        same_rows(read(open_source(other, filters=[("site", "!=", "é")])), kept[["x", "g"]])

    def test_deleted_rows(self, iceberg):
        table, states, _ = iceberg
        table.delete("year = 2022")
        kept = states[1][states[1].year != 2022]
        same_fit(table, kept)
        table.delete("year < 3000")
        assert read(open_source(table)).num_rows == 0

    def test_delete_files(self, iceberg, tmp_path):
        """Positions of deleted rows, as engines that merge on read write them."""
        from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
        from pyiceberg.typedef import Record

        table, states, first = iceberg
        source = open_source(table, snapshot=first)
        (task,) = source._tasks()
        path = tmp_path / "deletes.parquet"
        deleted = pa.table({"file_path": [task.file.file_path] * 2, "pos": [0, 7]})
        pq.write_table(deleted, path)
        given = {
            "content": DataFileContent.POSITION_DELETES, "file_path": path.as_uri(),
            "file_format": FileFormat.PARQUET, "partition": Record(), "record_count": 2,
            "file_size_in_bytes": path.stat().st_size,
        }  # fmt: skip
        make = getattr(DataFile, "from_args", DataFile)
        task.delete_files.add(make(**given))
        (part,) = source.parts(["x", "g"])
        assert part.rows is None
        assert source.fingerprints()[0].rows is None
        expected = states[0].drop(index=[0, 7])
        same_rows(load(pickle.loads(pickle.dumps(part))), expected[["x", "g"]])
        table_of = load(part)
        assert pa.concat_tables(stream(part)).combine_chunks() == table_of.combine_chunks()

    def test_columns_that_came_went_and_were_renamed(self, iceberg):
        from pyiceberg.types import DoubleType

        table, states, first = iceberg
        with table.update_schema() as update:
            update.rename_column("x", "xx")
            update.add_column("late", DoubleType())
            update.delete_column("site")
        last = rows(50, 6).rename(columns={"x": "xx"}).drop(columns="site").assign(late=1.5)
        table.append(arrow(last))
        both = pd.concat([states[1].rename(columns={"x": "xx"}), last], ignore_index=True)
        same_rows(read(open_source(table), ["late", "xx"]), both[["late", "xx"]])
        old = open_source(table, snapshot=first, filters=[("site", "==", "é")])
        same_rows(read(old), states[0][states[0].site == "é"][["x", "g"]])

    def test_facts(self, iceberg):
        table, states, first = iceberg
        source = open_source(table, snapshot=first)
        (part,) = source.parts(["x", "year", "day", "site"], ["x", "year", "day", "site"])
        frame = states[0]
        assert part.ranges == {
            name: (frame[name].min(), frame[name].max()) for name in ("year", "day", "site")
        }
        (found,) = source.fingerprints()
        size = Path(found.name.removeprefix("file://")).stat().st_size
        assert (found.size, found.rows) == (size, 400)
        assert 0 < part.nbytes < size
        assert set(open_source(table).fingerprints()) > {found}
        probe = pickle.loads(pickle.dumps(source.probe(["x"])))
        assert probe() is None
        Path(found.name.removeprefix("file://")).unlink()
        assert "cannot be read" in probe()
        with pytest.raises(DataError, match=re.escape(found.name) + " cannot be read"):
            load(part)

    def test_empty_table(self, iceberg):
        table = iceberg[0]
        empty = table.catalog.create_table("lake.empty", schema=table.schema())
        source = open_source(empty, filters=[("x", ">", 0.0)])
        assert read(source).num_rows == 0
        assert source.snapshot is None
        assert source.fingerprints() == ()
        assert source.probe(["x"])() is None

    def test_refusals(self, iceberg):
        table, _, first = iceberg
        with pytest.raises(DataError, match=rf"lake.t has no snapshot 7; it has: .*{first}"):
            open_source(table, snapshot=7)
        with pytest.raises(DataError, match="a DataScan has its own"):
            open_source(table.scan(), snapshot=first)
        with pytest.raises(DataError, match="limit"):
            open_source(table.scan(limit=5))
        with pytest.raises(DataError, match="version= goes with a Delta table"):
            open_source(table, version=1)
        with pytest.raises(DataError, match="is an Iceberg table"):
            open_source(table.location())
