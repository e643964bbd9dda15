"""HTML of small things for notebooks: nothing but text and tables, in whatever colours there are.

All that is shown is escaped: names of columns, levels and files come from data. No colour is set
but of an edge, so that notebooks may be dark.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

CELL, RIGHT = "text-align:left;vertical-align:top", "text-align:right;vertical-align:top"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that are none, or that turn the direction of what follows."""


def cleaned(value: object) -> str:
    """What is shown of a value, on one line; characters that control something do nothing."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(str(value).split()))


def text(value: object) -> str:
    """What is shown of a value, escaped."""
    return html.escape(cleaned(value))


def page(title: str, pairs: Iterable[tuple[str, object]], *more: str) -> str:
    """A title, a table of labels and values, and whatever HTML comes after it."""
    top = f"<div>\n<p><strong>{text(title)}</strong></p>\n"
    return f"{top}{pairs_table(pairs)}{''.join(more)}</div>\n"


def pairs_table(pairs: Iterable[tuple[str, object]], caption: str = "") -> str:
    """A table of labels and values."""
    rows = "".join(
        f"<tr><th scope='row' style='{CELL}'>{text(label)}</th>"
        f"<td style='{CELL}'>{text(value)}</td></tr>\n"
        for label, value in pairs
    )
    return f"<table>\n{_caption(caption)}{rows}</table>\n"


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    shown: int = 20,
    caption: str = "",
    heads: int = 0,
    right: Collection[str] = (),
) -> str:
    """A table of cells, numbers to the right; of many rows the last, and how many there are.

    Parameters
    ----------
    heads
        the first so many cells of a row are its head
    right
        names of columns of numbers that are text
    """
    cells = [list(row) for row in rows]
    left_out = max(len(cells) - shown, 0)
    numbers = [all(_whole(row[j]) for row in cells) and bool(cells) for j in range(len(names))]
    edges = [
        RIGHT if name in right or whole else CELL
        for name, whole in zip(names, numbers, strict=True)
    ]
    head = "".join(
        f"<th scope='col' style='{edge}'>{text(name)}</th>"
        for name, edge in zip(names, edges, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            _cell(value, edge, i < heads)
            for i, (value, edge) in enumerate(zip(row, edges, strict=True))
        )
        + "</tr>\n"
        for row in cells[left_out:]
    )
    told = caption + (f" (the last {shown} of {len(cells):,})" if left_out else "")
    top = f"<table>\n{_caption(told)}<thead><tr>{head}</tr></thead>\n"
    return f"{top}<tbody>\n{body}</tbody>\n</table>\n"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _caption(told: str) -> str:
    return f"<caption>{text(told)}</caption>\n" if told else ""


def _cell(value: object, edge: str = CELL, head: bool = False) -> str:
    told = text(value)
    if _whole(value):
        edge, told = RIGHT, f"{value:,}"
    name, scope = ("th", " scope='row'") if head else ("td", "")
    return f"<{name}{scope} style='{edge}'>{told}</{name}>"


def counted(rows: int, dropped: Iterable[tuple[str, int]]) -> str:
    """Rows used, and those dropped by reason."""
    reasons = ", ".join(f"{n:,} dropped: {reason}" for reason, n in dropped)
    return f"{rows:,}" + (f" ({reasons})" if reasons else "")


def moments_html(moments: Any) -> str:
    """Moments: the model they can fit, how many rows and groups, and of which data."""
    where = (
        "on the workers of a cluster" if hasattr(moments.cells, "futures") else "in this process"
    )
    pairs = [
        ("Formula", moments.formula),
        ("Rows", counted(moments.nobs, moments.dropped.items())),
        ("Cells of the groups", f"{moments.n_cells:,}, {where}"),
    ]
    rows = [_source(state) for state in moments.sources]
    more = [table(("data", "location", "files"), rows, caption="Rows of")] if rows else []
    return page("Moments", pairs, *more)


def _source(state: Any) -> tuple[object, ...]:
    return state.kind, state.place, len(state.files)


def store_html(store: Any) -> str:
    """A store of moments: where, which state, and what was added when."""
    pairs = [
        ("Place", store.uri),
        ("Version", f"{store.version:,}"),
        ("Formula", store.formula),
        ("Rows", f"{store.nobs:,}"),
        ("Files of data", f"{len(store.files):,}"),
    ]
    rows = [
        (delta.created, delta.nobs, sum(delta.dropped.values()), _files(delta))
        for delta in store.deltas
    ]
    return page("Moment store", pairs, table(("added", "rows", "dropped", "of"), rows))


def _files(delta: Any) -> str:
    names = [file.name for state in delta.sources for file in state.files]
    if not names:
        return ", ".join(state.location or state.kind for state in delta.sources)
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
