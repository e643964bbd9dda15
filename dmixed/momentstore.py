"""Moments on disk or in an object store: a directory that any program can read, without pickle.

Its newest manifest (see `manifests`) holds the model in words and, of each *delta*, of which rows
it is and what was learned of them. Deltas are rows that were added together; the moments are their
sum. Of each delta, a shard is one ``cells-ID-00000.parquet`` with a row per cell: the labels, each
key a column of its own type; ``rows``, the rows counted; ``WtF``, a list of q k numbers; and
``reference``, k of float32, where sums are about a row of each group. ``columns-ID.parquet`` has a
row per carried column: ``FtF`` and, where rows are weighted, ``plain``, lists of k numbers. No row
of the data is in it.

The manifest comes last: files that it does not name are not there. What is read is not trusted, see
`records`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial, reduce
from operator import add
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from dmixed import keys
from dmixed.blocks import Floats
from dmixed.cellmoments import CellMoments, join, merge, split
from dmixed.design import DesignSpec
from dmixed.dispatch import RETRIES, gather
from dmixed.errors import DataError
from dmixed.evaluation import RemoteMoments
from dmixed.folders import UNNAMED, Folder
from dmixed.manifests import (
    FILE_NAME,
    Delta,
    Manifest,
    ShardFile,
    commit,
    label_type,
    manifest_name,
    manifest_of,
    refuse_own_functions,
    spec_of,
    stored_spec,
)
from dmixed.moments import GroupMoments
from dmixed.provenance import SourceState
from dmixed.records import TableFile, list_type, lists, table_arrays, table_bytes
from dmixed.references import References

# --------------------------------------------------------------------------- writing


def write(
    folder: Folder,
    moments: CellMoments | RemoteMoments,
    sources: Sequence[SourceState] = (),
    number: int = 1,
    created: str | None = None,
) -> Manifest:
    """Write moments as the only ones of a directory.

    Parameters
    ----------
    number
        of the state that the directory has then
    created
        see `write_delta`

    Raises
    ------
    DataError
        the formula calls functions of the caller's, the workers do not share the directory, or
        another process has written there at the same time
    OSError
        it cannot be written
    """
    refuse_own_functions(moments.spec.formula, moments.spec.context)
    delta = write_delta(folder, moments, sources, created)
    manifest = manifest_of(moments.spec, [delta], number)
    commit_or_clean(folder, manifest, [delta])
    return manifest


def commit_or_clean(folder: Folder, manifest: Manifest, new: Sequence[Delta]) -> None:
    """`commit`; if that fails, the files of new deltas are removed."""
    try:
        commit(folder, manifest)
    except (DataError, OSError) as error:
        if folder.local or isinstance(
            error, DataError
        ):  # an answer that got lost may have been yes
            for delta in new:
                remove_files(folder, delta.files)
        raise


def is_own(name: str) -> bool:
    """Whether a file is one that is written here before a manifest, also if it is not whole."""
    return FILE_NAME.fullmatch(name) is not None or UNNAMED.fullmatch(name) is not None


def remove_files(folder: Folder, names: Iterable[str]) -> None:
    """Remove files that no manifest names any more."""
    for name in names:
        folder.remove(name)


def write_delta(
    folder: Folder,
    moments: CellMoments | RemoteMoments,
    sources: Sequence[SourceState] = (),
    created: str | None = None,
) -> Delta:
    """Write the files of some moments, which no manifest names yet; shards on workers write theirs.

    Parameters
    ----------
    created
        None for now

    Raises
    ------
    DataError
        the workers do not share the directory
    OSError
        it cannot be written
    """
    token = uuid4().hex[:8]
    try:
        return _written(folder, moments, token, sources, created)
    except BaseException:
        with suppress(OSError):
            remove_files(folder, [x for x in folder.names() if token in x and is_own(x)])
        raise


def _written(
    folder: Folder,
    moments: CellMoments | RemoteMoments,
    token: str,
    sources: Sequence[SourceState],
    created: str | None,
) -> Delta:
    spec, totals = moments.spec, moments.summary.totals
    files: dict[str, TableFile] = {}
    shards = []
    for name, shard, known in _written_cells(folder, moments, f"cells-{token}"):
        shards.append(replace(shard, name=name))
        files[name] = known
    sums = {"FtF": totals.FtF} | ({} if spec.weights is None else {"plain": totals.plain})
    content, known = table_bytes(pa.table({name: lists(x) for name, x in sums.items()}))
    name = f"columns-{token}.parquet"
    folder.put(name, content)
    files[name] = known
    return Delta(
        id=token,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        sources=tuple(sources),
        references=totals.referenced,
        dropped=dict(moments.dropped),
        frame=totals.frame,
        levels=dict(moments.summary.levels),
        columns=totals.columns,
        random=totals.random,
        log_weights=totals.log_weights,
        recoding=totals.recoding,
        nobs=totals.nobs,
        shards=tuple(shards),
        sums=name,
        files=files,
    )


def _written_cells(
    folder: Folder, moments: CellMoments | RemoteMoments, stem: str
) -> list[tuple[str, ShardFile, TableFile]]:
    """Write the cells of every shard, here or on the workers."""
    if isinstance(moments, RemoteMoments):
        names = [f"{stem}-{i:05}.parquet" for i in range(len(moments.futures))]
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
        found.append(_put_cells(shard, f"{stem}-{i:05}.parquet", folder))
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


def read(folder: Folder, manifest: Manifest, deltas: Sequence[Delta] | None = None) -> CellMoments:
    """The sum of deltas, all of them by default; of one, what was written to the last bit.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    readers = _readers(folder, manifest, deltas)
    return merge([reader.whole() for reader in readers])


