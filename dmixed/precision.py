"""Whether sums need a reference row per group: decided on a pilot sample, checked after the pass.

Sums about one point for all rows lose the digits of ``kappa``, the total over the residual sum of
squares within groups: the criterion of n rows is off by about ``eps n kappa``. References bring
the total down to what varies within groups; they cost up to as much again as the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from dmixed.blocks import RESPONSE, Column, Floats
from dmixed.design import DesignSpec, block
from dmixed.errors import DmixedError
from dmixed.moments import Totals, accumulate

GAIN = 100.0
"""Total over within-group sum of squares from which references are worth their cost."""

EXPECTED, FOUND = 1e-7, 1e-3
"""Rounding of the criterion that calls for references before the pass, and for another pass."""

FEW = 5
"""Rows of a pilot beyond one per group, and per column, that tell nothing of its groups."""

CONSTANT_WITHIN = 1e-20
"""Within-group share of a sum of squares that is rounding: the column belongs to the groups."""


@dataclass(frozen=True, slots=True)
class Dwarfed:
    """How far what varies between groups dwarfs what varies within them.

    Attributes
    ----------
    per_row
        eps kappa of the columns whose sums references shorten `GAIN` times: rounding of the
        criterion for each row; 0 if there are none
    """

    per_row: float

    @classmethod
    def of(cls, moments: Totals) -> Dwarfed:
        """As far as some moments can tell."""
        varying = [j for j, c in enumerate(moments.columns) if not c.cell and c.powers]
        n, df = moments.nobs, moments.nobs - moments.n_groups
        if df - len(varying) < FEW:
            return cls(0.0)
        centred = (moments.FtF - moments.between)[np.ix_(varying, varying)]
        total = np.diag(moments.gram)[varying] / n
        within = np.maximum(np.diag(centred), 0.0) / df
        y = varying.index(moments.columns.index(Column((), ((RESPONSE, 1),))))
        residual = np.where(within > CONSTANT_WITHIN * total, within, np.inf)
        residual[y] = _unexplained(centred, y) / (df - len(varying) + 1)
        weight = np.isin(varying, moments.random) | (np.arange(len(varying)) == y)
        kappa = np.divide(total, residual, out=np.full(len(total), np.inf), where=residual > 0.0)
        kappa = np.where(weight, kappa, kappa / n)
        helped = total > GAIN * within
        return cls(float(np.finfo(float).eps * kappa[helped].max(initial=0.0)))


def _unexplained(centred: Floats, y: int) -> float:
    """Sum of squares of column y within groups that the other columns leave."""
    size = np.sqrt(np.maximum(np.diag(centred), 0.0))
    inverse = np.divide(1.0, size, out=np.zeros(len(size)), where=size > 0.0)
    correlation = centred * inverse[:, None] * inverse
    others = np.delete(np.arange(len(size)), y)
    right = correlation[others, y]
    found = np.linalg.lstsq(correlation[np.ix_(others, others)], right, rcond=1e-12)[0]
    return float(size[y] ** 2 * max(1.0 - right @ found, 0.0))


def with_references(
    spec: DesignSpec, pilot: pa.Table, rows: Callable[[], int | None]
) -> DesignSpec:
    """The spec, with references if a pilot sample shows that its model needs them.

    Parameters
    ----------
    pilot
        some rows; they tell something if groups have two or more of them
    rows
        how many there are in all, None if only reading would tell; asked for if it matters
    """
    if not _one_factor(spec):
        return spec
    wanted = replace(spec, references=True)
    try:
        sums = accumulate(block(replace(wanted, missing="drop"), pilot).block)
    except DmixedError:
        return spec  # the pass says it better
    per_row = Dwarfed.of(sums.totals).per_row
    if per_row * sums.nobs <= EXPECTED and per_row * (rows() or 0 if per_row else 0) <= EXPECTED:
        return spec
    return wanted


def needs_references(spec: DesignSpec, totals: Totals) -> bool:
    """Whether moments have lost digits that another pass, with references, would keep."""
    if totals.referenced or not _one_factor(spec):
        return False
    return Dwarfed.of(totals).per_row * totals.nobs > FOUND


def _one_factor(spec: DesignSpec) -> bool:
    """Whether groups are the cells: factors of several levels are put together about zero."""
    return len({term.key for term in spec.terms}) == 1 and not any(t.reduced for t in spec.terms)
