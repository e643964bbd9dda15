"""The result of a fit: immutable, independent of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmixed import prediction, storage
from dmixed.dispatch import running
from dmixed.effects import ByLabel
from dmixed.errors import NotSupportedError
from dmixed.inference.random_effects import (
    conditional_covariances,
    conditional_modes,
    joint_covariance,
)
from dmixed.notes import fit_notes
from dmixed.params import MixedLMParams
from dmixed.sources import Source, open_source
from dmixed.summary import Summary, summarise
from dmixed.tested import Tested


@dataclass(frozen=True, eq=False)
class MixedLMResults(Tested):
    """Estimates of a linear mixed model, its random effects, tests and predictions.

    See `Estimated` for the scales. Attributes and methods have statsmodels' names; what lme4
    calls otherwise is there as well (``varcorr()``, ``ranef()``, ``theta``, ``singular``).
    """

    _source: Source | None = field(repr=False, default=None)
    _client: Any = field(repr=False, default=None)
    _model: Any = field(repr=False, default=None)
    _history: tuple[Any, ...] | None = field(repr=False, default=None)
    _given: Mapping[str, Any] = field(repr=False, default_factory=dict)

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

    # ----------------------------------------------------------------------------- random effects

    @cached_property
    def _modes(self) -> tuple[NDArray[np.float64], ...]:
        found, _ = self._estimates, self._prepared.here
        return conditional_modes(self._prepared.problem, found.root, found.working_beta)

    def ranef(self) -> Any:
        """Conditional modes (BLUPs), user units, levels in canonical order.

        Returns
        -------
        with one grouping factor a DataFrame (G, k_re), one row per group; with several a dict of
        them by factor (``"g"``, ``"h:g"``, the name of a variance component)
        """
        tables = self._by_factor(lambda block, order: self._modes[block][order])
        return tables if len(tables) > 1 else next(iter(tables.values()))

    def ranef_cov(self) -> dict[str, NDArray[np.float64]]:
        """Conditional covariances of the effects of each level given beta and the variances.

        Returns
        -------
        label of each bar or component -> (levels, q, q), user units, levels as in ``ranef()``
        """
        problem, found, _ = self._prepared.problem, self._estimates, self._prepared.here
        return {
            bar.label: conditional_covariances(problem, found.root, found.sigma2, block)[
                self._block_order(block)
            ]
            for block, bar in enumerate(self._prepared.bars)
        }

    def _block_order(self, block: int) -> NDArray[np.intp]:
        if self._prepared.bars[block].component is not None:
            return self._effects.component_order(block)[0]
        (term,) = self._prepared.members(block)
        return self._effects.level_order(term)

    def _by_factor(self, values: Any) -> dict[str, pd.DataFrame]:
        """Tables of effects by factor: the bars of a factor side by side."""
        tables: dict[str, pd.DataFrame] = {}
        names = iter(self._column_names)
        for block, bar in enumerate(self._prepared.bars):
            order = self._block_order(block)
            table = values(block, order)
            if bar.component is not None:
                index = pd.Index([self._effects.effect_name(block, int(e)) for e in order])
                _, group = self._effects.component_order(block)
                labels = self._effects.group_index[group]
                index = pd.MultiIndex.from_arrays(
                    [labels, index], names=[self.group_name, "effect"]
                )
                tables[bar.label] = pd.DataFrame(table, index, [bar.label])
                continue
            (term,) = self._prepared.members(block)
            label = ":".join(self._prepared.levels[term].names)
            own = pd.DataFrame(
                table, self._effects.level_index(term), [next(names) for _ in bar.names]
            )
            tables[label] = own if label not in tables else pd.concat([tables[label], own], axis=1)
            if tables[label].columns.duplicated().any():
                tables[label].columns = self._told_apart(label)
        return tables

    def _told_apart(self, factor: str) -> list[str]:
        """Columns of the bars of one factor so far, with their bars' labels."""
        bars = [bar for bar in self._prepared.bars if bar.label.split(".")[0] == factor]
        return [f"{bar.label}: {name}" for bar in bars for name in bar.names]

    def _within_groups(self) -> None:
        if not self._effects.within_groups:
            raise NotSupportedError(
                "random_effects lists the effects of each group, but the factors "
                f"{', '.join(self.factors)} have levels of their own: use ranef()"
            )

    @property
    def random_effects(self) -> dict[Any, pd.Series]:
        """BLUPs by group label, made when asked for: the bar's columns, then ``vc[column]``."""
        self._within_groups()
        return ByLabel(self._effects.group_index, self._series)

    @property
    def random_effects_cov(self) -> dict[Any, pd.DataFrame]:
        """Conditional covariance of the random effects given y and the estimates, by label."""
        self._within_groups()
        return ByLabel(self._effects.group_index, self._covariance)

    def _series(self, place: int, label: Any) -> pd.Series:
        own = self._effects.of_group(place, self._re_names)
        values = [self._modes[block][effect, a] for block, effect, a, _ in own]
        return pd.Series(values, [name for *_, name in own], name=label, dtype=np.float64)

    def _covariance(self, place: int, label: Any) -> pd.DataFrame:
        del label
        own = self._effects.of_group(place, self._re_names)
        position = {(block, effect, a): i for i, (block, effect, a, _) in enumerate(own)}
        cov, found = np.zeros((len(own), len(own))), self._estimates
        for cluster in self._effects.clusters_of_group(place):
            joint = joint_covariance(self._prepared.problem, found.root, found.sigma2, int(cluster))
            where = [position[block, effect, a] for block, effect, a in joint.effects.tolist()]
            cov[np.ix_(where, where)] = joint.cov
        names = [name for *_, name in own]
        return pd.DataFrame(cov, names, names)

    # ----------------------------------------------------------------------------- rows

    @property
    def fittedvalues(self) -> Any:
        """Fixed part plus BLUPs plus offset, of the rows used; reads the rows again."""
        return self._plain(self._rows.fitted)

    @property
    def resid(self) -> Any:
        """Response minus ``fittedvalues``."""
        return self._plain(self._rows.response - self._rows.fitted)

    def _plain(self, values: pd.Series) -> Any:
        return values.to_numpy(copy=True) if self._names.plain else values.copy()

    @cached_property
    def _rows(self) -> prediction.Rows:
        if self._source is None:
            raise AttributeError(
                "the rows do not travel with a stored result: use predict(data) on them"
            )
        found = self._estimates
        return prediction.used_rows(
            self._prepared, found.beta, self._modes, self._source, running(self._client)
        )

    def remove_data(self) -> None:
        """Forget the rows: what needs them again raises, everything else stays."""
        object.__setattr__(self, "_source", None)
        object.__setattr__(self, "_model", None)
        self.__dict__.pop("_rows", None)

    def predict(self, exog: Any = None, transform: bool = True, storage_options: Any = None) -> Any:
        """Fixed part X beta of rows (population level, without offset and random effects).

        Parameters
        ----------
        exog
            anything that can be fitted; only the columns of the fixed part are needed. With a
            model of arrays, or ``transform=False``, an (n, p) design matrix. None means the rows
            of the fit.

        Returns
        -------
        (n,) Series (array for a model of arrays), NaN where a covariate is missing; units of y

        Raises
        ------
        DataError
            a level that the fit has not seen, a missing column
        """
        if exog is not None and (self._names.plain or self._names.fixed or not transform):
            return prediction.fixed_part(exog, self._estimates.beta, self._fixed_names)
        source = self._source if exog is None else open_source(exog, storage_options)
        if source is None:
            raise AttributeError("the rows do not travel with a stored result: give new data")
        found = prediction.population(
            self._prepared, self._estimates.beta, source, running(self._client)
        )
        return self._plain(found)

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
        kept = storage.Stored(self._prepared, self._estimates, self._names, self._history)
        storage.save(kept, path)

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
        return cls(found.prepared, found.estimates, found.names, _history=found.history)

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
