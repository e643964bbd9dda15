"""Which random effects there are: their levels, names, and the group each belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.design import component_column
from dmixed.levels import Index, clusters
from dmixed.naming import VC_COLUMN, VC_LEVEL
from dmixed.preparation import Prepared


@dataclass(eq=False)
class Effects:
    """Names and places of the random effects of a model.

    The effects of a block are numbered as in `inference.random_effects`.
    """

    prepared: Prepared

    def __post_init__(self) -> None:
        _ = self.prepared.here

    # ------------------------------------------------------------------ the model's groups

    @cached_property
    def group_order(self) -> Index:
        """Permutation that puts the model's groups in canonical order."""
        return keys.sort_index(self.prepared.groups)

    @cached_property
    def group_index(self) -> pd.Index:
        """Labels of the groups, in canonical order."""
        return keys.to_pandas(self.prepared.groups.take(self.group_order))

    @cached_property
    def group_sizes(self) -> Index:
        """(G,) rows of each group, in canonical order."""
        counts = self.prepared.here.group.counts
        sums = np.bincount(self.prepared.group_codes, counts, minlength=len(self.prepared.groups))
        return np.asarray(np.rint(sums), dtype=np.int64)[self.group_order]

    @cached_property
    def _cluster_of_group(self) -> list[Index]:
        """Cells of each group (by its number), in order."""
        codes = self.prepared.group_codes
        order = np.argsort(codes, kind="stable")
        return np.split(order, np.cumsum(np.bincount(codes))[:-1])

    # ------------------------------------------------------------------ effects of a block

    def level_order(self, term: int) -> Index:
        """Permutation that puts the levels of a term in canonical order."""
        return keys.sort_index(self.prepared.levels[term])

    def level_index(self, term: int) -> pd.Index:
        """Labels of the levels of a term, in canonical order."""
        return keys.to_pandas(self.prepared.levels[term].take(self.level_order(term)))

    @cached_property
    def _group_of_level(self) -> list[Index]:
        """Per term, the group of each level (of a factor within the groups)."""
        found = []
        for term in self.prepared.problem.terms:
            group = np.zeros(term.n_levels, np.intp)
            used = term.codes >= 0
            group[term.codes[used]] = self.prepared.group_codes[used]
            found.append(group)
        return found

    def component_order(self, block: int) -> tuple[Index, Index]:
        """Effects of a component by group in canonical order, then level: effect, group's place.

        Effects without a column (the reference level of contrasts) are left out.
        """
        place = np.empty(len(self.group_order), np.intp)
        place[self.group_order] = np.arange(len(self.group_order))
        effects, groups, ranks, base = [], [], [], 0
        for number, i in enumerate(self.prepared.members(block)):
            term = self.prepared.problem.terms[i]
            times = term.T.shape[1] if term.repeated else 1
            order = self.level_order(i)
            met = np.zeros(term.n_levels, np.bool_)
            met[term.codes[term.codes >= 0]] = True
            order = order[met[order]]
            there = self._columns_there(i)[order].ravel()
            effects.append((base + order[:, None] * times + np.arange(times)).ravel()[there])
            groups.append(np.repeat(place[self._group_of_level[i][order]], times)[there])
            ranks.append(np.full(len(effects[-1]), number))
            base += term.n_levels * times
        effect, group = np.concatenate(effects), np.concatenate(groups)
        by_group = np.lexsort((np.arange(len(effect)), np.concatenate(ranks), group))
        return effect[by_group], group[by_group]

    def _columns_there(self, i: int) -> NDArray[np.bool_]:
        """(levels, copies) whether a level has a column: one of a `VCSpec` may be missing."""
        term, design = self.prepared.problem.terms[i], self.prepared.terms[i]
        times = term.T.shape[1] if term.repeated else 1
        there = np.ones((term.n_levels, times), np.bool_)
        own = [j for j, name in enumerate(design.names) if name.strip("`").startswith(VC_COLUMN)]
        moments, used = self.prepared.here.group.absolute, term.codes >= 0
        for j in own if term.repeated else ():
            w = term.T[list(moments.random), j]
            square = np.einsum("a,nab,b->n", w, moments.WtF[:, :, list(moments.random)], w)
            size = np.bincount(term.codes[used], square[used], minlength=term.n_levels)
            there[:, j] = size > 1e-20 * size.max(initial=0.0)
        return there

    @cached_property
    def _components(self) -> dict[int, tuple[Index, Index]]:
        """Per component: effects by group, and where each group's begin."""
        found = {}
        for block, bar in enumerate(self.prepared.bars):
            if bar.component is not None:
                effect, group = self.component_order(block)
                found[block] = effect, np.searchsorted(group, np.arange(len(self.group_order) + 1))
        return found

    def effect_name(self, block: int, effect: int) -> str:
        """Name of an effect of a component as statsmodels has it: ``cask[C(cask)[a]]``."""
        base = 0
        for i in self.prepared.members(block):
            term, design = self.prepared.problem.terms[i], self.prepared.terms[i]
            times = term.T.shape[1] if term.repeated else 1
            if effect < base + term.n_levels * times:
                level, j = divmod(effect - base, times)
                labels = self.prepared.levels[i]
                values = [array[level].as_py() for array in labels.arrays]
                own = [n for n in labels.names if n.startswith(VC_LEVEL)]
                name = (
                    str(values[labels.names.index(own[0])])
                    if own
                    else component_column(design, values, j)
                ).replace(VC_COLUMN, "")
                return f"{self.prepared.bars[block].component}[{name}]"
            base += term.n_levels * times
        raise IndexError(effect)

    def _effect_names(self, block: int, effects: Index) -> list[str]:
        """Names of effects of a component, see `effect_name`."""
        names: list[str] = []
        for i in self.prepared.members(block):
            term, design = self.prepared.problem.terms[i], self.prepared.terms[i]
            labels = self.prepared.levels[i]
            columns = [array.to_pylist() for array in labels.arrays]
            own = [j for j, n in enumerate(labels.names) if n.startswith(VC_LEVEL)]
            for values in zip(*columns, strict=True):
                for j in range(term.T.shape[1] if term.repeated else 1):
                    shown = str(values[own[0]]) if own else component_column(design, values, j)
                    names.append(shown.replace(VC_COLUMN, ""))
        component = self.prepared.bars[block].component
        return [f"{component}[{names[e]}]" for e in effects.tolist()]

    # ------------------------------------------------------------------ tables

    def table(
        self, blocks: Sequence[int], names: Sequence[str], values: Any, variances: Any
    ) -> pa.Table:
        """Effects of the bars of one factor, or of a component, a row per level.

        Parameters
        ----------
        names
            of the columns of all the blocks
        values, variances
            per block of the model (n_effects, q_j); no standard errors if the latter is None

        Returns
        -------
        key columns, the effects, ``se(...)`` of each, and ``rows`` of the level, in canonical
        order
        """
        first = self.prepared.members(blocks[0])[0]
        columns: dict[str, Any] = {}
        if self.prepared.bars[blocks[0]].component is None:
            order = self.level_order(first)
            labels = self.prepared.levels[first].take(order)
            rows = self._level_sizes(first)[order]
        else:
            order, group = self.component_order(blocks[0])
            labels = self.prepared.groups.take(self.group_order[group])
            columns["effect"] = self._effect_names(blocks[0], order)
            rows = np.concatenate(
                [self._level_sizes(i, True) for i in self.prepared.members(blocks[0])]
            )[order]
        own = np.hstack([values[block][order] for block in blocks])
        columns |= dict(zip(names, own.T, strict=True))
        if variances is not None:
            square = np.hstack([variances[block][order] for block in blocks])
            shown = [f"se({name})" for name in names]
            columns |= dict(zip(shown, np.sqrt(np.maximum(square, 0.0)).T, strict=True))
        columns["rows" if "rows" not in columns else "rows of the level"] = rows
        key = _apart(labels.names, set(columns))
        return pa.table({**dict(zip(key, labels.arrays, strict=True)), **columns})

    def _level_sizes(self, i: int, copies: bool = False) -> Index:
        """Rows of each level of a term, or of each of its effects."""
        term, counts = self.prepared.problem.terms[i], self.prepared.here.group.counts
        used = term.codes >= 0
        sums = np.bincount(term.codes[used], counts[used], minlength=term.n_levels)
        rows = np.asarray(np.rint(sums), dtype=np.int64)
        return np.repeat(rows, term.T.shape[1]) if copies and term.repeated else rows

    # ------------------------------------------------------------------ effects of a group

    def of_group(self, place: int, re_names: list[str]) -> list[tuple[int, int, int, str]]:
        """Effects of a group by its place in canonical order: block, effect, column, name.

        Parameters
        ----------
        re_names
            names of the columns of all bars
        """
        group = int(self.group_order[place])
        found, named = [], iter(re_names)
        for block, bar in enumerate(self.prepared.bars):
            if bar.component is None:
                found += [(block, group, a, next(named)) for a in range(len(bar.names))]
            else:
                effects, starts = self._components[block]
                own = effects[starts[place] : starts[place + 1]]
                found += [(block, int(e), 0, self.effect_name(block, int(e))) for e in own]
        return found

    def clusters_of_group(self, place: int) -> list[Any]:
        """Clusters of levels that a group consists of."""
        cells = self._cluster_of_group[int(self.group_order[place])]
        return np.unique(self.cell_clusters[cells]).tolist()

    @cached_property
    def cell_clusters(self) -> Index:
        """Cluster of each cell."""
        return clusters(self.prepared.problem.terms)[0]

    @property
    def within_groups(self) -> bool:
        """Whether every random factor divides the model's groups, so that each has its own."""
        names = set(self.prepared.groups.names)
        return all(
            names <= set(labels.names) and (self.prepared.bars[term.block].component is not None
            or set(labels.names) == names)
            for labels, term in zip(self.prepared.levels, self.prepared.problem.terms, strict=True)
        )  # fmt: skip


