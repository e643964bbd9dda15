"""``dmixed report``: a fit in, one page of HTML out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from dmixed.commands.shared import (
    Scheduler,
    Verbose,
    connection,
    epilog,
    errors_in_one_line,
    log,
    warnings_in_one_line,
)
from dmixed.errors import DataError
from dmixed.folders import Folder
from dmixed.manifests import MANIFEST_NAME
from dmixed.published import CURRENT, VERSION
from dmixed.report import content_of, place_of, report_html, write
from dmixed.results import MixedLMResults
from dmixed.storage import RESULT

EPILOG = epilog(
    "0 written, 1 error, 2 wrong usage.",
    "dmixed report fit-1 --out report.html",
    "dmixed report fit-1 --data 's3://bucket/sales/' --out report.html",
    "dmixed report 's3://bucket/results/' --out report.html --force",
)


def report(
    fit: Annotated[
        str,
        typer.Argument(
            metavar="FIT",
            help="A fit that dmixed fit --save wrote, or the directory or URI of results that "
            "dmixed refit publishes, of which the newest version is reported.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", metavar="FILE", help="The page, a path or URI such as report.html."),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="URI",
            help="Parquet, as for dmixed fit: look at the residuals of these rows too, in one "
            "pass. It takes a fit that was saved.",
        ),
    ] = None,
    scheduler: Scheduler = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
    verbose: Verbose = 0,
) -> None:
    """Write a report of a fit: one page of HTML that needs nothing else, to judge it and show it.

    It has the model, estimates with intervals, the decomposition of the variance, random effects,
    diagnostics, the certificate of the search, where the data come from, and, of results that are
    published, what has changed since the version before. Pictures need matplotlib.
    """
    with log(verbose), warnings_in_one_line(), errors_in_one_line(shown_by="result.report"):
        place = place_of(out, force)
        content = _published(fit, data) if _is_published(fit) else _saved(fit, data, scheduler)
        write(report_html(content), place, force)
    typer.echo(f"wrote {place[0].file(place[1])}")


def _is_published(fit: str) -> bool:
    """Whether it is a directory of versions; else it holds a fit that was saved.

    Raises
    ------
    DataError
        it is neither, and what it lacks
    """
    folder = Folder.at(fit)
    names = folder.names()
    if CURRENT in names:
        return True
    saved = any(MANIFEST_NAME.fullmatch(name) for name in names)
    if saved and RESULT in names:
        return False
    told = (
        f"{folder.name}: is neither a fit that dmixed fit --save wrote ({RESULT} and a manifest of "
        f"moments) nor results that dmixed refit publishes ({CURRENT}); it "
    )
    if not names:
        raise DataError(f"{told}is not there, or empty")
    if VERSION in names:
        raise DataError(
            f"{told}is one version of results: give the directory above, with {CURRENT}"
        )
    if saved:
        raise DataError(f"{told}has moments without a fit: fit them, and save the result")
    if RESULT in names:
        raise DataError(f"{told}has {RESULT} but no moments, as of dmixed fit --out: use --save")
    raise DataError(f"{told}has none of them")


def _published(place: str, data: str | None) -> Any:
    from dmixed.released import released  # pydantic takes a while

    if data is not None:
        raise DataError(
            f"--data {data}: published results hold no moments to predict rows with; residuals "
            "need a fit that dmixed fit --save wrote"
        )
    return released(place)


def _saved(place: str, data: str | None, scheduler: str | None) -> Any:
    result = MixedLMResults.load(place)
    if data is None:
        return content_of(result, source=place)
    with connection(scheduler) as client, nullcontext() if client is None else client.as_current():
        return content_of(result, result.plot._residuals(data, None), data, place)
