"""Functions that a formula calls by a plain name, found where the caller has them.

Only `MixedLM.from_formula` and `mixedlm` look there, as statsmodels does: formulas that come from
files (`lmer`, the command line) have the closed vocabulary and ``context=`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType, FunctionType
from typing import Any

from dmixed.formula.tokens import tokenize
from dmixed.formula.vocabulary import STRUCTURED

_LIBRARIES = ("numpy", "patsy", "formulaic")
"""Their functions are the vocabulary's, which has the row-wise ones."""


@dataclass(frozen=True, slots=True)
class RowWise:
    """A function of the caller's, called with numbers alone: no text of a formula reaches it."""

    function: FunctionType

    def __call__(self, *arguments: Any) -> Any:
        """Value for arrays and numbers."""
        if any(isinstance(x, str | tuple) or x is None for x in arguments):
            raise TypeError("a function found by its name takes columns and numbers only")
        return self.function(*arguments)


def functions_of(frame: FrameType, texts: Iterable[str]) -> dict[str, RowWise]:
    """Functions that some formulas call and the frame's variables hold.

    Functions written in Python alone: no builtins, no methods, no classes, no other callables.
    """
    found: dict[str, RowWise] = {}
    for name in {name for text in texts for name in _called(text)}:
        value = frame.f_locals.get(name, frame.f_globals.get(name))
        if isinstance(value, FunctionType):
            module = str(getattr(value, "__module__", "") or "")
            if module.split(".")[0] not in _LIBRARIES:
                found[name] = RowWise(value)
    return found


def _called(text: str) -> Iterable[str]:
    """Plain names before a parenthesis that are not part of the language of formulas."""
    for token, after in pairwise(tokenize(text)):
        called = token.kind == "name" and after.among("(") and token.text.isidentifier()
        if called and token.text not in STRUCTURED:
            yield token.text


def joined(
    context: Mapping[str, Callable[..., Any]] | None, frame: FrameType, texts: Iterable[str]
) -> dict[str, Callable[..., Any]]:
    """Functions given, and those of the frame; what is given counts."""
    return {**functions_of(frame, texts), **dict(context or {})}