def key_columns(keys: Sequence[str], effects: Sequence[str], condvar: bool) -> tuple[str, ...]:
    """Names of the key columns in the table of the effects of a factor, see `Effects.table`."""
    shown = [f"se({name})" for name in effects] if condvar else []
    return tuple(_apart(keys, {*effects, *shown, "rows", *_ROWS_TOO[: "rows" in effects]}))


_ROWS_TOO = ("rows of the level",)


def _apart(keys: Sequence[str], taken: set[str]) -> list[str]:
    return [f"group {name}" if name in taken else name for name in keys]


class ByLabel(dict[Any, Any]):
    """A value per group label, made when it is asked for; a dict that cannot be changed."""

    def __init__(self, index: pd.Index, make: Any) -> None:
        super().__init__()
        self._index, self._make = index, make

    def __getitem__(self, label: Any) -> Any:
        try:
            hash(label)
            position = self._index.get_loc(label)
            found = bool(self._index[position] == label)
        except Exception:  # pandas has many ways to say that a thing is no label
            raise KeyError(label) from None
        # get_loc also takes a part of a composite key or of a date: a slice, or another label
        if not (isinstance(position, int | np.integer) and found is True):
            raise KeyError(label)
        return self._make(position, label)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<{len(self)} groups: {', '.join(map(repr, self._index[:3]))}, ...>"

    def __reversed__(self) -> Iterator[Any]:
        return iter(self._index[::-1])

    # dict's own methods look past __getitem__; Mapping's go through it
    get, keys, values, items = Mapping.get, Mapping.keys, Mapping.values, Mapping.items  # type: ignore
    __contains__, __eq__ = Mapping.__contains__, Mapping.__eq__
    __hash__ = None

    def copy(self) -> dict[Any, Any]:
        """Plain dict of all values."""
        return {label: self[label] for label in self}

    def _unchangeable(self, *_: Any, **__: Any) -> Any:
        raise TypeError("estimates do not change: copy() makes a dict of them")

    __setitem__ = __delitem__ = __ior__ = _unchangeable
    clear = pop = popitem = setdefault = update = _unchangeable
