"""Rows taken out of a store again: those of files, and those of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dmixed import momentstore
from dmixed.cellmoments import CellMoments, merge
from dmixed.design import DesignSpec
from dmixed.erasure import alike, has_crossproducts, less, without
from dmixed.errors import DataError
from dmixed.formula.expressions import Name
from dmixed.keys import EXACT
from dmixed.ledger import checked
from dmixed.manifests import Delta
from dmixed.provenance import SourceState
from dmixed.sources import FilesSource, Source, open_source
from dmixed.store import StoreDirectory


@dataclass(frozen=True, slots=True)
class Opener:
    """How data that were summed are opened again.

    Attributes
    ----------
    data
        the data themselves; None for the path at which they were found
    options, filters
        see `open_source`
    """

    data: Any = None
    options: Mapping[str, Any] | None = field(default=None, repr=False)
    filters: Any = None

    def open(self, state: SourceState, condition: Any = None) -> Source:
        """The data of a source, or the rows of it that meet a condition.

        Raises
        ------
        DataError
            it is not known where they are, or which rows of them were summed
        """
        if condition is not None and (self.filters is not None or state.rows_wanted):
            raise DataError(
                "the group was summed with filters, and cannot be looked up among them: only "
                "moments with group_crossproducts=True can forget it"
            )
        wanted = self.filters if condition is None else condition
        if self.data is not None:
            return open_source(self.data, self.options, filters=wanted)
        if not state.location or state.kind == "iceberg":  # which a catalog opens
            what = f"data of kind {state.kind!r}"
            if state.kind == "parquet" and state.files:
                what = f"a list of files such as {state.files[0].name}"
            raise DataError(f"{what} cannot be found again from what is stored: pass data=")
        version = None
        if state.kind == "delta" and state.snapshot:
            version = int(state.snapshot.rpartition(" ")[2])
        return open_source(state.location, self.options, filters=wanted, version=version)


# --------------------------------------------------------------------------- files


def without_files(
    store: StoreDirectory, names: set[str], opener: Opener, client: Any
) -> tuple[list[Delta], list[Delta]]:
    """Deltas without the rows of some files, and those of them that were written for it.

    Raises
    ------
    DataError
        naming the file that cannot be read again
    """
    kept: list[Delta] = []
    made: list[Delta] = []
    with store.written():
        try:
            for delta in store.deltas:
                own = {file.name for state in delta.sources for file in state.files}
                if not own & names:
                    kept.append(delta)
                elif own - names or not all(state.files for state in delta.sources):
                    made.append(_divided(store, delta, own & names, opener, client))
                    kept.append(made[-1])
        except BaseException:
            _clean(store, made)
            raise
    return kept, made


def _divided(
    store: StoreDirectory, delta: Delta, names: set[str], opener: Opener, client: Any
) -> Delta:
    """A delta without the rows of some of its files: subtracted, or else made of the others."""
    rest = [
        replace(x, files=tuple(file for file in x.files if file.name not in names))
        for x in delta.sources
        if not x.files or {file.name for file in x.files} - names
    ]
    try:
        left = store.cells([delta])
        for state in delta.sources:
            own = {file.name for file in state.files} & names
            if own:
                again = checked(opener.open(state), state, own)
                left = less(left, store.summed_again(delta, again, client))
    except DataError as error:
        try:
            sources = [checked(opener.open(x), x, {f.name for f in x.files}) for x in rest]
        except DataError:
            raise error from None
        left = merge([_of_rows(store, delta, source, client) for source in sources])
    return momentstore.write_delta(store.folder, left, rest, created=delta.created)


def _of_rows(store: StoreDirectory, delta: Delta, source: Source, client: Any) -> CellMoments:
    """Moments of rows as the delta has them; groups that it has forgotten are left out."""
    whole = store.cells([delta])
    found = store.summed_again(delta, source, client)
    return alike(found, whole)


# --------------------------------------------------------------------------- groups


def without_group(
    store: StoreDirectory, wanted: Mapping[str, Any], opener: Opener, client: Any
) -> tuple[list[Delta], list[Delta], int]:
    """Deltas without the cells that have some labels, those written for it, and rows taken out.

    Raises
    ------
    DataError
        naming the file that cannot be read again, or what else is missing
    """
    kept: list[Delta] = []
    made: list[Delta] = []
    rows = 0
    with store.written():
        try:
            for delta in store.deltas:
                cells = store.cells([delta])
                gone = matching(cells, wanted)
                if not gone.any():
                    kept.append(delta)
                    continue
                if has_crossproducts(cells):
                    left = without(cells, gone)
                else:
                    left = _subtracted(store, delta, cells, gone, wanted, opener, client)
                rows += cells.nobs - left.nobs
                made.append(
                    momentstore.write_delta(
                        store.folder, left, delta.sources, created=delta.created
                    )
                )
                kept.append(made[-1])
        except BaseException:
            _clean(store, made)
            raise
    return kept, made, rows


def _subtracted(
    store: StoreDirectory,
    delta: Delta,
    cells: CellMoments,
    gone: NDArray[np.bool_],
    wanted: Mapping[str, Any],
    opener: Opener,
    client: Any,
) -> CellMoments:
    """Moments of a delta without the rows of some cells, which are read again."""
    if not delta.sources or not all(state.files for state in delta.sources):
        raise DataError(
            f"the group was added on {delta.created} with rows that are in no file, and cannot be "
            "read again: only moments with group_crossproducts=True can forget it"
        )
    condition, left = _condition(cells.spec, wanted), cells
    for state in delta.sources:
        names = {file.name for file in state.files}
        checked(opener.open(state), state, names)
        source = opener.open(state, condition)
        assert isinstance(source, FilesSource)
        some = names & source.listed().keys()  # folders may exclude files
        if some:
            left = less(left, store.summed_again(delta, source.only(some), client))
    expected = cells.nobs - int(cells.group.counts[gone].sum())
    if left.nobs != expected or matching(left, wanted).any():
        raise DataError(
            f"the files that were added on {delta.created} do not have the rows of the group that "
            "were summed: collect the moments anew"
        )
    return left


def _condition(spec: DesignSpec, wanted: Mapping[str, Any]) -> Any:
    """What is true of the rows that have some labels."""
    nodes, found = {key.name: key.node for key in spec.keys}, None
    for key, label in wanted.items():
        node = nodes[key]
        if not isinstance(node, Name):
            raise DataError(f"{key}: is an expression, by which rows cannot be looked up")
        wide = isinstance(label, Integral) and int(label) >= 2**63
        one = pc.field(node.column) == (pa.scalar(int(label), pa.uint64()) if wide else label)
        found = one if found is None else found & one
    return found


def labels(spec: DesignSpec, group: Any) -> dict[str, Any]:
    """Keys and labels of a group, from a label, a tuple of labels, or a dict.

    Raises
    ------
    DataError
        it does not name keys of the model
    """
    names = [key.name for key in spec.keys]
    if isinstance(group, Mapping):
        if not group or not set(group) <= set(names):
            raise DataError(f"group={dict(group)!r}: its keys must be some of {', '.join(names)}")
        return dict(group)
    own = spec.formula.groups
    given = group if isinstance(group, tuple) else (group,)
    if len(given) != len(own):
        raise DataError(f"group={group!r}: must be the label of {', '.join(own)}")
    return dict(zip(own, given, strict=True))


def matching(cells: CellMoments, wanted: Mapping[str, Any]) -> NDArray[np.bool_]:
    """(N,) which cells have some labels."""
    found = np.ones(len(cells.labels), np.bool_)
    for key, label in wanted.items():
        array = cells.labels.arrays[cells.labels.names.index(key)]
        if label is None:
            raise DataError(f"group: None is no label of {key}: rows without one are not used")
        if isinstance(label, Integral) and not _holds(array.type, int(label)):
            return np.zeros_like(found)
        try:
            same = pc.equal(array, pa.scalar(label, array.type))
        except (pa.ArrowException, TypeError, OverflowError):
            raise DataError(
                f"group: {label!r} is no label of {key}, which are of type {array.type}"
            ) from None
        found &= same.to_numpy(zero_copy_only=False)
    return found


def _holds(type_: pa.DataType, label: int) -> bool:
    """Whether a type, if it is one of numbers, holds an integer: another delta's may be wider."""
    if pa.types.is_floating(type_):
        return label in range(-EXACT, EXACT + 1)
    low = 0 if type_ == pa.uint64() else -(2**63)
    return not pa.types.is_integer(type_) or label in range(low, 2**64 + low)


def _clean(store: StoreDirectory, made: Sequence[Delta]) -> None:
    for delta in made:
        momentstore.remove_files(store.folder, delta.files)
