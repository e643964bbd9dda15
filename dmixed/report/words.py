"""What the pictures of a report show, in words with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dmixed.binned import Binned
from dmixed.plots import search
from dmixed.plots.blups import Blups
from dmixed.plots.residuals import Residuals, normal_quantiles, trend
from dmixed.report.facts import LEVEL, Changes, Effect, Facts, Moved
from dmixed.summary import quantile

NAMED = 6
"""Estimates that a sentence names."""


def number(value: float) -> str:
    """Six significant digits, empty where there is no value."""
    return "" if math.isnan(value) else f"{value:.6g}"


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share with one decimal, empty where it is not known."""
    return "" if math.isnan(value) else f"{100.0 * value:.1f} %"


def limits(low: float, high: float) -> str:
    """Two limits, empty where there are none."""
    return "" if math.isnan(low) or math.isnan(high) else f"{low:.5g} to {high:.5g}"


def counted(n: int, what: str) -> str:
    """A number of things."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def part(summary: Blups, chosen: Sequence[int]) -> Blups:
    """Some effects of a factor; its levels stay in their order, and pairs are left out."""
    at = list(chosen)
    return replace(
        summary,
        names=tuple(summary.names[j] for j in at),
        values=summary.values[:, at],
        se=summary.se[:, at],
        spread=tuple(summary.spread[j] for j in at),
        pairs=(),
    )


def fixed(facts: Facts, shown: Sequence[Effect]) -> str:
    """Estimates of fixed effects with their limits."""
    some = [f"{x.name} {short(x.value)} ({limits(*x.limits)})" for x in shown[:NAMED]]
    more = f"; {len(shown) - len(some):,} more are in the table" if len(some) < len(shown) else ""
    left_out = " The intercept is in the table only." if len(facts.fixed) > len(shown) else ""
    return f"Estimates with 95% limits: {'; '.join(some)}{more}.{left_out}"


def effects(label: str, summary: Blups) -> str:
    """Extremes and spread of the effects of the levels of a factor."""
    found = [f"{counted(summary.total, 'level')} of {label}."]
    half = quantile(LEVEL)
    for j, name in enumerate(summary.names):
        low, middle, high = _spread(summary, j)
        text = f"{name}: from {short(low)} to {short(high)}, median {short(middle)}"
        if summary.total == len(summary.labels):
            own = np.abs(summary.values[:, j]) > half * summary.se[:, j]
            text += f"; the intervals of {int(own.sum())} levels do not cover zero"
        found.append(f"{text}.")
    if summary.labels and summary.total > 1:
        found.append(f"Least is {summary.labels[0]}, greatest {summary.labels[-1]}.")
    return " ".join(found)


def _spread(summary: Blups, j: int) -> list[float]:
    """Smallest, median and largest effect."""
    if summary.total == len(summary.labels):
        return np.quantile(summary.values[:, j], [0.0, 0.5, 1.0]).tolist()
    return summary.spread[j].quantiles(np.array([0.0, 0.5, 1.0])).tolist()


def residuals(facts: Facts, found: Residuals) -> str:
    """Spread of the residuals, and where their running mean is."""
    unit = math.sqrt(facts.scale)
    _, mean = trend(found.fitted, found.fitted.centres[:, 1] * unit)
    low, high = (found.alone.quantiles(np.array([0.025, 0.975])) * unit).tolist()
    n = found.alone.total
    return (
        f"{counted(n, 'residual')} of {facts.endog_name}: 95% are between {short(low)} and "
        f"{short(high)}. The running mean along the fitted values is between "
        f"{short(float(mean.min()))} and {short(float(mean.max()))}; zero everywhere would be "
        f"right. {found.beyond(3.0):,} are beyond three standard deviations, "
        f"{0.0027 * n:,.1f} of a normal distribution would be."
    )


def quantiles(facts: Facts, found: Residuals) -> str:
    """How far the tails of the residuals are from those of the normal distribution."""
    del facts
    x, y = normal_quantiles(found)
    return (
        f"The smallest standardised residual is {short(float(y[0]))} and the largest "
        f"{short(float(y[-1]))}; of a normal distribution they would be about "
        f"{short(float(x[0]))} and {short(float(x[-1]))}. The quartiles are "
        + " and ".join(short(v) for v in found.alone.quantiles(np.array([0.25, 0.75])).tolist())
        + ", they would be -0.6745 and 0.6745."
    )


def scale(facts: Facts, found: Residuals) -> str:
    """Whether the size of residuals changes with fitted values."""
    del facts
    _, mean = trend(found.size, _second(found.size))
    return (
        "The running mean of the root of the size of standardised residuals goes from "
        f"{short(float(mean[0]))} at the smallest fitted values to {short(float(mean[-1]))} at the "
        f"largest, and is between {short(float(mean.min()))} and {short(float(mean.max()))}; "
        "a level line, about 0.82, is right for a constant error variance."
    )


def _second(points: Binned) -> np.ndarray:
    return np.asarray(points.centres[:, 1])


def convergence(facts: Facts) -> str:
    """How far the search came."""
    height, decrement, rounding = search.path_lines(facts.optimizer_summary)
    formed = decrement[np.isfinite(decrement)]
    last = f", the last Newton decrement is {formed[-1]:.1e}" if len(formed) else ""
    first = height[np.isfinite(height)][0]
    return (
        f"In {counted(len(height), 'evaluation')} the criterion fell by {first:.3g} deviance "
        f"units to its minimum{last}; rounding of the criterion is {rounding:.1e}."
    )


def drift(changes: Changes, shown: Sequence[Moved]) -> str:
    """The largest changes of estimates."""
    most = sorted(shown, key=lambda x: -abs(x.change))[:NAMED]
    told = "; ".join(f"{x.name} {x.change:+.2f}" for x in most)
    return (
        f"Changes of {counted(len(shown), 'estimate')} since {changes.before}, in standard errors "
        f"of the fit before, the largest first: {told}."
    )
