"""Expressions of a formula in SQL, as trees of ``sqlglot``; what SQL has no word for is refused.

A number that is not defined (the logarithm of a negative one) is NULL: some engines stop at it,
others have NaN. Every number is a double, and names of columns are always quoted and qualified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dmixed.blocks import Level
from dmixed.errors import DataError, DmixedError, NotSupportedError
from dmixed.formula.expressions import Call, Literal, Name, Node, Operation, constant

Sql: TypeAlias = Any
"""A tree of sqlglot."""

MAX_SIZE = 20_000
"""Nodes of the SQL of one expression: nested functions that need their argument twice double it."""

_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_COMPARED = {
    "less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "==",
    "not_equal": "!=",
}  # fmt: skip
_SAME_NAME = ("sin", "cos", "tan", "sinh", "cosh", "tanh", "atan")
_SPELLED = {"arctan": "atan", "absolute": "abs", "fabs": "abs", "arcsin": "asin", "arccos": "acos"}
_FACTORS = {
    "degrees": 180 / math.pi, "rad2deg": 180 / math.pi, "radians": math.pi / 180,
    "deg2rad": math.pi / 180,
}  # fmt: skip
_LARGEST_EXP, _SMALLEST_EXP = 709.782712893384, -745.0


def words() -> Any:
    """``sqlglot.exp``.

    Raises
    ------
    DmixedError
        sqlglot is not installed
    """
    try:
        from sqlglot import exp
    except ImportError:
        raise DmixedError(
            "to_sql needs sqlglot, which is not installed: pip install 'dmixed[sql]'"
        ) from None
    return exp


# --------------------------------------------------------------------------- small pieces


def number(value: float) -> Sql:
    """A double: with an exponent, since 1.5 alone is a decimal in some dialects."""
    exp = words()
    text = repr(abs(float(value)))
    made = exp.Literal.number(text if "e" in text else f"{text}e0")
    return exp.Paren(this=exp.Neg(this=made)) if math.copysign(1.0, value) < 0 else made


def text(value: str) -> Sql:
    """A string; one with a zero character is refused, which ends strings in some engines."""
    if "\0" in value:
        raise DataError(f"{value!r} holds a zero character: it cannot be written in SQL")
    return words().Literal.string(value)


def level(value: Level) -> Sql:
    """A level of a category, to compare a column with."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool):
        return words().Boolean(this=value)
    if isinstance(value, int):
        made = words().Literal.number(str(abs(value)))
        return words().Paren(this=words().Neg(this=made)) if value < 0 else made
    return number(value)


def name(value: str) -> Sql:
    """A quoted name."""
    if not value or "\0" in value:
        raise DataError(f"{value!r} cannot be a name in SQL")
    return words().to_identifier(value, quoted=True)


def column(value: str, table: str) -> Sql:
    """A column of a table's alias."""
    return words().Column(this=name(value), table=name(table))


def binary(kind: str, left: Sql, right: Sql) -> Sql:
    """Two operands under an operator, in parentheses where they need it."""
    exp = words()
    kinds = {
        "+": exp.Add, "-": exp.Sub, "*": exp.Mul, "<": exp.LT, "<=": exp.LTE, ">": exp.GT,
        ">=": exp.GTE, "==": exp.EQ, "!=": exp.NEQ, "and": exp.And, "or": exp.Or,
    }  # fmt: skip
    a, b = _within(left), _within(right)
    if kind == "/":
        return exp.Div(this=a, expression=b, typed=True, safe=False)
    return kinds[kind](this=a, expression=b)


def _within(tree: Sql) -> Sql:
    exp = words()
    tree = tree.copy()
    return exp.Paren(this=tree) if isinstance(tree, exp.Binary) else tree


def chain(kind: str, trees: Sequence[Sql]) -> Sql:
    """Several operands, halved again and again, so that no tree is deep."""
    if len(trees) == 1:
        return trees[0].copy()
    half = len(trees) // 2
    return binary(kind, chain(kind, trees[:half]), chain(kind, trees[half:]))


def cases(pairs: Iterable[tuple[Sql, Sql]], default: Sql | None = None) -> Sql:
    """The value of the first condition that holds; without a default NULL."""
    exp = words()
    found = [exp.If(this=a.copy(), true=b.copy()) for a, b in pairs]
    return exp.Case(ifs=found, default=default.copy() if default is not None else None)


