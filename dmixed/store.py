"""A directory of moments as it is changed: one state after the other, each at once.

A change writes files that nobody sees until a new manifest names them; files that it names no more
are removed after that. Whatever kills a process between two steps, there is one whole state. Of two
processes that start from the same state, the second is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dmixed import momentstore
from dmixed.cellmoments import CellMoments
from dmixed.design import DesignSpec
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.executor import DRIVER, collect
from dmixed.folders import Folder, check_workers
from dmixed.ledger import entries, shown
from dmixed.manifests import (
    MANIFEST_NAME,
    Delta,
    Manifest,
    manifest_name,
    manifest_of,
    newest,
    read_manifest,
    spec_of,
    stored_spec,
    too_late,
)
from dmixed.progress import Progress, Report, open_progress
from dmixed.provenance import SourceState, source_state
from dmixed.sources import Fingerprint, Source

RESULT = "result.json"
"""What a directory of a stored result has beside its moments."""

ORPHAN = 86_400.0
"""Seconds after which a file that no manifest names is not being written any more."""

SAMPLE = 2_000
"""Rows from which a pass is planned; shifts and scales are those of the moments."""


@dataclass(frozen=True, slots=True)
class Appended:
    """What `MomentStore.append` did; names are of files.

    Attributes
    ----------
    new
        whose rows were added
    skipped
        that the store had
    changed
        that were there with other rows, which were replaced
    vanished
        that the store has and the data have not any more; their rows stay
    nobs, groups
        rows added, and groups (cells) that they are of
    dropped
        rows not used, by reason
    """

    new: tuple[str, ...]
    skipped: tuple[str, ...]
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    nobs: int
    groups: int
    dropped: Mapping[str, int]


class StoreDirectory:
    """A directory of moments, and the state of it that is known here.

    Parameters
    ----------
    folder, manifest
        where it is, and the state
    client
        `distributed.Client` to read on
    """

    def __init__(self, folder: Folder, manifest: Manifest, client: Any = None) -> None:
        self.folder, self.manifest, self.client = folder, manifest, client

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """What was added, in that order."""
        return self.manifest.deltas

    @property
    def spec(self) -> DesignSpec:
        """What is evaluated on rows that are added."""
        return stored_spec(self.manifest, self.folder.file(manifest_name(self.manifest.version)))

    def check_changeable(self) -> None:
        """Refuse a stored result, whose moments are part of it."""
        with self.written():
            stored = self.folder.size(RESULT) is not None
        if stored:
            raise DataError(
                f"{self.folder.name}: is a stored result, whose moments stay as they are: save "
                "them elsewhere, open_moments(...).moments.save(...)"
            )

    @contextmanager
    def written(self) -> Iterator[None]:
        """Errors of the storage, in words."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.folder.name}: the store cannot be used: {error.strerror or error}"
            ) from error

    # ------------------------------------------------------------------ reading

    def cells(self, deltas: Sequence[Delta]) -> CellMoments:
        """The sum of some deltas, in this process."""
        try:
            return momentstore.read(self.folder, self.manifest, deltas)
        except DataError as error:
            with self.written():
                number = newest(self.folder)
            if number in (None, self.manifest.version):
                raise
            raise too_late(self.folder) from error

    def moments(self, last: int | None = None) -> CellMoments | RemoteMoments:
        """The sum of the last deltas, or of all; if a writer was faster, of the state it made.

        Raises
        ------
        DataError
            naming the file that is missing or damaged
        """
        while True:
            deltas = self.deltas if last is None else self.deltas[-last:]
            try:
                return self._moments(deltas)
            except DataError:
                with self.written():
                    number = newest(self.folder)
                if number is None or number == self.manifest.version:
                    raise
                self.manifest = read_manifest(self.folder, number)

    def _moments(self, deltas: Sequence[Delta]) -> CellMoments | RemoteMoments:
        shards = max(len(delta.shards) for delta in deltas)
        nbytes = sum(delta.nbytes for delta in deltas)
        if self.client is None or shards == 1 or nbytes <= DRIVER:
            return self.cells(deltas)
        check_workers(self.folder, self.client)
        return momentstore.read_remote(self.folder, self.manifest, self.client, deltas)

    # ------------------------------------------------------------------ rows

    def summed(
        self, source: Source, spec: DesignSpec, client: Any, report: Report | None = None
    ) -> CellMoments | RemoteMoments:
        """Moments of the rows of a source: one pass."""
        pilot = source.head(spec.columns, SAMPLE)
        return collect(spec, source, pilot, client, report)

    def summed_again(self, delta: Delta, source: Source, client: Any) -> CellMoments:
        """Moments of rows of a delta, with cross-products of each cell if rows are not weighted."""
        spec = spec_of(self.spec, delta)
        if spec.weights is None:
            spec = spec.with_crossproducts()
        found = self.summed(source, spec, client)
        if isinstance(found, CellMoments):
            return found
        raise NotSupportedError(
            f"rows added on {delta.created} are of {found.n_cells:,} groups: too many to be taken "
            "out in this process"
        )

    # ------------------------------------------------------------------ changes

    def append(
        self,
        source: Source,
        client: Any,
        progress: Progress | bool | None,
        name: str | None = None,
        kept: Sequence[Delta] | None = None,
        made: Sequence[Delta] = (),
    ) -> CellMoments | RemoteMoments:
        """Add the rows of a source as one delta.

        Parameters
        ----------
        name
            of rows that are in no file
        kept, made
            deltas of the new state beside it (by default all), and those of them that are new

        Returns
        -------
        moments of these rows
        """
        kept = self.deltas if kept is None else kept
        with self.written(), open_progress(progress) as report:
            found = self.summed(source, self.spec, client, report)
            state = source_state(source)
            if name is not None:
                rows = found.nobs + sum(found.dropped.values())
                state = replace(state, files=(Fingerprint(name, None, "", rows),))
            delta = momentstore.write_delta(self.folder, found, [state])
            self.commit([*kept, delta], [*made, delta])
        return found

    def add(self, cells: CellMoments | RemoteMoments, sources: Sequence[SourceState]) -> None:
        """Add moments of the same model, of rows that are not in the store.

        Raises
        ------
        DataError
            they are of another model, or of a file that the store has
        """
        known = entries(self.deltas)
        twice = [file.name for state in sources for file in state.files if file.name in known]
        if twice:
            raise DataError(f"{shown(twice)} are in the store: their rows would count twice")
        if not self.spec.compatible(cells.spec):
            raise DataError(
                f"{self.folder.name}: these moments cannot be added: they are of the model "
                f"{cells.spec.formula.text!r}, not {self.manifest.formula!r}, or of one with other "
                "weights, offset, carry or group_crossproducts"
            )
        with self.written():
            delta = momentstore.write_delta(self.folder, cells, sources)
            self.commit([*self.deltas, delta], [delta])

    def compact(self) -> None:
        """Make one of all deltas, and remove files that a killed process has left behind."""
        with self.written():
            if len(self.deltas) > 1:
                delta = momentstore.write_delta(
                    self.folder,
                    self._moments(self.deltas),
                    _joined(self.manifest.sources),
                    created=self.deltas[-1].created,
                )
                self.commit([delta], [delta])
            known = self.manifest.files
            for name in self.folder.names():
                age = self.folder.age(name) if momentstore.is_own(name) else None
                if name not in known and age is not None and age > ORPHAN:
                    self.folder.remove(name)

    def commit(self, deltas: Sequence[Delta], new: Sequence[Delta]) -> None:
        """Make deltas those of the next state, and remove the files of the others.

        Parameters
        ----------
        new
            those whose files no manifest names yet

        Raises
        ------
        DataError
            another process was faster; the files of new deltas are removed
        """
        before, spec = self.manifest, self.spec
        for j, key in enumerate(spec.keys):
            kinds = {_kind(x.key_types[j]) for delta in deltas for x in delta.shards if x.nobs}
            if len(kinds) > 1:
                for delta in new:
                    momentstore.remove_files(self.folder, delta.files)
                raise DataError(
                    f"group key {key.name!r} has type {' and '.join(sorted(kinds))} in rows that "
                    "are to be added; give the column one type everywhere"
                )
        manifest = manifest_of(spec, deltas, before.version + 1)
        momentstore.commit_or_clean(self.folder, manifest, new)
        self.manifest = manifest
        self._remove(before.files - manifest.files)

    def erase(self, deltas: Sequence[Delta], new: Sequence[Delta]) -> None:
        """`commit`, after which nothing is left of what was there before.

        Files that no manifest names are removed whatever their age: who has written them before
        this commit, and still wants to name them, is refused by it.
        """
        there = self.folder.names()
        self.commit(deltas, new)
        known, own = self.manifest.files, manifest_name(self.manifest.version)
        self._remove(
            name
            for name in there
            if name not in known
            and name != own
            and (momentstore.is_own(name) or MANIFEST_NAME.fullmatch(name))
        )

    def _remove(self, names: Iterable[str]) -> None:
        """Remove files after a change."""
        try:
            momentstore.remove_files(self.folder, names)
        except OSError as error:
            raise DataError(
                f"{self.folder.name}: the change was made, but files of the state before could not "
                f"be removed: {error.strerror or error}"
            ) from error


def _kind(type_: str) -> str:
    """Types of labels of one kind go together."""
    if type_ in ("int64", "uint64", "double"):
        return "number"
    if type_.startswith("timestamp"):
        return "timestamp of a zone" if "tz=" in type_ else "timestamp"
    return type_.removeprefix("large_")


def _joined(sources: Sequence[SourceState]) -> tuple[SourceState, ...]:
    """Sources that differ in files and snapshots only, as one with the last snapshot."""
    found: dict[tuple[str, ...], SourceState] = {}
    for state in sources:
        key = (state.kind, state.location, state.rows_wanted, state.declared)
        before = found.get(key)
        files = state.files if before is None else (*before.files, *state.files)
        found[key] = replace(state, files=files)
    return tuple(found.values())
