"""Residuals as pictures, from counts in bins that one pass over the rows makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import norm

from dmixed import outputs
from dmixed.binned import Binned
from dmixed.blocks import Floats
from dmixed.design.columns import Rows
from dmixed.dispatch import running
from dmixed.errors import DataError, NotSupportedError
from dmixed.plots.canvas import (
    BLUE,
    GREY,
    MANY,
    RED,
    cased,
    entitled,
    lines_in,
    new_axes,
    plain,
    shown_counts,
    trimmed,
)
from dmixed.predictor import Predicted

JOINT = (512, 256)
"""Bins of fitted values and of residuals."""

FINE = 16_384
"""Bins of residuals alone: a fraction of a pixel of any picture."""

TREND = 24
"""Places of a running mean."""


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Residuals of some rows; those of disjoint rows add.

    Standardised residuals are ``resid sqrt(weight / scale)``: Pearson's.

    Attributes
    ----------
    fitted
        fitted values (units of y) and standardised residuals together
    size
        fitted values, and roots of the size of the standardised residuals
    alone
        standardised residuals, much finer
    weighted
        whether rows have weights
    """

    fitted: Binned
    size: Binned
    alone: Binned
    weighted: bool = False

    def __add__(self, other: Residuals) -> Residuals:
        """Of the rows of both."""
        return Residuals(
            self.fitted + other.fitted,
            self.size + other.size,
            self.alone + other.alone,
            self.weighted or other.weighted,
        )

    def beyond(self, size: float) -> int:
        """Rows whose standardised residual is larger than a size, to the width of a bin."""
        return int(self.alone.counts[np.abs(self.alone.centres[:, 0]) > size].sum())


def part_residuals(
    found: Predicted, rows: pa.Table, where: str, *, scale: float, weights: str | None
) -> Residuals:
    """Residuals of a part of the rows: those that a fit would use."""
    fitted, resid = found.values[:, 1], found.values[:, 2] / np.sqrt(scale)
    if weights is not None:
        with np.errstate(invalid="ignore"):
            resid = resid * np.sqrt(Rows(rows, {}, where).number(weights))
    kept = found.used & np.isfinite(fitted) & np.isfinite(resid)
    points = np.column_stack([fitted[kept], resid[kept]])
    size = np.column_stack([points[:, 0], np.sqrt(np.abs(points[:, 1]))])
    return Residuals(
        Binned.of(points, JOINT),
        Binned.of(size, JOINT),
        Binned.of(points[:, 1:], (FINE,)),
        weights is not None,
    )


def residuals_of(result: Any, data: Any = None, storage_options: Any = None) -> Residuals:
    """Residuals of the rows of a fit, or of data, in one pass.

    Raises
    ------
    DataError
        the data are not rows of the model, or none of them has all it needs
    """
    if data is not None and (result._names.plain or result._names.fixed):
        raise NotSupportedError("a model of arrays has no columns that data could have")
    source, _ = result._data(data, None, storage_options)
    weights = result._prepared.design.spec.weights
    weights = weights if weights in source.columns or data is None else None
    job = outputs.Job(replace(result._predictor(True), augment=True, weights=weights))
    summary = partial(part_residuals, scale=result.scale, weights=weights)
    found = outputs.summed(job, result._lookup(False), source, summary, running(result._client))
    if not found.alone.total:
        raise DataError("no row has a response and all covariates: there are no residuals")
    return found


# --------------------------------------------------------------------------- pictures


def against_fitted(result: Any, found: Residuals, ax: Any) -> Any:
    """Axes with residuals against fitted values, see `Plots.residuals`."""
    axes = new_axes(ax)
    own, unit = axes[0, 0], np.sqrt(result.scale)
    points = found.fitted.centres
    shown_counts(
        own, points[:, 0], points[:, 1] * unit, found.fitted.counts, "rows", found.fitted.total
    )
    own.axhline(0.0, color=GREY, lw=0.8)
    x, y = trend(found.fitted, points[:, 1] * unit)
    own.plot(x, y, color=RED, lw=1.8, path_effects=cased(), label="mean")
    y_name = plain(result.endog_name, 30)
    own.set_xlabel(f"fitted {y_name}")
    own.set_ylabel(f"residual {y_name}" + (", times root weight" if found.weighted else ""))
    entitled(own, f"Residuals of {found.alone.total:,} rows", result.formula)
    lines_in(own)
    trimmed([own])
    return own


def scale_location(result: Any, found: Residuals, ax: Any) -> Any:
    """Axes with the size of residuals against fitted values, see `Plots.scale_location`."""
    axes = new_axes(ax)
    own, points = axes[0, 0], found.size.centres
    shown_counts(own, points[:, 0], points[:, 1], found.size.counts, "rows", found.size.total)
    x, y = trend(found.size, points[:, 1])
    own.plot(x, y, color=RED, lw=1.8, path_effects=cased(), label="mean")
    own.set_xlabel(f"fitted {plain(result.endog_name, 30)}")
    own.set_ylabel("root of |standardised residual|")
    own.set_ylim(bottom=0.0)
    entitled(own, f"Scale of {found.alone.total:,} residuals", result.formula)
    lines_in(own)
    trimmed([own])
    return own


def trend(points: Binned, values: Floats) -> tuple[Floats, Floats]:
    """Mean position and mean value of runs of about equally many points along the first axis."""
    order = np.argsort(points.bins[:, 0], kind="stable")
    counts, x, y = points.counts[order], points.centres[order, 0], values[order]
    runs = max(min(TREND, points.total // 8), 1)
    ends = np.cumsum(counts)
    # bins of one fitted value stay together
    last = np.flatnonzero(np.append(np.diff(points.bins[order, 0]) > 0, True))
    run = np.minimum((ends[last] - 1) * runs // points.total, runs - 1)
    code = np.repeat(run, np.diff(np.append(-1, last)))
    n = np.bincount(code, counts, runs)
    there = n > 0
    mean_x, mean_y = (np.bincount(code, counts * v, runs)[there] / n[there] for v in (x, y))
    return mean_x, mean_y


def normal_quantiles(found: Residuals, points: int = 301) -> tuple[Floats, Floats]:
    """Normal quantiles, and the standardised residuals of those ranks; all ranks if few."""
    n = found.alone.total
    ranks = np.arange(n, dtype=np.float64) if n <= MANY else np.empty(0)
    if n > MANY:
        end = float(norm.ppf(0.5 / n))
        ranks = np.unique(np.rint(norm.cdf(np.linspace(end, -end, points)) * n - 0.5))
    p = (np.clip(ranks, 0, n - 1) + 0.5) / n
    return norm.ppf(p), found.alone.quantiles(p)


def normal_plot(result: Any, found: Residuals, ax: Any) -> Any:
    """Axes with quantiles of the residuals against normal ones, see `Plots.qq`."""
    axes = new_axes(ax)
    own = axes[0, 0]
    x, y = normal_quantiles(found)
    low, high = found.alone.quantiles(np.array([0.25, 0.75]))
    q = float(norm.ppf(0.75))
    slope = (high - low) / (2 * q)
    own.plot(
        x[[0, -1]], (low + high) / 2 + slope * x[[0, -1]], color=RED, lw=1.4, ls="--",
        label="normal, through the quartiles",
    )  # fmt: skip
    own.plot(x, y, "o", ms=3.5, color=BLUE, alpha=0.8, label="residuals")
    own.set_xlabel("normal quantile")
    own.set_ylabel("standardised residual")
    entitled(own, f"Normal Q-Q of {found.alone.total:,} residuals", result.formula)
    lines_in(own, loc="upper left")
    trimmed([own])
    return own
