"""The bundled example: a real data set, a model of it, and what its result says in words."""

from __future__ import annotations

import math
import textwrap
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

from dmixed.results import MixedLMResults
from dmixed.summary import WIDTH

FORMULA = "mAch ~ cses * sector + meanses + (cses | school)"

QUESTION = """\
High School and Beyond, 1982: mathematics scores (mAch) of pupils in 160
American schools. How much does the socio-economic status of a pupil's family
matter, within a school (cses: status relative to the school's mean) and
between schools (meanses: that mean)? Does it matter less in Catholic schools?
Each school has its own level and its own slope.
"""


def data() -> AbstractContextManager[Path]:
    """Path of the bundled Parquet file, valid inside ``with``."""
    return as_file(files("dmixed") / "data" / "hsb82.parquet")


def explanation(result: MixedLMResults) -> str:
    """What a fit of `FORMULA` shows, one short paragraph per point."""
    beta, se = result.fe_params.to_dict(), result.bse_fe.to_dict()
    level, slope = result.varcorr()["school"].to_numpy().diagonal().tolist()
    effects = result.ranef()["Intercept"].sort_values()
    public = "cses:sector[T.Public]"
    points = [
        f"A unit of status above the school's mean goes with {beta['cses']:.2f} points (standard "
        f"error {se['cses']:.2f}) in Catholic schools and {beta[public]:+.2f} ({se[public]:.2f}) "
        f"on top of that in public ones; a unit of the school's mean with {beta['meanses']:.2f} "
        f"({se['meanses']:.2f}).",
        "What is left varies between schools with a standard deviation of "
        f"{math.sqrt(level):.2f} points and between pupils of one school with "
        f"{math.sqrt(result.scale):.2f}: {level / (level + result.scale):.0%} of that variance "
        "lies between schools (for a pupil of average status).",
        "The slope of status varies between schools with a standard deviation of "
        f"{math.sqrt(slope):.2f}; its variance of {slope:.2f} has a standard error of "
        f"{result.bse_re['cses Var']:.2f}"
        + (": the fit is singular, see the note above." if result.singular else "."),
        f"Extreme schools, estimates shrunk towards the mean: {effects.index[0]} "
        f"({effects.iloc[0]:+.2f} points) and {effects.index[-1]} ({effects.iloc[-1]:+.2f}).",
        f"The {result.nobs:,} rows were read once, by Dask on threads of this machine, into sums "
        f"for each of {result.n_groups} schools; the optimiser evaluated those "
        f"{result.optimizer_summary.evaluations} times and "
        + ("certified the optimum." if result.converged else "did not certify an optimum."),
    ]
    lines = ["", "What one sees"]
    for point in points:
        lines += textwrap.wrap(point, WIDTH, initial_indent="* ", subsequent_indent="  ")
    return "\n".join([*lines, "", "In Python:", f'dmixed.lmer("{FORMULA}", data)'])
