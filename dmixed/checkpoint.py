"""A fit that goes on where it was stopped: its moments, and how far the search is.

A checkpoint is a directory of moments (see `momentstore`), written after the pass, and
``progress.json``, replaced after each evaluation. It is used again for the same model and the same
files, and refused for any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import numpy as np

from dmixed import momentstore
from dmixed.blocks import Floats
from dmixed.cellmoments import CellMoments
from dmixed.design.columns import Context
from dmixed.errors import DataError
from dmixed.evaluation import RemoteMoments
from dmixed.executor import DRIVER, check_remote
from dmixed.fitting import Search, natural_root
from dmixed.folders import Folder, check_workers, lies_within
from dmixed.formula import ParsedFormula
from dmixed.manifests import (
    Manifest,
    manifest_name,
    newest,
    read_manifest,
    refuse_own_functions,
    stored_spec,
)
from dmixed.optimizer import ZERO, Step
from dmixed.preparation import Prepared
from dmixed.progress import Report
from dmixed.provenance import SourceState, comparable, differences, source_state
from dmixed.records import made_record, record_bytes, record_checksum
from dmixed.sources import Source, paths_of

PROGRESS = "progress.json"
SCHEMA = "dmixed-fit-progress/1"

PROGRESS_BYTES = 2**26
"""Bytes of ``progress.json`` at most."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a checkpoint must be of, to be used again; see `DesignSpec`."""

    formula: ParsedFormula
    weights: str | None
    offset: str | None
    missing: str
    context: Context | None
    source: Source


@dataclass(frozen=True, slots=True)
class SearchState:
    """Contents of ``progress.json``.

    Attributes
    ----------
    moments
        checksum of the manifest of the moments
    reml
        REML or ML
    evaluations
        so far, those before an interruption included
    criterion
        the lowest so far, deviance units
    Psi
        (q, q) relative covariance there, user units
    """

    schema: str
    moments: str
    reml: bool
    evaluations: int
    criterion: float
    Psi: Floats


