"""What a report says of a fit, as plain values: of a result, or as a published version keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import norm

from dmixed.blocks import Floats
from dmixed.diagnosis import diagnose
from dmixed.optimizer import OptimizeSummary
from dmixed.plots.blups import Blups
from dmixed.plots.residuals import Residuals
from dmixed.summary import quantile

SCHEMA = "dmixed-report/1"

LEVEL = 0.05
"""Intervals are at level 1 - this."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A fixed effect, units of y per unit of its column; ``se`` is NaN where there is none."""

    name: str
    value: float
    se: float

    @property
    def z(self) -> float:
        """Estimate over standard error; NaN without one."""
        return self.value / self.se if self.se > 0.0 else math.nan

    @property
    def p(self) -> float:
        """Two-sided p-value, normal."""
        return 2.0 * float(norm.sf(abs(self.z)))

    @property
    def limits(self) -> tuple[float, float]:
        """Normal limits."""
        half = quantile(LEVEL) * self.se
        return self.value - half, self.value + half


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """Covariance of the random effects of a bar, or of a variance component; or the error's.

    Attributes
    ----------
    label, levels
        of its factor; the error has no levels
    names
        of its q columns
    cov
        (q, q) user units
    se
        (q,) standard errors of the variances; NaN where there is none, as at a boundary
    share
        mean variance that it gives a row, over that of all random effects and the error; NaN where
        that is not known
    """

    label: str
    levels: int | None
    names: tuple[str, ...]
    cov: Floats
    se: Floats
    share: float

    def __post_init__(self) -> None:
        q = len(self.names)
        assert q
        assert self.cov.shape == (q, q)
        assert self.se.shape == (q,)

    def limits(self, j: int) -> tuple[float, float]:
        """Limits of a variance, normal on its logarithm; NaN where there are none."""
        variance, se = float(np.diag(self.cov)[j]), float(self.se[j])
        if not (variance > 0.0 and se > 0.0):
            return math.nan, math.nan
        factor = math.exp(quantile(LEVEL) * min(se / variance, 300.0))
        return variance / factor, variance * factor

    def correlation(self, a: int, b: int) -> float:
        """Of two columns; NaN where one does not vary."""
        size = math.sqrt(float(self.cov[a, a]) * float(self.cov[b, b]))
        return float(self.cov[a, b]) / size if size > 0.0 else math.nan


@dataclass(frozen=True, slots=True)
class Remark:
    """What `diagnose` has found, see `Finding`."""

    severity: str
    topic: str
    what: str
    advice: str


@dataclass(frozen=True, slots=True)
class Facts:
    """A fit, as much of it as a report needs beside the random effects.

    Names are those of `MixedLMResults`, so that the pictures of a result can be drawn of it.

    Attributes
    ----------
    sizes
        rows of the smallest and of the largest group, and their mean
    fixed
        fixed effects
    components
        variances, those of the error last
    explained
        share of the variance of a row that the fixed part has, and that it has with the random
        effects (R2 of Nakagawa, Schielzeth and Johnson); NaN where that is not known
    remarks
        findings, the gravest first
    """

    schema: str
    formula: str
    method: str
    endog_name: str
    weights: str | None
    offset: str | None
    nobs: int
    dropped: dict[str, int]
    factors: dict[str, int]
    group_name: str
    sizes: tuple[int, int, float]
    llf: float
    aic: float
    bic: float
    converged: bool
    singular: bool
    aliased: tuple[str, ...]
    fixed: tuple[Effect, ...]
    components: tuple[Component, ...]
    explained: tuple[float, float]
    remarks: tuple[Remark, ...]
    optimizer_summary: OptimizeSummary

    def __post_init__(self) -> None:
        assert self.components

    @property
    def scale(self) -> float:
        """Error variance, units of y squared."""
        return float(self.components[-1].cov[0, 0])


