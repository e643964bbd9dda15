"""The command line: arguments in, one call of `lmer`, text and files out.

Exit status: 0 fitted, 1 error, 2 wrong usage, 3 did not converge.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pandas as pd
import typer

import dmixed
from dmixed import example
from dmixed.errors import ConvergenceWarning, DataError, DmixedError
from dmixed.optimizer import SCIPY_METHODS
from dmixed.records import check_free, new_directory
from dmixed.results import MixedLMResults
from dmixed.sources import parse_filter

RESULT, RANDOM_EFFECTS = "result.json", "random_effects.parquet"


class Status(IntEnum):
    """Exit status of every command."""

    FITTED = 0
    ERROR = 1
    USAGE = 2
    NOT_CONVERGED = 3


class Missing(StrEnum):
    """What to do with rows that have missing values."""

    drop = "drop"
    raise_ = "raise"
    none = "none"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Linear mixed-effects models, fitted exactly, on data of any size, on Dask.",
    epilog="Exit status: 0 fitted, 1 error, 2 wrong usage, 3 did not converge.",
)

Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help=f"Write {RESULT} and {RANDOM_EFFECTS} to this new or empty local directory; "
        "nothing is written unless the fit converges.",
    ),
]

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


Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="URI",
        help="Parquet: a file, directory or glob, or a URI of one such as s3://bucket/path; "
        "or the directory of a Delta table.",
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

Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask scheduler to run on, tcp://host:port; threads of this machine by default.",
    ),
]


def main() -> None:
    """Run the command ``dmixed`` and exit with its status."""
    app(prog_name="dmixed")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmixed {dmixed.__version__}")
        raise typer.Exit(Status.FITTED)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


@app.command(epilog=app.info.epilog)
def fit(
    data: Data,
    formula: Formula,
    reml: Annotated[
        bool,
        typer.Option("--reml/--ml", help="Restricted maximum likelihood, or maximum likelihood."),
    ] = True,
    weights: Weights = None,
    offset: Offset = None,
    missing: Annotated[
        Missing,
        typer.Option(
            "--missing",
            help="Rows with missing values: drop and count them, or stop with an error.",
        ),
    ] = Missing.drop,
    conditions: Filters = None,
    scheduler: Scheduler = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="A method of scipy.optimize.minimize instead of the exact Newton method.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            help="Keep the sums of the pass and the progress of the search in this directory or "
            "URI; a fit that was stopped goes on from there, without reading the data again.",
        ),
    ] = None,
    out: Out = None,
    save: Annotated[
        str | None,
        typer.Option(
            "--save",
            metavar="DIR",
            help="Save the fit to this new or empty local directory, for dmixed predict.",
        ),
    ] = None,
    progress: Shown = None,
    verbose: Verbose = 0,
) -> None:
    """Fit a model to Parquet data and print its summary."""
    if method is not None and method not in SCIPY_METHODS:
        raise typer.BadParameter(
            f"{method!r} is not one of {', '.join(SCIPY_METHODS)}", param_hint="--method"
        )
    filters = _filters(conditions)
    here = out is not None or save is not None  # the client is gone when files are written

    def call() -> MixedLMResults:
        with _client(scheduler) as client:
            return dmixed.lmer(
                formula,
                data,
                reml=reml,
                weights=weights,
                offset=offset,
                missing=missing.value,
                client=client,
                method=method,
                filters=filters,
                progress=progress,
                evaluate_on="driver" if here else "auto",
                checkpoint=checkpoint,
            )

    if save is not None:
        with _errors_in_one_line():
            check_free(Path(save).resolve(), f"--save {save}")
    with _log(verbose):
        result = _run(call, out)
    typer.echo(result.summary())
    _finish(result, out)
    if save is not None:
        with _errors_in_one_line():
            result.save(save)


@app.command(epilog="Exit status: 0 planned, 1 error, 2 wrong usage.")
def plan(
    data: Data,
    formula: Formula,
    weights: Weights = None,
    offset: Offset = None,
    conditions: Filters = None,
    scheduler: Scheduler = None,
) -> None:
    """Say what a fit would do, from metadata and a sample: rows, bytes, groups, memory, where."""
    filters = _filters(conditions)
    with _errors_in_one_line(), _client(scheduler) as client:
        found = dmixed.plan(
            formula, data, weights=weights, offset=offset, client=client, filters=filters
        )
    typer.echo(found)


def _filters(conditions: list[str] | None) -> list[Any] | None:
    """Conditions of ``--filter``, of which all must hold."""
    try:
        return [parse_filter(text) for text in conditions or ()] or None
    except DataError as err:
        raise typer.BadParameter(str(err), param_hint="--filter") from err


class NewGroups(StrEnum):
    """What to do with rows of groups that the fit has not seen."""

    population = "population"
    nan = "nan"
    error = "error"


class Interval(StrEnum):
    """Limits of predictions."""

    confidence = "confidence"
    prediction = "prediction"


@app.command(epilog=app.info.epilog)
def predict(
    model: Annotated[
        str,
        typer.Option("--model", metavar="DIR", help="A fit that dmixed fit --save wrote."),
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="URI", help="Parquet, as for dmixed fit."),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="URI",
            help="New or empty directory, local or a URI, for one Parquet file per part of the "
            "data and, when all are there, _manifest.json.",
        ),
    ],
    groups: Annotated[
        bool,
        typer.Option("--groups/--population", help="With the random effects of groups, or not."),
    ] = True,
    new_groups: Annotated[
        NewGroups,
        typer.Option("--new-groups", help="Rows of groups that the fit has not seen."),
    ] = NewGroups.population,
    se: Annotated[bool, typer.Option("--se", help="Add standard errors.")] = False,
    interval: Annotated[
        Interval | None,
        typer.Option("--interval", help="Add limits of the mean, or of a new response."),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Limits are at level 1 - alpha.")] = 0.05,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="ADDRESS", help="As for dmixed fit."),
    ] = None,
) -> None:
    """Predict rows of Parquet data with a fit that was saved, and write them."""
    with _errors_in_one_line(), _client(scheduler) as client:
        result = MixedLMResults.load(model)
        with nullcontext() if client is None else client.as_current():
            result.predict(
                data,
                groups=groups,
                new_groups=new_groups.value,
                se=se,
                interval=None if interval is None else interval.value,
                alpha=alpha,
                out=out,
            )


@app.command(epilog=app.info.epilog)
def demo(out: Out = None) -> None:
    """Fit 7,185 pupils in 160 schools (bundled data) and explain what one sees."""

    def call() -> MixedLMResults:
        with example.data() as path:
            return dmixed.lmer(example.FORMULA, path)

    result = _run(call, out)
    typer.echo(example.QUESTION)
    typer.echo(result.summary())
    typer.echo(example.explanation(result))
    _finish(result, out)


# --------------------------------------------------------------------------- running a fit


def _run(call: Callable[[], MixedLMResults], out: str | None) -> MixedLMResults:
    """Result of a fit; any error ends the program with one line."""
    if out is not None:
        _check_out(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by the exit status
        with _errors_in_one_line():
            result = call()
    for warning in caught:
        _say(f"warning: {warning.message}")
    return result


def _finish(result: MixedLMResults, out: str | None) -> None:
    """Write a converged result; exit with the status of the fit."""
    if not result.converged:
        _say(
            f"did not converge: {result.optimizer_summary.reason}"
            + ("; nothing is written" if out is not None else "")
        )
        raise typer.Exit(Status.NOT_CONVERGED)
    if out is not None:
        with _errors_in_one_line():
            write_result(result, Path(out))


@contextmanager
def _client(address: str | None) -> Iterator[Any]:
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
        raise DmixedError(f"no Dask scheduler answers at {address}: {err}") from err
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
def _log(verbose: int) -> Iterator[None]:
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


def _say(message: str) -> None:
    """One line on stderr."""
    typer.echo("dmixed: " + " ".join(message.split()), err=True)


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}")
    raise typer.Exit(Status.ERROR)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End with status 1 and one line in place of a traceback."""
    try:
        yield
    except (DmixedError, OSError) as err:
        _fail(str(err))
    except Exception as err:  # whatever a library or a worker raises
        _fail(f"{type(err).__name__}: {err} (dmixed.lmer in Python shows where)")