def call(function: str, *arguments: Sql) -> Sql:
    """A function by its name."""
    exp = words()
    known = {"ln": exp.Ln, "exp": exp.Exp, "sqrt": exp.Sqrt, "abs": exp.Abs, "floor": exp.Floor}
    known["ceil"] = exp.Ceil
    if function in known:
        return known[function](this=arguments[0].copy())
    if function == "power":
        return exp.Pow(this=arguments[0].copy(), expression=arguments[1].copy())
    if function == "coalesce":
        return exp.Coalesce(this=arguments[0].copy(), expressions=[x.copy() for x in arguments[1:]])
    return exp.Anonymous(this=function.upper(), expressions=[x.copy() for x in arguments])


def quotient(a: Sql, b: Sql) -> Sql:
    """A / b; NULL where b is zero."""
    return binary("/", a, words().Nullif(this=b.copy(), expression=number(0.0)))


def truth(true: Sql, false: Sql) -> Sql:
    """1 or 0 by a condition and its opposite: NULL where neither holds."""
    return cases([(true, number(1.0)), (false, number(0.0))])


def finite(value: Sql) -> Sql:
    """Whether a double is there and neither NaN nor infinite: then it less itself is zero."""
    return binary("==", binary("-", value, value), number(0.0))


def power(x: Sql, exponent: int) -> Sql:
    """Whole power, 1 or more, as products."""
    return chain("*", [x] * exponent)


# --------------------------------------------------------------------------- expressions


@dataclass(frozen=True, slots=True)
class Expressions:
    """Numeric expressions of one row of a table.

    Attributes
    ----------
    alias
        of the table
    text_columns
        columns that are categories by their type: truth values or text
    """

    alias: str
    text_columns: frozenset[str]
    _known: dict[Node, Sql] = field(default_factory=dict, repr=False, compare=False)

    def number(self, column_name: str) -> Sql:
        """A numeric column or one of truth values as a double."""
        own = column(column_name, self.alias)
        if column_name in self.text_columns:
            return truth(own, words().Not(this=own.copy()))
        return words().cast(own, "double")

    def present(self, column_name: str) -> Sql:
        """Whether a column has a value in a row, as a fit asks of it."""
        if column_name in self.text_columns:
            exp = words()
            return exp.Not(this=exp.Is(this=column(column_name, self.alias), expression=exp.null()))
        return finite(self.number(column_name))

    def value(self, node: Node) -> Sql:
        """SQL of an expression.

        Raises
        ------
        NotSupportedError
            naming the part of it that SQL cannot compute
        """
        if node not in self._known:
            made = self._value(node)
            if sum(1 for _ in made.walk()) > MAX_SIZE:
                raise NotSupportedError(f"{node.text} is too long an expression in SQL")
            self._known[node] = made
        return self._known[node].copy()

    def _value(self, node: Node) -> Sql:
        match node:
            case Name(column=found):
                return self.number(found)
            case Literal(value=bool() | int() | float() as value):
                return number(value)
            case Operation(operator="-", operands=(inner,)):
                return binary("-", number(0.0), self.value(inner))
            case Operation(operands=(inner,)):
                return self.value(inner)
            case Operation(
                operator=operator,
                operands=(Name(column=found), Literal(value=str() as word))
                | (Literal(value=str() as word), Name(column=found)),
            ):
                own = column(found, self.alias)
                same, other = binary("==", own, text(word)), binary("!=", own, text(word))
                return truth(same, other) if operator == "==" else truth(other, same)
            case Operation(operator=operator, operands=(left, right)):
                return self._operation(operator, left, right, node)
            case Call(function="I", options=((_, inner),)):
                return self.value(inner)
            case Call(function=function, arguments=arguments):
                return self._call(function, arguments, node)
        raise _refusal(node)

    def _operation(self, operator: str, left: Node, right: Node, node: Node) -> Sql:
        if operator == "**":
            return _power(self.value(left), constant(right), node)
        if operator in ("//", "%"):
            return _divided(self.value(left), constant(right), operator, node)
        a, b = self.value(left), self.value(right)
        if operator == "/":
            return quotient(a, b)
        if operator in _NEGATED:
            return truth(binary(operator, a, b), binary(_NEGATED[operator], a, b))
        return binary(operator, a, b)

    def _call(self, function: str, arguments: Sequence[Node], node: Node) -> Sql:
        operators = {
            "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "true_divide": "/",
            "power": "**", "float_power": "**", "floor_divide": "//", "mod": "%", "remainder": "%",
            **_COMPARED,
        }  # fmt: skip
        if function in operators:
            return self._operation(operators[function], arguments[0], arguments[1], node)
        if function in ("round", "around") and len(arguments) == 2:
            digits = constant(arguments[1])
            unit = number(10.0 ** abs(int(digits or 0)))
            x = self.value(arguments[0])
            if digits is None or digits >= 0:
                return binary("/", _rounded(binary("*", x, unit)), unit)
            return binary("*", _rounded(binary("/", x, unit)), unit)
        values = [self.value(x) for x in arguments]
        made = _FUNCTIONS.get(_SPELLED.get(function, function))
        if made is None:
            raise _refusal(node)
        return made(*values)


