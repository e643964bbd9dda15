"""Progress: what is told, where it is shown, and that nothing is left behind."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from typer.testing import CliRunner

import dmixed
from dmixed import cli, views
from dmixed.progress import Event, Report, open_progress
from dmixed.sources import base

FORMULA = "y ~ x + (1 | g)"
ROWS, PARTS = 600, 5


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    g, x = np.repeat(np.arange(30), 20), rng.normal(size=ROWS)
    y = 1 + x + rng.normal(size=30)[g] + rng.normal(size=ROWS)
    d = pd.DataFrame({"y": y, "x": x, "g": g})
    d.loc[[5, 400], "x"] = np.nan
    return d


@pytest.fixture(scope="module")
def files(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    for i, rows in enumerate(np.array_split(np.arange(ROWS), PARTS)):
        frame.iloc[rows].to_parquet(folder / f"part-{i}.parquet")
    return str(folder)


@pytest.fixture
def parted(files: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The files, where each of them is a part."""
    monkeypatch.setattr(base, "ROWS", ROWS // PARTS)
    return files


class Step:
    """What a report reads of an evaluation."""

    def __init__(self, value: float) -> None:
        self.value, self.decrement = value, 0.5


def stages(events: list[Event]) -> list[str]:
    return [name for name, _ in groupby(event.stage for event in events)]


def assert_complete(events: list[Event], result: dmixed.MixedLMResults, tasks: int) -> None:
    """Every task and every evaluation is there once, in order."""
    assert stages(events) == ["plan", "pass", "merge", "fit"]
    assert all(a.seconds <= b.seconds for a, b in pairwise(events))
    counted = [(e.done, e.total) for e in events if e.stage == "pass" and e.total is not None]
    assert counted == [(i, tasks) for i in range(tasks + 1)]
    assert all(e.rows == ROWS for e in events if e.stage == "fit")
    steps = [e for e in events if e.evaluation is not None]
    assert [e.criterion for e in steps] == [s.value for s in result.optimizer_summary.path]
    assert [e.evaluation for e in steps] == list(range(1, len(steps) + 1))
    assert events[-1].done == len(steps)
    assert "converged" in events[-1].message


# ------------------------------------------------------------------------ events


def test_events_of_a_frame(frame: pd.DataFrame) -> None:
    events: list[Event] = []
    assert_complete(events, dmixed.lmer(FORMULA, frame, progress=events.append), 1)


def test_events_of_files(parted: str) -> None:
    events: list[Event] = []
    assert_complete(events, dmixed.lmer(FORMULA, parted, progress=events.append), PARTS)


def test_events_of_a_cluster(parted: str) -> None:
    events: list[Event] = []
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        result = dmixed.lmer(FORMULA, parted, client=client, progress=events.append)
    assert_complete(events, result, PARTS)


def test_models_tell_what_they_do_when_they_do_it(frame: pd.DataFrame, files: str) -> None:
    made: list[Event] = []
    other: list[Event] = []
    model = dmixed.mixedlm("y ~ x", frame.dropna(), groups="g", progress=made.append)
    assert stages(made) == ["plan", "pass", "merge"]
    model.fit(progress=False)
    assert stages(made) == ["plan", "pass", "merge"]
    model.fit(progress=other.append)
    assert stages(other) == ["fit"]
    model.fit()
    assert stages(made) == ["plan", "pass", "merge", "fit"]

    lazy: list[Event] = []
    model = dmixed.mixedlm("y ~ x", files, groups="g", missing="drop", progress=lazy.append)
    assert lazy == []
    model.fit()
    assert stages(lazy) == ["plan", "pass", "merge", "fit"]


def test_arrays_tell_it_too(frame: pd.DataFrame) -> None:
    d = frame.dropna()
    events: list[Event] = []
    dmixed.MixedLM(d["y"], d[["x"]], d["g"], progress=events.append).fit()
    assert stages(events) == ["plan", "pass", "merge", "fit"]


def test_callback_is_still_called(frame: pd.DataFrame) -> None:
    numbers: list[int] = []
    events: list[Event] = []
    dmixed.lmer(FORMULA, frame, progress=events.append, callback=lambda k, _: numbers.append(k))
    assert numbers == [e.evaluation for e in events if e.evaluation is not None]


def test_a_gradient_is_told_where_a_step_has_one() -> None:
    class Steeper(Step):
        gradient = 3.0

    events: list[Event] = []
    report = Report(events.append)
    report.step(1, Steeper(2.0))
    steps = Step(float("inf"))
    steps.decrement = float("nan")
    report.step(2, steps)
    assert [(e.gradient, e.decrement) for e in events] == [(3.0, 0.5), (None, None)]


def test_tasks_told_by_many_threads_come_one_at_a_time() -> None:
    events: list[Event] = []
    with open_progress(events.append) as report:
        report.stage("pass", 400)
        threads = [
            threading.Thread(target=lambda: [report.task(10, 100) for _ in range(50)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [(e.done, e.rows, e.bytes) for e in events if e.stage == "pass"]
    assert found == [(i, 10 * i, 100 * i) for i in range(401)]


# ------------------------------------------------------------------------ errors


def test_what_is_no_progress_is_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(dmixed.DataError, match="progress='yes'"):
        dmixed.lmer(FORMULA, frame, progress="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RuntimeError("mine"), np.linalg.LinAlgError("mine")])
@pytest.mark.parametrize("stage", ["plan", "pass", "fit"])
def test_an_exception_ends_the_fit(parted: str, stage: str, error: Exception) -> None:
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        if event.stage == stage and (event.done >= 2 or stage == "plan"):
            raise error

    with pytest.raises(type(error)) as caught:
        dmixed.lmer(FORMULA, parted, progress=listen)
    assert caught.value is error
    assert seen[-1].stage == stage  # it hears nothing more


def test_an_exception_in_another_thread_reaches_the_one_that_opened() -> None:
    def listen(event: Event) -> None:
        if event.done:
            raise RuntimeError("mine")

    def work(report: Report) -> None:
        thread = threading.Thread(target=report.task)  # warnings are errors: it must not raise
        thread.start()
        thread.join()
        assert isinstance(report.failure, RuntimeError)

    def checking(report: Report) -> None:
        work(report)
        report.check()
        raise AssertionError("not reached")

    def cancelled(report: Report) -> None:
        work(report)
        raise TimeoutError("cancelled")

    for body in (work, checking, cancelled):
        with pytest.raises(RuntimeError, match="mine"), open_progress(listen) as report:
            body(report)


# ------------------------------------------------------------------------ terminals


class Terminal:
    """A pseudo-terminal as stderr; what was written to it."""

    def __init__(self) -> None:
        pty = pytest.importorskip("pty")
        self._ours, self._theirs = pty.openpty()
        self.file = os.fdopen(self._theirs, "w")
        self._found: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while not self._found or b"\x04" not in self._found[-1]:
            self._found.append(os.read(self._ours, 65536))

    def close(self) -> str:
        self.file.write("\x04")
        self.file.flush()
        self._reader.join()
        self.file.close()
        os.close(self._ours)
        return b"".join(self._found).decode().rstrip("\x04^D\b")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """What some work shows on a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(work: Callable[[], object]) -> str:
        terminal = Terminal()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", terminal.file)
                work()
                assert sys.stderr is terminal.file
        finally:
            text = terminal.close()
        return text

    return run


Shown = Callable[[Callable[[], object]], str]


def assert_cursor_visible(text: str) -> None:
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_a_terminal_shows_evaluations(frame: pd.DataFrame, shown: Shown) -> None:
    text = shown(lambda: dmixed.lmer(FORMULA, frame, progress=True))
    assert f"read 1/1 tasks, {ROWS} rows" in text or f"read {ROWS} rows" in text
    assert re.search(r"evaluation \d+: criterion \d+\.\d{6}, decrement", text)
    assert_cursor_visible(text)


def test_an_exception_leaves_the_terminal_as_it_was(frame: pd.DataFrame, shown: Shown) -> None:
    def interrupt(number: int, _: object) -> None:
        if number == 3:
            time.sleep(2.5 * views.TICK)
            signal.raise_signal(signal.SIGINT)

    def fail(number: int, _: object) -> None:
        raise RuntimeError("mine")

    def work(callback: Callable[[int, object], None], error: type[BaseException]) -> None:
        with pytest.raises(error):
            dmixed.lmer(FORMULA, frame, progress=True, callback=callback)

    text = shown(lambda: work(interrupt, KeyboardInterrupt))
    assert "evaluation 3: criterion" in text
    assert_cursor_visible(text)
    assert_cursor_visible(shown(lambda: work(fail, RuntimeError)))
    assert not any(t.name == "dmixed-progress" for t in threading.enumerate())


def passing(progress: bool | None, seconds: float) -> None:
    """A pass whose tasks take a millisecond."""
    with open_progress(progress) as report:
        report.stage("pass", 1_000_000)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                report.task(10, 1000)
            time.sleep(0.001)


def test_a_terminal_is_drawn_ten_times_a_second_at_most(shown: Shown) -> None:
    start = time.perf_counter()
    text = shown(lambda: passing(True, 0.55))
    seconds = time.perf_counter() - start
    pictures = text.count("reading") + text.count("planning")
    assert 2 <= pictures <= 4 + seconds / views.TICK  # first, last, and rich's own at both ends
    assert "/1000000 tasks" in text
    assert "MB/s" in text


def test_a_view_waits_before_it_appears(
    monkeypatch: pytest.MonkeyPatch, frame: pd.DataFrame, shown: Shown
) -> None:
    assert shown(lambda: dmixed.lmer(FORMULA, frame)) == ""
    monkeypatch.setattr(views, "PATIENCE", 0.05)
    assert "reading" in shown(lambda: passing(None, 0.2))


def test_off_is_off(frame: pd.DataFrame, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PATIENCE", 0.001)
    assert shown(lambda: dmixed.lmer(FORMULA, frame, progress=False)) == ""


def test_no_colour_and_dumb_terminals(
    monkeypatch: pytest.MonkeyPatch, frame: pd.DataFrame, shown: Shown
) -> None:
    coloured = r"\x1b\[[0-9;]*m"
    assert re.search(coloured, shown(lambda: passing(True, 0.15)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown(lambda: passing(True, 0.15)))
    monkeypatch.setenv("TERM", "dumb")
    text = shown(lambda: dmixed.lmer(FORMULA, frame, progress=True))
    assert "\x1b" not in text
    assert "dmixed: evaluation 1: criterion" in text
    monkeypatch.setattr(views, "PATIENCE", 0.001)
    assert shown(lambda: dmixed.lmer(FORMULA, frame)) == ""


def test_two_fits_at_once_do_not_draw_over_each_other(shown: Shown) -> None:
    def work() -> None:
        with open_progress(True) as outer:
            outer.stage("write", 7)
            time.sleep(2 * views.TICK)
            passing(True, 2 * views.TICK)

    text = shown(work)
    assert "writing" in text
    assert "reading" not in text


# ------------------------------------------------------------------------ pipes and logs


def test_plain_lines_in_a_pipe(frame: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    result = dmixed.lmer(FORMULA, frame, progress=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert all(line.startswith("dmixed: ") for line in lines)
    assert len(lines) == result.optimizer_summary.evaluations + 2
    assert "read 600 rows" in lines[0]
    assert "2 dropped" in lines[0]
    assert "converged" in lines[-1]


def test_nothing_in_a_pipe_unless_asked(
    frame: pd.DataFrame, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "PATIENCE", 0.001)
    dmixed.lmer(FORMULA, frame)
    dmixed.lmer(FORMULA, frame, progress=False)
    assert capsys.readouterr() == ("", "")


def test_plain_lines_are_few(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passing(True, 0.05)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(views, "LINES_EVERY", 0.05)
    start = time.perf_counter()
    passing(True, 0.22)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= (time.perf_counter() - start) / 0.05
    assert "rows/s" in lines[0]


def test_a_broken_stderr_is_no_error(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w") as closed:
        pass
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert dmixed.lmer(FORMULA, frame, progress=True).converged


def test_events_cost_little() -> None:
    def cost(report: Report, n: int = 500) -> float:
        start = time.perf_counter()
        for _ in range(n):
            report.task(10, 1000)
        return (time.perf_counter() - start) / n

    # 3 microseconds on an idle machine; 20 are promised
    assert min(cost(Report(views._Latest())) for _ in range(20)) < 20e-6


def test_the_log(frame: pd.DataFrame, caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger("dmixed").handlers == []
    with caplog.at_level(logging.DEBUG, "dmixed"):
        result = dmixed.lmer(FORMULA, frame)
    info = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    debug = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert len(info) == 3
    assert FORMULA in info[0]
    assert re.search(r"600 rows .* rows/s\), 2 dropped \(.*x.*: 2\)", info[1])
    assert f"{result.optimizer_summary.evaluations} evaluations" in info[2]
    assert result.optimizer_summary.reason in info[2]
    assert len(debug) == result.optimizer_summary.evaluations
    assert logging.getLogger("dmixed").handlers == []


# ------------------------------------------------------------------------ command line, notebook


def test_options_of_the_command(files: str) -> None:
    def stderr(*options: str) -> str:
        arguments = ["fit", "--data", files, "--formula", FORMULA, *options]
        found = CliRunner().invoke(cli.app, arguments)
        assert found.exit_code == 0
        assert found.stdout.lstrip().startswith("Mixed Linear Model")
        return found.stderr

    assert stderr() == ""
    assert stderr("--no-progress") == ""
    assert "dmixed: evaluation 1: criterion" in stderr("--progress")
    assert "read 600 rows" in stderr("-v")
    assert "evaluation" not in stderr("-v").replace(" evaluations in", "")
    assert "evaluation 1: criterion" in stderr("-vv")
    assert logging.getLogger("dmixed").handlers == []


@contextmanager
def kernel(folder: Path) -> Iterator[Callable[[str], list[str]]]:
    """Runs a cell in a notebook's kernel; gives the texts displayed."""
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    path = os.pathsep.join([str(Path(dmixed.__file__).parent.parent), *sys.path])
    manager, client = start_new_kernel(env={**os.environ, "PYTHONPATH": path})

    def run(code: str) -> list[str]:
        texts: list[str] = []

        def hear(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] in ("display_data", "update_display_data"):
                texts.append(content["data"]["text/plain"])
            elif message["msg_type"] in ("error", "stream"):
                texts.append(str(content))

        client.execute_interactive(code, output_hook=hear, timeout=60)
        return texts

    try:
        yield run
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook_shows_it(files: str, tmp_path: Path) -> None:
    with kernel(tmp_path) as run:
        texts = run(f"import dmixed; d = dmixed.lmer({FORMULA!r}, {files!r}, progress=True)")
        assert texts[0] == ""
        assert re.search(r"evaluation \d+: criterion", texts[-1])
        assert run(f"d = dmixed.lmer({FORMULA!r}, {files!r})") == []
