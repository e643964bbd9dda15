"""Columns that are known after the pass: of groups, or of rows about the mean of their group.

They are numbers or categories for each cell of some moments, so that products with carried columns
need no row (`derived`). What they are called is a name that formulas on the moments may use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmixed import keys
from dmixed.blocks import Column, Floats
from dmixed.cellmoments import CellMoments
from dmixed.design import DesignSpec
from dmixed.design.columns import Rows, kind_of
from dmixed.erasure import has_crossproducts, without
from dmixed.errors import DataError, NotSupportedError
from dmixed.formula import parse_terms
from dmixed.formula.expressions import Name, Node
from dmixed.formula.polynomials import ONE, Expansion, Polynomial, shown_powers
from dmixed.sources import open_source, stream

CONSTANT_WITHIN = 1e-12
"""Share of a sum of squares within groups that is rounding."""

SHOWN = 5
"""Groups that a message names."""


@dataclass(frozen=True, slots=True, eq=False)
class Within:
    """A quantity of rows about its mean over the rows of a group.

    Attributes
    ----------
    polynomial
        the quantity in carried variables, without its constant
    mean
        (N,) its mean in the group of each cell
    scale
        a power of two near its standard deviation within groups
    """

    polynomial: Polynomial
    mean: Floats
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class GroupColumns:
    """Columns known of N cells, by name.

    Attributes
    ----------
    values
        Arrow arrays (N,) of numbers or categories, without missing values
    within
        columns of rows about the means of their groups
    """

    values: Mapping[str, pa.Array] = field(default_factory=dict)
    within: Mapping[str, Within] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (*self.values, *self.within)

    def __bool__(self) -> bool:
        return bool(self.names)

    def table(self, spec: DesignSpec, labels: keys.Labels) -> pa.Table:
        """Values, and the key columns, of N cells with these labels."""
        own = {
            key.node.column: array
            for key, array in zip(spec.keys, labels.arrays, strict=True)
            if isinstance(key.node, Name)
        }
        return pa.table({**own, **self.values})

    def take(self, cells: NDArray[np.intp]) -> GroupColumns:
        """Those of some cells."""
        at = pa.array(cells)
        within = {n: replace(w, mean=w.mean[cells]) for n, w in self.within.items()}
        return GroupColumns({n: a.take(at) for n, a in self.values.items()}, within)


def joined(
    cells: CellMoments,
    known: GroupColumns,
    data: Any,
    on: str | Sequence[str] | None,
    columns: Sequence[str] | None,
    missing: str,
) -> tuple[CellMoments, GroupColumns]:
    """Columns of some data with one row per group, looked up by key; and the cells that have one.

    Raises
    ------
    DataError
        a key is there twice or not at all, or a value is missing
    """
    if missing not in ("raise", "drop"):
        raise DataError(f'missing={missing!r}: must be "raise" or "drop"')
    source = open_source(data)
    if source.kind == "dask":
        raise DataError("data to join stand in memory or in files: give `frame.compute()`")
    names = _key_names(cells.spec, on, source.columns)
    given = [c for c in source.columns if c not in names] if columns is None else list(columns)
    if not given:
        raise DataError("the data to join have no column beside the keys")
    for name in (*names, *given):
        if name not in source.columns:
            raise DataError(f"the data to join have no column {name!r}")
    for name in given:
        check_name(name, cells.spec, known)
    wanted = tuple(dict.fromkeys((*names, *given)))
    tables = [table for part in source.parts(wanted) for table in stream(part)]
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    rows, labels = _rows_of_keys(table, names)
    codes, own = keys.subset(cells.labels, [cells.spec.group.index(n) for n in names])
    at = keys.lookup(labels, own)
    absent = at < 0
    if absent.any() and missing == "raise":
        raise DataError(
            f"the data to join have no row for {_named_groups(own, absent)}; "
            'missing="drop" takes their rows out of the moments, where these are sums of '
            "all columns by group"
        )
    found = {name: table.column(name).take(pa.array(rows[np.maximum(at, 0)])) for name in given}
    bad = absent.copy()
    for name, values in found.items():
        lacks = _missing(values, name) & ~absent
        if lacks.any() and missing == "raise":
            raise DataError(
                f"the column {name!r} to join is missing for {_named_groups(own, lacks)}; "
                'fill it in, or give missing="drop"'
            )
        bad |= lacks
    if bad.any():
        gone = bad[codes]
        cells = _without(cells, gone, "no value to join")
        known, codes = known.take(np.flatnonzero(~gone)), codes[~gone]
    own_rows = pa.array(codes)
    values = {name: _array(column).take(own_rows) for name, column in found.items()}
    return cells, replace(known, values={**known.values, **values})


def _key_names(
    spec: DesignSpec, on: str | Sequence[str] | None, columns: Sequence[str]
) -> tuple[str, ...]:
    """Keys by which columns are joined."""
    if on is None:
        return by_keys(spec, tuple(n for n in spec.group if n in columns) or None)
    return by_keys(spec, on)


def by_keys(spec: DesignSpec, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of keys, checked; of all if there is one grouping factor.

    Raises
    ------
    DataError
        they are not keys, or it is not said which
    """
    if by is None:
        if len({term.key for term in spec.terms}) > 1:
            raise DataError(
                f"there are several grouping factors, of the keys {', '.join(spec.group)}: "
                "say which"
            )
        return spec.group
    names = (by,) if isinstance(by, str) else tuple(by)
    for name in names:
        if name not in spec.group:
            raise DataError(f"{name!r} is not a key of the groups ({', '.join(spec.group)})")
    if not names:
        raise DataError("name at least one key of the groups")
    return names


