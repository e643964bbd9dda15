"""Which rows something was made of, so that it can be told whether they are the same."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dmixed.errors import DataError
from dmixed.sources import Fingerprint, Source

SHOWN = 3
"""Files that a message names."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """Which rows were summed.

    Attributes
    ----------
    kind
        see `Source`
    location
        path or URI of the data, without credentials; "" without one
    rows_wanted
        filters in words, "" for all rows
    declared
        checksum of what a Dataset declares beside its files: types, row groups; else ""
    snapshot
        see `Source`
    files
        fingerprints; none where there are no files
    """

    kind: str
    location: str
    rows_wanted: str
    declared: str
    snapshot: str | None
    files: tuple[Fingerprint, ...]

    @property
    def place(self) -> str:
        """Where the rows are, in words: of a list, or a Dataset, the first file stands for all."""
        if self.location or not self.files:
            return self.location or "in memory"
        more = f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
        return self.files[0].name + more


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a fit comes from.

    Attributes
    ----------
    created
        when it was made, ISO 8601, UTC
    versions, machine
        of the libraries that made it, and the architecture
    sources
        rows that it is of; none where that is not known
    """

    created: str
    versions: dict[str, str]
    machine: str
    sources: tuple[SourceState, ...]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    names = "dmixed", "numpy", "scipy", "pandas", "pyarrow"
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def states_of(source: Source | None) -> tuple[SourceState, ...]:
    """State of the rows of a fit; without one, or where its files are gone, none."""
    if source is not None:
        with suppress(DataError, OSError):
            return (source_state(source),)
    return ()


def source_state(source: Source) -> SourceState:
    """What tells the rows of a source from others."""
    return SourceState(
        kind=source.kind,
        location=getattr(source, "location", ""),
        rows_wanted=wanted_text(source),
        declared=_declared(source),
        snapshot=source.snapshot,
        files=source.fingerprints(),
    )


def wanted_text(source: Source) -> str:
    """Filters of a source, in words that tell them from others."""
    wanted, texts = getattr(source, "filter", None), []
    if wanted is not None and wanted.alternatives is not None:
        texts.append(repr(wanted.alternatives))
    elif wanted is not None:  # its text is cut where it is long
        content = bytes(wanted.expression.__reduce__()[1][0])
        texts.append(f"{wanted.expression} ({hashlib.sha256(content).hexdigest()[:16]})")
    scan = getattr(source, "scan", None)
    if scan is not None:
        texts.append(repr(scan.row_filter))
    return "; ".join(texts)


def _declared(source: Any) -> str:
    """Checksum of what an Arrow Dataset declares beside its files."""
    if source.kind != "arrow" or getattr(source, "declared", None) is None:
        return ""
    groups = [None if x.groups is None else [i for i, _ in x.groups] for x in source.files]
    text = f"{source.declared.to_string(show_schema_metadata=False)}\n{groups}"
    return hashlib.sha256(text.encode()).hexdigest()


def comparable(state: SourceState) -> bool:
    """Whether the same fingerprints mean the same rows: files of tables never change."""
    never = state.kind in ("delta", "iceberg")
    return bool(state.files) and (never or all(file.stamp for file in state.files))


def differences(now: SourceState, states: Sequence[SourceState]) -> list[str]:
    """What differs between some rows and those that were summed, in words."""
    if not states:
        return ["it does not say of which data"]
    if len(states) > 1:
        return [f"it is of {len(states)} sets of rows that were added"]
    (was,) = states
    if now.kind != was.kind:
        return [f"the data are of kind {now.kind!r}, they were {was.kind!r}"]
    found = []
    if now.rows_wanted != was.rows_wanted:
        found.append(
            f"filters are {now.rows_wanted or 'none'}, they were {was.rows_wanted or 'none'}"
        )
    if now.snapshot != was.snapshot:
        return [*found, f"the table is {now.snapshot}, it was {was.snapshot}"]
    files = [] if found else _file_differences(now.files, was.files)
    if not files and now.declared != was.declared:
        found.append("the Dataset declares other types, or other row groups")
    return found + files


def _file_differences(now: tuple[Fingerprint, ...], was: tuple[Fingerprint, ...]) -> list[str]:
    if Counter(now) == Counter(was):
        return []
    new, old = ({file.name: file for file in files} for files in (now, was))
    kinds = (
        ("changed", [name for name in old if name in new and new[name] != old[name]]),
        ("vanished", [name for name in old if name not in new]),
        ("is new", [name for name in new if name not in old]),
    )
    found = [
        f"{', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        + f" {what}"
        for what, names in kinds
        if names
    ]
    return found or ["files are there another number of times"]
