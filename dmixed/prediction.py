"""Fitted values and predictions: the only work after the pass that looks at rows again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.design import Design, matrix
from dmixed.executor import each_part
from dmixed.fitting import Prepared
from dmixed.sources import Part, Source, load


@dataclass(frozen=True, slots=True)
class Rows:
    """Fitted values and responses of the rows used, in the order of the data."""

    fitted: pd.Series
    response: pd.Series


def used_rows(
    prepared: Prepared, beta: Floats, modes: Floats, source: Source, client: Any = None
) -> Rows:
    """Fixed part plus BLUPs plus offset, and the response, of the rows of a fit.

    Parameters
    ----------
    beta
        (p,) fixed effects of the independent columns
    modes
        (G, q) BLUPs in the order of the moments' labels
    """
    function = partial(
        _fitted, prepared.design, prepared.problem.fixed.kept, beta, modes, prepared.moments.labels
    )
    found = each_part(function, source.parts(prepared.design.spec.columns), client)
    kept = np.concatenate([part[2] for part in found])
    index = source.index()
    labels = pd.RangeIndex(len(kept)) if index is None else index
    return Rows(
        *(
            pd.Series(np.concatenate([part[j] for part in found])[kept], labels[kept])
            for j in (0, 1)
        )
    )


def _fitted(
    design: Design,
    kept: tuple[int, ...],
    beta: Floats,
    modes: Floats,
    labels: keys.Labels,
    part: Part,
    value: Any,
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    rows = matrix(design, load(part, value), part.name, response=True)
    assert rows.codes is not None
    assert rows.labels is not None
    assert rows.response is not None
    position = np.append(keys.lookup(labels, rows.labels), -1)[rows.codes]
    complete = rows.complete & (position >= 0)
    fitted = rows.offset + rows.X[:, list(kept)] @ beta
    fitted += np.einsum("nq,nq->n", np.hstack(rows.Z), modes[position])
    return fitted, rows.response, complete


def population(prepared: Prepared, beta: Floats, source: Source, client: Any = None) -> pd.Series:
    """X beta of all rows of a source; NaN where a covariate is missing."""
    function: Callable[[Part, Any], Floats] = partial(
        _fixed_part, prepared.design, prepared.problem.fixed.kept, beta
    )
    columns = prepared.design.fixed_columns
    found = each_part(function, source.parts(columns), client)
    values = np.concatenate([np.empty(0), *found])
    index = source.index()
    return pd.Series(values, None if index is None else index.copy())


def _fixed_part(
    design: Design, kept: tuple[int, ...], beta: Floats, part: Part, value: Any
) -> Floats:
    rows = matrix(design, load(part, value), part.name, groups=False, bars=False)
    return np.asarray(rows.X[:, list(kept)] @ beta)
