"""Sums about a reference row of each group.

Where group effects dwarf the noise, sums about one point for all rows lose their square in digits.
With a reference r_g per group, ``WtF = sum (w - r_w)(f - r_f)'`` and ``FtF`` are still sums over
rows, and they say the same: with s = sum (f - r) and n rows of a group, moved by delta = r - r',

    s' = s + n delta        WtF' = WtF + s_w delta_f' + delta_w s_f' + n delta_w delta_f'
    FtF' = FtF + sum over groups of (s delta' + delta s' + n delta delta')

(with row weights, n is their sum). The constant has reference 0, so that its row of WtF is s.
References are float32: half the memory, and f - r is exact for f near r all the same.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats

References: TypeAlias = NDArray[np.float32]


def rounded(rows: Floats) -> References:
    """References (g, k) near some rows; 0, which is always right, where float32 ends."""
    with np.errstate(over="ignore"):
        found = rows.astype(np.float32)
    found[~np.isfinite(found)] = 0.0
    return found


def move(WtF: Floats, random: tuple[int, ...], delta: Floats) -> Floats:
    """Change WtF (g, q, k) in place by moving references by delta (g, k), old minus new.

    Returns
    -------
    change
        (k, k), of FtF
    """
    s = WtF[:, 0].copy()
    moved = s + s[:, random[0]][:, None] * delta
    WtF += s[:, random, None] * delta[:, None, :]
    WtF += delta[:, random, None] * moved[:, None, :]
    return _change(s, moved, delta)


def change_of_total(WtF: Floats, random: tuple[int, ...], delta: Floats) -> Floats:
    """What `move` would return, (k, k); WtF is left alone."""
    s = WtF[:, 0]
    return _change(s, s + s[:, random[0]][:, None] * delta, delta)


def _change(s: Floats, moved: Floats, delta: Floats) -> Floats:
    found = s.T @ delta
    found += delta.T @ moved
    return np.asarray(0.5 * (found + found.T))


class CommonReferences:
    """References of the groups of several parts: those of the first part that has the group.

    Parameters
    ----------
    n_groups, k
        groups and carried columns of all parts
    """

    def __init__(self, n_groups: int, k: int) -> None:
        self.values: References = np.zeros((n_groups, k), dtype=np.float32)
        self.met = np.zeros(n_groups, dtype=np.bool_)

    def moved(
        self,
        WtF: Floats,
        FtF: Floats,
        random: tuple[int, ...],
        reference: References | None,
        position: NDArray[np.intp],
        to_k: NDArray[np.intp],
    ) -> tuple[Floats, Floats]:
        """WtF and FtF of the next part, about the common references.

        Parameters
        ----------
        WtF, FtF, random, reference
            of the part, see `moments.GroupMoments`
        position, to_k
            places of its groups and columns among those of all parts
        """
        if reference is None:
            reference = np.zeros((len(WtF), len(FtF)), dtype=np.float32)
        met = self.met[position]
        self.values[np.ix_(position[~met], to_k)] = reference[~met]
        self.met[position] = True
        common = self.values[position[met]]
        delta = reference[met].astype(np.float64) - common[:, to_k]
        if not delta.any():
            return WtF, FtF
        absent = np.delete(np.arange(self.values.shape[1]), to_k)
        assert not common[:, absent].any()  # columns that have references are in every part
        sums, moved = WtF.copy(), WtF[met]
        change = move(moved, random, delta)
        sums[met] = moved
        return sums, FtF + change
