"""How far a fit is: the work tells a `Report`, and the report tells one listener.

The listener is the caller's function or a view (see `views`). The logger "dmixed" is told the same
in words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
from time import perf_counter
from typing import Any, Protocol, TypeVar

from dmixed.errors import DataError
from dmixed.views import Event, Progress, Stage, evaluation_text, listener, rate

__all__ = ["Event", "Progress", "Report", "Stage", "checked", "open_progress"]

logger = logging.getLogger("dmixed")


class StepLike(Protocol):
    """What a report reads of an `optimizer.Step`; its ``gradient`` too, if there is one."""

    @property
    def value(self) -> float:
        """Criterion, deviance units."""

    @property
    def decrement(self) -> float:
        """Newton decrement, deviance units; nan where it was not formed."""


class SummaryLike(Protocol):
    """What a report reads of an `optimizer.OptimizeSummary`."""

    @property
    def converged(self) -> bool:
        """The certificate passed."""

    @property
    def reason(self) -> str:
        """Why the optimiser stopped."""


S = TypeVar("S", bound=StepLike)


# --------------------------------------------------------------------------- what the work calls


class Report:
    """What the work tells of itself; made by `open_progress`, thread-safe.

    An exception of the listener is the last that the listener hears of. In the thread that opened
    the report it is raised at once; another thread does not see it, and the opening thread gets
    it from its next call, from `check` or at the end.

    Attributes
    ----------
    failure
        the exception of the listener, if there was one: stop the work
    """

    def __init__(self, listen: Progress | None = None) -> None:
        self.failure: BaseException | None = None
        self._listen, self._owner, self._lock = listen, get_ident(), Lock()
        self._start = perf_counter()
        self._stage: Stage = "plan"
        self._began: dict[Stage, float] = {"plan": 0.0}
        self._done, self._rows, self._bytes = 0, 0, 0
        self._total: int | None = None

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return self._listen is not None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start

    def _since(self, stage: Stage) -> float:
        return self.seconds - self._began.get(stage, 0.0)

    def stage(self, name: Stage, total: int | None = None) -> None:
        """Begin a stage of ``total`` tasks; "pass" and "write" count rows from zero.

        Called again with the same name it counts anew, for example when the total is known.
        """
        with self._lock:
            if name != self._stage:
                self._began[name] = self.seconds
            self._stage, self._done, self._total = name, 0, total
            if name in ("pass", "write"):
                self._rows = self._bytes = 0
            self._tell()
        self.check()

    def task(self, rows: int = 0, nbytes: int = 0) -> None:
        """One more task of the stage is done: of so many rows, and bytes in memory.

        After the last task of a pass the sums are merged.
        """
        with self._lock:
            self._done += 1
            self._rows += rows
            self._bytes += nbytes
            self._tell()
            if self._stage == "pass" and self._done == self._total:
                self._began["merge"] = self.seconds
                self._stage, self._done, self._total = "merge", 0, None
                self._tell()
        self.check()

    def step(self, number: int, step: StepLike) -> None:
        """An evaluation of the criterion, by its number in the search."""
        gradient = _formed(getattr(step, "gradient", None))
        decrement = _formed(step.decrement)
        with self._lock:
            self._done += 1
            self._tell(number, float(step.value), gradient, decrement)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", evaluation_text(number, step.value, gradient, decrement))
        self.check()

    def plan(self, text: str) -> None:
        """What is going to be read, and that reading begins; the tasks may be counted later."""
        logger.info("%s", text)
        self.stage("pass")

    def message(self, text: str) -> None:
        """Something in words, for the listener and the log."""
        with self._lock:
            self._tell(message=text)
        logger.info("%s", text)
        self.check()

    def passed(self, rows: int, dropped: Mapping[str, int]) -> None:
        """The pass is over: rows read, and those of them dropped, by reason."""
        with self._lock:
            self._rows = rows
        seconds = self._since("pass")
        why = ", ".join(f"{reason}: {n:,}" for reason, n in dropped.items() if n)
        self.message(
            f"read {rows:,} rows in {seconds:.2f} s ({rate(rows, seconds):,.0f} rows/s), "
            f"{sum(dropped.values()):,} dropped" + (f" ({why})" if why else "")
        )

    def fitted(self, summary: SummaryLike) -> None:
        """The fit is over."""
        seconds = self._since("fit")
        found = "converged" if summary.converged else "not converged"
        self.message(f"{self._done} evaluations in {seconds:.2f} s, {found}: {summary.reason}")

    def watch(self, callback: Callable[[int, S], None] | None = None) -> Callable[[int, S], None]:
        """`step`, and then ``callback`` with the same arguments."""

        def both(number: int, step: S) -> None:
            self.step(number, step)
            if callback is not None:
                callback(number, step)

        return both

    def check(self) -> None:
        """Raise the listener's exception, in the thread that opened the report only."""
        if self.failure is not None and get_ident() == self._owner:
            raise self.failure

    def _tell(
        self,
        number: int | None = None,
        criterion: float | None = None,
        gradient: float | None = None,
        decrement: float | None = None,
        message: str = "",
    ) -> None:
        """Make the event; called with the lock, so that events come one at a time, in order."""
        if self._listen is None or self.failure is not None:
            return
        event = Event(
            self._stage, self._done, self._total, self._rows, self._bytes,
            number, criterion, gradient, decrement, self.seconds, message,
        )  # fmt: skip
        try:
            self._listen(event)
        except BaseException as error:  # raised by `check`, where it stops the work
            self.failure = error


@contextmanager
def open_progress(progress: Progress | bool | None = None) -> Iterator[Report]:
    """A report of the work inside, shown as asked.

    Parameters
    ----------
    progress
        None for a live view in a terminal or notebook once the work has taken 2 seconds, and
        nothing elsewhere; True for a view in any case, plain lines on stderr where it is no
        terminal; False for none; or a function that takes each `Event`. An exception of that
        function ends the work.

    Raises
    ------
    DataError
        ``progress`` is something else
    """
    with listener(checked(progress)) as listen:
        report = Report(listen)
        try:
            yield report
        except Exception as error:
            if report.failure is None or report.failure is error:
                raise
            raise report.failure from error  # the work was cancelled because of it
        report.check()


def checked(progress: Any) -> Progress | bool | None:
    """The argument ``progress=``, refused if it is none of what `open_progress` takes."""
    if progress is None or isinstance(progress, bool) or callable(progress):
        return progress
    raise DataError(
        f"progress={progress!r}: must be None, True, False or a function that takes an Event"
    )


def _formed(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
