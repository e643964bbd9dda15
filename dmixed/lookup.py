"""Random effects by level: all that a task needs of a fit's groups to predict rows.

A lookup is made from the moments of some cells. Lookups of disjoint sets of groups concatenate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.errors import NotSupportedError
from dmixed.inference.cells import TooManyCrossed, cell_errors, columns_of_terms
from dmixed.preparation import Prepared

FEW = 8
"""Queries this many times fewer than the labels are looked up in an index that is kept."""

_building = Lock()


@dataclass(frozen=True, eq=False)
class Known:
    """Labels that are looked up again and again; each process makes an index of them once."""

    labels: keys.Labels
    _index: list[Any] = field(default_factory=list, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"labels": self.labels, "_index": []}

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, queries: keys.Labels) -> NDArray[np.int64]:
        """Position of each query, -1 where there is no such label.

        Raises
        ------
        DataError
            a key column is text here and numbers there, and the like
        """
        few = 0 < len(queries) * FEW < len(self)
        same = [a.type for a in queries.arrays] == [a.type for a in self.labels.arrays]
        if not (few and same):
            return keys.lookup(self.labels, queries)
        with _building:
            if not self._index:
                self._index.append(_Index(self.labels))
        index: _Index = self._index[0]
        return index.find(queries)


class _Index:
    """Hash tables of labels: one for each key column, and one for each further pair of numbers."""

    def __init__(self, labels: keys.Labels) -> None:
        self.columns: list[pd.Index] = []
        self.pairs: list[pd.Index] = []
        numbers: NDArray[np.int64] | None = None
        for array in labels.arrays:
            codes, values = pd.factorize(_plain(array))
            self.columns.append(_hashed(values))
            if numbers is None:
                numbers = codes.astype(np.int64)
                continue
            numbers, pairs = pd.factorize(numbers * len(values) + codes)
            self.pairs.append(_hashed(pairs))
        assert numbers is not None
        self.positions = np.empty(len(labels) + 1, np.int64)
        self.positions[numbers] = np.arange(len(labels))
        self.positions[-1] = -1

    def find(self, queries: keys.Labels) -> NDArray[np.int64]:
        """Position of each query, -1 where there is no such label."""
        numbers: NDArray[np.int64] | None = None
        for j, (array, column) in enumerate(zip(queries.arrays, self.columns, strict=True)):
            codes = column.get_indexer(_plain(array)).astype(np.int64)
            if numbers is None:
                numbers = codes
                continue
            known = (numbers >= 0) & (codes >= 0)
            pairs = self.pairs[j - 1].get_indexer(pd.Index(numbers * len(column) + codes))
            numbers = np.where(known, pairs, -1)
        assert numbers is not None
        return np.asarray(self.positions[numbers])


def _hashed(values: Any) -> pd.Index:
    """Index whose hash table is there: made later, by two threads, it would be half made."""
    index = pd.Index(values)
    index.get_indexer(index[:1])
    return index


def _plain(array: pa.Array) -> Any:
    """Labels as numbers where the type allows it, else as text."""
    t = pa.types
    if t.is_timestamp(array.type):
        array = array.cast(pa.int64())
    elif t.is_date(array.type):
        array = array.cast(pa.int32())
    elif t.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values = array.to_numpy(zero_copy_only=False)
    return values.astype(object) if t.is_large_string(array.type) else values


@dataclass(frozen=True, slots=True, eq=False)
class TermEffects:
    """Effects of one random term.

    Attributes
    ----------
    key
        positions of its key columns among the model's keys
    known
        labels of its L levels
    effects
        (L, c): BLUPs of its columns at each level, user units
    """

    key: tuple[int, ...]
    known: Known
    effects: Floats

    def __post_init__(self) -> None:
        assert len(self.effects) == len(self.known)


@dataclass(frozen=True, eq=False)
class Errors:
    """What standard errors need of the cells, see `inference.cells`.

    Attributes
    ----------
    known
        labels of the N cells, all key columns
    cov, slope
        (N, c, c), (N, c, p): of the c columns of all terms, in the terms' order
    prior
        (c, c): covariance of the effects of levels that no row was seen of; block diagonal
    """

    known: Known
    cov: Floats
    slope: Floats
    prior: Floats
    _projected: dict[tuple[int, ...], tuple[Known, NDArray[np.int64]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_projected": {}}

    def __post_init__(self) -> None:
        N, c = self.slope.shape[:2]
        assert self.cov.shape == (N, c, c)
        assert self.prior.shape == (c, c)
        assert len(self.known) == N

    def find(self, key: tuple[int, ...], queries: keys.Labels) -> NDArray[np.int64]:
        """A cell that has these levels of some of the keys, -1 where there is none."""
        with _building:
            if key not in self._projected:
                codes, labels = keys.subset(self.known.labels, key)
                cells = np.empty(len(labels) + 1, np.int64)
                cells[codes] = np.arange(len(codes))
                cells[-1] = -1
                whole = len(labels) == len(self.known) and key == tuple(range(len(key)))
                self._projected[key] = (self.known if whole else Known(labels)), cells
        known, cells = self._projected[key]
        return np.asarray(cells[known.find(queries)])


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Random effects of a fit by level.

    Attributes
    ----------
    names
        of the model's keys
    terms
        random terms in the order of `Design.terms`
    errors
        for standard errors, or None
    """

    names: tuple[str, ...]
    terms: tuple[TermEffects, ...]
    errors: Errors | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all labels and numbers."""
        known = {id(term.known): term.known for term in self.terms}
        size = sum(term.effects.nbytes for term in self.terms)
        if self.errors is not None:
            known[id(self.errors.known)] = self.errors.known
            size += self.errors.cov.nbytes + self.errors.slope.nbytes
        return size + sum(array.nbytes for x in known.values() for array in x.labels.arrays)

    def without(self, cells: keys.Labels) -> Lookup:
        """Lookup without the levels that some cells have, which no other cell shares."""
        left: dict[tuple[int, ...], tuple[Known, NDArray[np.intp]]] = {}
        terms = []
        for term in self.terms:
            if term.key not in left:
                left[term.key] = _left(term.known, keys.subset(cells, term.key)[1])
            known, places = left[term.key]
            terms.append(TermEffects(term.key, known, term.effects[places]))
        errors = self.errors
        if errors is not None:
            known, places = _left(errors.known, cells)
            errors = Errors(known, errors.cov[places], errors.slope[places], errors.prior)
        return Lookup(self.names, tuple(terms), errors)

    @classmethod
    def concatenate(cls, parts: Sequence[Lookup]) -> Lookup:
        """Lookup of all groups of several, which share none."""
        first = parts[0]
        joined: dict[tuple[int, ...], Known] = {}
        terms = []
        for i, term in enumerate(first.terms):
            if term.key not in joined:
                joined[term.key] = _joined([part.terms[i].known for part in parts])
            effects = np.concatenate([part.terms[i].effects for part in parts])
            terms.append(TermEffects(term.key, joined[term.key], effects))
        found = [part.errors for part in parts if part.errors is not None]
        if not found:
            return cls(first.names, tuple(terms))
        assert len(found) == len(parts)
        errors = Errors(
            _joined([x.known for x in found]),
            np.concatenate([x.cov for x in found]),
            np.concatenate([x.slope for x in found]),
            found[0].prior,
        )
        return cls(first.names, tuple(terms), errors)


def _left(known: Known, gone: keys.Labels) -> tuple[Known, NDArray[np.intp]]:
    """Labels that are not among some, and which they are."""
    places = keys.lookup_few(known.labels, gone)
    left = np.delete(np.arange(len(known)), places[places >= 0])
    return Known(known.labels.take(left)), left


def _joined(parts: Sequence[Known]) -> Known:
    return Known(keys.concatenate([part.labels for part in parts]))


def effects_by_level(prepared: Prepared, modes: Sequence[Floats]) -> list[Floats]:
    """Per term of ``problem.terms`` (L, c): effects of its levels.

    Parameters
    ----------
    modes
        per block (n_effects, q_j) BLUPs, see `inference.random_effects`
    """
    found, bases = [], dict.fromkeys(range(len(modes)), 0)
    for term in prepared.problem.terms:
        n = term.size if term.repeated else term.n_levels
        base = bases[term.block]
        found.append(modes[term.block][base : base + n].reshape(term.n_levels, -1))
        bases[term.block] += n
    return found


def make_lookup(prepared: Prepared, modes: Sequence[Floats]) -> Lookup:
    """Lookup of the groups whose moments a model has."""
    by_level = effects_by_level(prepared, modes)
    known: dict[tuple[int, ...], Known] = {}
    terms = []
    for i in design_order(prepared):
        key = prepared.terms[i].key
        labels = known.setdefault(key, Known(prepared.levels[i]))
        terms.append(TermEffects(key, labels, by_level[i]))
    return Lookup(prepared.here.labels.names, tuple(terms))


def design_order(prepared: Prepared) -> list[int]:
    """Positions in ``problem.terms`` of the terms of the design, in the design's order."""
    own = list(prepared.terms)
    return [next(i for i, t in enumerate(own) if t is term) for term in prepared.design.terms]


