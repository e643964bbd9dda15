"""Fits in MLflow: parameters, metrics, tags, files, and a model that predicts.

The model is the directory that ``result.save()`` writes, read by this module (MLflow's
``loader_module``): nothing is pickled.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dmixed.design.spans import Category
from dmixed.errors import DataError, DmixedError
from dmixed.formula.expressions import Name
from dmixed.resultfiles import json_bytes
from dmixed.results import MixedLMResults

LOADER = "dmixed.tracking"


def log_mlflow(result: MixedLMResults, name: str = "model", *, model: bool = True) -> Any:
    """Log a fit to MLflow, in the active run or else in one of its own.

    Parameters
    ----------
    result
        of any fit whose moments are here
    name
        of the model
    model
        log a model (flavour ``pyfunc``); else the saved result as the artefact folder ``fit``

    Returns
    -------
    MLflow's information on the model, with ``model_uri``; None without a model

    Raises
    ------
    DmixedError
        mlflow is not installed
    DataError
        the result cannot be saved, because its formula calls functions of the caller's

    Notes
    -----
    Parameters: formula, method, optimizer, weights, offset. Metrics: criteria, rows, levels of
    each factor, fixed effects with standard errors, standard deviations and correlations of the
    random effects, the gradient at the optimum; what is not finite is left out. Tags: version,
    converged, singular. Artefacts: ``summary.txt`` and ``result.json``.

    ``mlflow.pyfunc.load_model(uri).predict(frame)`` predicts with the random effects of the
    row's groups, and for groups that are not known (or without the key columns) those of the
    population; ``predict(frame, params={"groups": False})`` the fixed part.
    """
    mlflow = _mlflow()
    with TemporaryDirectory(prefix="dmixed-") as folder:
        saved = Path(folder) / "fit"
        result.save(saved)
        active = mlflow.active_run()
        with nullcontext() if active is not None else mlflow.start_run():  # that goes on
            mlflow.log_params(_params(result))
            mlflow.log_metrics(metrics(result))
            mlflow.set_tags(_tags(result))
            mlflow.log_text(f"{result.summary()}\n", "summary.txt")
            mlflow.log_text(json_bytes(result.to_dict()).decode(), "result.json")
            if not model:
                mlflow.log_artifacts(str(saved), "fit")
                return None
            with warnings.catch_warnings():  # an example would be rows of the user's
                warnings.filterwarnings("ignore", "(?s).*input example was not provided")
                return mlflow.pyfunc.log_model(
                    name=name,
                    loader_module=LOADER,
                    data_path=str(saved),
                    signature=_signature(result),
                    pip_requirements=[f"dmixed=={version('dmixed')}"],
                )


def _mlflow() -> Any:
    try:
        import mlflow.pyfunc
    except ImportError:
        raise DmixedError(
            "log_mlflow needs MLflow, which is not installed: pip install 'dmixed[mlflow]'"
        ) from None
    return mlflow


# --------------------------------------------------------------------------- what is logged


def _params(result: MixedLMResults) -> dict[str, Any]:
    spec = result._prepared.design.spec
    return {
        "formula": result.formula,
        "method": result.method,
        "reml": result.reml,
        "optimizer": result.optimizer_summary.method,
        "weights": spec.weights,
        "offset": spec.offset,
        "missing": spec.missing,
    }


def _tags(result: MixedLMResults) -> dict[str, str]:
    return {
        "dmixed.version": version("dmixed"),
        "dmixed.converged": str(result.converged).lower(),
        "dmixed.singular": str(result.singular).lower(),
    }


def metrics(result: MixedLMResults) -> dict[str, float]:
    """Finite numbers of a fit under names that MLflow takes, each once."""
    found: dict[str, float] = {}
    for parts, value in _numbers(result):
        if np.isfinite(value):
            stem = key = "/".join(_safe(part) for part in parts)
            count = 1
            while key in found:  # two names that differ in a character that is not allowed
                count += 1
                key = f"{stem} {count}"
            found[key] = float(value)
    return found


def _numbers(result: MixedLMResults) -> Iterator[tuple[tuple[str, ...], float]]:
    summary = result.optimizer_summary
    for name in ("llf", "aic", "bic", "scale"):
        yield (name,), getattr(result, name)
    yield ("rows",), result.nobs
    yield ("rows dropped",), sum(result.dropped.values())
    yield ("groups",), result.n_groups
    yield ("gradient",), summary.certificate.gradient
    yield ("evaluations",), summary.evaluations
    for label, levels in result.factors.items():
        yield ("levels", label), levels
    fixed = zip(result._fixed_names, np.asarray(result.fe_params), strict=True)
    yield from ((("fixed", name), value) for name, value in fixed)
    errors = zip(result._fixed_names, np.asarray(result.bse_fe), strict=True)
    yield from ((("se", name), value) for name, value in errors)
    for label, cov in result.varcorr().items():
        sd, names = np.sqrt(np.diag(cov.to_numpy())), list(map(str, cov.index))
        for a, name in enumerate(names):
            yield ("sd", label, name), sd[a]
            for b in range(a):
                if sd[a] * sd[b] > 0:
                    yield ("corr", label, names[b], name), cov.iloc[a, b] / (sd[a] * sd[b])
    yield ("sd", "residual"), np.sqrt(result.scale)


def _safe(part: str) -> str:
    """Letters, digits and what MLflow allows in a name; no part of a path."""
    text = re.sub(r"[^A-Za-z0-9_\-. :]", "_", part).strip(" .")
    return text[:80] or "_"


# --------------------------------------------------------------------------- the model


def _signature(result: MixedLMResults) -> Any:
    """Columns that predictions read; numbers are doubles, keys of any type and optional."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    kinds = _kinds(result)
    keys = set(_keys(result))
    columns = [
        ColSpec(AnyType() if kind == "any" else kind, name, required=name not in keys)
        for name, kind in kinds.items()
    ]
    params = ParamSchema([ParamSpec("groups", "boolean", True)])
    return ModelSignature(Schema(columns), Schema([ColSpec("double", "predicted")]), params)


