"""Results on disk, without pickle: a directory that any program can read.

``result.json`` (schema "dmixed-stored-result/1") holds a `_Manifest`: what was fitted, in words,
and everything small, numbers to the last bit (NaN is null, infinities are "inf" and "-inf").
``cells.parquet`` has a row per cell: the labels, each key a column of its own type, then ``rows``,
the rows counted, and ``WtF``, a list of q k numbers. ``columns.parquet`` has a row of k numbers per
carried column: ``FtF`` and, if rows are weighted, ``plain``.

The formula is read again when a result is loaded, and the model prepared again from its moments.
What is loaded is not trusted: nothing in it is run, and whatever does not fit is a `DataError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmixed.blocks import Column, Floats, Frame
from dmixed.design import DesignSpec, FactorLevels
from dmixed.errors import DataError, DmixedError
from dmixed.fitting import Estimates
from dmixed.formula import Words
from dmixed.formula.expressions import Call, walk
from dmixed.naming import Names
from dmixed.preparation import Prepared, prepare

SCHEMA = "dmixed-stored-result/1"
MANIFEST, CELLS, COLUMNS = "result.json", "cells.parquet", "columns.parquet"

ROW_GROUP = 2**26
"""Bytes of numbers in one row group of a file."""

OTHER = 1e-6
"""Relative difference from which working coordinates are others than those of the fit."""


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
class _File:
    """Number of rows of a Parquet file, and checksum of its bytes."""

    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Manifest:
    """Contents of ``result.json``, but for its own checksum.

    Attributes
    ----------
    versions
        of the libraries that wrote it
    formula, words
        see `ParsedFormula`
    inputs
        data columns of the formula
    text_columns, frame, weights, offset, missing
        see `DesignSpec`
    levels, dropped
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
    estimates: Estimates
    names: Names
    history: tuple[_Search, ...] | None
    frame: Frame
    levels: dict[str, FactorLevels]
    key_types: tuple[str, ...]
    columns: tuple[Column, ...]
    random: tuple[int, ...]
    log_weights: float
    files: dict[str, _File]


# --------------------------------------------------------------------------- directories


def check_free(path: Path, named: str) -> None:
    """Refuse a place where something is already; an empty directory is nothing."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{named}: exists and is not a directory")
    if path.exists() and any(path.iterdir()):
        raise DataError(
            f"{named}: the directory is not empty; results are never overwritten, "
            "give a new directory"
        )


@contextmanager
def new_directory(path: Path, last: str) -> Iterator[Path]:
    """Directory to fill, whose files appear at ``path`` when all are written, or never.

    A new directory appears complete, by renaming; in one that exists (it may be a mount point) the
    file called ``last`` appears last.

    Raises
    ------
    DataError
        there is something already
    OSError
        the directory cannot be written; nothing is left behind
    """
    check_free(path, str(path))
    path = path.resolve()
    exists = path.exists()
    if not exists:
        path.parent.mkdir(parents=True, exist_ok=True)
    staging = (path if exists else path.parent) / f".{uuid4().hex}.dmixed"
    staging.mkdir()
    try:
        yield staging
        if exists:
            for file in sorted(staging.iterdir(), key=lambda x: x.name == last):
                file.replace(path / file.name)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise DataError(f"{path} is a URI: results are kept in local directories; copy them there")
    return Path(path)


# --------------------------------------------------------------------------- saving


def save(result: Stored, path: str | os.PathLike[str]) -> None:
    """Write a result to a new or empty local directory, all or nothing.

    Raises
    ------
    DataError
        the formula calls functions of the caller's, or there is something at ``path``
    OSError
        the directory cannot be written
    """
    moments = result.prepared.moments
    spec, group = moments.spec, moments.group
    if own := _own_functions(spec):
        raise DataError(
            f"the formula calls {', '.join(own)}, given by context= or by the caller's variables: "
            "functions cannot be stored; compute these columns before the fit, or pickle the result"
        )
    with new_directory(_local(path), MANIFEST) as folder:
        counts = pa.array(group.counts)
        cells = [*moments.labels.arrays, counts, _lists(group.WtF.reshape(len(counts), -1))]
        tables = {CELLS: pa.table(cells, names=[*moments.labels.names, "rows", "WtF"])}
        square = {"FtF": _lists(group.FtF)}
        if group.plain is not group.FtF:
            square["plain"] = _lists(group.plain)
        tables[COLUMNS] = pa.table(square)
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
            estimates=result.estimates,
            names=result.names,
            history=None if result.history is None else tuple(_Search(**x) for x in result.history),
            frame=spec.frame,
            levels=dict(moments.levels),
            key_types=tuple(str(array.type) for array in moments.labels.arrays),
            columns=group.columns,
            random=group.random,
            log_weights=group.log_weights,
            files={name: _write(folder / name, table) for name, table in tables.items()},
        )
        record = _plain(manifest)
        lines = {**record, "sha256": _checksum(record)}.items()
        text = ",\n".join(f"{json.dumps(x)}: {json.dumps(y, allow_nan=False)}" for x, y in lines)
        (folder / MANIFEST).write_text(f"{{\n{text}\n}}\n", encoding="ascii")


def _own_functions(spec: DesignSpec) -> list[str]:
    """Functions of the caller's that a formula calls."""
    nodes = [spec.formula.response, *(f for term in spec.formula.terms() for f in term.factors)]
    called = {x.function for node in nodes for x in walk(node) if isinstance(x, Call)}
    return sorted(called & set(spec.context))