def check_name(name: str, spec: DesignSpec, known: GroupColumns) -> None:
    """Refuse a name that something else has."""
    if not isinstance(name, str) or not name:
        raise DataError(f"the name of a column is text, not {name!r}")
    if name in spec.columns or name in known.names:
        raise DataError(f"the moments have a column {name!r} already; give another name")


def _rows_of_keys(table: pa.Table, names: Sequence[str]) -> tuple[NDArray[np.intp], keys.Labels]:
    """First row of each key, and the keys; each is there once."""
    codes, labels = keys.encode([table.column(name) for name in names], names)
    rows = np.flatnonzero(codes >= 0)
    times = np.bincount(codes[rows], minlength=len(labels))
    if (times > 1).any():
        raise DataError(
            f"the data to join have more than one row for {_named_groups(labels, times > 1)}"
        )
    at = np.zeros(len(labels), np.intp)
    at[codes[rows]] = rows
    return at, labels


def _missing(values: pa.ChunkedArray, name: str) -> NDArray[np.bool_]:
    """(n,) where values are missing or not finite."""
    kind = kind_of(values.type)
    if kind is None:
        raise DataError(
            f"the column {name!r} to join has type {values.type}: convert it to text or a number"
        )
    rows = Rows(pa.table({name: values}))
    if kind == "number":
        return ~np.isfinite(rows.number(name))
    lacks = rows.missing(name)
    return np.zeros(len(values), np.bool_) if lacks is None else lacks


