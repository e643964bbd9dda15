"""HTML of small things for notebooks: nothing but text and tables, in whatever colours there are.

All that is shown is escaped: names of columns, levels and files come from data. No colour is set
but of an edge, so that notebooks may be dark.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

CELL = "text-align:left;vertical-align:top"


def page(title: str, pairs: Iterable[tuple[str, object]], *more: str) -> str:
    """A title, a table of labels and values, and whatever HTML comes after it."""
    rows = "".join(
        f"<tr><th scope='row' style='{CELL}'>{html.escape(label)}</th>"
        f"<td style='{CELL}'>{html.escape(str(value))}</td></tr>\n"
        for label, value in pairs
    )
    return (
        f"<div>\n<p><strong>{html.escape(title)}</strong></p>\n"
        f"<table>\n{rows}</table>\n{''.join(more)}</div>\n"
    )


def table(
    names: Sequence[str], rows: Iterable[Sequence[object]], shown: int = 20, caption: str = ""
) -> str:
    """A table of cells, numbers to the right; of many rows the last, and how many there are."""
    cells = [list(row) for row in rows]
    left_out = max(len(cells) - shown, 0)
    head = "".join(f"<th scope='col' style='{CELL}'>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in cells[left_out:])
    text = caption + (f" (the last {shown} of {len(cells):,})" if left_out else "")
    top = f"<caption>{html.escape(text)}</caption>\n" if text else ""
    return f"<table>\n{top}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"<td style='text-align:right'>{value:,}</td>"
    return f"<td style='{CELL}'>{html.escape(str(value))}</td>"


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
    return state.kind, state.location or "in memory", len(state.files)


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
