"""The moment store: whatever was added and taken out, the fit is that of the rows that are left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmixed
from dmixed import executor, manifests, planning
from dmixed import store as store_module
from dmixed.collected import Moments, MomentStore
from dmixed.errors import DataError
from dmixed.folders import Folder

FORMULA = "y ~ x + f + (1 + x | g)"
DAYS = 4


def table(n: int = 240, seed: int = 0, groups: int = 12) -> pd.DataFrame:
    """Rows of a model of many kinds of columns."""
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, groups, n), rng.normal(0, 1, n)
    effects = np.random.default_rng(99).normal(0, 1, (2, 1000))
    y = 1 + x + effects[0, g] + 0.5 * effects[1, g] * x + rng.normal(0, 1, n)
    d = pd.DataFrame({"y": y, "x": x, "f": rng.choice(["a", "b"], n), "g": g, "h": g % 4})
    d["s"], d["w"], d["o"] = rng.integers(0, 5, n), rng.uniform(0.5, 2, n), 0.1 * x
    d["t"] = np.array([f"grüppe-{i}" for i in range(1000)])[g]
    d["z"] = rng.uniform(1, 9, n)
    d.loc[d.index.isin([3, 77]), "x"] = np.nan
    return d


def write(path: Path, frame: pd.DataFrame) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)
    return str(path)


class Days:
    """A folder of a file a day, and what is in them."""

    def __init__(self, folder: Path, n: int = DAYS) -> None:
        self.folder = str(folder)
        self.frames: dict[str, pd.DataFrame] = {}
        for _ in range(n):
            self.more(table(seed=len(self.frames)))

    def more(self, frame: pd.DataFrame) -> str:
        """Write the next day."""
        name = write(Path(self.folder) / f"day-{len(self.frames)}.parquet", frame)
        self.frames[name] = frame
        return name

    @property
    def names(self) -> list[str]:
        return list(self.frames)

    def rows(self, *names: str) -> pd.DataFrame:
        """Rows of some files, all by default."""
        return pd.concat([self.frames[name] for name in names or self.frames], ignore_index=True)


@pytest.fixture
def days(tmp_path: Path) -> Days:
    return Days(tmp_path / "days")


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "kept" / "store")


def begun(
    days: Days, place: str, formula: str = FORMULA, n: int = 1, **options: Any
) -> MomentStore:
    """A store of the first files, each a delta of its own."""
    dmixed.collect(formula, days.names[0], **options).save(place)
    store = dmixed.open_moments(place)
    for name in days.names[1:n]:
        store.append(name)
    return store


def assert_same_fit(
    found: Any, rows: pd.DataFrame, formula: str = FORMULA, rel: float = 1e-12, **options: Any
) -> None:
    """A fit of moments is that of the rows; a store's are read from where it is."""
    expected, fit = dmixed.lmer(formula, rows, **options), found.fit()
    if isinstance(found, MomentStore):
        assert manifests.read_manifest(Folder.at(found.uri)) == found._directory.manifest
    assert fit.converged
    assert found.nobs == fit.nobs == expected.nobs
    assert fit.llf == pytest.approx(expected.llf, rel=rel)
    assert list(fit.fe_params.index) == list(expected.fe_params.index)
    np.testing.assert_allclose(fit.fe_params, expected.fe_params, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(fit.cov_re, expected.cov_re, rtol=1e-5, atol=1e-8)
    assert fit.n_groups == expected.n_groups
    assert sorted(fit.dropped.items()) == sorted(expected.dropped.items())


def refused(call: Callable[[], Any], *words: str) -> str:
    """A DataError that says all of these words."""
    with pytest.raises(DataError) as error:
        call()
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def unchanged(store: MomentStore, call: Callable[[], Any], *words: str) -> None:
    """Refused, and the store is as it was, to the last file."""
    before = contents(store.uri)
    refused(call, *words)
    assert contents(store.uri) == before
    assert dmixed.open_moments(store.uri).version == store.version


def contents(place: str) -> dict[str, bytes]:
    return {name: (Path(place) / name).read_bytes() for name in os.listdir(place)}


def assert_tidy(place: str) -> None:
    """There are no files that the manifest does not name."""
    manifest = manifests.read_manifest(Folder.at(place))
    others = [x for x in os.listdir(place) if not x.startswith("manifest-")]
    assert set(others) == manifest.files


# ------------------------------------------------------------------------ append


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (FORMULA, {}),
        (FORMULA, {"weights": "w", "offset": "o"}),
        (FORMULA, {"group_crossproducts": True, "carry": ["z", "x:z"]}),
        ("y ~ x + (1 + x | g) + (0 + z | t)", {}),
        ("y ~ x * f + (1 | h / g) + (1 | s)", {"weights": "w"}),
        ("log(y + 20) ~ poly(x, 2, raw=True) + center(z) + (1 | t)", {"carry": ["f"]}),
    ],
)
def test_append(formula: str, options: dict[str, Any], days: Days, place: str) -> None:
    first = dmixed.collect(formula, days.names[0], **options)
    saved = first.save(place)
    assert (saved.version, saved.nobs, len(saved.deltas)) == (1, first.nobs, 1)
    own = {x: y for x, y in options.items() if x in ("weights", "offset")}
    assert_same_fit(saved, days.rows(days.names[0]), formula, **own)
    store = dmixed.open_moments(place)
    done = store.append(days.folder)
    assert (done.new, done.skipped) == (tuple(days.names[1:]), tuple(days.names[:1]))
    assert (done.changed, done.vanished) == ((), ())
    assert (store.version, store.files) == (2, tuple(days.names))
    assert done.nobs == store.nobs - first.nobs
    assert_same_fit(store, days.rows(), formula, **own)
    assert_tidy(place)
    refused(lambda: first.save(place), "there is something already")


