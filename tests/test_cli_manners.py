"""How the command line behaves: help, completion, JSON, hints, pipes, terminals and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

import dmixed
from dmixed import cli

ROOT = Path(dmixed.__file__).parent.parent
FORMULA = "y ~ x + (1 | g)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(30), 8)
    frame = pd.DataFrame({"x": rng.normal(size=240), "g": g, "weight": rng.uniform(1, 2, 240)})
    frame["y"] = 1 + 2 * frame["x"] + rng.normal(size=30)[g] + rng.normal(size=240)
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    frame.to_parquet(path)
    return str(path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dmixed")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ------------------------------------------------------------------------ help


def commands(
    group: Any = None, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    group = typer.main.get_command(cli.app) if group is None else group
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


ALL = dict(commands())


def examples(words: tuple[str, ...]) -> list[list[str]]:
    text = run(*words, "--help").stdout
    assert "\n  Examples:\n" in text, words
    lines = text.split("\n  Examples:\n")[1].split("\n\n")[0].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_examples_that_parse_and_the_statuses(words: tuple[str, ...]) -> None:
    text = run(*words, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "Exit status: 0" in " ".join(text.split())
    found = examples(words)
    assert found
    for line in found:
        assert line[0] == "dmixed"
        stop = next((i for i, word in enumerate(line) if word in ("|", ">")), len(line))
        arguments = line[1:stop]
        assert tuple(arguments[: len(words)]) == words
        group, command = ALL[()], None
        if arguments == ["--install-completion"]:
            continue
        while arguments and arguments[0] in getattr(group, "commands", {}):
            group = command = group.commands[arguments.pop(0)]
        assert command is not None
        command.make_context("dmixed", list(arguments), resilient_parsing=False).close()


@pytest.mark.parametrize("words", [(), ("fit",)], ids=" ".join)
@pytest.mark.parametrize("more", [{}, {"TERM": "dumb"}])
def test_no_escapes_in_a_pipe(words: tuple[str, ...], more: dict[str, str]) -> None:
    call = [sys.executable, "-m", "dmixed", *words, "--help"]
    found = subprocess.run(call, env=environment(**more), capture_output=True, check=True)
    assert b"\x1b" not in found.stdout + found.stderr


@pytest.mark.parametrize("more", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_no_colours_on_a_terminal_that_wants_none(data: str, more: dict[str, str]) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "dmixed", "fit", "--data", data, "--formula", FORMULA]
    subprocess.run(call, env=environment(**more), stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "Mixed Linear Model" in shown
    assert "\x1b[3" not in shown


# ------------------------------------------------------------------------ completion


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("dmixed fi", {"fit"}),
        ("dmixed moments com", {"compact"}),
        ("dmixed fit --meth", {"--method"}),
        ("dmixed fit --method trust-e", {"trust-exact"}),
        ("dmixed fit --method L", {"L-BFGS-B"}),
        ("dmixed fit --missing ", {"drop", "raise", "none"}),
        ("dmixed predict --interval ", {"confidence", "prediction"}),
    ],
)
def test_bash_completes(line: str, wanted: set[str]) -> None:
    words = line.split(" ")
    found = subprocess.run(
        [sys.executable, "-c", "from dmixed.cli import main; main()"],
        env=environment(_DMIXED_COMPLETE="complete_bash", COMP_WORDS=line,
                        COMP_CWORD=str(len(words) - 1)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert set(found.stdout.split()) == wanted, found.stderr


# ------------------------------------------------------------------------ JSON


def test_a_fit_is_one_document(data: str, tmp_path: Path) -> None:
    out = tmp_path / "fit"
    found = run("fit", "--data", data, "--formula", FORMULA, "--json", "-v", "--out", out)
    assert found.exit_code == 0
    record = strict(found.stdout)
    assert "dmixed: " in found.stderr
    file = strict((out / "result.json").read_text())
    file.pop("random_effects")
    assert record == file
    assert record["aic"] is None


def test_other_commands_are_one_document(data: str, tmp_path: Path) -> None:
    plan = strict(run("plan", "--data", data, "--formula", FORMULA, "--json").stdout)
    assert plan["rows"] == 240
    model, store = tmp_path / "model", tmp_path / "store"
    run("fit", "--data", data, "--formula", FORMULA, "--save", model)
    found = run(
        *("predict", "--model", model, "--data", data, "--out", tmp_path / "p", "--json", "-v")
    )
    record = strict(found.stdout)
    assert record["rows"] == 240
    assert [x["file"] for x in record["files"]] == ["part-00000.parquet"]
    assert "240 rows" in found.stderr
    run("moments", "collect", store, "--data", data, "--formula", FORMULA)
    assert strict(run("moments", "info", store, "--json", "-v").stdout)["rows"] == 240
    fitted = strict(run("moments", "fit", store, "--json").stdout)
    assert fitted["llf"] == pytest.approx(dmixed.lmer(FORMULA, data).llf, rel=1e-12)


def test_an_error_is_one_document_too(data: str, tmp_path: Path) -> None:
    for arguments in (
        ("fit", "--data", data, "--formula", "y ~ nosuch + (1 | g)"),
        ("plan", "--data", data, "--formula", "y ~ nosuch + (1 | g)"),
        ("predict", "--model", tmp_path / "nosuch", "--data", data, "--out", tmp_path / "o"),
        ("moments", "info", tmp_path / "nosuch"),
    ):
        found = run(*arguments, "--json")
        assert found.exit_code == 1
        assert "nosuch" in strict(found.stdout)["error"]
        assert found.stderr.startswith("dmixed: error: ")


# ------------------------------------------------------------------------ hints


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("fot",), "Did you mean 'fit'"),
        (("moments", "inf"), "Did you mean 'info'"),
        (("fit", "--dta", "x"), "--data"),
        (("fit", "--formula", "y ~ xx + (1 | g)"), "did you mean 'x'?"),
        (("fit", "--formula", "y ~ x + (1 | gg)"), "did you mean 'g'?"),
        (("fit", "--formula", "y ~ x $ z + (1 | g)"), "at character 7"),
        (("fit", "--formula", "y ~ x + (1 | g"), "one is not closed"),
        (("fit", "--formula", "y ~ x) + (1 | g)"), "closed that was not opened"),
        (("fit", "--formula", "y ~ lgo(x) + (1 | g)"), "did you mean log()?"),
        (("fit", "--formula", "y ~ x"), "(1 | "),
        (("fit", "--formula", "x + (1 | g)"), "needs one '~'"),
        (("fit", "--formula", FORMULA, "--weights", "wieght"), "did you mean 'weight'?"),
        (("fit", "--formula", FORMULA, "--offset", "qqq"), "they have "),
        (("fit", "--formula", FORMULA, "--method", "lbfgs"), "did you mean 'L-BFGS-B'?"),
        (("fit", "--formula", FORMULA, "--missing", "igno"), "'drop'"),
        (("fit", "--formula", FORMULA, "--filter", "xx"), "COLUMN OPERATOR VALUE"),
        (("fit", "--formula", FORMULA, "--filter", "xx > 1"), "which has: "),
        (("fit", "--formula", FORMULA, "--out", "s3://bucket/x"), "write to one and copy it"),
        (("fit", "--formula", FORMULA, "--scheduler", "foo"), "tcp://host:port"),
        (("fit", "--formula", FORMULA, "--data", "/nosuch.parquet"), "check the path"),
        (("fit", "--formula", FORMULA, "--data", ""), "current folder"),
        (("predict", "--model", "/nosuch", "--out", "/nosuch/o"), "dmixed fit --save"),
        (("moments", "info", "/nosuch"), "dmixed moments collect"),
    ],
)
def test_every_error_says_what_to_try(data: str, arguments: tuple[str, ...], hint: str) -> None:
    asks = arguments[0] in ("fit", "predict") and "--data" not in arguments
    found = run(*arguments, *(("--data", data) if asks else ()))
    assert found.exit_code in (cli.Status.ERROR, cli.Status.USAGE)
    assert hint in " ".join(found.stderr.split())
    if found.exit_code == cli.Status.ERROR:
        assert len(found.stderr.splitlines()) == 1
    assert "Traceback" not in found.output


# ------------------------------------------------------------------------ pipes and signals


@pytest.mark.parametrize("words", [("demo",), ("fit", "--help")])
def test_a_reader_that_goes_away(words: tuple[str, ...]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    call = [sys.executable, "-m", "dmixed", *words]
    found = subprocess.run(
        call, env=environment(), stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert found.stderr == ""
    assert found.returncode == 1


def test_ctrl_c(data: str, tmp_path: Path) -> None:
    # A fit that never ends: the search waits for a method that is slow on purpose.
    ready = tmp_path / "ready"
    code = (
        "import time, pathlib, dmixed, dmixed.cli\n"
        "def forever(*_, **__):\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    time.sleep(100)\n"
        "dmixed.lmer = forever\n"
        "dmixed.cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "fit", "--data", data, "--formula", FORMULA],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert out == ""
    assert err.splitlines() == ["dmixed: interrupted"]
