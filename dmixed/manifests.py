"""What is written of moments beside their numbers: ``manifest.json`` of a `momentstore`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed.blocks import CONSTANT, Column, Frame, Recoding
from dmixed.design import DesignSpec, FactorLevels, specification
from dmixed.errors import DataError, DmixedError
from dmixed.folders import Folder
from dmixed.formula import ParsedFormula, Words, parse, parse_parts
from dmixed.formula.expressions import Call, walk
from dmixed.provenance import SourceState
from dmixed.records import TableFile, made_record

SCHEMA = "dmixed-moments/1"
MANIFEST = "manifest.json"

LABELS = pa.large_string(), pa.int64(), pa.uint64(), pa.float64(), pa.date32(), pa.bool_()
"""Types that labels have, beside timestamps."""

RECORD = 2**28
"""Bytes of a manifest at most."""

FILE_NAME = re.compile(r"(cells-\d{5,9}|columns)(-[0-9a-f]{1,32})?\.parquet")
"""Names that files of moments have; nothing outside the directory is ever read."""


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
        see `CellMoments`
    columns, random, log_weights, recoding
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
    recoding: Recoding | None
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
    return replace(
        spec,
        frame=manifest.frame,
        references=manifest.references,
        recoding=manifest.recoding,
    )


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
    if manifest.recoding is not None and not _sound(manifest, manifest.recoding):
        return "recoding"
    for shard in manifest.shards:
        types = [label_type(x) for x in shard.key_types]
        if len(types) != len(spec.keys) or None in types:
            return "key_types"
    return None


def _sound(manifest: Manifest, recoding: Recoding) -> bool:
    """Whether a recoding has an inverse, and keeps the constant and the span of random columns."""
    columns, n = recoding.columns, len(recoding.columns)
    if n == 0 or len(recoding.S) != n or any(len(row) != n for row in recoding.S):
        return False
    S = np.array(recoding.S, dtype=np.float64)
    drawn = [manifest.columns[j] for j in manifest.random]
    random = np.array([column in drawn for column in columns])
    return (
        set(columns) <= set(manifest.columns)
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
        {tuple(name for name, _ in cell) for cell in cells} == wanted.keys()
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
