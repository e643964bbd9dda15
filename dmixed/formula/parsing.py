"""Formulas: response, fixed terms and lme4's bars, from text, without data.

``y ~ x + f + (1 + x | g)`` is cut at ``~`` and at the bars; `bars` and `terms` read the pieces.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dmixed.errors import DataError, FormulaError
from dmixed.formula.bars import (
    Bar,
    bar_of,
    inside_bar,
    one_sided,
    read_bar,
    read_components,
    signed_pieces,
)
from dmixed.formula.expressions import Call, Name, Node, columns_of
from dmixed.formula.polynomials import Expansion, Unknown, with_pi
from dmixed.formula.terms import Term, display, read_factor, read_terms
from dmixed.formula.tokens import Token, check_parentheses, shown, spelled, tokenize, type_name
from dmixed.formula.vocabulary import STRUCTURED


@dataclass(frozen=True, slots=True)
class Words:
    """What statsmodels' words say beside the text of the response and the fixed part.

    Attributes
    ----------
    groups
        columns that name the groups
    re_formula
        terms of the random coefficients, or None
    vc_formula
        names and terms of the variance components
    """

    groups: tuple[str, ...]
    re_formula: str | None
    vc_formula: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ParsedFormula:
    """A formula, read.

    Attributes
    ----------
    text
        the source
    response
        expression of one number per row
    fixed
        terms in formulaic's order: by number of factors, then as written
    bars
        random coefficients of any grouping factors; bars of one factor have the same `Bar.group`
    columns
        data columns used, those of keys too, in order, without ``pi`` where it may be the number
    words
        what `parse_parts` was given beside the text; None for a formula of lme4's, which is whole
    """

    text: str
    response: Node
    fixed: tuple[Term, ...]
    bars: tuple[Bar, ...]
    columns: tuple[str, ...]
    words: Words | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """Key columns of the model's groups, in statsmodels' words: of the first bar."""
        return self.bars[0].group

    @property
    def response_text(self) -> str:
        """The response, as one would write it."""
        return display(self.response)

    def resolved(self, available: Collection[str]) -> ParsedFormula:
        """Decide for data that have these columns whether ``pi`` is a column or the number.

        Raises
        ------
        DataError
            a column is not there
        """
        known = set(available)
        terms = tuple(_resolved(t, known) for t in self.fixed)
        bars = tuple(
            replace(bar, terms=tuple(_resolved(t, known) for t in bar.terms)) for bar in self.bars
        )
        response = _with_pi(self.response, known)
        columns = _columns(response, (*terms, *(t for b in bars for t in b.terms)), bars)
        for name in columns:
            if name not in known:
                near = difflib.get_close_matches(name, [str(x) for x in available], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"the data have no column {name!r}, which the formula uses{hint}")
        return replace(self, response=response, fixed=terms, bars=bars, columns=columns)

    def terms(self) -> Iterator[Term]:
        """All terms, those of the bars too."""
        yield from self.fixed
        for bar in self.bars:
            yield from bar.terms


def parse(text: str, context: Collection[str] = ()) -> ParsedFormula:
    """Read an lme4 formula.

    Parameters
    ----------
    text
        ``response ~ terms + (terms | group)``
    context
        names of the caller's own row-wise functions

    Raises
    ------
    FormulaError
        the formula cannot be read or uses something outside the vocabulary
    NotSupportedError
        it is well formed, but asks for a model that cannot be fitted yet

    Examples
    --------
    >>> formula = parse("y ~ x + (1 + x | g)")
    >>> [term.text for term in formula.fixed], formula.bars[0].group
    (['1', 'x'], ('g',))
    """
    left, right = _sides(text, context)
    fixed: list[Token] = []
    bars: list[Bar] = []
    for sign, piece in signed_pieces(right):
        inside = inside_bar(piece)
        if inside is None:
            fixed += [sign, *piece] if fixed or sign.text == "-" else piece
        elif sign.text == "-":
            raise FormulaError(f"{shown(spelled(piece))} cannot be subtracted; leave it out")
        else:
            bars += read_bar(inside, context)
    if not bars:
        raise FormulaError(
            f"the formula {shown(text)} has no random effect; add one for the column that names "
            "the groups, as in '+ (1 | group)'"
        )
    return _parsed(text, left, fixed, bars, context)


def parse_parts(
    fixed: str,
    groups: str | Sequence[str],
    re_formula: str | None,
    context: Collection[str] = (),
    vc_formula: Mapping[str, str] | None = None,
) -> ParsedFormula:
    """Read a model in statsmodels' words.

    Parameters
    ----------
    fixed
        ``response ~ terms``
    groups
        column, or columns, that name the groups
    re_formula
        terms of the random coefficients, ``~x`` or ``x``; None is the intercept alone, or nothing
        beside variance components
    context
        names of the caller's own row-wise functions
    vc_formula
        terms of each variance component by its name, ``{"cask": "0 + C(cask)"}``

    Examples
    --------
    >>> formula = parse_parts("y ~ x", "g", None, vc_formula={"cask": "~0 + C(cask)"})
    >>> formula.groups, [bar.text for bar in formula.bars]
    (('g',), ['cask: 0 + C(cask)'])
    """
    left, right = _sides(fixed, context)
    if any(t.among("|", "||") for t in right):
        raise FormulaError(
            f"the formula {shown(fixed)} has a bar; give either the bar, or groups and re_formula"
        )
    group = (groups,) if isinstance(groups, str) else groups
    if not isinstance(group, (list, tuple)) or not all(isinstance(x, str) for x in group):
        raise FormulaError(
            "groups must be the name of a column, or a list of names of columns, not "
            f"{type_name(groups)}"
        )
    group = tuple(dict.fromkeys(group))
    if not group:
        raise FormulaError("groups must name at least one column")
    bars = []
    if re_formula is not None or not vc_formula:
        terms = one_sided("1" if re_formula is None else re_formula, "re_formula", "~x", context)
        bars.append(bar_of(terms, group))
    if vc_formula is not None:
        bars += read_components(vc_formula, group, context)
    if len({bar.component or ":".join(group) for bar in bars}) < len(bars):
        raise FormulaError(
            f"vc_formula: a component is called {':'.join(group)!r}, as the groups are, which have "
            "random coefficients of their own; give it another name"
        )
    words = Words(group, re_formula, tuple(sorted((vc_formula or {}).items())))
    return replace(_parsed(fixed, left, right, bars, context), words=words)


def parse_terms(
    texts: Sequence[str], argument: str, available: Collection[str], context: Collection[str] = ()
) -> tuple[Term, ...]:
    """Read terms that stand alone, outside a formula.

    Parameters
    ----------
    texts
        each one or more terms, ``"x"``, ``"f:x"``
    argument
        what messages call them
    available
        columns of the data

    Raises
    ------
    FormulaError
        a text cannot be read, or names no term
    DataError
        a column is not there
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise FormulaError(f"{argument} must be a list of terms, as ['x', 'f:x'], not {texts!r}")
    found: dict[Term, None] = {}
    for text in texts:
        terms = [t for t in one_sided(text, argument, "x", context) if t.factors]
        if not terms:
            raise FormulaError(f"{argument}: {shown(text)} names no column")
        _check_terms(terms)
        found |= dict.fromkeys(_resolved(term, available) for term in terms)
    for factor in (f for term in found for f in term.factors):
        for name in columns_of(factor):
            if name not in available:
                raise DataError(f"{argument}: the data have no column {name!r}")
    return tuple(found)


