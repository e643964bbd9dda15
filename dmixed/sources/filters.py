"""Filters: which rows are wanted, as Arrow evaluates it, and what may be left unread for it.

A filter keeps the rows for which it is true; where it is null, because a value is, the row is
not wanted. What statistics and folders exclude is decided when reading is planned, so that the
answer is the same however the rows are spread over files.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from dmixed.errors import DataError
from dmixed.sources.base import check_columns

Condition: TypeAlias = tuple[str, str, Any]

OPERATORS = ("==", "=", "!=", "<", "<=", ">", ">=", "in", "not in")
_SYNTAX = (
    'filters are a list of (column, operator, value), as [("year", ">=", 2024)], or a list of such '
    "lists of which one must hold, or a pyarrow.compute.Expression"
)
# What is false of NaN, of which statistics of a column of floats know nothing.
_FALSE_OF_NAN = {"and", "or", "is_in"}
_NEGATED = {"!=", "not in"}


@dataclass(frozen=True, slots=True)
class Filter:
    """Rows that are wanted.

    Attributes
    ----------
    expression
        as Arrow evaluates it
    alternatives
        the conditions it was made of: all of one of these tuples must hold; None for an Expression
    """

    expression: pc.Expression
    alternatives: tuple[tuple[Condition, ...], ...] | None = None

    def columns(self, schema: pa.Schema) -> tuple[str, ...]:
        """Columns that it names, of those in a schema.

        Raises
        ------
        DataError
            one is not there, or there more than once
        """
        if self.alternatives is not None:
            names = [c for some in self.alternatives for c, _, _ in some]
            return _checked(names, schema.names)
        text = str(self.expression)
        if "FieldPath(" in text:
            raise DataError(f"filters must name their columns, not count them: {text}")
        # a name that it uses is somewhere in its text; without that column it cannot be bound
        some = [n for n in dict.fromkeys(schema.names) if isinstance(n, str) and n in text]
        known = {n: schema.field(schema.names.index(n)) for n in some}
        error = _binding_error(self.expression, pa.schema(list(known.values())))
        missing = re.search(r"No match for FieldRef\.Name\((.*?)\) in ", str(error), re.DOTALL)
        if missing is not None:
            return _checked([missing[1]], schema.names)
        if error is not None:
            raise _unusable(error)
        used = [n for n in known if self._needs(n, known)]
        return _checked(used, schema.names)

    def _needs(self, name: str, known: Mapping[str, pa.Field]) -> bool:
        """Whether it cannot be bound without one of the columns."""
        others = pa.schema([kind for other, kind in known.items() if other != name])
        return _binding_error(self.expression, others) is not None

    def check(self, schema: pa.Schema) -> None:
        """Refuse what cannot be evaluated on columns of these types."""
        error = _binding_error(self.expression, schema)
        if error is not None:
            raise _unusable(error)

    def spares(self, schema: pa.Schema) -> bool:
        """Whether statistics may exclude rows: they know nothing of NaN.

        ``x != 3`` is true of NaN, which a row group with nothing but 3 in its statistics may hold.
        """
        if not any(pa.types.is_floating(kind) for kind in schema.types):
            return True
        if self.alternatives is not None:
            return all(op not in _NEGATED for some in self.alternatives for _, op, _ in some)
        text = str(self.expression)
        called = set(re.findall(r"(\w+)\(", text))
        return "!=" not in text and called <= _FALSE_OF_NAN

    def excludes(self, values: Mapping[str, Any], schema: pa.Schema) -> bool:
        """Whether no row can be wanted where some columns have these values."""
        equations = [
            ds.field(name).is_null()
            if value is None
            else ds.field(name) == pa.scalar(value, _plain(schema.field(name).type))
            for name, value in values.items()
            if name in schema.names
        ]
        if not equations:
            return False
        form, files = ds.ParquetFileFormat(), pa.fs.LocalFileSystem()
        folder = form.make_fragment("folder", files, reduce(and_, equations))
        dataset = ds.FileSystemDataset([folder], schema, form, files)
        return not list(dataset.get_fragments(filter=self.expression))


def make_filter(filters: Any) -> Filter:
    """Filter from an Expression or the lists of tuples that ``pandas.read_parquet`` takes.

    Raises
    ------
    DataError
        it is neither
    """
    if isinstance(filters, pc.Expression):
        return Filter(filters)
    if not isinstance(filters, list | tuple) or not filters:
        raise DataError(f"filters={filters!r} cannot be read: {_SYNTAX}")
    if isinstance(filters, tuple):
        filters = [filters]
    nested = [list] * len(filters) == [type(some) for some in filters]
    alternatives = tuple(
        tuple(_condition(one) for one in some) for some in (filters if nested else [filters])
    )
    if not all(alternatives):
        raise DataError(f"filters={filters!r} cannot be read: {_SYNTAX}")
    try:
        expression = pq.filters_to_expression([list(some) for some in alternatives])
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"filters={filters!r} cannot be read: {error}") from None
    return Filter(expression, alternatives)


def _condition(given: Any) -> Condition:
    """One condition, its operator and value checked."""
    if not isinstance(given, tuple) or len(given) != 3 or not isinstance(given[0], str):
        raise DataError(f"{given!r} in filters cannot be read: {_SYNTAX}")
    column, operator, value = given
    if operator not in OPERATORS:
        raise DataError(f"operator {operator!r} in filters must be one of {', '.join(OPERATORS)}")
    if operator in ("in", "not in"):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise DataError(f"filters: {column!r} {operator} needs a list of values, not {value!r}")
        value = [_plain_value(column, x) for x in value]
        if not value:
            raise DataError(f"filters: {column!r} {operator} needs at least one value")
    else:
        value = _plain_value(column, value)
    return column, "==" if operator == "=" else operator, value


def _plain_value(column: str, value: Any) -> Any:
    """Value of Python's types; nothing equals a missing one."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value != value:
        raise DataError(
            f"filters: a missing value equals nothing; pyarrow.compute.field({column!r}) has "
            "is_null() and is_valid()"
        )
    return value


