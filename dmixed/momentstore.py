"""Moments on disk or in an object store: a directory that any program can read, without pickle.

``manifest.json`` holds a `Manifest`: the model in words, what was learned of its columns, which
files there are and of which data. Each shard is one ``cells-00000.parquet`` with a row per cell:
the labels, each key a column of its own type; ``rows``, the rows counted; ``WtF``, a list of q k
numbers; and ``reference``, k of float32, where sums are about a row of each group.
``columns.parquet`` has a row per carried column: ``FtF`` and, where rows are weighted, ``plain``,
lists of k numbers. No row of the data is in it.

The manifest comes last: files that it does not name are not there. What is read is not trusted, see
`records`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.cellmoments import CellMoments, join
from dmixed.design import DesignSpec
from dmixed.dispatch import RETRIES, gather
from dmixed.errors import DataError
from dmixed.evaluation import RemoteMoments
from dmixed.folders import Folder
from dmixed.manifests import (
    MANIFEST,
    SCHEMA,
    Manifest,
    ShardFile,
    label_type,
    refuse_own_functions,
    stored_spec,
)
from dmixed.moments import GroupMoments
from dmixed.provenance import SourceState
from dmixed.records import TableFile, list_type, lists, record_bytes, table_arrays, table_bytes
from dmixed.references import References

# --------------------------------------------------------------------------- writing


def write(
    folder: Folder,
    moments: CellMoments | RemoteMoments,
    source: SourceState | None = None,
    token: str = "",
) -> Manifest:
    """Write moments, the manifest last; shards on workers are written there.

    Parameters
    ----------
    token
        hexadecimal, part of the names of new files where others may be in use

    Raises
    ------
    DataError
        the formula calls functions of the caller's, or the workers do not share the directory
    OSError
        it cannot be written
    """
    spec, totals = moments.spec, moments.summary.totals
    refuse_own_functions(spec.formula, spec.context)
    ending = f"-{token}.parquet" if token else ".parquet"
    files: dict[str, TableFile] = {}
    shards = []
    for name, shard, known in _written_cells(folder, moments, ending):
        shards.append(replace(shard, name=name))
        files[name] = known
    sums = {"FtF": totals.FtF} | ({} if spec.weights is None else {"plain": totals.plain})
    content, known = table_bytes(pa.table({name: lists(x) for name, x in sums.items()}))
    folder.put(f"columns{ending}", content)
    manifest = Manifest(
        schema=SCHEMA,
        versions={
            "python": platform.python_version(),
            **{x: version(x) for x in ("dmixed", "numpy", "scipy", "pandas", "pyarrow")},
        },
        machine=platform.machine(),
        formula=spec.formula.text,
        words=spec.formula.words,
        inputs=spec.formula.columns,
        text_columns=tuple(sorted(spec.text_columns)),
        weights=spec.weights,
        offset=spec.offset,
        missing=spec.missing,
        references=totals.referenced,
        dropped=dict(moments.dropped),
        frame=totals.frame,
        levels=dict(moments.summary.levels),
        columns=totals.columns,
        random=totals.random,
        log_weights=totals.log_weights,
        recoding=totals.recoding,
        nobs=totals.nobs,
        source=source,
        shards=tuple(shards),
        sums=f"columns{ending}",
        files={**files, f"columns{ending}": known},
    )
    folder.put(MANIFEST, record_bytes(manifest))
    return manifest


def _written_cells(
    folder: Folder, moments: CellMoments | RemoteMoments, ending: str
) -> list[tuple[str, ShardFile, TableFile]]:
    """Write the cells of every shard, here or on the workers."""
    if isinstance(moments, RemoteMoments):
        names = [f"cells-{i:05}{ending}" for i in range(len(moments.futures))]
        found = gather(moments.client, moments.each(_write_cells, names, folder=folder))
        for name, _, known in found:
            if folder.size(name) != known.size:
                raise DataError(
                    f"{folder.file(name)}: was written by a worker of the cluster and is not to be "
                    "seen here: give a directory on storage that all machines share"
                )
        return found
    ends = np.cumsum(moments.sizes or (moments.n_cells,)).tolist()
    found = []
    for i, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        arrays = tuple(x.slice(start, stop - start) for x in moments.labels.arrays)
        shard = replace(
            moments,
            labels=keys.Labels(moments.labels.names, arrays),
            group=moments.group.part(start, stop),
            sizes=(),
        )
        found.append(_put_cells(shard, f"cells-{i:05}{ending}", folder))
    return found


def _write_cells(
    moments: CellMoments, name: str, folder: Folder
) -> tuple[str, ShardFile, TableFile]:
    """`_put_cells` as the task of a worker."""
    try:
        return _put_cells(moments, name, folder)
    except OSError as error:
        raise DataError(
            f"{folder.file(name)}: cannot be written by the worker on {platform.node()}: "
            f"{error.strerror or error}; give a directory that all machines can write to"
        ) from None


def _put_cells(moments: CellMoments, name: str, folder: Folder) -> tuple[str, ShardFile, TableFile]:
    """Write the cells of a shard."""
    group, labels = moments.group, moments.labels
    own = {"rows": pa.array(group.counts), "WtF": lists(group.WtF)}
    if group.reference is not None:
        own["reference"] = lists(group.reference)
    table = pa.table([*labels.arrays, *own.values()], [*labels.names, *own])
    content, known = table_bytes(table)
    folder.put(name, content)
    types = tuple(str(array.type) for array in labels.arrays)
    return name, ShardFile(name, group.nobs, types), known


# --------------------------------------------------------------------------- reading


def read(folder: Folder, manifest: Manifest) -> CellMoments:
    """Moments that `write` wrote, to the last bit.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    reader = _Reader.of(folder, manifest)
    found = [reader.moments(i) for i in range(len(manifest.shards))]
    whole = found[0] if len(found) == 1 else join(found)
    file = folder.file(manifest.shards[0].name)
    if whole.n_cells == 0 or not _once(whole.labels):
        raise DataError(f"{file}: each label must be there once, also in the other shards")
    return whole


