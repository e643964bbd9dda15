"""``dmixed moments``: the moment store from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

import dmixed
from dmixed.commands.shared import (
    Changed,
    Data,
    Filters,
    Formula,
    Json,
    Missing,
    Offset,
    Scheduler,
    Shown,
    Status,
    Vanished,
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
from dmixed.errors import DataError
from dmixed.manifests import label_type
from dmixed.resultfiles import RANDOM_EFFECTS, RESULT, write_result
from dmixed.store import Appended

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Keep the sums of some data, add to them, take from them, and fit them without the data.",
    epilog=epilog(
        "0 done, 1 error, 2 wrong usage; of fit 3: did not converge.",
        "dmixed moments collect store --data sales/ --formula 'y ~ x + (x | g)'",
        "dmixed moments append store --data sales/",
        "dmixed moments fit store --formula 'y ~ x + (1 | g)'",
    ),
)

DONE = "0 done, 1 error, 2 wrong usage."

Store = Annotated[
    str,
    typer.Argument(metavar="STORE", help="Directory or URI of a store.", show_default=False),
]


@contextmanager
def _opened(
    store: str, scheduler: str | None, verbose: int = 0, as_json: bool = False
) -> Iterator[dmixed.MomentStore]:
    """A store; errors end the program with one line."""
    shown = "dmixed.open_moments"
    with (
        log(verbose),
        warnings_in_one_line(),
        errors_in_one_line(told_as_json(as_json), shown),
        connection(scheduler) as client,
    ):
        yield dmixed.open_moments(store, client=client)


@app.command(
    epilog=epilog(
        DONE,
        "dmixed moments collect store --data sales/ --formula 'y ~ x + (x | g)'",
        "dmixed moments collect store --data d.parquet --formula 'y ~ x + (1 | g)' \\",
        "    --group-crossproducts --carry x:z",
    )
)
def collect(
    store: Store,
    data: Data,
    formula: Formula,
    weights: Weights = None,
    offset: Offset = None,
    missing: Missing = Missing.drop,
    carry: Annotated[
        list[str] | None,
        typer.Option(
            "--carry",
            metavar="TERM",
            help="A term to sum by group too, such as x2 or x1:x2; may be repeated.",
        ),
    ] = None,
    group_crossproducts: Annotated[
        bool,
        typer.Option(
            "--group-crossproducts",
            help="Sum everything by group, so that groups can be taken out again.",
        ),
    ] = False,
    min_group_size: Annotated[
        int | None,
        typer.Option(
            "--min-group-size",
            metavar="ROWS",
            help="Leave out groups of fewer rows; needs --group-crossproducts.",
        ),
    ] = None,
    conditions: Filters = None,
    scheduler: Scheduler = None,
    progress: Shown = None,
    verbose: Verbose = 0,
) -> None:
    """Sum the rows of some data and keep the sums in a new store."""
    filters = filters_of(conditions)
    with (
        log(verbose),
        warnings_in_one_line(),
        errors_in_one_line(shown_by="dmixed.collect"),
        connection(scheduler) as client,
    ):
        moments = dmixed.collect(
            formula,
            data,
            weights=weights,
            offset=offset,
            missing=missing.value,
            carry=carry or (),
            group_crossproducts=group_crossproducts,
            client=client,
            filters=filters,
            progress=progress,
        )
        typer.echo(moments.save(store, min_group_size=min_group_size))


@app.command(
    epilog=epilog(DONE, "dmixed moments info store", "dmixed moments info s3://lake/store --json")
)
def info(store: Store, as_json: Json = False, verbose: Verbose = 0) -> None:
    """Say what is in a store."""
    with _opened(store, None, verbose, as_json) as found:
        record = _record(found)
    if as_json:
        print_json(record)
        return
    typer.echo(f"{record['formula']}\nversion {record['version']}, {record['rows']:,} rows")
    for part in record["parts"]:
        n = len(part["files"])
        files = f"{n:,} file{'s' * (n != 1)}" if n else "rows in no file"
        typer.echo(f"  {part['id']}  {part['created']}  {part['rows']:>15,} rows  {files}")


def _record(store: dmixed.MomentStore) -> dict[str, Any]:
    return {
        "schema": "dmixed-store-info/1",
        "store": store.uri,
        "version": store.version,
        "formula": store.formula,
        "rows": store.nobs,
        "parts": [
            {
                "id": delta.id,
                "created": delta.created,
                "rows": delta.nobs,
                "dropped": dict(delta.dropped),
                "files": [file.name for state in delta.sources for file in state.files],
            }
            for delta in store.deltas
        ],
    }


@app.command(
    epilog=epilog(
        DONE,
        "dmixed moments append store --data sales/",
        "dmixed moments append store --data sales/ --changed replace --json",
    )
)
def append(
    store: Store,
    data: Data,
    changed: Annotated[
        Changed,
        typer.Option("--changed", help="Files that changed: stop, or replace what they had added."),
    ] = Changed.error,
    vanished: Annotated[
        Vanished,
        typer.Option("--vanished", help="Files that are gone: keep their rows, or stop."),
    ] = Vanished.keep,
    conditions: Filters = None,
    as_json: Json = False,
    scheduler: Scheduler = None,
    progress: Shown = None,
    verbose: Verbose = 0,
) -> None:
    """Add the rows of the files that the store does not have."""
    filters = filters_of(conditions)
    with _opened(store, scheduler, verbose, as_json) as found:
        done = found.append(
            data, filters=filters, changed=changed.value, vanished=vanished.value, progress=progress
        )
    if as_json:
        record = {name: getattr(done, name) for name in Appended.__dataclass_fields__}
        print_json(json.loads(json.dumps(record, default=list)))  # sets and the like as lists
        return
    typer.echo(
        f"files: {len(done.new):,} new, {len(done.changed):,} replaced, {len(done.skipped):,} "
        f"known, {len(done.vanished):,} vanished; {done.nobs:,} rows of {done.groups:,} groups "
        "added"
    )
    for reason, rows in done.dropped.items():
        typer.echo(f"{rows:,} rows dropped for {reason!r}")


@app.command(epilog=epilog(DONE, "dmixed moments remove store sales/2024-01.parquet"))
def remove(
    store: Store,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files whose rows to take out."),
    ],
    scheduler: Scheduler = None,
    verbose: Verbose = 0,
) -> None:
    """Take the rows of files out, as if they had never been added."""
    with _opened(store, scheduler, verbose) as found:
        found.remove(files)
        typer.echo(found)


@app.command(epilog=epilog(DONE, "dmixed moments forget store 4711"))
def forget(
    store: Store,
    labels: Annotated[
        list[str],
        typer.Argument(metavar="LABEL...", help="Label of the group, one for each key column."),
    ],
    scheduler: Scheduler = None,
    verbose: Verbose = 0,
) -> None:
    """Take all rows of a group out, as if they had never been added."""
    with _opened(store, scheduler, verbose) as found:
        rows = found.forget(_typed(found, labels))
        typer.echo(f"{rows:,} rows taken out")


def _typed(store: dmixed.MomentStore, labels: list[str]) -> tuple[Any, ...]:
    """Labels as text, in the types that the keys have."""
    types = [label_type(x) for x in store.deltas[0].shards[0].key_types]
    try:
        return tuple(
            pa.scalar(x).cast(kind).as_py() for x, kind in zip(labels, types, strict=False)
        ) + tuple(labels[len(types) :])
    except pa.ArrowException as error:
        raise DataError(f"label: {error}") from None


@app.command(epilog=epilog(DONE, "dmixed moments window store --last 12 --out last-year"))
def window(
    store: Store,
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, help="How many additions.")],
    out: Annotated[str, typer.Option("--out", metavar="STORE", help="New directory or URI.")],
    verbose: Verbose = 0,
) -> None:
    """Write the sum of the last additions as a store of its own."""
    with _opened(store, None, verbose) as found:
        typer.echo(found.window(last).save(out))


@app.command(epilog=epilog(DONE, "dmixed moments merge north south --out both"))
def merge(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE...", help="Stores of the same model.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="STORE", help="New directory or URI.")],
    verbose: Verbose = 0,
) -> None:
    """Write the sum of several stores, of disjoint rows, as a new one."""
    with log(verbose), errors_in_one_line(shown_by="dmixed.open_moments"):
        found = [dmixed.open_moments(store).moments for store in stores]
        total = found[0]
        for other in found[1:]:
            total = total + other
        typer.echo(total.save(out))


@app.command(epilog=epilog(DONE, "dmixed moments compact store"))
def compact(store: Store, scheduler: Scheduler = None, verbose: Verbose = 0) -> None:
    """Make one part of all, and remove files that a killed process has left behind."""
    with _opened(store, scheduler, verbose) as found:
        found.compact()
        typer.echo(found)


@app.command(
    epilog=epilog(
        "0 fitted, 1 error, 2 wrong usage, 3 did not converge.",
        "dmixed moments fit store",
        "dmixed moments fit store --formula 'y ~ 1 + (1 | g)' --ml --json",
    )
)
def fit(
    store: Store,
    formula: Annotated[
        str | None,
        typer.Option("--formula", metavar="FORMULA", help="A smaller model than the store's."),
    ] = None,
    reml: Annotated[
        bool,
        typer.Option("--reml/--ml", help="Restricted maximum likelihood, or maximum likelihood."),
    ] = True,
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="N", min=1, help="Only the last additions."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help=f"Write {RESULT} and {RANDOM_EFFECTS} to this new or empty local directory.",
        ),
    ] = None,
    as_json: Json = False,
    scheduler: Scheduler = None,
    verbose: Verbose = 0,
) -> None:
    """Fit the store's model, or a smaller one; no row is read."""
    with _opened(store, scheduler, verbose, as_json) as found:
        moments = found.moments if last is None else found.window(last)
        result = moments.fit(reml, formula=formula)
        if as_json:
            print_json(result.to_dict())
        else:
            typer.echo(result.summary())
        if result.converged and out is not None:
            write_result(result, Path(out))
    if not result.converged:
        say("did not converge: nothing is written")
        raise typer.Exit(Status.NOT_CONVERGED)
