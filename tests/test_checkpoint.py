"""Fits that are stopped go on: the same bits of the moments, and never another fit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import dmixed
from dmixed import checkpoint, cli, model, planning
from dmixed.cellmoments import CellMoments
from dmixed.errors import DataError
from dmixed.folders import Folder, lies_within
from dmixed.formula import parse
from dmixed.manifests import Manifest, manifest_name, read_manifest
from dmixed.moments import GroupMoments
from dmixed.momentstore import read, write

MANIFEST = manifest_name(1)
FORMULA = "y ~ x + f + (1 + x | g)"
N = 600


def table(n: int = N, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, h, x = rng.integers(0, 40, n), rng.integers(0, 5, n), rng.normal(0, 1, n)
    y = 1 + x + rng.normal(0, 1, 40)[g] * (1 + 0.5 * x) + rng.normal(0, 1, n)
    labels = np.array([f"grüppe {i}" for i in range(40)])
    d = pd.DataFrame({"y": y, "x": x, "f": rng.choice(["a", "b"], n), "g": labels[g], "n": g})
    d["h"], d["w"], d["o"] = h, rng.uniform(0.5, 2, n), 0.1 * x
    d["day"] = [(pd.Timestamp("2024-02-27") + pd.Timedelta(days=int(j))).date() for j in g]
    d["e"] = rng.normal(0, 1, n)
    d["far"] = 1e7 * rng.normal(0, 1, 40)[g] + y
    d.loc[d.index.isin([3, 500]), "x"] = np.nan
    return d


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Four files of rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(N), 4)):
        table().iloc[part].to_parquet(folder / f"part-{i}.parquet")
    return str(folder)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "kept" / "here")


def assert_same_fit(a: dmixed.MixedLMResults, b: dmixed.MixedLMResults) -> None:
    """Estimates to ten digits, relative to their errors or sizes."""
    assert a.converged
    assert b.converged
    assert a.llf == pytest.approx(b.llf, rel=1e-12)
    for name in ("fe_params", "bse_fe", "cov_re", "scale"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-10)


def assert_same_moments(a: CellMoments, b: CellMoments) -> None:
    """To the last bit."""
    assert a.sizes == b.sizes
    assert a.labels.names == b.labels.names
    for one, other in zip(a.labels.arrays, b.labels.arrays, strict=True):
        assert one.type == other.type
        assert one.equals(other)
    assert (a.group.columns, a.group.random) == (b.group.columns, b.group.random)
    assert (a.group.frame, a.group.log_weights) == (b.group.frame, b.group.log_weights)
    for name in ("WtF", "FtF", "plain", "counts", "reference"):
        one, other = getattr(a.group, name), getattr(b.group, name)
        assert one is other is None or one.tobytes() == other.tobytes(), name
    assert (dict(a.levels), dict(a.dropped)) == (dict(b.levels), dict(b.dropped))
    assert a.spec.compatible(b.spec)
    assert a.spec.references == b.spec.references


def refused(place: str, data: Any, *words: str, formula: str = FORMULA, **options: Any) -> None:
    with pytest.raises(DataError) as error:
        dmixed.lmer(formula, data, checkpoint=place, **options)
    for word in (place, *words):
        assert word in str(error.value)


# ------------------------------------------------------------------------ moments


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (FORMULA, {}),
        ("y ~ x + (1 | n)", {"weights": "w", "offset": "o"}),
        ("y ~ f * x + (x | day)", {}),
        ("y ~ x + (1 | g:day) + (1 | h)", {"weights": "w"}),
        ("far ~ x + (1 + x | g)", {}),
        ("far ~ x + (1 | n)", {"weights": "w"}),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_round_trip(
    formula: str, options: dict[str, str], shards: bool, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shards:
        monkeypatch.setattr(planning, "WHOLE", 0)
    given = options.get("weights"), options.get("offset")
    found = model.MixedLM._of(parse(formula), data, *given, "drop", None, None, {}).moments
    assert isinstance(found, CellMoments)
    assert found.spec.references == formula.startswith("far")
    shards = shards and "h" not in formula  # several factors stay together
    assert bool(found.sizes) == shards
    folder = Folder.at(f"memory://moments/{uuid4().hex}")
    written = write(folder, found)
    manifest = read_manifest(folder)
    assert manifest == written
    assert manifest.nbytes == found.group.nbytes - 2 * found.group.FtF.nbytes
    assert_same_moments(read(folder, manifest), found)
    (delta,) = manifest.deltas
    assert len(delta.shards) == (planning.SHARDS if shards else 1)


def test_all_of_the_moments_is_written() -> None:
    """Whoever gives moments another field must write and read it, or refuse to."""
    names = "columns random frame WtF FtF plain counts log_weights reference recoding"
    assert {field.name for field in fields(GroupMoments)} == set(names.split())
    names = "spec levels labels group dropped sizes"
    assert {field.name for field in fields(CellMoments)} == set(names.split())


@pytest.mark.parametrize("weights", [None, "w"])
def test_recoded_columns(weights: str | None) -> None:
    rng = np.random.default_rng(0)
    n = 3000
    d = pd.DataFrame({"g": rng.integers(0, 60, n), "x": rng.normal(size=n)})
    d["z"] = d["x"] + 1e-6 * rng.normal(size=n)  # nearly dependent
    d["y"] = d["x"] + rng.normal(size=60)[d["g"]] + rng.normal(size=n)
    d["w"] = rng.uniform(0.5, 2.0, n)
    parsed = parse("y ~ x + z + (1 + x | g)")
    found = model.MixedLM._of(parsed, d, weights, None, "drop", None, None, {}).moments
    assert found.group.recoding is not None
    folder = Folder.at(f"memory://moments/recoded-{weights}")
    again = read(folder, write(folder, found))
    assert_same_moments(again, found)
    assert again.group.recoding == found.group.recoding


def test_shards_without_cells(data: str) -> None:
    one = model.MixedLM._of(parse(FORMULA), data, None, None, "drop", None, None, {}).moments
    few = replace(one, sizes=(0, one.n_cells, 0))
    folder = Folder.at("memory://moments/few")
    assert_same_moments(read(folder, write(folder, few)), few)


# ------------------------------------------------------------------------ going on


def test_a_fit_that_is_resumed(data: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dmixed.lmer(FORMULA, data)
    first = dmixed.lmer(FORMULA, data, checkpoint=place)
    assert first.to_dict() == plain.to_dict()
    assert {*os.listdir(place)} == files_of(read_manifest(Folder.at(place)))
    state = json.loads((Path(place) / "progress.json").read_text())
    assert list(state) == [
        *("schema", "moments", "reml", "evaluations", "criterion", "Psi", "sha256"),
    ]
    assert state["criterion"] == pytest.approx(-2 * plain.llf)
    np.testing.assert_allclose(state["Psi"], plain.cov_re / plain.scale, rtol=1e-8)

    with monkeypatch.context() as patched:
        patched.setattr(model, "collect", lambda *_: pytest.fail("the rows are read again"))
        resumed(data, place, plain, len(first.optimizer_summary.path))
    for reml in (False, True):  # the other criterion is not begun where this one was
        own = dmixed.lmer(FORMULA, data, reml, checkpoint=place)
        assert_same_fit(own, dmixed.lmer(FORMULA, table(), reml))


def files_of(manifest: Manifest) -> set[str]:
    """All files of a checkpoint of one delta of one shard."""
    (delta,) = manifest.deltas
    token = delta.id
    assert manifest.files == {f"cells-{token}-00000.parquet", f"columns-{token}.parquet"}
    return {*manifest.files, manifest_name(manifest.version), "progress.json"}


def resumed(data: str, place: str, plain: dmixed.MixedLMResults, done: int) -> None:
    events: list[Any] = []
    again = dmixed.lmer(FORMULA, data, checkpoint=place, progress=events.append)
    assert_same_fit(again, plain)
    assert "pass" not in {event.stage for event in events}
    told = [event.message for event in events if event.message]
    assert told[0] == (
        f"resumed from {place}: the 598 rows are not read again, {done} evaluations were done"
    )
    assert len(again.optimizer_summary.path) < done
    np.testing.assert_allclose(again.ranef(), plain.ranef(), rtol=1e-9)
    assert np.allclose(again.fittedvalues, plain.fittedvalues)
    assert_same_moments(again._prepared.here, plain._prepared.here)


def test_models_in_words(data: str, place: str) -> None:
    def made(**options: Any) -> dmixed.MixedLM:
        return dmixed.mixedlm(
            "y ~ x", data, groups="g", vc_formula={"v": "0 + C(h)"}, missing="drop", **options
        )

    plain = made().fit()
    assert_same_fit(made(checkpoint=place).fit(), plain)
    again = made(checkpoint=place)
    assert_same_fit(again.fit(), plain)
    assert_same_fit(again.fit(method="bfgs"), plain)
    assert again.fit(do_cg=False).llf < plain.llf
    with pytest.raises(DataError, match="groups, re_formula and vc_formula"):
        dmixed.mixedlm("y ~ x", data, groups="g", missing="drop", checkpoint=place).fit()


def test_variances_of_zero(data: str, place: str) -> None:
    """A search that begins at zero can leave it, and the methods of scipy do not begin there."""
    for formula in ("y ~ x + (1 | h) + (1 | g)", "e ~ f + (1 + x | h)"):
        there = f"{place}/{formula[0]}"
        plain = dmixed.lmer(formula, data, checkpoint=there)
        for method in (None, "L-BFGS-B"):
            again = dmixed.lmer(formula, data, checkpoint=there, method=method)
            assert again.llf == pytest.approx(plain.llf, abs=1e-6)
    file = Path(there) / "progress.json"
    state = json.loads(file.read_text())
    q = len(state["Psi"])
    state |= {"Psi": [[0.0] * q] * q}
    del state["sha256"]
    Folder.at(there).put("progress.json", checkpoint.record_bytes(checkpoint.SearchState(**state)))
    for method in (None, "L-BFGS-B"):
        again = dmixed.lmer(formula, data, checkpoint=there, method=method)
        assert again.llf == pytest.approx(plain.llf, abs=1e-6)


SCRIPT = """
import os, signal, sys
import dmixed
from dmixed.folders import Folder

