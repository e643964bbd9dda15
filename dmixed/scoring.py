"""Predictions as one SELECT: the fixed part from columns of a table, joined to tables of BLUPs.

X beta is F (T beta), F being indicators of cells times powers of shifted and scaled variables, so
contrasts, poly, scale and center are numbers in T beta, and SQL computes the variables alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmixed.blocks import Column, Floats
from dmixed.design import Design
from dmixed.design.spans import Category
from dmixed.effects import key_columns
from dmixed.errors import DataError, NotSupportedError
from dmixed.formula.expressions import Call, Name, Node, columns_of, walk
from dmixed.sqlwords import (
    Expressions,
    Sql,
    binary,
    call,
    cases,
    chain,
    column,
    finite,
    level,
    name,
    number,
    power,
    words,
)

ROWS = "d"
"""Alias of the table of rows."""


@dataclass(frozen=True, slots=True)
class BlupTable:
    """A table of BLUPs of one factor, as ``ranef_table`` writes it.

    Attributes
    ----------
    label
        of the factor, ``h:g``
    keys
        names of the model's keys
    effects
        for each bar its position among the bars, and the names of its columns
    """

    label: str
    keys: tuple[str, ...]
    effects: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def key_columns(self) -> tuple[str, ...]:
        """Names that the keys have in the table."""
        return key_columns(self.keys, [x for _, names in self.effects for x in names], True)


def scoring(
    design: Design,
    coefficients: Floats,
    blups: Sequence[BlupTable],
    names: Mapping[str, str],
    table: str | Sequence[str],
    dialect: str,
    groups: bool,
) -> str:
    """The statement.

    Parameters
    ----------
    design
        learned in the fit
    coefficients
        (p0,) beta of all columns of X, zero for those left out
    blups, names
        tables of the factors, and what they are called in the database, by label
    table
        of the rows: a name, or its parts
    dialect
        "ansi" or one of sqlglot's
    groups
        with random effects and offset

    Raises
    ------
    DmixedError
        sqlglot is not installed
    DataError
        the dialect is not known, or a name cannot be written
    NotSupportedError
        a term has no counterpart in SQL, named
    """
    exp = words()
    _check_dialect(dialect)
    query = _Query(design, Expressions(ROWS, design.spec.text_columns))
    parts, joins = [query.part(_coefficients(design, coefficients))], []
    if groups:
        for i, factor in enumerate(blups):
            alias = f"b{i}"
            parts += query.effects(factor, alias)
            joins.append(_join(factor, alias, names[factor.label]))
        if design.spec.offset is not None:
            parts.append(query.rows.number(design.spec.offset))
    value = cases([(query.complete(groups), chain("+", parts))])
    rows = exp.Table(**_parts(table), alias=exp.TableAlias(this=name(ROWS)))
    star = exp.Column(this=exp.Star(), table=name(ROWS))
    selected = exp.select(star, exp.alias_(value, "predicted", quoted=True)).from_(rows)
    for join in joins:
        selected.append("joins", join)
    return str(selected.sql(dialect="" if dialect == "ansi" else dialect, pretty=True))


def _check_dialect(dialect: str) -> None:
    from sqlglot.dialects import Dialect, Dialects

    known = sorted(x.value for x in Dialects if x.value)
    if not isinstance(dialect, str) or (dialect != "ansi" and dialect not in known):
        raise DataError(f"dialect={dialect!r}: must be ansi, {', '.join(known)}")
    Dialect.get_or_raise("" if dialect == "ansi" else dialect)


def _parts(table: str | Sequence[str]) -> dict[str, Any]:
    """Quoted parts of the name of a table: catalogue, schema, table."""
    given = [table] if isinstance(table, str) else list(table)
    if not 1 <= len(given) <= 3 or not all(isinstance(x, str) for x in given):
        raise DataError(f"table={table!r}: must be a name, or (schema, name)")
    return dict(zip(("this", "db", "catalog"), [name(x) for x in reversed(given)], strict=False))


def _join(factor: BlupTable, alias: str, table: str) -> Sql:
    exp = words()
    pairs = zip(factor.keys, factor.key_columns, strict=True)
    on = chain("and", [binary("==", column(a, ROWS), column(b, alias)) for a, b in pairs])
    this = exp.Table(this=name(table), alias=exp.TableAlias(this=name(alias)))
    return exp.Join(this=this, side="LEFT", on=on)


def _coefficients(design: Design, beta: Floats) -> dict[Column, float]:
    """Coefficients of the carried columns in X beta."""
    p = len(beta)
    T = np.vstack([design.T_fixed, design.T_unmet[:, :p]])
    return dict(zip((*design.columns, *design.unmet), (T @ beta).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Query:
    """Pieces of the statement for the rows of a table."""

    design: Design
    rows: Expressions

    def part(self, coefficients: Mapping[Column, float]) -> Sql:
        """Sum of carried columns times coefficients: a CASE over the cells of each set."""
        cells: dict[tuple[str, ...], dict[Any, list[Sql]]] = {}
        for column_, value in coefficients.items():
            if value != 0.0:
                names = tuple(x for x, _ in column_.cell)
                own = cells.setdefault(names, {}).setdefault(column_.cell, [])
                own.append(self._product(column_.powers, value))
        parts = []
        for names, found in cells.items():
            sums = {cell: chain("+", terms) for cell, terms in found.items()}
            if not names:
                parts.append(sums[()])
                continue
            pairs = [
                (chain("and", [self._is(x, value) for x, value in cell]), total)
                for cell, total in sums.items()
            ]
            parts.append(cases(pairs, number(0.0)))
        return chain("+", parts) if parts else number(0.0)

    def effects(self, factor: BlupTable, alias: str) -> list[Sql]:
        """Random columns times BLUPs of one factor; zero where there is no row of it."""
        parts = []
        for block, names in factor.effects:
            (term,) = (t for t in self.design.terms if t.block == block)
            before = self.design.T_fixed.shape[1]
            for other in self.design.terms:
                if other is term:
                    break
                before += len(other.names)
            for j, effect in enumerate(names):
                T = np.append(term.T[:, j], self.design.T_unmet[:, before + j])
                columns = (*self.design.columns, *self.design.unmet)
                own = self.part(dict(zip(columns, T.tolist(), strict=True)))
                blup = call("coalesce", column(effect, alias), number(0.0))
                parts.append(blup if own == number(1.0) else binary("*", blup, own))
        return parts

    def _product(self, powers: Sequence[tuple[str, int]], value: float) -> Sql:
        factors = [number(value)]
        if powers and value == 1.0:
            factors = []
        for variable, exponent in powers:
            shift, scale = self.design.spec.frame.of(variable)
            u = self._variable(variable)
            u = binary("-", u, number(shift)) if shift else u
            u = binary("/", u, number(scale)) if scale != 1.0 else u
            factors.append(power(u, exponent))
        return chain("*", factors)

    def _variable(self, variable: str) -> Sql:
        found = {x.name: x for x in self.design.spec.variables}[variable]
        if found.part >= 0:
            raise NotSupportedError(
                f"{variable}: splines have no counterpart in SQL; compute the columns before the "
                "fit, or use predict()"
            )
        return self._value(found.node)

    def _value(self, node: Node) -> Sql:
        """SQL of an expression, in which no function of the caller's may be."""
        own = self.design.spec.context
        for inner in walk(node):
            if isinstance(inner, Call) and inner.function in own:
                raise NotSupportedError(
                    f"{inner.text}: SQL does not know the function {inner.function!r} of the "
                    "caller's; compute the column before the fit, or use predict()"
                )
        return self.rows.value(node)

    def _category(self, category: Category) -> Sql:
        if isinstance(category.node, Name):
            return column(category.node.column, ROWS)
        return self._value(category.node)

    def _is(self, category: str, value: Any) -> Sql:
        (found,) = (x for x in self.design.spec.categories if x.name == category)
        own = self._category(found)
        if isinstance(found.node, Name):
            return binary("==", own, level(value))
        return binary("==", own, number(float(value)))

    def complete(self, groups: bool) -> Sql:
        """Whether a row has all that its prediction needs."""
        spec = self.design.spec
        conditions: dict[str, Sql] = {}

        def need(columns: Sequence[str]) -> None:
            for x in columns:
                conditions.setdefault(x, self.rows.present(x))

        for item in spec.inputs[1:] if groups else spec.fixed_inputs:
            if isinstance(item, Category):
                levels = self.design.levels[item.name]
                if not isinstance(item.node, Name):
                    need(columns_of(item.node))
                known = [self._is(item.name, x) for x in levels]
                conditions[f"level {item.name}"] = chain("or", known)
                continue
            need(columns_of(item.node))
            if not isinstance(item.node, Name):
                value = self._variable(item.name)
                conditions[f"value {item.name}"] = finite(value)
        if groups and spec.offset is not None:
            need([spec.offset])
        found = list(conditions.values())
        return chain("and", found) if found else binary("==", number(1.0), number(1.0))