# --------------------------------------------------------------------------- files


def _check_out(out: str) -> None:
    """Refuse a place that cannot take a result, before any work."""
    if "://" in out:
        raise typer.BadParameter(
            f"{out} is a URI, only local directories can be written: write to one and copy it",
            param_hint="--out",
        )
    with _errors_in_one_line():
        path = Path(out).resolve()
        check_free(path, f"--out {out}")
        parent = next(place for place in (path, *path.parents) if place.exists())
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".dmixed.", dir=parent))
        except OSError as err:
            raise DmixedError(f"--out {out}: cannot write to {parent}: {err.strerror}") from err


def write_result(result: MixedLMResults, out: Path) -> None:
    """Write ``result.json`` and ``random_effects.parquet``, all or nothing.

    With several factors there is a ``random_effects_FACTOR.parquet`` for each.

    Parameters
    ----------
    result
        what to write: `MixedLMResults.to_dict` as strict JSON (NaN and infinities are null), and
        `MixedLMResults.ranef` with the group labels as first columns
    out
        a directory, new or empty. A new one appears complete, by renaming; in one that exists
        (it may be a mount point) ``result.json`` appears last.

    Raises
    ------
    DataError
        there is something already
    OSError
        the directory cannot be written; nothing is left behind
    """
    with new_directory(out, RESULT) as folder:
        tables = _effect_tables(result)
        for name, effects in tables.items():
            taken = set(effects.columns)
            effects.index.names = [f"group {n}" if n in taken else n for n in effects.index.names]
            effects.reset_index().to_parquet(folder / name, index=False)
        record = {**result.to_dict(), "random_effects": list(tables)}
        text = json.dumps(_strict(record), indent=2, allow_nan=False, ensure_ascii=False)
        (folder / RESULT).write_text(text + "\n", encoding="utf-8")


def _effect_tables(result: MixedLMResults) -> dict[str, pd.DataFrame]:
    """Tables of random effects by file name: one for each factor where there are several."""
    found = result.ranef()
    if isinstance(found, pd.DataFrame):
        return {RANDOM_EFFECTS: found}
    tables: dict[str, pd.DataFrame] = {}
    for label, table in found.items():
        stem = f"random_effects_{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}"
        while f"{stem}.parquet" in tables:
            stem += "_"
        tables[f"{stem}.parquet"] = table
    return tables


def _strict(value: Any) -> Any:
    """The value with every NaN and infinity, which JSON has not, as None."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