def _sides(text: str, context: Collection[str]) -> tuple[list[Token], list[Token]]:
    """Tokens left and right of the tilde."""
    if not isinstance(text, str):
        raise FormulaError(f"a formula is text, not {type(text).__name__}")
    if isinstance(context, str) or not isinstance(context, Collection):
        raise FormulaError(
            f"context must map names to functions, as {{'f': f}}, not {type_name(context)}"
        )
    for name in context:
        if name in STRUCTURED or not str(name).isidentifier():
            raise FormulaError(f"context: {shown(str(name))} cannot be the name of a function")
    tokens = tokenize(text)
    cuts = [i for i, t in enumerate(tokens) if t.among("~")]
    if len(cuts) != 1:
        raise FormulaError(f"the formula {shown(text)} needs one '~', not {len(cuts)}")
    if cuts[0] == 0:
        raise FormulaError(f"the formula {shown(text)} has no response left of '~'")
    left, right = tokens[: cuts[0]], tokens[cuts[0] + 1 :]
    check_parentheses(left, text)
    check_parentheses(right, text)
    return left, right


def _parsed(
    text: str,
    left: list[Token],
    fixed: list[Token],
    bars: list[Bar],
    context: Collection[str],
) -> ParsedFormula:
    """Assemble and check a formula whose bars are read."""
    response = read_factor(left, context)
    terms = read_terms(fixed, context)
    bars = _distinct(bars, text)
    everything = (*terms, *(t for b in bars for t in b.terms))
    _check(response, everything)
    # Without what is only `pi`, which need not be a column.
    resolved = [_resolved(term, ()) for term in everything]
    columns = _columns(_with_pi(response, ()), resolved, bars)
    return ParsedFormula(text, response, terms, tuple(bars), columns)


