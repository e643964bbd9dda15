"""Random effects as pictures: caterpillars, strips of quantiles, and scatter matrices.

What is drawn comes from summaries that add, so that groups on the workers of a cluster are
summarised there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import combinations
from operator import add
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import chi2

from dmixed.binned import Binned
from dmixed.blocks import Floats
from dmixed.dispatch import gather
from dmixed.errors import DataError
from dmixed.evaluation import RemoteMoments
from dmixed.plots.canvas import (
    BLUE,
    GREY,
    LABEL,
    MANY,
    RED,
    answer,
    cased,
    effect_on,
    entitled,
    lines_in,
    model_lines,
    new_axes,
    plain,
    room_for,
    shown_counts,
    told_apart,
    trimmed,
)
from dmixed.summary import quantile

K = 12
"""Levels at each end of a caterpillar of many."""

STRIP = 2_000
"""Levels from which quantiles are shown."""

FINE = 4_096
"""Bins of the effects of all levels: finer than a picture shows."""

COARSE = 256
"""Bins of each of two effects."""

PAIR_COLUMNS = 5
"""Columns of a scatter matrix that are shown."""


@dataclass(frozen=True, slots=True, eq=False)
class Blups:
    """Effects of the levels of one factor, summarised; summaries of disjoint levels add.

    Attributes
    ----------
    names
        of the q effects
    k
        levels kept at each end of the order by the first effect
    total
        levels
    labels, values, se
        of the m levels kept, the smallest first: (m,), (m, q), (m, q); user units
    spread
        per effect its values over all levels, with their standard errors
    pairs
        per pair of effects the two together
    """

    names: tuple[str, ...]
    k: int
    total: int
    labels: tuple[str, ...]
    values: Floats
    se: Floats
    spread: tuple[Binned, ...]
    pairs: tuple[Binned, ...]

    def __add__(self, other: Blups) -> Blups:
        """Of the levels of both."""
        labels = np.array([*self.labels, *other.labels], dtype=object)
        values = np.concatenate([self.values, other.values])
        se = np.concatenate([self.se, other.se])
        total = self.total + other.total
        kept = _ends(values[:, 0], self.k)
        return replace(
            self,
            total=total,
            labels=tuple(labels[kept]),
            values=values[kept],
            se=se[kept],
            spread=tuple(a + b for a, b in zip(self.spread, other.spread, strict=True)),
            pairs=tuple(a + b for a, b in zip(self.pairs, other.pairs, strict=True)),
        )


def _ends(values: Floats, k: int) -> Any:
    """Positions of the k smallest and the k largest values, in order."""
    order = np.argsort(values, kind="stable")
    return order if len(order) <= 2 * k else np.concatenate([order[:k], order[-k:]])


def blups_of(table: pa.Table | pd.DataFrame, k: int, effects: tuple[str, ...] | None) -> Blups:
    """Summary of a table as `ranef_table` has it, of all its effects or of some.

    Raises
    ------
    DataError
        there is no such effect
    """
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    columns = table.column_names
    q = next(
        m
        for m in range(len(columns) // 2, 0, -1)
        if columns[-1 - m : -1] == [f"se({name})" for name in columns[-1 - 2 * m : -1 - m]]
    )
    names = columns[-1 - 2 * q : -1 - q]
    keys = columns[: -1 - 2 * q]
    for name in effects or ():
        if name not in names:
            raise DataError(f"no random effect is called {name!r}: they are {', '.join(names)}")
    chosen = tuple(effects or names)
    values = np.column_stack([table.column(x).to_numpy() for x in chosen])
    se = np.column_stack([table.column(f"se({x})").to_numpy() for x in chosen])
    kept = _ends(values[:, 0], k)
    shown = [table.column(x).take(pa.array(kept)).to_pylist() for x in keys]
    labels = tuple(" : ".join(map(str, own)) for own in zip(*shown, strict=True))
    return Blups(
        chosen,
        k,
        len(values),
        labels,
        values[kept],
        se[kept],
        tuple(Binned.of(values[:, [j]], (FINE,), se[:, j]) for j in range(len(chosen))),
        tuple(
            Binned.of(values[:, [b, a]], (COARSE, COARSE))
            for a, b in combinations(range(min(len(chosen), PAIR_COLUMNS)), 2)
        ),
    )


def summarised(
    result: Any, factor: str | None, effects: tuple[str, ...] | None, k: int
) -> tuple[str, Blups]:
    """Label of a factor, by default the first, and the summary of its effects.

    Raises
    ------
    DataError
        there is no such factor or effect
    """
    prepared = result._prepared
    if prepared.shards:
        moments = prepared.moments
        assert isinstance(moments, RemoteMoments)
        label = next(iter(result.factors))
        _known(factor, [label])
        frames = result._each_shard("_table_frame", [True] * len(prepared.shards))
        summary = partial(blups_of, k=k, effects=effects)
        made = [moments.client.submit(summary, frame, pure=False) for frame in frames]
        return label, reduce(add, gather(moments.client, made))
    tables = dict(result._effect_tables(True))
    label = _known(factor, list(tables))
    return label, blups_of(tables[label], k, effects)


def all_summaries(result: Any, k: int) -> dict[str, Blups]:
    """Summary of the effects of every factor, by its label."""
    if result._prepared.shards:
        return dict([summarised(result, None, None, k)])
    return {label: blups_of(table, k, None) for label, table in result._effect_tables(True)}


def _known(factor: str | None, labels: list[str]) -> str:
    if factor is None:
        return labels[0]
    if factor not in labels:
        raise DataError(f"no random factor is called {factor!r}: they are {', '.join(labels)}")
    return factor


# --------------------------------------------------------------------------- caterpillar


def caterpillar(
    result: Any,
    factor: str | None,
    effects: tuple[str, ...] | None,
    k: int,
    alpha: float,
    strip: bool | None,
    ax: Any,
) -> Any:
    """Axes with the effects of a factor's levels, see `Plots.caterpillar`."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k={k!r}: must be a number of levels, at least 1")
    return drawn(result, *summarised(result, factor, effects, int(k)), alpha, strip, ax)


