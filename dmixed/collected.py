"""Moments for users: one pass over the rows, and every fit after it without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dmixed.cellmoments import CellMoments, merge
from dmixed.comparison import Comparison, compare
from dmixed.design import DesignSpec
from dmixed.dispatch import find_client
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.fits import FitsOfModel
from dmixed.fitting import Search
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.groupcolumns import GroupColumns, joined, means, with_means, with_within
from dmixed.model import MixedLM, placed
from dmixed.naming import Names
from dmixed.preparation import Prepared, prepare
from dmixed.progress import Progress, Report, checked, open_progress
from dmixed.provenance import SourceState, source_state
from dmixed.results import MixedLMResults
from dmixed.submodels import own_model, submodel

WORDS = ("groups", "re_formula", "vc_formula")
"""The random part in statsmodels' words."""


class MomentsModel(FitsOfModel):
    """A model on moments whose rows are not at hand; see `MixedLM` for its methods."""

    def __init__(
        self,
        cells: CellMoments | RemoteMoments,
        client: Any = None,
        progress: Progress | bool | None = None,
    ) -> None:
        self.moments = cells
        self.client = client
        self.progress = checked(progress)
        self.source = None
        self.use_sqrt = True
        self._names = Names()

    @property
    def formula(self) -> str:
        """The model's formula."""
        return self.moments.spec.formula.text

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self.moments)

    def _read(self, report: Report) -> None:
        """Nothing: the moments are there."""

    def _kept(self, search: Search, reml: bool) -> Search:
        return search


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Moments:
    """Sums of products over the rows of some data: all that a model needs of them.

    Moments of disjoint rows add: ``jan + feb``. No row is in them.

    Attributes
    ----------
    cells
        the numbers; on the workers of a cluster where they are many
    sources
        which rows they are of
    client
        `distributed.Client` of the cluster, if any
    known
        columns that were joined or made after the pass
    """

    cells: CellMoments | RemoteMoments
    sources: tuple[SourceState, ...] = ()
    client: Any = None
    known: GroupColumns = field(default_factory=GroupColumns)

    @property
    def formula(self) -> str:
        """Formula of the largest model that they can fit."""
        return self.cells.spec.formula.text

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.cells.nobs

    @property
    def n_cells(self) -> int:
        """Groups; combinations of levels where there are several grouping factors."""
        return self.cells.n_cells

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows not used, by reason."""
        return dict(self.cells.summary.dropped)

    def __repr__(self) -> str:
        return f"<Moments of {self.formula!r}: {self.nobs:,} rows, {self.n_cells:,} groups>"

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows, which must not have a row in common.

        Raises
        ------
        DataError
            they are of different models, or of the same files
        """
        if not isinstance(other, Moments):
            return NotImplemented
        if self.known or other.known:
            raise DataError("add moments before columns are joined to them or made of them")
        _check_disjoint(self.sources, other.sources)
        cells = merge([_here(self.cells), _here(other.cells)])
        return replace(self, cells=cells, sources=(*self.sources, *other.sources))

    def model(self, formula: str | None = None, **words: Any) -> MomentsModel:
        """The model, with statsmodels' methods: ``loglike``, ``score``, ``hessian``, ``fit``.

        Parameters
        ----------
        formula
            of a model on some of the columns, see `submodel`; None for the moments' own
        **words
            ``groups``, ``re_formula`` and ``vc_formula``, see `collect`
        """
        return MomentsModel(self._cells_of(formula, words, small=False), self.client)

    def submodel(self, formula: str, **words: Any) -> Moments:
        """Moments of a smaller model; no row is read.

        The rows are those of the moments, also if the data lack a value only in columns that the
        model does not have: models of the same moments can be compared.

        Parameters
        ----------
        formula
            any of the columns, coded in any way: terms left out or written otherwise
            (``C(f, contr.sum)``, ``poly(x, 2)`` where x**2 is carried), other random columns among
            those summed by group, fewer grouping factors, and columns that were joined or made
            after the pass; the response, weights and offset stay
        **words
            ``groups``, ``re_formula`` and ``vc_formula``, see `collect`

        Raises
        ------
        DataError
            a column was not carried; the message says what to collect
        """
        cells = self._cells_of(formula, words, small=True)
        same = isinstance(cells, CellMoments) and cells.n_cells == self.cells.n_cells
        return replace(self, cells=cells, known=self.known if same else GroupColumns())

    def _cells_of(
        self, formula: str | None, words: Mapping[str, Any], small: bool
    ) -> CellMoments | RemoteMoments:
        if formula is None:
            if words:
                raise DataError(f"{', '.join(words)}: give the formula, too")
            return own_model(self.cells)
        parsed = _worded(formula, self.cells.spec, words)
        return submodel(self.cells, parsed, self.known, small)

    def fit(self, reml: bool = True, formula: str | None = None, **options: Any) -> MixedLMResults:
        """Fit a model; no row is read.

        Parameters
        ----------
        reml
            restricted maximum likelihood (else maximum likelihood)
        formula
            of a model on some of the columns, see `submodel`; None for the moments' own
        **options
            ``groups``, ``re_formula`` and ``vc_formula``, see `collect`; the others see
            `MixedLM.fit`
        """
        words = {name: options.pop(name) for name in WORDS if name in options}
        return self.model(formula, **words).fit(reml=reml, **options)

    def compare(self, formulas: Sequence[str], reml: bool = False, **options: Any) -> Comparison:
        """Fit several models and compare them, see `dmixed.compare`."""
        results = [self.fit(reml=reml, formula=formula, **options) for formula in formulas]
        return compare(*results)

    def join(
        self,
        data: Any,
        on: str | Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        missing: str = "raise",
    ) -> Moments:
        """Add columns of groups, of data with one row for each key.

        Formulas on the moments can use them as if they had been there before the pass, alone or
        multiplied by columns that were summed by group (``x:ses``, with ``carry=["x"]``).

        Parameters
        ----------
        data
            frame, Arrow table or Parquet files
        on
            keys of the groups; all that the data have by default
        columns
            numbers or categories; all but the keys by default
        missing
            "raise", or "drop" the rows of groups that lack something; that needs moments with
            ``group_crossproducts``

        Raises
        ------
        DataError
            naming groups that are there twice, not at all, or lack a value
        """
        cells = self._here("join")
        cells, known = joined(cells, self.known, data, on, columns, missing)
        return replace(self, cells=cells, known=known)

    def group_means(
        self, column: str, name: str | None = None, by: str | Sequence[str] | None = None
    ) -> Moments:
        """Add the mean of a column over the rows of each group (Mundlak 1978).

        Means are of the rows used, with row weights weighted by them.

        Parameters
        ----------
        column
            numeric, or an expression in carried ones
        name
            of the new column, ``"x_mean"`` by default
        by
            keys of the groups, where there are several grouping factors
        """
        cells = self._here("group_means")
        found = means(cells, self.known, column, name, by, "mean")
        return replace(self, known=with_means(self.known, found))

    def centred(
        self, column: str, name: str | None = None, by: str | Sequence[str] | None = None
    ) -> Moments:
        """Add a column less its mean over the rows of each group, ``"x_within"`` by default.

        Parameters are those of `group_means`.
        """
        cells = self._here("centred")
        found = means(cells, self.known, column, name, by, "within")
        return replace(self, known=with_within(cells, self.known, found))

    def _here(self, what: str) -> CellMoments:
        if isinstance(self.cells, CellMoments):
            return self.cells
        raise NotSupportedError(
            f"{what}: the groups are on the workers of a cluster; collect them with "
            'evaluate_on="driver"'
        )