def _refusal(node: Node) -> NotSupportedError:
    return NotSupportedError(
        f"{node.text} has no counterpart in SQL that gives the same numbers in every dialect: "
        "compute it as a column before the fit, or use predict()"
    )


def _power(x: Sql, exponent: float | None, node: Node) -> Sql:
    """A power with a constant exponent."""
    if exponent is None:
        raise _refusal(node)
    if exponent == 0:
        return number(1.0)
    if exponent == int(exponent):
        whole = power(x, abs(int(exponent)))
        return whole if exponent > 0 else quotient(number(1.0), whole)
    if abs(exponent) == 0.5:
        root = _FUNCTIONS["sqrt"](x)
        return root if exponent > 0 else quotient(number(1.0), root)
    found = [(binary(">", x, number(0.0)), call("power", x, number(exponent)))]
    if exponent > 0:
        found.append((binary("==", x, number(0.0)), number(0.0)))
    return cases(found)


def _divided(x: Sql, divisor: float | None, operator: str, node: Node) -> Sql:
    """Quotient rounded down, or remainder, of a whole positive divisor.

    x / k may be rounded up to a whole number that is beyond it; the remainder is negative then.
    """
    if divisor is None or divisor != int(divisor) or divisor <= 0:
        raise _refusal(node)
    k = number(divisor)
    floor = call("floor", binary("/", x, k))
    rest = binary("-", x, binary("*", k, floor))
    low = binary("<", rest, number(0.0))
    if operator == "%":
        return cases([(low, binary("+", rest, k))], rest)
    return cases([(low, binary("-", floor, number(1.0)))], floor)


# --------------------------------------------------------------------------- functions


def _rounded(x: Sql) -> Sql:
    """To the nearest whole number, halves to the even one, as numpy."""
    floor = call("floor", x)
    rest = binary("-", x, floor)
    up, half = binary("+", floor, number(1.0)), number(0.5)
    even = binary("*", number(2.0), call("floor", binary("/", up, number(2.0))))
    return cases([(binary("==", rest, half), even), (binary(">", rest, half), up)], floor)


def _exp(x: Sql) -> Sql:
    """Guarded: engines stop where it over- or underflows."""
    high, low = binary(">", x, number(_LARGEST_EXP)), binary("<", x, number(_SMALLEST_EXP))
    return cases([(high, words().null()), (low, number(0.0))], call("exp", x))


def _expm1(x: Sql) -> Sql:
    """With all digits where x is small (Kahan): (e - 1) x / log e with e = exp(x)."""
    e, one = _exp(x), number(1.0)
    less = binary("-", e, one)
    near = binary("<", call("abs", x), number(0.5))
    ratio = binary("/", binary("*", less, x), call("ln", e))
    return cases([(binary("==", e, one), x), (near, ratio)], less)


def _log1p(x: Sql) -> Sql:
    """With all digits where x is small (Kahan): x log(1 + x) / ((1 + x) - 1)."""
    above = binary("+", number(1.0), x)
    exact = binary("==", above, number(1.0))
    ratio = binary("/", call("ln", above), binary("-", above, number(1.0)))
    return cases([(exact, x), (binary(">", above, number(0.0)), binary("*", x, ratio))])