def test_what_is_known_is_not_opened(
    days: Days, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(days, place, n=2)
    for name in days.names[1:2]:  # nothing can be read from it now
        times = os.stat(name)
        Path(name).write_bytes(b"x" * times.st_size)
        os.utime(name, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = store.append(days.folder)
    assert done.new == tuple(days.names[2:])
    assert_same_fit(store, days.rows())
    before = contents(place)
    monkeypatch.setattr(store_module, "collect", lambda *_: pytest.fail("rows are read again"))
    again = dmixed.open_moments(place).append(days.folder)
    assert (again.new, again.nobs, again.groups) == ((), 0, 0)
    assert again.skipped == tuple(days.names)
    assert contents(place) == before


def test_kinds_of_data(days: Days, place: str) -> None:
    store = begun(days, place)
    frames = [days.rows(days.names[0])]

    def added(data: Any, frame: pd.DataFrame, **options: Any) -> None:
        done = store.append(data, **options)
        frames.append(frame)
        assert done.nobs == len(frame.dropna())
        assert_same_fit(store, pd.concat(frames))

    added(table(seed=10), table(seed=10), name="monday")
    added(dd.from_pandas(table(seed=11), npartitions=3, sort=False), table(seed=11), name="tuesday")
    added(pa.Table.from_pandas(table(seed=12)), table(seed=12))
    added(f"{days.folder}/day-[01].parquet", days.frames[days.names[1]])
    added(Path(days.folder), days.rows(*days.names[2:]))
    other = write(Path(days.folder).parent / "other.parquet", table(seed=15))
    added(ds.dataset(other), table(seed=15))
    assert store.append(ds.dataset(other)).skipped == (other,)
    added(dmixed.collect(FORMULA, table(seed=13)), table(seed=13))
    later = days.more(table(seed=14))
    added(dmixed.collect(FORMULA, later), table(seed=14))
    unchanged(store, lambda: store.append(dmixed.collect(FORMULA, later)), later, "count twice")
    unchanged(store, lambda: store.append(table(), name="monday"), "monday: was added already")
    unchanged(store, lambda: store.append(days.folder, name="x"), "files have names")
    unchanged(store, lambda: store.append(table(), name=3), "name=3")
    unchanged(store, lambda: store.append(dmixed.collect(FORMULA, table()), name="x"), "name=")
    unchanged(store, lambda: store.append(days.folder, changed="never"), "changed='never'")
    unchanged(store, lambda: store.append(days.folder, vanished="never"), "vanished='never'")
    other = dmixed.collect("y ~ x + (1 | g)", table())
    unchanged(store, lambda: store.append(other), "of the model 'y ~ x + (1 | g)'", FORMULA)
    unchanged(store, lambda: store.append(table().drop(columns="f")), "'f'")
    assert store.files[-1] == later
    store.remove("tuesday")
    del frames[2]
    assert_same_fit(store, pd.concat(frames))


def test_folders_by_key(tmp_path: Path, place: str) -> None:
    lake = tmp_path / "lake"
    for year in (2023, 2024):
        write(lake / f"year={year}" / "a.parquet", table(seed=year))
    formula = "y ~ x + year + (1 | g)"
    dmixed.collect(formula, lake).save(place)
    write(lake / "year=2025" / "a.parquet", table(seed=2025))
    store = dmixed.open_moments(place)
    assert store.append(lake).new == (str(lake / "year=2025" / "a.parquet"),)
    rows = pd.concat([table(seed=y).assign(year=y) for y in (2023, 2024, 2025)])
    assert_same_fit(store, rows, formula)
    store.remove(lake / "year=2023" / "a.parquet")
    assert_same_fit(store, rows[rows.year > 2023], formula)


def test_filters(days: Days, place: str) -> None:
    wanted = [("s", ">", 1)]
    dmixed.collect(FORMULA, days.names[0], filters=wanted).save(place)
    store = dmixed.open_moments(place)
    unchanged(store, lambda: store.append(days.folder), days.names[0], "filters")
    store.append(days.folder, filters=wanted)
    rows = days.rows()
    assert_same_fit(store, rows[rows.s > 1])
    unchanged(store, lambda: store.remove(days.names[1]), "the same filters=")
    store.remove(days.names[1], filters=wanted)
    rows = days.rows(*[x for x in days.names if x != days.names[1]])
    assert_same_fit(store, rows[rows.s > 1])
    unchanged(store, lambda: store.forget(3), "summed with filters")


def test_what_comes_later(days: Days, tmp_path: Path, place: str) -> None:
    """Levels, groups and types that the first rows do not have, and rows that are all dropped."""
    formula = "y ~ x * f + (1 | g)"
    first, second = table(seed=1).assign(f="a"), table(seed=2)
    first.loc[::3, "f"] = "b"
    third = table(seed=3, groups=40).assign(f=lambda d: np.where(d.x > 0, "c", d.f))
    wide = table(seed=4).assign(g=lambda d: d.g.astype(np.uint64) + np.uint64(2**63))
    none = table(seed=5).assign(x=np.nan)
    real = table(seed=6).assign(g=lambda d: d.g.astype(float))
    frames = [first, second, none, third, real, wide]
    paths = [write(tmp_path / "later" / f"{i}.parquet", x) for i, x in enumerate(frames)]
    dmixed.collect(formula, paths[0]).save(place)
    store = dmixed.open_moments(place)
    for i in range(1, len(frames)):
        done = store.append(paths[i])
        assert done.new == (paths[i],)
        seen = pd.concat(frames[: i + 1])
        seen["g"] = pd.array([int(g) for x in frames[: i + 1] for g in x["g"]], "UInt64")
        assert_same_fit(store, seen, formula)
    assert store.append(paths[2]).skipped == (paths[2],)
    assert store.deltas[2].nobs == 0
    store.forget(2**63 + 1)
    seen = seen[seen.g != 2**63 + 1]
    store.forget(35)
    assert_same_fit(store, seen[seen.g != 35].assign(x=lambda d: d.x), formula)
    unchanged(store, lambda: store.forget(-1), "there is no group -1")
    unchanged(store, lambda: store.forget(None), "None is no label of g")
    unchanged(store, lambda: store.append(table().assign(g="a")), "group key 'g' has type")
    store.compact()
    assert_same_fit(store, seen[seen.g != 35], formula)


@pytest.mark.parametrize("weights", [None, "w"])
def test_shifted_and_recoded_sums(weights: str | None, tmp_path: Path, place: str) -> None:
    """Sums about other references, or of other combinations of columns, add and are taken out."""
    rng = np.random.default_rng(4)
    formula = "y ~ x + v + (1 + x | g)"

    def made(seed: int, far: float, near: float) -> pd.DataFrame:
        d = table(400, seed).dropna()
        d["y"] += far * (1 + d.g)
        d["v"] = d.x * (near > 0) + (near or 1.0) * rng.normal(size=len(d))
        return d

    frames = [made(1, 0, 0), made(2, 0, 1e-6), made(3, 1e6, 0), made(4, 1e6, 1e-6)]
    paths = [write(tmp_path / "d" / f"{i}.parquet", x) for i, x in enumerate(frames)]
    states = set()
    for start in (0, 1, 2):
        there = f"{place}-{start}"
        dmixed.collect(formula, paths[start], weights=weights).save(there)
        store = dmixed.open_moments(there)
        states.add((store.deltas[0].references, store.deltas[0].recoding is not None))
        others = [i for i in range(4) if i != start]
        store.append(paths[others[0]])
        store.append(tmp_path / "d")
        assert_same_fit(store, pd.concat(frames), formula, rel=1e-9, weights=weights)
        store.remove(paths[others[1]])
        rest = pd.concat([frames[i] for i in (start, others[0], others[2])])
        assert_same_fit(store, rest, formula, rel=1e-9, weights=weights)
    assert len(states) > 1


def test_arithmetic(days: Days, place: str) -> None:
    a, b = (dmixed.collect(FORMULA, name) for name in days.names[:2])
    assert_same_fit(a + b, days.rows(*days.names[:2]))
    assert (a + b).nobs == a.nobs + b.nobs
    refused(lambda: a + a, "both sums are of the file", "count twice")
    low, high = (
        dmixed.collect(FORMULA, days.names[0], filters=[("s", sign, 1)]) for sign in ("<=", ">")
    )
    for one, other in ((low, a), (a, low), (low, low)):
        refused(lambda one=one, other=other: one + other, days.names[0], "count twice")
    assert_same_fit(low + high, days.rows(days.names[0]))
    refused(lambda: a + dmixed.collect("y ~ x + (1 | g)", days.names[1]), "different models")
    (a + b).save(place)
    store = dmixed.open_moments(place)
    assert store.files == tuple(days.names[:2])
    assert store.append(days.folder).new == tuple(days.names[2:])
    assert_same_fit(store, days.rows())
    store.remove(days.names[0])
    assert_same_fit(store, days.rows(*days.names[1:]))


def test_arguments_that_are_not_valid(days: Days) -> None:
    for options, word in (
        ({"evaluate_on": "x"}, "evaluate_on='x'"),
        ({"group_crossproducts": "yes"}, "group_crossproducts='yes'"),
    ):
        refused(lambda o=options: dmixed.collect(FORMULA, days.names[0], **o), word)


def test_window_and_compact(days: Days, place: str) -> None:
    store = begun(days, place, n=4)
    store.append(table(seed=20))
    assert_same_fit(store.window(last=2), pd.concat([days.frames[days.names[3]], table(seed=20)]))
    assert store.window(5).nobs == store.nobs == store.window(50).nobs
    for last in (0, -1, True, "1", 1.0):
        refused(lambda last=last: store.window(last), "last=")
    everything = pd.concat([days.rows(), table(seed=20)])
    old, young = (f"cells-{x * 8}-00000.parquet" for x in "ab")
    half = f".{uuid4().hex}.dmixed"
    for name in (old, young, half, "notes.txt", "cells-1.parquet"):
        (Path(place) / name).write_text("left")
        if name != young:
            os.utime(Path(place) / name, (0, 0))
    store.compact()
    assert (len(store.deltas), store.version) == (1, 6)
    there = {x for x in os.listdir(place) if not x.startswith("manifest-")}
    assert there == store._directory.manifest.files | {young, "notes.txt", "cells-1.parquet"}
    assert_same_fit(store, everything)
    assert store.append(days.folder).new == ()
    store.compact()
    assert store.version == 6
    store.remove(days.names[1])
    rest = [x for x in days.names if x != days.names[1]]
    assert_same_fit(store, pd.concat([days.rows(*rest), table(seed=20)]))
    Path(days.names[1]).unlink()
    store.append(days.more(table(seed=21)))
    store.compact()
    changed = days.names[2]
    write(Path(changed), table(seed=22))
    # neither can that file be read as it was, nor rows that are in no file
    unchanged(store, lambda: store.remove(changed), changed, "has changed")


def test_small_groups(days: Days, place: str) -> None:
    moments = dmixed.collect(FORMULA, days.names[0], group_crossproducts=True)
    rows = days.rows(days.names[0])
    sizes = rows.dropna().groupby("g").size()
    least = int(np.median(sizes))
    few = sizes.index[sizes < least]
    store = moments.save(place, min_group_size=least)
    kept = rows[~rows.g.isin(few)]
    expected = dmixed.lmer(FORMULA, kept)
    assert store.fit().llf == pytest.approx(expected.llf, rel=1e-12)
    assert store.fit().dropped[f"group of fewer than {least} rows"] == sizes[few].sum()
    for bad in (0, True, "3"):
        refused(lambda bad=bad: moments.save(f"{place}-2", min_group_size=bad), "min_group_size=")
    for options in ({}, {"group_crossproducts": True, "weights": "w"}):
        other = dmixed.collect(FORMULA, days.names[0], **options)
        refused(lambda other=other: other.save(f"{place}-2", min_group_size=3), "crossproducts")
    assert not os.path.exists(f"{place}-2")


# ------------------------------------------------------------------------ remove


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("formula", [FORMULA, "y ~ x + (1 | h / g) + (1 | s)"])
def test_remove(
    formula: str, weights: str | None, days: Days, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = days.names
    e = days.more(table(seed=30).assign(f="z"))
    store = begun(days, place, formula, weights=weights)
    store.append(f"{days.folder}/day-[123].parquet")
    store.append(e)
    options = {"formula": formula, "weights": weights}
    monkeypatch.chdir(days.folder)
    store.remove("day-4.parquet")  # alone in a delta: nothing is read
    assert_same_fit(store, days.rows(a, b, c, d), **options)
    store.remove([c])
    assert_same_fit(store, days.rows(a, b, d), **options)
    assert store.files == (a, b, d)
    assert_tidy(place)
    unchanged(store, lambda: store.remove(c), c, "not of such a file", a)
    unchanged(store, lambda: store.remove([a, b, d]), "nothing would be left")
    unchanged(store, lambda: store.remove([]), "paths", "name the files")
    write(Path(b), table(seed=31))
    store.remove(b)  # the other one of the delta is as it was
    assert_same_fit(store, days.rows(a, d), **options)
    assert store.append(c).new == (c,)
    assert_same_fit(store, days.rows(a, d, c), **options)


def test_files_that_cannot_be_read_again(days: Days, place: str) -> None:
    a, b, c, d = days.names
    store = begun(days, place)
    store.append(days.folder)
    write(Path(b), table(seed=40))
    Path(c).unlink()
    unchanged(store, lambda: store.remove(b), f"{b} has changed since its rows were summed")
    unchanged(store, lambda: store.remove(c), f"{c} is gone")
    store.remove(d, data=d)
    assert_same_fit(store, days.rows(a, b, c))
    store.remove(a)
    assert_same_fit(store, days.rows(b, c))


def test_rows_in_no_file_stay(days: Days, place: str) -> None:
    """Where a delta has rows of files and others, a file's are subtracted and the others stay."""
    store = begun(days, place)
    store.append(table(seed=50))
    store.compact()
    assert len(store.deltas) == 1
    store.remove(days.names[0])
    assert_same_fit(store, table(seed=50))
    assert store.files == ()


def test_changed_and_vanished(days: Days, place: str) -> None:
    a, b, c, d = days.names
    store = begun(days, place)
    store.append(f"{days.folder}/day-[012].parquet")
    days.frames[b] = table(seed=60)
    write(Path(b), days.frames[b])
    unchanged(store, lambda: store.append(days.folder), b, 'changed="replace"')
    done = store.append(days.folder, changed="replace")
    assert (done.changed, done.new, done.skipped) == ((b,), (d,), (a, c))
    assert_same_fit(store, days.rows())
    assert_tidy(place)
    first = days.frames.pop(a)
    Path(a).unlink()
    e = write(Path(days.folder) / "day-9.parquet", table(seed=61))
    unchanged(store, lambda: store.append(days.folder, vanished="error"), a, "vanished")
    done = store.append(days.folder)
    assert (done.vanished, done.new) == ((a,), (e,))
    assert_same_fit(store, pd.concat([first, days.rows(), table(seed=61)]))
    store.remove(a)
    assert_same_fit(store, pd.concat([days.rows(), table(seed=61)]))
    done = store.append(days.folder, vanished="error")
    assert (done.new, done.vanished) == ((), ())


def test_delta_tables(tmp_path: Path, place: str) -> None:
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    lake, frames = str(tmp_path / "lake"), [table(seed=i) for i in range(4)]

    def grown(frame: pd.DataFrame, mode: str) -> None:
        rows = pa.Table.from_pandas(frame, preserve_index=False)
        deltalake.write_deltalake(lake, rows, mode=mode)

    for frame in frames[:3]:
        grown(frame, "append")
    dmixed.collect(FORMULA, lake, version=0).save(place)
    store = dmixed.open_moments(place)
    store.append(lake, version=1)
    assert_same_fit(store, pd.concat(frames[:2]))
    store.append(deltalake.DeltaTable(lake))
    assert_same_fit(store, pd.concat(frames[:3]))
    assert [x.sources[0].snapshot for x in store.deltas] == [f"delta version {i}" for i in range(3)]
    store.compact()
    store.remove(store.files[1])
    assert_same_fit(store, pd.concat([frames[0], frames[2]]))
    store.append(lake)
    deltalake.DeltaTable(lake).optimize.compact()
    grown(frames[3], "append")
    unchanged(store, lambda: store.append(lake), "it was rewritten")
    grown(frames[3], "overwrite")
    unchanged(store, lambda: store.append(lake), "it was rewritten")
    unchanged(store, lambda: store.append(lake, changed="replace"), "it was rewritten")
    store.remove(store.files[0])  # older versions still have their files
    assert_same_fit(store, pd.concat(frames[1:3]))


def test_iceberg_tables(tmp_path: Path, place: str) -> None:
    sql = pytest.importorskip("pyiceberg.catalog.sql", reason="pyiceberg[sql] is not installed")
    catalog = sql.SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}")
    catalog.create_namespace("lake")
    frames = [table(seed=i) for i in range(4)]
    rows = [pa.Table.from_pandas(x, preserve_index=False) for x in frames]
    lake = catalog.create_table("lake.t", schema=rows[0].schema)
    for x in rows[:3]:
        lake.append(x)
    snapshots = [x.snapshot_id for x in lake.snapshots()]
    dmixed.collect(FORMULA, lake, snapshot=snapshots[0]).save(place)
    store = dmixed.open_moments(place)
    assert len(store.append(lake, snapshot=snapshots[1]).new) == 1
    assert_same_fit(store, pd.concat(frames[:2]))
    assert len(store.append(lake.scan()).new) == 1
    assert_same_fit(store, pd.concat(frames[:3]))
    assert store.append(lake).new == ()
    store.compact()
    gone = store.files[1]
    unchanged(store, lambda: store.remove(gone), "'iceberg' cannot be found again", "pass data=")
    store.remove(gone, data=lake)
    assert_same_fit(store, pd.concat([frames[0], frames[2]]))
    store.append(lake)
    lake.overwrite(rows[3])
    unchanged(store, lambda: store.append(lake), "it was rewritten")
    catalog.engine.dispose()


# ------------------------------------------------------------------------ forget


FORGOTTEN = "y ~ x + f + (1 + x | t)"


def forgettable(days: Days, place: str, **options: Any) -> tuple[MomentStore, str, pd.DataFrame]:
    """A store whose group ``label`` is the only one with a level of ``f``, and the others' rows."""
    label = "grüppe-5"
    for name, frame in days.frames.items():
        frame.loc[frame.t == label, "f"] = "Ünique"
        write(Path(name), frame)
    store = begun(days, place, FORGOTTEN, **options)
    store.append(days.folder)
    rows = days.rows()
    return store, label, rows[rows.t != label].assign(old=lambda d: d.index)


def assert_no_trace(place: str, *texts: str) -> None:
    """Texts occur in no file, also where tables are compressed."""
    for name, content in contents(place).items():
        found = content
        if name.endswith(".parquet"):
            found += json.dumps(pq.read_table(Path(place) / name).to_pylist()).encode()
            found += pq.ParquetFile(Path(place) / name).metadata.to_dict().__repr__().encode()
        for text in texts:
            for spelled in (text, json.dumps(text)[1:-1]):
                assert spelled.encode() not in found, name


def dropped_with(frame: pd.DataFrame, label: str) -> int:
    return int(frame[frame.t == label].isna().any(axis=1).sum())


def test_forget_with_crossproducts(days: Days, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, label, rest = forgettable(days, place, group_crossproducts=True)
    left = ".".join(["", uuid4().hex, "dmixed"])  # what a killed process has left
    shutil.copy(Path(place) / store.deltas[0].shards[0].name, Path(place) / left)
    before = [store._directory.cells([delta]) for delta in store.deltas]
    n = store.nobs
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "collect", lambda *_: pytest.fail("rows are read"))
        assert store.forget(label) == n - store.nobs > 0
    for was, delta in zip(before, store.deltas, strict=True):
        now = store._directory.cells([delta])
        kept = [i for i, x in enumerate(was.labels.arrays[0].to_pylist()) if x != label]
        columns = [was.group.columns.index(x) for x in now.group.columns]
        own = np.ascontiguousarray(was.group.WtF[kept][:, columns][:, :, columns])
        assert now.group.WtF.tobytes() == own.tobytes()
        assert now.group.FtF.tobytes() == own.sum(axis=0).tobytes()
    assert_no_trace(place, label, "Ünique")
    assert_tidy(place)
    fit, expected = store.fit(), dmixed.lmer(FORGOTTEN, rest)
    assert fit.llf == pytest.approx(expected.llf, rel=1e-12)
    assert list(fit.fe_params.index) == list(expected.fe_params.index)
    unchanged(store, lambda: store.forget(label), f"there is no group {label!r}")
    unchanged(store, lambda: store.forget(5), "5 is no label of t", "large_string")
    unchanged(store, lambda: store.forget(("a", "b")), "must be the label of t")
    unchanged(store, lambda: store.forget({"g": 5}), "its keys must be some of t")
    unchanged(store, lambda: store.forget({}), "its keys must be some of t")

    assert store.append(days.folder).new == ()
    gone = days.names[2]
    store.remove(gone)
    rest = rest.drop(columns="old")
    kept = pd.concat([x[x.t != label] for name, x in days.frames.items() if name != gone])
    assert store.fit().llf == pytest.approx(dmixed.lmer(FORGOTTEN, kept).llf, rel=1e-12)
    again = table(seed=70).assign(t=label)
    store.append(again)
    both = pd.concat([kept, again])
    assert store.fit().llf == pytest.approx(dmixed.lmer(FORGOTTEN, both).llf, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"weights": "w"}, {"offset": "o"}])
