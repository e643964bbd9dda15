"""Formulas: response, fixed terms and lme4's bars, from text, without data.

``y ~ x + f + (1 + x | g)`` is cut at ``~`` and at the bars; `terms` reads the pieces.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dmixed.errors import DataError, FormulaError, NotSupportedError
from dmixed.formula.expressions import Call, Name, Node, columns_of
from dmixed.formula.polynomials import Expansion, Unknown, with_pi
from dmixed.formula.terms import Term, display, read_factor, read_terms
from dmixed.formula.tokens import Token, depths, quoted, shown, spelled, tokenize
from dmixed.formula.vocabulary import STRUCTURED


@dataclass(frozen=True, slots=True)
class Bar:
    """Random coefficients that vary together: ``(1 + x | g)``.

    Attributes
    ----------
    terms
        what varies
    group
        key columns; several make an interaction key
    text
        as one would write it
    """

    terms: tuple[Term, ...]
    group: tuple[str, ...]
    text: str


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
        random coefficients, all of one grouping factor
    columns
        data columns used, in order, without ``pi`` where it may be the number
    """

    text: str
    response: Node
    fixed: tuple[Term, ...]
    bars: tuple[Bar, ...]
    columns: tuple[str, ...]

    @property
    def group(self) -> tuple[str, ...]:
        """Key columns of the grouping factor."""
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
            Bar(tuple(_resolved(t, known) for t in bar.terms), bar.group, bar.text)
            for bar in self.bars
        )
        response = _with_pi(self.response, known)
        columns = _columns(response, (*terms, *(t for b in bars for t in b.terms)), self.group)
        for name in columns:
            if name not in known:
                near = difflib.get_close_matches(name, [str(x) for x in available], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"the data have no column {name!r}, which the formula uses{hint}")
        return ParsedFormula(self.text, response, terms, bars, columns)

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
    for sign, piece in _pieces(right):
        inside = _bar(piece)
        if inside is None:
            fixed += [sign, *piece] if fixed or sign.text == "-" else piece
        elif sign.text == "-":
            raise FormulaError(f"{shown(spelled(piece))} cannot be subtracted; leave it out")
        else:
            bars += _read_bar(inside, context)
    if not bars:
        raise FormulaError(
            f"the formula {shown(text)} has no random effect; add one for the column that names "
            "the groups, as in '+ (1 | group)'"
        )
    return _parsed(text, left, fixed, bars, context)


