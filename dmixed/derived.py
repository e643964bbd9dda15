"""Moments of columns that are made of others: fewer columns, recoded ones, ones known by group.

In the rows of group g the wanted columns are ``F T_g``, ``T_g = T + D_g``: T is the same for all
groups, and D_g multiplies columns by numbers that are known of the group. Then

    WtF_g' = P_g' WtF_g T_g          FtF' = T'FtF T + sum over g of (T_g'(F'F)_g T_g - T'(F'F)_g T)

P_g the rows and columns of T_g that belong to the random columns before and after. The sum needs
F'F of a group only where D_g has rows, so these have to be random columns; so have those that
random columns are made of. Where sums are about references r, those of ``F T_g`` are about r'T_g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import solve_triangular

from dmixed.blocks import CONSTANT, RESPONSE, Column, Floats, Frame, Recoding
from dmixed.moments import GroupMoments, Index, csc_matvecs
from dmixed.references import move, rounded
from dmixed.whitening import matrix, places, recoded

GROUPS = 4096
"""Groups worked on at a time: they stay in the processor's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Derivation:
    """Columns wanted of some moments with k columns and G groups.

    Attributes
    ----------
    columns, random, frame
        labels of the m wanted columns, the random ones among them (the constant first), and
        shifts and scales of their variables
    T
        (k, m), for columns as they were before any recoding
    varying
        entries of D_g: the column it is made of, the wanted one, and (G,) numbers
    """

    columns: tuple[Column, ...]
    random: tuple[int, ...]
    frame: Frame
    T: Floats
    varying: tuple[tuple[int, int, Floats], ...] = ()

    def __post_init__(self) -> None:
        assert self.T.shape[1] == len(self.columns)
        assert self.columns[self.random[0]] == CONSTANT

    @property
    def by_group(self) -> frozenset[int]:
        """Columns whose products with the others are needed for each group."""
        rows = {row for row, _, _ in self.varying}
        return frozenset(rows | set(np.flatnonzero(self.T[:, list(self.random)].any(axis=1))))


def selection(moments: GroupMoments, columns: Sequence[int], random: Sequence[int]) -> Derivation:
    """Some of the columns as they are, and of those the random ones: positions among all."""
    T = np.eye(len(moments.columns))[:, list(columns)]
    labels = tuple(moments.columns[j] for j in columns)
    return Derivation(labels, tuple(list(columns).index(j) for j in random), moments.frame, T)


def derive(moments: GroupMoments, wanted: Derivation) -> GroupMoments:
    """Moments of the wanted columns, of the same groups.

    Products of a column that is known by group and one that is not are known with row weights
    only; in ``plain`` the former stand for those without.

    Raises
    ------
    ValueError
        columns of `Derivation.by_group` are not random
    """
    if not wanted.by_group <= set(moments.random):
        raise ValueError("columns are needed by group that are not summed by group")
    recoding = _recoding(moments, wanted)
    T = wanted.T @ matrix(recoding, wanted.columns)
    T = recoded(moments.recoding, moments.columns, T)
    D = _ByGroup.of(moments, wanted)
    FtF_T, centred_D, targets = T, D, None
    constant, new = moments.random[0], wanted.random[0]
    if moments.reference is not None:
        FtF_T = T.copy()
        FtF_T[constant] = np.arange(T.shape[1]) == new
        centred_D = D.without(0)
        targets = _targets(moments, T, D, new)
    WtF, change = _products(moments, wanted.random, FtF_T, centred_D)
    FtF = FtF_T.T @ moments.FtF @ FtF_T + change
    reference = None
    if targets is not None:
        reference = rounded(targets)
        reference[:, [j for j, column in enumerate(wanted.columns) if column.cell]] = 0.0
        FtF += move(WtF, wanted.random, targets - reference)
    plain = FtF if moments.plain is moments.FtF else _plain(moments, new, T, D)
    return GroupMoments(
        wanted.columns, wanted.random, wanted.frame, WtF, FtF, plain, moments.counts,
        moments.log_weights, reference, recoding,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _ByGroup:
    """D_g of all groups, (q, m) each, for columns as they were summed."""

    entries: tuple[tuple[int, int, Floats], ...]
    back: Floats | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, moments: GroupMoments, wanted: Derivation) -> _ByGroup:
        place = {j: a for a, j in enumerate(moments.random)}
        entries = tuple((place[row], j, values) for row, j, values in wanted.varying)
        back = None
        if moments.recoding is not None and entries:
            random = list(moments.random)
            inverse = recoded(moments.recoding, moments.columns, np.eye(len(moments.columns)))
            back = inverse[np.ix_(random, random)]
        return cls(entries, back, (len(place), len(wanted.columns)))

    def without(self, row: int) -> _ByGroup:
        """The same with a row of zeros."""
        if self.back is None:
            return replace(self, entries=tuple(e for e in self.entries if e[0] != row))
        back = self.back.copy()
        back[row] = 0.0
        return replace(self, back=back)

    def __call__(self, start: int, stop: int) -> Floats:
        """Those of neighbouring groups, (g, q, m)."""
        found = np.zeros((stop - start, *self.shape))
        for a, j, values in self.entries:
            found[:, a, j] += values[start:stop]
        return found if self.back is None else np.asarray(self.back @ found)


