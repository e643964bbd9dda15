"""The words of a formula: functions of one row, calls with a structure, and words refused by name.

Everything here is a table. A function may be added if row i of its result depends on row i alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from formulaic.transforms.contrasts import (
    Contrasts,
    DiffContrasts,
    HelmertContrasts,
    PolyContrasts,
    SASContrasts,
    SumContrasts,
    TreatmentContrasts,
)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of arrays, row by row, and the least and most arguments it takes."""

    function: Callable[..., Any]
    arguments: tuple[int, int]


def _exp10(x: Any) -> Any:
    return np.power(10.0, x)


_ONE = """
abs absolute fabs sqrt cbrt square reciprocal negative sign floor ceil trunc rint exp exp2 expm1
log log2 log10 log1p degrees radians deg2rad rad2deg logical_not sin cos tan arcsin arccos arctan
sinh cosh tanh arcsinh arccosh arctanh asin acos atan asinh acosh atanh
"""
_TWO = """
add subtract multiply divide true_divide floor_divide mod remainder fmod power float_power hypot
arctan2 atan2 logaddexp logaddexp2 minimum maximum fmin fmax heaviside copysign less less_equal
greater greater_equal equal not_equal logical_and logical_or logical_xor
"""
_NUMPY = {  # R's and Python's names of numpy's functions (numpy 2 has most, numpy 1 has not)
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "atan2": "arctan2",
}

ELEMENTWISE: dict[str, Elementwise] = {
    **{name: Elementwise(getattr(np, _NUMPY.get(name, name)), (1, 1)) for name in _ONE.split()},
    **{name: Elementwise(getattr(np, _NUMPY.get(name, name)), (2, 2)) for name in _TWO.split()},
    "exp10": Elementwise(_exp10, (1, 1)),
    "round": Elementwise(np.round, (1, 2)),
    "around": Elementwise(np.round, (1, 2)),
    "where": Elementwise(np.where, (3, 3)),
    "clip": Elementwise(np.clip, (3, 3)),
}

_SPLINE = ("x", "df", "knots", "lower_bound", "upper_bound", "constraints", "extrapolation")
_SCALE = ("data", "center", "scale", "ddof")

CONTRASTS: dict[str, tuple[type[Contrasts], tuple[str, ...]]] = {
    "contr.treatment": (TreatmentContrasts, ("base",)),
    "contr.SAS": (SASContrasts, ("base",)),
    "contr.sum": (SumContrasts, ()),
    "contr.helmert": (HelmertContrasts, ("reverse", "scale")),
    "contr.diff": (DiffContrasts, ("backward",)),
    "contr.poly": (PolyContrasts, ("scores",)),
    "Treatment": (TreatmentContrasts, ("reference",)),
    "Sum": (SumContrasts, ()),
    "Helmert": (HelmertContrasts, ("reverse", "scale")),
    "Diff": (DiffContrasts, ("backward",)),
    "Poly": (PolyContrasts, ("scores",)),
}

STRUCTURED: dict[str, tuple[str, ...]] = {
    "I": ("x",),
    "Q": ("variable",),
    "C": ("data", "contrasts", "levels"),
    "center": ("data",),
    "scale": _SCALE,
    "standardize": ("x", "center", "rescale", "ddof"),
    "poly": ("x", "degree", "raw"),
    "bs": (
        "x",
        "df",
        "knots",
        "degree",
        "include_intercept",
        "lower_bound",
        "upper_bound",
        "extrapolation",
    ),
    "cr": _SPLINE,
    "cs": _SPLINE,
    "cc": _SPLINE,
    **{name: arguments for name, (_, arguments) in CONTRASTS.items()},
}
"""Argument names of the calls that are not functions of one row, in order."""

_ORDER = "it depends on the order of the rows, which data in parts do not have"
_WHOLE = (
    "it needs all rows at once; compute the column before the fit, or write "
    "center(x), scale(x) or poly(x, degree), which are learned over the whole data"
)
_MATRIX = "it makes columns that are not linear in the data; compute them before the fit"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("lag", "lead", "shift", "diff", "cumsum", "cumprod", "ar1"), _ORDER),
    **dict.fromkeys(
        ("mean", "median", "std", "sd", "var", "min", "max", "sum", "quantile", "rank", "ecdf"),
        _WHOLE,
    ),
    **dict.fromkeys(("cut", "qcut", "ntile", "average", "amin", "amax", "nanmean"), _WHOLE),
    **dict.fromkeys(("ns", "s", "te", "ti", "lo", "hashed"), _MATRIX),
    "offset": "give the name of the column to the argument offset instead",
    "weights": "give the name of the column to the argument weights instead",
}
"""Known functions that cannot be in a formula, with the reason."""

MEANT: dict[str, str] = {
    "factor": "C(x)",
    "as.factor": "C(x)",
    "ordered": "C(x, contr.poly)",
    "as.numeric": "I(x)",
    "relevel": "C(x, contr.treatment(base='level'))",
    "ifelse": "where(condition, a, b)",
    "pow": "x ** 2",
}
"""What to write instead of a word from elsewhere."""
