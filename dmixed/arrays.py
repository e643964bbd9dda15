"""Arrays in statsmodels' words to one table and the formulas that name its columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from dmixed.errors import DataError
from dmixed.naming import VC_COLUMN, VC_LEVEL, Names
from dmixed.params import VCSpec


@dataclass(frozen=True, slots=True)
class ArrayModel:
    """A model of arrays as a table and formulas.

    Attributes
    ----------
    table
        all columns
    formula, group, re_formula, vc_formula
        in statsmodels' words; ``re_formula`` is None for a model of variance components alone
    names
        what the columns are called in results
    """

    table: pd.DataFrame
    formula: str
    group: str
    re_formula: str | None
    vc_formula: dict[str, str] | None
    names: Names


def array_model(endog: Any, exog: Any, groups: Any, exog_re: Any, exog_vc: Any) -> ArrayModel:
    """Table and formulas of ``MixedLM(endog, exog, groups, exog_re, exog_vc)``."""
    y = np.asarray(endog)
    name = str(getattr(endog, "name", None) or "y")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"endog has shape {y.shape}: it must be one-dimensional")
    index = endog.index if isinstance(endog, pd.Series | pd.DataFrame) else None
    n = len(y)
    if n == 0:
        raise DataError("the data have no rows: endog is empty")
    columns: dict[str, Any] = {name: y}
    fixed = _add_columns(columns, aligned(exog, index, "exog"), "exog", "x", n)
    random = _add_columns(columns, aligned(exog_re, index, "exog_re"), "exog_re", "x_re", n)
    group = str(getattr(groups, "name", None) or "Group")
    while group in columns:
        group += "_"
    if groups is None or np.ndim(groups) != 1 or len(groups) != n:
        raise DataError(f"groups has shape {np.shape(groups)}, endog has {n} rows")
    labels = pd.Series(aligned(groups, index, "groups")).array
    components = _components(exog_vc, pd.Series(labels), columns, n)
    frame = pd.DataFrame({key: np.asarray(values) for key, values in columns.items()})
    frame[group] = labels
    if index is not None:
        frame.index = index
    formula = f"`{name}` ~ " + " + ".join(["0", *(f"`{c}`" for c, _ in fixed)])
    re_formula = None if components else "1"
    if exog_re is not None:
        re_formula = " + ".join(["0", *(f"`{c}`" for c, _ in random)])
    names = Names(
        tuple(shown for _, shown in fixed),
        tuple(shown for _, shown in random) if exog_re is not None else None,
        not isinstance(endog, pd.Series | pd.DataFrame)
        and not isinstance(exog, pd.DataFrame | pd.Series),
    )
    return ArrayModel(frame, formula, group, re_formula, components or None, names)


def aligned(given: Any, index: pd.Index | None, argument: str) -> Any:
    """What was given, if its row labels (when it has any) are those of the data."""
    own = given.index if isinstance(given, pd.Series | pd.DataFrame) else None
    if own is not None and index is not None and not own.equals(index):
        raise DataError(
            f"the index of {argument} is not that of the data: rows would be mixed up; align it "
            "with .reindex or pass plain arrays"
        )
    return given


def _numbers(values: Any, argument: str, name: str) -> Any:
    """A column of a design: booleans as 0 and 1, everything else must be a number."""
    array = np.asarray(values)
    if array.dtype == object:
        array = pd.Series(array).infer_objects().to_numpy()
    if array.dtype == np.bool_:
        return array.astype(np.float64)
    if array.dtype.kind not in "iuf":
        raise DataError(
            f"column {name!r} of {argument} has type {array.dtype}: a design matrix holds numbers; "
            "from_formula codes categories"
        )
    return array


def _add_columns(
    columns: dict[str, Any], design: Any, argument: str, stem: str, n: int
) -> list[tuple[str, str]]:
    """Add a design's columns under unique names; a column already there is used again.

    Returns
    -------
    per column its name in the table, and the name to show
    """
    if design is None:
        return []
    if isinstance(design, pd.DataFrame):
        given = [(str(name), design.iloc[:, j]) for j, name in enumerate(design.columns)]
    elif np.ndim(design) == 1:
        (shown,) = _shown_names([np.asarray(design)], stem)
        given = [(str(getattr(design, "name", None) or shown), design)]
    elif np.ndim(design) == 2:
        parts = list(np.asarray(design).T)
        given = list(zip(_shown_names(parts, stem), parts, strict=True))
    else:
        raise DataError(f"{argument} has shape {np.shape(design)}, endog has {n} rows")
    found: list[tuple[str, str]] = []
    for given_name, values in given:
        if len(values) != n:
            raise DataError(f"{argument} has shape {np.shape(design)}, endog has {n} rows")
        if "`" in given_name:
            raise DataError(f"{argument} has a column called {given_name!r}: rename it")
        column = _numbers(values, argument, given_name)
        taken = [name for name, _ in found]
        same = next(
            (
                key
                for key, other in columns.items()
                if argument == "exog_re"
                and key not in taken
                and np.asarray(other).dtype.kind in "iuf"
                and np.array_equal(other, column, equal_nan=True)
            ),
            None,
        )
        name = given_name if same is None else same
        while same is None and name in columns:
            if name in taken:
                raise DataError(f"{argument} has two columns called {given_name!r}: rename one")
            name += "_"
        columns[name] = column
        found.append((name, given_name))
    return found


def _shown_names(columns: Sequence[Any], stem: str) -> list[str]:
    """Statsmodels' names of unnamed columns: ``const`` for the first constant one, x1, x2, ..."""
    if stem != "x":
        return [f"{stem}{j + 1}" for j in range(len(columns))]
    names, constant = [], False
    for column in columns:
        values = np.asarray(column)
        numeric = values.dtype.kind in "iuf" and len(values) and bool((values == values[0]).all())
        if numeric and values[0] != 0 and not constant:
            constant = True
            names.append("const")
        else:
            names.append(f"x{len(names) + 1 - constant}")
    return names