def _lists(rows: Floats) -> pa.Array:
    """Rows (n, m) of numbers as n lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def _write(file: Path, table: pa.Table) -> _File:
    rows = max(1, ROW_GROUP * len(table) // max(table.nbytes, 1))
    pq.write_table(table, file, row_group_size=rows, compression="zstd")
    with file.open("rb") as stream:
        return _File(len(table), hashlib.file_digest(stream, "sha256").hexdigest())


def _plain(value: Any) -> Any:
    """The value as JSON has it; `_made` is the inverse."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        finite = value.dtype.kind != "f" or bool(np.isfinite(value).all())
        return value.tolist() if finite else _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode("ascii")).hexdigest()


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
    manifest: _Manifest = _made(_Manifest, _Found(_record(file), f"{file}: "))
    moments = _moments(manifest, folder)
    try:
        prepared = prepare(moments)
    except (DmixedError, ArithmeticError, AssertionError, LookupError, ValueError) as error:
        # numbers that no pass over rows makes can fail anywhere in the algebra
        raise DataError(f"{file}: the model cannot be made again: {error}") from error
    names = manifest.names
    columns = sum(len(bar.names) for bar in prepared.bars)
    for given, wanted in ((names.fixed, len(prepared.design.fixed_names)), (names.random, columns)):
        if given is not None and len(given) != wanted:
            raise DataError(f"{file}: names: there are {len(given)}, the model has {wanted}")
    history = manifest.history and tuple(
        {**{x.name: getattr(entry, x.name) for x in fields(entry)}, "allvecs": list(entry.allvecs)}
        for entry in manifest.history
    )
    return Stored(prepared, _checked(manifest.estimates, prepared, file), names, history)


def _record(file: Path) -> dict[str, Any]:
    """JSON of a manifest whose checksum is right, without the checksum."""
    try:
        record = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise DataError(
                f"{file}: its schema is {reprlib.repr(schema)}, and this version of dmixed reads "
                f"{SCHEMA!r} alone, which result.save() writes"
            )
        if record.pop("sha256", None) != _checksum(record):
            raise DataError(f"{file}: is damaged or was changed: its checksum is not right")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is damaged, it is no JSON: {error}") from error
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


@dataclass(frozen=True, slots=True)
class _Found:
    """A value that JSON holds, and where it stands, for messages."""

    value: Any
    where: str

    def refused(self, wanted: str) -> DataError:
        return DataError(f"{self.where}must be {wanted}, not {reprlib.repr(self.value)}")

    def of(self, kind: type) -> Any:
        """The value, a list or a dict."""
        if not isinstance(self.value, kind):
            raise self.refused(f"a {kind.__name__}")
        return self.value


_types = cache(get_type_hints)