def drawn(result: Any, label: str, blups: Blups, alpha: float, strip: bool | None, ax: Any) -> Any:
    """Axes with a summary of the effects of a factor of that label."""
    z = quantile(alpha)
    as_strip = blups.total > STRIP if strip is None else bool(strip)
    q = len(blups.names)
    rows = min(blups.total, 2 * blups.k + 1)
    height = 4.8 if as_strip else max(2.6, min(4.8, 1.6 + 0.17 * rows), 1.2 + 0.14 * rows)
    width = 6.4 if q == 1 else min(3.2 * q + 0.8, 16.0)
    axes = new_axes(ax, (1, q), (width, height))
    draw = _strip if as_strip else _levels
    for j, own in enumerate(axes[0]):
        draw(own, blups, j, z, result.endog_name, label)
        name = blups.names[j]
        of = label if name == label else f"{name} by {label}"
        what = f"{of}, {_percent(alpha)} intervals"
        if q == 1:
            entitled(own, what, result.formula)
        else:
            own.set_title(plain(f"{blups.names[j]}, {_percent(alpha)}", 30), fontsize="medium")
    if q > 1 and ax is None:
        _above(axes, f"BLUPs by {label}", result.formula)
    trimmed(axes[0])
    return answer(axes)


def _percent(alpha: float) -> str:
    return f"{100 * (1 - alpha):g}%"


def _above(axes: Any, what: str, model: str) -> None:
    """A title over a figure."""
    room = int(9 * axes[0, 0].figure.get_figwidth())
    lines = [plain(what, room), *model_lines(model, room)]
    axes[0, 0].figure.suptitle("\n".join(lines), fontsize="medium")


def _levels(ax: Any, blups: Blups, j: int, z: float, response: str, factor: str) -> None:
    """An interval for each level kept, the largest on top; a gap for those left out."""
    m, k = len(blups.labels), blups.k
    y = np.arange(m, dtype=np.float64)
    left_out = blups.total - m
    if left_out:
        y[k:] += 1.0
        ax.axhline(k, color=GREY, lw=0.8, ls=":")
    ax.errorbar(blups.values[:, j], y, xerr=z * blups.se[:, j], fmt="o", ms=3.5, color=BLUE, lw=1.2)
    ax.axvline(0.0, color=GREY, lw=0.8)
    points = room_for(ax, y[-1] + 2.0)
    size = float(np.clip(0.8 * points, 5.0, 9.0))
    every = int(np.ceil(5.0 / max(points, 0.1)))
    ax.set_ylim(-0.8, y[-1] + 0.8)
    if j == 0:
        shown = told_apart(blups.labels, LABEL)
        places, labels = y[::every].tolist(), shown[::every]
        if left_out:
            places, labels = [*places, float(k)], [*labels, f"… {left_out:,} between …"]
        ax.set_yticks(places, labels, fontsize=size)
        ax.set_ylabel(plain(factor, LABEL))
    else:
        ax.set_yticks([])
    _axis(ax.set_xlabel, blups, j, response, factor)


def _axis(set_label: Any, blups: Blups, j: int, response: str, factor: str) -> None:
    component = blups.names[j] == factor
    text = effect_on(response, "Intercept" if component else blups.names[j])
    if not blups.spread[j].bins.any() and len(blups.spread[j].counts) == 1:
        text += "\nall zero: the variance is estimated as zero"
    set_label(text)


def _strip(ax: Any, blups: Blups, j: int, z: float, response: str, factor: str) -> None:
    """Quantiles of the effects, with the mean interval of the levels about each."""
    share, value, half = strip_lines(blups.spread[j], z)
    ax.fill_between(
        100 * share, value - half, value + half, color=BLUE, alpha=0.25, lw=0,
        label="mean interval",
    )  # fmt: skip
    ax.plot(100 * share, value, color=BLUE, lw=1.6, label="BLUP")
    ax.axhline(0.0, color=GREY, lw=0.8)
    ax.set_xlim(0, 100)
    of = f" of {plain(factor, 20)}, by their BLUP" if len(blups.names) == 1 else ""
    ax.set_xlabel(f"% of {blups.total:,} levels{of}")
    _axis(ax.set_ylabel, blups, j, response, factor)
    if j == 0:
        lines_in(ax, loc="upper left")


