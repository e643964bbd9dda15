"""Columns recoded among themselves before their products are taken, and back.

What is summed are the columns ``F S``, S upper triangular in the order of a `Recoding`: nearly
dependent columns, or a response that one column explains, become columns that lose nothing when
they are squared. All the algebra after the pass is on F S, where ``F T`` has the coefficients
``S^-1 T``; only statistics of the columns themselves need ``F'F = S^-T (F S)'(F S) S^-1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from dmixed.blocks import Column, Floats, Frame, Recoding


def places(recoding: Recoding, columns: Sequence[Column]) -> NDArray[np.intp]:
    """Positions in some carried columns of those that are recoded."""
    return np.array([columns.index(column) for column in recoding.columns], dtype=np.intp)


def matrix(recoding: Recoding | None, columns: Sequence[Column]) -> Floats:
    """S (k, k) of k carried columns: the identity where they are not recoded."""
    S = np.eye(len(columns))
    if recoding is not None:
        at = places(recoding, columns)
        S[np.ix_(at, at)] = recoding.S
    return S


def recoded(recoding: Recoding | None, columns: Sequence[Column], T: Floats) -> Floats:
    """Coefficients ``S^-1 T`` of F S for coefficients T (k, ...) of F."""
    if recoding is None:
        return T
    at = places(recoding, columns)
    found = T.copy()
    found[at] = solve_triangular(np.array(recoding.S), T[at])
    return found


def original(recoding: Recoding | None, columns: Sequence[Column], products: Floats) -> Floats:
    """Cross-products of F (k, k) from those of F S."""
    if recoding is None:
        return products
    at, S = places(recoding, columns), np.array(recoding.S)
    found = products.copy()
    found[at] = solve_triangular(S, found[at], trans="T")
    found[:, at] = solve_triangular(S, found[:, at].T, trans="T").T
    return 0.5 * (found + found.T)


def frame_change(columns: tuple[Column, ...], old: Frame, new: Frame) -> Floats:
    """T (k, k) with F_new = F_old T for carried columns about two frames."""
    place = {column: j for j, column in enumerate(columns)}
    T = np.zeros((len(columns), len(columns)))
    for j, column in enumerate(columns):
        expansion: dict[tuple[tuple[str, int], ...], float] = {(): 1.0}
        for name, power in column.powers:
            (m_old, s_old), (m_new, s_new) = old.of(name), new.of(name)
            slope, intercept = s_old / s_new, (m_old - m_new) / s_new
            expansion = {
                (*powers, *(((name, r),) if r else ())): value
                * comb(power, r)
                * slope**r
                * intercept ** (power - r)
                for powers, value in expansion.items()
                for r in range(power + 1)
            }
        for powers, value in expansion.items():
            if value != 0.0:
                T[place[Column(column.cell, powers)], j] = value
    return T