def _array(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


def _named_groups(labels: keys.Labels, which: NDArray[np.bool_]) -> str:
    """Some groups, for a message: ``g = 3, 8 and 5 more``."""
    at = np.flatnonzero(which)
    first = labels.take(at[:SHOWN])
    shown = [
        ":".join(str(x) for x in row)
        for row in zip(*(a.to_pylist() for a in first.arrays), strict=True)
    ]
    rest = f" and {len(at) - len(shown):,} more" if len(at) > len(shown) else ""
    return f"{':'.join(labels.names)} = {', '.join(shown)}{rest}"


def _without(cells: CellMoments, gone: NDArray[np.bool_], reason: str) -> CellMoments:
    if not has_crossproducts(cells):
        raise NotSupportedError(
            "groups can be taken out of moments only where all columns are summed by group, "
            "without weights: collect them with group_crossproducts=True"
        )
    return without(cells, gone, reason)


class _Units:
    """Shifts and scales of carried variables; nothing is learned from rows (`Statistics`)."""

    def __init__(self, spec: DesignSpec, what: str) -> None:
        self.spec, self.what = spec, what

    def affine(self, variable: str) -> tuple[float, float]:
        if variable not in self.spec.frame.names:
            raise DataError(f"{self.what}: the moments have no column {variable!r}; carry it")
        return self.spec.frame.of(variable)

    def moments(self, polynomials: Sequence[Polynomial]) -> tuple[Floats, float]:
        raise DataError(f"{self.what}: give a column, or sums and products of columns")


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """A quantity of rows, and its mean over the rows of each group.

    Attributes
    ----------
    name
        of a column with the means, or of one of the differences from them
    polynomial
        the quantity in carried variables
    mean
        (N,) mean of the quantity without its constant, in the group of each cell
    """

    name: str
    polynomial: Polynomial
    mean: Floats

    @property
    def rest(self) -> Polynomial:
        """The quantity without its constant."""
        return {m: value for m, value in self.polynomial.items() if m != ONE}

    @property
    def values(self) -> Floats:
        """(N,) means of the quantity itself."""
        return np.asarray(self.mean + self.polynomial.get(ONE, 0.0))


def means(
    cells: CellMoments,
    known: GroupColumns,
    text: str,
    name: str | None,
    by: str | Sequence[str] | None,
    suffix: str,
) -> Means:
    """Means of a numeric column, or of an expression in carried ones, by some keys.

    Raises
    ------
    DataError
        it is not a quantity, or its products are not carried
    """
    spec = cells.spec
    terms = parse_terms([text], "column", spec.columns, spec.context)
    if len(terms) != 1 or len(terms[0].factors) != 1:
        raise DataError(f"{text!r}: name one column, or write I() around an expression")
    node: Node = terms[0].factors[0]
    polynomial = Expansion(_Units(spec, text)).polynomial(node)
    if name is None:
        if not isinstance(node, Name):
            raise DataError(f"{text!r} is an expression: say what to call the new column (name=)")
        name = f"{node.column}_{suffix}"
    check_name(name, spec, known)
    t = np.zeros(len(cells.group.columns))
    position = {c: j for j, c in enumerate(cells.group.columns)}
    for monomial, value in polynomial.items():
        if monomial == ONE:
            continue
        if Column((), monomial) not in position:
            raise DataError(
                f"{text}: the moments have no column {shown_powers(monomial)}; carry it"
            )
        t[position[Column((), monomial)]] = value
    codes, own = keys.subset(cells.labels, [spec.group.index(n) for n in by_keys(spec, by)])
    return Means(name, polynomial, _means(cells, t, codes, len(own)))


def _means(cells: CellMoments, t: Floats, codes: NDArray[np.int64], n_groups: int) -> Floats:
    """(N,) mean of F t in the group of each cell."""
    group = cells.group
    own = group.coded(t)
    n = group.WtF[:, 0, group.random[0]]
    sums = group.WtF[:, 0] @ own
    if group.reference is not None:
        sums = sums + n * (group.reference.astype(np.float64) @ own)
    if n_groups < len(codes):
        both = [np.bincount(codes, of_cells, n_groups) for of_cells in (sums, n)]
        return np.asarray((both[0] / both[1])[codes])
    return np.asarray(sums / n)


def with_means(known: GroupColumns, found: Means) -> GroupColumns:
    """The same and a column of means."""
    return replace(known, values={**known.values, found.name: pa.array(found.values)})


def with_within(cells: CellMoments, known: GroupColumns, found: Means) -> GroupColumns:
    """The same and a column of differences from means."""
    group = cells.group
    rest = found.rest
    t = np.zeros(len(group.columns))
    for monomial, value in rest.items():
        t[group.columns.index(Column((), monomial))] = value
    own = group.coded(t)
    n, sums, about = group.WtF[:, 0, group.random[0]], group.WtF[:, 0] @ own, found.mean
    if group.reference is not None:  # of sums about references nothing is lost
        about = about - group.reference.astype(np.float64) @ own
    total = float(own @ group.FtF @ own) / float(n.sum())
    square = total + float(n @ about**2 - 2.0 * (about @ sums)) / float(n.sum())
    if not square > CONSTANT_WITHIN * total:
        raise DataError(f"{found.name}: the values are all the same within the groups")
    scale = 2.0 ** round(np.log2(square) / 2)
    within = Within(rest, found.mean, scale)
    return replace(known, within={**known.within, found.name: within})
