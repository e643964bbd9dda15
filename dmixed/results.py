"""The result of a fit: immutable, independent of the model."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

from dmixed import report, storage
from dmixed.diagnosis import Diagnosis, diagnose
from dmixed.folded import FoldedEffects, fold
from dmixed.notes import fit_notes
from dmixed.params import MixedLMParams
from dmixed.plots import Plots
from dmixed.predicted import Predicted
from dmixed.provenance import Origin, library_versions, states_of
from dmixed.publication import PublicationColumn, publication_column
from dmixed.sources import paths_of
from dmixed.summary import Summary, summarise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _called(data: Any) -> str:
    """What a report calls some rows."""
    return ", ".join(paths_of(data)) or "the rows that were given"


@dataclass(frozen=True, eq=False, repr=False)
class MixedLMResults(Predicted):
    """Estimates of a linear mixed model, its random effects, tests and predictions.

    See `Estimated` for the scales. Attributes and methods have statsmodels' names; what lme4
    calls otherwise is there as well (``varcorr()``, ``ranef()``, ``theta``, ``singular``).
    """

    _model: Any = field(repr=False, default=None)
    _history: tuple[Any, ...] | None = field(repr=False, default=None)
    _given: Mapping[str, Any] = field(repr=False, default_factory=dict)
    _loaded: Origin | None = field(repr=False, default=None)
    _created: str = field(repr=False, default_factory=_now)

    def __getstate__(self) -> dict[str, Any]:
        """State without the rows, the connection and what is cheap to compute again."""
        return {
            "_prepared": self._prepared,
            "_estimates": self._estimates,
            "_names": self._names,
            "_source": None,
            "_client": None,
            "_model": None,
            "_history": self._history,
            "_given": {"use_sqrt": self.use_sqrt},
            "_loaded": self._loaded,
            "_created": self._created,
        }

    def __copy__(self) -> MixedLMResults:
        """Itself: nothing in it changes, and a copy would lose the rows as a pickle does."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedLMResults:
        """Itself, see ``__copy__``."""
        del memo
        return self

    @property
    def model(self) -> Any:
        """The model that was fitted; nothing in the result depends on it."""
        if self._model is None:
            raise AttributeError("a stored result has no model: the rows do not travel with it")
        return self._model

    @property
    def use_sqrt(self) -> bool:
        """Whether vectors of the model's parameters hold roots."""
        return bool(self._given.get("use_sqrt", True))

    @property
    def cov_pen(self) -> Any:
        """The penalty on ``cov_re`` of the fit, or None."""
        return self._given.get("cov_pen")

    @property
    def fe_pen(self) -> Any:
        """The penalty on the fixed effects of the fit, or None."""
        return self._given.get("fe_pen")

    @property
    def freepat(self) -> Any:
        """Which parameters were free in the fit, as `MixedLMParams` of 0 and 1; None: all."""
        found = self._estimates
        if found.free_beta is None or found.free_pairs is None:
            return None
        blocks, k = self._prepared.problem.factors.blocks, self.k_re
        mask = blocks.symmetric(found.free_pairs.astype(np.float64))
        fe = found.free_beta.astype(np.float64)
        return MixedLMParams.from_components(fe, mask[:k, :k], vcomp=np.diag(mask)[k:])

    @property
    def hist(self) -> list[dict[str, Any]] | None:
        """One dictionary on how the optimum was found, after ``fit(full_output=True)``."""
        return None if self._history is None else [dict(x) for x in self._history]

    @property
    def _origin(self) -> Origin:
        """When it was made, with what, and of which rows."""
        if self._loaded is not None:
            return self._loaded
        states = states_of(self._source)
        return Origin(self._created, library_versions(), platform.machine(), states)

    def remove_data(self) -> None:
        """Forget the rows: what needs them again raises, everything else stays."""
        object.__setattr__(self, "_loaded", self._origin)
        object.__setattr__(self, "_source", None)
        object.__setattr__(self, "_model", None)
        for name in ("_rows", "plot"):
            self.__dict__.pop(name, None)

    def fold_in(
        self,
        rows: Any,
        combine: str = "add",
        *,
        weights: Any = None,
        offset: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        filters: Any = None,
        version: int | None = None,
        snapshot: int | None = None,
    ) -> FoldedEffects:
        """Random effects of groups that have new rows, without a fit: estimates stay as they are.

        Parameters
        ----------
        rows
            anything that can be fitted, with the response and all columns of the model (and those
            that its moments carry); read once. Rows with missing values are treated as in the fit
        combine
            ``"add"``: a group that the fit has keeps its rows of the fit beside the new ones,
            which must not be among them; ``"replace"``: its new rows alone count (with nested
            factors those of all levels inside it)
        weights, offset
            arrays for a pandas DataFrame, if the fit was given arrays; else they are columns
        storage_options, filters, version, snapshot
            see `lmer`

        Returns
        -------
        `FoldedEffects` with ``ranef()``, ``ranef_cov()``, ``ranef_table()``, ``predict()``,
        ``augment()``, and ``fold_in()`` for more rows

        Raises
        ------
        DataError
            a column is missing or of another type, no row is left, or a categorical covariate has
            a level that the fit has no coefficient for
        NotSupportedError
            ``combine="replace"`` with crossed factors, or a model of arrays

        Notes
        -----
        At the beta, Psi and sigma2 of the fit, of the rows of a group, old and new,

            b = Psi Z'H^-1 (y - X beta)    Var(b | y, beta) = sigma2 (Psi - Psi Z'H^-1 Z Psi)

        Conditional variances are those of ``ranef_cov()``, given beta and the variances. The cost
        is that of reading the new rows, of finding their groups among the fit's, and of
        factoring these. Effects of crossed factors depend on one another, so that all levels that
        are linked with those of the new rows are computed again, most often all there are.
        """
        return fold(
            *(self, rows, combine),
            weights=weights,
            offset=offset,
            storage_options=storage_options,
            filters=filters,
            version=version,
            snapshot=snapshot,
        )

    # ----------------------------------------------------------------------------- presentation

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the fit, in plain words."""
        return fit_notes(self._prepared, self._estimates)

    def summary(
        self,
        yname: str | None = None,
        xname_fe: Sequence[str] | None = None,
        xname_re: Sequence[str] | None = None,
        title: str | None = None,
        alpha: float = 0.05,
    ) -> Summary:
        """Tables in the user's units, with flags explained in words; limits at level 1 - alpha.

        Parameters
        ----------
        yname, xname_fe, xname_re, title
            names to print instead of the model's

        Raises
        ------
        ValueError
            alpha is not between 0 and 1, or the names are of another number
        """
        return summarise(
            self, alpha, yname=yname, xname_fe=xname_fe, xname_re=xname_re, title=title
        )

    @cached_property
    def plot(self) -> Plots:
        """Pictures, see `Plots`: ``result.plot.caterpillar()``; they need matplotlib."""
        return Plots(self)

    def diagnose(self, residuals: bool = False) -> Diagnosis:
        """What may be wrong with the fit or the data, in plain words, and what to try.

        Parameters
        ----------
        residuals
            look for outliers too, which reads the rows of the fit again

        Returns
        -------
        findings, the gravest first; prints as text, and as HTML in notebooks
        """
        return diagnose(self, self.plot._own_residuals if residuals else None)

    def report(
        self,
        out: str | os.PathLike[str],
        data: Any = None,
        *,
        residuals: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        """Write a page of HTML for those who must judge the fit and show it.

        It has the model, estimates with intervals, the decomposition of the variance, random
        effects, diagnostics, the certificate of the search, and where the data come from. The file
        needs nothing else; its pictures need matplotlib (``pip install 'dmixed[plot]'``), without
        which it says what they would show.

        Parameters
        ----------
        out
            path or URI of the file
        data
            rows with all columns of the model, whose residuals are looked at, in one pass
        residuals
            look at those of the rows of the fit, which are read again
        storage_options
            for fsspec, with a URI of data
        force
            write over a file that is there

        Raises
        ------
        DataError
            there is something at ``out`` already, or the data are not rows of the model
        OSError
            it cannot be written; nothing is left behind
        """
        place = report.place_of(out, force)
        found, rows = None, ""
        if data is not None:
            found, rows = self.plot._residuals(data, storage_options), _called(data)
        elif residuals:
            found, rows = self.plot._own_residuals, "the rows of the fit"
        report.write(report.report_html(report.content_of(self, found, rows)), place, force)

    def to_maketables(self) -> PublicationColumn:
        """A column of a publication table: ``maketables.ETable([a.to_maketables(), ...])``.

        Fixed effects with tests as in ``summary()``; standard deviations and correlations of the
        random effects, levels, rows, method and criteria as statistics below. A statistic that
        there is not (AIC under REML) is left out. maketables is not needed to make it.
        """
        return publication_column(self)

    def __repr__(self) -> str:
        end = "converged" if self.converged else "not converged"
        return f"<MixedLMResults of {self.formula!r}: {self.nobs:,} rows, {self.method}, {end}>"

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def save(self, path: str | os.PathLike[str], remove_data: bool = False) -> None:
        """Write to a new or empty local directory, for `load` on any machine; no pickle.

        The directory has the estimates and the moments, as JSON and Parquet, but no rows.

        Parameters
        ----------
        path
            of the directory; it appears complete or not at all
        remove_data
            forget the rows of this object too, see ``remove_data()``

        Raises
        ------
        DataError
            there is something at ``path`` already, or the formula calls functions of the caller's
        OSError
            the directory cannot be written
        """
        if remove_data:
            self.remove_data()
        kept = (self._prepared, self._estimates, self._names, self._history, self._origin)
        storage.save(storage.Stored(*kept), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MixedLMResults:
        """Result that ``save(path)`` wrote: all of it but the rows.

        What a directory holds is checked and never run, so that it may come from anywhere.

        Raises
        ------
        DataError
            naming the file that is missing, damaged, or of another version
        """
        found = storage.load(path)
        return cls(
            *(found.prepared, found.estimates, found.names),
            _history=found.history,
            _loaded=found.origin,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the random effects as plain Python values, ready for JSON."""
        names = self._fixed_names
        certificate = self.optimizer_summary.certificate
        return {
            "schema": "dmixed-result/1",
            "formula": self.formula,
            "method": self.method,
            "nobs": self.nobs,
            "n_groups": self.n_groups,
            "factors": self.factors,
            "llf": self.llf,
            "scale": self.scale,
            "bse_scale": self.bse_scale,
            "fe_params": dict(zip(names, self._estimates.beta.tolist(), strict=True)),
            "bse_fe": dict(zip(names, np.asarray(self.bse_fe).tolist(), strict=True)),
            "cov_fe": self._estimates.cov_beta.tolist(),
            "varcorr": {
                label: {"names": list(map(str, cov.index)), "cov": cov.to_numpy().tolist()}
                for label, cov in self.varcorr().items()
            },
            "bse_re": self._bse_pairs.tolist(),
            "theta": self.theta.tolist(),
            "aic": self.aic,
            "bic": self.bic,
            "converged": self.converged,
            "singular": self.singular,
            "dropped": dict(self.dropped),
            "aliased": list(self.aliased),
            "optimizer": {
                "method": self.optimizer_summary.method,
                "evaluations": self.optimizer_summary.evaluations,
                "reason": self.optimizer_summary.reason,
                "digits_lost": certificate.digits_lost,
            },
        }