def _distinct(bars: Sequence[Bar], text: str) -> list[Bar]:
    """Bars with one key per grouping factor, the first spelling; each may be there once."""
    spelling: dict[frozenset[str], tuple[str, ...]] = {}
    met: dict[tuple[object, ...], Bar] = {}
    for bar in bars:
        bar = replace(bar, group=spelling.setdefault(frozenset(bar.group), bar.group))
        twin = met.setdefault((bar.terms, bar.group, bar.component is None), bar)
        if twin is bar:
            continue
        if bar.component is None:
            raise FormulaError(f"{shown(text)}: {bar.text} is there twice")
        raise FormulaError(
            f"vc_formula: {twin.component!r} and {bar.component!r} are the same component; "
            "leave one out"
        )
    return list(met.values())


def _check(response: Node, terms: Sequence[Term]) -> None:
    """Expand everything once, so that what cannot be computed is refused before data are read."""
    if not columns_of(response):
        raise FormulaError(f"the response {shown(response.text)} uses no column of the data")
    Expansion(Unknown()).row_by_row(response)
    for factor in dict.fromkeys(f for term in terms for f in term.factors):
        if _plain(factor) == _plain(response):
            raise FormulaError(
                f"the response {shown(response.text)} is also right of '~'; leave it out there"
            )
    _check_terms(terms)


def _check_terms(terms: Sequence[Term]) -> None:
    """Expand every factor once."""
    for factor in dict.fromkeys(f for term in terms for f in term.factors):
        data = categorical(factor)
        if data is not None and not isinstance(data, Name):
            Expansion(Unknown()).row_by_row(_with_pi(data, ()))
        elif data is None:
            Expansion(Unknown()).columns(_with_pi(factor, ()))


def _plain(node: Node) -> Node:
    """What ``I()`` is taken of; a column without its way of writing."""
    while isinstance(node, Call) and node.function == "I":
        node = node.option("x") or node
    return Name(node.column, node.column) if isinstance(node, Name) else node


def _with_pi(factor: Node, available: Collection[str]) -> Node:
    """`with_pi` for a factor: alone, `pi` is a column."""
    return factor if isinstance(factor, Name) else with_pi(factor, available)


def _resolved(term: Term, available: Collection[str]) -> Term:
    return Term(tuple(_with_pi(factor, available) for factor in term.factors))


def _columns(response: Node, terms: Iterable[Term], bars: Iterable[Bar]) -> tuple[str, ...]:
    """Data columns in the order in which a formula uses them."""
    used = [response, *(factor for term in terms for factor in term.factors)]
    names = [name for node in used for name in columns_of(node)]
    return tuple(dict.fromkeys([*names, *(name for bar in bars for name in bar.group)]))


def categorical(factor: Node) -> Node | None:
    """What ``C(...)`` is taken of; None for any other factor."""
    if isinstance(factor, Call) and factor.function == "C":
        return factor.option("data")
    return None
