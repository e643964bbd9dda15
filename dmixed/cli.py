"""The command line: arguments in, one call of `lmer`, text and files out.

Exit status: 0 fitted, 1 error, 2 wrong usage, 3 did not converge, 130 interrupted.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import dmixed
from dmixed import example
from dmixed.commands import moments, report
from dmixed.commands.refit import EPILOG as refit_status
from dmixed.commands.refit import refit
from dmixed.commands.shared import (
    Data,
    Filters,
    Formula,
    Json,
    Missing,
    Offset,
    Scheduler,
    Shown,
    Status,
    Verbose,
    Weights,
    connection,
    epilog,
    errors_in_one_line,
    filters_of,
    log,
    print_json,
    say,
    told_as_json,
    warnings_in_one_line,
)
from dmixed.errors import DataError, DmixedError
from dmixed.optimizer import SCIPY_METHODS
from dmixed.places import written
from dmixed.records import check_free
from dmixed.resultfiles import RANDOM_EFFECTS, RESULT, write_result
from dmixed.results import MixedLMResults

FITTED = "0 fitted, 1 error, 2 wrong usage, 3 did not converge."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Linear mixed-effects models, fitted exactly, on data of any size, on Dask.",
    epilog=epilog(
        f"{FITTED} 130: interrupted.",
        "dmixed demo",
        "dmixed fit --data sales.parquet --formula 'y ~ x + (1 + x | store)'",
        "dmixed --install-completion",
    ),
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


def main() -> None:
    """Run the command ``dmixed`` and exit with its status."""
    try:
        app(prog_name="dmixed")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say("interrupted")
        raise


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def _methods(incomplete: str) -> list[str]:
    """Values of ``--method`` for completion."""
    return [name for name in SCIPY_METHODS if name.startswith(incomplete)]


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


@app.command(
    epilog=epilog(
        FITTED,
        "dmixed fit --data sales.parquet --formula 'y ~ x + (1 | store)'",
        "dmixed fit --data 's3://lake/sales/*.parquet' --formula 'y ~ x + (x | g)' \\",
        "    --filter 'year >= 2024' --weights w --out fit --save model",
        "dmixed fit --data d.parquet --formula 'y ~ x + (1 | g)' --json | jq .llf",
    )
)
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
            autocompletion=_methods,
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
    as_json: Json = False,
    progress: Shown = None,
    verbose: Verbose = 0,
) -> None:
    """Fit a model to Parquet data and print its summary."""
    if method is not None and method not in SCIPY_METHODS:
        plain = {re.sub(r"[^a-z]", "", name.lower()): name for name in SCIPY_METHODS}
        near = difflib.get_close_matches(re.sub(r"[^a-z]", "", method.lower()), plain, n=1)
        meant = plain[near[0]] if near else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise typer.BadParameter(
            f"{method!r} is not one of {', '.join(SCIPY_METHODS)}{hint}", param_hint="--method"
        )
    filters = filters_of(conditions)
    here = out is not None or save is not None  # the client is gone when files are written

    def call() -> MixedLMResults:
        with connection(scheduler) as client:
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

    told = told_as_json(as_json)
    if save is not None:
        with errors_in_one_line(told):
            check_free(Path(save).resolve(), f"--save {save}")
    with log(verbose):
        result = _run(call, out, as_json)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(result.summary())
    _finish(result, out)
    if save is not None:
        with errors_in_one_line():
            result.save(save)


@app.command(
    epilog=epilog(
        "0 planned, 1 error, 2 wrong usage.",
        "dmixed plan --data 's3://lake/sales/*.parquet' --formula 'y ~ x + (x | g)'",
    )
)
def plan(
    data: Data,
    formula: Formula,
    weights: Weights = None,
    offset: Offset = None,
    conditions: Filters = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Say what a fit would do, from metadata and a sample: rows, bytes, groups, memory, where."""
    filters = filters_of(conditions)
    with (
        log(verbose),
        warnings_in_one_line(),
        errors_in_one_line(told_as_json(as_json), "dmixed.plan"),
        connection(scheduler) as client,
    ):
        found = dmixed.plan(
            formula, data, weights=weights, offset=offset, client=client, filters=filters
        )
    if as_json:
        print_json({"schema": "dmixed-plan/1", **found.to_dict()})
    else:
        typer.echo(found)


class NewGroups(StrEnum):
    """What to do with rows of groups that the fit has not seen."""

    population = "population"
    nan = "nan"
    error = "error"


class Interval(StrEnum):
    """Limits of predictions."""

    confidence = "confidence"
    prediction = "prediction"


@app.command(
    epilog=epilog(
        "0 predicted, 1 error, 2 wrong usage.",
        "dmixed predict --model model --data new.parquet --out predictions",
        "dmixed predict --model m --data new.parquet --out p --interval prediction",
    )
)
def predict(
    model: Annotated[
        str,
        typer.Option("--model", metavar="DIR", help="A fit that dmixed fit --save wrote."),
    ],
    data: Annotated[
        list[str],
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
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Predict rows of Parquet data with a fit that was saved, and write them."""
    logger = logging.getLogger("dmixed")
    with (
        log(verbose),
        warnings_in_one_line(),
        errors_in_one_line(told_as_json(as_json), "MixedLMResults.predict"),
        connection(scheduler) as client,
    ):
        result = _loaded(model)
        logger.info("predict: %s, of %s", ", ".join(data), result.formula)
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
        found = written(out)
        logger.info("predict: %d rows in %d files", found["rows"], len(found["files"]))
    if as_json:
        print_json({"schema": "dmixed-predict/1", "out": out,
                    **{x: found[x] for x in ("formula", "rows", "columns", "files")}})  # fmt: skip


def _loaded(model: str) -> MixedLMResults:
    """The fit of a directory."""
    if not Path(model).is_dir():
        raise DataError(
            f"--model {model}: there is no such directory; dmixed fit --save DIR writes one"
        )
    return MixedLMResults.load(model)


@app.command(epilog=epilog(FITTED, "dmixed demo", "dmixed demo --out demo-fit"))
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


app.command(epilog=refit_status)(refit)
app.command(epilog=report.EPILOG)(report.report)
app.add_typer(moments.app, name="moments")


# --------------------------------------------------------------------------- running a fit


def _run(
    call: Callable[[], MixedLMResults], out: str | None, as_json: bool = False
) -> MixedLMResults:
    """Result of a fit; any error ends the program with one line."""
    if out is not None:
        _check_out(out)
    with warnings_in_one_line(), errors_in_one_line(told_as_json(as_json)):
        result = call()
    return result


def _finish(result: MixedLMResults, out: str | None) -> None:
    """Write a converged result; exit with the status of the fit."""
    if not result.converged:
        say(
            f"did not converge: {result.optimizer_summary.reason}"
            + ("; nothing is written" if out is not None else "")
        )
        raise typer.Exit(Status.NOT_CONVERGED)
    if out is not None:
        with errors_in_one_line():
            write_result(result, Path(out))


# --------------------------------------------------------------------------- files


def _check_out(out: str) -> None:
    """Refuse a place that cannot take a result, before any work."""
    if "://" in out:
        raise typer.BadParameter(
            f"{out} is a URI, only local directories can be written: write to one and copy it",
            param_hint="--out",
        )
    with errors_in_one_line():
        path = Path(out).resolve()
        check_free(path, f"--out {out}")
        parent = next(place for place in (path, *path.parents) if place.exists())
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".dmixed.", dir=parent))
        except OSError as err:
            raise DmixedError(f"--out {out}: cannot write to {parent}: {err.strerror}") from err
