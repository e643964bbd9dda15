"""Views of the events of a fit: for a terminal, for a notebook, and plain lines.

A view keeps only the latest events, which costs microseconds; a thread of its own draws them a few
times a second, and is stopped however the work ends.
"""

from __future__ import annotations

import contextvars
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from threading import Event as Flag
from threading import Lock, Thread
from time import perf_counter
from typing import Any, Literal, Protocol

Stage = Literal["plan", "pass", "merge", "fit", "write"]

PATIENCE = 2.0
"""Seconds of work before a view appears that nobody has asked for."""

TICK = 0.1
"""Seconds between two pictures of a view."""

LINES_EVERY = 10.0
"""Seconds between two plain lines."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something was done.

    Attributes
    ----------
    stage
        "plan" (columns and parts are looked up), "pass" (rows are read), "merge" (what the tasks
        found is added), "fit" (evaluations of the criterion) or "write"
    done, total
        tasks of the stage done, and in all (None: unknown); in "fit" the evaluations so far
    rows, bytes
        read so far (in "write": written), missing values included; 0 until known
    evaluation
        number of the evaluation in its search, if this event is one
    criterion
        its criterion, deviance units (inf: not defined there)
    gradient
        its scaled gradient, max |g| / sqrt(diag H), where it was formed
    decrement
        its Newton decrement, deviance units, where it was formed
    seconds
        since the start
    message
        in words, at the end of a pass and of a fit
    """

    stage: Stage
    done: int
    total: int | None
    rows: int
    bytes: int
    evaluation: int | None
    criterion: float | None
    gradient: float | None
    decrement: float | None
    seconds: float
    message: str = ""


Progress = Callable[[Event], None]
"""Takes the events: one at a time, in order, though not always in the same thread."""


# --------------------------------------------------------------------------- events in words


def rate(amount: float, seconds: float) -> float:
    """Amount per second."""
    return amount / max(seconds, 1e-6)


_DOING = {"plan": "planning", "pass": "reading", "merge": "adding up", "write": "writing"}


def evaluation_text(
    number: int | None, criterion: float | None, gradient: float | None, decrement: float | None
) -> str:
    """An evaluation in words."""
    text = f"evaluation {number}: criterion {criterion:.6f}"
    text += "" if gradient is None else f", gradient {gradient:.1e}"
    return text + ("" if decrement is None else f", decrement {decrement:.1e}")


def _amounts(event: Event, began: float) -> str:
    """Tasks, rows and bytes, with their rates since a time."""
    seconds = event.seconds - began
    found = [] if event.total is None else [f"{event.done}/{event.total} tasks"]
    if event.rows:
        found.append(f"{event.rows:,} rows, {rate(event.rows, seconds):,.0f} rows/s")
    if event.bytes:
        found.append(f"{rate(event.bytes / 1e6, seconds):,.1f} MB/s")
    return ", ".join(found)


class _Latest:
    """The latest events, as a view draws them: two lines, and how full the bar is."""

    def __init__(self) -> None:
        self.start, self.began = perf_counter(), 0.0
        self.work: Event | None = None
        self.step: Event | None = None
        self.fitting = False

    def __call__(self, event: Event) -> None:
        self.fitting = event.stage == "fit"
        if self.fitting:
            self.step = event if event.evaluation is not None else self.step
            return
        new = self.work is None or self.work.stage != event.stage
        if event.stage in ("pass", "write") and new:
            self.began = event.seconds
        self.work = event

    @property
    def bar(self) -> tuple[int, int] | None:
        """Tasks done and in all, while they are counted."""
        work = self.work
        if self.fitting or work is None or work.total is None:
            return None
        return work.done, work.total

    def lines(self) -> tuple[str, str]:
        """What is done with the rows; the last evaluation, and the time since the start."""
        work, step = self.work, self.step
        first = "planning"
        if work is not None:
            doing = "read" if self.fitting else _DOING[work.stage]
            first = f"{doing} {_amounts(work, self.began)}".rstrip()
        minutes, seconds = divmod(int(perf_counter() - self.start), 60)
        second = f"{minutes}:{seconds:02d}"
        if step is not None:
            found = (step.evaluation, step.criterion, step.gradient, step.decrement)
            second = f"{evaluation_text(*found)}, {second}"
        elif self.fitting:
            second = f"preparing the fit, {second}"
        return first, second


