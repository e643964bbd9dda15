"""Functions that a formula calls by a plain name, found where the caller has them.

Only `MixedLM.from_formula` and `mixedlm` look there, as statsmodels does: formulas that come from
files (`lmer`, the command line) have the closed vocabulary and ``context=`` alone.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np

from dmixed.formula.tokens import tokenize
from dmixed.formula.vocabulary import STRUCTURED


def functions_of(frame: FrameType, texts: Iterable[str | None]) -> dict[str, Callable[..., Any]]:
    """Functions that some formulas call and the frame's variables hold.

    numpy's own stay with the vocabulary, which has the row-wise ones; builtins are never taken.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in {name for text in texts if text for name in _called(text)}:
        value = frame.f_locals.get(name, frame.f_globals.get(name))
        if value is None or not callable(value) or isinstance(value, np.ufunc | type):
            continue
        module = str(getattr(value, "__module__", "") or "")
        if module.split(".")[0] in ("numpy", "builtins", "math", "patsy", "formulaic"):
            continue
        if getattr(builtins, name, None) is not value:
            found[name] = value
    return found


def _called(text: str) -> Iterable[str]:
    """Plain names before a parenthesis that are not part of the language of formulas."""
    tokens = tokenize(text)
    for token, after in pairwise(tokens):
        called = token.kind == "name" and after.among("(") and token.text.isidentifier()
        if called and token.text not in STRUCTURED:
            yield token.text


def joined(
    context: Mapping[str, Callable[..., Any]] | None, frame: FrameType, texts: Iterable[str | None]
) -> dict[str, Callable[..., Any]]:
    """Functions given, and those of the frame; what is given counts."""
    return {**functions_of(frame, texts), **dict(context or {})}
