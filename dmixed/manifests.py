"""What is written of moments beside their numbers: the manifests of a `momentstore`.

``manifest-00000001.json`` is the first state of a directory, each change adds the next; the newest
counts. A manifest is created where there is none of its number, or not at all, so that of two
writers who both start from one state the second is refused.
"""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed.blocks import CONSTANT, Column, Frame, Recoding
from dmixed.design import DesignSpec, FactorLevels, carried_names, specification
from dmixed.errors import DataError, DmixedError
from dmixed.folders import Folder
from dmixed.formula import ParsedFormula, Words, parse, parse_parts
from dmixed.formula.expressions import Call, walk
from dmixed.provenance import SourceState, library_versions
from dmixed.records import TableFile, made_record, record_bytes

SCHEMA = "dmixed-moments/2"

LABELS = pa.large_string(), pa.int64(), pa.uint64(), pa.float64(), pa.date32(), pa.bool_()
"""Types that labels have, beside timestamps."""

RECORD = 2**28
"""Bytes of a manifest at most."""

HISTORY = 20
"""Manifests that are kept: who reads one is not surprised, and who writes is told of the others."""

MANIFEST_NAME = re.compile(r"manifest-(\d{8})\.json")

FILE_NAME = re.compile(r"(?:cells-([0-9a-f]{8})-\d{5,9}|columns-([0-9a-f]{8}))\.parquet")
"""Names that files of moments have, with the id of the delta; nothing else is ever read."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """File of the cells of one shard: its name, rows of data, and Arrow types of its labels."""

    name: str
    nobs: int
    key_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Moments of some rows that were added together.

    Attributes
    ----------
    id
        hexadecimal, part of the names of its files
    created
        when the rows were read, ISO 8601, UTC
    sources
        which rows they are; none where that was not told
    references, frame
        see `DesignSpec`
    dropped, levels
        see `CellMoments`
    columns, random, log_weights, recoding
        see `GroupMoments`
    nobs
        rows used
    shards
        in their order
    sums
        name of the file of ``FtF`` and ``plain``
    files
        all files by name
    """

    id: str
    created: str
    sources: tuple[SourceState, ...]
    references: bool
    dropped: dict[str, int]
    frame: Frame
    levels: dict[str, FactorLevels]
    columns: tuple[Column, ...]
    random: tuple[int, ...]
    log_weights: float
    recoding: Recoding | None
    nobs: int
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a manifest; its names are those of the file.

    Attributes
    ----------
    version
        number of the state
    versions, machine
        of the libraries that wrote it, and the architecture
    formula, words
        see `ParsedFormula`
    inputs
        data columns of the formula and of what is carried
    text_columns, weights, offset, missing, carry, group_crossproducts
        see `DesignSpec`
    deltas
        in the order in which they were added
    """

    schema: str
    version: int
    versions: dict[str, str]
    machine: str
    formula: str
    words: Words | None
    inputs: tuple[str, ...]
    text_columns: tuple[str, ...]
    weights: str | None
    offset: str | None
    missing: str
    carry: tuple[str, ...]
    group_crossproducts: bool
    deltas: tuple[Delta, ...]

    @property
    def nobs(self) -> int:
        """Rows used."""
        return sum(delta.nobs for delta in self.deltas)

    @property
    def nbytes(self) -> int:
        """Memory of the sums of all cells at most, bytes."""
        return sum(delta.nbytes for delta in self.deltas)

    @property
    def files(self) -> set[str]:
        """Names of all files."""
        return {name for delta in self.deltas for name in delta.files}

    @property
    def sources(self) -> tuple[SourceState, ...]:
        """Which rows they are of."""
        return tuple(state for delta in self.deltas for state in delta.sources)


def manifest_of(spec: DesignSpec, deltas: Sequence[Delta], number: int = 1) -> Manifest:
    """Manifest of moments of a model.

    Parameters
    ----------
    number
        of the state
    """
    formula = spec.formula
    names = {x for x in (spec.weights, spec.offset) if x is not None} - set(formula.columns)
    return Manifest(
        schema=SCHEMA,
        version=number,
        versions=library_versions(),
        machine=platform.machine(),
        formula=formula.text,
        words=formula.words,
        inputs=tuple(x for x in spec.columns if x not in names or x in carried(spec)),
        text_columns=tuple(sorted(spec.text_columns)),
        weights=spec.weights,
        offset=spec.offset,
        missing=spec.missing,
        carry=spec.carry,
        group_crossproducts=spec.group_crossproducts,
        deltas=tuple(deltas),
    )


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


def newest(folder: Folder) -> int | None:
    """Number of the newest manifest of a directory, None if there is none.

    Raises
    ------
    OSError
        the storage does not say
    """
    found = [MANIFEST_NAME.fullmatch(name) for name in folder.names()]
    return max((int(match[1]) for match in found if match), default=None)


def manifest_name(number: int) -> str:
    """Name of the file of a state."""
    return f"manifest-{number:08}.json"


def read_manifest(folder: Folder, number: int | None = None) -> Manifest:
    """A manifest of a directory, the newest by default.

    Raises
    ------
    DataError
        naming the file, and what is missing or damaged
    """
    if number is None:
        try:
            number = newest(folder)
        except OSError as error:
            raise DataError(f"{folder.name}: cannot be listed: {error.strerror or error}") from None
    if number is None:
        raise DataError(
            f"{folder.name}: there are no moments: it has no manifest-*.json; "
            "dmixed.collect(...).save(), or dmixed moments collect, makes such a store"
        )
    file = folder.file(manifest_name(number))
    content = folder.read(manifest_name(number), RECORD)
    found = made_record(Manifest, content, file, SCHEMA)
    if found.version != number:
        raise DataError(f"{file}: is of version {found.version}, its name says {number}")
    if not found.deltas:
        raise DataError(f"{file}: deltas: must be some")
    for delta in found.deltas:
        _check_files(delta, f"{file}: deltas: {delta.id}: ")
    if len(found.files) != sum(len(delta.files) for delta in found.deltas):
        raise DataError(f"{file}: deltas: have files in common")
    return found


def _check_files(delta: Delta, where: str) -> None:
    names = [*(shard.name for shard in delta.shards), delta.sums]
    right = len(set(names)) == len(names) > 1 and set(names) == delta.files.keys()
    matches = [FILE_NAME.fullmatch(name) for name in names]
    if not right or any(match is None or delta.id not in match.groups() for match in matches):
        raise DataError(f"{where}files: must be those of shards and sums")
    if any(known.rows < 0 or known.size < 0 for known in delta.files.values()):
        raise DataError(f"{where}files: must have rows and sizes from zero")
    if delta.nobs < 0 or sum(shard.nobs for shard in delta.shards) != delta.nobs:
        raise DataError(f"{where}nobs: must be the rows of all shards")


def too_late(folder: Folder) -> DataError:
    """What a writer is told that starts from a state that is not the newest any more."""
    return DataError(
        f"{folder.name}: another process has changed these moments since they were read here; "
        "this change was not made: open them again and repeat it"
    )


def commit(folder: Folder, manifest: Manifest) -> None:
    """Make a manifest the newest, in place of the one before it.

    Raises
    ------
    DataError
        another process has changed the directory since; nothing was changed
    OSError
        it cannot be written; nothing was changed, as far as the storage has answered
    """
    name = manifest_name(manifest.version)
    refused = too_late(folder)
    if (newest(folder) or 0) != manifest.version - 1:
        raise refused
    if not folder.create(name, record_bytes(manifest)):
        raise refused
    if newest(folder) != manifest.version:  # so many came between that this number was free again
        folder.remove(name)
        raise refused
    if manifest.version > HISTORY:
        with suppress(OSError):  # it is in nobody's way
            folder.remove(manifest_name(manifest.version - HISTORY))


def stored_spec(manifest: Manifest, file: str) -> DesignSpec:
    """What the formula asks for, with the shifts and scales of the first moments."""
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
            carry=manifest.carry,
            group_crossproducts=manifest.group_crossproducts,
            available=inputs,
        )
    except DmixedError as error:
        raise DataError(f"{file}: {error}") from error
    used = {*spec.formula.columns, *carried(spec)}
    misfit = None
    if len(used) != len(manifest.inputs) or used != set(manifest.inputs):
        misfit = "inputs"
    elif not spec.text_columns <= used:
        misfit = "text_columns"
    for delta in manifest.deltas:
        found = misfit or _misfit(spec, delta)
        if found is not None:
            raise DataError(f"{file}: {found}: is not what the formula {text!r} needs")
    return spec_of(spec, manifest.deltas[0])


def spec_of(spec: DesignSpec, delta: Delta) -> DesignSpec:
    """The same spec with what the moments of a delta are about."""
    return replace(spec, frame=delta.frame, references=delta.references, recoding=delta.recoding)


def carried(spec: DesignSpec) -> tuple[str, ...]:
    """Data columns of what a spec carries beside its formula."""
    return carried_names(spec.carry, spec.columns, spec.context)


def _misfit(spec: DesignSpec, delta: Delta) -> str | None:
    """Field of a delta that is not what its formula needs."""
    frame, levels = delta.frame, delta.levels
    finite = bool(np.isfinite([frame.shift, frame.scale]).all())
    if frame.names != spec.frame.names or not finite or min(frame.scale) <= 0.0:
        return "frame"
    if levels.keys() != {category.name for category in spec.categories} or not all(
        set(x.levels) <= set(x.levels if x.categories is None else x.categories)
        for x in levels.values()
    ):
        return "levels"
    if not _carries(spec, levels, delta.columns, delta.random):
        return "columns"
    if not math.isfinite(delta.log_weights):
        return "log_weights"
    if delta.recoding is not None and not _sound(delta, delta.recoding):
        return "recoding"
    for shard in delta.shards:
        types = [label_type(x) for x in shard.key_types]
        if len(types) != len(spec.keys) or None in types:
            return "key_types"
    return None


def _sound(delta: Delta, recoding: Recoding) -> bool:
    """Whether a recoding has an inverse, and keeps the constant and the span of random columns."""
    columns, n = recoding.columns, len(recoding.columns)
    if n == 0 or len(recoding.S) != n or any(len(row) != n for row in recoding.S):
        return False
    S = np.array(recoding.S, dtype=np.float64)
    drawn = [delta.columns[j] for j in delta.random]
    random = np.array([column in drawn for column in columns])
    return (
        set(columns) <= set(delta.columns)
        and len(set(columns)) == n
        and columns[0] == CONSTANT
        and not any(column.cell for column in columns)
        and bool(np.isfinite(S).all())
        and not np.tril(S, -1).any()
        and bool((np.diag(S) > 0.0).all())
        and S[0, 0] == 1.0
        and not S[np.ix_(~random, random)].any()
    )


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
        {tuple(name for name, _ in cell) for cell in cells} <= wanted.keys()
        and all(Counter(need[cell].keys()) == Counter(powers) for cell, powers in cells.items())
        and all(level in levels[name].levels for cell in cells for name, level in cell)
        and [j for j, x in enumerate(columns) if need[x.cell][x.powers]] == list(random)
        and columns[random[0]] == CONSTANT
    )


def label_type(text: str) -> pa.DataType | None:
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
