"""The user's models: orchestration only; every number is made elsewhere."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from dmixed.arrays import array_model, with_columns, with_groups
from dmixed.blocks import Floats
from dmixed.caller import joined
from dmixed.cellmoments import CellMoments
from dmixed.checkpoint import Asked, Checkpoint, open_checkpoint
from dmixed.design import DesignSpec, carried_names, specify
from dmixed.dispatch import find_client
from dmixed.errors import DataError
from dmixed.evaluation import RemoteMoments
from dmixed.executor import check_evaluate_on, collect
from dmixed.fits import FitsOfModel
from dmixed.fitting import Search, evaluate
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.held import Penalties
from dmixed.methods import search_methods
from dmixed.moments import better_frame
from dmixed.naming import Names
from dmixed.optimizer import Step
from dmixed.params import VCSpec
from dmixed.precision import needs_references, safer
from dmixed.preparation import Prepared, prepare
from dmixed.progress import Progress, Report, checked, open_progress
from dmixed.results import MixedLMResults
from dmixed.sources import Source, open_source

PILOT_ROWS = 2_000
"""Rows from which the shifts and scales of the variables are taken."""

_IN_MEMORY = ("pandas", "polars", "arrow")


class MixedLM(FitsOfModel):
    """A linear mixed model on some rows: ``y = X beta + Z b + sum V_l u_l + e``, b per group.

    Parameters
    ----------
    endog
        (n,) response
    exog
        (n, p) or (n,) fixed-effects design, constant included if wanted; None for no fixed effects
    groups
        (n,) group labels
    exog_re
        (n, k_re) or (n,) random-coefficient design; None for a random intercept, or for none
        beside variance components
    exog_vc
        `VCSpec` of variance components
    use_sqrt
        vectors of parameters hold the Cholesky factor of ``cov_re`` and square roots of ``vcomp``
    missing
        ``"none"`` (a missing value is an error), ``"drop"`` or ``"raise"``
    weights, offset
        (n,) error variance is sigma2 / weight; a known addition to the fixed part
    client
        `distributed.Client` to run on
    progress
        see `lmer`; for the pass over the rows, and for fits that are not told otherwise

    Notes
    -----
    Rows are read once, and only their moments are kept; every fit and every function of the
    parameters works on these. Fits leave nothing behind on the model.
    """

    def __init__(
        self,
        endog: Any,
        exog: Any,
        groups: Any,
        exog_re: Any = None,
        exog_vc: VCSpec | Mapping[str, Any] | None = None,
        use_sqrt: bool = True,
        missing: str = "none",
        *,
        weights: Any = None,
        offset: Any = None,
        client: Any = None,
        progress: Progress | bool | None = None,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        made = array_model(endog, exog, groups, exog_re, exog_vc)
        formula = parse_parts(made.formula, made.group, made.re_formula, (), made.vc_formula)
        self._set_up(formula, made.table, weights, offset, missing, client, None, {})
        self._names = made.names
        self.use_sqrt = bool(use_sqrt)
        self.progress = checked(progress)
        self._read_now()

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        re_formula: str | None = None,
        vc_formula: Mapping[str, str] | None = None,
        subset: Any = None,
        use_sparse: bool = False,
        missing: str = "none",
        *,
        groups: Any = None,
        use_sqrt: bool = True,
        weights: Any = None,
        offset: Any = None,
        client: Any = None,
        context: Mapping[str, Callable[..., Any]] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | bool | None = None,
        filters: Any = None,
        version: int | None = None,
        snapshot: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool | None = None,
        **unknown: Any,
    ) -> MixedLM:
        """Model in statsmodels' words.

        Parameters
        ----------
        formula
            response and fixed part, ``"y ~ x"``
        data
            a table in any form that `lmer` takes
        re_formula
            random coefficients, ``"~x"``; None is a random intercept, or none beside components
        vc_formula
            name -> formula of each variance component, ``{"cask": "0 + C(cask)"}``; levels are
            those within each group
        subset
            rows of a pandas DataFrame, for ``data.loc``
        use_sparse
            accepted and not needed
        groups
            name of the column of the groups (or of several), or an array in the order of the rows
        context
            row-wise functions that the formulas call; plain names are found in the caller's
            variables too
        progress
            see `lmer`; for the pass over the rows, and for fits that are not told otherwise
        storage_options, filters, version, snapshot, checkpoint, resume
            see `lmer`

        Raises
        ------
        FormulaError, DataError
            naming what cannot be read
        """
        del use_sparse
        _refuse(unknown)
        kept = open_checkpoint(checkpoint, resume, data, storage_options)
        components = vc_formula.values() if isinstance(vc_formula, Mapping) else ()
        texts = [formula, re_formula, *components]
        own = joined(context, sys._getframe(1), [t for t in texts if isinstance(t, str)])
        data, key = with_groups(data, groups)
        if subset is not None:
            data, names = with_columns(data, {"weights": weights, "offset": offset})
            weights, offset = names["weights"], names["offset"]
            if not isinstance(data, pd.DataFrame):
                raise DataError(
                    "subset= needs a pandas DataFrame: filter other data before the fit"
                )
            try:
                data = data.loc[subset]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(f"subset= does not select rows of the data: {error}") from None
        if isinstance(vc_formula, Mapping) and all(isinstance(name, str) for name in vc_formula):
            vc_formula = dict(sorted(vc_formula.items()))  # as statsmodels orders them
        parsed = parse_parts(formula, key, re_formula, own, vc_formula)
        place = placed(storage_options, filters, version, snapshot)
        model = cls._of(parsed, data, weights, offset, missing, client, own, place)
        model.use_sqrt = bool(use_sqrt)
        model.progress = checked(progress)
        model._checkpoint = kept
        model._read_now()
        return model

    @classmethod
    def _of(cls, *arguments: Any) -> MixedLM:
        model = cls.__new__(cls)
        model._set_up(*arguments)
        return model

    def _set_up(
        self,
        formula: ParsedFormula,
        data: Any,
        weights: Any,
        offset: Any,
        missing: str,
        client: Any,
        context: Mapping[str, Callable[..., Any]] | None,
        place: Mapping[str, Any] | None,
        carry: Sequence[str] = (),
        group_crossproducts: bool = False,
    ) -> None:
        if missing not in ("drop", "raise", "none"):
            raise DataError(f'missing={missing!r}: must be "drop", "raise" or "none"')
        data, names = with_columns(data, {"weights": weights, "offset": offset})
        self.parsed: ParsedFormula = formula
        self.client = find_client(client)
        self.source: Source = open_source(data, **(place or {}))
        self._options: dict[str, Any] = {**names, "missing": missing, "context": context}
        self._more: dict[str, Any] = {"carry": carry, "group_crossproducts": group_crossproducts}
        self.progress: Progress | bool | None = None
        self._evaluate_on = "auto"
        self._checkpoint: Checkpoint | None = None
        self.use_sqrt = True
        self._names = Names()

    def _read_now(self) -> None:
        """Refuse what cannot be fitted where the model is made, if that costs no scan of files."""
        if self.source.kind in _IN_MEMORY:
            _ = self.moments

    @property
    def formula(self) -> str:
        """The model's formula as given."""
        return self.parsed.text

    @cached_property
    def spec(self) -> DesignSpec:
        """What is evaluated on each batch; learned from a pilot sample."""
        options = self._options
        formula = self.parsed.resolved(self.source.columns)
        needed = [*formula.columns]
        needed += carried_names(self._more["carry"], self.source.columns, options["context"] or ())
        for role in ("weights", "offset"):
            name = options[role]
            if name is not None and name not in self.source.columns:
                columns = [str(x) for x in self.source.columns]
                near = difflib.get_close_matches(str(name), columns, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else f"; they have {', '.join(columns)}"
                )
                raise DataError(
                    f"the data have no column {name!r}, which is to be the {role}; {hint}"
                )
            needed += [name] if name is not None else []
        self._pilot = self.source.head(tuple(dict.fromkeys(needed)), PILOT_ROWS)
        spec = specify(formula, self._pilot, **options, **self._more)
        return safer(spec, self._pilot, self._rows)

    def _rows(self) -> int | None:
        """Rows of the data, as far as that is known without reading them."""
        counts = [part.rows for part in self.source.parts(self.parsed.columns)]
        return sum(n for n in counts if n is not None) or None

    @cached_property
    def moments(self) -> CellMoments | RemoteMoments:
        """Moments of the rows: the one pass over the data.

        Only if the pilot rows were nothing like the rest (a mean 100 standard deviations away, or
        none of the groups that dwarf the noise) is there a second one, with what the first has
        taught.
        """
        with open_progress(self.progress) as report:
            return self._moments(report)

    def _read(self, report: Report) -> None:
        """Make `moments` and tell how far they are, unless they are there."""
        if "moments" not in vars(self):
            vars(self)["moments"] = self._moments(report)

    def _moments(self, report: Report) -> CellMoments | RemoteMoments:
        report.stage("plan")
        if self._checkpoint is None:
            return self._collected(report)
        asked = Asked(self.parsed, **self._options, source=self.source)
        return self._checkpoint.moments(
            asked, lambda: self._collected(report), report, self.client, self._evaluate_on
        )

    def _collected(self, report: Report) -> CellMoments | RemoteMoments:
        found = self._pass(self.spec, report)
        totals = found.summary.totals
        frame, references = better_frame(totals), needs_references(found.spec, totals)
        if frame is None and not references:
            return found
        report.message("the first rows are not like the rest: reading again with better shifts")
        better = replace(
            self.spec,
            frame=self.spec.frame if frame is None else frame,
            references=self.spec.references or references,
            recoding=self.spec.recoding if frame is None else None,
        )
        return self._pass(better, report)

    def _pass(self, spec: DesignSpec, report: Report) -> CellMoments | RemoteMoments:
        report.plan(f"{self.formula}: {len(spec.columns)} columns of {self.source.kind} data")
        found = collect(spec, self.source, self._pilot, self.client, report, self._evaluate_on)
        report.passed(found.nobs + sum(found.dropped.values()), found.dropped)
        return found

    def _release(self) -> None:
        """Let a cluster forget the moments of a model that nobody is going to have."""
        found = vars(self).pop("moments", None)
        if isinstance(found, RemoteMoments):
            found.release()

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare(self.moments)

    def _kept(self, search: Search, reml: bool) -> Search:
        if self._checkpoint is None:
            return search
        return self._checkpoint.search(search, self._prepared, reml)

    def criterion(self, theta: Any, reml: bool = True) -> tuple[float, Floats, Floats]:
        """-2 log-likelihood profiled over the fixed effects and the scale, and its derivatives.

        Parameters
        ----------
        theta
            lme4's: lower triangles of the relative Cholesky factors, column by column, bar by bar

        Returns
        -------
        value, gradient (m,), hessian (m, m)
        """
        return evaluate(self._prepared, theta, reml)