def test_forget_by_reading_again(
    options: dict[str, Any], days: Days, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, label, rest = forgettable(days, place, **options)
    n, read = store.nobs, []
    collect = store_module.collect
    with monkeypatch.context() as patched:
        patched.setattr(
            store_module, "collect", lambda *x: read.append(collect(*x).nobs) or collect(*x)
        )
        assert store.forget(label) == n - store.nobs
    assert sum(read) == n - store.nobs  # no other row
    assert_no_trace(place, label, "Ünique")
    fit, expected = store.fit(), dmixed.lmer(FORGOTTEN, rest, **options)
    assert fit.llf == pytest.approx(expected.llf, rel=1e-12)
    assert list(fit.fe_params.index) == list(expected.fe_params.index)
    if options.get("weights") is None:
        store.remove(days.names[2])
        kept = [x[x.t != label] for name, x in days.frames.items() if name != days.names[2]]
        expected = dmixed.lmer(FORGOTTEN, pd.concat(kept), **options)
        assert store.fit().llf == pytest.approx(expected.llf, rel=1e-12)
    else:
        unchanged(store, lambda: store.remove(days.names[2]), "weighted")
    Path(days.names[1]).unlink()
    unchanged(store, lambda: store.forget("grüppe-3"), days.names[1], "is gone")


def test_groups_that_cannot_be_read_again(place: str) -> None:
    dmixed.collect(FORMULA, table(seed=80)).save(place)
    store = dmixed.open_moments(place)
    unchanged(store, lambda: store.forget(3), "in no file", "group_crossproducts=True")


def test_groups_of_several_keys(days: Days, place: str) -> None:
    formula = "y ~ x + (1 | h / g) + (1 | s)"
    store = begun(days, place, formula, 2, group_crossproducts=True)
    rows = days.rows(*days.names[:2])
    store.forget({"h": 1, "s": 2})
    rows = rows[(rows.h != 1) | (rows.s != 2)]
    assert store.fit().llf == pytest.approx(dmixed.lmer(formula, rows).llf, rel=1e-12)
    store.forget({"s": 0})
    rows = rows[rows.s != 0]
    assert store.fit().llf == pytest.approx(dmixed.lmer(formula, rows).llf, rel=1e-12)
    there = f"{place}-2"
    formula = "y ~ x + (1 | g:s)"
    store = begun(days, there, formula, 2)
    store.forget((3, 4))
    rows = days.rows(*days.names[:2])
    rows = rows[(rows.g != 3) | (rows.s != 4)]
    assert store.fit().llf == pytest.approx(dmixed.lmer(formula, rows).llf, rel=1e-12)


# ------------------------------------------------------------------------ at the same time


def test_a_writer_that_was_too_late(
    days: Days, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(days, place)
    late = [dmixed.open_moments(place) for _ in range(5)]
    store.append(days.names[1])
    crossed = contents(place)
    changes: list[Callable[[MomentStore], Any]] = [
        lambda x: x.append(days.names[2]),
        lambda x: x.append(table(seed=1)),
        lambda x: x.append(dmixed.collect(FORMULA, days.names[2])),
    ]
    for other, change in zip(late, changes, strict=False):
        refused(lambda x=other, f=change: f(x), place, "another process has changed")
        assert contents(place) == crossed
        assert other.nobs == late[-1].nobs
    monkeypatch.setattr(manifests, "HISTORY", 1)
    store.append(days.names[2])  # now the number of the late ones is free again
    store.append(days.names[3])
    assert "manifest-00000002.json" not in os.listdir(place)
    newest = manifests.newest
    seen = iter([1])  # as if it had looked just before the others wrote
    monkeypatch.setattr(manifests, "newest", lambda x: next(seen, None) or newest(x))
    refused(lambda: late[-1].append(table(seed=1)), "another process has changed")
    assert_tidy(place)
    assert_same_fit(dmixed.open_moments(place), days.rows())


WRITER = """
import os, sys, time
import dmixed
from dmixed.folders import Folder

own, place, data = sys.argv[1:]
store, create = dmixed.open_moments(place), Folder.create

def together(folder, name, content):
    open(own, "w").close()
    while not os.path.exists(os.path.join(os.path.dirname(own), "go")):
        time.sleep(0.001)
    return create(folder, name, content)

Folder.create = together
try:
    store.append(data)
except dmixed.DataError as error:
    print(error)
"""


def script(text: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(dmixed.__file__).parents[1],
    )  # fmt: skip


def test_processes_that_write_at_the_same_time(days: Days, place: str, tmp_path: Path) -> None:
    begun(days, place)
    names = days.names[1:4]
    flags = [tmp_path / f"flag-{i}" for i in range(3)]
    runs = [script(WRITER, str(x), place, y) for x, y in zip(flags, names, strict=True)]
    while not all(x.exists() for x in flags):
        assert all(run.poll() is None for run in runs)
    (tmp_path / "go").touch()
    told = []
    for run in runs:
        out, err = run.communicate(timeout=100)
        assert run.returncode == 0, err
        told.append(out)
    (winner,) = [i for i, text in enumerate(told) if not text]
    assert all("another process has changed" in x for i, x in enumerate(told) if i != winner)
    assert_tidy(place)
    store = dmixed.open_moments(place)
    assert store.files == (days.names[0], names[winner])
    store.append(days.folder)
    assert_same_fit(store, days.rows())


def test_a_reader_while_others_write(days: Days, place: str) -> None:
    store = begun(days, place, n=3)
    reader, late = dmixed.open_moments(place), dmixed.open_moments(place)
    store.compact()
    assert_same_fit(reader, days.rows(*days.names[:3]))
    assert reader.version == store.version
    refused(late.compact, "another process has changed")
    store.forget(3)
    shutil.rmtree(place)
    refused(lambda: dmixed.open_moments(place), "no moments")
    refused(lambda: store.append(days.folder), place)
    assert not os.path.exists(place) or not os.listdir(place)


# ------------------------------------------------------------------------ damage


def same_sums(a: Moments, b: Moments) -> bool:
    return all(
        getattr(a.cells.group, x).tobytes() == getattr(b.cells.group, x).tobytes()
        for x in ("WtF", "FtF", "counts")
    )


def test_damage(days: Days, place: str) -> None:
    """Whatever happens to a file: it is named, or the sums are the same to the last bit."""
    store = begun(days, place, n=3)
    right = store.moments
    whole = contents(place)
    counted = {*manifests.read_manifest(Folder.at(place)).files, "manifest-00000003.json"}
    rng, found, others = random.Random(5), 0, 0
    for trial in range(300):
        name = sorted(whole)[trial % len(whole)]
        bad = bytearray(whole[name])
        if trial % 4 == 0:
            bad = bad[: rng.randrange(len(bad))]
        else:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (Path(place) / name).write_bytes(bad)
        try:
            opened = dmixed.open_moments(place).moments
        except DataError as error:
            found += f"{place}/{name}" in str(error)
            others += f"{place}/{name}" not in str(error)
        else:  # not in use, or a bit between the values of JSON
            assert name not in counted or name.endswith(".json")
            assert same_sums(opened, right)
        (Path(place) / name).write_bytes(whole[name])
    assert others == 0
    assert found > 300 * (len(counted) - 0.5) / len(whole)
    for name in counted - {"manifest-00000003.json"}:
        (Path(place) / name).unlink()
        refused(lambda: dmixed.open_moments(place).moments, f"{place}/{name}", "No such file")
        (Path(place) / name).write_bytes(whole[name])


def test_places(days: Days, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    moments = dmixed.collect(FORMULA, days.names[0])
    for name in ("empty", "none", "file"):
        refused(lambda name=name: dmixed.open_moments(tmp_path / name), name, "no moments")
    for bad in ("", None, 3):
        refused(lambda bad=bad: dmixed.open_moments(bad), "uri=")
        refused(lambda bad=bad: moments.save(bad), "uri=")
    refused(lambda: moments.save(tmp_path / "file"), "file")
    refused(lambda: moments.save("/proc/none"), "/proc/none", "cannot be written")
    refused(lambda: moments.save(tmp_path / "days"), "there is something already")
    moments.save(tmp_path / "empty")
    refused(lambda: dmixed.open_moments("nonsense://x"), "nonsense")

    store = moments.save(place)
    put, calls = Folder.put, iter(range(100))

    def full(folder: Folder, name: str, *rest: Any, **options: Any) -> None:
        if next(calls) % 2:
            raise OSError(28, "No space left on device")
        put(folder, name, *rest, **options)

    monkeypatch.setattr(Folder, "put", full)
    unchanged(store, lambda: store.append(days.folder), place, "No space left")
    monkeypatch.undo()

    def none(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "create", none)
    unchanged(store, lambda: store.append(days.folder), place, "No space left")
    monkeypatch.undo()
    store.append(days.folder)
    assert_same_fit(store, days.rows())


def test_stored_results_and_checkpoints(days: Days, place: str) -> None:
    fit = dmixed.lmer(FORMULA, days.folder)
    fit.save(place)
    store = dmixed.open_moments(place)
    assert_same_fit(store, days.rows())
    refused(lambda: store.append(table()), "is a stored result", "save")
    refused(store.compact, "is a stored result")
    dmixed.lmer(FORMULA, days.folder, checkpoint=f"{place}-2")
    store = dmixed.open_moments(f"{place}-2")
    store.append(days.more(table(seed=90)))
    assert_same_fit(store, days.rows())


# ------------------------------------------------------------------------ killed


class Killed(BaseException):
    """The process is no more: nothing that it does from here on reaches the disk."""


class Killer:
    """Kills at a step of what changes a directory; steps are counted before and after each."""

    def __init__(self, patched: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.steps, self.dead = at, 0, False
        for name in ("put", "create", "remove"):
            patched.setattr(Folder, name, self._counted(getattr(Folder, name)))
        unlink = os.unlink
        patched.setattr(os, "unlink", lambda *x, **y: None if self.dead else unlink(*x, **y))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._step()
            found = function(*arguments, **options)
            self._step()
            return found

        return counted

    def _step(self) -> None:
        self.steps += 1
        self.dead = self.dead or self.steps == self.at
        if self.dead:
            raise Killed


@pytest.mark.parametrize(
    ("change", "n"),
    [
        (lambda store, days: store.append(days.folder), 4),
        (lambda store, days: store.append(days.folder, changed="replace"), 4),
        (lambda store, days: store.remove(days.names[1]), 4),
        (lambda store, days: store.forget(4), 4),
        (lambda store, days: store.compact(), 1),
    ],
    ids=["append", "replace", "remove", "forget", "compact"],
)
def test_killed(
    change: Callable[[MomentStore, Days], Any],
    n: int,
    days: Days,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """At whatever step: there is the state before or the one after, and the next try completes."""
    store = begun(days, place, group_crossproducts=True)
    store.append(f"{days.folder}/day-[12].parquet")
    if "replace" in request.node.name:
        write(Path(days.names[2]), table(seed=100))
    before, start = store.moments, contents(place)
    change(store, days)
    after = store.moments
    for step in range(1, 100):
        shutil.rmtree(place)
        Path(place).mkdir()
        for name, content in start.items():
            (Path(place) / name).write_bytes(content)
        store = dmixed.open_moments(place)
        with monkeypatch.context() as patched:
            killer = Killer(patched, step)
            with contextlib.suppress(Killed):
                change(store, days)
        if not killer.dead:
            break
        again = dmixed.open_moments(place)
        done = again.version > 2
        assert same_sums(again.moments, after if done else before)
        if not done:
            change(again, days)
            assert same_sums(again.moments, after)
        if step % 4 == 1:
            for name in os.listdir(place):
                os.utime(Path(place) / name, (0, 0))
            again.compact()
            assert_tidy(place)
            assert again.nobs == after.nobs
    assert step > 4


def test_killed_while_it_is_saved(days: Days, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = dmixed.collect(FORMULA, days.names[0])
    for step in range(1, 20):
        with monkeypatch.context() as patched:
            killer = Killer(patched, step)
            with contextlib.suppress(Killed):
                moments.save(place)
        if not killer.dead:
            break
        if step < 6:  # there is no manifest yet
            refused(lambda: dmixed.open_moments(place), "no moments")
        else:
            shutil.rmtree(place)
    assert step == 7
    assert same_sums(dmixed.open_moments(place).moments, moments)


KILLED = """
import os, signal, sys
import dmixed
from dmixed.folders import Folder

os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dmixed.open_moments(sys.argv[1]).append(sys.argv[2])
"""


def test_a_process_that_is_killed(days: Days, place: str) -> None:
    begun(days, place)
    run = script(KILLED, place, days.folder)
    _, err = run.communicate(timeout=100)
    assert run.returncode == -signal.SIGKILL, err
    assert any(name.endswith(".dmixed") for name in os.listdir(place))
    store = dmixed.open_moments(place)
    assert store.version == 1
    store.append(days.folder)
    for name in os.listdir(place):
        os.utime(Path(place) / name, (0, 0))
    store.compact()
    assert_tidy(place)
    assert_same_fit(store, days.rows())


# ------------------------------------------------------------------------ other places


def test_in_memory(days: Days) -> None:
    place = f"memory://{uuid4().hex}/store"
    store = dmixed.collect(FORMULA, days.names[0]).save(place)
    late = dmixed.open_moments(place)
    store.append(days.folder)
    refused(lambda: late.append(days.folder), "another process has changed")
    store.remove(days.names[1])
    store.compact()
    rest = [x for x in days.names if x != days.names[1]]
    assert_same_fit(dmixed.open_moments(place), days.rows(*rest))
    refused(lambda: dmixed.open_moments(f"memory://{uuid4().hex}"), "no moments")


def test_an_object_store(days: Days) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    secrets = {"key": "AKIDEXAMPLE", "secret": "wJalrXUtnFEMI"}
    options = {
        **secrets,
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
    }
    try:
        fs = fsspec.filesystem("s3", **options)
        fs.mkdir("storetests")

        def day(i: int) -> str:
            with fs.open(f"storetests/days/{i}.parquet", "wb") as file:
                days.frames[days.names[i]].to_parquet(file)
            return f"s3://storetests/days/{i}.parquet"

        names = [day(0)]
        place, data = "s3://storetests/kept/store", "s3://storetests/days"
        given: dict[str, Any] = {"storage_options": options}
        dmixed.collect(FORMULA, data, **given).save(place, options)
        store, late = (dmixed.open_moments(place, options) for _ in range(2))
        names += [day(1), day(2)]
        assert store.append(data, **given).new == tuple(names[1:])
        refused(lambda: late.append(data, **given), "another process has changed")
        assert late._directory.folder.create("manifest-00000002.json", b"other") is False
        store.append(table(seed=5), name="monday")
        store.remove(names[1], **given)
        store.compact()
        rest = [days.frames[days.names[0]], days.frames[days.names[2]], table(seed=5)]
        again = dmixed.open_moments(place, options)
        found = again.fit()
        assert found.llf == pytest.approx(dmixed.lmer(FORMULA, pd.concat(rest)).llf, rel=1e-12)
        assert again.append(data, vanished="error", **given).new == (names[1],)
        there = fs.find("storetests/kept", refresh=True)
        held = {x for x in there if "manifest-" not in x}
        assert held == {f"storetests/kept/store/{x}" for x in again._directory.manifest.files}
        for path in there:
            for secret in secrets.values():
                assert secret.encode() not in fs.cat_file(path)
        assert not any(secret in repr(again) for secret in secrets.values())
        message = refused(lambda: dmixed.open_moments("s3://nowhere/x", options), "nowhere")
        message += refused(lambda: again.moments.save("s3://nowhere/x", options), "nowhere")
        message += refused(lambda: again.append("s3://nowhere/x", **given), "nowhere")
        assert not any(secret in message for secret in secrets.values())
        fs.pipe_file(f"{place}/{again.deltas[0].sums}", b"PAR1")
        refused(lambda: dmixed.open_moments(place, options).moments, "columns-", "is damaged")
    finally:
        server.stop()


def test_no_pickle(days: Days, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    store = begun(days, place, n=2)
    for name in ("loads", "load", "dumps", "dump"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("pickled"))
    store.compact()
    assert dmixed.open_moments(place).moments.nobs == store.nobs


# ------------------------------------------------------------------------ on a cluster


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as found,
        Client(found, set_as_default=False) as client,
    ):
        yield client


def test_shards_on_workers(
    client: Any, days: Days, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = "y ~ x + (1 | t)"
    dmixed.collect(formula, days.names[0], client=client, evaluate_on="workers").save(place)
    store = dmixed.open_moments(place, client=client)
    monkeypatch.setattr(store_module, "DRIVER", 0)
    for module in (planning, executor):
        for name in ("WHOLE", "DRIVER"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 0)
    store.append(days.names[1])
    monkeypatch.undo()
    store.append(days.names[2])
    monkeypatch.setattr(store_module, "DRIVER", 0)
    counts = [len(delta.shards) for delta in store.deltas]
    assert counts[0] == counts[1] == planning.SHARDS
    assert counts[2] == 1
    moments = store.moments
    assert isinstance(moments.cells, dmixed.evaluation.RemoteMoments)
    rows = days.rows(*days.names[:3])
    expected = dmixed.lmer(formula, rows)
    assert store.fit().llf == pytest.approx(expected.llf, rel=1e-12)
    assert store.window(1).nobs == len(days.frames[days.names[2]].dropna())
    refused(lambda: moments + moments, "both sums")
    store.compact()
    (delta,) = store.deltas
    assert len(delta.shards) == planning.SHARDS
    assert store.fit().llf == pytest.approx(expected.llf, rel=1e-12)
    assert_tidy(place)
    here = dmixed.open_moments(place)
    assert here.fit().llf == pytest.approx(expected.llf, rel=1e-12)
    store.remove(days.names[0])
    kept = dmixed.lmer(formula, days.rows(*days.names[1:3]))
    assert store.fit().llf == pytest.approx(kept.llf, rel=1e-12)


# ------------------------------------------------------------------------ any order


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.sampled_from(["append", "append", "remove", "compact", "several"]),
                      min_size=2, max_size=6), seed=st.integers(0, 1000))  # fmt: skip
def test_any_order(steps: list[str], seed: int, tmp_path: Path) -> None:
    """Whatever is done: the fit is that of the rows that are left."""
    rng = random.Random(seed)
    root = tmp_path / uuid4().hex
    days = Days(root / "days", 6)
    store = begun(days, str(root / "store"))
    there = [days.names[0]]
    for step in steps:
        absent = [x for x in days.names if x not in there]
        if step in ("append", "several") and absent:
            some = rng.sample(absent, min(len(absent), 1 if step == "append" else 3))
            pattern = ",".join(x.rpartition("-")[2][0] for x in some)
            done = store.append(f"{days.folder}/day-[{pattern.replace(',', '')}].parquet")
            assert set(done.new) == set(some)
            there += some
        elif step == "remove" and len(there) > 1:
            there.remove(gone := rng.choice(there))
            store.remove(gone)
        elif step == "compact":
            store.compact()
        assert set(store.files) == set(there)
    assert_same_fit(store, days.rows(*there))


class TestListsOfFiles:
    """Stores of files that were given as a list, whose place is not known."""

    @pytest.fixture
    def files(self, tmp_path):
        rng = np.random.default_rng(3)
        paths = [tmp_path / "data" / f"{name}.parquet" for name in "abcd"]
        paths[0].parent.mkdir()
        for path in paths:
            g, x = rng.integers(0, 20, 200), rng.normal(size=200)
            y = x + 0.3 * g + rng.normal(size=200)
            pd.DataFrame({"y": y, "x": x, "g": g}).to_parquet(path)
        return paths

    def test_what_is_new_is_added_and_files_are_taken_out(self, files, tmp_path):
        formula = "y ~ x + (1 | g)"
        store = dmixed.collect(formula, files[:2]).save(tmp_path / "store")
        added = store.append(files[1:])
        assert (added.new, added.skipped) == (tuple(map(str, files[2:])), (str(files[1]),))
        whole = dmixed.lmer(formula, files)
        assert store.fit().llf == pytest.approx(whole.llf, abs=1e-9)
        with pytest.raises(
            DataError, match=r"a list of files such as .*a\.parquet cannot be found"
        ):
            store.remove(files[0])
        store.remove(files[0], data=files)
        assert store.fit().llf == pytest.approx(dmixed.lmer(formula, files[1:]).llf, abs=1e-9)

    def test_what_is_gone_cannot_be_told(self, files, tmp_path):
        store = dmixed.collect("y ~ x + (1 | g)", files).save(tmp_path / "store")
        with pytest.raises(
            DataError, match=r"^vanished=\"error\" goes with a folder, pattern or t"
        ):
            store.append(files[:2], vanished="error")
        assert store.append(files[:2]).vanished == ()

    def test_a_changed_file_is_replaced(self, files, tmp_path):
        formula = "y ~ x + (1 | g)"
        store = dmixed.collect(formula, files).save(tmp_path / "store")
        pd.read_parquet(files[0]).iloc[:150].to_parquet(files[0])
        assert store.append(files, changed="replace").changed == (str(files[0]),)
        assert store.nobs == 750
        assert store.fit().llf == pytest.approx(dmixed.lmer(formula, files).llf, abs=1e-9)

    def test_where_they_are_is_shown(self, files):
        moments = dmixed.collect("y ~ x + (1 | g)", files)
        assert f"{files[0]} and 3 more" in moments._repr_html_()