# --------------------------------------------------------------- columns given as arrays


def with_groups(data: Any, groups: Any) -> tuple[Any, str | Sequence[str]]:
    """Table and name of the groups' column, which an array becomes."""
    if groups is None:
        raise DataError("groups= is needed: the column that names the groups, or an array")
    if isinstance(groups, str) or (
        isinstance(groups, list | tuple) and all(isinstance(x, str) for x in groups)
        and (not hasattr(data, "__len__") or len(groups) != len(data))
    ):  # fmt: skip
        return data, groups
    if not isinstance(data, pd.DataFrame):
        raise DataError("groups as an array needs a pandas DataFrame: else give the column's name")
    values = pd.Series(aligned(groups, data.index, "groups")).array
    if len(values) != len(data):
        raise DataError(f"groups has length {len(values)}, the data have {len(data)} rows")
    name = "Group"
    while name in data.columns:
        name += "_"
    return data.assign(**{name: values}), name


def with_columns(data: Any, extra: Mapping[str, Any]) -> tuple[Any, dict[str, str | None]]:
    """Name the columns of weights and offset; arrays become columns of data in memory."""
    names: dict[str, str | None] = {}
    for role, given in extra.items():
        if given is None or isinstance(given, str):
            names[role] = given
            continue
        if not isinstance(data, pd.DataFrame):
            raise DataError(
                f"{role} as an array needs a pandas DataFrame: for other data give the name of a "
                "column"
            )
        values = np.asarray(aligned(given, data.index, role))
        if values.shape != (len(data),):
            raise DataError(f"{role} has shape {values.shape}, the data have {len(data)} rows")
        name = f"({role})"
        data = data.assign(**{name: values})
        names[role] = name
    return data, names


# --------------------------------------------------------------- variance components


def _components(given: Any, groups: pd.Series, columns: dict[str, Any], n: int) -> dict[str, str]:
    """Add the columns of variance components; the formula of each by its name."""
    if given is None:
        return {}
    positions = {label: rows for label, rows in groups.groupby(groups, sort=True).indices.items()}
    if isinstance(given, Mapping):
        warnings.warn(
            "Using deprecated variance components format: give a VCSpec", FutureWarning,
            stacklevel=4,
        )  # fmt: skip
        given = _from_mapping(given, list(positions))
    if not all(hasattr(given, attribute) for attribute in ("names", "colnames", "mats")):
        raise DataError(f"exog_vc must be a VCSpec, not {type(given).__name__}")
    names = [str(name) for name in given.names]
    if not len(names) == len(given.colnames) == len(given.mats):
        raise DataError(
            f"exog_vc has {len(names)} names, {len(given.colnames)} lists of column names and "
            f"{len(given.mats)} lists of matrices: it needs one of each for every component"
        )
    _refuse_twins(names, "exog_vc has two components called")
    formulas = {}
    for name, colnames, mats in zip(given.names, given.colnames, given.mats, strict=True):
        if len(mats) != len(positions) or len(colnames) != len(mats):
            raise DataError(
                f"exog_vc: component {name!r} has {len(mats)} matrices and {len(colnames)} lists "
                f"of names for {len(positions)} groups"
            )
        blocks = [
            _block(name, label, mat, own, rows)
            for (label, rows), mat, own in zip(positions.items(), mats, colnames, strict=True)
        ]
        formulas[str(name)] = _component(str(name), blocks, columns, n)
    return formulas


