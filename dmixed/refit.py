"""A scheduled refit: add what is new to the store, fit again, publish a version, say what changed.

Every step leaves something whole behind: the store after each change, a version when its
``version.json`` is there, what readers see when the pointer is switched. A run that was killed is
finished by the next, which finds what is done and does the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from dmixed.blocks import Floats
from dmixed.collected import Moments, MomentsModel, MomentStore, collect, open_moments
from dmixed.drift import (
    Added,
    Drift,
    Rows,
    beyond,
    changes_of,
    drift_record,
    drift_text,
    estimates_of,
)
from dmixed.errors import ConvergenceWarning, DataError
from dmixed.fitting import Estimates, Search, criterion_at, natural_root
from dmixed.folders import Folder
from dmixed.held import Penalties
from dmixed.inference.score import ScoreTest, score_test
from dmixed.jobs import Job
from dmixed.manifests import newest
from dmixed.optimizer import zero_blocks
from dmixed.places import MANIFEST
from dmixed.preparation import Prepared
from dmixed.progress import Progress, Report, open_progress
from dmixed.published import (
    SIZE,
    TABLES,
    VERSION_SCHEMA,
    Factor,
    Pointer,
    Published,
    Version,
)
from dmixed.resultfiles import RESULT, json_bytes, result_json
from dmixed.results import MixedLMResults
from dmixed.store import Appended
from dmixed.turnover import factors_of, turnover_of

logger = logging.getLogger("dmixed")

_PLACES = "data", "store", "publish"

DRIFT, DRIFT_TEXT, PROVENANCE = "drift.json", "drift.txt", "provenance.json"
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
    run = _Run(job, store, Published(Folder.at(job.publish)), name)
    with run.reached():
        pointer = run.published.current()
        if pointer is not None and pointer.version == name:
            run.published.tidy(name)
            return Outcome(NOTHING_NEW, name, _place(job, pointer), store.version, appended)
        made: Version | Outcome | None = run.published.version(name)
        if made is None:
            made = run.make(pointer, appended, progress)
        if isinstance(made, Outcome):
            return made
        return run.finish(made, appended, accept)


def version_name(job: Job, store: MomentStore) -> str:
    """Name of the version of a job on a state of the store: the same whenever it is made."""
    state = [job.model, *(delta.id for delta in store.deltas)]
    checksum = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return f"{store.version:06d}-{checksum[:12]}"


def _place(job: Job, pointer: Pointer) -> str:
    return Folder.at(job.publish).file(pointer.folder)


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
    """Refuse a store of another model than the job's.

    Raises
    ------
    DataError
        naming the fields that differ
    """
    was = store._directory.manifest
    found = [
        f"{name} is {now!r}, in the store it is {then!r}"
        for name, now, then in (
            ("formula", job.formula, was.formula),
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


@dataclass(frozen=True, slots=True)
class _Run:
    """A job on one state of its store."""

    job: Job
    store: MomentStore
    published: Published
    name: str

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Errors of the storage of results, in words."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.published.folder.name}: results cannot be written or read: "
                f"{error.strerror or error}"
            ) from error

    def make(
        self, pointer: Pointer | None, appended: Appended, progress: Progress | bool | None
    ) -> Version | Outcome:
        """Fit, and write a version; the outcome if the search did not converge."""
        before = None if pointer is None else self.published.version(pointer.version)
        if pointer is not None and before is None:
            raise DataError(
                f"{self.published.folder.name}: current.json names {pointer.version}, which is not "
                "there; remove current.json to publish anew, without a comparison"
            )
        comparable = before if before is not None and before.model == self.job.model else None
        moments = self._moments()
        model = moments.model()
        prepared = model._prepared
        Psi = None if comparable is None else _known_covariance(comparable, prepared)
        with open_progress(progress) as report:
            score = None if Psi is None else _score(prepared, Psi, self.job.reml)
            if comparable is not None and score is not None and score.df:
                report.message(
                    f"the covariance of {comparable.id} on all rows: chi-square "
                    f"{score.statistic:.3f}, {score.df} df, p {score.pvalue:.3g}"
                )
            found = _fitted(model, self.job.reml, Psi, report)
        if not found.summary.converged:
            return Outcome(
                NOT_CONVERGED, None, None, self.store.version, appended,
                reason=found.summary.reason,
            )  # fmt: skip
        result = _result(model, found)
        return self._write(result, moments, before, comparable, score)

    def _moments(self) -> Moments:
        n = len(self.store.deltas)
        if self.job.window is None or self.job.window >= n:
            return self.store.moments
        return self.store.window(last=self.job.window)

    def _write(
        self,
        result: MixedLMResults,
        moments: Moments,
        before: Version | None,
        comparable: Version | None,
        score: ScoreTest | None,
    ) -> Version:
        """Write the files of a version, and then the version."""
        attempt, prepared = self.published.attempt(self.name), result._prepared
        tables = attempt.folder.below(TABLES)
        result.ranef_table(out=tables.location)
        factors = factors_of(prepared, tables)
        attempt.note(f"{TABLES}/{MANIFEST}", tables.read(MANIFEST, SIZE))
        drift = self._drift(result, moments, before, comparable, score, factors, tables)
        limit = self.job.drift.limit
        names = [f"{TABLES}/{file}" for factor in factors for file in factor.files]
        attempt.put(RESULT, result_json(result, names))
        attempt.put(DRIFT, json_bytes(drift_record(drift, limit)))
        attempt.put(DRIFT_TEXT, drift_text(drift, limit).encode())
        attempt.put(PROVENANCE, json_bytes(self._provenance()))
        return self.published.add(
            Version(
                schema=VERSION_SCHEMA,
                id=self.name,
                attempt=attempt.name,
                model=self.job.model,
                store_version=self.store.version,
                deltas=tuple(delta.id for delta in self.store.deltas),
                before=drift.before,
                formula=result.formula,
                llf=result.llf,
                rows=drift.rows,
                largest=drift.largest,
                labels=_labels(prepared),
                Psi=result._estimates.variances.Psi,
                estimates=estimates_of(result),
                factors=factors,
                files=attempt.files,
            )
        )

    def _drift(
        self,
        result: MixedLMResults,
        moments: Moments,
        before: Version | None,
        comparable: Version | None,
        score: ScoreTest | None,
        factors: tuple[Factor, ...],
        tables: Folder,
    ) -> Drift:
        known = () if before is None else before.deltas
        deltas = self.store.deltas
        new = [delta for delta in deltas if delta.id not in known]
        added = Added(
            parts=len(new),
            nobs=sum(delta.nobs for delta in new),
            files=tuple(file.name for x in new for state in x.sources for file in state.files),
            parts_gone=len(set(known) - {delta.id for delta in deltas}),
        )
        turnover = {}
        if comparable is not None:
            folder = self.published.files(comparable).below(TABLES)
            turnover = dict(turnover_of(factors, tables, comparable.factors, folder))
        return Drift(
            version=self.name,
            before=None if comparable is None else comparable.id,
            reason=_no_comparison(before, comparable),
            changes=changes_of(
                estimates_of(result), () if comparable is None else comparable.estimates
            ),
            score=score,
            llf=result.llf,
            turnover=turnover,
            rows=Rows(moments.nobs, dict(moments.dropped)),
            rows_before=None if before is None else before.rows,
            added=added,
        )

    def _provenance(self) -> dict[str, Any]:
        """What a version was made of, and with what."""
        job = self.job
        return {
            "schema": "dmixed-refit-provenance/1",
            "version": self.name,
            "job": {
                **job.model_dump(mode="json", by_alias=True, exclude={"scheduler", *_PLACES}),
                **{name: Folder.at(getattr(job, name)).name for name in _PLACES},
            },
            "store": {"uri": self.store.uri, "version": self.store.version},
            "deltas": [
                {
                    "id": delta.id,
                    "created": delta.created,
                    "rows": delta.nobs,
                    "groups": delta.n_cells,
                    "files": [file.name for state in delta.sources for file in state.files],
                    "snapshots": [state.snapshot for state in delta.sources if state.snapshot],
                }
                for delta in self.store.deltas
            ],
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("dmixed", "dask", "distributed", "numpy", "scipy", "pyarrow")
                },
            },
            "machine": platform.machine(),
        }

    def finish(self, made: Version, appended: Appended, accept: bool) -> Outcome:
        """Publish a version, or hold it back."""
        drift = self.job.drift
        drifted = beyond(made.largest, drift.limit) and not accept
        folder = self.published.files(made)
        held = drifted and drift.action == "hold"
        self.published.check(made)
        if not held:
            self.published.publish(made, self.job.keep)
            logger.info("published %s", made.id)
        self.published.tidy(made.id)
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


def _no_comparison(before: Version | None, comparable: Version | None) -> str:
    if comparable is not None:
        return ""
    if before is None:
        return "the first one: there is nothing to compare it with"
    return f"not compared with {before.id}, which is of another model"


# --------------------------------------------------------------------------- the fit


def _labels(prepared: Prepared) -> tuple[str, ...]:
    """Of the random columns, in the order of Psi."""
    found = []
    for bar in prepared.bars:
        names = bar.names if bar.component is None else (bar.label,)
        found += [f"{bar.label}: {name}" for name in names]
    return tuple(found)


def _known_covariance(before: Version, prepared: Prepared) -> Floats | None:
    """The relative covariance (q, q) of a version, if it is of the same random columns."""
    q = prepared.problem.factors.blocks.q
    if before.labels != _labels(prepared) or before.Psi.shape != (q, q):
        return None
    return before.Psi


def _score(prepared: Prepared, Psi: Floats, reml: bool) -> ScoreTest:
    """Test of a covariance on the rows of a model."""
    problem = prepared.problem
    at = criterion_at(prepared, Psi, reml)
    return score_test(problem.factors, at, natural_root(problem, Psi), reml)


def _fitted(model: MomentsModel, reml: bool, Psi: Floats | None, report: Report) -> Estimates:
    """Estimates, searched for from a covariance; from anew if that leads nowhere.

    From a variance of zero nothing leads back: then the search begins anew as well.
    """
    report.stage("fit")
    search = Search(callback=report.watch())
    problem = model._prepared.problem
    if Psi is not None:
        root = natural_root(problem, Psi)
        if not zero_blocks(problem.factors.blocks, root):
            found = model._fit(reml, replace(search, start=Psi), None, None, True, Penalties())
            if found.summary.converged:
                report.fitted(found.summary)
                return found
    found = model._fit(reml, search, None, None, True, Penalties())
    report.fitted(found.summary)
    return found


def _result(model: MomentsModel, found: Estimates) -> MixedLMResults:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model._result(found, False, {}, stacklevel=2)