def _products(
    moments: GroupMoments, random: tuple[int, ...], T: Floats, D: _ByGroup
) -> tuple[Floats, Floats]:
    """WtF of the wanted columns (G, q', m), and the sum over groups in FtF (m, m)."""
    own, new, m = list(moments.random), list(random), T.shape[1]
    WtF, change = np.empty((moments.n_groups, len(new), m)), np.zeros((m, m))
    P = T[np.ix_(own, new)]
    if not D.entries and _picks(P) and _picks(T):
        at = np.ix_(P.argmax(axis=0), T.argmax(axis=0))
        for start, stop in _chunks(moments.n_groups):
            WtF[start:stop] = moments.WtF[start:stop, *at]
        return WtF, change
    for start, stop in _chunks(moments.n_groups):
        B = moments.WtF[start:stop]
        H = B @ T  # (g, q, m)
        if not D.entries:
            WtF[start:stop] = P.T @ H
            continue
        d = D(start, stop)
        J = B[:, :, own] @ d
        WtF[start:stop] = np.swapaxes(P + d[:, :, new], 1, 2) @ (H + J)
        flat = d.reshape(-1, m)
        cross = flat.T @ H.reshape(-1, m)
        change += cross + cross.T + flat.T @ J.reshape(-1, m)
    return WtF, 0.5 * (change + change.T)


def _chunks(n_groups: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_groups, GROUPS):
        yield start, min(start + GROUPS, n_groups)


def _picks(T: Floats) -> bool:
    """Whether columns of T pick one column each."""
    return bool(((T == 0.0) | (T == 1.0)).all() and (T.sum(axis=0) == 1.0).all())


def _targets(moments: GroupMoments, T: Floats, D: _ByGroup, new: int) -> Floats:
    """References (G, m) that go with sums about the references there are: r'T_g."""
    assert moments.reference is not None
    reference = moments.reference.astype(np.float64)
    reference[:, moments.random[0]] = 1.0  # the constant is a part of every row
    found = reference @ T
    for start, stop in _chunks(moments.n_groups if D.entries else 0):
        own = reference[start:stop, list(moments.random)]
        found[start:stop] += np.einsum("gq,gqm->gm", own, D(start, stop))
    found[:, new] = 0.0
    return np.asarray(found)


