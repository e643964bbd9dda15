"""Moments for users: one pass over the rows, and every fit after it without them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dmixed import momentstore
from dmixed.cellmoments import CellMoments, merge
from dmixed.comparison import Comparison, compare
from dmixed.design import DesignSpec
from dmixed.dispatch import find_client
from dmixed.erasure import has_crossproducts, without
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.executor import check_evaluate_on
from dmixed.fits import FitsOfModel
from dmixed.fitting import Search
from dmixed.folders import Folder, check_workers
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.groupcolumns import GroupColumns, joined, means, with_means, with_within
from dmixed.ledger import check_differences, compared, entries, named
from dmixed.manifests import Delta, Manifest, read_manifest
from dmixed.markup import moments_html, store_html
from dmixed.model import MixedLM, placed
from dmixed.naming import Names
from dmixed.preparation import Prepared, prepare
from dmixed.progress import Progress, Report, checked, open_progress
from dmixed.provenance import SourceState, source_state
from dmixed.removal import Opener, labels, without_files, without_group
from dmixed.results import MixedLMResults
from dmixed.sources import FilesSource, open_source
from dmixed.store import Appended, StoreDirectory
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

    def _repr_html_(self) -> str:
        return moments_html(self)

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

    def save(
        self,
        uri: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        min_group_size: int | None = None,
    ) -> MomentStore:
        """Write the moments to a new or empty directory or URI; nobody sees half of them.

        Columns that were joined or made after the pass are not stored, but for those that the
        formula of a `submodel` has.

        Parameters
        ----------
        storage_options
            for fsspec, with a URI
        min_group_size
            leave out groups (cells) of fewer rows, so that what is shared tells of no small group;
            needs ``group_crossproducts=True``. A fit is then that of the other groups

        Returns
        -------
        the store, see `open_moments`

        Raises
        ------
        DataError
            the formula calls functions of the caller's, there is something at ``uri`` already, or
            it cannot be written
        """
        if not isinstance(uri, str | os.PathLike) or not os.fspath(uri):
            raise DataError(f"uri={uri!r}: must be a directory, as a path or URI")
        folder, cells = Folder.at(uri, storage_options), self.cells
        if min_group_size is not None:
            cells = _of_size(cells, min_group_size)
        try:
            if not all(map(momentstore.is_own, folder.names())):  # a process was killed there
                raise DataError(
                    f"{folder.name}: there is something already; choose a new directory"
                )
            if isinstance(cells, RemoteMoments):
                check_workers(folder, cells.client)
            manifest = momentstore.write(folder, cells, self.sources)
        except OSError as error:
            raise DataError(
                f"{folder.name}: cannot be written: {error.strerror or error}"
            ) from error
        return MomentStore(folder, manifest, self.client)


def _here(cells: CellMoments | RemoteMoments) -> CellMoments:
    if isinstance(cells, CellMoments):
        return cells
    raise NotSupportedError(
        "moments on the workers of a cluster cannot be added: collect them with "
        'evaluate_on="driver", or save them and append to the store'
    )


def _check_disjoint(a: Sequence[SourceState], b: Sequence[SourceState]) -> None:
    """Refuse two sets of rows that have a file in common, unless by filters that differ."""
    known = {file.name: state.rows_wanted for state in a for file in state.files}
    for state in b:
        for file in state.files:
            before = known.get(file.name)
            if before is None:
                continue
            if before == state.rows_wanted or not before or not state.rows_wanted:
                raise DataError(
                    f"both sums are of the file {file.name}: its rows would count twice"
                )


class MomentStore:
    """Moments in a directory or object store; made by `Moments.save`, opened by `open_moments`.

    Every change is made of files that nobody sees until a new manifest names them, at once; of two
    processes that change a store at the same time, one is refused.

    Parameters
    ----------
    folder, manifest
        where it is, and the state that is shown
    client
        `distributed.Client` to run on
    """

    def __init__(self, folder: Folder, manifest: Manifest, client: Any = None) -> None:
        self._directory = StoreDirectory(folder, manifest, client)
        self._moments: Moments | None = None

    # ------------------------------------------------------------------ what it is

    @property
    def uri(self) -> str:
        """Where it is, without credentials."""
        return self._directory.folder.name

    @property
    def version(self) -> int:
        """Number of the state, which grows by one with every change."""
        return self._directory.manifest.version

    @property
    def formula(self) -> str:
        """Formula of the largest model that can be fitted."""
        return self._directory.manifest.formula

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._directory.manifest.nobs

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """What was added, in that order; each with ``id``, ``created``, ``nobs``, ``sources``."""
        return self._directory.manifest.deltas

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of data whose rows are in it."""
        return tuple(entries(self.deltas))

    @property
    def moments(self) -> Moments:
        """The sum of all deltas; read when first asked for."""
        if self._moments is None:
            self._moments = self._made(self._directory.moments(), None)
        return self._moments

    def __repr__(self) -> str:
        n = len(self.deltas)
        return (
            f"<MomentStore {self.uri!r}, version {self.version}: {self.formula!r}, "
            f"{self.nobs:,} rows in {n} part{'s' * (n > 1)}>"
        )

    def _repr_html_(self) -> str:
        return store_html(self)

    # ------------------------------------------------------------------ models

    def model(self, *arguments: Any, **options: Any) -> MomentsModel:
        """A model of all moments, see `Moments.model`."""
        return self.moments.model(*arguments, **options)

    def fit(self, reml: bool = True, **options: Any) -> MixedLMResults:
        """Fit all moments, see `Moments.fit`."""
        return self.moments.fit(reml, **options)

    def window(self, last: int) -> Moments:
        """Moments of the last additions only; the store stays as it is.

        Parameters
        ----------
        last
            how many of `deltas`; all of them, if there are not so many

        Raises
        ------
        DataError
            naming what is damaged
        """
        if isinstance(last, bool) or not isinstance(last, int) or last < 1:
            raise DataError(f"last={last!r}: must be a number of additions, at least 1")
        return self._made(self._directory.moments(last), last)

    def _made(self, cells: CellMoments | RemoteMoments, last: int | None) -> Moments:
        deltas = self.deltas if last is None else self.deltas[-last:]
        sources = tuple(state for delta in deltas for state in delta.sources)
        return Moments(cells, sources, self._directory.client)

    # ------------------------------------------------------------------ changes

    def append(
        self,
        data: Any,
        *,
        name: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filters: Any = None,
        version: int | None = None,
        snapshot: int | None = None,
        changed: str = "error",
        vanished: str = "keep",
        client: Any = None,
        progress: Progress | bool | None = None,
    ) -> Appended:
        """Add the rows of data; of files, only those that the store does not have are read.

        Parameters
        ----------
        data
            in any form that `lmer` takes, or `Moments` of the same model
        name
            of rows in memory or in a Dask DataFrame, for `remove`; a name is added once
        storage_options, filters, version, snapshot, progress
            see `lmer`
        changed
            what to do with files whose size or time of modification is not as it was: ``"error"``,
            or ``"replace"`` what their rows had added
        vanished
            what to do with files that are gone from the folder or pattern: ``"keep"`` their rows,
            or ``"error"``; of a list of files, or a Dataset, that cannot be told. Files of a table
            that are gone were rewritten, which is always an error: their rows may be in new files
        client
            `distributed.Client` to run on; that of the store, or the current one by default

        Raises
        ------
        DataError
            naming what cannot be read or added, or another process has changed the store; it is as
            it was
        """
        directory = self._changeable()
        _check_choice("changed", changed, ("error", "replace"))
        _check_choice("vanished", vanished, ("keep", "error"))
        if isinstance(data, Moments):
            if name is not None:
                raise DataError("name= goes with rows; moments tell of their files themselves")
            cells = data.cells
            directory.add(cells, data.sources)
            new = tuple(file.name for state in data.sources for file in state.files)
            return Appended(new, (), (), (), cells.nobs, cells.n_cells, dict(cells.dropped))
        source = open_source(
            data, storage_options, filters=filters, version=version, snapshot=snapshot
        )
        client = find_client(directory.client if client is None else client)
        if not isinstance(source, FilesSource):
            _check_name(name, self.files)
            cells = directory.append(source, client, progress, name)
            new = () if name is None else (name,)
            return Appended(new, (), (), (), cells.nobs, cells.n_cells, dict(cells.dropped))
        if name is not None:
            raise DataError("name= is for rows that are in no file: files have names")
        if vanished == "error" and not source.location:
            raise DataError(
                'vanished="error" goes with a folder, pattern or table: of a list of files, or a '
                "Dataset, it cannot be told which are gone"
            )
        found = compared(self.deltas, source)
        check_differences(found, source.kind, changed, vanished)
        wanted = {*found.new, *found.changed}
        if not wanted:
            return Appended((), found.same, (), found.vanished, 0, 0, {})
        kept, made = list(self.deltas), list[Delta]()
        if found.changed:
            opener = Opener(None if source.location else data, storage_options, filters)
            kept, made = without_files(directory, set(found.changed), opener, client)
        cells = directory.append(source.only(wanted), client, progress, None, kept, made)
        names = found.new, found.same, found.changed, found.vanished
        return Appended(*names, cells.nobs, cells.n_cells, dict(cells.dropped))

    def remove(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        data: Any = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        filters: Any = None,
        client: Any = None,
    ) -> None:
        """Take the rows of some files out, as if they had never been added.

        What was added alone is dropped. Of files that were added with others the rows are read
        again and subtracted, if the files are as they were; else the others are read again.

        Parameters
        ----------
        paths
            names of files as in `files`, or the ``name`` of rows that are in no file
        data, storage_options, filters
            where to read the files again, by default the path, folder or pattern at which they were
            found; files of a list need ``data``. That path is the manifest's word: give ``data`` if
            you do not trust who wrote the store
        client
            `distributed.Client` to run on

        Raises
        ------
        DataError
            naming what the store does not have, or what cannot be read again; it is as it was
        """
        directory = self._changeable()
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not given:
            raise DataError("paths: name the files whose rows are to be taken out")
        names, opener = named(self.deltas, given), Opener(data, storage_options, filters)
        client = find_client(directory.client if client is None else client)
        kept, made = without_files(directory, names, opener, client)
        if not kept:
            raise DataError(f"{self.uri}: nothing would be left; delete the directory instead")
        with directory.written():
            directory.commit(kept, made)

    def forget(
        self,
        group: Any,
        data: Any = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        client: Any = None,
    ) -> int:
        """Take all rows of a group out, as if they had never been added; files stay known.

        With ``group_crossproducts`` the sums are made anew of those of the other groups. Without,
        the group's rows are read again from the files that were added with it, and subtracted.

        Parameters
        ----------
        group
            its label, a tuple of labels, or a dict of key columns and labels
        data, storage_options
            where to read files again, by default the path at which they were found (as in
            `remove`)
        client
            `distributed.Client` to run on

        Returns
        -------
        rows taken out

        Raises
        ------
        DataError
            there is no such group, or its rows cannot be read again; the store is as it was
        """
        directory = self._changeable()
        wanted = labels(directory.spec, group)
        client = find_client(directory.client if client is None else client)
        opener = Opener(data, storage_options, None)
        kept, made, rows = without_group(directory, wanted, opener, client)
        if not made:
            raise DataError(f"{self.uri}: there is no group {group!r}")
        with directory.written():
            directory.erase(kept, made)
        return rows

    def compact(self) -> None:
        """Make one of all deltas, and remove files that a killed process has left behind."""
        self._changeable().compact()

    def _changeable(self) -> StoreDirectory:
        """The directory, if it may be changed; the moments are read anew after that."""
        self._directory.check_changeable()
        self._moments = None
        return self._directory


