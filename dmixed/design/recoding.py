"""After the pass: which linear combinations of the carried columns are the model's columns.

Levels are known now, and the moments of the variables; treatment contrasts, centring, scaling and
orthogonal polynomials are therefore one matrix T, and X = F T.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from formulaic.transforms.contrasts import Contrasts, TreatmentContrasts

from dmixed.blocks import CONSTANT, RESPONSE, Column, Floats, Level
from dmixed.design.columns import check_levels
from dmixed.design.spec import DesignSpec, Product
from dmixed.errors import DataError
from dmixed.formula.expressions import Call, Node, columns_of
from dmixed.formula.polynomials import (
    ONE,
    Expansion,
    Polynomial,
    check_size,
    degree_of,
    shown_powers,
    times,
)
from dmixed.formula.terms import display
from dmixed.formula.vocabulary import CONTRASTS

MAX_COLUMNS = 2000

Cells = dict[tuple[tuple[str, Level], ...], float]


@dataclass(frozen=True, slots=True)
class FactorLevels:
    """Levels of one factor met in some rows.

    Attributes
    ----------
    levels
        met, each once
    categories
        all categories that the column's type declares, in their order; None if it declares none,
        or if parts of the data declare different ones
    """

    levels: tuple[Level, ...]
    categories: tuple[Level, ...] | None

    def ordered(self, name: str) -> tuple[Level, ...]:
        """Levels met, in the declared order, else sorted: text by code point, numbers by size."""
        if self.categories is not None:
            met = set(self.levels)
            return tuple(x for x in self.categories if x in met)
        if len({isinstance(x, str) for x in self.levels}) > 1:
            raise DataError(
                f"{name!r} is text in one part of the data and a number in another; "
                "give the column one type everywhere"
            )
        levels = sorted(self.levels)
        if any(isinstance(x, float) and not x.is_integer() for x in levels):
            levels = [float(x) for x in levels]
        return tuple(levels)


def merge_levels(a: FactorLevels, b: FactorLevels) -> FactorLevels:
    """Levels of two sets of rows; associative and commutative up to the order of `levels`."""
    if not a.levels or not b.levels:
        return a if a.levels else b
    shown = {x: x for x in a.levels}
    for x in b.levels:
        if isinstance(shown.get(x, 0.0), float):  # 2 and 2.0 are one level, shown as 2
            shown[x] = x
    same = a.categories == b.categories
    return FactorLevels(tuple(shown.values()), a.categories if same else None)


@dataclass(frozen=True, slots=True)
class BarDesign:
    """Columns of one bar.

    Attributes
    ----------
    label
        ``g``, then ``g.1``, ...
    text
        the bar, ``(1 + x | g)``
    names
        q_j names, as formulaic names columns
    T
        (k, q_j) with Z_j = F T; zero but for random carried columns
    """

    label: str
    text: str
    names: tuple[str, ...]
    T: Floats


@dataclass(frozen=True, slots=True)
class Design:
    """The columns of the model in terms of the carried columns F (n, k).

    Attributes
    ----------
    spec
        what was evaluated on the rows
    levels
        levels of each factor in their order
    columns
        k labels of the carried columns, in the order of the rows of T
    fixed_names
        p names, as formulaic names columns
    T_fixed
        (k, p) with X = F T_fixed
    t_response
        (k,) with y - offset = F t_response
    fixed_degree
        (p,) total degree of each column in the variables: 0 for the intercept and contrasts
    bars
        one per bar
    unmet, T_unmet
        m cells without any row in the fit, and their rows (m, p + sum q_j) of T: for prediction
    """

    spec: DesignSpec
    levels: Mapping[str, tuple[Level, ...]]
    columns: tuple[Column, ...]
    fixed_names: tuple[str, ...]
    T_fixed: Floats
    t_response: Floats
    fixed_degree: tuple[int, ...]
    bars: tuple[BarDesign, ...]
    unmet: tuple[Column, ...]
    T_unmet: Floats

    @property
    def fixed_columns(self) -> tuple[str, ...]:
        """Data columns that the fixed terms use."""
        inputs = self.spec.fixed_inputs
        return tuple(dict.fromkeys(name for x in inputs for name in columns_of(x.node)))

    def __post_init__(self) -> None:
        k, p = len(self.columns), len(self.fixed_names)
        assert self.T_fixed.shape == (k, p)
        assert len(self.fixed_degree) == p
        assert self.t_response.shape == (k,)
        assert all(bar.T.shape == (k, len(bar.names)) for bar in self.bars)
        assert all(column.cell for column in self.unmet)
        assert self.T_unmet.shape == (len(self.unmet), p + sum(len(b.names) for b in self.bars))


def learn(
    spec: DesignSpec,
    levels: Mapping[str, FactorLevels],
    columns: Sequence[Column],
    FtF: Floats,
    nobs: int,
) -> Design:
    """Design of a model whose rows have all been seen.

    Parameters
    ----------
    spec
        what was evaluated on the rows
    levels
        levels met of each factor, over all rows
    columns
        k carried columns
    FtF
        (k, k) their cross-products over all rows, unweighted
    nobs
        rows used

    Raises
    ------
    DataError
        there are no rows, or too many levels, or a variable does not vary where it must
    """
    if nobs == 0:
        raise DataError("no rows to fit: the data are empty, or every row has a missing value")
    _check_sums(columns, FtF)
    ordered = {name: found.ordered(name) for name, found in levels.items()}
    for name, found in ordered.items():
        check_levels(name, len(found))
    coder = _Coder(spec, ordered, Expansion(_Moments(spec, columns, FtF, nobs)))
    fixed = coder.code(spec.fixed)
    bars = [coder.code(products) for products in spec.bars]
    _check_names(fixed.names, "the fixed part")
    for bar, coded in zip(spec.formula.bars, bars, strict=True):
        _check_names(coded.names, bar.text)
    position = {column: i for i, column in enumerate(columns)}
    k = len(columns)
    for coded in (fixed, *bars):
        for column in itertools.chain.from_iterable(coded.entries):
            position.setdefault(column, len(position))
    T = [coded.matrix(position) for coded in (fixed, *bars)]
    shift, scale = spec.frame.of(RESPONSE)
    t_response = np.zeros(k)
    t_response[position[CONSTANT]] = shift
    t_response[position[Column((), ((RESPONSE, 1),))]] = scale
    return Design(
        spec,
        ordered,
        tuple(columns),
        tuple(fixed.names),
        T[0][:k],
        t_response,
        tuple(fixed.degrees),
        tuple(
            BarDesign(_label(spec.group, i), bar.text, tuple(coded.names), t[:k])
            for i, (bar, coded, t) in enumerate(zip(spec.formula.bars, bars, T[1:], strict=True))
        ),
        tuple(position)[k:],
        np.hstack(T)[k:],
    )


def _label(group: Sequence[str], bar: int) -> str:
    """Name of a bar among several of one factor, as lme4's VarCorr: g, g.1, ..."""
    return ":".join(group) + (f".{bar}" if bar else "")


