"""What has changed between two fits: estimates, groups and rows, as numbers and in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmixed.inference.score import ScoreTest
from dmixed.results import MixedLMResults
from dmixed.summary import quantile
from dmixed.tabular import WIDTH, ruled, text_table

LEVEL = 0.05
"""Intervals are at level 1 - this."""

NAMED = 10
"""Groups that are named of those that are new or gone."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimate of a fit, user units.

    Attributes
    ----------
    kind
        "fixed", "random" (an entry of a covariance matrix) or "scale"
    se
        standard error; NaN where there is none, as for a variance of zero
    """

    kind: str
    name: str
    value: float
    se: float

    @property
    def interval(self) -> tuple[float, float]:
        """Normal limits."""
        half = quantile(LEVEL) * self.se
        return self.value - half, self.value + half


@dataclass(frozen=True, slots=True)
class Change:
    """An estimate now and before; None where there is no such estimate."""

    now: Estimate | None
    before: Estimate | None

    @property
    def one(self) -> Estimate:
        """One of the two, for its name."""
        found = self.now or self.before
        assert found is not None
        return found

    @property
    def size(self) -> float:
        """Change in units of its standard error before, or now if there was none; NaN if unknown.

        An estimate that was held at its boundary has no standard error.
        """
        if self.now is None or self.before is None:
            return math.nan
        se = self.before.se if self.before.se > 0.0 else self.now.se
        return (self.now.value - self.before.value) / se if se > 0.0 else math.nan


@dataclass(frozen=True, slots=True)
class Turnover:
    """Levels of a factor, and those that are new and gone: how many, and the first by name."""

    levels: int
    new: int
    gone: int
    first_new: tuple[str, ...]
    first_gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows used, and rows dropped by reason."""

    nobs: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Added:
    """What the moments were made of since the version before.

    Attributes
    ----------
    parts
        additions to the store
    nobs
        rows that these have
    files
        their files
    parts_gone
        additions that the store had and has not any more: merged, replaced or removed
    """

    parts: int
    nobs: int
    files: tuple[str, ...]
    parts_gone: int


@dataclass(frozen=True, slots=True)
class Drift:
    """A fit compared with the one before.

    Attributes
    ----------
    version, before
        versions compared; ``before`` is None for a first version, or one of another model
    reason
        why there is no version before
    changes
        of all estimates
    score
        test of the covariance before on the rows now
    llf
        log-likelihood now
    turnover
        by factor; empty without a version before
    rows, rows_before
        now and before
    added
        since the version before
    """

    version: str
    before: str | None
    reason: str
    changes: tuple[Change, ...]
    score: ScoreTest | None
    llf: float
    turnover: Mapping[str, Turnover]
    rows: Rows
    rows_before: Rows | None
    added: Added

    @property
    def largest(self) -> float:
        """Largest change of an estimate, standard errors; 0 where nothing can be compared."""
        return max((abs(x.size) for x in self.changes if not math.isnan(x.size)), default=0.0)


def estimates_of(result: MixedLMResults) -> tuple[Estimate, ...]:
    """All estimates of a fit: fixed effects, entries of covariance matrices, error variance."""
    p, names = len(result.fe_params), list(map(str, result.params_user.index))
    values = result.params_user.to_numpy(dtype=np.float64)
    se = np.concatenate([np.asarray(result.bse_fe), np.asarray(result.bse_re)])
    kinds = ["fixed"] * p + ["random"] * (len(names) - p)
    found = [
        Estimate(kind, name, float(value), float(error))
        for kind, name, value, error in zip(kinds, names, values, se, strict=True)
    ]
    return (*found, Estimate("scale", "Scale", float(result.scale), float(result.bse_scale)))


def changes_of(now: Sequence[Estimate], before: Sequence[Estimate]) -> tuple[Change, ...]:
    """Estimates by name, those of now first, then those that are gone."""
    known = {(x.kind, x.name): x for x in before}
    found = [Change(x, known.pop((x.kind, x.name), None)) for x in now]
    return (*found, *(Change(None, x) for x in known.values()))


# --------------------------------------------------------------------------- for programs