def _here(cells: CellMoments | RemoteMoments) -> CellMoments:
    if isinstance(cells, CellMoments):
        return cells
    raise NotSupportedError(
        "moments on the workers of a cluster cannot be added: collect them with "
        'evaluate_on="driver", or save them and append to the store'
    )


def _check_disjoint(a: Sequence[SourceState], b: Sequence[SourceState]) -> None:
    """Refuse two sets of rows that have a file in common."""
    files = {(x.name, x.size, x.stamp) for state in a for x in state.files}
    for state in b:
        for file in state.files:
            if (file.name, file.size, file.stamp) in files and not state.rows_wanted:
                raise DataError(
                    f"both sums are of the file {file.name}: its rows would count twice"
                )


def collect(
    formula: str,
    data: Any,
    *,
    groups: str | Sequence[str] | None = None,
    re_formula: str | None = None,
    vc_formula: Mapping[str, str] | None = None,
    weights: Any = None,
    offset: Any = None,
    missing: str = "drop",
    carry: Sequence[str] = (),
    group_crossproducts: bool = False,
    client: Any = None,
    context: Mapping[str, Callable[..., Any]] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filters: Any = None,
    version: int | None = None,
    snapshot: int | None = None,
    evaluate_on: str = "auto",
    progress: Progress | bool | None = None,
) -> Moments:
    """Sum the rows of some data once, for any number of fits.

    Parameters
    ----------
    formula
        the largest model that is going to be fitted: ``"y ~ x1 * x2 + (1 + x1 | g)"`` serves all
        models with some of its columns
    data, weights, offset, missing, client, context
        see `lmer`
    groups, re_formula, vc_formula
        the random part in statsmodels' words, see `MixedLM.from_formula`
    carry
        terms to sum by group beside the random ones, such as ``["x2", "x1:x2"]``; they need not be
        in the formula. Columns of these terms can be random, or be multiplied with what is known
        of groups, in models of the moments
    group_crossproducts
        sum all columns by group: a group can then be taken out again
    storage_options, filters, version, snapshot, evaluate_on, progress
        see `lmer`

    Raises
    ------
    FormulaError, DataError
        naming what cannot be read

    Examples
    --------
    >>> import numpy as np, pandas as pd, dmixed
    >>> rng = np.random.default_rng(1)
    >>> g = np.repeat(np.arange(50), 10)
    >>> x = rng.standard_normal(500)
    >>> y = 1 + 2 * x + rng.standard_normal(50)[g] + rng.standard_normal(500)
    >>> moments = dmixed.collect("y ~ x + (1 | g)", pd.DataFrame({"y": y, "x": x, "g": g}))
    >>> moments
    <Moments of 'y ~ x + (1 | g)': 500 rows, 50 groups>
    >>> moments.fit().fe_params.round(1).to_dict()
    {'Intercept': 1.0, 'x': 2.1}
    """
    parsed = _parsed(formula, groups, re_formula, vc_formula, context or {})
    place = placed(storage_options, filters, version, snapshot)
    client = find_client(client)
    model = MixedLM._of(
        parsed, data, weights, offset, missing, client, context, place, carry, group_crossproducts
    )
    model._evaluate_on = evaluate_on
    state = source_state(model.source)
    with open_progress(progress) as report:
        model._read(report)
    return Moments(model.moments, (state,), client)


def _worded(formula: str, spec: DesignSpec, words: Mapping[str, Any]) -> ParsedFormula:
    for name in words:
        if name not in WORDS:
            raise DataError(f"argument {name} is not known here")
    given = {name: words.get(name) for name in WORDS}
    return _parsed(formula, **given, context=spec.context)


def _parsed(
    formula: str,
    groups: str | Sequence[str] | None,
    re_formula: str | None,
    vc_formula: Mapping[str, str] | None,
    context: Mapping[str, Any],
) -> ParsedFormula:
    if groups is None:
        if re_formula is not None or vc_formula is not None:
            raise DataError("re_formula= and vc_formula= go with groups=; or write bars: (1 | g)")
        return parse(formula, context)
    return parse_parts(formula, groups, re_formula, context, vc_formula)