def _plain(moments: GroupMoments, new: int, T: Floats, D: _ByGroup) -> Floats:
    """Cross-products (m, m) of the wanted columns about zero, without row weights."""
    found = T.T @ moments.plain @ T
    if not D.entries:
        return np.asarray(found)
    found += _products(moments.absolute, (new,), T, D)[1]
    constant = moments.random[0]
    others = np.delete(np.arange(len(T)), constant)
    varied = {j for a, j, _ in D.entries if a != 0}
    alone = [
        j for j in range(T.shape[1]) if j not in varied and not T[others, j].any()
    ]  # columns of groups: their squares count rows
    base = T[constant, alone]
    values = np.tile(base, (moments.n_groups, 1))
    for a, j, own in D.entries:
        if a == 0 and j in alone:
            values[:, alone.index(j)] += own
    rows = moments.counts.astype(np.float64)
    change = (values * rows[:, None]).T @ values - rows.sum() * np.outer(base, base)
    here = np.ix_(alone, alone)
    found[here] = (T[:, alone].T @ moments.plain @ T[:, alone]) + change
    return np.asarray(found)


def _recoding(moments: GroupMoments, wanted: Derivation) -> Recoding | None:
    """Recoding of the wanted columns that makes orthonormal combinations of what was summed.

    With ``S^-1 T = Q R`` of the columns that were recoded and are wanted as they were,
    ``F T R^-1 = (F S) Q``: what was as good as orthogonal remains so.
    """
    old = moments.recoding
    if old is None:
        return None
    varied = {j for _, j, _ in wanted.varying}
    in_cells = {c.powers for c in wanted.columns if c.cell and c.powers}
    candidates = [
        j
        for j, column in enumerate(wanted.columns)
        if j not in varied and column in old.columns and column.powers not in in_cells
        and not np.delete(wanted.T[:, j], moments.columns.index(column)).any()
    ]  # fmt: skip
    first, random = wanted.random[0], set(wanted.random)
    order = sorted(
        candidates,
        key=lambda j: (j != first, j not in random, wanted.columns[j] == _Y, j),
    )
    A = recoded(old, moments.columns, wanted.T[:, order])[places(old, moments.columns)]
    R = np.linalg.qr(A, mode="r")
    diagonal = np.diag(R)
    if not (np.abs(diagonal) > 0.0).all():
        return None
    S = solve_triangular(R / np.sign(diagonal)[:, None], np.eye(len(R)))
    S = np.triu(S) / S[0, 0]
    S[:, 0] = np.arange(len(S)) == 0
    return Recoding(tuple(wanted.columns[j] for j in order), tuple(map(tuple, S.tolist())))


_Y = Column((), ((RESPONSE, 1),))


def coarsen(moments: GroupMoments, codes: Index, n_groups: int) -> GroupMoments:
    """Groups summed together: group g becomes a part of group ``codes[g]`` of ``n_groups``.

    Sums are about the reference of the first of the groups.
    """
    WtF, FtF, reference = moments.WtF, moments.FtF, None
    if moments.reference is not None:
        _, first = np.unique(codes, return_index=True)
        reference = moments.reference[first]
        delta = moments.reference.astype(np.float64) - reference[codes]
        WtF = WtF.copy()
        FtF = FtF + move(WtF, moments.random, delta)
    G, q, k = WtF.shape
    sums = np.zeros((n_groups, q, k))
    if G:
        csc_matvecs(
            n_groups, G, q * k, np.arange(G + 1, dtype=np.int32), codes.astype(np.int32),
            np.ones(G), np.ascontiguousarray(WtF).reshape(-1), sums.reshape(-1),
        )  # fmt: skip
    counts = np.bincount(codes, moments.counts, n_groups).astype(np.int64)
    plain = FtF if moments.plain is moments.FtF else moments.plain
    return replace(moments, WtF=sums, FtF=FtF, plain=plain, counts=counts, reference=reference)


def kept(moments: GroupMoments, groups: Index) -> GroupMoments:
    """Some of the groups alone, all of whose columns are random and whose rows have no weights.

    Raises
    ------
    ValueError
        the sums over all rows cannot be told apart
    """
    if len(moments.random) < len(moments.columns) or moments.plain is not moments.FtF:
        raise ValueError("groups can be taken out of unweighted sums of all columns only")
    found = moments.take(groups)
    order = np.argsort(moments.random)
    FtF = found.WtF.sum(axis=0)[order]
    FtF = 0.5 * (FtF + FtF.T)
    return replace(found, FtF=FtF, plain=FtF)
