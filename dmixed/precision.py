"""What sums a model's digits need: decided on a pilot sample, checked after the pass.

Sums about one point for all rows lose the digits of ``kappa``, the total over the residual sum of
squares: the criterion of n rows is off by about ``eps n kappa``. *References* (a row of each group)
bring the total down to what varies within groups; they cost a fifth to two thirds of the sums.
*Recoding* the columns by generalised least squares of the pilot makes nearly dependent columns
orthogonal and takes from y what the columns explain, for a third. Ordinary data have neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from scipy.linalg import solve_triangular

from dmixed.accumulation import accumulate, carried_columns
from dmixed.blocks import CONSTANT, RESPONSE, Column, DesignBlock, Floats, Recoding
from dmixed.cellmoments import CellMoments
from dmixed.design import Batch, DesignSpec, block
from dmixed.dispatch import one_blas_thread
from dmixed.errors import DmixedError
from dmixed.factors import marginal_products
from dmixed.fitting import fit
from dmixed.moments import Totals
from dmixed.preparation import prepare
from dmixed.whitening import places

EPS = float(np.finfo(float).eps)

GAIN = 100.0
"""Total over within-group sum of squares from which references are worth their cost."""

RECODED = 10.0
"""Times that a recoding must shorten a column, squared, relative to what it adds to the others."""

INDEPENDENT = 1e-12
"""What a column has of its own, relative to its size, from which it is recoded."""

EXPECTED, FOUND = 1e-7, 1e-3
"""Rounding of the criterion that calls for references before the pass, and for another pass."""

FEW = 5
"""Rows of a pilot beyond one per group, and per column, that tell nothing of its groups."""

CONSTANT_WITHIN = 1e-20
"""Within-group share of a sum of squares that is rounding: the column belongs to the groups."""


@dataclass(frozen=True, slots=True)
class Dwarfed:
    """How far what varies between groups dwarfs what varies within them.

    Attributes
    ----------
    helped
        eps kappa of the columns whose sums references shorten `GAIN` times: rounding of the
        criterion for each row; 0 if there are none
    all
        that of all columns
    """

    helped: float
    all: float

    @classmethod
    def of(cls, moments: Totals) -> Dwarfed:
        """As far as some moments can tell."""
        varying = [j for j, c in enumerate(moments.columns) if not c.cell and c.powers]
        n, df = moments.nobs, moments.nobs - moments.n_groups
        if df - len(varying) < FEW:
            return cls(0.0, 0.0)
        centred = (moments.FtF - moments.between)[np.ix_(varying, varying)]
        total = np.diag(moments.gram)[varying] / n
        within = np.maximum(np.diag(centred), 0.0) / df
        y = varying.index(moments.columns.index(Column((), ((RESPONSE, 1),))))
        residual = np.where(within > CONSTANT_WITHIN * total, within, np.inf)
        residual[y] = _unexplained(centred, y) / (df - len(varying) + 1)
        weight = np.isin(varying, moments.random) | (np.arange(len(varying)) == y)
        kappa = np.divide(total, residual, out=np.full(len(total), np.inf), where=residual > 0.0)
        kappa = np.where(weight, kappa, kappa / n)
        helped = total > GAIN * within
        return cls(EPS * float(kappa[helped].max(initial=0.0)), EPS * float(kappa.max(initial=0.0)))


def _unexplained(centred: Floats, y: int) -> float:
    """Sum of squares of column y within groups that the other columns leave."""
    size = np.sqrt(np.maximum(np.diag(centred), 0.0))
    inverse = np.divide(1.0, size, out=np.zeros(len(size)), where=size > 0.0)
    correlation = centred * inverse[:, None] * inverse
    others = np.delete(np.arange(len(size)), y)
    right = correlation[others, y]
    found = np.linalg.lstsq(correlation[np.ix_(others, others)], right, rcond=1e-12)[0]
    return float(size[y] ** 2 * max(1.0 - right @ found, 0.0))


@one_blas_thread
def safer(spec: DesignSpec, pilot: pa.Table, rows: Callable[[], int | None]) -> DesignSpec:
    """The spec, with references and a recoding if a pilot sample shows that its model needs them.

    Parameters
    ----------
    pilot
        some rows; they tell something of groups that have two or more of them
    rows
        how many there are in all, None if only reading would tell; asked for if it matters
    """
    one = _one_factor(spec)
    if not one and not _nested(spec):
        return spec
    try:
        sample = block(replace(spec, missing="drop", references=True), pilot)
        dwarfed, first = Dwarfed.of(accumulate(sample.block).totals), _orthogonal_rows(sample.block)
        n, most = sample.block.nobs, dwarfed.all
        if first is not None:
            most = max(most, EPS * float(first.kappa.max()))
        if most > GAIN * EPS:
            n = max(n, rows() or 0)
        spec = replace(spec, references=dwarfed.helped * n > EXPECTED)
    except (DmixedError, np.linalg.LinAlgError):
        return spec  # the pass says it better
    if first is None or most * n <= EXPECTED or not one:
        return spec
    try:
        return _best(spec, sample, first, n)
    except (DmixedError, np.linalg.LinAlgError):  # single rows of groups, for example
        return _independent(spec, first)


def _independent(spec: DesignSpec, first: _Orthogonal) -> DesignSpec:
    """Nearly dependent columns made orthogonal; y as it is, for its slopes may be garbage."""
    if EPS * first.kappa[:-1].max() <= EXPECTED:
        return spec
    S = np.array(first.recoding.S)
    S[:, -1] = np.arange(len(S)) == len(S) - 1
    return replace(spec, recoding=replace(first.recoding, S=tuple(map(tuple, S.tolist()))))


def _best(spec: DesignSpec, sample: Batch, first: _Orthogonal, n: int) -> DesignSpec:
    """The cheapest of references and recoding that keeps the digits of n rows.

    By the generalised least squares of the sample, in two steps: a QR decomposition of its rows, in
    whose columns the model is fitted without loss; then, as group effects are not noise, the
    Cholesky factor U of F'H^-1 F at that fit. See `likelihood` for what is lost.
    """
    own = first.recoding
    assert sample.labels is not None
    made = replace(sample.block, references=True, recoding=own)
    moments = CellMoments(
        replace(spec, recoding=own),
        *(sample.levels, sample.labels, accumulate(made), sample.dropped),
    )
    prepared = prepare(moments)
    group, at = moments.group, places(own, moments.group.columns)
    here = np.ix_(at, at)
    products = marginal_products(group, prepared.problem, fit(prepared).root)[here]
    U = np.linalg.cholesky(products).T
    V, S = solve_triangular(U, np.eye(len(U))), np.array(own.S)
    back = solve_triangular(S, np.diag(np.diag(S) / np.diag(U)))  # columns before, of pivot 1
    mean = group.gram[at[0], at] / group.gram[at[0], at[0]]
    zero = group.gram[here] - group.gram[at[0], at[0]] * np.outer(mean, mean)
    about = group.FtF[here].copy()
    about[0] = about[:, 0] = 0.0

    def lost(references: bool, recoded: bool) -> float:
        T, sums = V if recoded else back, about if references else zero
        sizes = np.maximum(_diagonal(T, sums), _diagonal(T, products))[1:]
        return EPS * float(sizes[:-1].sum() + n * sizes[-1])

    now = lost(spec.references, False)
    options = [(False, True, RECODED), (True, False, GAIN), (True, True, GAIN)]
    if spec.references:
        options = [(True, True, RECODED)]
    enough = max(EXPECTED, RECODED * lost(True, True))
    for references, recoded, gain in options if now > EXPECTED else ():
        found = lost(references, recoded)
        if found <= enough and gain * found <= now:
            recoding = _scaled(own.columns, S @ V) if recoded else None
            return replace(spec, references=references, recoding=recoding)
    return spec


def _diagonal(T: Floats, products: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ik,kj->j", T, products, T))


@dataclass(frozen=True, slots=True)
class _Orthogonal:
    """A recoding to orthogonal columns, and kappa (c,): squared size over what others leave."""

    recoding: Recoding
    kappa: Floats


def _orthogonal_rows(rows: DesignBlock) -> _Orthogonal | None:
    """`_orthogonal` of the rows of a block, weighted."""
    columns = _candidates(rows)
    F = carried_columns(rows, slice(None))[:, [rows.columns.index(c) for c in columns]]
    return _orthogonal(columns, F if rows.weights is None else F * np.sqrt(rows.weights)[:, None])


def _candidates(rows: DesignBlock) -> tuple[Column, ...]:
    """Columns of every row, none a sum of cells but the constant: random ones first, y last."""
    y = Column((), ((RESPONSE, 1),))
    in_cells = {c.powers for c in rows.columns if c.cell}
    random = [rows.columns[j] for j in rows.random]
    ordered = dict.fromkeys([CONSTANT, *random, *(c for c in rows.columns if c != y), y])
    return tuple(c for c in ordered if not c.cell and (c == CONSTANT or c.powers not in in_cells))


def _orthogonal(columns: tuple[Column, ...], F: Floats) -> _Orthogonal | None:
    """Columns as orthogonal ones; those that depend on the ones before are left as they are."""
    size = np.sqrt((F**2).sum(axis=0))
    if len(F) <= F.shape[1] or size.min(initial=np.inf) == 0.0 or not np.isfinite(size).all():
        return None
    R = np.linalg.qr(F / size, mode="r")
    own = np.sqrt((np.triu(R)[1:] ** 2).sum(axis=0))  # about the mean
    independent = np.abs(np.diag(R)) > INDEPENDENT * own
    independent[0] = True
    if not independent.all():
        y_left = bool(independent[-1])
        kept = np.flatnonzero(independent)
        return _orthogonal(tuple(columns[j] for j in kept), F[:, kept]) if y_left else None
    kappa = (own / np.diag(R)) ** 2
    kappa[0] = 0.0
    S = solve_triangular(R, np.eye(len(R))) / size[:, None]
    return _Orthogonal(_scaled(columns, S), kappa)


def _scaled(columns: tuple[Column, ...], S: Floats) -> Recoding:
    """Recoding to the same columns up to their sizes: the constant as it is."""
    signs = np.sign(np.diag(S))
    S = S * signs / S[0, 0] * signs[0]
    S[:, 0] = np.arange(len(S)) == 0
    return Recoding(columns, tuple(map(tuple, np.triu(S).tolist())))


def needs_references(spec: DesignSpec, totals: Totals) -> bool:
    """Whether moments have lost digits that another pass, with references, would keep."""
    if totals.referenced or not (_one_factor(spec) or _nested(spec)):
        return False
    return Dwarfed.of(totals).helped * totals.nobs > FOUND


def _one_factor(spec: DesignSpec) -> bool:
    """Whether groups are the cells."""
    return len({term.key for term in spec.terms}) == 1 and not any(t.reduced for t in spec.terms)


def _nested(spec: DesignSpec) -> bool:
    """Whether every cell has an intercept of its own; crossed factors are worked on about zero."""
    finest = [t for t in spec.terms if len(t.key) == len(spec.keys)]
    alone = [t for t in finest if sum(x.block == t.block for x in spec.terms) == 1]
    return any(t.products == ((),) and not t.reduced for t in alone)
