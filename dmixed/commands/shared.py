"""What commands share: exit status, options, one line for each error, the log, a client."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from typing import Annotated, Any, NoReturn

import typer

from dmixed.errors import ConvergenceWarning, DataError, DmixedError
from dmixed.resultfiles import json_bytes
from dmixed.sources import parse_filter


class Status(IntEnum):
    """Exit status of every command."""

    FITTED = 0
    ERROR = 1
    USAGE = 2
    NOT_CONVERGED = 3
    DRIFTED = 4


Shown = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress on stderr, as lines where it is no terminal; by default only on a "
        "terminal, and if the fit takes more than 2 seconds.",
        show_default=False,
    ),
]

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        help="Log to stderr what is done; twice: each evaluation too.",
        show_default=False,
    ),
]


Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask scheduler to run on, tcp://host:port; threads of this machine by default.",
    ),
]


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document and nothing else on stdout, also of an error; what is not "
        "finite is null.",
    ),
]


class Missing(StrEnum):
    """What to do with rows that have missing values."""

    drop = "drop"
    raise_ = "raise"
    none = "none"


class Changed(StrEnum):
    """What to do with files that are not as they were."""

    error = "error"
    replace_ = "replace"


class Vanished(StrEnum):
    """What to do with files that are gone."""

    keep = "keep"
    error = "error"


Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="URI",
        help="Parquet: a file, directory or glob, or a URI of one such as s3://bucket/path; "
        "may be repeated. Or the directory of a Delta table.",
    ),
]

Formula = Annotated[
    str,
    typer.Option(
        "--formula",
        metavar="FORMULA",
        help="Model in lme4's spelling, such as 'y ~ x + (1 + x | g)'.",
    ),
]

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="COLUMN", help="Column of weights: error variance sigma2 / weight."
    ),
]

Offset = Annotated[
    str | None,
    typer.Option(
        "--offset", metavar="COLUMN", help="Column of a known addition to the fixed part."
    ),
]

Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="CONDITION",
        help="Use only the rows where COLUMN OPERATOR VALUE holds, such as 'year >= 2024' or "
        "\"site == 'a'\"; may be repeated, then all must hold.",
    ),
]


def epilog(status: str, *examples: str) -> str:
    """Examples, a line for each, and the exit status, for the end of ``--help``."""
    lines = "".join(f"  {example}\n" for example in examples)
    return (f"\b\nExamples:\n{lines}\n" if examples else "") + f"Exit status: {status}"


def filters_of(conditions: list[str] | None) -> list[Any] | None:
    """Conditions of ``--filter``, of which all must hold."""
    try:
        return [parse_filter(text) for text in conditions or ()] or None
    except DataError as err:
        raise typer.BadParameter(str(err), param_hint="--filter") from err


@contextmanager
def connection(address: str | None) -> Iterator[Any]:
    """Client of a Dask scheduler; None without an address."""
    if address is None:
        yield None
        return
    from distributed import Client  # a second of start-up that only clusters need
    from distributed.comm import resolve_address

    try:
        resolve_address(address)  # a client of what is no address hangs when it is deleted
        client = Client(address, set_as_default=False)
    except (OSError, ValueError) as err:
        raise DmixedError(
            f"no Dask scheduler answers at {address}: {err}; give tcp://host:port of one that runs "
            "(dask scheduler prints it), or leave --scheduler out to use this machine's threads"
        ) from err
    with client:
        yield client


class _Stderr(logging.StreamHandler[Any]):
    """Lines of the log on whatever stderr is at the time: a live view prints them above itself."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


@contextmanager
def log(verbose: int) -> Iterator[None]:
    """The library's log on stderr: with 1 what was done, with 2 each evaluation too."""
    if not verbose:
        yield
        return
    logger = logging.getLogger("dmixed")
    handler, before = _Stderr(), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s dmixed: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def say(message: str) -> None:
    """One line on stderr."""
    typer.echo("dmixed: " + " ".join(message.split()), err=True)


def print_json(record: dict[str, Any]) -> None:
    """A record as one JSON document on stdout."""
    typer.echo(json_bytes(record), nl=False)


def told_as_json(wanted: bool) -> Callable[[str], None] | None:
    """What tells of an error on stdout where JSON is wanted there."""
    if not wanted:
        return None
    return lambda message: print_json({"schema": "dmixed-error/1", "error": message})


def fail(message: str) -> NoReturn:
    """End with status 1 and one line on stderr."""
    say(f"error: {message}")
    raise typer.Exit(Status.ERROR)


@contextmanager
def errors_in_one_line(
    told: Callable[[str], None] | None = None, shown_by: str = "dmixed.lmer"
) -> Iterator[None]:
    """End with status 1 and one line in place of a traceback.

    Parameters
    ----------
    told
        called with the message before
    shown_by
        function that shows the traceback of an error that was not foreseen
    """
    try:
        yield
        return
    except BrokenPipeError:  # whoever read stdout is gone: typer ends without a word
        raise
    except (DmixedError, OSError) as err:
        message = str(err)
    except Exception as err:  # whatever a library or a worker raises
        message = f"{type(err).__name__}: {err} ({shown_by} in Python shows where)"
    if told is not None:
        told(message)
    fail(message)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Warnings as lines on stderr; that a fit did not converge is told by the exit status."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
    for warning in caught:
        say(f"warning: {warning.message}")