def read_remote(
    folder: Folder, manifest: Manifest, client: Any, deltas: Sequence[Delta] | None = None
) -> RemoteMoments:
    """The same on the workers of a cluster: tasks for each shard, which a lost worker repeats.

    Deltas of fewer shards than the one of most are read whole, and divided as that is.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    readers = _readers(folder, manifest, deltas)
    submit = partial(client.submit, pure=False, retries=RETRIES)
    most = max(len(reader.delta.shards) for reader in readers)
    columns = []
    for reader in readers:
        if len(reader.delta.shards) == most:
            columns.append([submit(reader.moments, i) for i in range(most)])
        else:
            columns.append([submit(reader.piece, i, most) for i in range(most)])
    futures = [
        row[0] if len(row) == 1 else submit(merge, list(row)) for row in zip(*columns, strict=True)
    ]
    summaries = gather(client, client.map(_summary, futures, pure=False, retries=RETRIES))
    return RemoteMoments(reduce(add, summaries), tuple(futures), client)


def _readers(folder: Folder, manifest: Manifest, deltas: Sequence[Delta] | None) -> list[_Reader]:
    spec = stored_spec(manifest, folder.file(manifest_name(manifest.version)))
    chosen = manifest.deltas if deltas is None else deltas
    return [_Reader.of(folder, delta, spec_of(spec, delta)) for delta in chosen]


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
    delta: Delta
    spec: DesignSpec
    FtF: Floats
    plain: Floats

    @classmethod
    def of(cls, folder: Folder, delta: Delta, spec: DesignSpec) -> _Reader:
        k, names = len(delta.columns), ["FtF"] if spec.weights is None else ["FtF", "plain"]
        wanted = [(name, list_type(k)) for name in names]
        FtF, *plain = _table(folder, delta, delta.sums, wanted)
        if len(FtF) != k:
            file = folder.file(delta.sums)
            raise DataError(f"{file}: has {len(FtF)} rows, the model {k} columns")
        # sources stay here: tasks are to be small
        return cls(folder, replace(delta, sources=()), spec, FtF, plain[0] if plain else FtF)

    def whole(self) -> CellMoments:
        """Moments of all shards."""
        found = [self.moments(i) for i in range(len(self.delta.shards))]
        whole = found[0] if len(found) == 1 else join(found)
        if not _once(whole.labels):
            file = self.folder.file(self.delta.shards[0].name)
            raise DataError(f"{file}: each label must be there once, also in the other shards")
        return whole

    def piece(self, number: int, shards: int) -> CellMoments:
        """One of so many shards of the moments."""
        return split(self.whole(), shards)[number]

    def moments(self, number: int) -> CellMoments:
        """Moments of a shard; the first has the sums over all rows."""
        delta, spec, shard = self.delta, self.spec, self.delta.shards[number]
        file, k, q = self.folder.file(shard.name), len(delta.columns), len(delta.random)
        types = map(label_type, shard.key_types)
        wanted = [*zip(spec.group, types, strict=True), ("rows", pa.int64())]
        wanted += [("WtF", list_type(q * k))]
        wanted += [("reference", list_type(k, pa.float32()))] * spec.references
        columns = _table(self.folder, delta, shard.name, wanted)
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
            columns=delta.columns,
            random=delta.random,
            frame=spec.frame,
            WtF=WtF.reshape(len(labels), q, k),
            FtF=FtF,
            plain=plain if weighted else FtF,
            counts=counts,
            log_weights=delta.log_weights if first else 0.0,
            reference=_checked(reference[0], delta, file) if reference else None,
            recoding=delta.recoding,
        )
        return CellMoments(spec, delta.levels, labels, group, delta.dropped if first else {})


def _table(folder: Folder, delta: Delta, name: str, wanted: Sequence[tuple[str, Any]]) -> list[Any]:
    known = delta.files[name]
    return table_arrays(folder.read(name, known.size), folder.file(name), known, wanted)


def _checked(reference: References, delta: Delta, file: str) -> References:
    none = [bool(x.cell) or not x.powers for x in delta.columns]
    if reference[:, none].any():
        raise DataError(f"{file}: reference: must be 0 for the constant and columns of categories")
    return reference
