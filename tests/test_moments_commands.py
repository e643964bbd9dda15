"""``dmixed moments``: the store from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import dmixed
from dmixed import cli

FORMULA = "y ~ x + (1 + x | g)"


def rows(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, 30, n), rng.normal(size=n)
    b = np.random.default_rng(0).normal(size=(30, 2))
    return pd.DataFrame({"y": 1 + x + b[g, 0] + b[g, 1] * x + rng.normal(size=n), "x": x, "g": g})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for i in range(2):
        rows(300, i).to_parquet(folder / f"{i}.parquet")
    return folder


def run(*arguments: Any, status: int = 0) -> str:
    found = CliRunner().invoke(cli.app, ["moments", *map(str, arguments)])
    assert found.exit_code == status, found.output
    return found.stdout if status == 0 else found.stderr


def test_a_store_from_the_command_line(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    one = ("--group-crossproducts",)
    assert "600 rows" in run("collect", store, "--data", data, "--formula", FORMULA, *one)
    rows(300, 2).to_parquet(data / "2.parquet")
    told = run("append", store, "--data", data)
    assert told.startswith("files: 1 new, 0 replaced, 2 known, 0 vanished; 300 rows of 30 groups")
    again = json.loads(run("append", store, "--data", data, "--json"))
    assert again["new"] == []
    assert len(again["skipped"]) == 3
    record = json.loads(run("info", store, "--json"))
    assert [part["rows"] for part in record["parts"]] == [600, 300]
    assert record["parts"][1]["files"] == [str(data / "2.parquet")]
    assert "900 rows" in run("info", store)

    whole = pd.concat([rows(300, i) for i in range(3)])
    expected = dmixed.lmer(FORMULA, whole)
    assert (
        str(expected.summary()).splitlines()[3:]
        == (run("fit", store).rstrip("\n").splitlines()[3:])
    )
    small = dmixed.lmer("y ~ 1 + (1 | g)", whole, reml=False)
    run("fit", store, "--ml", "--formula", "y ~ 1 + (1 | g)", "--out", tmp_path / "fit")
    result = json.loads((tmp_path / "fit" / "result.json").read_text())
    assert result["llf"] == pytest.approx(small.llf, rel=1e-12)

    run("window", store, "--last", 1, "--out", tmp_path / "last")
    assert dmixed.open_moments(tmp_path / "last").nobs == 300
    run("remove", store, data / "2.parquet")
    assert dmixed.open_moments(store).nobs == 600
    run("merge", store, tmp_path / "last", "--out", tmp_path / "sum")
    merged = dmixed.open_moments(tmp_path / "sum").fit()
    assert merged.llf == pytest.approx(expected.llf, rel=1e-12)
    gone = int((pd.concat([rows(300, 0), rows(300, 1)])["g"] == 7).sum())
    assert run("forget", store, "7") == f"{gone} rows taken out\n"
    run("append", store, "--data", data)
    assert "1 part" in run("compact", store)


def test_errors_are_one_line(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert "there are no moments" in run("info", store, status=1)
    run("collect", store, "--data", data, "--formula", FORMULA)
    for arguments, words in (
        (("collect", store, "--data", data, "--formula", FORMULA), "something already"),
        (("collect", tmp_path / "x", "--data", data, "--formula", FORMULA, "--min-group-size", 3),
         "group_crossproducts=True"),
        (("remove", store, "nothing.parquet"), "nothing.parquet"),
        (("forget", store, "x"), "label"),
        (("forget", store, "99"), "no group (99,)"),
        (("fit", store, "--formula", "y ~ z + (1 | g)"), "z"),
        (("append", store, "--data", tmp_path / "none"), "none"),
    ):  # fmt: skip
        message = run(*arguments, status=1)
        assert words in message
        assert message.startswith("dmixed: error: ")
        assert message.count("\n") == 1
    assert not (tmp_path / "x").exists()
    run("window", store, "--last", 0, "--out", tmp_path / "y", status=2)