def _check_name(name: Any, known: Sequence[str]) -> None:
    if name is not None and (not isinstance(name, str) or not name):
        raise DataError(f"name={name!r}: must be text")
    if name in known:
        raise DataError(f"{name}: was added already; remove({name!r}) it first")


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{argument}={value!r}: must be {' or '.join(map(repr, choices))}")


def open_moments(
    uri: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    client: Any = None,
) -> MomentStore:
    """Open moments that were saved: a store, the checkpoint of a fit, or a stored result.

    Parameters
    ----------
    uri
        directory or URI
    storage_options
        for fsspec, with a URI
    client
        `distributed.Client` to run on; the current one by default

    Raises
    ------
    DataError
        naming what is not there, or is damaged
    """
    if not isinstance(uri, str | os.PathLike) or not os.fspath(uri):
        raise DataError(f"uri={uri!r}: must be a directory, as a path or URI")
    folder = Folder.at(uri, storage_options)
    store = MomentStore(folder, read_manifest(folder), find_client(client))
    _ = store._directory.spec
    return store


def _of_size(cells: CellMoments | RemoteMoments, size: int) -> CellMoments:
    """Moments of the cells that have so many rows at least."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"min_group_size={size!r}: must be a number of rows, at least 1")
    if not isinstance(cells, CellMoments) or not has_crossproducts(cells):
        raise DataError(
            "min_group_size= needs moments that were collected with group_crossproducts=True, "
            "without weights, and are not on the workers of a cluster: only then can the rows of a "
            "group be taken out of the sums"
        )
    small = cells.group.counts < size
    return without(cells, small, f"group of fewer than {size} rows") if small.any() else cells


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
    check_evaluate_on(evaluate_on)
    if not isinstance(group_crossproducts, bool):
        raise DataError(f"group_crossproducts={group_crossproducts!r}: must be True or False")
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
