"""Results on disk, without pickle: a directory that any program can read.

``result.json`` holds a `_Manifest`: the model in words, and everything small. ``cells.parquet``
has a row per cell: the labels, each key a column of its own type; ``rows``, the rows counted;
``WtF``, a list of q k numbers. ``columns.parquet`` has a row per carried column: ``FtF`` and, where
rows are weighted, ``plain``, lists of k numbers. Where sums are about a row of each group,
``references.parquet`` has that ``reference``, k numbers, for each row of ``cells.parquet``. Where
sums are of combinations F S of the columns F, ``recoding.parquet`` has the rows of ``S`` for those
of ``recoded``, positions of columns.

To load a result is to read its formula again and to prepare its model again from the moments;
estimates are as they were stored.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dmixed import keys
from dmixed.blocks import CONSTANT, Column, Floats, Frame, Recoding
from dmixed.collect import Moments
from dmixed.design import DesignSpec, FactorLevels, specification
from dmixed.errors import DataError, DmixedError
from dmixed.fitting import Estimates
from dmixed.formula import Words, parse, parse_parts
from dmixed.formula.expressions import Call, walk
from dmixed.moments import GroupMoments
from dmixed.naming import Names
from dmixed.preparation import Prepared, prepare
from dmixed.records import (
    TableFile,
    list_type,
    lists,
    new_directory,
    read_record,
    read_table,
    write_record,
    write_table,
)
from dmixed.references import References
from dmixed.whitening import places

SCHEMA = "dmixed-stored-result/1"
MANIFEST, CELLS, COLUMNS = "result.json", "cells.parquet", "columns.parquet"
REFERENCES, RECODING = "references.parquet", "recoding.parquet"

LABELS = pa.large_string(), pa.int64(), pa.uint64(), pa.float64(), pa.date32(), pa.bool_()
"""Types that labels have, beside timestamps."""

FLAGS = "free_beta", "free_pairs", "shrunk"
"""Arrays of `Estimates` that say yes or no."""

OTHER = 1e-6
"""Relative difference that tells other working coordinates from rounding."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a result is made of, see `MixedLMResults`; ``history`` after ``full_output=True``."""

    prepared: Prepared
    estimates: Estimates
    names: Names
    history: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True, slots=True)
class _Search:
    """An entry of ``hist``."""

    method: str
    converged: bool
    fopt: float
    fcalls: int
    message: str
    allvecs: tuple[Floats, ...]


@dataclass(frozen=True, slots=True)
class _Manifest:
    """Contents of ``result.json``; its names are those of the file.

    Attributes
    ----------
    versions
        of the libraries that wrote it
    formula, words
        see `ParsedFormula`
    inputs
        data columns of the formula
    text_columns, weights, offset, missing, frame
        see `DesignSpec`
    dropped, levels
        see `Moments`
    key_types
        Arrow types of the labels
    columns, random, log_weights
        see `GroupMoments`
    """

    schema: str
    versions: dict[str, str]
    formula: str
    words: Words | None
    inputs: tuple[str, ...]
    text_columns: tuple[str, ...]
    weights: str | None
    offset: str | None
    missing: str
    dropped: dict[str, int]
    names: Names
    estimates: Estimates
    history: tuple[_Search, ...] | None
    frame: Frame
    levels: dict[str, FactorLevels]
    columns: tuple[Column, ...]
    random: tuple[int, ...]
    log_weights: float
    key_types: tuple[str, ...]
    files: dict[str, TableFile]


# --------------------------------------------------------------------------- saving


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise DataError(f"{path} is a URI: results are kept in local directories; copy it")
    return Path(path)


def save(result: Stored, path: str | os.PathLike[str]) -> None:
    """Write a result to a new or empty local directory, all or nothing.

    Raises
    ------
    DataError
        the formula calls functions of the caller's, or there is something at ``path``
    OSError
        the directory cannot be written
    """
    moments = result.prepared.here
    spec, group, labels = moments.spec, moments.group, moments.labels
    if own := _own_functions(spec):
        raise DataError(
            f"the formula calls {', '.join(own)}, given by context= or found among the caller's "
            "variables: functions cannot be stored; compute such columns before the fit"
        )
    _estimates(result.estimates, result.prepared, Path(path))
    with new_directory(_local(path), MANIFEST) as folder:
        own_columns = {"rows": pa.array(group.counts), "WtF": lists(group.WtF)}
        cells = pa.table([*labels.arrays, *own_columns.values()], [*labels.names, *own_columns])
        sums = [lists(getattr(group, name)) for name in _sums(spec)]
        tables = {CELLS: cells, COLUMNS: pa.table(sums, _sums(spec))}
        if group.reference is not None:
            reference = lists(group.reference.astype(np.float64))
            tables[REFERENCES] = pa.table([reference], ["reference"])
        if group.recoding is not None:
            at = pa.array(places(group.recoding, group.columns))
            tables[RECODING] = pa.table([at, lists(np.array(group.recoding.S))], ["recoded", "S"])
        manifest = _Manifest(
            schema=SCHEMA,
            versions={
                "python": platform.python_version(),
                **{x: version(x) for x in ("dmixed", "numpy", "scipy", "pandas", "pyarrow")},
            },
            formula=spec.formula.text,
            words=spec.formula.words,
            inputs=spec.formula.columns,
            text_columns=tuple(sorted(spec.text_columns)),
            weights=spec.weights,
            offset=spec.offset,
            missing=spec.missing,
            dropped=dict(moments.dropped),
            names=result.names,
            estimates=result.estimates,
            history=None if result.history is None else tuple(_Search(**x) for x in result.history),
            frame=group.frame,
            levels=dict(moments.levels),
            columns=group.columns,
            random=group.random,
            log_weights=group.log_weights,
            key_types=tuple(str(array.type) for array in labels.arrays),
            files={name: write_table(folder / name, table) for name, table in tables.items()},
        )
        write_record(folder / MANIFEST, manifest)


