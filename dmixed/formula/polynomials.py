"""Numeric factors as polynomials in the carried variables.

A variable is a column, or an expression of one row (``log(x)``, ``x / z``); what is carried are
powers of u = (x - shift) / scale. Sums, products and powers of variables are polynomials in u,
and so are center, scale and poly, whose coefficients are learned from the moments of u over all
rows. Before the pass the same expansion, with arbitrary coefficients, tells what must be carried.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from dmixed.blocks import Floats
from dmixed.errors import DataError, FormulaError
from dmixed.formula.expressions import Call, Literal, Name, Node, Operation, constant, walk
from dmixed.formula.tokens import quoted
from dmixed.formula.vocabulary import STRUCTURED

Monomial: TypeAlias = tuple[tuple[str, int], ...]
Polynomial: TypeAlias = dict[Monomial, float]

ONE: Monomial = ()
MAX_DEGREE = 12
MAX_MONOMIALS = 500
LARGEST = 2.0**500
"""Units beyond this (3e150), or below its inverse, have squares that over- or underflow."""
SPLINES = ("bs", "cr", "cs", "cc")
LEARNED = ("center", "scale", "standardize")


class Statistics(Protocol):
    """What is known of the variables when a factor is expanded."""

    def affine(self, variable: str) -> tuple[float, float]:
        """Shift and scale of a variable."""

    def moments(self, polynomials: Sequence[Polynomial]) -> tuple[Floats, float]:
        """Sums over the rows of products of polynomials (m, m), and the number of rows."""


class Unknown:
    """Statistics before the pass: any numbers that keep every monomial."""

    def affine(self, variable: str) -> tuple[float, float]:
        """Shift 1, scale 1."""
        return 1.0, 1.0

    def moments(self, polynomials: Sequence[Polynomial]) -> tuple[Floats, float]:
        """Positive definite sums, many rows."""
        m = len(polynomials)
        return np.eye(m) + 1.0, 1e9


@dataclass(frozen=True, slots=True)
class Variable:
    """A numeric column computed row by row, carried in powers.

    Attributes
    ----------
    name
        its canonical text
    node
        the expression
    part
        which column of a spline basis; -1 for everything else
    """

    name: str
    node: Node
    part: int = -1


@dataclass
class Expansion:
    """Expands factors; collects the variables met and the polynomials that must be learned from.

    Attributes
    ----------
    statistics
        `Unknown` before the pass
    variables
        met so far, by name
    learned
        polynomials whose moments were asked for
    """

    statistics: Statistics
    variables: dict[str, Variable] = field(default_factory=dict)
    learned: list[Polynomial] = field(default_factory=list)

    def columns(self, factor: Node) -> list[tuple[str, Polynomial]]:
        """Columns of a numeric factor: what follows its name (``[1]``, or nothing) and polynomial.

        Raises
        ------
        FormulaError
            a call stands where it has no meaning, or the degree is too high
        """
        match factor:
            case Call(function="poly"):
                return self._poly(factor)
            case Call(function=name) if name in SPLINES:
                fields = spline_fields(factor)
                return [
                    (f"[{f}]", self._variable(Variable(f"{factor.text}[{f}]", factor, i)))
                    for i, f in enumerate(fields)
                ]
        return [("", self.polynomial(factor))]

    def polynomial(self, node: Node) -> Polynomial:
        """Polynomial of a numeric expression of one column."""
        value = constant(node)
        if value is not None:
            if not math.isfinite(value):
                raise FormulaError(f"{node.text} has no finite value")
            return {ONE: value}
        match node:
            case Name():
                return self._variable(Variable(quoted(node.column), node))
            case Literal():
                raise FormulaError(f"{node.text} is not a number")
            case Operation(operator=operator, operands=operands):
                return self._operation(node, operator, operands)
            case Call(function="I"):
                return self.polynomial(_argument(node, "x"))
            case Call(function="center" | "scale" | "standardize"):
                return self._scaled(node)
        return self.row_by_row(node)

    def _operation(self, node: Node, operator: str, operands: tuple[Node, ...]) -> Polynomial:
        if len(operands) == 1:
            sign = -1.0 if operator == "-" else 1.0
            return times({ONE: sign}, self.polynomial(operands[0]), node)
        left, right = operands
        number = constant(right)
        if operator in "+-":
            sign = -1.0 if operator == "-" else 1.0
            return plus(self.polynomial(left), self.polynomial(right), sign)
        if operator == "*":
            return times(self.polynomial(left), self.polynomial(right), node)
        if operator == "/" and number:
            return times(self.polynomial(left), {ONE: 1.0 / number}, node)
        if operator == "**" and number is not None and number == int(number) and number >= 1:
            return power(self.polynomial(left), int(number), node)
        return self.row_by_row(node)

    def row_by_row(self, node: Node) -> Polynomial:
        """A variable of its own; nothing learned may be inside."""
        for inner in walk(node):
            if not isinstance(inner, Call) or inner.function not in _ALONE:
                continue
            if inner is node or inner.function not in LEARNED:
                raise FormulaError(
                    f"{inner.text} cannot be inside another expression: "
                    "it must stand alone, or be multiplied by ':' or '*' in the formula"
                )
            raise FormulaError(
                f"{node.text}: {inner.text} is learned from the whole data after the one pass over "
                "it, so only sums, products and whole powers of it can be used"
            )
        return self._variable(Variable(node.text, node))

    def _variable(self, variable: Variable) -> Polynomial:
        """X = shift + scale u."""
        self.variables.setdefault(variable.name, variable)
        shift, scale = self.statistics.affine(variable.name)
        return {ONE: shift, ((variable.name, 1),): scale}

    def _moments(self, polynomials: list[Polynomial]) -> tuple[Floats, float]:
        self.learned.extend(polynomials)
        return self.statistics.moments(polynomials)

    def _scaled(self, node: Call) -> Polynomial:
        """(P - center) / scale; formulaic's signature, patsy's for standardize."""
        patsy = node.function == "standardize"
        inner = self.polynomial(_argument(node, "x" if patsy else "data"))
        center = node.value("center", True)
        scale = node.value("rescale" if patsy else "scale", True)
        ddof = node.value("ddof", 0 if patsy else 1)
        if node.function == "center":
            scale = False
        for value in (center, scale, ddof):
            if not isinstance(value, (bool, int, float)):
                raise FormulaError(f"{node.text}: {value!r} is neither a number nor True or False")
        # The constant of P is not used where its mean is taken off: it may be huge.
        rest = {**inner, ONE: 0.0}
        sums, n = self._moments([{ONE: 1.0}, rest])
        mean = sums[0, 1] / n
        about = sums[1, 1] - n * mean**2  # sum of squares about the mean
        offset = inner[ONE]
        if center is True:
            offset, square = -mean, about
        else:
            offset -= float(center)  # type: ignore[arg-type]
            square = about + n * (mean + offset) ** 2
        unit = 1.0
        if scale is True:
            unit = math.sqrt(max(square, 0.0) / (n - ddof)) if n > ddof else math.nan  # type: ignore
        elif scale is not False:
            unit = float(scale)  # type: ignore[arg-type]
        if not unit > 0:
            raise DataError(f"{node.text}: the values are all the same, so they have no scale")
        return {key: value / unit for key, value in {**rest, ONE: offset}.items()}

    def _poly(self, node: Call) -> list[tuple[str, Polynomial]]:
        """Orthonormal polynomials over the rows, of degree 1 and more.

        With G the moments of 1, z, ..., z^d, z being x centred and scaled, and G = R'R, the
        columns of [1, z, ..., z^d] R^-1 are orthonormal, and the first is constant; R has a
        positive diagonal, hence so have the leading coefficients.
        """
        degree, raw = node.value("degree", 1), node.value("raw", False)
        if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
            raise FormulaError(f"{node.text}: the degree must be a whole number, 1 or more")
        x = self.polynomial(_argument(node, "x"))
        check_degree(node, degree * degree_of(x))
        if raw is True:
            return [(f"[{i}]", power(x, i + 1, node)) for i in range(degree)]  # formulaic: from 0
        rest = {**x, ONE: 0.0}
        sums, n = self._moments([{ONE: 1.0}, rest])
        mean = sums[0, 1] / n
        sd = math.sqrt(max(sums[1, 1] / n - mean**2, 0.0))
        if not sd > 0:
            raise DataError(f"{node.text}: the values are all the same")
        z = {key: value / sd for key, value in {**rest, ONE: -mean}.items()}
        powers: list[Polynomial] = [{ONE: 1.0}]
        for _ in range(degree):
            powers.append(times(powers[-1], z, node))
        gram, _ = self._moments(powers)
        try:
            inverse = np.linalg.inv(np.linalg.cholesky(gram)).T
        except np.linalg.LinAlgError:
            raise DataError(
                f"{node.text}: the values do not differ enough for degree {degree}"
            ) from None
        columns = []
        for i in range(1, degree + 1):
            total: Polynomial = {}
            for weight, term in zip(inverse[: i + 1, i], powers, strict=False):
                total = plus(total, term, float(weight))
            columns.append((f"[{i}]", total))
        return columns


_ALONE = frozenset(STRUCTURED) - {"I"}


def plus(a: Polynomial, b: Polynomial, weight: float = 1.0) -> Polynomial:
    """A + weight b; terms that cancel stay, with coefficient zero."""
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, 0.0) + weight * value
    return total


def times(a: Polynomial, b: Polynomial, node: Node) -> Polynomial:
    """Product; FormulaError naming `node` if it has too many terms or too high a degree."""
    product: Polynomial = {}
    for first, x in a.items():
        for second, y in b.items():
            powers = dict(first)
            for name, exponent in second:
                powers[name] = powers.get(name, 0) + exponent
            key = tuple(sorted(powers.items()))
            product[key] = product.get(key, 0.0) + x * y
        if len(product) > MAX_MONOMIALS:
            raise FormulaError(f"{node.text} expands to more than {MAX_MONOMIALS} products")
    check_degree(node, degree_of(product))
    if any(a.values()) and any(b.values()):
        size = max(abs(value) for value in product.values())
        if size == 0 or not math.isfinite(size):
            check_size(node.text, {ONE: size or sys.float_info.min})
    return product


def power(a: Polynomial, exponent: int, node: Node) -> Polynomial:
    """Whole power, 1 or more."""
    product = a
    for _ in range(exponent - 1):
        product = times(product, a, node)
    return product


def check_degree(node: Node, degree: int) -> None:
    """Refuse products of too many variables."""
    if degree > MAX_DEGREE:
        raise FormulaError(
            f"{node.text} has total degree {degree}; at most {MAX_DEGREE} is supported"
        )


def check_size(name: str, polynomial: Polynomial) -> None:
    """Refuse a column whose squares, in the units of the data, are beyond a float.

    Raises
    ------
    DataError
        naming the column
    """
    size = max(abs(value) for value in polynomial.values())
    if not size <= LARGEST:
        raise DataError(f"{name}: values so large that their squares overflow; rescale the column")
    if 0 < size < 1 / LARGEST:
        raise DataError(f"{name}: values so small that their squares underflow; rescale the column")


def degree_of(polynomial: Polynomial) -> int:
    """Total degree."""
    return max(sum(exponent for _, exponent in key) for key in polynomial)


def shown_powers(monomial: Monomial) -> str:
    """A product of powers for a message: ``x:z**2``."""
    return ":".join(name if p == 1 else f"{name}**{p}" for name, p in monomial)


def spline_fields(node: Call) -> list[int]:
    """Names (numbers) of the columns of a spline; FormulaError where they would need the data.

    Raises
    ------
    FormulaError
        knots or bounds are not given: quantiles and extremes of the whole data are not known in
        one pass
    """
    missing = [x for x in ("knots", "lower_bound", "upper_bound") if node.value(x) is None]
    if node.function == "bs" and node.value("df") is None and missing[:1] == ["knots"]:
        missing = missing[1:]  # no inner knots
    if missing or node.value("df") is not None:
        raise FormulaError(
            f"{node.text}: give knots=, lower_bound= and upper_bound= (without df=): the quantiles "
            "and extremes of the whole data are not known in one pass"
        )
    if node.value("constraints") is not None:
        raise FormulaError(f"{node.text}: constraints= is not supported")
    knots = node.value("knots", ())
    degree = node.value("degree", 3)
    low, high = node.value("lower_bound"), node.value("upper_bound")
    points = (low, *knots, high) if isinstance(knots, tuple) else ()
    if not points or any(isinstance(x, (bool, str)) or x is None for x in points):
        raise FormulaError(f"{node.text}: knots= must be a list of numbers, the bounds numbers")
    if list(points) != sorted(set(points)):
        raise FormulaError(f"{node.text}: knots must increase from lower_bound to upper_bound")
    if not isinstance(degree, int) or isinstance(degree, bool) or not 0 <= degree <= MAX_DEGREE:
        raise FormulaError(f"{node.text}: degree= must be a whole number, 0 to {MAX_DEGREE}")
    if node.value("extrapolation", "raise") not in ("raise", "clip", "na", "zero", "extend"):
        raise FormulaError(f"{node.text}: extrapolation= is raise, clip, na, zero or extend")
    inner = len(points) - 2
    if node.function == "bs":
        first = 0 if node.value("include_intercept", False) else 1
        return list(range(first, inner + degree + 1))
    return list(range(1, inner + (2 if node.function == "cc" else 3)))


def with_pi(node: Node, columns: Collection[str]) -> Node:
    """The expression with `pi` replaced by the number, unless the data have such a column."""
    match node:
        case Name(column="pi", text="pi") if "pi" not in columns:
            return Literal(math.pi, "pi")
        case Operation(operator=operator, operands=operands, text=text):
            return Operation(operator, tuple(with_pi(x, columns) for x in operands), text)
        case Call(function=function, options=options, arguments=arguments, text=text):
            return Call(
                function,
                tuple((key, with_pi(value, columns)) for key, value in options),
                tuple(with_pi(x, columns) for x in arguments),
                text,
            )
    return node


def _argument(node: Call, name: str) -> Node:
    argument = node.option(name)
    assert argument is not None  # checked when the call was read
    return argument
