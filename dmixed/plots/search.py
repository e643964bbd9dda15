"""The likelihood as pictures: profiles of parameters, and how the optimum was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from dmixed.blocks import Floats
from dmixed.errors import DataError
from dmixed.plots.canvas import (
    BLUE,
    GREY,
    RED,
    answer,
    effect_on,
    entitled,
    lines_in,
    model_lines,
    new_axes,
    plain,
    said,
    trimmed,
)
from dmixed.profiling import ProfilePoint
from dmixed.summary import quantile

BEYOND = 1.15
"""How far beyond the limits a profile goes, in units of their zeta."""

STEPS = 30
"""Steps outwards of a profile before it ends where it is."""

SHOWN = 16
"""Parameters of one figure."""


# --------------------------------------------------------------------------- profiles


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that can be profiled.

    Attributes
    ----------
    name
        as in ``params_user``
    label
        for an axis
    estimate, step
        in the units of the axis; the step is a standard error or a guess of one
    profile
        the log-likelihood maximised over the rest at a value
    lowest
        bound of the values
    """

    name: str
    label: str
    estimate: float
    step: float
    profile: Callable[[float], ProfilePoint]
    lowest: float = -np.inf


@dataclass(frozen=True, slots=True, eq=False)
class Zeta:
    """A profile: zeta = sign(value - estimate) sqrt(2 (largest log-likelihood - that there)).

    Attributes
    ----------
    values, zeta
        (m,) in order of the values; zeta rises with them, and is 0 at the estimate
    low, high
        limits, NaN where the profile does not reach them
    """

    values: Floats
    zeta: Floats
    low: float
    high: float


def parameters(result: Any, names: Sequence[str]) -> list[Parameter]:
    """Parameters by name, by default all fixed effects and the variances of the random ones.

    Raises
    ------
    DataError
        there is none of such a name
    """
    p, se = result.k_fe, result.bse_user.to_numpy()
    found = {
        name: Parameter(
            name,
            f"{plain(name, 32)}\n{effect_on(result.endog_name, name)}",
            float(value),
            float(se[j]),
            make,
        )
        for j, (name, value) in enumerate(
            zip(result._fixed_names, result._estimates.beta, strict=True)
        )
        for make in [_fixed(result, name)]
    }
    pairs = result._prepared.problem.factors.blocks.pairs
    held = {c for j in result._prepared.problem.factors.blocks.held
            for c in range(*_slice(result, j))}  # fmt: skip
    columns = [(bar.label, str(name)) for bar in result._prepared.bars for name in bar.names]
    for j, (a, b) in enumerate(pairs):
        if a == b and a not in held:
            name = result._pair_names[j]
            found[name] = _deviation(result, a, name, columns, float(se[p + j]))
    for name in names:
        if name not in found:
            raise DataError(f"no parameter is called {name!r}: they are {', '.join(found)}")
    return [found[name] for name in (names or found)]


def _slice(result: Any, block: int) -> tuple[int, int, int]:
    blocks = result._prepared.problem.factors.blocks
    return tuple(blocks.slices[block].indices(blocks.q))


def _fixed(result: Any, name: str) -> Callable[[float], ProfilePoint]:
    _, profile = result._fixed_profile(name)
    return lambda value: profile(value)


def _deviation(
    result: Any, at: int, name: str, columns: list[tuple[str, str]], se: float
) -> Parameter:
    """The standard deviation of a random column: that of its variance, on its own scale."""
    if at < result.k_re:
        variance, profile = result._variance_profile(at, "re")
        bar, column = columns[at]
        label = f"sd of {plain(column, 20)} by {plain(bar, 16)}"
    else:
        bars = [bar for bar in result._prepared.bars if bar.component is not None]
        bar = bars[at - result.k_re].label
        variance, profile = result._variance_profile(bar, "vc")
        column, label = "Intercept", f"sd of {plain(bar, 30)}"
    sd = float(np.sqrt(max(variance, 0.0)))
    step = se / (2 * sd) if sd > 0 and np.isfinite(se) else 0.1 * float(np.sqrt(result.scale))
    label += f"\n{effect_on(result.endog_name, column)}"
    return Parameter(name, label, sd, step, lambda value: profile(value**2), 0.0)


