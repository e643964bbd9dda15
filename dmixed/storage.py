"""Results on disk, without pickle: a directory that any program can read.

``result.json`` holds a `_Record`: the estimates and everything small; beside it are the moments, as
`momentstore` writes them. To load a result is to read its formula again and to prepare its model
again from the moments; estimates are as they were stored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmixed import manifests, momentstore
from dmixed.blocks import Floats
from dmixed.errors import DataError, DmixedError
from dmixed.fitting import Estimates
from dmixed.folders import Folder
from dmixed.naming import Names
from dmixed.preparation import Prepared, prepare
from dmixed.provenance import Origin
from dmixed.records import made_record, new_directory, record_bytes, record_checksum

SCHEMA = "dmixed-stored-result/2"
RESULT = "result.json"

FLAGS = "free_beta", "free_pairs", "shrunk"
"""Arrays of `Estimates` that say yes or no."""

OTHER = 1e-6
"""Relative difference that tells other working coordinates from rounding."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a result is made of, see `MixedLMResults`; ``history`` after ``full_output=True``.

    ``origin`` is that of the fit.
    """

    prepared: Prepared
    estimates: Estimates
    names: Names
    history: tuple[dict[str, Any], ...] | None
    origin: Origin


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
class _Record:
    """Contents of ``result.json``; its names are those of the file.

    Attributes
    ----------
    moments
        checksum of the manifest of the moments
    names, estimates, history
        see `Stored`
    """

    schema: str
    moments: str
    names: Names
    estimates: Estimates
    history: tuple[_Search, ...] | None


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
    manifests.refuse_own_functions(moments.spec.formula, moments.spec.context)
    _estimates(result.estimates, result.prepared, str(path))
    with new_directory(_local(path), RESULT) as staging:
        folder = Folder.at(staging)
        origin = result.origin
        manifest = momentstore.write(folder, moments, origin.sources, created=origin.created)
        record = _Record(
            schema=SCHEMA,
            moments=record_checksum(manifest),
            names=result.names,
            estimates=result.estimates,
            history=None if result.history is None else tuple(_Search(**x) for x in result.history),
        )
        folder.put(RESULT, record_bytes(record))


def load(path: str | os.PathLike[str]) -> Stored:
    """Read what `save` wrote.

    Raises
    ------
    DataError
        naming the file, and what is missing, damaged or does not fit
    """
    folder = Folder.at(_local(path))
    file = folder.file(RESULT)
    record = made_record(_Record, folder.read(RESULT, manifests.RECORD), file, SCHEMA)
    manifest = manifests.read_manifest(folder)
    if record_checksum(manifest) != record.moments:
        own = folder.file(manifests.manifest_name(manifest.version))
        raise DataError(f"{own}: is of other moments than {file}")
    moments = momentstore.read(folder, manifest)
    try:
        prepared = prepare(moments)
    except (DmixedError, ArithmeticError, AssertionError, LookupError, ValueError) as error:
        # numbers that no pass over rows makes can fail anywhere in the algebra
        raise DataError(f"{folder.name}: the model cannot be made again: {error}") from error
    names = record.names
    for given, wanted in (
        (names.fixed, len(prepared.design.fixed_names)),
        (names.random, sum(len(bar.names) for bar in prepared.bars)),
    ):
        if given is not None and len(given) != wanted:
            raise DataError(f"{file}: names: there are {len(given)}, the model has {wanted}")
    history = None if record.history is None else tuple(map(_entry, record.history))
    origin = Origin(
        manifest.deltas[0].created, manifest.versions, manifest.machine, manifest.sources
    )
    return Stored(prepared, _estimates(record.estimates, prepared, file), names, history, origin)


def _entry(search: _Search) -> dict[str, Any]:
    found = {field.name: getattr(search, field.name) for field in fields(search)}
    return {**found, "allvecs": list(search.allvecs)}


def _estimates(found: Estimates, prepared: Prepared, file: str) -> Estimates:
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
