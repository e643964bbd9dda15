"""What a model of arrays calls its columns."""

from __future__ import annotations

from dataclasses import dataclass

VC_LEVEL = "(levels) "
"""Begins the name of a column that holds the column names of a `VCSpec`."""


VC_COLUMN = "(column) "
"""Begins the name of a column that holds numbers of a `VCSpec`; zero where a group has it not."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names to show; None where the design's own names stand.

    Attributes
    ----------
    fixed, random
        names of all columns of X, and of the columns of the bars
    plain
        results come as numpy arrays, as the data did
    """

    fixed: tuple[str, ...] | None = None
    random: tuple[str, ...] | None = None
    plain: bool = False
