"""Columns of a batch as numpy: numbers as float64, categories as codes; expressions of them.

Numbers are read without a copy where Arrow allows it. Missing values are NaN in numbers and -1 in
codes; who drops the rows is `design`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from formulaic.transforms import basis_spline, cyclic_cubic_spline, natural_cubic_spline
from numpy.typing import NDArray

from dmixed.blocks import Codes, Floats, Level
from dmixed.errors import DataError
from dmixed.formula.expressions import Call, Literal, Name, Node, Operation
from dmixed.formula.polynomials import Variable
from dmixed.formula.vocabulary import ELEMENTWISE

MAX_LEVELS = 2000
MAX_CATEGORIES = 10_000
"""Declared categories beyond this number are taken as undeclared: their order is not kept."""

Context: TypeAlias = Mapping[str, Callable[..., Any]]

_SPLINES = {"bs": basis_spline, "cr": natural_cubic_spline, "cs": natural_cubic_spline}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.true_divide,
    "//": np.floor_divide,
    "%": np.mod,
    "**": np.float_power,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}

_CONDITIONS = ("<", "<=", ">", ">=", "==", "!=")


def kind_of(type_: pa.DataType) -> str | None:
    """Say "number", "category" or "null", or None for a type that cannot be a covariate."""
    t = pa.types
    if t.is_null(type_):
        return "null"
    if t.is_integer(type_) or t.is_floating(type_) or t.is_decimal(type_):
        return "number"
    if t.is_string(type_) or t.is_large_string(type_) or t.is_string_view(type_):
        return "category"
    if t.is_boolean(type_):
        return "category"
    if t.is_dictionary(type_) and kind_of(type_.value_type) in ("number", "category", "null"):
        return "category"
    return None


@dataclass(frozen=True, slots=True)
class Factor:
    """Categories of the rows of a batch.

    Attributes
    ----------
    codes
        (n,) position in `levels`, -1 where missing
    levels
        the categories that the codes refer to, met or not
    declared
        whether the column's type declares its categories and their order
    """

    codes: Codes
    levels: tuple[Level, ...]
    declared: bool


@dataclass
class Rows:
    """One batch, read column by column; each column is read once.

    Attributes
    ----------
    table
        the batch
    context
        the caller's functions
    where
        which batch, for messages
    """

    table: pa.Table
    context: Context = field(default_factory=dict)
    where: str = ""
    _numbers: dict[str, Floats] = field(default_factory=dict)
    _norms: dict[str, float] = field(default_factory=dict)
    _factors: dict[Node, Factor] = field(default_factory=dict)
    _splines: dict[Node, list[Floats]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    @property
    def place(self) -> str:
        """`` (partition 3)`` for messages, or nothing."""
        return f" ({self.where})" if self.where else ""

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it is."""
        index = self.table.schema.get_field_index(name)
        if index < 0:
            raise DataError(f"there is no column {name!r} in the data{self.place}")
        return self.table.column(index)

    def number(self, name: str) -> Floats:
        """(n,) a numeric or boolean column; NaN where it is null."""
        if name not in self._numbers:
            column = self.column(name)
            kind = kind_of(column.type)
            if kind is None:
                raise DataError(
                    f"column {name!r} has type {column.type}{self.place}: convert it to a number"
                )
            if kind == "category" and not pa.types.is_boolean(column.type):
                raise DataError(
                    f"column {name!r} has type {column.type}{self.place} where a number is needed: "
                    "convert it to a number"
                )
            self._numbers[name] = _floats(column)
        return self._numbers[name]

    def key(self, node: Node) -> pa.ChunkedArray:
        """(n,) a column as it is, or the values of an expression as levels, null or NaN alike."""
        if isinstance(node, Name):
            return self.column(node.column)
        return pa.chunked_array([_levels_array(node, self.evaluate(node))])

    def factor(self, node: Node) -> Factor:
        """Categories of a column, or of the values of an expression."""
        if node not in self._factors:
            name = node.column if isinstance(node, Name) else node.text
            column = self.key(node)
            if kind_of(column.type) is None:
                raise DataError(
                    f"column {name!r} has type {column.type}{self.place}: "
                    "convert it to text or a number"
                )
            self._factors[node] = _factor(column, name, self.place)
        return self._factors[node]

    def missing(self, name: str) -> NDArray[np.bool_] | None:
        """(n,) where a column is missing; None if nowhere."""
        column = self.column(name)
        if kind_of(column.type) == "category" and not pa.types.is_boolean(column.type):
            if pa.types.is_dictionary(column.type) and any(
                chunk.dictionary.null_count for chunk in column.chunks
            ):  # before pyarrow 26 is_null looks at the codes only
                column = column.cast(column.type.value_type)
            return column.is_null().to_numpy() if column.null_count else None
        return self.not_finite(self.number(name))

    def norm(self, values: Floats) -> float:
        """Euclidean norm, of a column found once; infinite where a square overflows."""
        name = next((name for name, own in self._numbers.items() if own is values), None)
        if name is None:
            return _norm(values)
        if name not in self._norms:
            self._norms[name] = _norm(values)
        return self._norms[name]

    def not_finite(self, values: Floats) -> NDArray[np.bool_] | None:
        """(n,) where values are NaN or infinite; None if nowhere, found without a mask."""
        if np.isfinite(self.norm(values)):  # twice as fast as a sum
            return None
        bad = ~np.isfinite(values)
        return bad if bad.any() else None

    def variable(self, variable: Variable) -> Floats:
        """(n,) values of a variable, not shifted."""
        if variable.part < 0:
            return self.evaluate(variable.node)
        if variable.node not in self._splines:
            assert isinstance(variable.node, Call)
            self._splines[variable.node] = self._spline(variable.node)
        return self._splines[variable.node][variable.part]

    def evaluate(self, node: Node) -> Floats:
        """(n,) values of an expression; not finite where it is not defined."""
        with np.errstate(all="ignore"):
            value = np.asarray(self._value(node), dtype=np.float64)
        return value if value.ndim else np.full(len(self), value)

    def _value(self, node: Node) -> Any:
        match node:
            case Name(column=column):
                return self.number(column)
            case Literal(value=value):
                return value
            case Operation(operator="-", operands=(inner,)):
                return np.negative(self._value(inner))
            case Operation(operands=(inner,)):
                return self._value(inner)
            case Operation(
                operator=operator,
                operands=(Name() as name, Literal(value=str() as text))
                | (Literal(value=str() as text), Name() as name),
            ):
                return self._equals(name, text, operator)
            case Operation(operator=operator, operands=(left, right)):
                a, b = self._value(left), self._value(right)
                return _keep_missing(_BINARY[operator](a, b), a, b)
            case Call(function="I", options=((_, inner),)):
                return self._value(inner)
            case Call(function=name, arguments=arguments):
                values = [self._value(x) for x in arguments]
                if name in self.context:
                    return self._own(name, node.text, values)
                return _keep_missing(ELEMENTWISE[name].function(*values), *values)
        raise AssertionError(node)

    def _equals(self, name: Name, text: str, operator: str) -> Floats:
        """1 where a column equals a string (or does not), else 0; NaN where it is missing."""
        column = self.column(name.column)
        decoded = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind_of(decoded) != "category" or pa.types.is_boolean(decoded):
            raise DataError(f"column {name.column!r} has type {decoded}{self.place}, not text")
        compare = pc.equal if operator == "==" else pc.not_equal
        return _floats(compare(column.cast(pa.large_string()), text))

    def _own(self, name: str, text: str, values: list[Any]) -> Any:
        """Result of a function of the caller's, checked to be one number per row."""
        try:
            result = np.asarray(self.context[name](*values))
            if result.dtype.kind in "biuf" and result.shape in ((), (len(self),)):
                return result
        except Exception as error:
            raise DataError(f"{text}: the function {name!r} failed{self.place}: {error}") from error
        raise DataError(
            f"{text}: the function {name!r} must give one number per row, shape ({len(self)},), "
            f"but gave {result.dtype} of shape {result.shape}{self.place}"
        )

    def _spline(self, node: Call) -> list[Floats]:
        """Columns of a spline basis with given knots; NaN where x is missing."""
        options = {key: node.value(key) for key, _ in node.options if key != "x"}
        options["knots"] = list(node.value("knots", ()))  # type: ignore[call-overload]
        argument = node.option("x")
        assert argument is not None
        x = self.evaluate(argument)
        good = np.isfinite(x)
        function = _SPLINES.get(node.function, cyclic_cubic_spline)
        low = float(node.value("lower_bound"))  # type: ignore[arg-type]
        filled = np.append(np.where(good, x, low), low)  # formulaic takes no NaN, and some rows
        try:
            basis = function(filled, **options, _state={})
        except ValueError:
            raise DataError(
                f"{node.text}: there are values beyond the bounds{self.place}; widen them, or give "
                "extrapolation='clip', 'zero', 'na' or 'extend'"
            ) from None
        return [np.where(good, np.asarray(basis[key])[:-1], np.nan) for key in basis]


