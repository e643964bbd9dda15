"""What one batch of rows becomes before its cross-products are taken: plain numpy, nothing else.

A *carried column* is the indicator of a cell (a combination of levels) times a product of powers
of shifted and scaled variables. Every column of X, Z and y is a linear combination of carried
columns, known only after the pass; the moments are those of the carried columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Level: TypeAlias = "str | int | float | bool"
Floats: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.int32]

RESPONSE = "(response)"


@dataclass(frozen=True, slots=True, order=True)
class Column:
    """Label of one carried column.

    Attributes
    ----------
    cell
        ``((factor, level), ...)`` sorted by factor; empty means every row.
    powers
        ``((variable, power), ...)`` sorted by variable, powers >= 1; empty means the constant.
    """

    cell: tuple[tuple[str, Level], ...] = ()
    powers: tuple[tuple[str, int], ...] = ()


CONSTANT = Column()


@dataclass(frozen=True, slots=True)
class Frame:
    """Shift and scale of the variables: what is carried is ``u = (x - shift) / scale``.

    Attributes
    ----------
    names
        variables, in a fixed order
    shift, scale
        (v,), units of the variable; scales are powers of two, so that scaling is exact
    """

    names: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shift) == len(self.scale)

    def of(self, name: str) -> tuple[float, float]:
        """Shift and scale of one variable."""
        i = self.names.index(name)
        return self.shift[i], self.scale[i]


@dataclass(frozen=True, slots=True)
class Recoding:
    """Carried columns of every row that are summed as combinations of themselves, see `whitening`.

    Attributes
    ----------
    columns
        those columns: the constant, the other random ones, the rest
    S
        rows of an upper triangular matrix; its first is (1, 0, 0, ...) but for what is added of
        the constant, and random columns are combinations of random columns
    """

    columns: tuple[Column, ...]
    S: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        assert self.columns[:1] == (CONSTANT,)
        assert len(self.S) == len(self.columns)
        assert all(len(row) == len(self.columns) for row in self.S)
        assert self.S[0][0] == 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one carried column is computed from a block's arrays.

    ``cells`` is the index of a code array in `DesignBlock.cells` (-1: every row), ``code`` the
    cell's code there, ``powers`` pairs (index in `DesignBlock.values`, power).
    """

    cells: int
    code: int
    powers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class DesignBlock:
    """The rows of one batch, complete and finite, ready for cross-products.

    Attributes
    ----------
    columns, recipes
        k labels and, aligned with them, how to compute each
    random
        positions in ``columns`` of the q random columns; the constant comes first
    frame, values
        v variables: their shifts and scales, and the (n,) unshifted values of each
    cells
        int32 arrays (n,): the code of the cell each row falls in, one array per set of factors
    group, n_groups
        int32 (n,): which of ``n_groups`` groups each row belongs to; some may have no row here
    weights
        (n,) positive, or None
    references
        take sums about a row of each group, see `references`
    recoding
        take sums of combinations of columns
    """

    columns: tuple[Column, ...]
    recipes: tuple[Recipe, ...]
    random: tuple[int, ...]
    frame: Frame
    values: tuple[Floats, ...]
    cells: tuple[Codes, ...]
    group: Codes
    n_groups: int
    weights: Floats | None
    references: bool = False
    recoding: Recoding | None = None

    def __post_init__(self) -> None:
        n = len(self.group)
        assert len(self.columns) == len(self.recipes)
        assert self.columns[self.random[0]] == CONSTANT
        assert all(len(v) == n for v in self.values)
        assert all(len(c) == n for c in self.cells)
        assert len(self.values) == len(self.frame.names)
        assert self.weights is None or len(self.weights) == n

    @property
    def nobs(self) -> int:
        """Number of rows."""
        return len(self.group)
