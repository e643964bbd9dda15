"""Shifts and scales of the variables, from a pilot sample; the fit does not depend on them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dmixed.blocks import RESPONSE, Floats, Frame
from dmixed.formula.polynomials import ONE, check_size


def frame_of(values: Mapping[str, Floats], response: str) -> Frame:
    """Shifts and scales from the rows in which every variable is finite, if there are any."""
    complete = np.logical_and.reduce([np.isfinite(v) for v in values.values()])
    frame = {}
    for name, of_name in values.items():
        used = of_name[complete if complete.any() else np.isfinite(of_name)]
        frame[name] = _shift_and_scale(response if name == RESPONSE else name, used)
    return Frame(
        tuple(frame),
        tuple(shift for shift, _ in frame.values()),
        tuple(scale for _, scale in frame.values()),
    )


def _shift_and_scale(name: str, values: Floats) -> tuple[float, float]:
    """A power of two near the standard deviation, and a short number near the mean.

    Any finite shift and positive scale give the same fit but for rounding. A scale that is a power
    of two, and a shift that is a multiple of 1/16 of it, keep x - shift exact for most data.
    """
    if not values.any():
        return 0.0, 1.0
    unit = int(np.frexp(np.abs(values).max())[1])
    near = np.ldexp(values, -unit)  # exact, at most 1: no sum of squares overflows
    mean, sd = float(near.mean()), float(near.std())
    if sd <= 1e-14 * abs(mean):
        shift, exponent = float(near[0]), round(math.log2(abs(mean)))
    else:
        exponent = round(math.log2(sd))
        shift = math.ldexp(round(math.ldexp(mean, 4 - exponent)), exponent - 4)
    check_size(name, {ONE: math.ldexp(1.0, min(max(unit + exponent, -1000), 1000))})
    shift, scale = math.ldexp(shift, unit), math.ldexp(1.0, unit + exponent)
    check_size(name, {ONE: max(abs(shift), scale)})
    return shift, scale
