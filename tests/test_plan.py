"""A plan says what a fit then does."""

from __future__ import annotations

import json

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from typer.testing import CliRunner

import dmixed
from dmixed import planning
from dmixed.cli import app
from dmixed.executor import plan_pass

FORMULA = "y ~ x + (1 + x | g)"


def table(n=20_000, groups=3_000, share=0.0, order="shuffled"):
    rng = np.random.default_rng(0)
    g = rng.integers(0, groups, n)
    if order == "clustered":
        g.sort()
    g[rng.random(n) < share] = 7
    x = rng.normal(size=n)
    y = x + rng.normal(size=groups)[g] + rng.normal(size=n)
    return pd.DataFrame({"y": y, "x": x, "unused": 0.0, "g": g})


def files(folder, data, number=5):
    for i, part in enumerate(np.array_split(np.arange(len(data)), number)):
        data.iloc[part].to_parquet(folder / f"part-{i}.parquet", index=False)
    return str(folder)


@pytest.mark.parametrize("order", ["shuffled", "clustered"])
def test_of_files(tmp_path, order):
    path = files(tmp_path, table(order=order))
    found = dmixed.plan(FORMULA, path)
    result = dmixed.lmer(FORMULA, path)
    happened = found.compare(result)
    assert happened["rows"] == (20_000, 20_000)
    assert found.rows_counted
    planned, actual = happened["groups"]
    assert actual / 1.3 < planned < actual * 1.3
    planned, actual = happened["moments_bytes"]
    assert actual / 1.5 < planned < actual * 1.5
    assert happened["evaluated"] == ("this process", "this process")
    assert found.clustered == (order == "clustered")
    assert found.columns == ("y", "x", "g")
    assert (found.passes, found.warnings) == (1, ())
    whole = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert 0.5 * whole < found.bytes_to_read < whole
    json.dumps(found.to_dict())
    text = str(found)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "20,000 in 1 part, read by 1 task" in text
    assert "<table>" in found._repr_html_()


def test_nothing_is_read_but_a_sample(tmp_path, monkeypatch):
    path = files(tmp_path, table())

    def refuse(*args, **kwargs):
        raise AssertionError("rows were read")

    monkeypatch.setattr("dmixed.cellmoments.stream", refuse)
    assert dmixed.plan(FORMULA, path).rows == 20_000


def test_the_pass_is_divided_as_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WHOLE", 0)
    path = files(tmp_path, table())
    found = dmixed.plan(FORMULA, path)
    result = dmixed.lmer(FORMULA, path)
    assert found.shards == len(result._prepared.here.sizes) == planning.SHARDS
    model = dmixed.mixedlm("y ~ x", path, groups="g", missing="drop")
    _, again = plan_pass(model.spec, model.source, model._pilot)
    assert len(again.layout.runs) == found.tasks


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_of_frames(kind):
    data = table()
    frame = data if kind == "pandas" else dd.from_pandas(data, npartitions=40)
    found = dmixed.plan(FORMULA, frame)
    assert found.rows == pytest.approx(20_000, rel=0.1)
    assert found.rows_counted == (kind == "pandas")
    assert found.bytes_to_read is None
    assert "Bytes to read:        unknown" in str(found)


def test_a_giant_group_is_harmless_and_reported(tmp_path):
    path = files(tmp_path, table(share=0.35))
    found = dmixed.plan(FORMULA, path)
    (warning,) = found.warnings
    assert "of the sampled rows have one key" in warning
    result = dmixed.lmer(FORMULA, path)
    assert result.converged
    (note,) = result.notes
    assert "One group has 34% of the rows" in note
    whole = dmixed.lmer(FORMULA, table(share=0.35))
    assert result.llf == pytest.approx(whole.llf, abs=1e-6)


def test_on_a_cluster():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster),
    ):
        found = dmixed.plan(FORMULA, table(), evaluate_on="workers")
        assert (found.workers, found.threads, found.evaluated) == (2, 2, "workers")
        assert "2 workers, 2 threads" in str(found)


def test_what_cannot_be_planned(tmp_path):
    with pytest.raises(dmixed.DataError, match="'z'"):
        dmixed.plan("y ~ z + (1 | g)", table())
    with pytest.raises(dmixed.DataError, match="evaluate_on"):
        dmixed.plan(FORMULA, table(), evaluate_on="moon")
    with pytest.raises(dmixed.DataError, match="no Parquet file"):
        dmixed.plan(FORMULA, str(tmp_path))


def test_the_command(tmp_path):
    path = files(tmp_path, table())
    shown = CliRunner().invoke(app, ["plan", "--data", path, "--formula", FORMULA])
    assert shown.exit_code == 0
    assert "20,000 in 1 part, read by 1 task" in shown.stdout
    some = ["plan", "--data", path, "--formula", FORMULA, "--filter", "x > 0"]
    assert "about" in CliRunner().invoke(app, some).stdout
    wrong = CliRunner().invoke(app, ["plan", "--data", path, "--formula", "y ~ z + (1|g)"])
    assert wrong.exit_code == 1
    assert "error" in wrong.stderr