when, formula, data, place = sys.argv[1:]
create = Folder.create

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killing(folder, name, content):
    if when == "manifest":
        kill()
    return create(folder, name, content)

def told(event):
    if when == "pass" and event.stage == "pass" and event.done:
        kill()
    if when == "moments" and event.message.startswith("moments of"):
        kill()
    if when == "evaluations" and event.evaluation == 4:
        kill()

if when == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
Folder.create = killing
try:
    dmixed.lmer(formula, data, checkpoint=place, progress=told)
except dmixed.DataError as error:
    print(error)
"""


def test_processes_that_are_killed(data: str, tmp_path: Path) -> None:
    plain = dmixed.lmer(FORMULA, data)
    whens = ("pass", "manifest", "moments", "evaluations", "full")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."])}
    runs = {
        when: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, when, FORMULA, data, str(tmp_path / when)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=Path(dmixed.__file__).parents[1],
        )
        for when in whens
    }  # fmt: skip
    for when, run in runs.items():
        out, err = run.communicate(timeout=120)
        place = tmp_path / when
        if when == "full":
            assert f"checkpoint {place}: cannot be written: File too large" in out
            assert os.listdir(place) == []
        else:
            assert run.returncode == -signal.SIGKILL, (when, err)
        complete = when in ("moments", "evaluations")
        assert (place / MANIFEST).exists() == complete
        assert (place / "progress.json").exists() == (when == "evaluations")
        if complete:
            folder = Folder.at(place)
            assert_same_moments(read(folder, read_manifest(folder)), plain._prepared.here)
        events: list[Any] = []
        again = dmixed.lmer(FORMULA, data, checkpoint=place, progress=events.append)
        assert_same_fit(again, plain)
        told = [event.message for event in events]
        assert any(x.startswith("resumed") for x in told) == complete
        assert any("4 evaluations were done" in x for x in told) == (when == "evaluations")


# ------------------------------------------------------------------------ what is refused


def test_another_model(data: str, place: str) -> None:
    dmixed.lmer(FORMULA, data, checkpoint=place)
    before = (Path(place) / MANIFEST).read_bytes()
    end = "Choose another directory"
    refused(place, data, f"the formula is 'y ~ x + (1 | g)', it was {FORMULA!r}", end,
            formula="y ~ x + (1 | g)")  # fmt: skip
    refused(place, data, "weights is 'w', it was None", end, weights="w")
    refused(place, data, "offset is 'o', it was None", end, offset="o")
    refused(place, data, "missing is 'none', it was 'drop'", end, missing="none")
    refused(place, data, "filters are", "they were none", filters=[("h", ">", 1)])
    refused(place, data, "weights is 'w'", weights="w", resume=True)
    refused(place, pd.read_parquet(data), "kind 'pandas', they were 'parquet'")
    assert (Path(place) / MANIFEST).read_bytes() == before


def test_filters(data: str, place: str) -> None:
    import pyarrow.compute as pc

    for i, filters in enumerate(([("h", ">", 1)], pc.field("h") > 1, pc.field("h").isin([2, 3]))):
        there = f"{place}-{i}"
        first = dmixed.lmer(FORMULA, data, filters=filters, checkpoint=there)
        assert_same_fit(dmixed.lmer(FORMULA, data, filters=filters, checkpoint=there), first)
        refused(there, data, "filters are none", resume=None)
    many, more = pc.field("n").isin(range(40)), pc.field("n").isin([*range(20), 99, *range(21, 40)])
    dmixed.lmer(FORMULA, data, filters=many, checkpoint=place)
    refused(place, data, "filters are is_in(n", filters=more)


def test_other_files(data: str, place: str, tmp_path: Path) -> None:
    dmixed.lmer(FORMULA, data, checkpoint=place)
    part, extra = Path(data) / "part-2.parquet", Path(data) / "part-9.parquet"
    whole = shutil.copy2(part, tmp_path / "whole")
    table(7).to_parquet(extra)
    refused(place, data, f"{extra} is new. Choose another directory")
    refused(place, data, f"{extra} is new", resume=True)
    extra.unlink()
    table(150, seed=4).to_parquet(part)
    refused(place, data, f"{part} changed. Choose another directory")
    part.unlink()
    refused(place, data, f"{part} vanished. Choose another directory")
    shutil.copy2(whole, part)
    dmixed.lmer(FORMULA, data, checkpoint=place)
    os.utime(part)
    refused(place, data, f"{part} changed")

    before = read_manifest(Folder.at(place)).files
    again = dmixed.lmer(FORMULA, data, checkpoint=place, resume=False)
    assert_same_fit(again, dmixed.lmer(FORMULA, data))
    manifest = read_manifest(Folder.at(place))
    assert manifest.version == 2
    assert not manifest.files & before
    assert {*os.listdir(place)} == {MANIFEST, *files_of(manifest)}
    dmixed.lmer(FORMULA, data, checkpoint=place)


def test_a_replacement_that_fails_keeps_what_was_there(
    data: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dmixed.lmer(FORMULA, data, checkpoint=place)
    before = {*os.listdir(place)}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "create", full)
    refused(place, data, "cannot be written: No space left on device", resume=False)
    monkeypatch.undo()
    assert {*os.listdir(place)} == before
    assert_same_fit(dmixed.lmer(FORMULA, data, checkpoint=place), first)


def test_versions_of_a_table(place: str, tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    lake = str(tmp_path / "lake")
    deltalake.write_deltalake(lake, pa.Table.from_pandas(table()))
    dmixed.lmer(FORMULA, lake, checkpoint=place)
    dmixed.lmer(FORMULA, lake, checkpoint=place)
    deltalake.write_deltalake(lake, pa.Table.from_pandas(table(50)), mode="append")
    refused(place, lake, "the table is delta version 1, it was delta version 0")
    dmixed.lmer(FORMULA, lake, version=0, checkpoint=place)


def test_data_that_cannot_be_compared(place: str) -> None:
    for i, data in enumerate((table(), dd.from_pandas(table(), npartitions=3, sort=False))):
        there = f"{place}-{i}"
        first = dmixed.lmer(FORMULA, data, checkpoint=there)
        refused(there, data, "resume=True if they are, resume=False to start over")
        assert_same_fit(dmixed.lmer(FORMULA, data, checkpoint=there, resume=True), first)
        assert_same_fit(dmixed.lmer(FORMULA, data, checkpoint=there, resume=False), first)
    refused(f"{place}-0", table(40), "the data have 40 rows, they had 600", resume=True)


def test_arguments(data: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="resume= goes with checkpoint="):
        dmixed.lmer(FORMULA, data, resume=True)
    with pytest.raises(DataError, match="resume='yes': must be None, True or False"):
        dmixed.lmer(FORMULA, data, checkpoint=place, resume="yes")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="checkpoint=3: must be a directory"):
        dmixed.lmer(FORMULA, data, checkpoint=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="calls twice, given by context="):
        dmixed.lmer("y ~ twice(x) + (1 | g)", data, context={"twice": abs}, checkpoint=place)
    inside = f"{data}/kept"
    refused(inside, data, "lies among the data")
    dmixed.lmer(FORMULA, data, checkpoint=f"{data}/_kept")
    dmixed.lmer(FORMULA, data, checkpoint=f"{data}/_kept")
    stored = str(tmp_path / "stored")
    dmixed.lmer(FORMULA, data).save(stored)
    refused(stored, data, "is a stored result", resume=False)
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", Path("/proc/none")):
        refused(str(bad), data, f"checkpoint {bad}: cannot be written")


def test_files_that_the_manifest_does_not_name(data: str, place: str) -> None:
    first = dmixed.lmer(FORMULA, data, checkpoint=place)
    for name in (
        "cells-0123abcd-00000.parquet",
        "cells-00000.parquet",
        "manifest.json",
        "notes.txt",
        ".x.dmixed",
    ):
        (Path(place) / name).write_text("nothing")
    assert_same_fit(dmixed.lmer(FORMULA, data, checkpoint=place), first)


def outcome(data: str, place: str) -> tuple[dmixed.MixedLMResults | None, str]:
    """A fit, or why there is none."""
    try:
        return dmixed.lmer(FORMULA, data, checkpoint=place), ""
    except DataError as error:
        return None, str(error)


def test_damage(data: str, place: str) -> None:
    """Whatever happens to a file: it is named, or the fit is the same."""
    first = dmixed.lmer(FORMULA, data, checkpoint=place)
    whole = {name: (Path(place) / name).read_bytes() for name in os.listdir(place)}
    rng, outcomes = random.Random(8), {True: 0, False: 0}
    for trial in range(200):
        name = rng.choice(sorted(whole))
        bad = bytearray(whole[name])
        if trial % 4 == 0:
            bad = bad[: rng.randrange(len(bad))]
        else:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (Path(place) / name).write_bytes(bad)
        found, message = outcome(data, place)
        assert f"{place}/{name}" in message or found is not None
        assert found is None or name.endswith(".json")
        if found is not None:  # a bit between the values of JSON
            assert_same_fit(found, first)
        outcomes[found is None] += 1
        for known, content in whole.items():
            (Path(place) / known).write_bytes(content)
    assert outcomes[True] > 180
    for name in whole:
        if name not in (MANIFEST, "progress.json"):
            (Path(place) / name).unlink()
            refused(place, data, f"{place}/{name}: cannot be read: No such file")
            (Path(place) / name).write_bytes(whole[name])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("Psi", [[1.0]], "Psi: must be numbers (2, 2)"),
        ("Psi", [[1.0, 0.0], [0.0, -1.0]], "Psi: a covariance matrix is not positive"),
        ("Psi", [[None, 0.0], [0.0, 1.0]], "Psi: a covariance matrix must hold finite numbers"),
        ("Psi", "x", "Psi: must be a list"),
        ("evaluations", -1, "progress.json"),
        ("reml", 1, "reml: must be true or false"),
    ],
)
def test_forged_progress(data: str, place: str, field: str, value: Any, message: str) -> None:
    from dmixed import records

    dmixed.lmer(FORMULA, data, checkpoint=place)
    file = Path(place) / "progress.json"
    state = {**json.loads(file.read_text()), field: value}
    state.pop("sha256")
    file.write_text(json.dumps({**state, "sha256": records._checksum(state)}))
    refused(place, data, str(file), message, "remove it")


def test_no_pickle(data: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    dmixed.lmer(FORMULA, data, checkpoint=place)
    for name in ("loads", "load"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("pickled"))
    folder = Folder.at(place)
    read(folder, read_manifest(folder))


def test_the_command_line(data: str, place: str) -> None:
    arguments = ["fit", "--data", data, "--formula", FORMULA, "--checkpoint", place, "-v"]
    runner = CliRunner()
    first, again = (runner.invoke(cli.app, arguments) for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert "598 rows are not read again" in again.stderr
    assert first.stdout == again.stdout
    other = runner.invoke(cli.app, [*arguments, "--weights", "w"])
    assert other.exit_code == 1
    assert "weights is 'w', it was None" in other.stderr


# ------------------------------------------------------------------------ other places


def test_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "AKIDEXAMPLE",
        "secret": "wJalrXUtnFEMI",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
    }
    try:
        fs = fsspec.filesystem("s3", **options)
        fs.mkdir("checkpoints")
        with fs.open("checkpoints/rows/a.parquet", "wb") as file:
            table().to_parquet(file)
        given: dict[str, Any] = {
            "storage_options": options,
            "checkpoint": "s3://checkpoints/kept/here",
        }
        first = dmixed.lmer(FORMULA, "s3://checkpoints/rows", **given)
        names = {path.rpartition("/")[2] for path in fs.find("checkpoints/kept/here", refresh=True)}
        manifest = read_manifest(Folder.at("s3://checkpoints/kept/here", options))
        assert names == files_of(manifest)
        told: list[str] = []
        again = dmixed.lmer(
            FORMULA, "s3://checkpoints/rows", progress=lambda e: told.append(e.message), **given
        )
        assert_same_fit(again, first)
        assert told[1].startswith("resumed from s3://checkpoints/kept/here")
        assert "wJalrXUtnFEMI" not in fs.cat_file(f"checkpoints/kept/here/{MANIFEST}").decode()
        sums = manifest.deltas[0].sums
        fs.pipe_file(f"checkpoints/kept/here/{sums}", b"PAR1")
        place = "s3://checkpoints/kept/here"
        refused(place, "s3://checkpoints/rows", f"{sums}: is damaged", storage_options=options)
        with fs.open("checkpoints/rows/a.parquet", "wb") as file:
            table(seed=3).to_parquet(file)
        refused(place, "s3://checkpoints/rows", "a.parquet changed", storage_options=options)
        with pytest.raises(DataError) as error:
            dmixed.lmer(
                FORMULA,
                "s3://checkpoints/rows",
                storage_options=options,
                checkpoint="s3://nowhere/x",
            )
        assert "checkpoint s3://nowhere/x: cannot be written" in str(error.value)
        assert "wJalrXUtnFEMI" not in str(error.value)
    finally:
        server.stop()


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


@pytest.mark.timeout(180)
def test_shards_on_workers(client: Any, data: str, place: str) -> None:
    plain = dmixed.lmer(FORMULA, data)
    given: dict[str, Any] = {"client": client, "checkpoint": place}
    first = dmixed.lmer(FORMULA, data, evaluate_on="workers", **given)
    shards = sorted(name for name in os.listdir(place) if name.startswith("cells"))
    assert len(shards) >= planning.SHARDS
    assert_close(first, plain)

    assert_close(dmixed.lmer(FORMULA, data, client=client, checkpoint=place), plain)
    again = dmixed.lmer(FORMULA, data, evaluate_on="workers", **given)
    assert again._prepared.shards
    assert_close(again, plain)

    moments = again._prepared.moments
    holders = {worker for held in client.who_has(list(moments.futures)).values() for worker in held}
    victim = sorted(holders)[0]
    pids = client.run(os.getpid, workers=[victim])
    os.kill(pids[victim], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while victim in client.scheduler_info()["workers"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert moments.each(_nobs) is not None
    assert sum(client.gather(moments.each(_nobs))) == 598
    assert_close(dmixed.lmer(FORMULA, data, evaluate_on="workers", **given), plain)

    (Path(place) / shards[0]).write_bytes(b"")
    refused(place, data, shards[0], client=client, evaluate_on="workers")


def _nobs(moments: CellMoments) -> int:
    return moments.nobs


def assert_close(a: dmixed.MixedLMResults, b: dmixed.MixedLMResults) -> None:
    """As good as sums in another order allow."""
    assert a.llf == pytest.approx(b.llf, abs=1e-8)
    assert np.allclose(a.fe_params, b.fe_params, rtol=1e-9)
    assert np.allclose(a.cov_re, b.cov_re, rtol=1e-7)
    assert (a.nobs, a.n_groups, a.dropped) == (b.nobs, b.n_groups, b.dropped)


@pytest.mark.timeout(120)
def test_a_directory_that_workers_do_not_see(client: Any, data: str) -> None:
    place = "memory://only/here"
    refused(place, data, "cannot use it: the directory is another one on",
            client=client, evaluate_on="workers")  # fmt: skip
    assert dmixed.lmer(FORMULA, data, client=client, checkpoint=place).converged


@pytest.mark.parametrize(
    ("place", "data", "expected"),
    [
        ("/d/ck", "/d", True),
        ("/d", "/d", True),
        ("/dd", "/d", False),
        ("/d/_ck", "/d", False),
        ("/d/ck", "/d/*", True),
        ("/d/_ck/x", "/d/*", False),
        ("/d/ck", "/d/*.parquet", False),
        ("/d/ck", "/d/**/x.parquet", True),
        ("/d/_a/ck", "/d/*/ck", False),
        ("/d[1]/ck", "/d[1]", True),
        ("s3://b/d/ck", "s3://b/d/*", True),
        ("s3://c/d", "s3://b/d", False),
        ("/d/ck", "file:///d", True),
        ("file:///d/ck", "/d", True),
    ],
)
def test_what_lies_among_the_data(place: str, data: str, expected: bool) -> None:
    assert lies_within(place, data) is expected