def _keys(result: MixedLMResults) -> tuple[str, ...]:
    keys = result._prepared.design.spec.keys
    return tuple(key.node.column for key in keys if isinstance(key.node, Name))


def _kinds(result: MixedLMResults) -> dict[str, str]:
    """MLflow's type of each column that predictions read: "any" where MLflow would be too strict.

    MLflow takes no integer for a double, so that columns of integers are of any type.
    """
    design = result._prepared.design
    known: dict[str, str] = dict.fromkeys(design.spec.text_columns, "string")
    for item in design.spec.inputs:
        if isinstance(item, Category) and isinstance(item.node, Name):
            levels = design.levels[item.name]
            text = all(isinstance(x, str) for x in levels)
            truth = all(isinstance(x, bool) for x in levels)
            known[item.node.column] = "string" if text else "boolean" if truth else "any"
    found = {}
    columns = result._predictor(True).columns
    schema = None
    if result._source is not None:
        schema = result._source.head(columns, 0).schema
    for name in columns:
        kind = known.get(name, "double")
        if name in _keys(result):
            kind = "any"
        elif schema is not None:
            kind = _kind(schema.field(name).type)
        found[name] = kind
    return found


def _kind(type_: pa.DataType) -> str:
    t = pa.types
    if t.is_dictionary(type_):
        type_ = type_.value_type
    if t.is_floating(type_):
        return "double"
    if t.is_boolean(type_):
        return "boolean"
    return "string" if t.is_string(type_) or t.is_large_string(type_) else "any"


class Model:
    """What MLflow calls to predict.

    Attributes
    ----------
    result
        the fit
    """

    def __init__(self, result: MixedLMResults) -> None:
        self.result = result

    def predict(self, rows: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Column ``predicted`` of rows, see `log_mlflow`.

        Raises
        ------
        DataError
            the rows are no DataFrame, a column is missing, or a level of a covariate is not known
        """
        if not isinstance(rows, pd.DataFrame):
            raise DataError(f"rows of type {type(rows).__name__}: must be a pandas DataFrame")
        groups = bool((params or {}).get("groups", True))
        absent = [name for name in _keys(self.result) if name not in rows.columns]
        if groups and absent:
            rows = rows.assign(**dict.fromkeys(absent))
        return self.result.predict(rows, groups=groups).to_frame("predicted")


def _load_pyfunc(path: str) -> Model:
    """Model of a directory that `log_mlflow` logged; called by MLflow."""
    return Model(MixedLMResults.load(path))
