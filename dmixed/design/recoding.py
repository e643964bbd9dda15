"""After the pass: which linear combinations of the carried columns are the model's columns.

Levels are known now, and the moments of the variables; treatment contrasts, centring, scaling and
orthogonal polynomials are therefore one matrix T, and X = F T.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmixed.blocks import CONSTANT, RESPONSE, Column, Floats, Level
from dmixed.design.coding import Coder
from dmixed.design.columns import check_levels
from dmixed.design.spec import DesignSpec
from dmixed.errors import DataError
from dmixed.formula import Bar
from dmixed.formula.expressions import columns_of
from dmixed.formula.polynomials import ONE, Expansion, Polynomial, check_size, shown_powers


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
    """One bar, or one variance component.

    Attributes
    ----------
    label
        ``g``, then ``g.1``, ... for the bars of one factor; the name of a component
    text
        the bar, ``(1 + x | g)``, or the component, ``cask: 0 + C(cask)``
    names
        names of a bar's columns, as formulaic names them; none for a component
    component
        name of a variance component; None for a bar
    """

    label: str
    text: str
    names: tuple[str, ...]
    component: str | None


@dataclass(frozen=True, slots=True)
class TermDesign:
    """Random columns that one set of keys divides into levels.

    Attributes
    ----------
    block
        position of its bar in `Design.bars`
    key, reduced
        positions in `DesignSpec.keys`, see `RandomTerm`
    names
        c names without the categories of a component, as formulaic names columns
    T
        (k, c) with Z = F T; zero but for random carried columns
    patterns
        c names with fields for the levels of the keys: ``C(cask)[{1!s}]:x``
    """

    block: int
    key: tuple[int, ...]
    reduced: tuple[int, ...]
    names: tuple[str, ...]
    T: Floats
    patterns: tuple[str, ...]


def component_column(term: TermDesign, levels: Sequence[object], j: int) -> str:
    """Name of a column of a variance component: ``C(cask)[a]:x``.

    Parameters
    ----------
    levels
        levels of the term's keys, in the order of `TermDesign.key`
    j
        which of the term's columns
    """
    return term.patterns[j].format(*levels)


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
    fixed_names, fixed_terms
        p names, as formulaic names columns, and the term each comes from
    T_fixed
        (k, p) with X = F T_fixed
    t_response
        (k,) with y - offset = F t_response
    fixed_degree
        (p,) total degree of each column in the variables: 0 for the intercept and contrasts
    bars
        one per bar or variance component
    terms
        random columns, in the order of `DesignSpec.terms`
    unmet, T_unmet
        m cells without any row in the fit, and their rows (m, p + sum c) of T, c over the terms:
        for prediction
    """

    spec: DesignSpec
    levels: Mapping[str, tuple[Level, ...]]
    columns: tuple[Column, ...]
    fixed_names: tuple[str, ...]
    fixed_terms: tuple[str, ...]
    T_fixed: Floats
    t_response: Floats
    fixed_degree: tuple[int, ...]
    bars: tuple[BarDesign, ...]
    terms: tuple[TermDesign, ...]
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
        assert len(self.fixed_degree) == len(self.fixed_terms) == p
        assert self.t_response.shape == (k,)
        assert all(term.T.shape == (k, len(term.names)) for term in self.terms)
        assert all(column.cell for column in self.unmet)
        assert self.T_unmet.shape == (len(self.unmet), p + sum(len(t.names) for t in self.terms))


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
    coder = Coder(spec, ordered, Expansion(_Moments(spec, columns, FtF, nobs)))
    fixed = coder.code(spec.fixed)
    random = [coder.code(term.products) for term in spec.terms]
    _check_names(fixed.names, "the fixed part")
    for term, coded in zip(spec.terms, random, strict=True):
        _check_names(coded.names, spec.formula.bars[term.block].text)
    position = {column: i for i, column in enumerate(columns)}
    k = len(columns)
    for coded in (fixed, *random):
        for column in itertools.chain.from_iterable(coded.entries):
            position.setdefault(column, len(position))
    T = [coded.matrix(position) for coded in (fixed, *random)]
    terms = tuple(
        TermDesign(
            *(term.block, term.key, term.reduced, tuple(coded.names), t[:k]), coder.patterns(term)
        )
        for term, coded, t in zip(spec.terms, random, T[1:], strict=True)
    )
    return Design(
        spec,
        ordered,
        tuple(columns),
        tuple(fixed.names),
        tuple(fixed.terms),
        T[0][:k],
        _response(spec, position)[:k],
        tuple(fixed.degrees),
        _bars(spec.formula.bars, terms),
        terms,
        tuple(position)[k:],
        np.hstack(T)[k:],
    )


def _response(spec: DesignSpec, position: Mapping[Column, int]) -> Floats:
    """Coefficients of the response."""
    t = np.zeros(len(position))
    t[position[CONSTANT]], t[position[Column((), ((RESPONSE, 1),))]] = spec.frame.of(RESPONSE)
    return t


def _bars(bars: Sequence[Bar], terms: Sequence[TermDesign]) -> tuple[BarDesign, ...]:
    """Bars and components with labels as lme4's VarCorr: g, g.1, ... for the bars of a factor."""
    names = {term.block: term.names for term in terms}
    met: Counter[tuple[str, ...]] = Counter()
    designs = []
    for block, bar in enumerate(bars):
        if bar.component is not None:
            designs.append(BarDesign(bar.component, bar.text, (), bar.component))
            continue
        label = ":".join(bar.group) + (f".{met[bar.group]}" if met[bar.group] else "")
        designs.append(BarDesign(label, bar.text, names[block], None))
        met[bar.group] += 1
    return tuple(designs)


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