def _from_mapping(given: Mapping[Any, Any], labels: Sequence[Any]) -> VCSpec:
    """Statsmodels' old form: component -> group -> matrix; names sorted."""
    names = sorted(given)
    mats, colnames = [], []
    for name in names:
        own = given[name]
        for label in labels:
            if label not in own:
                raise DataError(f"exog_vc: component {name!r} has no matrix for group {label}")
        for label in own.keys() - set(labels):
            raise DataError(f"exog_vc: component {name!r} has a matrix for {label!r}, no group")
        mats.append([own[label] for label in labels])
        colnames.append([[f"{name}[{j}]" for j in range(np.shape(m)[1])] for m in mats[-1]])
    return VCSpec(names, colnames, mats)


@dataclass(frozen=True, slots=True)
class _Block:
    """One component's columns in one group: rows (n_i,), matrix (n_i, m_i), names."""

    rows: Any
    matrix: Any
    names: list[str]


def _block(name: Any, label: Any, mat: Any, names: Sequence[str], rows: Any) -> _Block:
    matrix: Any = np.asarray(mat) if not bool(sparse.issparse(mat)) else sparse.csr_array(mat)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.shape[0] != len(rows):
        raise DataError(
            f"exog_vc: component {name!r} has a matrix of shape {matrix.shape} for group "
            f"{label}, which has {len(rows)} rows"
        )
    if len(names) != matrix.shape[1]:
        raise DataError(
            f"exog_vc: component {name!r} has {len(names)} names for {matrix.shape[1]} columns "
            f"in group {label}"
        )
    if matrix.dtype.kind not in "biuf":
        raise DataError(f"exog_vc: component {name!r} has a matrix of type {matrix.dtype}")
    own = [str(x) for x in names]
    _refuse_twins(own, f"exog_vc: component {name!r} has, in group {label}, two columns called")
    return _Block(rows, matrix, own)


def _refuse_twins(names: Sequence[str], complaint: str) -> None:
    """Refuse a name that is there twice."""
    if len(set(names)) < len(names):
        twin = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{complaint} {twin!r}: rename one")


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of a component that are not zero: row of the data, group, column, value."""

    rows: Any
    groups: Any
    columns: Any
    values: Any

    @classmethod
    def of(cls, blocks: Sequence[_Block]) -> _Entries:
        found = []
        for g, block in enumerate(blocks):
            matrix = block.matrix
            if isinstance(matrix, np.ndarray):
                at: Any = np.nonzero(matrix)
                i, j, values = at[0], at[1], matrix[at]
            else:
                i, j, values = sparse.find(matrix)
            found.append((block.rows[i], np.full(len(i), g), j, values))
        return cls(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _component(name: str, blocks: Sequence[_Block], columns: dict[str, Any], n: int) -> str:
    """Formula of a component: levels with a weight where no row has two columns, else numbers."""
    entries = _Entries.of(blocks)
    if np.bincount(entries.rows).max(initial=0) <= 1 and any(len(b.names) > 1 for b in blocks):
        return _levels(name, blocks, entries, columns, n)
    widest = max(blocks, key=lambda block: len(block.names))
    if not widest.names:
        raise DataError(f"exog_vc: component {name!r} has no columns: leave it out")
    names = []
    for j, shown in enumerate(widest.names):
        column, own = np.zeros(n), entries.columns == j
        column[entries.rows[own]] = entries.values[own]
        key = VC_COLUMN + shown.replace("`", "'")
        while key in columns:
            key += "_"
        columns[key] = column
        names.append(key)
    return " + ".join(["0", *(f"`{key}`" for key in names)])


def _levels(
    name: str, blocks: Sequence[_Block], entries: _Entries, columns: dict[str, Any], n: int
) -> str:
    level, weight = np.empty(n, dtype=object), np.zeros(n)
    names = np.array([x for block in blocks for x in block.names] + [""], dtype=object)
    widths = np.array([len(block.names) for block in blocks])
    first = np.cumsum(widths) - widths
    whose = np.repeat(np.arange(len(blocks)), [len(block.rows) for block in blocks])
    # A row without an entry has weight zero: which of its group's levels it has is all the same
    default = np.where(widths > 0, first, len(names) - 1)
    level[np.concatenate([block.rows for block in blocks])] = names[default[whose]]
    level[entries.rows] = names[first[entries.groups] + entries.columns]
    weight[entries.rows] = entries.values
    key = f"{VC_LEVEL}{name}"
    columns[key] = level
    if (weight == 1.0).all():
        return f"0 + `{key}`"
    columns[f"(weights) {name}"] = weight
    return f"0 + `{key}`:`(weights) {name}`"
