"""``dmixed refit``: a job file in, one call of `refit`, text or JSON and an exit status out."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmixed.commands.shared import (
    Shown,
    Status,
    Verbose,
    connection,
    epilog,
    errors_in_one_line,
    log,
    say,
    warnings_in_one_line,
)
from dmixed.errors import JobError

if TYPE_CHECKING:
    from dmixed.jobs import Job
    from dmixed.refit import Outcome

EPILOG = epilog(
    "0 published, or nothing new; 1 error; 2 wrong usage, or a job file that is not "
    "valid; 3 did not converge; 4 estimates drifted beyond the limit of the job. Only 0 and 4 "
    "publish, 4 unless the job says drift: {action: hold}.",
    "dmixed refit nightly.yaml --check",
    "dmixed refit nightly.yaml --json",
    "dmixed refit --schema > job.schema.json",
)

ADDRESS = "DASK_SCHEDULER_ADDRESS"


def refit(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the job file, and do nothing else.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of job files, and do no more.")
    ] = False,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept",
            help="Publish whatever has drifted, also a version that was held back; exit with 0.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was done as one line of JSON.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="ADDRESS",
            help=f"Dask scheduler, tcp://host:port; else that of {ADDRESS} or of the job file, "
            "else threads of this machine.",
        ),
    ] = None,
    progress: Shown = None,
    verbose: Verbose = 0,
) -> None:
    """Append new data to stored moments, fit again, and publish a version with what changed."""
    if schema:
        from dmixed.jobs import job_schema  # pydantic takes a while, and this command needs it only

        typer.echo(json.dumps(job_schema(), indent=2))
        return
    if job is None:
        raise typer.BadParameter("is missing", param_hint="JOB.yaml")
    wanted = _job(job)
    if check:
        typer.echo(f"{job}: is valid")
        return
    address = scheduler or os.environ.get(ADDRESS) or wanted.scheduler

    def told(message: str) -> None:
        if as_json:
            _print_json({"schema": "dmixed-refit-run/1", "status": "error", "reason": message})

    with (
        log(verbose),
        warnings_in_one_line(),
        errors_in_one_line(told, "dmixed.refit.refit"),
        connection(address) as client,
    ):
        from dmixed.refit import refit as run

        outcome = run(wanted, client, accept, progress)
    if as_json:
        _print_json(outcome.record)
    _finish(outcome, wanted, as_json)


def _job(path: str) -> Job:
    """The job of a file; what is wrong with it ends the program, a line for each."""
    from dmixed.jobs import read_job

    try:
        return read_job(path)
    except JobError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        raise typer.Exit(Status.USAGE) from None


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, allow_nan=False))


def _finish(outcome: Outcome, job: Job, quiet: bool) -> None:
    """Say what was done, and exit with its status."""
    if outcome.status == "not converged":
        say(f"did not converge: {outcome.reason}; nothing is published")
        raise typer.Exit(Status.NOT_CONVERGED)
    if not quiet:
        typer.echo(f"{outcome.status}: {outcome.version} in {outcome.folder}")
        if outcome.text:
            typer.echo(f"\n{outcome.text}", nl=False)
    if outcome.drift:
        text = (
            f"drift: an estimate changed by {outcome.largest:.2f} standard errors, beyond "
            f"{job.drift.limit:g}"
        )
        held = outcome.status == "held"
        say(text + "; the version is held back, dmixed refit --accept publishes it" * held)
        raise typer.Exit(Status.DRIFTED)
