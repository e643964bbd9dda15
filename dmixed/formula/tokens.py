"""Cutting the text of a formula into tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dmixed.errors import FormulaError

MAX_LENGTH = 50_000
MAX_TOKENS = 6_000

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |`(?P<quoted>[^`]+)`
    |(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<name>[^\W\d]\w*(?:\.\w+)*)
    |(?P<operator>%in%|\*\*|\|\||//|[<>=!]=|[-+*/%^:~|()\[\],=<>])""",
    re.VERBOSE,
)
_STRANGERS = {
    "{": "braces hold Python code, which a formula cannot run",
    "}": "braces hold Python code, which a formula cannot run",
    ".": "attributes cannot be used; a column with a dot in its name is written `in.backticks`",
    "`": "a backtick is not closed",
    "'": "a quote is not closed",
    '"': "a quote is not closed",
}


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a formula: kind is quoted, string, number, name or operator."""

    kind: str
    text: str

    @property
    def operand(self) -> bool:
        """Whether the token stands for a value."""
        return self.kind != "operator"

    def among(self, *operators: str) -> bool:
        """Whether the token is one of these operators."""
        return self.kind == "operator" and self.text in operators


def tokenize(text: str) -> list[Token]:
    """Cut a formula into tokens; FormulaError on a character that has no place in one."""
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"the formula {shown(text[:200])} is too long to be meant")
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            char = text[position]
            why = _STRANGERS.get(char, "it has no meaning in a formula")
            raise FormulaError(
                f"unexpected {char!r} at character {position + 1} of the formula {shown(text)}: "
                f"{why}"
            )
        position = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(Token(kind, match[kind]))
        if len(tokens) > MAX_TOKENS:
            raise FormulaError(f"the formula {shown(text)} is too long to be meant")
    return tokens


def shown(text: str) -> str:
    """Text in quotes for a message, shortened."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def spelled(tokens: Sequence[Token]) -> str:
    """Source of some tokens, for messages."""
    words = [f"`{t.text}`" if t.kind == "quoted" else t.text for t in tokens]
    return re.sub(r"\s*([()\[\],])\s*", r"\1", " ".join(words)).replace(",", ", ")


def quoted(name: str) -> str:
    """Name of a column as a formula writes it: in backticks unless it is a plain word."""
    plain = re.fullmatch(r"[^\W\d]\w*", name) and name not in ("True", "False", "None")
    return name if plain else f"`{name}`"


def depths(tokens: Sequence[Token]) -> Iterator[int]:
    """Depth of parentheses after each token."""
    depth = 0
    for token in tokens:
        if token.kind == "operator":
            depth += (token.text in "([") - (token.text in ")]")
        yield depth


def check_parentheses(tokens: Sequence[Token], text: str) -> None:
    """Refuse parentheses that do not match."""
    levels = list(depths(tokens))
    if levels and (min(levels) < 0 or levels[-1] != 0):
        missing = "one is closed that was not opened" if min(levels) < 0 else "one is not closed"
        raise FormulaError(f"the parentheses of {shown(text)} do not match: {missing}")


def type_name(given: object) -> str:
    """Type of an argument, for a message; of a list, the types of what it holds."""
    name = type(given).__name__
    if not isinstance(given, (list, tuple)):
        return name
    return f"{name} of {', '.join(sorted({type(x).__name__ for x in given}))}"
