"""Axes to draw on, and texts and colours that stay legible."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmixed.errors import DataError, DmixedError

BLUE, RED, GREY = "#0072B2", "#D55E00", "#767676"
"""Okabe and Ito's blue and vermillion, which the colour-blind tell apart, and a neutral grey."""

COUNTS = "cividis"
"""Colour map of counts: its lightness rises evenly, also for the colour-blind."""

LABEL = 26
"""Characters of a level's label that are shown."""

LETTER = 6.6
"""Points of width of a character of a title."""

LEVEL = re.compile(r"\S\[.*\]$")
"""Ends the name of a column of a level, such as ``f[T.b]``."""

MANY = 1_000
"""Points from which counts are shown instead of points."""

SIZE = (6.4, 4.8)
"""Inches."""


def pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises
    ------
    DmixedError
        matplotlib is not installed
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise DmixedError(
            "plots need matplotlib, which is not installed: pip install 'dmixed[plot]'"
        ) from None
    return plt


def new_axes(
    ax: Any, shape: tuple[int, int] = (1, 1), size: tuple[float, float] = SIZE, **options: Any
) -> Any:
    """Array (rows, columns) of Axes: those given, or those of a new figure.

    Parameters
    ----------
    ax
        None, one Axes, or as many as are needed, row by row

    Raises
    ------
    DataError
        ``ax`` are not Axes, or not so many
    DmixedError
        matplotlib is not installed
    """
    plt = pyplot()
    if ax is None:
        _, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, **options)
        return axes
    given = list(np.asarray(ax, dtype=object).ravel())
    if not all(hasattr(x, "set_xlabel") and hasattr(x, "figure") for x in given):
        raise DataError(f"ax={ax!r}: must be matplotlib Axes")
    if len(given) != shape[0] * shape[1]:
        raise DataError(f"ax has {len(given)} Axes: this plot needs {shape[0] * shape[1]}")
    found = np.empty(len(given), dtype=object)
    found[:] = given
    return found.reshape(shape)


def answer(axes: Any) -> Any:
    """The one Axes of an array, or the array without axes of length one."""
    return axes[0, 0] if axes.size == 1 else axes.squeeze()


# --------------------------------------------------------------------------- texts


def plain(text: object, room: int = 0) -> str:
    """Text that is drawn as it is, on one line; the middle is left out where it is too long.

    Labels come from data: a dollar sign begins no formula, and control characters do nothing.
    """
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if room and len(shown) > room:
        head = (room - 1) * 2 // 3
        shown = f"{shown[:head]}…{shown[len(shown) - (room - 1 - head) :]}"
    return shown.replace("$", r"\$")


def told_apart(labels: Sequence[object], room: int) -> list[str]:
    """Labels of at most so many characters that still differ where they can.

    What all of them begin and end with is cut, if leaving out their middles makes some equal.
    """
    texts = [plain(x).replace(r"\$", "$") for x in labels]
    short = [plain(x, room) for x in labels]
    if len(set(short)) == len(set(texts)):
        return short
    head = _alike(texts)
    tail = _alike([x[head:][::-1] for x in texts])
    cut = [x[head : len(x) - tail] for x in texts]
    spare = max(room - 2 - max(map(len, cut)), 0)
    begin = texts[0][max(head - spare, 0) : head]
    left, right = "…" if head > spare else "", "…" if tail else ""
    return [f"{left}{plain(begin + x, room - 2)}{right}" for x in cut]


def _alike(texts: Sequence[str]) -> int:
    """Characters with which all texts begin."""
    first, last = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
                min(len(first), len(last)))  # fmt: skip


def entitled(ax: Any, what: str, model: str) -> None:
    """Title: what is shown and the model, each in one or two lines that fit the Axes."""
    width = float(ax.get_window_extent().width * 72.0 / ax.figure.dpi)
    room = max(int(width / LETTER), 12)
    ax.set_title("\n".join([*model_lines(what, room), *model_lines(model, room)]), size="medium")


def model_lines(model: str, room: int) -> list[str]:
    """A text in at most two lines."""
    lines = textwrap.wrap(" ".join(model.split()), room, break_on_hyphens=False)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1][: room - 1]}…"]
    return [plain(line) for line in lines]


def effect_on(response: str, column: str, short: bool = False) -> str:
    """What an effect of a column is measured in."""
    y, x = plain(response, 24), plain(column, 24)
    if column in ("Intercept", "1"):
        return y
    if LEVEL.search(column):  # not per unit
        return x if short else f"{y}, {x}"
    return f"{y} per unit of {x}"


def room_for(ax: Any, rows: float) -> float:
    """Points of height that each of some rows has in Axes."""
    return float(ax.get_window_extent().height * 72.0 / ax.figure.dpi / max(rows, 1.0))


def said(ax: Any, text: str) -> None:
    """A sentence in the middle of Axes that have nothing to show."""
    ax.text(
        0.5, 0.5, "\n".join(textwrap.wrap(text, 48)), ha="center", va="center",
        transform=ax.transAxes,
    )  # fmt: skip


def shown_counts(ax: Any, x: Any, y: Any, counts: Any, what: str, total: int) -> None:
    """Points of few, else counts in hexagons on a logarithmic scale of colours.

    Parameters
    ----------
    x, y, counts
        (m,) middles of bins, and how many points are in each
    what
        is counted
    """
    if total <= MANY:
        ax.scatter(x, y, s=12.0 * np.sqrt(counts), color=BLUE, alpha=0.6, linewidths=0)
        return
    from matplotlib.colors import LogNorm

    shape = ax.hexbin(
        x, y, C=counts, reduce_C_function=np.sum, gridsize=(34, 16), cmap=COUNTS, mincnt=1,
        linewidths=0.2,
    )  # fmt: skip
    top = float(np.asarray(shape.get_array()).max())
    shape.set_norm(LogNorm(1.0, max(top, 2.0)))
    ax.figure.colorbar(shape, ax=ax, label=what)


def cased() -> list[Any]:
    """A white edge for lines that cross colours of any lightness."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3.2, foreground="white")]


def lines_in(ax: Any, **options: Any) -> None:
    """A legend in the emptiest corner."""
    small = ax.get_window_extent().width / ax.figure.dpi < 3.0
    ax.legend(fontsize="x-small" if small else "small", frameon=True, framealpha=0.85, **options)


def trimmed(axes: Sequence[Any]) -> None:
    """Without the lines above and on the right."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
