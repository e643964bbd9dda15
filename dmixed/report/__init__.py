"""A report of a fit: one page of HTML for those who must judge the fit and show it.

`facts` are what it says, as plain values that a published version can keep; `pictures` and
`sections` show them; `page` is the whole.
"""

from __future__ import annotations

import os
from typing import Any

from dmixed.diagnosis import diagnose
from dmixed.errors import DataError
from dmixed.folders import Folder
from dmixed.plots.blups import all_summaries
from dmixed.plots.residuals import Residuals
from dmixed.provenance import Origin, SourceState
from dmixed.report.facts import Content, Provenance, Table, facts_of, remarks_of
from dmixed.report.page import page
from dmixed.report.pictures import pictures_of
from dmixed.sources.storages import redact

__all__ = ["K", "content_of", "place_of", "report_html", "write"]

K = 10
"""Levels at each end of a factor's order that are named."""


def report_html(content: Content) -> str:
    """The page of what is given."""
    return page(content, pictures_of(content))


def content_of(
    result: Any, residuals: Residuals | None = None, rows: str = "", source: str = ""
) -> Content:
    """What a report shows of a `MixedLMResults`.

    Parameters
    ----------
    residuals, rows
        of some rows, and what these are called
    source
        what the result was read from
    """
    facts = facts_of(result)
    return Content(
        facts=facts,
        source=redact(source),
        effects=all_summaries(result, K),
        provenance=_provenance(result._origin),
        residuals=residuals,
        rows=redact(rows),
        remarks=facts.remarks if residuals is None else remarks_of(diagnose(result, residuals)),
    )


def _provenance(origin: Origin) -> Provenance:
    libraries = ", ".join(f"{x} {y}" for x, y in origin.versions.items() if x != "dmixed")
    files = sum(len(state.files) for state in origin.sources)
    pairs = [
        ("Date of the fit", origin.created),
        ("Fitted by", f"dmixed {origin.versions.get('dmixed', '')}".strip()),
        ("With", libraries),
        ("Machine", origin.machine),
        ("Files of data", f"{files:,}, each with a fingerprint" if files else ""),
        ("Rows", "" if origin.sources else "the fit does not say of which data it is"),
    ]
    names = "Kind", "Place", "Filter", "State", "Files", "Bytes"
    rows = tuple(_source(state) for state in origin.sources)
    tables = (Table("Data of the fit", names, rows),) if rows else ()
    return Provenance(tuple((x, y) for x, y in pairs if y), tables)


def _source(state: SourceState) -> tuple[Any, ...]:
    sizes = [file.size for file in state.files]
    size = "" if None in sizes or not sizes else sum(x or 0 for x in sizes)
    return (
        state.kind,
        redact(state.place),
        state.rows_wanted or "none",
        state.snapshot or "",
        len(state.files),
        size,
    )


def place_of(out: str | os.PathLike[str], force: bool) -> tuple[Folder, str]:
    """Folder and name of a file to write.

    Raises
    ------
    DataError
        there is something already
    OSError
        the storage does not say
    """
    whole = Folder.at(out)
    above, _, name = whole.location.rpartition("/")
    folder = Folder(whole.name.rpartition("/")[0] or ("/" if above == "" else "."), above or "/")
    if os.fspath(out).endswith(("/", os.sep)) or os.path.isdir(whole.location):
        raise DataError(f"{whole.name}: is a directory; give the name of a file")
    if not force and folder.size(name) is not None:
        raise _there(whole.name)
    return folder, name


def write(html: str, place: tuple[Folder, str], force: bool) -> None:
    """Write a page, whole or not at all.

    Raises
    ------
    DataError
        there is something already
    OSError
        it cannot be written
    """
    folder, name = place
    content = html.encode("utf-8")
    if force:
        folder.put(name, content)
    elif not folder.create(name, content):
        raise _there(folder.file(name))


def _there(name: str) -> DataError:
    return DataError(f"{name}: is there already; --force (force=True) writes over it")
