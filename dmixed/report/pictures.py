"""Pictures of a report: SVG that stands in a page, each with what it shows in words."""

from __future__ import annotations

import importlib.util
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dmixed.blocks import Floats
from dmixed.markup import cleaned
from dmixed.plots import blups, residuals, search
from dmixed.plots.blups import Blups
from dmixed.plots.canvas import plain
from dmixed.plots.intervals import intervals
from dmixed.report import words
from dmixed.report.facts import LEVEL, Changes, Content, Facts, Moved
from dmixed.summary import quantile

WIDTH = 4.8
"""Inches. Wide enough for labels, and on a phone, at half the size, still legible."""

ROOM = 52
"""Characters in a line as wide as a picture."""

SHOWN = 30
"""Estimates in one picture."""

COLUMNS = 2
"""Effects of a factor side by side in one picture."""

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dmixed",  # the same picture has the same bytes
    "font.size": 11.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "white",
}

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"

_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, or what it would show.

    Attributes
    ----------
    title
        what it is, in few words
    seen
        what can be seen, with numbers
    svg
        an ``svg`` element; None where matplotlib is not installed
    """

    title: str
    seen: str
    svg: str | None


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures by the section that has them; some are not there.

    Attributes
    ----------
    effects
        by label of the factor
    residuals
        against fitted values, quantiles, scale
    """

    fixed: Picture | None
    effects: dict[str, tuple[Picture, ...]]
    residuals: tuple[Picture, ...]
    convergence: Picture | None
    drift: Picture | None

    def __iter__(self) -> Iterator[Picture]:
        parts = (self.fixed, *(x for y in self.effects.values() for x in y), *self.residuals)
        yield from (x for x in (*parts, self.convergence, self.drift) if x is not None)


def pictures_of(content: Content) -> Pictures:
    """All pictures of a report."""
    facts, found = content.facts, content.residuals
    return Pictures(
        fixed=_fixed(facts),
        effects={
            label: tuple(_effects(facts, label, summary, number))
            for number, (label, summary) in enumerate(content.effects.items())
        },
        residuals=() if found is None else tuple(_residuals(facts, found)),
        convergence=_convergence(facts),
        drift=_drift(content.changes),
    )


# --------------------------------------------------------------------------- each of them


def _fixed(facts: Facts) -> Picture | None:
    """Fixed effects but the intercept, which is of another size."""
    shown = [x for x in facts.fixed if x.name not in ("Intercept", "1")] or list(facts.fixed)
    shown = shown[:SHOWN]
    if not shown:
        return None
    values = np.array([(x.value, *x.limits) for x in shown])
    label = f"{facts.endog_name} per unit of the column"

    def draw(new: Any) -> None:
        ax = new(_rows_height(len(shown)))
        intervals([x.name for x in shown], [("estimate", values)], label, ax)

    return _picture("fixed", "Fixed effects with 95% limits", words.fixed(facts, shown), draw)


def _rows_height(rows: int) -> float:
    return 0.9 + 0.3 * rows


