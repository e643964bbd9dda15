"""The command line: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
from distributed import LocalCluster
from typer.testing import CliRunner, Result

import dmixed
from dmixed import cli, resultfiles

ROOT = Path(dmixed.__file__).parent.parent
FORMULA = "y ~ x + (x | g)"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(30), 8)
    x = rng.normal(size=240)
    b = rng.normal(size=(30, 2))
    y = 1 + 2 * x + b[g, 0] + b[g, 1] * x + rng.normal(size=240)
    labels = np.array([f"town {j}" for j in range(30)])[g]
    return pd.DataFrame({"y": y, "x": x, "g": labels, "h": g % 7, "w": rng.uniform(1, 2, 240)})


@pytest.fixture(scope="module")
def data(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "towns.parquet"
    frame.to_parquet(path)
    return str(path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dmixed")


def fit(data: str | Path, *arguments: str | Path, formula: str = FORMULA) -> Result:
    return run("fit", "--data", data, "--formula", formula, *arguments)


def in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dmixed", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_one_line(result: Result | subprocess.CompletedProcess[str], *words: str) -> None:
    """Exactly one line on stderr, with these words, and no traceback."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dmixed: ")
    for word in words:
        assert word in lines[0]


# ------------------------------------------------------------------------ status 0: fitted


def test_fit_prints_the_summary_and_nothing_else(data: str) -> None:
    result = fit(data)
    assert result.exit_code == cli.Status.FITTED
    assert result.stderr == ""
    assert result.stdout == f"{dmixed.lmer(FORMULA, data).summary()}\n"


