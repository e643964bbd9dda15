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

import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed import keys
from dmixed.blocks import CONSTANT, Column, Floats, Frame
from dmixed.collect import Moments, join
from dmixed.design import DesignSpec, FactorLevels, specification
from dmixed.dispatch import RETRIES, gather
from dmixed.errors import DataError, DmixedError
from dmixed.evaluation import RemoteMoments
from dmixed.folders import Folder
from dmixed.formula import ParsedFormula, Words, parse, parse_parts
from dmixed.formula.expressions import Call, walk
from dmixed.moments import GroupMoments
from dmixed.records import (
    TableFile,
    list_type,
    lists,
    made_record,
    record_bytes,
    table_arrays,
    table_bytes,
)
from dmixed.references import References
from dmixed.sources import Fingerprint

SCHEMA = "dmixed-moments/1"
MANIFEST = "manifest.json"

LABELS = pa.large_string(), pa.int64(), pa.uint64(), pa.float64(), pa.date32(), pa.bool_()
"""Types that labels have, beside timestamps."""

RECORD = 2**28
"""Bytes of a manifest at most."""

FILE_NAME = re.compile(r"(cells-\d{5,9}|columns)(-[0-9a-f]{1,32})?\.parquet")
"""Names that files of moments have; nothing outside the directory is ever read."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """Which rows were summed.

    Attributes
    ----------
    kind
        see `Source`
    rows_wanted
        filters in words, "" for all rows
    snapshot
        see `Source`
    files
        fingerprints; none where there are no files
    """

    kind: str
    rows_wanted: str
    snapshot: str | None
    files: tuple[Fingerprint, ...]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """File of the cells of one shard: its name, rows of data, and Arrow types of its labels."""

    name: str
    nobs: int
    key_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of ``manifest.json``; its names are those of the file.

    Attributes
    ----------
    versions, machine
        of the libraries that wrote it, and the architecture
    formula, words
        see `ParsedFormula`
    inputs
        data columns of the formula
    text_columns, weights, offset, missing, references, frame
        see `DesignSpec`
    dropped, levels
        see `Moments`
    columns, random, log_weights
        see `GroupMoments`
    nobs
        rows used
    source
        None: not told
    shards
        in their order
    sums
        name of the file of ``FtF`` and ``plain``
    files
        all files by name
    """

    schema: str
    versions: dict[str, str]
    machine: str
    formula: str
    words: Words | None
    inputs: tuple[str, ...]
    text_columns: tuple[str, ...]
    weights: str | None
    offset: str | None
    missing: str
    references: bool
    dropped: dict[str, int]
    frame: Frame
    levels: dict[str, FactorLevels]
    columns: tuple[Column, ...]
    random: tuple[int, ...]
    log_weights: float
    nobs: int
    source: SourceState | None
    shards: tuple[ShardFile, ...]
    sums: str
    files: dict[str, TableFile]

    @property
    def n_cells(self) -> int:
        """Cells of all shards."""
        return sum(self.files[shard.name].rows for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Memory of the sums of all cells, bytes."""
        k, q = len(self.columns), len(self.random)
        return self.n_cells * (8 * q * k + 8 + (4 * k if self.references else 0))


# --------------------------------------------------------------------------- writing


def own_functions(formula: ParsedFormula, context: Mapping[str, Any] | None) -> list[str]:
    """Functions of the caller's that a formula calls: they cannot be stored."""
    nodes = [formula.response, *(f for term in formula.terms() for f in term.factors)]
    called = {x.function for node in nodes for x in walk(node) if isinstance(x, Call)}
    return sorted(called & set(context or ()))


def refuse_own_functions(formula: ParsedFormula, context: Mapping[str, Any] | None) -> None:
    """Refuse a formula that calls functions of the caller's."""
    if own := own_functions(formula, context):
        raise DataError(
            f"the formula calls {', '.join(own)}, given by context= or found among the caller's "
            "variables: functions cannot be stored; compute such columns before the fit"
        )


def write(
    folder: Folder,
    moments: Moments | RemoteMoments,
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
    sums = {"FtF": totals.FtF} | ({} if spec.weights is None else {"plain": totals.unweighted})
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
        nobs=totals.nobs,
        source=source,
        shards=tuple(shards),
        sums=f"columns{ending}",
        files={**files, f"columns{ending}": known},
    )
    folder.put(MANIFEST, record_bytes(manifest))
    return manifest


def _written_cells(
    folder: Folder, moments: Moments | RemoteMoments, ending: str
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


def _write_cells(moments: Moments, name: str, folder: Folder) -> tuple[str, ShardFile, TableFile]:
    """`_put_cells` as the task of a worker."""
    try:
        return _put_cells(moments, name, folder)
    except OSError as error:
        raise DataError(
            f"{folder.file(name)}: cannot be written by the worker on {platform.node()}: "
            f"{error.strerror or error}; give a directory that all machines can write to"
        ) from None


def _put_cells(moments: Moments, name: str, folder: Folder) -> tuple[str, ShardFile, TableFile]:
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


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a directory.

    Raises
    ------
    DataError
        naming the file, and what is missing or damaged
    """
    file = folder.file(MANIFEST)
    found = made_record(Manifest, folder.read(MANIFEST, RECORD), file, SCHEMA)
    names = [*(shard.name for shard in found.shards), found.sums]
    right = len(set(names)) == len(names) > 1 and set(names) == found.files.keys()
    if not right or not all(FILE_NAME.fullmatch(name) for name in names):
        raise DataError(f"{file}: files: must be those of shards and sums")
    if any(known.rows < 0 or known.size < 0 for known in found.files.values()):
        raise DataError(f"{file}: files: must have rows and sizes from zero")
    if found.nobs < 1 or sum(shard.nobs for shard in found.shards) != found.nobs:
        raise DataError(f"{file}: nobs: must be the rows of all shards, and some")
    return found


def read(folder: Folder, manifest: Manifest) -> Moments:
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


def _summary(moments: Moments) -> Any:
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

    def moments(self, number: int) -> Moments:
        """Moments of a shard; the first has the sums over all rows."""
        manifest, spec, shard = self.manifest, self.spec, self.manifest.shards[number]
        file, k, q = self.folder.file(shard.name), len(manifest.columns), len(manifest.random)
        types = map(_label_type, shard.key_types)
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
        )
        return Moments(spec, manifest.levels, labels, group, manifest.dropped if first else {})


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


def stored_spec(manifest: Manifest, file: str) -> DesignSpec:
    """What the formula asks for, with the shifts and scales of the moments."""
    text, words, inputs = manifest.formula, manifest.words, manifest.inputs
    try:
        if words is None:
            formula = parse(text)
        else:
            components = dict(words.vc_formula)
            formula = parse_parts(text, words.groups, words.re_formula, (), components)
        spec = specification(
            formula.resolved(inputs),
            frozenset(manifest.text_columns),
            weights=manifest.weights,
            offset=manifest.offset,
            missing=manifest.missing,
        )
    except DmixedError as error:
        raise DataError(f"{file}: {error}") from error
    misfit = _misfit(spec, manifest)
    if misfit is not None:
        raise DataError(f"{file}: {misfit}: is not what the formula {text!r} needs")
    return replace(spec, frame=manifest.frame, references=manifest.references)


def _misfit(spec: DesignSpec, manifest: Manifest) -> str | None:
    """Field of a manifest that is not what its formula needs."""
    frame, levels, inputs = manifest.frame, manifest.levels, set(manifest.inputs)
    if len(spec.formula.columns) != len(manifest.inputs) or set(spec.formula.columns) != inputs:
        return "inputs"
    if not spec.text_columns <= inputs:
        return "text_columns"
    finite = bool(np.isfinite([frame.shift, frame.scale]).all())
    if frame.names != spec.frame.names or not finite or min(frame.scale) <= 0.0:
        return "frame"
    if levels.keys() != {category.name for category in spec.categories} or not all(
        set(x.levels) <= set(x.levels if x.categories is None else x.categories)
        for x in levels.values()
    ):
        return "levels"
    if not _carries(spec, levels, manifest.columns, manifest.random):
        return "columns"
    if not math.isfinite(manifest.log_weights):
        return "log_weights"
    for shard in manifest.shards:
        types = [_label_type(x) for x in shard.key_types]
        if len(types) != len(spec.keys) or None in types:
            return "key_types"
    return None


def _carries(
    spec: DesignSpec,
    levels: Mapping[str, FactorLevels],
    columns: Sequence[Column],
    random: Sequence[int],
) -> bool:
    """Whether columns are those that a spec carries in some cells, and which are random."""
    wanted = {x.categories: dict(zip(x.monomials, x.random, strict=True)) for x in spec.needs}
    cells: dict[Any, list[Any]] = {}
    for column in columns:
        cells.setdefault(column.cell, []).append(column.powers)
    need = {cell: wanted.get(tuple(name for name, _ in cell), {}) for cell in cells}
    return (
        {tuple(name for name, _ in cell) for cell in cells} == wanted.keys()
        and all(Counter(need[cell].keys()) == Counter(powers) for cell, powers in cells.items())
        and all(level in levels[name].levels for cell in cells for name, level in cell)
        and [j for j, x in enumerate(columns) if need[x.cell][x.powers]] == list(random)
        and columns[random[0]] == CONSTANT
    )


def _label_type(text: str) -> pa.DataType | None:
    """Type of labels from its name, if there is one."""
    time = re.fullmatch(r"timestamp\[(s|ms|us|ns)(?:, tz=(.+))?\]", text)
    if time is None:
        return {str(x): x for x in LABELS}.get(text)
    type_ = pa.timestamp(*time.groups())
    try:
        pa.scalar(0, type_).as_py()  # the time zone is known
    except (ArithmeticError, LookupError, OSError, ValueError):
        return None
    return type_
