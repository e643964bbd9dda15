"""Estimates with their intervals as a picture: of one fit, or of one fit and the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dmixed.blocks import Floats
from dmixed.plots.canvas import BLUE, GREY, LABEL, new_axes, plain, told_apart, trimmed

FAR = 30.0
"""Largest interval over the median one from which the axis is compressed."""


def intervals(
    names: Sequence[str],
    series: Sequence[tuple[str, Floats]],
    label: str,
    ax: Any = None,
) -> Any:
    """Axes with a row for each name, the first on top, and a mark with its interval per series.

    Parameters
    ----------
    names
        m of them
    series
        what each is called, and (m, 3): value, lower and upper limit; NaN where there is none
    label
        of the axis of values, which is logarithmic away from zero where sizes differ very much
    """
    axes = new_axes(ax)
    own, m = axes[0, 0], len(names)
    apart = 0.28 if len(series) > 1 else 0.0
    for j, (called, values) in enumerate(series):
        y = np.arange(m) + apart * (j - (len(series) - 1) / 2)
        half = np.abs(values[:, 1:] - values[:, :1]).T
        own.errorbar(
            values[:, 0], y, xerr=np.nan_to_num(half), fmt="os"[j % 2], ms=5,
            color=(BLUE, GREY)[j % 2], lw=1.6, label=called,
        )  # fmt: skip
    own.axvline(0.0, color=GREY, lw=0.8)
    _scale(own, np.concatenate([values for _, values in series]))
    own.set_ylim(m - 0.4, -0.6)
    own.set_yticks(np.arange(m), told_apart(names, LABEL))
    own.set_xlabel(plain(label, 70))
    if len(series) > 1:
        own.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    trimmed([own])
    return own


def _scale(ax: Any, values: Floats) -> None:
    """A linear axis, or one that is linear about zero only."""
    sizes = np.nanmax(np.abs(values), axis=1)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0.0)]
    if len(sizes) and sizes.max() > FAR * np.median(sizes):
        widths = np.nanmax(values, axis=1) - np.nanmin(values, axis=1)
        widths = widths[np.isfinite(widths) & (widths > 0.0)]
        ax.set_xscale("symlog", linthresh=float(min(np.median(sizes), *widths[:1])))
