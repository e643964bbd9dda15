"""Reading expressions: from text to a small tree that holds data columns, numbers and known calls.

Formulas come from job files, so nothing here runs code. Every name and string among the tokens
becomes a placeholder; Python's grammar orders what is left (placeholders, numbers,
operators); the tree is rebuilt from a whitelist of node types, and calls from a fixed vocabulary.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dmixed.errors import FormulaError
from dmixed.formula.tokens import Token, depths, quoted, shown, spelled
from dmixed.formula.vocabulary import CONTRASTS, ELEMENTWISE, MEANT, REFUSED, STRUCTURED

MAX_TOKENS = 600
"""Tokens in one expression."""
MAX_DEPTH = 60
"""Levels of nesting in one expression."""
MAX_POWER = 10

_CONSTANTS = {"np.pi": math.pi, "numpy.pi": math.pi, "np.e": math.e, "numpy.e": math.e}
_KEYWORDS = {"True": True, "False": False, "None": None}
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.UAdd: "+",
    ast.USub: "-",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


@dataclass(frozen=True, slots=True)
class Name:
    """A data column."""

    column: str
    text: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A number, string, truth value, None, or a tuple of these."""

    value: float | str | bool | tuple[float | str | bool | None, ...] | None
    text: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One or two operands under an arithmetic operator or a comparison."""

    operator: str
    operands: tuple[Node, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call: of the vocabulary, or of a function of the caller's.

    Attributes
    ----------
    function
        its name, without ``np.``
    options
        argument name -> node for the calls whose signature is in `STRUCTURED`
    arguments
        positional arguments of every other call
    """

    function: str
    options: tuple[tuple[str, Node], ...]
    arguments: tuple[Node, ...]
    text: str

    def option(self, name: str) -> Node | None:
        """Node given for an argument, if any."""
        return dict(self.options).get(name)

    def value(self, name: str, default: object = None) -> object:
        """Literal given for an argument; FormulaError if it is not a literal."""
        node = self.option(name)
        if node is None:
            return default
        if not isinstance(node, Literal):
            raise FormulaError(
                f"{self.text}: {name}={node.text} must be a number, a string or a list"
            )
        return node.value


Node: TypeAlias = Name | Literal | Operation | Call