def zeta_of(parameter: Parameter, llf: float, z: float, points: int) -> Zeta:
    """Profile of a parameter past its limits at zeta = -z and z.

    Steps outwards follow the last zeta, so that they need no scale; points between are even.
    """
    low = _outwards(parameter, llf, z, -1.0)
    high = _outwards(parameter, llf, z, 1.0)
    known = {parameter.estimate: 0.0, **low, **high}
    ends = (min(known), max(known))
    for value in np.linspace(*ends, points)[1:-1].tolist():
        if min(abs(value - x) for x in known) > 0.02 * (ends[1] - ends[0]):
            found = _zeta_at(parameter, llf, value)
            if np.isfinite(found):
                known[value] = found
    values = np.array(sorted(known))
    zeta = np.array([known[x] for x in values.tolist()])
    rising = np.append(True, np.diff(np.maximum.accumulate(zeta)) > 0)
    values, zeta = values[rising], zeta[rising]
    return Zeta(values, zeta, _crossing(values, zeta, -z), _crossing(values, zeta, z))


def _zeta_at(parameter: Parameter, llf: float, value: float) -> float:
    point = parameter.profile(value)
    if not np.isfinite(point.llf):
        return np.nan
    side = 1.0 if value > parameter.estimate else -1.0
    return side * float(np.sqrt(2.0 * max(llf - point.llf, 0.0)))


def _outwards(parameter: Parameter, llf: float, z: float, side: float) -> dict[float, float]:
    """Zeta at some values on one side, up to one beyond the limit if it is reached."""
    found: dict[float, float] = {}
    step = z * (parameter.step if np.isfinite(parameter.step) and parameter.step > 0 else 1.0)
    for _ in range(STEPS):
        value = max(parameter.estimate + side * step, parameter.lowest)
        if value == parameter.estimate:
            break
        zeta = _zeta_at(parameter, llf, value)
        if np.isnan(zeta) or abs(zeta) > 2.0 * z:  # too far: closer to the estimate
            step *= 0.3 if np.isnan(zeta) else max(z / abs(zeta), 0.1)
            continue
        found[value] = zeta
        if abs(zeta) >= z or value == parameter.lowest:
            break
        step *= float(np.clip(BEYOND * z / max(abs(zeta), 1e-12), 1.1, 4.0))
    return found


def _crossing(values: Floats, zeta: Floats, at: float) -> float:
    """Value at which zeta passes a number, NaN if it does not."""
    if len(values) < 2 or not zeta[0] <= at <= zeta[-1]:
        return np.nan
    return float(PchipInterpolator(zeta, values)(at))


def zeta(result: Any, names: Sequence[str], alpha: float, points: int, ax: Any) -> Any:
    """Axes with profiles, see `Plots.zeta`."""
    z = quantile(alpha)
    chosen = parameters(result, names)[: None if ax is not None else SHOWN]
    n = len(chosen)
    columns = n if ax is not None else min(n, int(np.ceil(np.sqrt(n))))
    rows = int(np.ceil(n / columns))
    size = (6.4, 4.8) if n == 1 else (3.2 * columns, 2.7 * rows + 0.6)
    axes = new_axes(ax, (rows, columns) if ax is None else (1, n), size)
    for parameter, own in zip(chosen, axes.ravel(), strict=False):
        _profile_lines(own, parameter, zeta_of(parameter, result.llf, z, points), z)
    for own in axes.ravel()[n:]:
        own.set_visible(False)
    trimmed(axes.ravel())
    what = f"Profile with {100 * (1 - alpha):g}% limits, {result.method}"
    if n == 1:
        entitled(axes[0, 0], what, result.formula)
    elif ax is None:
        room = int(9 * size[0])
        lines = [what, *model_lines(result.formula, room)]
        axes[0, 0].figure.suptitle("\n".join(lines), fontsize="medium")
    return answer(axes)


