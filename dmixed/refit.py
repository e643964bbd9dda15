"""A scheduled refit: add what is new to the store, fit again, publish a version, say what changed.

Every step leaves something whole behind: the store after each change, a version when its
``version.json`` is there, what readers see when the pointer is switched. A run that was killed is
finished by the next, which finds what is done and does the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dmixed.collected import Moments, MomentStore, collect, open_moments
from dmixed.drift import beyond
from dmixed.errors import DataError
from dmixed.folders import Folder
from dmixed.jobs import Job
from dmixed.manifests import newest
from dmixed.progress import Progress, open_progress
from dmixed.published import SIZE, Pointer, Published, Version
from dmixed.refitting import covariance_test, fitted_from, known_covariance
from dmixed.store import Appended
from dmixed.versions import DRIFT_TEXT, Refitted, State, write_version

logger = logging.getLogger("dmixed")

PUBLISHED, NOTHING_NEW, HELD, NOT_CONVERGED = "published", "nothing new", "held", "not converged"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a refit did.

    Attributes
    ----------
    status
        "published", "nothing new", "held" (beyond the limit of drift) or "not converged"
    version, folder
        the version and the place of its files; None if there is none
    store_version
        state of the store
    appended
        what was added to the store by this run
    drift
        whether the version that was published or held is beyond the limit
    largest
        largest change of an estimate since the version before, standard errors
    reason
        why the search did not converge
    text
        the report of drift, for readers
    """

    status: str
    version: str | None
    folder: str | None
    store_version: int
    appended: Appended
    drift: bool = False
    largest: float = 0.0
    reason: str = ""
    text: str = field(default="", repr=False)

    @property
    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        added = self.appended
        return {
            "schema": "dmixed-refit-run/1",
            "status": self.status,
            "version": self.version,
            "folder": self.folder,
            "store_version": self.store_version,
            "appended": {
                "files": list(added.new),
                "changed": list(added.changed),
                "vanished": list(added.vanished),
                "skipped": len(added.skipped),
                "rows": added.nobs,
                "dropped": dict(added.dropped),
            },
            "drift": self.drift,
            "largest_change": self.largest,
            "reason": self.reason,
        }


def refit(
    job: Job,
    client: Any = None,
    accept: bool = False,
    progress: Progress | bool | None = None,
) -> Outcome:
    """Run a job: see the module.

    Parameters
    ----------
    client
        `distributed.Client` to run on
    accept
        publish a version whose estimates have drifted beyond the limit as any other
    progress
        see `lmer`

    Raises
    ------
    DataError
        naming what cannot be read or written, another model in the store, or another process that
        changed the store at the same time; what was published stays
    """
    store, appended = _store(job, client, progress)
    logger.info(
        "%s is at version %d: %d rows of %d files were new, %d files known",
        store.uri, store.version, appended.nobs, len(appended.new), len(appended.skipped),
    )  # fmt: skip
    name = version_name(job, store)
    published = Published(Folder.at(job.publish))
    state = State(job, store, published, name)
    with _reached(published):
        pointer = published.current()
        if pointer is not None and pointer.version == name:
            published.tidy(name)
            place = published.folder.file(pointer.folder)
            return Outcome(NOTHING_NEW, name, place, store.version, appended)
        made = published.version(name) or _made(state, pointer, progress)
        if isinstance(made, str):
            return Outcome(NOT_CONVERGED, None, None, store.version, appended, reason=made)
        return _finished(state, made, appended, accept)


def version_name(job: Job, store: MomentStore) -> str:
    """Name of the version of a job on a state of the store: the same whenever it is made."""
    state = [job.model, *(delta.id for delta in store.deltas)]
    checksum = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return f"{store.version:06d}-{checksum[:12]}"