def _within_one(function: str) -> Callable[[Sql], Sql]:
    def made(x: Sql) -> Sql:
        return cases([(binary("<=", call("abs", x), number(1.0)), call(function, x))])

    return made


def _log(unit: float) -> Callable[[Sql], Sql]:
    def made(x: Sql) -> Sql:
        log = call("ln", x) if unit == 1.0 else binary("/", call("ln", x), number(unit))
        return cases([(binary(">", x, number(0.0)), log)])

    return made


def _smaller(a: Sql, b: Sql) -> Sql:
    return cases([(binary("<=", a, b), a), (binary(">", a, b), b)])


def _larger(a: Sql, b: Sql) -> Sql:
    return cases([(binary(">=", a, b), a), (binary("<", a, b), b)])


def _sign(x: Sql) -> Sql:
    zero = number(0.0)
    found = [(">", 1.0), ("<", -1.0), ("==", 0.0)]
    return cases([(binary(kind, x, zero), number(value)) for kind, value in found])


def _cbrt(x: Sql) -> Sql:
    root = call("power", call("abs", x), number(1 / 3))
    return binary("*", _sign(x), root)


def _base(base: float) -> Callable[[Sql], Sql]:
    """A power of a base, guarded as `_exp`."""
    limit = math.log(base)

    def made(x: Sql) -> Sql:
        high = binary(">", x, number(_LARGEST_EXP / limit))
        low = binary("<", x, number(_SMALLEST_EXP / limit))
        found = call("power", number(base), x)
        return cases([(high, words().null()), (low, number(0.0))], found)

    return made


def _both(kind: str) -> Callable[[Sql, Sql], Sql]:
    """1 where both numbers, or one, are not zero."""

    def made(a: Sql, b: Sql) -> Sql:
        zero = number(0.0)
        yes = [binary("!=", x, zero) for x in (a, b)]
        no = [binary("==", x, zero) for x in (a, b)]
        other = "or" if kind == "and" else "and"
        known = [binary("==", x, x) for x in (a, b)]
        return truth(chain("and", [*known, binary(kind, *yes)]),
                     chain("and", [*known, binary(other, *no)]))  # fmt: skip

    return made


def _hypot(a: Sql, b: Sql) -> Sql:
    return call("sqrt", binary("+", power(a, 2), power(b, 2)))


def _chosen(condition: Sql, a: Sql, b: Sql) -> Sql:
    zero = number(0.0)
    return cases([(binary("!=", condition, zero), a), (binary("==", condition, zero), b)])


def _trunc(x: Sql) -> Sql:
    return cases([(binary("<", x, number(0.0)), call("ceil", x))], call("floor", x))


_FUNCTIONS: dict[str, Callable[..., Sql]] = {
    **{x: (lambda v, x=x: call(x, v)) for x in (*_SAME_NAME, "abs", "floor", "ceil")},
    **{x: (lambda v, factor=y: binary("*", v, number(factor))) for x, y in _FACTORS.items()},
    "asin": _within_one("asin"),
    "acos": _within_one("acos"),
    "atan2": lambda a, b: call("atan2", a, b),
    "arctan2": lambda a, b: call("atan2", a, b),
    "log": _log(1.0),
    "log2": _log(math.log(2.0)),
    "log10": _log(math.log(10.0)),
    "log1p": _log1p,
    "exp": _exp,
    "expm1": _expm1,
    "exp2": _base(2.0),
    "exp10": _base(10.0),
    "sqrt": lambda x: cases([(binary(">=", x, number(0.0)), call("sqrt", x))]),
    "cbrt": _cbrt,
    "square": lambda x: power(x, 2),
    "reciprocal": lambda x: quotient(number(1.0), x),
    "negative": lambda x: binary("-", number(0.0), x),
    "sign": _sign,
    "trunc": _trunc,
    "rint": _rounded,
    "round": _rounded,
    "around": _rounded,
    "hypot": _hypot,
    "minimum": _smaller,
    "maximum": _larger,
    "where": _chosen,
    "clip": lambda x, low, high: _smaller(_larger(x, low), high),
    "logical_and": _both("and"),
    "logical_or": _both("or"),
    "logical_not": lambda x: truth(binary("==", x, number(0.0)), binary("!=", x, number(0.0))),
}
