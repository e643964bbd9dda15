"""Report of published results: of what the version that counts holds, without a fit."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmixed.errors import DataError
from dmixed.folders import Folder
from dmixed.plots.blups import Blups, blups_of
from dmixed.published import SIZE, TABLES, Factor, Pointer, Published
from dmixed.records import made_record
from dmixed.report import K
from dmixed.report.facts import SCHEMA, Changes, Content, Facts, Moved, Provenance, Table
from dmixed.report.words import counted
from dmixed.sources.storages import redact
from dmixed.versions import DRIFT, PROVENANCE, REPORT

T = TypeVar("T", bound=BaseModel)


class _Read(BaseModel):
    """Part of a file that others read too: what is not named here is left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Limits(_Read):
    estimate: float
    lower: float | None
    upper: float | None

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.estimate, _number(self.lower), _number(self.upper)


class _Estimate(_Read):
    name: str
    now: _Limits | None
    before: _Limits | None
    change: float | None


class _Groups(_Read):
    levels: int
    new: int
    gone: int
    first_new: list[str]
    first_gone: list[str]


class _Rows(_Read):
    used: int
    dropped: dict[str, int]


class _Score(_Read):
    statistic: float
    df: int
    pvalue: float | None


class _Added(_Read):
    parts: int
    rows: int
    files: list[str]
    parts_gone: int


class _Drift(_Read):
    """What a report takes of ``drift.json``."""

    form: Literal["dmixed-drift/1"] = Field(alias="schema")
    before: str | None
    reason: str
    limit: float | None
    largest_change: float
    beyond_limit: bool
    estimates: list[_Estimate]
    score_test: _Score | None
    groups: dict[str, _Groups]
    rows: _Rows
    rows_before: _Rows | None
    added: _Added


class _Delta(_Read):
    created: str
    rows: int
    groups: int
    files: list[str]
    snapshots: list[str]


class _Store(_Read):
    uri: str
    version: int


class _Provenance(_Read):
    """What a report takes of ``provenance.json``."""

    form: Literal["dmixed-refit-provenance/1"] = Field(alias="schema")
    job: dict[str, Any]
    store: _Store
    deltas: list[_Delta]
    versions: dict[str, str]
    machine: str


def released(place: str) -> Content:
    """What a report shows of the version that counts of published results.

    Parameters
    ----------
    place
        directory or URI of the results, with ``current.json``

    Raises
    ------
    DataError
        naming the file that is missing or damaged
    OSError
        the storage does not answer
    """
    published = Published(Folder.at(place))
    pointer = published.current()
    if pointer is None:
        raise DataError(f"{published.folder.name}: has no current.json: nothing is published there")
    version = published.version(pointer.version)
    if version is None:
        raise DataError(
            f"{published.folder.name}: current.json names {pointer.version}, which is not there"
        )
    if REPORT not in version.files:
        raise DataError(
            f"{published.folder.name}: version {version.id} has no {REPORT}: it was published "
            "before reports were; the next version that dmixed refit publishes has it"
        )
    published.check(version)
    folder = published.files(version)
    facts = made_record(Facts, folder.read(REPORT, SIZE), folder.file(REPORT), SCHEMA)
    drift, origin = _read(_Drift, folder, DRIFT), _read(_Provenance, folder, PROVENANCE)
    tables = folder.below(TABLES)
    return Content(
        facts=facts,
        source=f"version {version.id} of {published.folder.name}",
        effects={x.label: reduce(add, _summaries(tables, x)) for x in version.factors},
        provenance=_origin(origin, pointer),
        changes=_changes(drift),
        remarks=facts.remarks,
    )


def _read(kind: type[T], folder: Folder, name: str) -> T:
    """A file of JSON, checked.

    Raises
    ------
    DataError
        naming the file and the field
    """
    try:
        return kind.model_validate_json(folder.read(name, SIZE))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{folder.file(name)}: {where or 'is damaged'}: {first['msg']}") from None


def _summaries(folder: Folder, factor: Factor) -> Iterator[Blups]:
    """Summary of each file of the random effects of a factor."""
    for name in factor.files:
        content = folder.read(name)
        try:
            table = pq.read_table(io.BytesIO(content))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{folder.file(name)}: cannot be read: {error}") from None
        try:
            yield blups_of(table, K, None)
        except (ValueError, LookupError, StopIteration, TypeError):
            raise DataError(f"{folder.file(name)}: is no table of random effects") from None


# --------------------------------------------------------------------------- drift


def _changes(drift: _Drift) -> Changes:
    return Changes(
        before=drift.before,
        reason=drift.reason,
        moved=tuple(
            Moved(
                x.name,
                None if x.now is None else x.now.numbers,
                None if x.before is None else x.before.numbers,
                _number(x.change),
            )
            for x in drift.estimates
        ),
        told=tuple(_sentences(drift)),
        groups=tuple(
            (label, x.levels, x.new, x.gone, _some(x.first_new, x.new), _some(x.first_gone, x.gone))
            for label, x in drift.groups.items()
        ),
    )


def _sentences(drift: _Drift) -> Iterator[str]:
    """What has changed, in words."""
    if drift.before is not None:
        text = f"The largest change of an estimate is {drift.largest_change:.2f} standard errors"
        if drift.limit is not None:
            text += f", {'beyond' if drift.beyond_limit else 'within'} the limit {drift.limit:g}"
        yield f"{text}."
    score = drift.score_test
    if score is not None and score.df:
        p = "" if score.pvalue is None else f", p {score.pvalue:.3g}"
        yield (
            "Score test of the covariance before on all rows now: chi-square "
            f"{score.statistic:.3f}, {score.df} degrees of freedom{p}."
        )
    was = "" if drift.rows_before is None else f" ({drift.rows_before.used:,} before)"
    yield f"Rows used: {drift.rows.used:,}{was}."
    added = drift.added
    yield (
        f"Added since: {added.rows:,} rows in {counted(added.parts, 'part')} of "
        f"{counted(len(added.files), 'file')}."
        + f" Merged, replaced or removed: {counted(added.parts_gone, 'part')}."
        * (added.parts_gone > 0)
    )


def _some(names: list[str], n: int) -> str:
    return ", ".join(names) + (", …" if names and n > len(names) else "")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# --------------------------------------------------------------------------- origin


def _origin(found: _Provenance, pointer: Pointer) -> Provenance:
    """What a version is of, and what made it."""
    libraries = ", ".join(f"{x} {y}" for x, y in found.versions.items() if x != "dmixed")
    files = sum(len(delta.files) for delta in found.deltas)
    job = {x: y for x, y in found.job.items() if x in ("data", "filters", "window") and y}
    pairs = [
        ("Published", pointer.published),
        ("Data", redact(str(job.get("data", "")))),
        ("Filters", str(job.get("filters", ""))),
        ("Window", str(job.get("window", ""))),
        ("Store of moments", f"{redact(found.store.uri)}, version {found.store.version:,}"),
        ("Files of data", f"{files:,}"),
        ("Versions that are kept", f"{len(pointer.history):,}"),
        ("Fitted by", f"dmixed {found.versions.get('dmixed', '')}".strip()),
        ("With", libraries),
        ("Machine", found.machine),
    ]
    names = "Added", "Rows", "Groups", "Files", "State"
    rows = tuple(
        (x.created, x.rows, x.groups, len(x.files), ", ".join(x.snapshots)) for x in found.deltas
    )
    tables = (Table("Parts of the moments, as they were added", names, rows),)
    return Provenance(tuple((x, y) for x, y in pairs if y), tables)