def _own_functions(spec: DesignSpec) -> list[str]:
    """Functions of the caller's that a formula calls."""
    nodes = [spec.formula.response, *(f for term in spec.formula.terms() for f in term.factors)]
    called = {x.function for node in nodes for x in walk(node) if isinstance(x, Call)}
    return sorted(called & set(spec.context))


def _sums(spec: DesignSpec) -> list[str]:
    """Fields of `GroupMoments` in ``columns.parquet``."""
    return ["FtF"] if spec.weights is None else ["FtF", "plain"]


# --------------------------------------------------------------------------- loading


def load(path: str | os.PathLike[str]) -> Stored:
    """Read what `save` wrote.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    folder = _local(path)
    file = folder / MANIFEST
    manifest = read_record(_Manifest, file, SCHEMA)
    moments = _moments(manifest, folder)
    try:
        prepared = prepare(moments)
    except (DmixedError, ArithmeticError, AssertionError, LookupError, ValueError) as error:
        # numbers that no pass over rows makes can fail anywhere in the algebra
        raise DataError(f"{file}: the model cannot be made again: {error}") from error
    names = manifest.names
    for given, wanted in (
        (names.fixed, len(prepared.design.fixed_names)),
        (names.random, sum(len(bar.names) for bar in prepared.bars)),
    ):
        if given is not None and len(given) != wanted:
            raise DataError(f"{file}: names: there are {len(given)}, the model has {wanted}")
    history = None if manifest.history is None else tuple(map(_entry, manifest.history))
    return Stored(prepared, _estimates(manifest.estimates, prepared, file), names, history)


def _entry(search: _Search) -> dict[str, Any]:
    found = {field.name: getattr(search, field.name) for field in fields(search)}
    return {**found, "allvecs": list(search.allvecs)}


def _spec(manifest: _Manifest, file: Path) -> DesignSpec:
    """What the formula asks for, with the shifts and scales of the fit."""
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
    return replace(spec, frame=manifest.frame, references=REFERENCES in manifest.files)


def _misfit(spec: DesignSpec, manifest: _Manifest) -> str | None:
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
    types = [_label_type(x) for x in manifest.key_types]
    if len(types) != len(spec.keys) or None in types:
        return "key_types"
    return None if manifest.files.keys() - {REFERENCES, RECODING} == {CELLS, COLUMNS} else "files"


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


def _moments(manifest: _Manifest, folder: Path) -> Moments:
    """Moments of the cells, from their files."""
    spec = _spec(manifest, folder / MANIFEST)
    k, q = len(manifest.columns), len(manifest.random)
    types = map(_label_type, manifest.key_types)
    cells = [*zip(spec.group, types, strict=True), ("rows", pa.int64()), ("WtF", list_type(q * k))]
    *arrays, rows, WtF = read_table(folder / CELLS, manifest.files[CELLS], cells)
    labels, counts = keys.Labels(spec.group, tuple(arrays)), rows.to_numpy()
    _, (codes,) = keys.align([labels])
    once = np.array_equal(codes, np.arange(len(labels)))
    if not once or len(counts) == 0 or counts.min() < 1:
        raise DataError(f"{folder / CELLS}: each label must be there once, and have rows")
    sums = [(name, list_type(k)) for name in _sums(spec)]
    FtF, *plain = read_table(folder / COLUMNS, manifest.files[COLUMNS], sums)
    if len(FtF) != k:
        raise DataError(f"{folder / COLUMNS}: has {len(FtF)} rows, the model {k} columns")
    group = GroupMoments(
        columns=manifest.columns,
        random=manifest.random,
        frame=spec.frame,
        WtF=WtF.reshape(len(labels), q, k),
        FtF=FtF,
        plain=plain[0] if plain else FtF,
        counts=counts,
        log_weights=manifest.log_weights,
        reference=_reference(manifest, folder, len(labels)) if spec.references else None,
        recoding=_recoding(manifest, folder) if RECODING in manifest.files else None,
    )
    return Moments(spec, manifest.levels, labels, group, manifest.dropped)


def _reference(manifest: _Manifest, folder: Path, n_cells: int) -> References:
    """References of the cells, from their file."""
    file, k = folder / REFERENCES, len(manifest.columns)
    (values,) = read_table(file, manifest.files[REFERENCES], [("reference", list_type(k))])
    with np.errstate(over="ignore"):
        found: References = values.astype(np.float32)
    none = [bool(x.cell) or not x.powers for x in manifest.columns]
    if len(found) != n_cells or (found != values).any() or found[:, none].any():
        raise DataError(
            f"{file}: must have a row per cell, of numbers that float32 has, 0 for the constant "
            "and for columns of categories"
        )
    return found


def _recoding(manifest: _Manifest, folder: Path) -> Recoding:
    """Recoding of the columns, from its file."""
    file, known = folder / RECODING, manifest.files[RECODING]
    if not 1 <= known.rows <= len(manifest.columns):
        raise DataError(f"{file}: must have a row for each column recoded")
    at, S = read_table(file, known, [("recoded", pa.int64()), ("S", list_type(known.rows))])
    columns, found = manifest.columns, at.to_numpy()
    inside = bool(((found >= 0) & (found < len(columns))).all())
    if not inside or len(np.unique(found)) < len(found) or (np.tril(S, -1) != 0.0).any():
        raise DataError(f"{file}: must have a row for each column recoded, S upper triangular")
    recoded = tuple(columns[j] for j in found)
    random = np.isin(found, manifest.random)
    sound = bool((np.diag(S) > 0.0).all()) and recoded[:1] == (CONSTANT,) and S[0, 0] == 1.0
    if not sound or S[np.ix_(~random, random)].any() or any(x.cell for x in recoded):
        raise DataError(
            f"{file}: must begin with the constant, random columns must be combinations of random "
            "columns, and the diagonal of S must be positive"
        )
    return Recoding(recoded, tuple(map(tuple, S.tolist())))


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


def _estimates(found: Estimates, prepared: Prepared, file: Path) -> Estimates:
    """Estimates, checked to be of a model's sizes and in its coordinates."""
    problem, where = prepared.problem, f"{file}: estimates: "
    p, q, m = problem.factors.p, problem.factors.blocks.q, len(problem.factors.blocks.pairs)
    matrices = {"Psi": (q, q), "root": (q, q), "cov_ratio": (m, m), "cov_user": (m + 1, m + 1)}
    variances = _shaped(found.variances, matrices, f"{where}variances: ")
    sizes = {"beta": (p,), "cov_beta": (p, p), "beta_slope": (p, m), "working_beta": (p,)}
    sizes |= {"root": (q, q), "theta": (m,), "free_beta": (p,), "free_pairs": (m,), "shrunk": (p,)}
    found = replace(_shaped(found, sizes, where), variances=variances)
    if not math.isfinite(found.value) or not 0.0 < found.sigma2 < math.inf:
        raise DataError(f"{where}value and sigma2 must be finite, sigma2 positive")
    if len(variances.zero) != q:
        raise DataError(f"{where}variances: zero: must be a list of {q}")
    to_work, shift = problem.fixed.to_work, problem.response.beta
    for stored, left, right, less in (
        (found.root, problem.natural, variances.root, np.zeros((q, q))),
        (found.working_beta, to_work, found.beta, shift),
    ):
        size = np.abs(left) @ np.abs(right) + np.abs(less)
        if np.abs(stored - (left @ right - less)).max(initial=0.0) > OTHER * size.max(initial=0.0):
            raise DataError(f"{where}are not in the working coordinates of this version: fit again")
    return found


def _shaped(found: Any, sizes: Mapping[str, tuple[int, ...]], where: str) -> Any:
    """The same with arrays of these shapes: flags, or numbers, finite but in covariances."""
    arrays = {}
    for field in fields(found):
        array, name = getattr(found, field.name), field.name
        if not isinstance(array, np.ndarray):
            continue
        shape, flags = sizes[name], name in FLAGS
        if array.size == 0:
            array = np.zeros(array.shape if math.prod(shape) else shape, bool if flags else float)
        if array.shape != shape or flags != (array.dtype == np.bool_):
            raise DataError(f"{where}{name}: must be {'flags' if flags else 'numbers'} {shape}")
        if not name.startswith("cov_") and not np.isfinite(array).all():
            raise DataError(f"{where}{name}: must hold finite numbers")
        arrays[name] = array
    return replace(found, **arrays)
