"""Products of factors to columns: names, and coefficients of the carried columns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from formulaic.transforms.contrasts import Contrasts, TreatmentContrasts

from dmixed.blocks import Column, Floats, Level
from dmixed.design.spans import Product, category_of
from dmixed.design.spec import DesignSpec, RandomTerm, key_of
from dmixed.errors import DataError
from dmixed.formula.expressions import Call, Node
from dmixed.formula.polynomials import ONE, Expansion, Polynomial, check_size, degree_of, times
from dmixed.formula.terms import display
from dmixed.formula.vocabulary import CONTRASTS

MAX_COLUMNS = 2000

Cells = dict[tuple[tuple[str, Level], ...], float]


@dataclass
class Coded:
    """Columns being built: name, term, degree, and value for each carried column."""

    names: list[str] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)
    entries: list[dict[Column, float]] = field(default_factory=list)

    def matrix(self, position: Mapping[Column, int]) -> Floats:
        """(k, columns) coefficients, where `position` has the row of each carried column."""
        T = np.zeros((len(position), len(self.names)))
        for j, entries in enumerate(self.entries):
            for column, value in entries.items():
                T[position[column], j] = value
        return T


@dataclass(frozen=True, slots=True)
class _Piece:
    """One column of one factor: a weight per level, or a polynomial."""

    name: str
    cells: Cells
    polynomial: Polynomial


class Coder:
    """Codes terms: names, and coefficients of the carried columns."""

    def __init__(
        self, spec: DesignSpec, levels: Mapping[str, tuple[Level, ...]], expansion: Expansion
    ) -> None:
        self.spec = spec
        self.levels = levels
        self.expansion = expansion
        self.pieces: dict[tuple[Node, bool], list[_Piece]] = {}

    def code(self, products: Sequence[Product]) -> Coded:
        """Columns of products of factors, in formulaic's order."""
        coded = Coded()
        for scoped in products:
            axes = [self._axis(factor, reduced) for factor, reduced in scoped]
            count = len(coded.names) + int(np.prod([len(a) for a in axes]))
            if count > MAX_COLUMNS:
                text = ":".join(display(factor) for factor, _ in scoped)
                raise DataError(
                    f"the term {text} makes the design more than {MAX_COLUMNS} columns wide; "
                    "factors with many levels belong to the groups, right of a bar"
                )
            for product in itertools.product(*reversed(axes)):  # the first factor runs fastest
                _add(coded, product[::-1], scoped)
        return coded

    def patterns(self, term: RandomTerm) -> tuple[str, ...]:
        """Names of a term's columns; the levels of a component's categories are left open."""
        component = self.spec.formula.bars[term.block].component is not None
        names = []
        for written in term.written:
            axes = []
            for factor, reduced in written:
                category = category_of(factor, self.spec.text_columns) if component else None
                if category is None:
                    axes.append([_escaped(piece.name) for piece in self._axis(factor, reduced)])
                else:
                    at = term.key.index(self.spec.keys.index(key_of(category)))
                    base = "T." if reduced else ""
                    axes.append([f"{_escaped(display(factor))}[{base}{{{at}!s}}]"])
            for pieces in itertools.product(*reversed(axes)):
                names.append(":".join(reversed(pieces)) or "Intercept")
        return tuple(names)

    def _axis(self, factor: Node, reduced: bool) -> list[_Piece]:
        """Columns of one factor."""
        key = (factor, reduced)
        if key not in self.pieces:
            category = category_of(factor, self.spec.text_columns)
            if category is not None:
                self.pieces[key] = _contrasts(factor, category.name, self.levels, reduced)
            else:
                columns = self.expansion.columns(factor)[1 if reduced else 0 :]
                self.pieces[key] = [
                    _Piece(display(factor) + suffix, {(): 1.0}, polynomial)
                    for suffix, polynomial in columns
                ]
        return self.pieces[key]


def _escaped(text: str) -> str:
    """Text as it stands in a pattern for `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")


def _add(coded: Coded, pieces: Sequence[_Piece], scoped: Product) -> None:
    """Add the column that is the product of some pieces."""
    cells: Cells = {(): 1.0}
    polynomial: Polynomial = {ONE: 1.0}
    for piece, (factor, _) in zip(pieces, scoped, strict=True):
        cells = _cross(cells, piece.cells)
        polynomial = times(polynomial, piece.polynomial, factor)
    name = ":".join(p.name for p in pieces) or "Intercept"
    check_size(name, polynomial)
    coded.names.append(name)
    coded.terms.append(":".join(display(factor) for factor, _ in scoped) or "Intercept")
    coded.degrees.append(degree_of(polynomial))
    coded.entries.append(
        {
            Column(cell, monomial): weight * value
            for cell, weight in cells.items()
            for monomial, value in polynomial.items()
        }
    )


def _cross(a: Cells, b: Cells) -> Cells:
    """Cells of both; a row is in at most one level of a factor."""
    crossed: Cells = {}
    for (first, x), (second, y) in itertools.product(a.items(), b.items()):
        levels = dict(first)
        if all(levels.setdefault(name, level) == level for name, level in second):
            cell = tuple(sorted(levels.items()))
            crossed[cell] = crossed.get(cell, 0.0) + x * y
    return crossed


def _contrasts(
    factor: Node, name: str, levels: Mapping[str, tuple[Level, ...]], reduced: bool
) -> list[_Piece]:
    """Columns of a factor with levels, coded as formulaic codes it."""
    met = _declared(factor, name, levels[name])
    if len(met) <= reduced:
        return []
    contrasts = _contrasts_of(factor)
    try:
        coding = np.asarray(contrasts.get_coding_matrix(met, reduced_rank=reduced), dtype=float)
        fields = contrasts.get_coding_column_names(met, reduced_rank=reduced)
    except ValueError as error:
        raise DataError(f"{display(factor)}: {error} (levels: {_some(met)})") from None
    form = contrasts.get_factor_format(met, reduced_rank=reduced)
    return [
        _Piece(
            form.format(name=display(factor), field=label),
            {((name, level),): float(w) for level, w in zip(met, weights, strict=True) if w},
            {ONE: 1.0},
        )
        for label, weights in zip(fields, coding.T, strict=True)
    ]


def _declared(factor: Node, name: str, met: tuple[Level, ...]) -> list[Level]:
    """Levels met, in the order of ``levels=`` if it is given."""
    wanted = factor.value("levels") if isinstance(factor, Call) else None
    if wanted is None:
        return list(met)
    assert isinstance(wanted, tuple)  # checked when the call was read
    for level in met:
        if level not in wanted:
            raise DataError(f"{name!r} has the level {level!r}, which {display(factor)} leaves out")
    return [level for level in wanted if level in met]


def _contrasts_of(factor: Node) -> Contrasts:
    """Formulaic's contrasts of a factor; treatment contrasts unless ``C()`` names others."""
    given = factor.option("contrasts") if isinstance(factor, Call) else None
    if given is None:
        return TreatmentContrasts()
    assert isinstance(given, Call)  # checked when the call was read
    kind, _ = CONTRASTS[given.function]
    options = {key: given.value(key) for key, _ in given.options}
    if "reference" in options:
        options["base"] = options.pop("reference")
    return kind(**options)


def _some(levels: Sequence[Level]) -> str:
    """Levels for a message."""
    shown = ", ".join(repr(x) for x in levels[:8])
    return f"{shown}, ..." if len(levels) > 8 else shown