@dataclass(frozen=True, slots=True)
class Moved:
    """An estimate now and before with its limits (value, low, high), and the change in its SE."""

    name: str
    now: tuple[float, float, float] | None
    before: tuple[float, float, float] | None
    change: float


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed since another fit.

    Attributes
    ----------
    before
        name of the other fit, None if there is none
    reason
        why there is none
    moved
        all estimates
    told
        further sentences
    groups
        factor, levels, new, gone, and some names of those that are new and gone
    """

    before: str | None
    reason: str
    moved: tuple[Moved, ...] = ()
    told: tuple[str, ...] = ()
    groups: tuple[tuple[str, int, int, int, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, names of columns, and rows of values."""

    caption: str
    names: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a fit comes from: labels and values, and tables."""

    pairs: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """All that a report shows.

    Attributes
    ----------
    source
        what it is of: a path, a version; "" for a result that was not saved
    effects
        summaries of the random effects by the label of their factor
    residuals
        of some rows, and what these are called
    changes
        since the last fit; None if no other fit is known
    """

    facts: Facts
    source: str
    effects: dict[str, Blups]
    provenance: Provenance
    residuals: Residuals | None = None
    rows: str = ""
    changes: Changes | None = None
    remarks: tuple[Remark, ...] = field(default=())


def facts_of(result: Any) -> Facts:
    """Facts of a `MixedLMResults`."""
    spec = result._prepared.design.spec
    shares, explained = variance_shares(result)
    return Facts(
        schema=SCHEMA,
        formula=result.formula,
        method=result.method,
        endog_name=result.endog_name,
        weights=spec.weights,
        offset=spec.offset,
        nobs=result.nobs,
        dropped=dict(result.dropped),
        factors=dict(result.factors),
        group_name=result.group_name,
        sizes=result.group_size_range,
        llf=float(result.llf),
        aic=float(result.aic),
        bic=float(result.bic),
        converged=bool(result.converged),
        singular=bool(result.singular),
        aliased=tuple(result.aliased),
        fixed=tuple(
            Effect(str(name), float(value), float(se))
            for name, value, se in zip(
                result._fixed_names, result._estimates.beta, np.asarray(result.bse_fe), strict=True
            )
        ),
        components=_components(result, shares),
        explained=explained,
        remarks=remarks_of(diagnose(result)),
        optimizer_summary=result.optimizer_summary,
    )


def remarks_of(found: Any) -> tuple[Remark, ...]:
    """Findings of a `Diagnosis`."""
    return tuple(Remark(x.severity, x.topic, x.what, x.advice) for x in found)


def _components(result: Any, shares: dict[str, float]) -> tuple[Component, ...]:
    """Of each bar, in order, and of the error."""
    blocks = result._prepared.problem.factors.blocks
    own = {a: se for (a, b), se in zip(blocks.pairs, result._bse_pairs, strict=True) if a == b}
    found = []
    for (label, cov), where in zip(result.varcorr().items(), blocks.slices, strict=True):
        block = range(where.start, where.stop)
        found.append(
            Component(
                label,
                _levels(label, result.factors),
                tuple(map(str, cov.index)),
                cov.to_numpy(),
                np.array([own[a] for a in block]),
                shares.get(label, math.nan),
            )
        )
    scale, se = np.array([[result.scale]]), np.array([result.bse_scale])
    error = Component("Residual", None, ("",), scale, se, shares.get("Residual", math.nan))
    return (*found, error)


def _levels(label: str, factors: dict[str, int]) -> int | None:
    """Levels of a bar's factor: bar ``g.1`` is one more bar of factor ``g``."""
    stem, dot, number = label.rpartition(".")
    return factors.get(stem if label not in factors and dot and number.isdigit() else label)


def variance_shares(result: Any) -> tuple[dict[str, float], tuple[float, float]]:
    """Shares of the variance of a row by bar, and what the fixed part and both explain.

    Notes
    -----
    A bar with covariance Psi gives row i of random columns z_i the variance z_i' Psi z_i. Its mean
    over the rows is trace(Psi Z'Z) / n (Johnson 2014, Methods in Ecology and Evolution 5(9)), which
    for random intercepts is their variance. With weights w means are weighted, and that of the
    error, sigma2 / w_i, is n sigma2 / sum(w). NaN where the moments do not tell, as for components
    whose reference levels have no column, or (what is explained) with an offset.
    """
    prepared = result._prepared
    totals = prepared.moments.summary.totals
    G, constant = totals.gram, totals.random[0]
    weight = float(G[constant, constant])
    given = {"Residual": result.nobs * result.scale / weight}
    cov = result._estimates.variances.Psi * result.scale
    slices = prepared.problem.factors.blocks.slices
    for design, term in zip(prepared.terms, prepared.problem.terms, strict=True):
        if len(term.codes) and term.codes.min() < 0:
            return {}, (math.nan, math.nan)
        T, where = totals.coded(design.T), slices[term.block]
        S = T.T @ G @ T / weight
        own = cov[where, where]
        variance = float(own[0, 0] * np.trace(S) if term.repeated else np.sum(own * S))
        label = prepared.bars[term.block].label
        given[label] = given.get(label, 0.0) + variance
    total = sum(given.values())
    shares = {label: variance / total for label, variance in given.items()}
    if prepared.design.spec.offset is not None:
        return shares, (math.nan, math.nan)
    T = totals.coded(prepared.design.T_fixed)[:, list(prepared.problem.fixed.kept)]
    line = T @ result._estimates.beta
    mean = float(G[constant] @ line) / weight
    fixed = max(float(line @ G @ line) / weight - mean * mean, 0.0)
    random = total - given["Residual"]
    return shares, (fixed / (fixed + total), (fixed + random) / (fixed + total))
