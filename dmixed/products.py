"""Products of a few long rows with themselves: the inner loop of every sum.

`numpy.dot` lets go of the interpreter's lock; `numpy.matmul` keeps it for two matrices, and for
stacks of fewer than 500, so that threads of one process wait for each other.
"""

from __future__ import annotations

import numpy as np

from dmixed.blocks import Floats

FEW, CACHED = 16, 2**17
"""Rows, and numbers in them, up to which the general product is the faster one."""


def gram(rows: Floats) -> Floats:
    """``rows rows'`` (k, k) of rows (k, n), each contiguous; symmetric to rounding.

    numpy takes a matrix times its own transpose for a rank-k update (BLAS syrk), which for few rows
    takes two to three times as long as the general product. A product without the last row is
    not taken for one.
    """
    if len(rows) > FEW or rows.size > CACHED:
        return np.asarray(np.dot(rows, rows.T))
    found = np.empty((len(rows), len(rows)))
    found[:, :-1] = np.dot(rows, rows[:-1].T)
    found[:-1, -1] = found[-1, :-1]
    found[-1, -1] = np.dot(rows[-1], rows[-1])
    return found
