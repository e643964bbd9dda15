"""Tables of text cells as plain text that fits a terminal, as HTML and as LaTeX; nothing is cut."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence

import pandas as pd

WIDTH = 78
"""Characters in a line of text."""

RULE = "\0"
"""Stands for a horizontal line in lists of lines, whose length is not yet known."""

LEFT = ("Name",)
"""Columns that hold text and are aligned to the left."""

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}",
    "*": "{*}",
}  # fmt: skip


# ---------------------------------------------------------------------------- text


def text_table(table: pd.DataFrame, width: int = 0, rule: bool = False) -> list[str]:
    """Lines of a table, of at most `WIDTH` characters.

    Parameters
    ----------
    table
        cells and labels of text; the index has the labels of the rows, its name heads them
    width
        the labels' column is widened until lines have this many characters, if they had fewer
    rule
        a `RULE` under the names of the columns

    Returns
    -------
    lines; where the table is too wide, long labels have lines of their own, and many columns come
    in halves below each other
    """
    widths = _widths(table)
    labels = [str(table.index.name or ""), *table.index]
    longest = max(map(len, labels))
    if longest + sum(widths) > WIDTH:
        return _narrow(_one_label(table) if set(LEFT) & set(table) else table, rule)
    room = max(longest, width - sum(widths))
    lines = [_line(label, cells, table.columns, widths, room) for label, *cells in _rows(table)]
    return [lines[0], *[RULE] * rule, *lines[1:]]


def _rows(table: pd.DataFrame) -> Iterable[tuple[str, ...]]:
    """The names of the columns, then label and cells of each row."""
    return [(str(table.index.name or ""), *table.columns), *table.itertuples(name=None)]


def _widths(table: pd.DataFrame) -> list[int]:
    return [2 + max(map(len, [str(name), *table[name]])) for name in table]


def _line(
    label: str, cells: Sequence[str], names: Iterable[str], widths: Iterable[int], room: int
) -> str:
    text = f"{label:<{room}}"
    for cell, name, width in zip(cells, names, widths, strict=True):
        text += f"  {cell:<{width - 2}}" if name in LEFT else f"{cell:>{width}}"
    return text.rstrip()


def _one_label(table: pd.DataFrame) -> pd.DataFrame:
    """Groups (with their levels) on lines of their own and the names of their columns below."""
    labels: list[str] = []
    rows: list[list[str]] = []
    for group, levels, name, *cells in table.itertuples(name=None):
        label = f"{group} ({levels} levels)" if levels else group
        if group and name:
            labels.append(label)
            rows.append([""] * len(cells))
        labels.append(f"  {name}" if name else label)
        rows.append(cells)
    return pd.DataFrame(rows, labels, table.columns[2:])


def _narrow(table: pd.DataFrame, rule: bool) -> list[str]:
    """Lines of a wide table: a long label has its own line, many columns come in halves."""
    widths = _widths(table)
    if sum(widths) > WIDTH and len(widths) > 1:
        half = len(widths) // 2
        left, right = table.iloc[:, :half], table.iloc[:, half:]
        right = right[(right != "").any(axis=1)]
        return [*_narrow(left, rule), "", *_narrow(right, rule)]
    room = max(min(WIDTH - sum(widths), max(map(len, table.index), default=0)), 0)
    lines: list[str] = []
    for label, *cells in _rows(table):
        if len(label) > room:
            indent = " " * (len(label) - len(label.lstrip()))
            lines += textwrap.wrap(label, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
            label = ""
        line = _line(label, cells, table.columns, widths, room)
        lines += [line] if line else []
        rule_here = rule and len(lines) == 1
        lines += [RULE] if rule_here else []
    return lines


def text_pairs(
    block: pd.DataFrame, wide: Iterable[tuple[str, str]] = (), width: int = 0
) -> list[str]:
    """Lines of labels and values in two columns, or in one where two are too wide.

    Parameters
    ----------
    block
        four columns of text: label, value, label, value
    wide
        labels and values with lines of their own below
    width
        the second pair of columns moves to the right until lines have this many characters
    """
    a, b, c, d = (max(map(len, block[name])) for name in block)
    if a + b + c + d + 4 > WIDTH:
        left, right = block.iloc[:, :2], block.iloc[:, 2:]
        pairs = [pair for half in (left, right) for pair in half.itertuples(index=False, name=None)]
        return text_lines([*((label, value) for label, value in pairs if label), *wide])
    b = max(b, width - a - c - d - 4)
    lines = [
        f"{label:<{a}} {value:<{b}}  {other:<{c}} {last}".rstrip()
        for label, value, other, last in block.itertuples(index=False, name=None)
    ]
    return lines + text_lines(wide, a)


def text_lines(pairs: Iterable[tuple[str, str]], room: int = 0) -> list[str]:
    """Labels (of ``room`` characters or more) and values; long values go on in further lines."""
    pairs = list(pairs)
    width = max([room, *(len(label) for label, _ in pairs)]) + 1
    lines: list[str] = []
    for label, value in pairs:
        lines += textwrap.wrap(
            value, WIDTH, initial_indent=f"{label:<{width}}", subsequent_indent=" " * width
        ) or [label]  # fmt: skip
    return lines


def ruled(lines: Sequence[str], character: str = "-") -> str:
    """Lines as one text; each `RULE` is as long as the longest line."""
    width = max(map(len, lines), default=0)
    return "\n".join(character * width if line == RULE else line.rstrip() for line in lines)


# ---------------------------------------------------------------------------- HTML


def html_table(table: pd.DataFrame) -> str:
    """A table with labels and names of columns."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in next(iter(_rows(table))))
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
        + "".join(
            f"<td style='text-align:{'left' if name in LEFT else 'right'}'>{html.escape(cell)}</td>"
            for cell, name in zip(cells, table.columns, strict=True)
        )
        + "</tr>\n"
        for label, *cells in table.itertuples(name=None)
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def html_pairs(block: pd.DataFrame) -> str:
    """Pairs of labels and values, without names of columns."""
    rows = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for cells in block.itertuples(index=False, name=None)
    )
    return f"<table>\n{rows}</table>\n"


# ---------------------------------------------------------------------------- LaTeX


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(table: pd.DataFrame) -> str:
    """A tabular with labels and names of columns."""
    head, *rows = _rows(table)
    columns = "l" + "".join("l" if name in LEFT else "r" for name in table.columns)
    return _tabular(columns, [_cells(head), r"\hline", *map(_cells, rows)])


def latex_pairs(block: pd.DataFrame) -> str:
    """A tabular of pairs of labels and values, without names of columns."""
    return _tabular("llll", [_cells(row) for row in block.itertuples(index=False, name=None)])


def _cells(row: Iterable[str]) -> str:
    return " & ".join(map(latex_text, row)) + r" \\"


def _tabular(columns: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return (
        f"\\begin{{center}}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n"
        "\\end{tabular}\n\\end{center}\n"
    )