def parse_parts(
    fixed: str, groups: str | Sequence[str], re_formula: str | None, context: Collection[str] = ()
) -> ParsedFormula:
    """Read a model in statsmodels' words.

    Parameters
    ----------
    fixed
        ``response ~ terms``
    groups
        column, or columns, that name the groups
    re_formula
        terms of the random coefficients, ``~x`` or ``x``; None is the intercept alone
    context
        names of the caller's own row-wise functions
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
            f"{_kind(groups)}"
        )
    group = tuple(group)
    if not group:
        raise FormulaError("groups must name at least one column")
    if re_formula is not None and not isinstance(re_formula, str):
        raise FormulaError(
            f"re_formula must be text such as '~x', or None, not {_kind(re_formula)}"
        )
    inside = tokenize("1" if re_formula is None else re_formula)
    if inside and inside[0].among("~"):
        inside = inside[1:]
    _check_parentheses(inside, re_formula or "")
    terms = read_terms(inside, context)
    if not terms:
        raise FormulaError(f"re_formula={re_formula!r} has no terms")
    bar = Bar(terms, group, _bar_text(terms, group))
    return _parsed(fixed, left, right, [bar], context)


def _sides(text: str, context: Collection[str]) -> tuple[list[Token], list[Token]]:
    """Tokens left and right of the tilde."""
    if not isinstance(text, str):
        raise FormulaError(f"a formula is text, not {type(text).__name__}")
    if isinstance(context, str) or not isinstance(context, Collection):
        raise FormulaError(
            f"context must map names to functions, as {{'f': f}}, not {_kind(context)}"
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
    _check_parentheses(left, text)
    _check_parentheses(right, text)
    return left, right


def _kind(given: object) -> str:
    """Type of an argument, for a message; of a list, the types of what it holds."""
    kind = type(given).__name__
    if not isinstance(given, (list, tuple)):
        return kind
    return f"{kind} of {', '.join(sorted({type(x).__name__ for x in given}))}"


def _check_parentheses(tokens: Sequence[Token], text: str) -> None:
    levels = list(depths(tokens))
    if levels and (min(levels) < 0 or levels[-1] != 0):
        raise FormulaError(f"the parentheses of {shown(text)} do not match")


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
    group = bars[0].group
    for i, bar in enumerate(bars):
        if set(bar.group) != set(group):
            raise NotSupportedError(
                f"{shown(text)}: the bars have different grouping factors, {':'.join(group)} and "
                f"{':'.join(bar.group)}; one grouping factor is supported so far"
            )
        bars[i] = bar = Bar(bar.terms, group, bar.text)
        if bar.terms in [b.terms for b in bars[:i]]:
            raise FormulaError(f"{shown(text)}: {bar.text} is there twice")
    everything = (*terms, *(t for b in bars for t in b.terms))
    _check(response, everything)
    # Without what is only `pi`, which need not be a column.
    resolved = [_resolved(term, ()) for term in everything]
    columns = _columns(_with_pi(response, ()), resolved, group)
    return ParsedFormula(text, response, terms, tuple(bars), columns)


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


def _columns(response: Node, terms: Iterable[Term], group: Sequence[str]) -> tuple[str, ...]:
    """Data columns in the order in which a formula uses them."""
    used = [response, *(factor for term in terms for factor in term.factors)]
    names = [name for node in used for name in columns_of(node)]
    return tuple(dict.fromkeys([*names, *group]))


def categorical(factor: Node) -> Node | None:
    """What ``C(...)`` is taken of; None for any other factor."""
    if isinstance(factor, Call) and factor.function == "C":
        return factor.option("data")
    return None


def _pieces(tokens: list[Token]) -> Iterator[tuple[Token, list[Token]]]:
    """Signed pieces between the outermost + and -."""
    plus, minus = Token("operator", "+"), Token("operator", "-")
    sign, piece = plus, list[Token]()
    for token, depth in zip(tokens, depths(tokens), strict=True):
        if depth or not token.among("+", "-"):
            piece.append(token)
        elif piece:
            yield sign, piece
            sign, piece = token, []
        else:  # two signs in a row
            sign = plus if sign == token else minus
    if piece:
        yield sign, piece
    elif tokens:
        raise FormulaError(f"the formula ends with {tokens[-1].text!r}")


def _bar(piece: list[Token]) -> list[Token] | None:
    """Tokens between the parentheses of a bar; None if the piece holds no bar."""
    if not any(t.among("|", "||") for t in piece):
        return None
    inside = piece
    while inside and inside[0].among("(") and inside[-1].among(")"):
        inside = inside[1:-1]
        levels = list(depths(inside))
        if min(levels, default=0) < 0:
            break  # (a) ... (b): the first and the last parenthesis are not a pair
        if [d for t, d in zip(inside, levels, strict=True) if t.among("|", "||")] == [0]:
            return inside
    raise FormulaError(
        f"{shown(spelled(piece))}: a bar stands in parentheses of its own, joined to the rest by "
        "'+', as in '+ (1 + x | g)'"
    )


def _read_bar(inside: list[Token], context: Collection[str]) -> list[Bar]:
    """Bars of ``terms | group`` or ``terms || group``."""
    cut = next(i for i, t in enumerate(inside) if t.among("|", "||"))
    group = _group(inside[cut + 1 :], spelled(inside))
    terms = read_terms(inside[:cut], context)
    if not terms or not inside[:cut]:
        raise FormulaError(f"({spelled(inside)}) has no random coefficient left of the bar")
    split = [(t,) for t in terms] if inside[cut].text == "||" else [terms]
    return [Bar(part, group, _bar_text(part, group)) for part in split]


def _bar_text(terms: Sequence[Term], group: Sequence[str]) -> str:
    """A bar as lme4 writes it; 0 says that there is no intercept."""
    words = [t.text for t in terms]
    key = ":".join(quoted(name) for name in group)
    return f"({' + '.join(words if '1' in words else ['0', *words])} | {key})"


def _group(tokens: list[Token], bar: str) -> tuple[str, ...]:
    """Key columns right of a bar."""
    while len(tokens) > 2 and tokens[0].among("(") and tokens[-1].among(")"):
        tokens = tokens[1:-1]
    names, joints = tokens[::2], tokens[1::2]
    for joint in joints:
        if joint.among("/"):
            raise NotSupportedError(
                f"({bar}): nested groups ('/') need two grouping factors; one is supported so far. "
                "Write (1 | a:b) for the inner one alone"
            )
        if not joint.among(":"):
            raise NotSupportedError(
                f"({bar}): the group must be a column, or columns joined by ':'; expressions are "
                "not supported, so compute the column before the fit"
            )
    if len(names) != len(joints) + 1 or any(t.kind not in ("name", "quoted") for t in names):
        raise FormulaError(f"({bar}): right of the bar must be a column, or columns joined by ':'")
    keys = tuple(t.text for t in names)
    if len(set(keys)) < len(keys):
        raise FormulaError(f"({bar}): a column is there twice in the group")
    return keys