# --------------------------------------------------------------------------- views


def listener(progress: Progress | bool | None) -> AbstractContextManager[Progress | None]:
    """What is to hear of the events, and the view's thread while that is open."""
    if progress is not None and not isinstance(progress, bool):
        return nullcontext(progress)
    if progress is False:
        return nullcontext(None)
    delay = 0.0 if progress else PATIENCE
    if _in_notebook():
        return _Drawn(_Notebook, delay)
    if _on_terminal():
        return _Drawn(_Terminal, delay)
    return nullcontext(_PlainLines() if progress else None)


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = getattr(sys.modules["IPython"], "get_ipython", lambda: None)()
    return shell.__class__.__name__ == "ZMQInteractiveShell"


def _on_terminal() -> bool:
    """Stderr is a terminal that can move its cursor."""
    with suppress(AttributeError, OSError, ValueError):  # None, or closed
        return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    return False


class _PlainLines:
    """A line on stderr for each evaluation and message, else at most one in 10 seconds."""

    def __init__(self) -> None:
        self.latest, self.last = _Latest(), 0.0

    def __call__(self, event: Event) -> None:
        self.latest(event)
        due = event.message or event.evaluation is not None
        if not due and event.seconds - self.last < LINES_EVERY:
            return
        line = event.message or self.latest.lines()[event.stage == "fit"]
        self.last = event.seconds
        with suppress(AttributeError, OSError, ValueError):  # a broken stderr is no error of a fit
            sys.stderr.write(f"dmixed: {line}\n")
            sys.stderr.flush()


class _Display(Protocol):
    """Something to draw on."""

    def draw(self, latest: _Latest) -> None:
        """Show the latest events."""

    def close(self) -> None:
        """Leave the place as a reader wants it."""


_SCREEN = Lock()
"""Held by the one view that draws; others wait until it is free."""


class _Drawn:
    """A view drawn by a thread of its own, which begins after a delay and ends with the work."""

    def __init__(self, display: Callable[[], _Display], delay: float) -> None:
        self._display, self._delay, self._stop = display, delay, Flag()
        self._latest = _Latest()
        run = contextvars.copy_context().run  # a notebook finds its cell by context
        self._thread = Thread(target=run, args=(self._run,), name="dmixed-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self._latest

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if self._delay and self._stop.wait(self._delay):
            return
        while not _SCREEN.acquire(timeout=TICK):
            if self._stop.is_set():
                return
        try:
            with suppress(OSError, ValueError):  # the terminal has gone
                self._draw(self._display())
        finally:
            _SCREEN.release()

    def _draw(self, display: _Display) -> None:
        try:
            while True:
                last = self._stop.is_set()
                display.draw(self._latest)
                if last:
                    return
                self._stop.wait(TICK)
        finally:
            display.close()


class _Terminal:
    """A bar and two lines on stderr, which vanish at the end."""

    def __init__(self) -> None:
        from rich.console import Console  # takes as long as a small fit: only if it is shown
        from rich.live import Live

        # What others print goes above the lines. Of stdout only if it is this terminal: rich
        # prints all of it on stderr.
        own = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=own
        )
        self._live.start()

    def draw(self, latest: _Latest) -> None:
        self._live.update(_picture(latest), refresh=True)

    def close(self) -> None:
        self._live.stop()


def _picture(latest: _Latest) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid()
    if latest.bar is not None:
        done, total = latest.bar
        rows.add_row(ProgressBar(total, done, width=40))
    for line in latest.lines():
        rows.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
    return rows


class _Notebook:
    """Two lines below the cell, of which the last state stays."""

    def __init__(self) -> None:
        self._shown = ""
        display = import_module("IPython.display").display
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def draw(self, latest: _Latest) -> None:
        text = "\n".join(latest.lines())
        if text != self._shown:
            self._shown = text
            self._handle.update({"text/plain": text}, raw=True)

    def close(self) -> None:
        """What is shown stays."""
