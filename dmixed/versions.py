"""What a refit writes of a fit: estimates, random effects, what changed, what it was made of."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dmixed.collected import Moments, MomentStore
from dmixed.drift import Added, Drift, Rows, changes_of, drift_record, drift_text, estimates_of
from dmixed.folders import Folder
from dmixed.inference.score import ScoreTest
from dmixed.jobs import Job
from dmixed.places import MANIFEST
from dmixed.published import SIZE, TABLES, VERSION_SCHEMA, Factor, Published, Version
from dmixed.records import record_bytes
from dmixed.refitting import labels_of
from dmixed.report.facts import facts_of
from dmixed.resultfiles import RESULT, json_bytes, result_json
from dmixed.results import MixedLMResults
from dmixed.turnover import factors_of, turnover_of

DRIFT, DRIFT_TEXT, PROVENANCE = "drift.json", "drift.txt", "provenance.json"
REPORT = "report.json"

_PLACES = "data", "store", "publish"


@dataclass(frozen=True, slots=True)
class State:
    """A job on one state of its store.

    Attributes
    ----------
    name
        of the version that follows
    """

    job: Job
    store: MomentStore
    published: Published
    name: str


@dataclass(frozen=True, slots=True)
class Refitted:
    """A fit, and what there was before.

    Attributes
    ----------
    result, moments
        the fit, and the rows that it is of
    before
        the version that is published
    comparable
        the same if it is of the same model, else None
    score
        test of its covariance on the rows now
    """

    result: MixedLMResults
    moments: Moments
    before: Version | None
    comparable: Version | None
    score: ScoreTest | None


def write_version(state: State, fit: Refitted) -> Version:
    """Write the files of a version, and then the version; or what another process has made."""
    result = fit.result
    attempt, prepared = state.published.attempt(state.name), result._prepared
    tables = attempt.folder.below(TABLES)
    result.ranef_table(out=tables.location)
    factors = factors_of(prepared, tables)
    attempt.note(f"{TABLES}/{MANIFEST}", tables.read(MANIFEST, SIZE))
    drift = _drift(state, fit, factors, tables)
    limit = state.job.drift.limit
    names = [f"{TABLES}/{file}" for factor in factors for file in factor.files]
    attempt.put(RESULT, result_json(result, names))
    attempt.put(DRIFT, json_bytes(drift_record(drift, limit)))
    attempt.put(DRIFT_TEXT, drift_text(drift, limit).encode())
    attempt.put(PROVENANCE, json_bytes(_provenance(state)))
    attempt.put(REPORT, record_bytes(facts_of(result)))
    return state.published.add(
        Version(
            schema=VERSION_SCHEMA,
            id=state.name,
            attempt=attempt.name,
            model=state.job.model,
            store_version=state.store.version,
            deltas=tuple(delta.id for delta in state.store.deltas),
            before=drift.before,
            formula=result.formula,
            llf=result.llf,
            rows=drift.rows,
            largest=drift.largest,
            labels=labels_of(prepared),
            Psi=result._estimates.variances.Psi,
            estimates=estimates_of(result),
            factors=factors,
            files=attempt.files,
        )
    )


def _drift(state: State, fit: Refitted, factors: tuple[Factor, ...], tables: Folder) -> Drift:
    """A fit compared with the version before."""
    result, before, comparable = fit.result, fit.before, fit.comparable
    known = () if before is None else before.deltas
    deltas = state.store.deltas
    new = [delta for delta in deltas if delta.id not in known]
    added = Added(
        parts=len(new),
        nobs=sum(delta.nobs for delta in new),
        files=tuple(file.name for x in new for state in x.sources for file in state.files),
        parts_gone=len(set(known) - {delta.id for delta in deltas}),
    )
    turnover = {}
    if comparable is not None:
        folder = state.published.files(comparable).below(TABLES)
        turnover = dict(turnover_of(factors, tables, comparable.factors, folder))
    return Drift(
        version=state.name,
        before=None if comparable is None else comparable.id,
        reason=_no_comparison(before, comparable),
        changes=changes_of(
            estimates_of(result), () if comparable is None else comparable.estimates
        ),
        score=fit.score,
        llf=result.llf,
        turnover=turnover,
        rows=Rows(fit.moments.nobs, dict(fit.moments.dropped)),
        rows_before=None if before is None else before.rows,
        added=added,
    )


def _provenance(state: State) -> dict[str, Any]:
    """What a version was made of, and with what."""
    job = state.job
    return {
        "schema": "dmixed-refit-provenance/1",
        "version": state.name,
        "job": {
            **job.model_dump(mode="json", by_alias=True, exclude={"scheduler", *_PLACES}),
            **{name: Folder.at(getattr(job, name)).name for name in _PLACES},
        },
        "store": {"uri": state.store.uri, "version": state.store.version},
        "deltas": [
            {
                "id": delta.id,
                "created": delta.created,
                "rows": delta.nobs,
                "groups": delta.n_cells,
                "files": [file.name for state in delta.sources for file in state.files],
                "snapshots": [state.snapshot for state in delta.sources if state.snapshot],
            }
            for delta in state.store.deltas
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


def _no_comparison(before: Version | None, comparable: Version | None) -> str:
    if comparable is not None:
        return ""
    if before is None:
        return "the first one: there is nothing to compare it with"
    return f"not compared with {before.id}, which is of another model"