def strip_lines(spread: Binned, z: float, points: int = 401) -> tuple[Floats, Floats, Floats]:
    """Share of the levels, quantile of their effects, and mean half-width of their intervals.

    The mean is over the hundredth of the levels around the quantile.
    """
    share = np.linspace(0.0, 1.0, points)
    n = np.append(0, np.cumsum(spread.counts)) / spread.total
    sums = np.append(0.0, np.cumsum(spread.sums)) / spread.total
    low, high = np.maximum(share - 0.005, 0.0), np.minimum(share + 0.005, 1.0)
    mean = (np.interp(high, n, sums) - np.interp(low, n, sums)) / (high - low)
    return share, spread.quantiles(share), z * mean


# --------------------------------------------------------------------------- scatter matrix


def scatter_matrix(
    result: Any, factor: str | None, effects: tuple[str, ...] | None, alpha: float, ax: Any
) -> Any:
    """Axes with each pair of effects of a bar, see `Plots.scatter_matrix`."""
    quantile(alpha)
    label, names, cov = _bar(result, factor, effects)
    stem = next((x for x in result.factors if label == x or label.split(".")[0] == x), label)
    _, blups = summarised(result, stem, _in_table(result, stem, label, names), MANY)
    q = min(len(names), PAIR_COLUMNS)
    width = 6.4 if q == 2 else min(2.6 * (q - 1) + 1.2, 11.0)
    axes = new_axes(ax, (q - 1, q - 1), (width, 4.8 if q == 2 else width))
    few = blups.total <= MANY
    places = list(combinations(range(q), 2))
    for (a, b), pair in zip(places, blups.pairs, strict=True):
        own = axes[b - 1, a]
        if few:
            own.scatter(blups.values[:, a], blups.values[:, b], s=16, color=BLUE, lw=0, alpha=0.7)
        else:
            x, y = pair.centres[:, 1], pair.centres[:, 0]
            shown_counts(own, x, y, pair.counts, "levels", pair.total)
        line = ellipse(cov[np.ix_([a, b], [a, b])], 1.0 - alpha)
        own.plot(
            line[0], line[1], color=RED, lw=1.6, path_effects=cased(),
            label=f"{_percent(alpha)} of the model",
        )  # fmt: skip
        if b == q - 1:
            own.set_xlabel(effect_on(result.endog_name, names[a], q > 2))
        if a == 0:
            own.set_ylabel(effect_on(result.endog_name, names[b], q > 2))
    for i in range(q - 1):
        for j in range(i + 1, q - 1):
            axes[i, j].set_visible(False)
    trimmed(axes.ravel())
    what = f"BLUPs by {stem}, and the estimated covariance"
    if q == 2:
        entitled(axes[0, 0], what, result.formula)
        lines_in(axes[0, 0])
    elif ax is None:
        _above(axes, what, result.formula)
    return answer(axes)


def _bar(
    result: Any, factor: str | None, effects: tuple[str, ...] | None
) -> tuple[str, list[str], Floats]:
    """Label, columns and covariance (q, q) of a bar of two columns or more."""
    found = {label: cov for label, cov in result.varcorr().items() if len(cov) > 1}
    if not found:
        raise DataError("no bar has two columns or more: there is no pair of effects to show")
    label = next(iter(found)) if factor is None else factor
    if label not in found:
        raise DataError(
            f"factor={factor!r} has no bar of two columns or more: they are {', '.join(found)}"
        )
    cov = found[label]
    names = list(map(str, cov.index))
    for name in effects or ():
        if name not in names:
            raise DataError(f"no random effect of {label} is called {name!r}: {', '.join(names)}")
    if effects is not None and len(effects) < 2:
        raise DataError("effects: name two or more")
    chosen = [names.index(x) for x in (effects or names)]
    return label, [names[i] for i in chosen], cov.to_numpy()[np.ix_(chosen, chosen)]


def _in_table(result: Any, factor: str, label: str, names: list[str]) -> tuple[str, ...]:
    """Names that the columns of a bar have in the table of its factor."""
    if result._prepared.shards:
        return tuple(names)
    own = [x for x in result.varcorr() if x == factor or x.startswith(f"{factor}.")]
    columns = [str(x) for bar in own for x in result.varcorr()[bar].index]
    if len(set(columns)) == len(columns):
        return tuple(names)
    return tuple(f"{label}: {name}" for name in names)


def ellipse(cov: Floats, level: float) -> Floats:
    """(2, 181) outline that has a share of a normal distribution inside; a line if singular."""
    w, V = np.linalg.eigh(cov)
    angle = np.linspace(0.0, 2.0 * np.pi, 181)
    root = V * np.sqrt(np.maximum(w, 0.0))
    radius = np.sqrt(chi2.ppf(level, 2))
    return np.asarray(radius * root @ np.stack([np.cos(angle), np.sin(angle)]))