def test_options_reach_the_model(data: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "fit"
    options = ("--ml", "--weights", "w", "--offset", "h", "--method", "trust-exact", "--out", out)
    assert fit(data, *options).exit_code == cli.Status.FITTED
    found = json.loads((out / "result.json").read_text())
    expected = dmixed.lmer(FORMULA, frame, reml=False, weights="w", offset="h")
    assert found["method"] == "ML"
    assert found["optimizer"]["method"] == "trust-exact"
    assert found["llf"] == pytest.approx(expected.llf, rel=1e-9)
    assert found["fe_params"] == pytest.approx(expected.fe_params.to_dict(), rel=1e-6)


def test_several_data(data: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    halves = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    for path, rows in zip(halves, np.array_split(np.arange(len(frame)), 2), strict=True):
        frame.iloc[rows].to_parquet(path)
    both = fit(halves[0], "--data", halves[1], "--json")
    assert both.exit_code == 0
    whole, found = json.loads(fit(data, "--json").stdout), json.loads(both.stdout)
    assert (found["llf"], found["nobs"]) == (pytest.approx(whole["llf"], abs=1e-9), 240)
    assert "twice" in fit(data, "--data", data).stderr


def test_out_holds_the_result_and_the_random_effects(data: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "fit"
    assert fit(data, "--out", out).exit_code == cli.Status.FITTED
    assert sorted(path.name for path in out.iterdir()) == [
        "random_effects.parquet",
        "result.json",
    ]
    assert os.listdir(out.parent) == ["fit"]
    assert out.stat().st_mode == out.parent.stat().st_mode

    expected = dmixed.lmer(FORMULA, data)
    text = (out / "result.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["aic"] is None  # NaN under REML
    assert found["converged"] is True
    assert found["fe_params"] == pytest.approx(expected.fe_params.to_dict())

    effects = pd.read_parquet(out / "random_effects.parquet")
    assert list(effects.columns) == ["g", "Intercept", "x"]
    pd.testing.assert_frame_equal(effects.set_index("g"), expected.ranef(), check_index_type=False)


def test_composite_keys_are_columns_of_the_random_effects(data: str, tmp_path: Path) -> None:
    assert fit(data, "--out", tmp_path / "fit", formula="y ~ x + (1 | g:h)").exit_code == 0
    effects = pd.read_parquet(tmp_path / "fit" / "random_effects.parquet")
    assert list(effects.columns) == ["g", "h", "Intercept"]


def test_a_slope_over_the_key_itself_does_not_clash(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = frame.assign(g=frame["h"] + 1.0)
    table.to_parquet(tmp_path / "data.parquet")
    result = fit(tmp_path / "data.parquet", "--out", tmp_path / "f", formula="y ~ x + (0 + g | g)")
    assert result.exit_code == 0, result.stderr
    effects = pd.read_parquet(tmp_path / "f" / "random_effects.parquet")
    assert list(effects.columns) == ["group g", "g"]


def test_an_empty_directory_is_filled_in_place(data: str, tmp_path: Path) -> None:
    out = tmp_path / "mounted"
    out.mkdir()
    inode = out.stat().st_ino
    assert fit(data, "--out", out).exit_code == 0
    assert out.stat().st_ino == inode
    assert sorted(os.listdir(out)) == ["random_effects.parquet", "result.json"]


def test_dropped_rows_are_counted(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = frame.copy()
    table.loc[[3, 5], "x"] = np.nan
    table.to_parquet(tmp_path / "data.parquet")
    result = fit(tmp_path / "data.parquet", "--out", tmp_path / "fit")
    assert result.exit_code == 0
    assert "x: missing (2)" in result.stdout
    found = json.loads((tmp_path / "fit" / "result.json").read_text())
    assert sum(found["dropped"].values()) == 2


def test_scheduler(data: str) -> None:
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        result = fit(data, "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == fit(data).stdout


def test_demo_explains_what_it_fitted(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert found["nobs"] == 7185
    assert found["n_groups"] == 160
    # lme4: fixef 1.439979, llf -23257.2672
    assert found["llf"] == pytest.approx(-23257.267201547533, abs=1e-6)
    assert "What one sees\n* A unit of status above the school's mean goes with 1.44" in (
        result.stdout
    )


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"dmixed {dmixed.__version__}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("fit", "--help"), ("demo", "--help")])
def test_help_tells_the_exit_status(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "Exit status: 0 fitted, 1 error, 2 wrong usage, 3 did not converge." in words


# ------------------------------------------------------------------------ status 1: error


@pytest.mark.parametrize(
    ("formula", "options", "culprit"),
    [
        ("y ~ nosuch + (1 | g)", (), "nosuch"),
        ("y ~ x + (1 | nosuch)", (), "nosuch"),
        ("y ~ x", (), "(1 | "),
        ("y ~ x + (1 | g", (), "y ~ x + (1 | g"),
        ("y ~ x + (1 | (g/h):x)", (), "the group must be a column"),
        ("y ~ __import__('os').system('true') + (1 | g)", (), "__import__"),
        ("y ~ x + (1 | g)", ("--weights", "nosuch"), "nosuch"),
        ("g ~ x + (1 | h)", (), "'g'"),
    ],
)
def test_a_failed_fit_is_one_line_and_leaves_nothing(
    data: str, tmp_path: Path, formula: str, options: tuple[str, ...], culprit: str
) -> None:
    result = fit(data, *options, "--out", tmp_path / "a" / "fit", formula=formula)
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "error: ", culprit)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is not Parquet PAR1")
    for path in (broken, tmp_path / "absent.parquet", tmp_path / "none-*.parquet"):
        result = fit(path, "--out", tmp_path / "fit")
        assert result.exit_code == cli.Status.ERROR
        assert_one_line(result, "error: ", path.name)
    assert os.listdir(tmp_path) == ["broken.parquet"]


@pytest.mark.parametrize("missing", ["raise", "none"])
def test_missing_values_can_be_an_error(frame: pd.DataFrame, tmp_path: Path, missing: str) -> None:
    table = frame.copy()
    table.loc[17, "x"] = np.nan
    table.to_parquet(tmp_path / "data.parquet")
    result = fit(tmp_path / "data.parquet", "--missing", missing)
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "x", "17")


def test_out_is_refused_before_the_fit(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmixed, "lmer", lambda *_, **__: pytest.fail("fitted all the same"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("1")
    result = fit(data, "--out", full)
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "not empty", str(full))

    for out in (full / "precious", full / "precious" / "below"):
        result = fit(data, "--out", out)
        assert result.exit_code == cli.Status.ERROR
        assert_one_line(result, "ot a directory", str(out))
    assert (full / "precious").read_text() == "1"


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_nothing(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "fit"
    if exists:
        out.mkdir()
    monkeypatch.setattr(resultfiles.json, "dumps", full_disk)
    result = fit(data, "--out", out)
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "No space left on device")
    assert os.listdir(tmp_path) == (["fit"] if exists else [])
    assert not exists or os.listdir(out) == []


def test_an_unforeseen_error_is_one_line(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr(dmixed, "lmer", bug)
    result = fit(data)
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "KeyError")


def test_no_scheduler(data: str) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
        for address in ("tcp://127.0.0.1:1", "nonsense://x"):
            result = fit(data, "--scheduler", address)
            assert result.exit_code == cli.Status.ERROR
            assert_one_line(result, address)


def test_what_is_no_address(data: str) -> None:
    # in a process: what a client says when it is deleted goes past the command's own stderr
    options = ("--data", data, "--formula", FORMULA)
    result = in_a_process("fit", *options, "--scheduler", "garbage")
    assert result.returncode == cli.Status.ERROR
    assert_one_line(result, "no Dask scheduler answers at garbage")


# ------------------------------------------------------------------------ status 2: usage


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((), "Usage"),
        (("fit",), "--data"),
        (("fit", "--data", "a.parquet"), "--formula"),
        (("fit", "--data", "a", "--formula", "b", "--missing", "ignore"), "--missing"),
        (("fit", "--data", "a", "--formula", "b", "--method", "guess"), "L-BFGS-B"),
        (("fit", "--data", "a", "--formula", "b", "--out", "s3://bucket/x"), "--out"),
        (("fit", "--data", "a", "--formula", "b", "--nosuch"), "--nosuch"),
        (("nosuch",), "nosuch"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], culprit: str) -> None:
    result = run(*arguments)
    assert result.exit_code == cli.Status.USAGE
    assert culprit in result.output


# ------------------------------------------------------------------------ status 3: no optimum


def test_no_convergence(data: str, tmp_path: Path) -> None:
    # COBYLA stops at a trust region of 1e-4: nowhere near what a certificate asks for.
    result = fit(data, "--method", "COBYLA", "--out", tmp_path / "fit")
    assert result.exit_code == cli.Status.NOT_CONVERGED
    assert re.search(r"Converged: +No", result.stdout)
    assert_one_line(result, "did not converge", "nothing is written")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ in a process of its own


def test_statuses_of_a_process(data: str, tmp_path: Path) -> None:
    good = in_a_process("fit", "--data", data, "--formula", FORMULA, "--out", tmp_path / "fit")
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    assert good.stdout == f"{dmixed.lmer(FORMULA, data).summary()}\n"

    bad = in_a_process("fit", "--data", data, "--formula", "y ~ nosuch + (1 | g)")
    assert bad.returncode == 1
    assert_one_line(bad, "nosuch")

    usage = in_a_process("fit", "--data", data)
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr

    lost = in_a_process("fit", "--data", data, "--formula", FORMULA, "--method", "COBYLA")
    assert lost.returncode == 3
    assert_one_line(lost, "did not converge")


def test_progress_is_shown_on_a_terminal(data: str) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "dmixed", "fit", "--data", data, "--formula", FORMULA, "--progress"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        timeout=120,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert re.search(r"evaluation \d+: criterion", shown)
    assert "\x1b" not in process.stdout
    assert process.stdout.lstrip().startswith("Mixed Linear Model")
