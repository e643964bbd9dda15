"""Random effects of a fit, by factor and by group."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dmixed.cellmoments import CellMoments
from dmixed.dispatch import gather, one_blas_thread
from dmixed.effects import ByLabel
from dmixed.errors import NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.factors import Shard
from dmixed.fitting import Estimates
from dmixed.inference.cells import effect_variances
from dmixed.inference.random_effects import (
    conditional_covariances,
    conditional_modes,
    joint_covariance,
)
from dmixed.naming import Names
from dmixed.places import File, Place, new_place, part_name
from dmixed.preparation import Outline
from dmixed.tested import Tested

FILE_ROWS = 2**20
"""Levels in one file of a table of random effects."""


@dataclass(frozen=True, eq=False)
class Grouped(Tested):
    """Estimates, and the random effects that follow from them."""

    @cached_property
    def _modes(self) -> tuple[NDArray[np.float64], ...]:
        found, _ = self._estimates, self._prepared.here
        return conditional_modes(self._prepared.problem, found.root, found.working_beta)

    def ranef(self) -> Any:
        """Conditional modes (BLUPs), user units, levels in canonical order.

        Returns
        -------
        with one grouping factor a DataFrame (G, k_re), one row per group; with several a dict of
        them by factor (``"g"``, ``"h:g"``, the name of a variance component)
        """
        tables = self._by_factor(lambda block, order: self._modes[block][order])
        return tables if len(tables) > 1 else next(iter(tables.values()))

    def ranef_cov(self) -> dict[str, NDArray[np.float64]]:
        """Conditional covariances of the effects of each level given beta and the variances.

        Returns
        -------
        label of each bar or component -> (levels, q, q), user units, levels as in ``ranef()``
        """
        problem, found, _ = self._prepared.problem, self._estimates, self._prepared.here
        return {
            bar.label: conditional_covariances(problem, found.root, found.sigma2, block)[
                self._block_order(block)
            ]
            for block, bar in enumerate(self._prepared.bars)
        }

    def ranef_table(
        self,
        condvar: bool = True,
        out: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """BLUPs as plain tables with key columns, one row per level, levels in canonical order.

        Parameters
        ----------
        condvar
            add ``se(...)`` of each effect: roots of the conditional variances given beta and the
            variances, as in ``ranef_cov()``
        out
            path or URI of a new or empty directory: write Parquet files of a million levels
            each, in a folder per factor where there are several, and ``_manifest.json`` at the end
        storage_options
            for a URI

        Returns
        -------
        key columns, effects (user units), their standard errors, and ``rows`` of the level: a
        DataFrame, or with several factors a dict of them by factor; with ``out`` its path.
        Where the groups are on the workers of a cluster, a Dask DataFrame, and files that the
        workers write, in canonical order within each only.
        """
        if self._prepared.shards:
            return self._remote_table(condvar, out, storage_options)
        tables = dict(self._effect_tables(condvar))
        if out is not None:
            with new_place(out, storage_options) as place:
                files: list[File] = []
                columns: dict[str, str] = {}
                for number, (label, table) in enumerate(tables.items()):
                    folder = "" if len(tables) == 1 else f"{number:02d}-{_plain_name(label)}/"
                    if folder:
                        place.make_folder(folder)
                    for i, start in enumerate(range(0, len(table), FILE_ROWS)):
                        some = table.slice(start, FILE_ROWS)
                        files.append(place.write(folder + part_name(i), some))
                    columns |= {folder + x.name: str(x.type) for x in table.schema}
                place.finish(files, columns, self.formula)
            return place.location
        frames = {label: table.to_pandas(date_as_object=True) for label, table in tables.items()}
        return frames if len(frames) > 1 else next(iter(frames.values()))

    # ------------------------------------------------------------------ groups on workers

    def _each_shard(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Futures of a method of the results of each shard, with its own arguments."""
        prepared = self._prepared
        moments = prepared.moments
        assert isinstance(moments, RemoteMoments)
        n = len(prepared.shards)
        return list(
            moments.each(
                *(_on_shard, prepared.shards, list(zip(*arguments, strict=True)) or [()] * n),
                kind=type(self),
                outline=prepared.outline,
                found=self._estimates,
                names=self._names,
                method=method,
            )
        )

    def _remote_table(self, condvar: bool, out: Any, storage_options: Any) -> Any:
        n, moments = len(self._prepared.shards), self._prepared.moments
        assert isinstance(moments, RemoteMoments)
        if out is None:
            import dask.dataframe as dd  # seconds to import, and this is the only use

            frames = self._each_shard("_table_frame", [condvar] * n)
            return dd.from_delayed(frames, verify_meta=False)
        with new_place(out, storage_options) as place:
            numbers = [part_name(i) for i in range(n)]
            written = self._each_shard("_write_table", [condvar] * n, [place] * n, numbers)
            found = gather(moments.client, written)
            place.finish([file for file, _ in found], found[0][1], self.formula)
        return place.location

    def _table_frame(self, condvar: bool) -> pd.DataFrame:
        ((_, table),) = self._effect_tables(condvar)
        frame: pd.DataFrame = table.to_pandas(date_as_object=True)
        return frame

    def _write_table(self, condvar: bool, place: Place, name: str) -> tuple[File, dict[str, str]]:
        ((_, table),) = self._effect_tables(condvar)
        return place.write(name, table), {x.name: str(x.type) for x in table.schema}

    def _effect_tables(self, condvar: bool) -> Iterator[tuple[str, pa.Table]]:
        """Table of each factor and component."""
        prepared, found = self._prepared, self._estimates
        variances = (
            effect_variances(prepared.problem, found.root, found.sigma2) if condvar else None
        )
        for label, (own_blocks, columns) in self._effect_columns().items():
            shown = [name for names in columns for name in names]
            yield label, self._effects.table(own_blocks, shown, self._modes, variances)

    def _effect_columns(self) -> dict[str, tuple[list[int], list[list[str]]]]:
        """For each factor and component its blocks, and the names of their columns."""
        prepared = self._prepared
        blocks: dict[str, list[int]] = {}
        columns: dict[str, list[list[str]]] = {}
        names = iter(self._column_names)
        for block, bar in enumerate(prepared.bars):
            label = bar.label
            if bar.component is None:
                label = ":".join(prepared.levels[prepared.members(block)[0]].names)
            blocks.setdefault(label, []).append(block)
            own = [next(names) for _ in bar.names] if bar.component is None else [bar.label]
            columns.setdefault(label, []).append(list(map(str, own)))
        for label, found in columns.items():
            shown = [name for own in found for name in own]
            if len(set(shown)) < len(shown):
                apart = iter(self._told_apart(label))
                columns[label] = [[next(apart) for _ in own] for own in found]
        return {label: (blocks[label], columns[label]) for label in blocks}

    def _block_order(self, block: int) -> NDArray[np.intp]:
        if self._prepared.bars[block].component is not None:
            return self._effects.component_order(block)[0]
        (term,) = self._prepared.members(block)
        return self._effects.level_order(term)

    def _by_factor(self, values: Any) -> dict[str, pd.DataFrame]:
        """Tables of effects by factor: the bars of a factor side by side."""
        tables: dict[str, pd.DataFrame] = {}
        names = iter(self._column_names)
        for block, bar in enumerate(self._prepared.bars):
            order = self._block_order(block)
            table = values(block, order)
            if bar.component is not None:
                index = pd.Index([self._effects.effect_name(block, int(e)) for e in order])
                _, group = self._effects.component_order(block)
                labels = self._effects.group_index[group]
                index = pd.MultiIndex.from_arrays(
                    [labels, index], names=[self.group_name, "effect"]
                )
                tables[bar.label] = pd.DataFrame(table, index, [bar.label])
                continue
            (term,) = self._prepared.members(block)
            label = ":".join(self._prepared.levels[term].names)
            own = pd.DataFrame(
                table, self._effects.level_index(term), [next(names) for _ in bar.names]
            )
            tables[label] = own if label not in tables else pd.concat([tables[label], own], axis=1)
            if tables[label].columns.duplicated().any():
                tables[label].columns = self._told_apart(label)
        return tables

    def _told_apart(self, factor: str) -> list[str]:
        """Columns of the bars of one factor so far, with their bars' labels."""
        bars = [bar for bar in self._prepared.bars if bar.label.split(".")[0] == factor]
        return [f"{bar.label}: {name}" for bar in bars for name in bar.names]

    def _within_groups(self) -> None:
        if not self._effects.within_groups:
            raise NotSupportedError(
                "random_effects lists the effects of each group, but the factors "
                f"{', '.join(self.factors)} have levels of their own: use ranef()"
            )

    @property
    def random_effects(self) -> dict[Any, pd.Series]:
        """BLUPs by group label, made when asked for: the bar's columns, then ``vc[column]``."""
        self._within_groups()
        return ByLabel(self._effects.group_index, self._series)

    @property
    def random_effects_cov(self) -> dict[Any, pd.DataFrame]:
        """Conditional covariance of the random effects given y and the estimates, by label."""
        self._within_groups()
        return ByLabel(self._effects.group_index, self._covariance)

    def _series(self, place: int, label: Any) -> pd.Series:
        own = self._effects.of_group(place, self._re_names)
        values = [self._modes[block][effect, a] for block, effect, a, _ in own]
        return pd.Series(values, [name for *_, name in own], name=label, dtype=np.float64)

    def _covariance(self, place: int, label: Any) -> pd.DataFrame:
        del label
        own = self._effects.of_group(place, self._re_names)
        position = {(block, effect, a): i for i, (block, effect, a, _) in enumerate(own)}
        cov, found = np.zeros((len(own), len(own))), self._estimates
        for cluster in self._effects.clusters_of_group(place):
            joint = joint_covariance(self._prepared.problem, found.root, found.sigma2, int(cluster))
            where = [position[block, effect, a] for block, effect, a in joint.effects.tolist()]
            cov[np.ix_(where, where)] = joint.cov
        names = [name for *_, name in own]
        return pd.DataFrame(cov, names, names)


@one_blas_thread
def _on_shard(
    moments: CellMoments,
    shard: Shard,
    arguments: Sequence[Any],
    *,
    kind: type[Grouped],
    outline: Outline,
    found: Estimates,
    names: Names,
    method: str,
) -> Any:
    """A method of the results of one shard."""
    result = kind(outline.of(moments, shard), found, names)
    return getattr(result, method)(*arguments)


def _plain_name(label: str) -> str:
    """Label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", label)