def make_errors(prepared: Prepared, root: Floats, sigma2: float, Psi: Floats) -> Errors:
    """What standard errors need of the cells of a model.

    Parameters
    ----------
    root
        (q, q) root of the relative covariance, natural coordinates
    Psi
        (q, q) relative covariance, user units

    Raises
    ------
    NotSupportedError
        crossed factors with too many levels
    """
    problem = prepared.problem
    try:
        found = cell_errors(problem, root, sigma2)
    except TooManyCrossed as err:
        raise NotSupportedError(
            "standard errors of predictions need the covariances of all crossed levels with each "
            f"other, {err.numbers:,} numbers: too many; predict without se= and interval="
        ) from None
    columns = _design_columns(prepared)
    cov, slope = found.cov, found.slope
    if columns != sorted(columns):
        cov, slope = cov[:, columns][:, :, columns], slope[:, columns]
    labels, prior = Known(prepared.here.labels), prior_covariance(prepared, sigma2, Psi)
    return Errors(labels, cov, slope, prior)


def _design_columns(prepared: Prepared) -> list[int]:
    """Random columns in the order of the design, as numbered in ``problem.terms``."""
    where = columns_of_terms(prepared.problem)
    return [j for i in design_order(prepared) for j in range(where[i].start, where[i].stop)]


def prior_covariance(prepared: Prepared, sigma2: float, Psi: Floats) -> Floats:
    """(c, c): covariance of the effects that rows of new groups have, in the design's order.

    Parameters
    ----------
    Psi
        (q, q) relative covariance, user units
    """
    problem = prepared.problem
    where, columns = columns_of_terms(problem), _design_columns(prepared)
    prior = np.zeros((len(columns), len(columns)))
    for term, own in zip(problem.terms, where, strict=True):
        block = Psi[(problem.factors.blocks.slices[term.block],) * 2]
        prior[own, own] = block[0, 0] * np.eye(own.stop - own.start) if term.repeated else block
    return np.asarray(sigma2 * prior[np.ix_(columns, columns)])