@contextmanager
def _reached(published: Published) -> Iterator[None]:
    """Errors of the storage of results, in words."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{published.folder.name}: results cannot be written or read: {error.strerror or error}"
        ) from error


# --------------------------------------------------------------------------- the store


def _store(job: Job, client: Any, progress: Progress | bool | None) -> tuple[MomentStore, Appended]:
    """The store with the rows that are new, and what these are."""
    folder = Folder.at(job.store)
    try:
        there = newest(folder) is not None
    except OSError as error:
        raise DataError(f"{folder.name}: cannot be listed: {error.strerror or error}") from None
    if not there:
        moments = collect(
            job.formula,
            job.data,
            weights=job.weights,
            offset=job.offset,
            missing=job.missing,
            carry=job.carry,
            group_crossproducts=job.group_crossproducts,
            client=client,
            filters=job.conditions,
            progress=progress,
        )
        if not moments.nobs:
            raise DataError(f"{job.data}: has no rows that can be used")
        store = moments.save(job.store)
        files = tuple(file.name for state in moments.sources for file in state.files)
        found = Appended(files, (), (), (), moments.nobs, moments.n_cells, dict(moments.dropped))
        return store, found
    store = open_moments(job.store, client=client)
    _check_same(job, store)
    found = store.append(
        job.data,
        filters=job.conditions,
        changed=job.changed,
        vanished=job.vanished,
        client=client,
        progress=progress,
    )
    return store, found


def _check_same(job: Job, store: MomentStore) -> None:
    """Refuse a store of other sums than the job's; its formula may be one of fewer columns.

    Raises
    ------
    DataError
        naming the fields that differ
    """
    was = store._directory.manifest
    found = [
        f"{name} is {now!r}, in the store it is {then!r}"
        for name, now, then in (
            ("weights", job.weights, was.weights),
            ("offset", job.offset, was.offset),
            ("missing", job.missing, was.missing),
        )
        if now != then
    ]
    found += [
        f"{term!r} of carry is not in the store" for term in job.carry if term not in was.carry
    ]
    if job.group_crossproducts and not was.group_crossproducts:
        found.append("the store has no cross-products of groups")
    if found:
        raise DataError(
            f"{store.uri}: the moments there are not those of this job: {'; '.join(found)}. Give "
            "the job a new store, or its former fields"
        )


# --------------------------------------------------------------------------- a version


def _made(state: State, pointer: Pointer | None, progress: Progress | bool | None) -> Version | str:
    """Fit, and write a version; why the search did not converge, if it did not."""
    job, published = state.job, state.published
    before = None if pointer is None else published.version(pointer.version)
    if pointer is not None and before is None:
        raise DataError(
            f"{published.folder.name}: current.json names {pointer.version}, which is not there; "
            "remove current.json to publish anew, without a comparison"
        )
    comparable = before if before is not None and before.model == job.model else None
    moments = _moments(job, state.store)
    model = moments.model()
    prepared, score = model._prepared, None
    Psi = None if comparable is None else known_covariance(comparable, prepared)
    with open_progress(progress) as report:
        if Psi is not None:
            score = covariance_test(prepared, Psi, job.reml)
            report.message(
                f"the covariance before, on the rows now: chi-square {score.statistic:.3f}, "
                f"{score.df} df, p {score.pvalue:.3g}"
            )
        found = fitted_from(model, job.reml, Psi, report)
    if not found.summary.converged:
        return found.summary.reason
    result = model._result(found, False, {}, stacklevel=2)
    return write_version(state, Refitted(result, moments, before, comparable, score))


def _moments(job: Job, store: MomentStore) -> Moments:
    """What the job fits: the last additions, or all; of its model, which may be a smaller one."""
    whole = job.window is None or job.window >= len(store.deltas)
    found = store.moments if whole else store.window(last=job.window or 1)
    return found if job.formula == found.formula else found.submodel(job.formula)


def _finished(state: State, made: Version, appended: Appended, accept: bool) -> Outcome:
    """Publish a version, or hold it back."""
    published, drift = state.published, state.job.drift
    drifted = beyond(made.largest, drift.limit) and not accept
    held = drifted and drift.action == "hold"
    published.check(made)
    if not held:
        published.publish(made, state.job.keep)
        logger.info("published %s", made.id)
    published.tidy(made.id)
    folder = published.files(made)
    return Outcome(
        status=HELD if held else PUBLISHED,
        version=made.id,
        folder=folder.name,
        store_version=made.store_version,
        appended=appended,
        drift=drifted,
        largest=made.largest,
        text=folder.read(DRIFT_TEXT, SIZE).decode(),
    )