def _norm(values: Floats) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.dot(values, values)))


def _keep_missing(result: Any, *values: Any) -> Any:
    """A result that is NaN wherever an argument is: comparisons would make it 0."""
    if getattr(result, "dtype", None) != np.bool_:
        return result
    result = np.asarray(result, dtype=np.float64)
    for value in values:
        if np.ndim(value) and np.isnan(value).any():
            result = np.where(np.isnan(value), np.nan, result)
    return result


def _levels_array(node: Node, values: Floats) -> pa.Array:
    """Values of an expression as levels: a condition is False or True."""
    if isinstance(node, Operation) and node.operator in _CONDITIONS:
        return pa.array(values != 0, mask=np.isnan(values))
    return pa.array(values)


def _floats(column: pa.ChunkedArray) -> Floats:
    """Float64 of a numeric column; no copy for one chunk of float64 without nulls."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if column.type != pa.float64():
        column = column.cast(pa.float64(), safe=False)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values: Floats = array.to_numpy(zero_copy_only=False)
    return values


def _factor(column: pa.ChunkedArray, name: str, place: str) -> Factor:
    """Codes and levels of a column of categories, or of numbers under ``C()``."""
    declared = pa.types.is_dictionary(column.type)
    if pa.types.is_null(column.type) or len(column) == 0:
        return Factor(np.full(len(column), -1, np.int32), (), False)
    if pa.types.is_decimal(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    column = column.unify_dictionaries() if declared else column.dictionary_encode()
    dictionary = column.chunk(0).dictionary
    chunks = [c.indices.cast(pa.int32()).fill_null(-1).to_numpy() for c in column.chunks]
    codes: Codes = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    if len(dictionary) > MAX_CATEGORIES:  # keep the categories met only
        met = np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(dictionary)))
        check_levels(name, len(met), place)
        positions = np.full(len(dictionary) + 1, -1, np.int32)
        positions[met] = np.arange(len(met))
        codes, dictionary, declared = positions[codes], dictionary.take(pa.array(met)), False
    if kind_of(dictionary.type) is None:
        raise DataError(f"column {name!r} has categories of type {dictionary.type}{place}")
    return _distinct(codes, dictionary, declared)


def _distinct(codes: Codes, dictionary: pa.Array, declared: bool) -> Factor:
    """Factor whose levels are Python values, each once, finite."""
    if pa.types.is_decimal(dictionary.type):
        dictionary = dictionary.cast(pa.float64())
    if pa.types.is_floating(dictionary.type):
        dictionary = pc.add(dictionary.cast(pa.float64()), 0.0)  # -0.0 becomes 0.0
        dictionary = pc.if_else(pc.is_finite(dictionary), dictionary, None)
    levels: dict[Level, int] = {}
    values = dictionary.to_pylist()
    positions = [-1 if v is None else levels.setdefault(v, len(levels)) for v in values]
    if len(levels) < len(values):
        codes = np.array([*positions, -1], dtype=np.int32)[codes]
    return Factor(codes, tuple(levels), declared)


def check_levels(name: str, count: int, place: str = "") -> None:
    """Refuse a factor with more levels than a fixed effect can have."""
    if count > MAX_LEVELS:
        raise DataError(
            f"{name!r} has {count} levels{place}, more than {MAX_LEVELS}: as a group it belongs "
            f"right of a bar, (1 | {name}); as a quantity, convert it to a number"
        )