def _effects(facts: Facts, label: str, summary: Blups, number: int) -> Iterator[Picture]:
    """Levels with their intervals, or quantiles of very many: some effects in each picture."""
    q = len(summary.names)
    rows = min(summary.total, 2 * summary.k + 1)
    height = 3.6 if summary.total > blups.STRIP else 1.0 + 0.2 * rows
    for start in range(0, q, COLUMNS):
        some = words.part(summary, range(start, min(start + COLUMNS, q)))

        def draw(new: Any, some: Blups = some) -> None:
            n = len(some.names)
            axes = new(height, n)
            blups.drawn(facts, label, some, LEVEL, None, axes)
            room = int((ROOM - 0.8 * max(map(len, [label, *_ticks(axes)]))) / n)
            for ax, name in zip(np.ravel(axes), some.names, strict=True):
                ax.set_title(plain(name, room) if n > 1 else "", fontsize="medium")
                label_x = textwrap.wrap(ax.get_xlabel(), room, break_on_hyphens=False)
                ax.set_xlabel("\n".join(label_x))
                ax.locator_params(axis="x", nbins=7 // n)
                ax.ticklabel_format(axis="x", scilimits=(-3, 5))

        title = f"Random effects by {label}" + (f": {', '.join(some.names)}" if q > 1 else "")
        yield _picture(f"effects-{number}-{start}", title, words.effects(label, some), draw)


def _ticks(axes: Any) -> list[str]:
    """Labels along the first of some Axes."""
    return [x.get_text() for x in np.ravel(axes)[0].get_yticklabels()]


def _residuals(facts: Facts, found: residuals.Residuals) -> Iterator[Picture]:
    for name, title, seen, kind in (
        ("residuals", "Residuals against fitted values", words.residuals, residuals.against_fitted),
        ("quantiles", "Normal quantiles of the residuals", words.quantiles, residuals.normal_plot),
        ("scale", "Size of the residuals against fitted values", words.scale,
         residuals.scale_location),
    ):  # fmt: skip

        def draw(new: Any, kind: Callable[..., Any] = kind) -> None:
            kind(facts, found, new(3.7)).set_title("")

        yield _picture(name, title, seen(facts, found), draw)


def _convergence(facts: Facts) -> Picture | None:
    height, _, _ = search.path_lines(facts.optimizer_summary)
    if not len(height):
        return None

    def draw(new: Any) -> None:
        search.convergence(facts, new(3.4)).set_title("")

    return _picture("convergence", "Path of the search", words.convergence(facts), draw)


def _drift(changes: Changes | None) -> Picture | None:
    """Estimates now and before, in standard errors before, about the estimate before."""
    if changes is None or changes.before is None:
        return None
    shown = [x for x in changes.moved if np.isfinite(x.change)][:SHOWN]
    if not shown:
        return None
    now, before = (np.array([_in_errors(x, y) for x in shown]) for y in (True, False))

    def draw(new: Any) -> None:
        series = [("now", now), ("before", before)]
        ax = new(_rows_height(len(shown)) + 0.2 * len(shown))
        label = "change, standard errors of the fit before"
        intervals([x.name for x in shown], series, label, ax)

    title = "Estimates now, about those before, with 95% limits"
    return _picture("drift", title, words.drift(changes, shown), draw)


def _in_errors(moved: Moved, of_now: bool) -> Floats:
    """Value and limits less the value before, over the standard error of the change."""
    assert moved.now is not None
    assert moved.before is not None
    change = moved.now[0] - moved.before[0]
    unit = change / moved.change if moved.change else _half(moved) or 1.0
    chosen = moved.now if of_now else moved.before
    return (np.array(chosen) - moved.before[0]) / unit


def _half(moved: Moved) -> float:
    """Standard error from limits, where nothing has changed."""
    assert moved.before is not None
    half = (moved.before[2] - moved.before[1]) / 2.0 / quantile(LEVEL)
    return half if np.isfinite(half) else 0.0


# --------------------------------------------------------------------------- SVG


def _picture(name: str, title: str, seen: str, draw: Callable[[Any], None]) -> Picture:
    return Picture(title, seen, _svg(name, seen, draw) if available() else None)


def _svg(name: str, seen: str, draw: Callable[[Any], None]) -> str:
    """What is drawn on new Axes, as an element whose ids begin with a name."""
    from matplotlib import style
    from matplotlib.figure import Figure

    figures = []

    def new(height: float, columns: int = 1) -> Any:
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figures.append(figure)
        axes = figure.subplots(1, columns)
        return axes

    stream = io.StringIO()
    with style.context(["default", STYLE]):
        draw(new)
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figures[0].savefig(stream, format="svg", metadata=none)
    return element(stream.getvalue(), name, seen)


def element(svg: str, name: str, seen: str) -> str:
    """A file of SVG as an element of a page.

    Parameters
    ----------
    name
        ids begin with it, so that those of several pictures differ
    seen
        text alternative
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    wanted = set(_REFERENCE.findall(svg)) | set(re.findall(r'xlink:href="#([^"]+)"', svg))
    for node in root.iter():
        node.tag = node.tag.removeprefix(SVG)
        own = node.attrib.pop("id", None)
        if own in wanted:
            node.set("id", f"{name}-{own}")
        for key, value in list(node.attrib.items()):
            node.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
        link = node.attrib.pop(HREF, None)
        if link is not None:
            node.set("href", f"#{name}-{link[1:]}" if link.startswith("#") else link)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", cleaned(seen))
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