mixedlm = MixedLM.from_formula
"""`MixedLM.from_formula`, by the name that statsmodels' formula interface has."""


def lmer(
    formula: str,
    data: Any,
    reml: bool = True,
    weights: Any = None,
    offset: Any = None,
    missing: str = "drop",
    client: Any = None,
    context: Mapping[str, Callable[..., Any]] | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    filters: Any = None,
    version: int | None = None,
    snapshot: int | None = None,
    method: str | None = None,
    progress: Progress | bool | None = None,
    callback: Callable[[int, Step], None] | None = None,
    evaluate_on: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool | None = None,
) -> MixedLMResults:
    """Fit a linear mixed model written as in lme4.

    Parameters
    ----------
    formula
        such as ``"y ~ x1 + x2 + (1 + x1 | g)"``, ``"y ~ x + (1 | school/class)"``,
        ``"y ~ 1 + (1 | plate) + (1 | sample)"``
    data
        pandas or polars DataFrame, pyarrow Table or Dataset, Dask DataFrame, the path or URI of
        Parquet data (file, directory, glob) or a list of them, or of a Delta table, a DeltaTable,
        or an Iceberg Table or DataScan; only the columns used are read, once
    reml
        restricted maximum likelihood (else maximum likelihood)
    weights, offset
        name of a column (or, for data in memory, an array): error variance sigma2 / weight; a
        known addition to the fixed part
    missing
        ``"drop"`` rows with missing values and count them, ``"raise"`` or ``"none"``
    client
        `distributed.Client` to run on; the current one by default, else threads
    context
        row-wise functions that the formula may call by name
    storage_options
        for fsspec, with a URI
    filters
        rows of files and tables to use, as ``pandas.read_parquet`` takes it,
        ``[("year", ">=", 2024)]``, or a ``pyarrow.compute.Expression``; the columns need not be
        in the formula, and what folders and statistics exclude is not read
    version
        of a Delta table (the latest by default)
    snapshot
        id of a snapshot of an Iceberg table (the current one by default)
    method, callback
        see `MixedLM.fit`
    progress
        None for a live view in a terminal or notebook if the fit takes more than 2 seconds, and
        nothing elsewhere; True for a view in any case, plain lines on stderr where it is no
        terminal; False for none; or a function called with each `progress.Event`, one at a time
        and in order. An exception of it ends the fit and is raised. The logger "dmixed" tells
        the same in words.
    evaluate_on
        where the likelihood is evaluated after a pass on a cluster: "driver" brings the moments
        to this process, "workers" leaves them there in shards, "auto" brings them if they have
        less than 200 MB
    checkpoint
        directory or URI in which the sums of the pass and the progress of the search are kept; a
        fit that was stopped goes on from there when it is called again, and reads no row. The
        ``storage_options`` are used if it is on the storage of the data; on a cluster that keeps
        the moments, workers must see it too. A checkpoint of another model, or of files that have
        changed, is an error
    resume
        None: as said; True: use the checkpoint also where data are not in files, and whether they
        are the same cannot be told; False: start over and replace it

    Examples
    --------
    >>> import numpy as np, pandas as pd, dmixed
    >>> rng = np.random.default_rng(1)
    >>> g = np.repeat(np.arange(50), 10)
    >>> x = rng.standard_normal(500)
    >>> y = 1 + 2 * x + rng.standard_normal(50)[g] + rng.standard_normal(500)
    >>> result = dmixed.lmer("y ~ x + (1 | g)", pd.DataFrame({"y": y, "x": x, "g": g}))
    >>> result.converged
    True
    >>> result.fe_params.round(1).to_dict()
    {'Intercept': 1.0, 'x': 2.1}
    """
    kept = open_checkpoint(checkpoint, resume, data, storage_options)
    model = MixedLM._of(
        parse(formula, context or ()),
        data,
        weights,
        offset,
        missing,
        client,
        context,
        placed(storage_options, filters, version, snapshot),
    )
    if not isinstance(reml, (bool, np.bool_)):
        raise DataError(f"reml={reml!r}: must be True (REML) or False (ML)")
    check_evaluate_on(evaluate_on)
    model._evaluate_on = evaluate_on
    model._checkpoint = kept
    (name,) = search_methods(method)
    try:
        with open_progress(progress) as report:
            model._read(report)
            report.stage("fit")
            search = Search(name, None, None, report.watch(callback))
            found = model._fit(bool(reml), search, None, None, True, Penalties())
            report.fitted(found.summary)
    except BaseException:
        model._release()
        raise
    return model._result(found, False, {}, stacklevel=3)


def placed(
    storage_options: Mapping[str, Any] | None,
    filters: Any,
    version: int | None,
    snapshot: int | None,
) -> dict[str, Any]:
    """Arguments of `open_source`."""
    return {
        "storage_options": storage_options,
        "filters": filters,
        "version": version,
        "snapshot": snapshot,
    }


def _refuse(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        raise DataError(f"argument {name} is not permitted for MixedLM: it is not known here")