def read(tokens: Sequence[Token], functions: Collection[str] = ()) -> Node:
    """Expression from its tokens.

    Parameters
    ----------
    tokens
        of one expression
    functions
        names of the caller's own functions, callable besides the vocabulary

    Raises
    ------
    FormulaError
        it is not an expression, or uses anything outside the vocabulary
    """
    source = shown(spelled(tokens[:MAX_TOKENS]))
    if not tokens:
        raise FormulaError("an expression is empty")
    if len(tokens) > MAX_TOKENS:
        raise FormulaError(f"the expression {source} is too long to be meant")
    deepest = max(depths(tokens))
    if deepest > MAX_DEPTH:
        raise FormulaError(f"the expression {source} is nested too deeply")
    words: list[Token] = []
    pieces = []
    for token in tokens:
        if token.kind in ("operator", "number"):
            pieces.append("**" if token.text == "^" else token.text)
        else:
            words.append(token)
            pieces.append(f"v{len(words) - 1}")
    try:
        tree = ast.parse(" ".join(pieces), mode="eval").body
        return _Reader(words, functions).node(tree, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(
            f"cannot read {source}; is an operator or a parenthesis out of place?"
        ) from None


class _Reader:
    """Rebuilds a tree of Python's grammar as `Node`, refusing everything not listed here."""

    def __init__(self, words: Sequence[Token], functions: Collection[str]) -> None:
        self.words = words
        self.functions = functions

    def text(self, tree: ast.AST) -> str:
        """Canonical text: Python's spacing, the words put back."""
        return re.sub(r"\bv(\d+)\b", lambda m: _word(self.words[int(m[1])]), ast.unparse(tree))

    def node(self, tree: ast.AST, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise FormulaError("an expression is nested too deeply")
        match tree:
            case ast.Constant(value=int() | float() as value):
                return Literal(_number(value), self.text(tree))
            case ast.Name():
                return self.word(tree)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as op, operand=inner):
                operand = self.node(inner, depth + 1)
                if isinstance(operand, Literal) and _is_number(operand.value):
                    sign = -1 if isinstance(op, ast.USub) else 1
                    return Literal(sign * operand.value, self.text(tree))  # type: ignore[operator]
                return self.operation(tree, op, (operand,))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                operands = (self.node(left, depth + 1), self.node(right, depth + 1))
                return self.operation(tree, op, operands)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                operands = (self.node(left, depth + 1), self.node(right, depth + 1))
                return self.operation(tree, op, operands)
            case ast.Compare():
                raise FormulaError(
                    f"{self.text(tree)} chains comparisons; write (a > b) * (b > c) instead"
                )
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return self.items(tree, items, depth)
            case ast.Call():
                return self.call(tree, depth)
        raise FormulaError(f"{self.text(tree)} is not allowed in a formula")

    def word(self, tree: ast.Name) -> Node:
        token = self.words[int(tree.id[1:])]
        name, text = token.text, _word(token)
        if token.kind == "string":
            return Literal(_unquote(name), text)
        if token.kind == "quoted":
            return Name(name, text)
        if name in _KEYWORDS:
            return Literal(_KEYWORDS[name], text)
        if name in _CONSTANTS:
            return Literal(_CONSTANTS[name], text)
        if name in CONTRASTS and "." in name:
            return Call(name, (), (), text)
        if name.startswith("__"):
            raise FormulaError(f"{name} cannot be used in a formula; a column is written `{name}`")
        if "." in name:
            raise FormulaError(
                f"{name}: attributes cannot be used in a formula; "
                f"a column with this name is written `{name}`"
            )
        return Name(name, text)

    def items(self, tree: ast.AST, items: Sequence[ast.expr], depth: int) -> Literal:
        values = [self.node(item, depth + 1) for item in items]
        if not all(isinstance(v, Literal) and not isinstance(v.value, tuple) for v in values):
            raise FormulaError(f"{self.text(tree)}: a list may hold numbers and strings only")
        return Literal(tuple(v.value for v in values), self.text(tree))  # type: ignore

    def operation(self, tree: ast.AST, op: ast.AST, operands: tuple[Node, ...]) -> Operation:
        text = self.text(tree)
        operator = _OPERATORS[type(op)]
        comparison = operator in ("==", "!=") and len(operands) == 2
        for operand in operands:
            value = operand.value if isinstance(operand, Literal) else 0.0
            if not _is_number(value) and not (comparison and isinstance(value, str)):
                raise FormulaError(f"{text}: {operand.text} is not a number")
        if operator == "**":
            power = constant(operands[1])
            if power is not None and not abs(power) <= MAX_POWER:
                raise FormulaError(f"{text}: powers beyond {MAX_POWER} are not supported")
        return Operation(operator, operands, text)

    def call(self, tree: ast.Call, depth: int) -> Node:
        if not isinstance(tree.func, ast.Name):
            raise FormulaError(f"{self.text(tree)}: only functions named directly can be called")
        token = self.words[int(tree.func.id[1:])]
        if token.kind != "name":
            raise FormulaError(f"{self.text(tree)}: {_word(token)} cannot be called")
        if any(isinstance(a, ast.Starred) for a in tree.args) or any(
            k.arg is None for k in tree.keywords
        ):
            raise FormulaError(f"{self.text(tree)}: * and ** cannot unpack arguments in a formula")
        name, text = token.text, self.text(tree)
        arguments = tuple(self.node(a, depth + 1) for a in tree.args)
        named: dict[str, Node] = {}
        for keyword in tree.keywords:
            key = self.words[int((keyword.arg or "")[1:])].text
            if key in named:
                raise FormulaError(f"{text}: {key} is given twice")
            named[key] = self.node(keyword.value, depth + 1)
        if name in self.functions:
            if named:
                raise FormulaError(f"{text}: give the arguments of {name} by position")
            return Call(name, (), arguments, text)
        return _known_call(name, text, arguments, named)


def _known_call(name: str, text: str, arguments: tuple[Node, ...], named: dict[str, Node]) -> Node:
    """Call of the vocabulary, its arguments checked against its signature."""
    plain = re.sub(r"^(np|numpy)\.", "", name)
    if plain in ELEMENTWISE:
        least, most = ELEMENTWISE[plain].arguments
        if named:
            raise FormulaError(f"{text}: {next(iter(named))}= is not an argument of {name} here")
        if not least <= len(arguments) <= most:
            wanted = f"{least}" if least == most else f"{least} or {most}"
            raise FormulaError(f"{text}: {name} takes {wanted} argument(s), not {len(arguments)}")
        for argument in arguments:
            if isinstance(argument, Literal) and not _is_number(argument.value):
                raise FormulaError(f"{text}: {argument.text} is not a number")
        if plain in ("round", "around") and len(arguments) == 2:
            digits = arguments[1]
            if not (isinstance(digits, Literal) and isinstance(digits.value, int)):
                raise FormulaError(f"{text}: the number of digits must be a whole number")
        return Call(plain, (), arguments, text)
    if name not in STRUCTURED:
        raise _unknown_call(name, plain)
    signature = STRUCTURED[name]
    if len(arguments) > len(signature):
        raise FormulaError(f"{text}: {name} takes at most {len(signature)} argument(s)")
    bound = dict(zip(signature, arguments, strict=False))
    for key, value in named.items():
        if key not in signature:
            known = ", ".join(signature) or "none"
            raise FormulaError(f"{text}: {name} has no argument {key!r} (arguments: {known})")
        if key in bound:
            raise FormulaError(f"{text}: {key} is given twice")
        bound[key] = value
    data = signature[0] if signature else ""
    if data in ("x", "data"):
        if data not in bound:
            raise FormulaError(f"{text}: {name} needs a variable")
        if isinstance(bound[data], Literal) and constant(bound[data]) is None:
            raise FormulaError(f"{text}: {bound[data].text} is not a number")
    if name == "Q":
        column = bound.get("variable")
        if not (isinstance(column, Literal) and isinstance(column.value, str)):
            raise FormulaError(f"{text}: Q takes the name of a column as a string")
        return Name(column.value, text)
    if name == "C":
        _check_category(text, bound)
    call = Call(name, tuple(bound.items()), (), text)
    for key in bound:
        if key not in (data, "contrasts") or name in CONTRASTS:
            call.value(key)  # a literal
    return call


def _check_category(text: str, bound: dict[str, Node]) -> None:
    """Contrasts and levels of ``C()``; contrasts may be named without parentheses."""
    given = bound.get("contrasts")
    if isinstance(given, Name) and given.column in CONTRASTS:
        bound["contrasts"] = given = Call(given.column, (), (), given.text)
    if given is not None and not (isinstance(given, Call) and given.function in CONTRASTS):
        raise FormulaError(f"{text}: {given.text} is not a contrast ({', '.join(CONTRASTS)})")
    levels = bound.get("levels")
    if levels is not None and not (isinstance(levels, Literal) and isinstance(levels.value, tuple)):
        raise FormulaError(f"{text}: levels= must be a list")


def _unknown_call(name: str, plain: str) -> FormulaError:
    """Error for a call outside the vocabulary, with the reason or the word that was meant."""
    if plain in REFUSED:
        return FormulaError(f"{name}() cannot be used: {REFUSED[plain]}")
    if plain in MEANT:
        return FormulaError(f"{name}() is not known here; write {MEANT[plain]}")
    known = [*ELEMENTWISE, *STRUCTURED]
    near = difflib.get_close_matches(plain[:40], known, n=1)
    hint = f"; did you mean {near[0]}()?" if near else ""
    return FormulaError(
        f"{shown(name)[1:-1]}() is not in the vocabulary of formulas{hint} "
        "(functions of your own are given by context={'name': function})"
    )


def constant(node: Node) -> float | None:
    """Value of an expression of numbers alone; None if it holds anything else."""
    if isinstance(node, Literal):
        return float(node.value) if _is_number(node.value) else None  # type: ignore[arg-type]
    if not isinstance(node, Operation):
        return None
    values = [constant(x) for x in node.operands]
    if any(v is None for v in values):
        return None
    try:
        return float(_fold(node.operator, [v for v in values if v is not None]))
    except (OverflowError, ZeroDivisionError, TypeError):
        raise FormulaError(f"{node.text} has no finite value") from None


def _fold(operator: str, values: list[float]) -> float:
    """Arithmetic on Python floats; a complex result raises TypeError in `float`."""
    if len(values) == 1:
        return -values[0] if operator == "-" else values[0]
    a, b = values
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "/":
            return a / b
        case "//":
            return a // b
        case "%":
            return a % b
        case "**":
            return a**b
    raise FormulaError(f"{a:g} {operator} {b:g} compares two numbers")


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it, in the order of the text."""
    yield node
    match node:
        case Operation(operands=children):
            below: Sequence[Node] = children
        case Call(options=options, arguments=arguments):
            below = [*(value for _, value in options), *arguments]
        case _:
            below = ()
    for child in below:
        yield from walk(child)


def columns_of(node: Node) -> tuple[str, ...]:
    """Data columns that an expression uses, each once."""
    return tuple(dict.fromkeys(x.column for x in walk(node) if isinstance(x, Name)))


def _word(token: Token) -> str:
    """How a word is written in canonical text."""
    if token.kind == "quoted":
        return quoted(token.text)
    return repr(_unquote(token.text)) if token.kind == "string" else token.text


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> float:
    """A number that a float holds; whole numbers stay int (`bs(x, df=4)`)."""
    if abs(value) > 1e300:
        raise FormulaError("a number in the formula is too large")
    return value
