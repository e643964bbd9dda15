"""Random coefficients: lme4's bars, nested groups, and statsmodels' variance components.

``(1 + x | g)`` are coefficients that vary together between the levels of g; ``(1 | a/b)`` stands
for ``(1 | a) + (1 | b:a)``. The columns of a variance component share one variance instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dmixed.errors import FormulaError, NotSupportedError
from dmixed.formula.terms import Term, read_terms
from dmixed.formula.tokens import (
    Token,
    check_parentheses,
    depths,
    quoted,
    shown,
    spelled,
    tokenize,
    type_name,
)

MAX_KEYS = 20
"""Key columns of one grouping factor."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Random coefficients that vary together, ``(1 + x | g)``, or a variance component.

    Attributes
    ----------
    terms
        what varies
    group
        key columns; several make an interaction key
    text
        as one would write it
    component
        name of a variance component: all columns that the terms make share one variance, and
        categories among the terms name levels within the groups; None for a bar
    """

    terms: tuple[Term, ...]
    group: tuple[str, ...]
    text: str
    component: str | None = None


def signed_pieces(tokens: list[Token]) -> Iterator[tuple[Token, list[Token]]]:
    """Signed pieces between the outermost + and -."""
    plus, minus = Token("operator", "+"), Token("operator", "-")
    sign, piece = plus, list[Token]()
    for token, depth in zip(tokens, depths(tokens), strict=True):
        if depth or not token.among("+", "-"):
            piece.append(token)
        elif piece:
            yield sign, piece
            sign, piece = token, []
        else:  # two signs in a row
            sign = plus if sign == token else minus
    if piece:
        yield sign, piece
    elif tokens:
        raise FormulaError(f"the formula ends with {tokens[-1].text!r}")


def inside_bar(piece: list[Token]) -> list[Token] | None:
    """Tokens between the parentheses of a bar; None if the piece holds no bar."""
    if not any(t.among("|", "||") for t in piece):
        return None
    inside = piece
    while inside and inside[0].among("(") and inside[-1].among(")"):
        inside = inside[1:-1]
        levels = list(depths(inside))
        if min(levels, default=0) < 0:
            break  # (a) ... (b): the first and the last parenthesis are not a pair
        if [d for t, d in zip(inside, levels, strict=True) if t.among("|", "||")] == [0]:
            return inside
    raise FormulaError(
        f"{shown(spelled(piece))}: a bar stands in parentheses of its own, joined to the rest by "
        "'+', as in '+ (1 + x | g)'"
    )


def read_bar(inside: list[Token], context: Collection[str]) -> list[Bar]:
    """Bars of ``terms | group`` or ``terms || group``; nested groups give one, or some, each."""
    cut = next(i for i, t in enumerate(inside) if t.among("|", "||"))
    keys = _nested_keys(inside[cut + 1 :], spelled(inside))
    terms = read_terms(inside[:cut], context)
    if not terms or not inside[:cut]:
        raise FormulaError(f"({spelled(inside)}) has no random coefficient left of the bar")
    split = [(t,) for t in terms] if inside[cut].text == "||" else [terms]
    return [bar_of(part, key) for key in keys for part in split]


def bar_of(terms: tuple[Term, ...], group: tuple[str, ...]) -> Bar:
    """Bar with its text as lme4 writes it."""
    key = ":".join(quoted(name) for name in group)
    return Bar(terms, group, f"({_sum(terms)} | {key})")


def read_components(
    given: object, group: tuple[str, ...], context: Collection[str]
) -> Iterator[Bar]:
    """Variance components of a model in statsmodels' words, in the order given.

    Parameters
    ----------
    given
        name of each component -> its one-sided formula
    group
        key columns of the model's groups
    """
    if not isinstance(given, Mapping):
        raise FormulaError(
            "vc_formula must map names of variance components to formulas, as "
            f"{{'cask': '0 + C(cask)'}}, not {type_name(given)}"
        )
    for name in given:
        if not isinstance(name, str) or not name.strip():
            raise FormulaError(f"vc_formula: {name!r} cannot name a component; names are text")
    for name in given:
        terms = one_sided(given[name], f"vc_formula[{name!r}]", "0 + C(cask)", context)
        yield Bar(terms, group, f"{name}: {_sum(terms)}", name)


def one_sided(
    text: object, argument: str, example: str, context: Collection[str]
) -> tuple[Term, ...]:
    """Terms of a formula without a response, ``~ x`` or ``x``.

    Parameters
    ----------
    argument, example
        what the formula is for and how one looks, for messages
    """
    if not isinstance(text, str):
        raise FormulaError(f"{argument} must be text such as {example!r}, not {type_name(text)}")
    try:
        tokens = tokenize(text)
        if tokens and tokens[0].among("~"):
            tokens = tokens[1:]
        check_parentheses(tokens, text)
        terms = read_terms(tokens, context)
    except FormulaError as error:
        raise type(error)(f"{argument}: {error}") from None
    if not terms:
        raise FormulaError(f"{argument}={text!r} has no terms; write {example!r}, or leave it out")
    return terms


def _sum(terms: Sequence[Term]) -> str:
    """Terms as one would write them; 0 says that there is no intercept."""
    words = [t.text for t in terms]
    return " + ".join(words if "1" in words else ["0", *words])


def _nested_keys(tokens: list[Token], bar: str) -> list[tuple[str, ...]]:
    """Key columns right of a bar: of ``a/b/c`` those of a, of b:a and of c:b:a."""
    tokens = _unwrapped(tokens)
    pieces: list[list[Token]] = [[]]
    for token, depth in zip(tokens, depths(tokens), strict=True):
        if depth == 0 and token.among("/"):
            pieces.append([])
        else:
            pieces[-1].append(token)
    keys, key = [], tuple[str, ...]()
    for piece in pieces:
        key = (*_key(_unwrapped(piece), bar), *key)
        if len(set(key)) < len(key):
            raise FormulaError(f"({bar}): a column is there twice in the group")
        if len(key) > MAX_KEYS:
            raise FormulaError(f"({shown(bar)}): a group of more than {MAX_KEYS} columns")
        keys.append(key)
    return keys


def _unwrapped(tokens: list[Token]) -> list[Token]:
    """Tokens without the parentheses around all of them."""
    while len(tokens) > 2 and tokens[0].among("(") and tokens[-1].among(")"):
        if min(depths(tokens[1:-1])) < 0:
            break  # (a) ... (b): the first and the last parenthesis are not a pair
        tokens = tokens[1:-1]
    return tokens


def _key(tokens: list[Token], bar: str) -> tuple[str, ...]:
    """Columns joined by ``:``."""
    names, joints = tokens[::2], tokens[1::2]
    if not all(joint.among(":") for joint in joints):
        raise NotSupportedError(
            f"({bar}): the group must be a column, or columns joined by ':' or '/'; expressions "
            "are not supported, so compute the column before the fit"
        )
    if len(names) != len(joints) + 1 or any(t.kind not in ("name", "quoted") for t in names):
        raise FormulaError(
            f"({bar}): right of the bar must be a column, or columns joined by ':' or '/'"
        )
    return tuple(t.text for t in names)