def drift_record(drift: Drift, limit: float | None) -> dict[str, Any]:
    """A comparison as plain values, for JSON; NaN and infinities are None."""
    score = drift.score
    return {
        "schema": "dmixed-drift/1",
        "version": drift.version,
        "before": drift.before,
        "reason": drift.reason,
        "limit": limit,
        "largest_change": drift.largest,
        "beyond_limit": beyond(drift.largest, limit),
        "estimates": [
            {
                "kind": change.one.kind,
                "name": change.one.name,
                "now": _estimate_record(change.now),
                "before": _estimate_record(change.before),
                "change": _finite(change.size),
            }
            for change in drift.changes
        ],
        "score_test": None
        if score is None
        else {"statistic": score.statistic, "df": score.df, "pvalue": _finite(score.pvalue)},
        "llf": drift.llf,
        "groups": {
            label: {
                "levels": x.levels,
                "new": x.new,
                "gone": x.gone,
                "first_new": list(x.first_new),
                "first_gone": list(x.first_gone),
            }
            for label, x in drift.turnover.items()
        },
        "rows": _rows_record(drift.rows),
        "rows_before": None if drift.rows_before is None else _rows_record(drift.rows_before),
        "added": {
            "parts": drift.added.parts,
            "rows": drift.added.nobs,
            "files": list(drift.added.files),
            "parts_gone": drift.added.parts_gone,
        },
    }


def beyond(largest: float, limit: float | None) -> bool:
    """Whether a change is beyond a limit."""
    return limit is not None and largest > limit


def _estimate_record(found: Estimate | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    lower, upper = map(_finite, found.interval)
    return {"estimate": found.value, "se": _finite(found.se), "lower": lower, "upper": upper}


def _rows_record(rows: Rows) -> dict[str, Any]:
    return {"used": rows.nobs, "dropped": dict(rows.dropped)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------- for readers


def drift_text(drift: Drift, limit: float | None) -> str:
    """A comparison as lines of text."""
    lines = [*_wrapped(f"Version {drift.version}, {_against(drift)}"), "=" * WIDTH]
    lines += text_table(_table(drift.changes))
    lines.append("-" * WIDTH)
    lines += [line for text in _sentences(drift, limit) for line in _wrapped(text)]
    return ruled(lines) + "\n"


def _against(drift: Drift) -> str:
    return drift.reason if drift.before is None else f"compared with {drift.before}"


def _table(changes: Sequence[Change]) -> pd.DataFrame:
    rows, names = [], []
    for change in changes:
        names.append(change.one.name)
        size = change.size
        rows.append(
            {
                "Before": _shown(change.before),
                "[Interval]": _limits(change.before),
                "Now": _shown(change.now),
                "[Interval] ": _limits(change.now),
                "Change/SE": "" if math.isnan(size) else f"{size:+.2f}",
            }
        )
    table = pd.DataFrame(rows, index=names)
    compared = any(change.before is not None for change in changes)
    return table if compared else table[["Now", "[Interval] "]]


def _shown(found: Estimate | None) -> str:
    return "" if found is None else f"{found.value:.5g}"


def _limits(found: Estimate | None) -> str:
    if found is None or math.isnan(found.se):
        return ""
    lower, upper = found.interval
    return f"{lower:.4g}, {upper:.4g}"


def _sentences(drift: Drift, limit: float | None) -> list[str]:
    rows, before, added = drift.rows, drift.rows_before, drift.added
    found = []
    if drift.before is not None:
        text = f"Largest change of an estimate: {drift.largest:.2f} standard errors"
        if limit is not None:
            text += f", {'BEYOND' if beyond(drift.largest, limit) else 'within'} {limit:g}"
        found.append(f"{text}.")
    if drift.score is not None and drift.score.df:
        found.append(
            f"Score test of the covariance before, on all rows now: chi-square "
            f"{drift.score.statistic:.3f}, {drift.score.df} degrees of freedom, "
            f"p {drift.score.pvalue:.3g}."
        )
    was = "" if before is None else f" (before {before.nobs:,})"
    found.append(f"Rows used: {rows.nobs:,}{was}. Dropped: {_dropped(rows)}.")
    found.append(
        f"Added: {added.nobs:,} rows in {_count(added.parts, 'part')} of "
        f"{_count(len(added.files), 'file')}."
        + f" Merged, replaced or removed: {_count(added.parts_gone, 'part')}."
        * (added.parts_gone > 0)
    )
    for label, x in drift.turnover.items():
        found.append(
            f"{label}: {x.levels:,} levels, {x.new:,} new{_some(x.first_new, x.new)}, "
            f"{x.gone:,} gone{_some(x.first_gone, x.gone)}."
        )
    return found


def _dropped(rows: Rows) -> str:
    told = [f"{reason} ({n:,})" for reason, n in rows.dropped.items() if n]
    return ", ".join(told) or "none"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _some(names: Sequence[str], n: int) -> str:
    if not names:
        return ""
    more = ", ..." if n > len(names) else ""
    return f" ({', '.join(names)}{more})"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]