def _made(kind: Any, found: _Found) -> Any:
    """What `_plain` made a value from that has this type annotation."""
    value, origin, of = found.value, get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _made_of_fields(kind, found)
    if origin in (Union, UnionType):
        if value is None and NoneType in of:
            return None
        rest = [x for x in of if x is not NoneType]
        kind = rest[0] if len(rest) == 1 else next((x for x in rest if type(value) is x), str)
        return _made(kind, found)
    if origin is dict:
        return {k: _made(of[1], _Found(v, f"{found.where}{k}: ")) for k, v in found.of(dict).items()}
    if origin is tuple:
        kinds = of[:1] * len(found.of(list)) if of[-1] is ... else of
        if len(kinds) != len(found.of(list)):
            raise found.refused(f"a list of {len(kinds)}")
        return tuple(_made(x, _Found(v, found.where)) for x, v in zip(kinds, value, strict=True))
    if kind is np.ndarray or origin is np.ndarray:
        return _numbers(found.of(list), found)
    if kind is float and (type(value) in (int, float, NoneType) or value in ("inf", "-inf")):
        return float(_numbers(value, found))
    if type(value) is not kind:
        raise found.refused({str: "text", int: "a whole number", float: "a number"}.get(kind, kind))
    return value


def _made_of_fields(kind: Any, found: _Found) -> Any:
    types, values = _types(kind), found.of(dict)
    if types.keys() != values.keys():
        raise found.refused(f"an object of {', '.join(types)}")
    made = {x: _made(t, _Found(values[x], f"{found.where}{x}: ")) for x, t in types.items()}
    try:
        return kind(**made)
    except AssertionError:
        raise found.refused("an object whose lists match in length") from None


def _numbers(value: Any, found: _Found) -> Floats:
    """Array of a number or of lists of numbers; null is NaN."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise found.refused("numbers") from None


def _spec(manifest: _Manifest, file: Path) -> DesignSpec:
    """What the formula asks for, with the shifts and scales of the fit."""
    words, inputs, frame = manifest.words, manifest.inputs, manifest.frame
    try:
        formula = (
            parse(manifest.formula)
            if words is None
            else parse_parts(
                manifest.formula, words.groups, words.re_formula, (), dict(words.vc_formula)
            )
        ).resolved(inputs)
        spec = specification(
            formula,
            frozenset(manifest.text_columns),
            weights=manifest.weights,
            offset=manifest.offset,
            missing=manifest.missing,
        )
    except DmixedError as error:
        raise DataError(f"{file}: {error}") from error
    if spec.formula.columns != inputs or not spec.text_columns <= set(inputs):
        raise DataError(f"{file}: inputs, text_columns: are not the columns of the formula")
    sound = np.isfinite([frame.shift, frame.scale]).all() and min(frame.scale) > 0.0
    if frame.names != spec.frame.names or not sound:
        raise DataError(f"{file}: frame: is not that of the formula's variables")
    levels = manifest.levels
    if levels.keys() != {x.name for x in spec.categories} or not all(
        set(x.levels) <= set(x.levels if x.categories is None else x.categories)
        for x in levels.values()
    ):
        raise DataError(f"{file}: levels: are not those of the formula's categories")
    return replace(spec, frame=frame)


def _moments(manifest: _Manifest, folder: Path) -> Moments:
    """Moments of the cells."""
    file = folder / MANIFEST
    spec = _spec(manifest, file)
    columns, random = manifest.columns, manifest.random
    if not _fits(spec, manifest.levels, columns, random) or manifest.files.keys() != FILES:
        raise DataError(f"{file}: columns, random, files: are not those of the formula")
    if not math.isfinite(manifest.log_weights):
        raise DataError(f"{file}: log_weights: must be finite")
    k, q = len(columns), len(random)
    types = [_label_type(x) for x in manifest.key_types]
    if len(types) != len(spec.keys) or None in types:
        raise DataError(f"{file}: key_types: {manifest.key_types} are not types of the labels")
    wanted = [*zip(spec.group, types, strict=True), ("rows", pa.int64()), ("WtF", _list(q * k))]
    *labels, counts, WtF = _read(folder / CELLS, manifest.files[CELLS], wanted)
    found = keys.Labels(spec.group, tuple(labels))
    _, (codes,) = keys.align([found])
    if not np.array_equal(codes, np.arange(len(found))) or not min(counts, default=0) > 0:
        raise DataError(f"{folder / CELLS}: labels must be there once, and have rows")
    wanted = [(x, _list(k)) for x in ("FtF", "plain")[: 1 if spec.weights is None else 2]]
    FtF, *plain = _read(folder / COLUMNS, manifest.files[COLUMNS], wanted)