def _profile_lines(ax: Any, parameter: Parameter, found: Zeta, z: float) -> None:
    """Zeta against the parameter; dashed where the limits are, dotted at the estimate."""
    ax.set_xlabel(parameter.label)
    ax.set_ylabel("zeta")
    if len(found.values) < 2:
        said(ax, "The likelihood could not be maximised beside the estimate.")
        return
    fine = np.linspace(found.zeta[0], found.zeta[-1], 201)
    ax.plot(PchipInterpolator(found.zeta, found.values)(fine), fine, color=BLUE, lw=1.6)
    ax.plot(found.values, found.zeta, "o", ms=3, color=BLUE)
    ax.axhline(0.0, color=GREY, lw=0.8)
    ax.axvline(parameter.estimate, color=GREY, lw=0.8, ls=":")
    for limit, at in ((found.low, -z), (found.high, z)):
        if np.isfinite(limit):
            ax.plot([limit, limit], [0.0, at], color=RED, lw=1.2, ls="--")
            ax.plot([limit], [at], "D", ms=4.5, color=RED)
            side = -1 if at > 0 else 1  # beside the curve, which rises
            ax.annotate(
                f"{limit:.4g}", (limit, at), xytext=(7 * side, 0), textcoords="offset points",
                ha="right" if at > 0 else "left", va="center", fontsize="small",
            )  # fmt: skip
    ax.margins(x=0.12)
    ax.locator_params(axis="x", nbins=5)


# --------------------------------------------------------------------------- convergence


def convergence(result: Any, ax: Any) -> Any:
    """Axes with the optimiser's path, see `Plots.convergence`."""
    axes = new_axes(ax)
    own, summary = axes[0, 0], result.optimizer_summary
    height, decrement, rounding = path_lines(summary)
    end = "certified" if summary.converged else "not certified"
    what = f"{summary.method}, {summary.evaluations} evaluations, {end}"
    entitled(own, f"Search: {what}", result.formula)
    own.set_xlabel("evaluation")
    own.set_ylabel("deviance units")
    if not len(height):
        said(own, "The search kept no evaluations: nothing was searched, or it was not kept.")
        return own
    at = np.arange(1, len(height) + 1)
    own.axhline(rounding, color=GREY, lw=1.0, ls=":", label="rounding")
    marks = {"ms": 4} if len(at) < 60 else {"ms": 0}
    own.plot(
        at, np.maximum(height, rounding), "o-", color=BLUE, lw=1.4, **marks,
        label="criterion above its minimum",
    )  # fmt: skip
    formed = np.isfinite(decrement)
    if formed.any():
        own.plot(
            at[formed], np.maximum(decrement[formed], rounding * 1e-6), "D--", color=RED, lw=1.2,
            **marks, label="Newton decrement",
        )  # fmt: skip
    own.set_yscale("log")
    own.xaxis.get_major_locator().set_params(integer=True)
    trimmed([own])
    lines_in(own)
    return own


def path_lines(summary: Any) -> tuple[Floats, Floats, float]:
    """Criterion above its minimum, Newton decrement, and rounding of the criterion.

    All deviance units; the decrement g'H^-1 g / 2 is NaN where no gradient was formed.
    """
    value = np.array([step.value for step in summary.path], dtype=np.float64)
    decrement = np.array([step.decrement for step in summary.path], dtype=np.float64)
    finite = value[np.isfinite(value)]
    if not len(finite):
        return np.empty(0), np.empty(0), np.nan
    rounding = summary.certificate.rounding
    if not rounding > 0:
        rounding = float(np.finfo(np.float64).eps * max(abs(finite.min()), 1.0))
    return np.where(np.isfinite(value), value - finite.min(), np.nan), decrement, rounding