def read_remote(folder: Folder, manifest: Manifest, client: Any) -> RemoteMoments:
    """The same on the workers of a cluster: a task for each shard, which a lost worker repeats.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    reader = _Reader.of(folder, manifest)
    shards = list(range(len(manifest.shards)))
    futures = client.map(reader.moments, shards, pure=False, retries=RETRIES)
    summaries = gather(client, client.map(_summary, futures, pure=False, retries=RETRIES))
    return RemoteMoments(reduce(add, summaries), tuple(futures), client)


def _summary(moments: CellMoments) -> Any:
    return moments.summary


def _once(labels: keys.Labels) -> bool:
    """Whether each label is there once."""
    _, (codes,) = keys.align([labels])
    return bool(np.array_equal(codes, np.arange(len(labels))))


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """What is needed to read any shard; kilobytes.

    Attributes
    ----------
    spec
        with the shifts and scales of the moments
    FtF, plain
        (k, k) of all shards
    """

    folder: Folder
    manifest: Manifest
    spec: DesignSpec
    FtF: Floats
    plain: Floats

    @classmethod
    def of(cls, folder: Folder, manifest: Manifest) -> _Reader:
        spec = stored_spec(manifest, folder.file(MANIFEST))
        k, names = len(manifest.columns), ["FtF"] if spec.weights is None else ["FtF", "plain"]
        wanted = [(name, list_type(k)) for name in names]
        FtF, *plain = _table(folder, manifest, manifest.sums, wanted)
        if len(FtF) != k:
            file = folder.file(manifest.sums)
            raise DataError(f"{file}: has {len(FtF)} rows, the model {k} columns")
        # source and files of the rest stay here: tasks are to be small
        return cls(folder, replace(manifest, source=None), spec, FtF, plain[0] if plain else FtF)

    def moments(self, number: int) -> CellMoments:
        """Moments of a shard; the first has the sums over all rows."""
        manifest, spec, shard = self.manifest, self.spec, self.manifest.shards[number]
        file, k, q = self.folder.file(shard.name), len(manifest.columns), len(manifest.random)
        types = map(label_type, shard.key_types)
        wanted = [*zip(spec.group, types, strict=True), ("rows", pa.int64())]
        wanted += [("WtF", list_type(q * k))]
        wanted += [("reference", list_type(k, pa.float32()))] * spec.references
        columns = _table(self.folder, manifest, shard.name, wanted)
        arrays = columns[: len(spec.group)]
        rows, WtF, *reference = columns[len(spec.group) :]
        labels, counts = keys.Labels(spec.group, tuple(arrays)), rows.to_numpy()
        if counts.min(initial=1) < 1 or not _once(labels):
            raise DataError(f"{file}: each label must be there once, and have rows")
        if counts.sum() != shard.nobs:
            raise DataError(f"{file}: has {counts.sum():,} rows of data, not {shard.nobs:,}")
        first, weighted = number == 0, self.plain is not self.FtF
        FtF = self.FtF if first else np.zeros((k, k))
        plain = self.plain if first else np.zeros((k, k))
        group = GroupMoments(
            columns=manifest.columns,
            random=manifest.random,
            frame=spec.frame,
            WtF=WtF.reshape(len(labels), q, k),
            FtF=FtF,
            plain=plain if weighted else FtF,
            counts=counts,
            log_weights=manifest.log_weights if first else 0.0,
            reference=_checked(reference[0], manifest, file) if reference else None,
            recoding=manifest.recoding,
        )
        return CellMoments(spec, manifest.levels, labels, group, manifest.dropped if first else {})


def _table(
    folder: Folder, manifest: Manifest, name: str, wanted: Sequence[tuple[str, Any]]
) -> list[Any]:
    known = manifest.files[name]
    return table_arrays(folder.read(name, known.size), folder.file(name), known, wanted)


def _checked(reference: References, manifest: Manifest, file: str) -> References:
    none = [bool(x.cell) or not x.powers for x in manifest.columns]
    if reference[:, none].any():
        raise DataError(f"{file}: reference: must be 0 for the constant and columns of categories")
    return reference