def _check_sums(columns: Sequence[Column], FtF: Floats) -> None:
    """Refuse carried columns whose squares were lost."""
    for column, square in zip(columns, np.diag(FtF), strict=True):
        if not column.cell or not np.isfinite(square):  # few rows of a cell may be near zero
            check_size(shown_powers(column.powers), {ONE: float(square)})


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuse two columns of one name: results are looked up by name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(
                f"{where} has {count} columns called {name!r}: the name of a column of the data "
                "is also that of another coefficient; rename the column"
            )


class _Moments:
    """Statistics of the variables over all rows (`polynomials.Statistics`)."""

    def __init__(self, spec: DesignSpec, columns: Sequence[Column], FtF: Floats, n: int) -> None:
        self.frame = spec.frame
        self.position = {c.powers: i for i, c in enumerate(columns) if not c.cell}
        self.FtF = FtF
        self.n = n

    def affine(self, variable: str) -> tuple[float, float]:
        return self.frame.of(variable)

    def moments(self, polynomials: Sequence[Polynomial]) -> tuple[Floats, float]:
        C = np.zeros((len(self.FtF), len(polynomials)))
        for j, polynomial in enumerate(polynomials):
            for monomial, value in polynomial.items():
                C[self.position[monomial], j] = value
        with np.errstate(all="ignore"):
            sums = C.T @ self.FtF @ C
        for polynomial, square in zip(polynomials, np.diag(sums), strict=True):
            if not np.isfinite(square):
                names = ":".join(dict.fromkeys(v for m in polynomial for v, _ in m))
                check_size(names, {ONE: float(square)})
        return sums, self.n


@dataclass
class _Coded:
    """Columns being built: name, degree, and value for each carried column."""

    names: list[str] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)
    entries: list[dict[Column, float]] = field(default_factory=list)

    def matrix(self, position: Mapping[Column, int]) -> Floats:
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


class _Coder:
    """Codes terms: names, and coefficients of the carried columns."""

    def __init__(
        self, spec: DesignSpec, levels: Mapping[str, tuple[Level, ...]], expansion: Expansion
    ) -> None:
        self.spec = spec
        self.levels = levels
        self.expansion = expansion
        self.pieces: dict[tuple[Node, bool], list[_Piece]] = {}

    def code(self, products: Sequence[Product]) -> _Coded:
        """Columns of products of factors, in formulaic's order."""
        coded = _Coded()
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

    def _axis(self, factor: Node, reduced: bool) -> list[_Piece]:
        """Columns of one factor."""
        key = (factor, reduced)
        if key not in self.pieces:
            category = self.spec.category_of(factor)
            if category is not None:
                self.pieces[key] = _contrasts(factor, category.name, self.levels, reduced)
            else:
                columns = self.expansion.columns(factor)[1 if reduced else 0 :]
                self.pieces[key] = [
                    _Piece(display(factor) + suffix, {(): 1.0}, polynomial)
                    for suffix, polynomial in columns
                ]
        return self.pieces[key]


def _add(coded: _Coded, pieces: Sequence[_Piece], scoped: Product) -> None:
    """Add the column that is the product of some pieces."""
    cells: Cells = {(): 1.0}
    polynomial: Polynomial = {ONE: 1.0}
    for piece, (factor, _) in zip(pieces, scoped, strict=True):
        cells = _cross(cells, piece.cells)
        polynomial = times(polynomial, piece.polynomial, factor)
    name = ":".join(p.name for p in pieces) or "Intercept"
    check_size(name, polynomial)
    coded.names.append(name)
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
