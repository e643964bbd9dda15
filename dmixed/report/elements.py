"""Parts of a page of HTML: sentences, tables that scroll by themselves, pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dmixed import markup
from dmixed.markup import text
from dmixed.report.pictures import Picture

LONG = 24
"""Characters from which the heads of rows are wrapped."""


def paragraph(*sentences: str, kind: str = "") -> str:
    """Sentences, escaped."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{text(' '.join(x for x in sentences if x))}</p>\n"


def heading(title: str) -> str:
    """Of a part of a section."""
    return f"<h3>{text(title)}</h3>\n"


def box(made: str, caption: str, kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide, also by keyboard."""
    name = f"box {kind}".strip()
    return (
        f'<div class="{name}" role="group" aria-label="{text(caption)}" tabindex="0">{made}</div>\n'
    )


def grid(
    caption: str,
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Collection[str] = (),
    heads: int = 1,
) -> str:
    """A table of all rows, whose first cells are their heads."""
    cells = list(rows)
    made = markup.table(names, cells, max(len(cells), 1), caption, heads, right)
    long = any(len(str(x)) > LONG for row in cells for x in row[:heads])
    return box(made, caption, "long" if long else "")


def listed(caption: str, pairs: Iterable[tuple[str, object]]) -> str:
    """A table of labels and values, which are wrapped."""
    return box(markup.pairs_table(pairs, caption), caption, "wrap")


def figure(picture: Picture) -> str:
    """A picture with its title; where it could not be drawn, what it would show."""
    caption = f"<figcaption>{text(picture.title)}</figcaption>\n"
    if picture.svg is None:
        told = f"This picture is missing, it needs matplotlib. It would show: {picture.seen}"
        return f"<figure>\n{caption}{paragraph(told)}</figure>\n"
    card = f'<div class="card">{picture.svg}</div>\n'
    return f"<figure>\n{caption}{card}{paragraph(picture.seen)}</figure>\n"
