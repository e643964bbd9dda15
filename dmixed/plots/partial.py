"""Partial effects: the fixed part as a function of one variable, the others held."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed.blocks import CONSTANT, Floats, Level
from dmixed.design import fixed_rows
from dmixed.design.spans import Category
from dmixed.errors import DataError
from dmixed.formula.expressions import Call, Name, columns_of
from dmixed.formula.polynomials import Variable
from dmixed.plots.canvas import (
    BLUE,
    entitled,
    new_axes,
    plain,
    told_apart,
    trimmed,
)
from dmixed.preparation import Prepared
from dmixed.summary import quantile

POINTS = 101
"""Places of a curve."""

SPREAD = 2.0
"""Standard deviations on each side of the mean over which a curve goes."""

_BACK = {
    "log": np.exp, "log2": np.exp2, "log10": lambda x: 10.0**x, "log1p": np.expm1,
    "exp": np.log, "sqrt": np.square,
}  # fmt: skip
"""Functions of which mean and standard deviation tell a range of their argument."""


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """The fixed part along one variable.

    Attributes
    ----------
    values
        of the variable: (m,) numbers, or levels
    mean, se
        (m,) ``x'beta`` and its standard error given the variances, units of y
    held
        what the other inputs were held at, in words
    numeric
        whether the variable is a number
    """

    values: Any
    mean: Floats
    se: Floats
    held: tuple[str, ...]
    numeric: bool


def variable_moments(prepared: Prepared, variable: Variable) -> tuple[float, float] | None:
    """Mean and standard deviation of a variable over the rows of a fit; None if not summed."""
    totals = prepared.moments.summary.totals
    position = {column: i for i, column in enumerate(totals.columns)}
    wanted = ((variable.name, 1),)
    # of all rows, or the sum of those of the cells of one set of categories
    by_set: dict[tuple[str, ...], list[int]] = {}
    for column, i in position.items():
        if column.powers == wanted:
            by_set.setdefault(tuple(name for name, _ in column.cell), []).append(i)
    if not by_set:
        return None
    e = np.zeros(len(totals.columns))
    e[by_set[min(by_set, key=len)]] = 1.0
    G, n = totals.unweighted, totals.nobs
    u = float(G[position[CONSTANT]] @ e) / n
    square = max(float(e @ G @ e) / n - u * u, 0.0)
    shift, scale = totals.frame.of(variable.name)
    return shift + scale * u, abs(scale) * float(np.sqrt(square))


def partial_effect(
    result: Any, variable: str, grid: Any = None, at: Mapping[str, Any] | None = None
) -> Partial:
    """The fixed part along a data column, see `Plots.partial`."""
    prepared, found = result._prepared, result._estimates
    design = prepared.design
    known = design.fixed_columns
    if result._names.fixed is not None:
        raise DataError("a model of arrays has no formula along whose variables it could be shown")
    if variable not in known:
        raise DataError(
            f"no fixed effect uses a column {variable!r}: they use {', '.join(known) or 'none'}"
        )
    given = dict(at or {})
    for name in given:
        if name not in known or name == variable:
            raise DataError(f"at: {name!r} is not another column of the fixed effects")
    inputs = [x for x in design.spec.fixed_inputs if variable in columns_of(x.node)]
    numeric = not any(isinstance(x, Category) for x in inputs)
    values = _grid(result, variable, inputs, grid)
    held, words, more = _held(prepared, {variable, *given})
    given = {**more, **given}
    n = len(values)
    table = pa.table(
        {
            variable: _column(variable, values),
            **{k: _column(k, [_scalar(v)] * n) for k, v in given.items()},
        }
    )
    X = fixed_rows(design, table, held, n)[:, list(prepared.problem.fixed.kept)]
    variance = np.einsum("np,pq,nq->n", X, np.nan_to_num(found.cov_beta), X)
    shown = [f"{k} = {_shown(v)}" for k, v in given.items()]
    return Partial(
        values, X @ found.beta, np.sqrt(np.maximum(variance, 0.0)), (*shown, *words), numeric
    )


def _column(name: str, values: Any) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"values of {name!r} are of several types: {error}") from None


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _grid(result: Any, variable: str, inputs: list[Any], grid: Any) -> Any:
    """Values of the variable: those given, the levels of a category, or mean +- 2 sd."""
    prepared = result._prepared
    if grid is not None:
        values = [_scalar(x) for x in np.asarray(grid).ravel().tolist()]
        if not values:
            raise DataError("grid is empty")
        return values
    levels = [x for x in inputs if isinstance(x, Category) and isinstance(x.node, Name)]
    if levels:
        return list(prepared.design.levels[levels[0].name])
    for item in inputs:
        moments = None if isinstance(item, Category) else variable_moments(prepared, item)
        if moments is None or item.part >= 0:
            continue
        ends = moments[0] - SPREAD * moments[1], moments[0] + SPREAD * moments[1]
        back = _back(item)
        if back is not None:
            with np.errstate(all="ignore"):
                ends = float(back(ends[0])), float(back(ends[1]))
            if np.isfinite(ends).all():
                return np.linspace(*ends, POINTS).tolist()
    raise DataError(
        f"the moments do not tell the range of {variable!r}, which the formula has only as "
        f"{', '.join(plain(x.node.text) for x in inputs)}: give grid="
    )


def _back(item: Variable) -> Any:
    """From values of a variable to those of its data column, where that is known."""
    node = item.node
    if isinstance(node, Name):
        return lambda x: x
    if isinstance(node, Call) and len(node.arguments) == 1 and isinstance(node.arguments[0], Name):
        return _BACK.get(node.function)
    return None


def _held(
    prepared: Prepared, varied: set[str]
) -> tuple[dict[str, float | Level], list[str], dict[str, float]]:
    """Values of the inputs that no varied column enters: means, and first levels; in words too.

    Columns that enter an input together with a varied one are held at their means themselves.

    Raises
    ------
    DataError
        the mean of such a column is not known
    """
    design = prepared.design
    held: dict[str, float | Level] = {}
    words: list[str] = []
    more: dict[str, float] = {}
    splines: set[str] = set()
    for item in design.spec.fixed_inputs:
        columns = set(columns_of(item.node))
        for name in sorted(columns - varied) if columns & varied else ():
            more[name] = _mean_of(prepared, name, item.node.text)
    for item in design.spec.fixed_inputs:
        if set(columns_of(item.node)) & (varied | set(more)):
            continue
        if isinstance(item, Category):
            held[item.name] = design.levels[item.name][0]
            words.append(f"{item.node.text} = {held[item.name]}")
            continue
        moments = variable_moments(prepared, item)
        assert moments is not None  # every variable of a fixed term is carried
        held[item.name] = moments[0]
        if item.part < 0:
            shown = 0.0 if abs(moments[0]) < 1e-6 * moments[1] else moments[0]
            words.append(f"{item.node.text} = {shown:.4g}")
        elif item.node.text not in splines:
            splines.add(item.node.text)
            words.append(f"{item.node.text} at its mean")
    return held, words, more


def _mean_of(prepared: Prepared, column: str, where: str) -> float:
    for item in prepared.design.spec.fixed_inputs:
        if isinstance(item, Variable) and item.part < 0 and isinstance(item.node, Name):
            moments = variable_moments(prepared, item) if item.node.column == column else None
            if moments is not None:
                return moments[0]
    raise DataError(f"{where} needs a value of {column!r}: give at={{{column!r}: ...}}")


# --------------------------------------------------------------------------- picture


def partial(
    result: Any, variable: str, grid: Any, at: Mapping[str, Any] | None, alpha: float, ax: Any
) -> Any:
    """Axes with a partial effect, see `Plots.partial`."""
    z = quantile(alpha)
    found = partial_effect(result, variable, grid, at)
    axes = new_axes(ax)
    own, level = axes[0, 0], f"{100 * (1 - alpha):g}%"
    low, high = found.mean - z * found.se, found.mean + z * found.se
    if found.numeric:
        x = np.asarray(found.values, dtype=np.float64)
        order = np.argsort(x, kind="stable")
        own.fill_between(x[order], low[order], high[order], color=BLUE, alpha=0.25, lw=0)
        own.plot(x[order], found.mean[order], color=BLUE, lw=1.8)
    else:
        _points(own, found, z)
    own.set_xlabel(plain(variable, 40))
    own.set_ylabel(plain(result.endog_name, 40))
    what = f"Effect of {variable}, {level} confidence"
    if found.held:
        what += f", at {', '.join(found.held)}"
    entitled(own, what, result.formula)
    trimmed([own])
    return own


def _points(ax: Any, found: Partial, z: float) -> None:
    """A point with its interval for each level; long or many labels stand upright."""
    places = np.arange(len(found.values))
    ax.errorbar(places, found.mean, yerr=z * found.se, fmt="o", ms=5, color=BLUE, lw=1.4)
    width = float(ax.get_window_extent().width * 72.0 / ax.figure.dpi) / max(len(places), 1)
    labels = told_apart(found.values, 30)
    wrapped = ["\n".join(textwrap.wrap(x, max(int(width / 6.5), 1))) for x in labels]
    upright = max(x.count("\n") for x in wrapped) > 2
    every = max(int(np.ceil(11.0 / width)), 1) if upright else 1
    ax.set_xticks(
        places[::every], (labels if upright else wrapped)[::every], rotation=90 if upright else 0,
        fontsize="small" if upright else "medium",
    )  # fmt: skip
    ax.set_xlim(-0.6, len(labels) - 0.4)