class Checkpoint:
    """A directory in which a model's moments and the progress of its fits are kept.

    Parameters
    ----------
    folder
        the directory
    resume
        None: use what is there if it is of the same model and files; True: also where data are no
        files, and cannot be compared; False: replace what is there
    """

    def __init__(self, folder: Folder, resume: bool | None) -> None:
        self.folder, self.resume = folder, resume
        self._moments = ""
        self._resumed: SearchState | None = None

    # ------------------------------------------------------------------ moments

    def moments(
        self,
        asked: Asked,
        collect: Callable[[], CellMoments | RemoteMoments],
        report: Report,
        client: Any,
        where: str,
    ) -> CellMoments | RemoteMoments:
        """The moments that are there, or those that ``collect`` makes, which are written.

        Parameters
        ----------
        where
            see `executor.collect`

        Raises
        ------
        DataError
            naming the directory, which cannot be written or seen, or what differs or is damaged
        """
        refuse_own_functions(asked.formula, asked.context)
        with self._written():
            self._check_writable()
            manifest = self._manifest()
        state = source_state(asked.source)
        if client is not None and where == "workers":
            check_workers(self.folder, client)
        if manifest is not None:
            self._check_same(manifest, asked, state)
            return self._read(manifest, client, where, report)
        found = collect()
        if found.nobs:
            self._write(found, state, where, report)
        return found

    def _manifest(self) -> Manifest | None:
        """The manifest to use, None if there is none."""
        if self.folder.size("result.json") is not None:
            raise DataError(
                f"checkpoint {self.folder.name}: is a stored result; choose another directory"
            )
        number = None if self.resume is False else newest(self.folder)
        return None if number is None else read_manifest(self.folder, number)

    def _check_writable(self) -> None:
        name = f".{uuid4().hex}.dmixed"
        self.folder.put(name, b"")
        self.folder.remove(name)

    def _check_same(self, manifest: Manifest, asked: Asked, state: SourceState) -> None:
        """Refuse the moments of another model, or of other rows."""
        name, formula = self.folder.name, asked.formula
        found = [
            f"{what} is {now!r}, it was {was!r}"
            for what, now, was in (
                ("the formula", formula.text, manifest.formula),
                ("groups, re_formula and vc_formula", formula.words, manifest.words),
                ("weights", asked.weights, manifest.weights),
                ("offset", asked.offset, manifest.offset),
                ("missing", asked.missing, manifest.missing),
            )
            if now != was
        ]
        found += differences(state, manifest.sources)
        if not found and not comparable(state):
            if self.resume is not True:
                raise DataError(
                    f"checkpoint {name}: whether the rows are the same cannot be told, because "
                    f"{state.kind} data here have no files with times of modification: pass "
                    "resume=True if they are, resume=False to start over, or choose another "
                    "directory"
                )
            dropped = sum(sum(delta.dropped.values()) for delta in manifest.deltas)
            rows, was = _rows(asked), manifest.nobs + dropped
            found += [] if rows in (None, was) else [f"the data have {rows} rows, they had {was}"]
        if found:
            raise DataError(
                f"checkpoint {name} is that of another fit: {'; '.join(found)}. Choose another "
                "directory, or replace it with resume=False"
            )

    def _read(
        self, manifest: Manifest, client: Any, where: str, report: Report
    ) -> CellMoments | RemoteMoments:
        shards = max(len(delta.shards) for delta in manifest.deltas)
        many = shards > 1 and manifest.nbytes > DRIVER
        if where == "workers":
            file = self.folder.file(manifest_name(manifest.version))
            check_remote(stored_spec(manifest, file), client)
        self._moments = record_checksum(manifest)
        self._resumed = self._progress()
        found: CellMoments | RemoteMoments
        if client is not None and (where == "workers" or (where == "auto" and many)):
            if where == "auto":
                check_workers(self.folder, client)
            found = momentstore.read_remote(self.folder, manifest, client)
        else:
            found = momentstore.read(self.folder, manifest)
        text = f"resumed from {self.folder.name}: the {manifest.nobs:,} rows are not read again"
        if self._resumed is not None:
            text += f", {self._resumed.evaluations} evaluations were done"
        report.message(text)
        return found

    def _progress(self) -> SearchState | None:
        """How far the search of these moments was; None if there is nothing of them."""
        with self._written():
            if self.folder.size(PROGRESS) is None:
                return None
        file = self.folder.file(PROGRESS)
        try:
            content = self.folder.read(PROGRESS, PROGRESS_BYTES)
            found = made_record(SearchState, content, file, SCHEMA)
        except DataError as error:
            raise DataError(f"{error}; remove it to begin the search anew") from None
        return found if found.moments == self._moments else None

    def _write(
        self, found: CellMoments | RemoteMoments, state: SourceState, where: str, report: Report
    ) -> None:
        before: set[str] = set()
        with self._written():
            number = newest(self.folder)
            if number is not None:  # what is there stays whole until there is another
                with suppress(DataError):
                    before = read_manifest(self.folder, number).files
            if isinstance(found, RemoteMoments) and where != "workers":
                check_workers(self.folder, found.client)
            manifest = momentstore.write(self.folder, found, [state], (number or 0) + 1)
            momentstore.remove_files(self.folder, [*before, PROGRESS])
        self._moments, self._resumed = record_checksum(manifest), None
        report.message(f"moments of {found.n_cells:,} cells written to {self.folder.name}")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Errors of the storage, in words."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"checkpoint {self.folder.name}: cannot be written: {error.strerror or error}"
            ) from error

    # ------------------------------------------------------------------ search

    def search(self, search: Search, prepared: Prepared, reml: bool) -> Search:
        """The same search: from where it was, if it was of the same criterion, and kept."""
        earlier, done = None, self._resumed
        if done is not None and done.reml == reml and search.start is None:
            earlier = done
            search = replace(search, start=self._start(done, prepared, search.method))
        if not self._moments:
            return search
        watch = self._kept(search.callback, prepared, reml, earlier.evaluations if earlier else 0)
        return replace(search, callback=watch)

    def _start(self, done: SearchState, prepared: Prepared, method: str | None) -> Floats | None:
        """Psi to start from."""
        problem, file = prepared.problem, self.folder.file(PROGRESS)
        q = problem.factors.blocks.q
        if done.Psi.shape != (q, q) or done.evaluations < 0:
            raise DataError(f"{file}: Psi: must be numbers ({q}, {q}); remove it")
        try:
            root = natural_root(problem, done.Psi)
        except DataError as error:
            raise DataError(f"{file}: Psi: {error}; remove it") from None
        size = np.linalg.svd(root, compute_uv=False)
        if method is not None and size.min(initial=1.0) <= ZERO:
            return None  # methods of scipy do not leave a variance of zero
        return done.Psi

    def _kept(
        self,
        callback: Callable[[int, Step], None] | None,
        prepared: Prepared,
        reml: bool,
        earlier: int,
    ) -> Callable[[int, Step], None]:
        """Callback of a search that keeps the best Psi so far, and then calls the caller's."""
        blocks, natural = prepared.problem.factors.blocks, prepared.problem.natural
        best = np.inf
        Psi = np.zeros((blocks.q, blocks.q))
        done = earlier

        def keep(number: int, step: Step) -> None:
            nonlocal best, Psi, done
            done += 1
            if step.value < best:
                root = np.linalg.solve(natural, blocks.root(np.array(step.theta)))
                best, Psi = step.value, root @ root.T
            if np.isfinite(best):
                state = SearchState(SCHEMA, self._moments, reml, done, best, Psi)
                with self._written():
                    self.folder.put(PROGRESS, record_bytes(state), durable=False)
            if callback is not None:
                callback(number, step)

        return keep


def open_checkpoint(
    place: Any, resume: Any, data: Any, storage_options: Mapping[str, Any] | None
) -> Checkpoint | None:
    """Checkpoint of the arguments ``checkpoint=`` and ``resume=``; None without.

    Parameters
    ----------
    data, storage_options
        as `lmer` takes them; the options are also those of a checkpoint on the same storage

    Raises
    ------
    DataError
        an argument is not what it can be, or the directory is one of the data
    """
    if not (resume is None or isinstance(resume, bool)):
        raise DataError(f"resume={resume!r}: must be None, True or False")
    if place is None:
        if resume is not None:
            raise DataError("resume= goes with checkpoint=, a directory or its URI")
        return None
    if not isinstance(place, str | os.PathLike) or not os.fspath(place):
        raise DataError(f"checkpoint={place!r}: must be a directory, as a path or URI")
    paths = paths_of(data)
    folder = Folder.at(place)
    scheme = folder.location.partition("://")[0]
    if "://" in folder.location and any(path.startswith(f"{scheme}://") for path in paths):
        folder = Folder.at(place, storage_options)
    if any(path and lies_within(folder.location, path) for path in paths):
        raise DataError(
            f"checkpoint {folder.name} lies among the data, and would be read as data the next "
            "time: choose a directory elsewhere, or one whose name begins with '_'"
        )
    return Checkpoint(folder, resume)


def _rows(asked: Asked) -> int | None:
    """Rows of the data, as far as that is known without reading them."""
    formula = asked.formula.resolved(asked.source.columns)
    counts = [part.rows for part in asked.source.parts(formula.columns)]
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) else None