def _checked(names: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    try:
        return check_columns(names, available)
    except DataError as error:
        raise DataError(f"filters: {error}") from None


def _binding_error(expression: pc.Expression, schema: pa.Schema) -> Exception | None:
    """What is wrong with it for columns of these types."""
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowException, ValueError, TypeError) as error:
        return error
    return None


def _unusable(error: Exception) -> DataError:
    return DataError(f"filters cannot be applied to these columns: {str(error).splitlines()[0]}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """Type of the values of categories."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def kept(table: pa.Table, expression: pc.Expression) -> pa.Table:
    """Rows that are wanted, in their order."""
    size = max(len(table), 1)  # one batch stays one
    scanner = ds.dataset(table).scanner(filter=expression, batch_size=size, use_threads=False)
    return scanner.to_table()


# --------------------------------------------------------------------------- text

_TEXT = re.compile(
    r"\s*(?:`(?P<quoted>[^`]+)`|(?P<column>[^`'\"<>=!]+?))\s*(?P<operator>==|!=|<=|>=|<|>)"
    r"\s*(?P<literal>\S|\S.*\S)\s*",
    re.DOTALL,
)
_LITERALS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"[+-]?\d+"), int),
    (re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?"), float),
    (re.compile(r"'([^']|'')*'"), lambda text: text[1:-1].replace("''", "'")),
    (re.compile(r'"([^"]|"")*"'), lambda text: text[1:-1].replace('""', '"')),
    (re.compile(r"true|false"), lambda text: text == "true"),
    (re.compile(r"\d{4}-\d{2}-\d{2}"), dt.date.fromisoformat),
)


def parse_filter(text: str) -> Condition:
    """One condition from text: ``column operator literal``.

    The operator is ``== != < <= > >=``; the literal a number, 'text' (a quote in it is doubled),
    true, false or a date 2024-12-31. A column whose name has signs of these goes in `backquotes`.

    Raises
    ------
    DataError
        it is something else
    """
    found = _TEXT.fullmatch(text)
    if found is not None:
        for pattern, value in _LITERALS:
            if pattern.fullmatch(found["literal"]):
                try:
                    literal = value(found["literal"])
                except ValueError as error:
                    raise DataError(f"filter {text!r}: {error}") from None
                return found["quoted"] or found["column"], found["operator"], literal
    raise DataError(
        f'filter {text!r} cannot be read: write COLUMN OPERATOR VALUE, as "year >= 2024" or '
        "\"site == 'a'\"; operators are == != < <= > >=, a value is a number, 'text', true, "
        "false or a date 2024-12-31"
    )
