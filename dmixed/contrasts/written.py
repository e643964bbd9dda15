"""Linear hypotheses R b = q as users write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from formulaic.utils.constraints import LinearConstraints
from numpy.typing import NDArray

from dmixed.errors import DataError, FormulaError

Floats = NDArray[np.float64]
"""Array of double precision numbers."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WORD = r"(?:[^\s+\-*/=,()\[\]]|\[[^\]]*\]|\([^()]*(?:\([^()]*\)[^()]*)*\))+"
_BEFORE, _AFTER = r"(?<![^\s+\-*/=,(])", r"(?![^\s+\-*/=,)])"


def constraint(r: Any, names: Sequence[str], fixed: int | None = None) -> tuple[Floats, Floats]:
    """Matrix and right-hand side of linear hypotheses R b = q.

    Parameters
    ----------
    r
        an (m, K) or (K,) array (q is zero); a pair (R, q), q a number or (m,); a text such as
        ``"x1 = 0, x2 - 2*x3 = 1"``, ``"x1"`` or ``"x1 = x2 = x3"``; or a list of such texts.
        Parameters stand there under their names as they are, ``C(a)[T.b]`` or ``g Var``
    names
        (K,) names of the parameters
    fixed
        arrays may have this many columns too; the parameters after them are then not tested

    Returns
    -------
    R
        (m, K)
    q
        (m,) units of R b

    Raises
    ------
    FormulaError
        a text cannot be read, or has a word that is no parameter
    DataError
        an array of another shape, or with values that are not finite

    Examples
    --------
    >>> R, q = constraint("x = 2*C(a)[T.b], g Var = 1", ["x", "C(a)[T.b]", "g Var"])
    >>> R.tolist(), q.tolist()
    ([[1.0, -2.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 1.0])
    """
    texts = [r] if isinstance(r, str) else r
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
        return _read(texts, list(names))
    R, q = r if isinstance(r, tuple) and len(r) == 2 else (r, 0.0)
    R, q = np.atleast_2d(_numbers(R, "R")), _numbers(q, "q")
    m, columns = R.shape if R.ndim == 2 else (0, 0)
    if columns == fixed != len(names):
        R = np.hstack([R, np.zeros((m, len(names) - columns))])
    elif columns != len(names) or not m:
        raise DataError(
            f"a hypothesis of shape {R.shape} does not fit {len(names)} parameters: give a row of "
            f"{len(names)} numbers per hypothesis, in the order {', '.join(names)}"
        )
    if q.size not in (1, m):
        raise DataError(
            f"q has {q.size} values for {m} rows of R: give one per row, or one for all"
        )
    return R, np.broadcast_to(q.ravel(), m).copy()


def _numbers(values: Any, what: str) -> Floats:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(
            f"{what}={values!r}: hypotheses are a text, a list of texts, an array R of numbers, or "
            "a pair (R, q)"
        ) from None
    if not np.isfinite(array).all():
        raise DataError(f"{what} holds values that are not finite: hypotheses need numbers")
    return array


def _read(texts: Iterable[str], names: list[str]) -> tuple[Floats, Floats]:
    """Matrix and right-hand side of hypotheses in words."""
    pieces = [p for t in texts for p in _placeholders(t, names).split(",")]
    chains = [[side.strip() for side in piece.split("=")] for piece in pieces]
    single = [
        " = ".join(sides[k : k + 2])
        for sides in chains
        for k in range(max(len(sides) - 1, 1))
    ]  # fmt: skip
    symbols = [f"p{k}" for k in range(len(names))]
    rows, values = [], []
    for text in single:
        shown = re.sub(r"\bp(\d+)\b", lambda found: names[int(found[1])], text)
        if not text.strip():
            raise FormulaError("an empty hypothesis: write such as 'x = 0', commas between several")
        try:
            found = LinearConstraints.from_spec(_signs(text), symbols)
        except Exception:  # formulaic has one for every way in which algebra goes wrong
            raise FormulaError(
                f"the hypothesis {shown!r} cannot be read: write sums of parameters "
                "times numbers, such as 'x1 - 2*x2 = 1'"
            ) from None
        if not found.constraint_matrix.any():
            raise FormulaError(f"the hypothesis {shown!r} says nothing about any parameter")
        rows.append(found.constraint_matrix)
        values.append(found.constraint_values)
    return _numbers(np.vstack(rows), "R"), _numbers(np.concatenate(values), "q")


def _placeholders(text: str, names: list[str]) -> str:
    """A text with ``p<k>`` for the k-th parameter and plain decimals for numbers."""
    longest = sorted(range(len(names)), key=lambda k: -len(names[k]))
    known = "|".join(re.escape(names[k]) for k in longest if names[k])
    scanner = re.compile(
        f"{_BEFORE}(?P<name>{known or '(?!)'}){_AFTER}|{_BEFORE}(?P<number>{_NUMBER}){_AFTER}"
        f"|(?P<equal>==?)|(?P<plain>[\\s+\\-*/,()])|(?P<word>{_WORD}|.)"
    )
    parts = []
    for found in scanner.finditer(text):
        kind, token = found.lastgroup, found[0]
        if kind == "word":
            raise FormulaError(_unknown(token, text, names))
        if kind == "name":
            if names.count(token) > 1:
                raise FormulaError(
                    f"several parameters are called {token!r}: give an array instead"
                )
            token = f"p{names.index(token)}"
        elif kind == "number":
            token = np.format_float_positional(float(token), trim="-")
        parts.append("=" if kind == "equal" else token)
    return "".join(parts)


def _unknown(word: str, text: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    hint = f"; the closest is {close[0]!r}" if close else ""
    return f"{word!r} in the hypothesis {text!r} is no parameter{hint}. Known: {', '.join(names)}"


def _signs(text: str) -> str:
    """The same algebra without a sign after an operator, which formulaic does not read."""
    text = re.sub(
        r"[+-](?:\s*[+-])+", lambda run: "-" if run[0].count("-") % 2 else "+", text
    )  # fmt: skip
    text = re.sub(r"([=*/(])\s*\+", r"\1", text)
    return re.sub(r"/\s*-", "/(-1)/", re.sub(r"([=*])\s*-", r"\1(-1)*", text))


def written(row: Floats, value: float, names: Sequence[str]) -> str:
    """A row of R and its value as one would write them."""
    text = ""
    for k in np.flatnonzero(row).tolist():
        sign, size = "-" if row[k] < 0 else "+", abs(row[k])
        factor = "" if size == 1 else f"{size:g}*"
        text += f" {sign} {factor}{names[k]}" if text else f"{sign.strip('+')}{factor}{names[k]}"
    return f"{text or '0'} = {value:g}"
