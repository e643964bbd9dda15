"""Effects of groups from rows that came after the fit, at the estimates of the fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dmixed import keys
from dmixed.arrays import with_columns
from dmixed.cellmoments import CellMoments, merge
from dmixed.dispatch import RETRIES, running
from dmixed.errors import DataError, NotSupportedError
from dmixed.evaluation import RemoteMoments
from dmixed.executor import collect
from dmixed.folding import (
    Touched,
    prepare_cells,
    refuse_crossed,
    refuse_new_levels,
    touched_cells,
    updated_lookup,
)
from dmixed.lookup import Lookup
from dmixed.predicted import Predicted
from dmixed.preparation import check_rows
from dmixed.sources import open_source

PILOT_ROWS = 2_000
"""Rows from which the sizes of the new groups are estimated."""


@dataclass(frozen=True, eq=False)
class _Clusters(Predicted):
    """The clusters of levels that new rows touch, as results of their own; the rest as it was."""

    _fit: Predicted = field(repr=False, kw_only=True)
    _touched: keys.Labels = field(repr=False, kw_only=True)

    def _lookup(self, errors: bool) -> Any:
        """Random effects of all levels: those of the fit, but for the clusters that are here."""
        if isinstance(self._fit._prepared.moments, RemoteMoments):
            client, own = self._fit._prepared.moments.client, super()._lookup(errors)
            fit = self._fit._lookup(errors)
            arguments = updated_lookup, fit, self._touched, own
            return client.submit(*arguments, pure=False, retries=RETRIES)
        return self._with_errors if errors else self._without_errors

    @cached_property
    def _without_errors(self) -> Lookup:
        return updated_lookup(self._fit._lookup(False), self._touched, super()._lookup(False))

    @cached_property
    def _with_errors(self) -> Lookup:
        return updated_lookup(self._fit._lookup(True), self._touched, super()._lookup(True))


@dataclass(frozen=True, eq=False, repr=False)
class FoldedEffects:
    """Random effects of groups with new rows, at the estimates of a fit; see ``fold_in``.

    The tables have all levels whose effects the new rows change: the groups of these rows; with
    nested factors all levels inside such a group; with crossed ones all that are linked with them.
    Nothing here changes.

    Attributes
    ----------
    result
        the fit, whose estimates these effects go with
    """

    result: Predicted
    _new: CellMoments
    _combine: str

    def __repr__(self) -> str:
        unseen = len(self.new_groups)
        return (
            f"<Effects of {self._clusters.n_groups:,} groups, {unseen:,} of them new, "
            f"with {self.nobs:,} new rows at the estimates of {self.result.formula!r}>"
        )

    @property
    def nobs(self) -> int:
        """New rows used."""
        return self._new.nobs

    @property
    def dropped(self) -> Mapping[str, int]:
        """New rows not used, by reason."""
        return dict(self._new.dropped)

    @property
    def new_groups(self) -> pd.Index:
        """Labels of the model's groups that have new rows and none in the fit, in order."""
        labels = self._new.labels.take(np.flatnonzero(~self._touched.known))
        names = self._clusters._prepared.groups.names
        groups = keys.subset(labels, [labels.names.index(name) for name in names])[1]
        return keys.to_pandas(groups.take(keys.sort_index(groups)))

    @cached_property
    def _touched(self) -> Touched:
        return touched_cells(self.result._prepared, self._new.labels)

    @cached_property
    def _clusters(self) -> _Clusters:
        """Results of the clusters that are touched, of their old rows and the new ones."""
        fit, old = self.result, self._touched.cells
        if self._combine == "replace":
            old = old.take(np.empty(0, np.intp))
        return _Clusters(
            prepare_cells(fit._prepared.outline, [old, self._new]),
            fit._estimates,
            fit._names,
            _client=fit._client,
            _fit=fit,
            _touched=self._touched.cells.labels,
        )

    def ranef(self) -> Any:
        """BLUPs, as ``ranef()`` of a result has them."""
        return self._clusters.ranef()

    def ranef_cov(self) -> dict[str, NDArray[np.float64]]:
        """Conditional covariances given beta and the variances, as ``ranef_cov()`` of a result."""
        return self._clusters.ranef_cov()

    @property
    def random_effects(self) -> dict[Any, pd.Series]:
        """BLUPs by group label, as ``random_effects`` of a result."""
        return self._clusters.random_effects

    @property
    def random_effects_cov(self) -> dict[Any, pd.DataFrame]:
        """Conditional covariances by group label, as ``random_effects_cov`` of a result."""
        return self._clusters.random_effects_cov

    def ranef_table(
        self,
        condvar: bool = True,
        out: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """BLUPs as tables with key columns and standard errors, as ``ranef_table()`` of a result.

        The column ``rows`` counts those that the effects are made of, old and new.
        """
        return self._clusters.ranef_table(condvar, out, storage_options)

    def predict(self, data: Any, groups: Any = True, **options: Any) -> Any:
        """Predictions of rows, as ``predict(data, groups)`` of the result has them.

        Groups with new rows have their effects of here, all others those of the fit.

        Parameters
        ----------
        data, groups
            see `MixedLMResults.predict`
        **options
            ``new_groups``, ``se``, ``interval``, ``alpha``, ``out``, ``storage_options``; standard
            errors are exact given the variances: that the new rows had no part in beta counts
        """
        return self._clusters.predict(_given(data), groups, **options)

    def augment(self, data: Any, columns: Sequence[str] | None = None, **options: Any) -> Any:
        """Rows with fitted values and residuals, as ``augment(data)`` of the result has them."""
        return self._clusters.augment(_given(data), columns, **options)

    def fold_in(self, rows: Any, **options: Any) -> FoldedEffects:
        """Effects with still more rows, which must not be among those so far.

        Parameters
        ----------
        rows, **options
            see `MixedLMResults.fold_in`; ``combine`` is as it was

        Raises
        ------
        DataError
            as there
        """
        if "combine" in options:
            raise DataError(f"combine= stays what it was, {self._combine!r}: fold into the fit")
        more = _summed(self.result, rows, **options)
        return FoldedEffects(self.result, merge([self._new, more]), self._combine)


def _given(data: Any) -> Any:
    if data is None:
        raise DataError("give the rows to predict: neither the fit's nor the new ones are kept")
    return data


def fold(fit: Predicted, rows: Any, combine: str, **options: Any) -> FoldedEffects:
    """Effects of groups with new rows; see `MixedLMResults.fold_in`."""
    if combine not in ("add", "replace"):
        raise DataError(f'combine={combine!r}: must be "add" or "replace"')
    if combine == "replace":
        refuse_crossed(fit._prepared.design)
    found = FoldedEffects(fit, _summed(fit, rows, **options), combine)
    _ = found._clusters  # what cannot be done is refused here
    return found


def _summed(
    fit: Predicted, rows: Any, weights: Any = None, offset: Any = None, **place: Any
) -> CellMoments:
    """Moments of new rows, by the fit's own specification; one pass."""
    if fit._names.plain or fit._names.fixed:
        raise NotSupportedError(
            "a model of arrays has no columns that new rows could have: fit it by a formula"
        )
    design = fit._prepared.design
    spec = design.spec
    for role, given in (("weights", weights), ("offset", offset)):
        own, array = getattr(spec, role), f"({role})"
        if given is not None and own != array:
            where = "has none" if own is None else f"has them in the column {own!r}"
            raise DataError(f"{role}= goes with a fit to which an array was given; this {where}")
        if given is None and own == array:
            raise DataError(f"the fit was given {role} as an array: give {role}= of the new rows")
        if isinstance(given, str):
            raise DataError(f"{role}={given!r}: the fit was given an array; give one")
    rows, _ = with_columns(rows, {"weights": weights, "offset": offset})
    source, client = open_source(rows, **place), running(fit._client)
    pilot = source.head(spec.columns, PILOT_ROWS)
    found = collect(spec, source, pilot, client, where="driver")
    assert isinstance(found, CellMoments)
    check_rows(found)
    refuse_new_levels(design, found)
    return replace(found, sizes=())
