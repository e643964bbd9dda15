"""Terms: what stands between the plus signs of a formula, as products of factors.

Every factor (a column or a call) is read by `expressions` and replaced by a placeholder, and
formulaic's parser does the algebra (``a * b``, ``(a + b) ** 2``, ``a / b``, ``- 1``). formulaic
sees nothing of the text but placeholders, operators, 0 and 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from formulaic.errors import FormulaicError
from formulaic.parser import DefaultFormulaParser
from formulaic.parser.types import ASTNode, Factor

from dmixed.errors import FormulaError
from dmixed.formula.expressions import Name, Node, read
from dmixed.formula.tokens import Token, depths, shown, spelled

MAX_TERMS = 1000
"""Terms that the algebra of one formula may make on its way."""

_ALGEBRA = ("+", "-", "*", "/", ":", "^", "**", "(", ")", "%in%")


@dataclass(frozen=True, slots=True)
class Term:
    """A product of factors; no factor at all is the intercept."""

    factors: tuple[Node, ...]

    @property
    def text(self) -> str:
        """As one would write it: ``f:x``."""
        return ":".join(x.text for x in self.factors) or "1"


def display(factor: Node) -> str:
    """Name of a factor in coefficient names: bare columns without backticks, as formulaic."""
    if isinstance(factor, Name) and factor.text.strip("`") == factor.column:
        return factor.column
    return factor.text


def read_factor(tokens: Sequence[Token], context: Collection[str]) -> Node:
    """One factor, or the response: here, and only here, a bare name may have dots."""
    if len(tokens) == 1 and tokens[0].kind == "name" and "." in tokens[0].text:
        if any(part.startswith("_") for part in tokens[0].text.split(".")):
            raise FormulaError(f"{tokens[0].text}: attributes cannot be used in a formula")
        return read([Token("quoted", tokens[0].text)], context)
    return read(tokens, context)


def read_terms(tokens: Sequence[Token], context: Collection[str]) -> tuple[Term, ...]:
    """Terms of a sum, the intercept implied, by number of factors and then as written.

    Raises
    ------
    FormulaError
        the sum cannot be read
    """
    factors: dict[Node, str] = {}
    words = []
    for piece in _operands(tokens):
        if piece[0].kind in ("operator", "number"):
            words.append(piece[0].text)
        else:
            node = read_factor(piece, context)
            words.append(factors.setdefault(node, f"f{len(factors)}"))
    source = shown(spelled(tokens))
    try:
        parser = DefaultFormulaParser(feature_flags=set())
        tree = parser.get_ast(" ".join(words))
        _bounded(tree, source)
        terms = list(parser.get_terms_from_ast(tree, context={}))
    except (FormulaicError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(
            f"cannot read the terms {source}; is an operator or a parenthesis out of place?"
        ) from None
    by_word = {word: node for node, word in factors.items()}
    found = []
    for term in terms:
        words = [f.expr for f in term.factors if f.eval_method is not Factor.EvalMethod.LITERAL]
        if words and len(words) < len(term.factors):
            raise FormulaError(f"{source}: a number cannot multiply a term; write I(2 * x)")
        found.append(Term(tuple(by_word[word] for word in words)))
    return tuple(sorted(found, key=lambda term: len(term.factors)))


def _operands(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """Cut a sum of terms into operands (a name, a call, a number) and single operators."""
    i, previous = 0, Token("operator", "+")
    while i < len(tokens):
        token, end = tokens[i], i + 1
        if token.operand and previous.operand:
            raise FormulaError(
                f"an operator is missing between {spelled([previous])} and {spelled([token])}"
            )
        if token.kind == "operator" and token.text not in _ALGEBRA:
            raise FormulaError(
                f"{token.text!r} cannot stand between terms; arithmetic is written I(...)"
            )
        if token.kind == "string":
            raise FormulaError(f"{token.text} is text; a column is written in `backticks`")
        power = previous.among("^", "**")
        if token.kind == "number" and token.text not in ("0", "1") and not power:
            raise FormulaError(
                f"the number {token.text} cannot stand between terms; write I({token.text} * x)"
            )
        if token.kind == "name" and end < len(tokens) and tokens[end].among("("):
            end += next(n for n, d in enumerate(depths(tokens[end:]), 1) if d == 0)
        yield tokens[i:end]
        i, previous = end, token


def _bounded(tree: object, source: str) -> None:
    """Refuse algebra that would make too many terms, before it is done."""
    sizes: dict[int, int] = {}
    stack = [tree]
    while stack:
        node = stack[-1]
        waiting = [a for a in node.args if id(a) not in sizes] if isinstance(node, ASTNode) else []
        if waiting:
            stack.extend(waiting)
            continue
        size = _size(node, sizes) if isinstance(node, ASTNode) else 1
        if size > MAX_TERMS:
            raise FormulaError(f"the terms {source} multiply out to more than {MAX_TERMS}")
        sizes[id(stack.pop())] = size


def _size(node: ASTNode, sizes: dict[int, int]) -> int:
    """At most how many terms an operator makes of its operands'."""
    symbol, counts = node.operator.symbol, [sizes[id(a)] for a in node.args]
    if len(counts) == 1:
        return counts[0]
    a, b = counts
    if symbol in ("**", "^"):
        digits = str(node.args[1])
        if not digits.isdigit() or not 1 <= int(digits[:9]) <= 9:
            raise FormulaError("the power of a sum of terms must be a whole number, 1 to 9")
        return a ** int(digits)
    if symbol == "*":
        return a + b + a * b
    return a * b if symbol == ":" else a + b
