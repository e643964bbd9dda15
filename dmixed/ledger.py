"""Which files moments are of, compared with those that data have now."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dmixed.errors import DataError
from dmixed.manifests import Delta
from dmixed.provenance import SHOWN, SourceState, wanted_text
from dmixed.sources import FilesSource, Source

TABLES = "delta", "iceberg"
"""Kinds of data whose files are rewritten: what is in a new file may have been in an old one."""


@dataclass(frozen=True, slots=True)
class Files:
    """Names of the files of some data, as the moments know them.

    Attributes
    ----------
    new
        not in the moments
    same
        in the moments, as they are now
    changed
        in the moments as they were; they have another size, etag or time of modification
    vanished
        in the moments from the same place or one below it, and not in the data any more
    """

    new: tuple[str, ...]
    same: tuple[str, ...]
    changed: tuple[str, ...]
    vanished: tuple[str, ...]


def compared(deltas: Sequence[Delta], source: FilesSource) -> Files:
    """How the files of a source relate to those of some moments.

    Raises
    ------
    DataError
        a file was summed with other filters
    """
    known, location = entries(deltas), source.location
    new: list[str] = []
    same: list[str] = []
    changed: list[str] = []
    wanted = wanted_text(source)
    for name, state in source.listed().items():
        if name not in known:
            new.append(name)
            continue
        _, was, index = known[name]
        file = was.files[index]
        if was.rows_wanted != wanted:
            raise DataError(
                f"{name}: its rows were summed with filters {was.rows_wanted or 'none'}, now they "
                f"are {wanted or 'none'}: rows could count twice; use the same filters"
            )
        (same if (file.size, file.stamp) == state else changed).append(name)
    there = {*new, *same, *changed}
    vanished = [
        name
        for name, (_, state, _) in known.items()
        if location
        and (state.location == location or name.startswith(f"{location.rstrip('/')}/"))
        and name not in there
    ]
    return Files(tuple(new), tuple(same), tuple(changed), tuple(vanished))


def entries(deltas: Sequence[Delta]) -> dict[str, tuple[Delta, SourceState, int]]:
    """Where the file of each name is told of: delta, source, and position in it."""
    return {
        file.name: (delta, state, i)
        for delta in deltas
        for state in delta.sources
        for i, file in enumerate(state.files)
    }


def shown(names: Sequence[str]) -> str:
    """Some of the names."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def named(deltas: Sequence[Delta], paths: Sequence[str | os.PathLike[str]]) -> set[str]:
    """Names of files that paths mean.

    Raises
    ------
    DataError
        the moments are of no such file
    """
    known, found = entries(deltas), set()
    for path in paths:
        text = os.fspath(path)
        name = next((x for x in (text, os.path.abspath(text)) if x in known), None)
        if name is None:
            some = shown(list(known)) or "no file"
            raise DataError(f"{text}: these moments are not of such a file; they are of {some}")
        found.add(name)
    return found


def checked(source: Source, state: SourceState, names: Collection[str]) -> FilesSource:
    """A source restricted to some of the files that were summed, which must be as they were.

    Raises
    ------
    DataError
        naming a file that has changed or is gone, or what differs
    """
    if not isinstance(source, FilesSource):
        raise DataError(f"data of kind {source.kind!r} have no files to read again")
    if wanted_text(source) != state.rows_wanted:
        raise DataError(
            f"the rows were summed with filters {state.rows_wanted or 'none'}, now they are "
            f"{wanted_text(source) or 'none'}: pass data= and the same filters="
        )
    listed = source.listed()
    for file in state.files:
        if file.name in names and listed.get(file.name) != (file.size, file.stamp):
            what = "has changed since its rows were summed" if file.name in listed else "is gone"
            raise DataError(f"{file.name} {what}: what it had then cannot be read again")
    return source.only(names)


def check_differences(found: Files, kind: str, changed: str, vanished: str) -> None:
    """Refuse files that changed or vanished, as far as that was not allowed.

    Parameters
    ----------
    kind
        of the data
    changed, vanished
        see `MomentStore.append`

    Raises
    ------
    DataError
        naming files
    """
    if found.vanished and kind in TABLES:
        raise DataError(
            f"{shown(found.vanished)} are no files of the table any more: it was rewritten, and "
            "their rows may be in its new files; collect the moments anew"
        )
    if found.vanished and vanished == "error":
        raise DataError(
            f"{shown(found.vanished)} vanished from the data: remove() what their rows had added, "
            'or keep it with vanished="keep" (in a job file vanished: keep)'
        )
    if found.changed and changed == "error":
        raise DataError(
            f"{shown(found.changed)} changed since the rows were summed: append with "
            'changed="replace" (in a job file changed: replace), or remove() what their rows had '
            "added"
        )
