"""What must not change, and what must change by a known amount, for any data (hypothesis)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import tempfile
import warnings
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import model_of

import dmixed
from dmixed import keys
from dmixed.blocks import Frame
from dmixed.moments import reframe

FORMULA = "y ~ x + f + (1 + x | g)"
N, GROUPS = 120, 12

quick = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)


def table(seed=0):
    """y, x, z, factor f, group g; x and z are multiples of 2^-10, so that shifts are exact."""
    rng = np.random.default_rng(seed)
    g = np.arange(N) % GROUPS
    x, z = np.round(rng.normal(0, 1, (2, N)) * 1024) / 1024
    b = rng.normal(0, 1, (GROUPS, 2)) @ [[1.0, 0.3], [0, 0.5]]
    y = 3 + 2 * x + b[g, 0] + b[g, 1] * x + rng.normal(0, 1, N)
    f = rng.choice(["a", "b", "c"], N)
    return pd.DataFrame({"y": y, "x": x, "z": z, "f": f, "g": g})


@functools.cache
def base(reml=True):
    return dmixed.lmer(FORMULA, table(), reml=reml)


def assert_same(a, b, relabel=lambda g: g, tol=1e-7):
    """Two fits agree to a small part of a standard error."""
    sd = np.sqrt(np.diag(b.cov_re))
    assert a.llf == pytest.approx(b.llf, abs=1e-8)
    assert list(a.fe_params.index) == list(b.fe_params.index)
    assert np.all(np.abs(a.fe_params - b.fe_params) <= tol * b.bse_fe)
    assert np.allclose(a.bse_fe, b.bse_fe, rtol=tol, atol=0)
    assert a.scale == pytest.approx(b.scale, rel=tol)
    assert np.all(np.abs(a.cov_re.to_numpy() - b.cov_re.to_numpy()) <= tol * np.outer(sd, sd))
    assert len(a.random_effects) == len(b.random_effects)
    for label in b.random_effects:
        difference = a.random_effects[relabel(label)] - b.random_effects[label]
        assert np.all(np.abs(difference.to_numpy()) <= 10 * tol * sd)


cuts = st.lists(st.integers(0, N), max_size=6).map(sorted)  # repeated cuts: empty partitions


def pieces(d, where):
    edges = [0, *where, N]
    return [d.iloc[a:b] for a, b in itertools.pairwise(edges)]


@quick
@given(cuts)
def test_unchanged_under_dask_partitioning(where):
    parts = pieces(table(), where)
    frame = dd.from_map(lambda i: parts[i], range(len(parts)), meta=parts[0].iloc[:0])
    assert_same(dmixed.lmer(FORMULA, frame), base())


@quick
@given(cuts, cuts)
def test_unchanged_under_row_groups_and_files(row_groups, files):
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(pieces(table(), files)):
            arrow = pa.Table.from_pandas(part, preserve_index=False)
            with pq.ParquetWriter(Path(folder) / f"part-{i}.parquet", arrow.schema) as writer:
                edges = [0, *(c for c in row_groups if c < len(part)), len(part)]
                for a, b in itertools.pairwise(edges):
                    writer.write_table(arrow.slice(a, b - a))
        assert_same(dmixed.lmer(FORMULA, folder), base())


@quick
@given(st.permutations(range(N)))
def test_unchanged_under_row_order(order):
    assert_same(dmixed.lmer(FORMULA, table().iloc[order]), base())


@quick
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        min_size=GROUPS,
        max_size=GROUPS,
        unique=True,
    )
)
def test_unchanged_under_relabelling(labels):
    d = table()
    d["g"] = pd.Series([labels[g] for g in d.g], dtype=object)
    assert_same(dmixed.lmer(FORMULA, d), base(), relabel=labels.__getitem__)


@quick
@given(st.permutations(range(GROUPS)), st.integers(-(2**62), 2**62))
def test_unchanged_under_integer_relabelling(order, start):
    d = table()
    d["g"] = [start + order[g] for g in d.g]
    assert_same(dmixed.lmer(FORMULA, d), base(), relabel=lambda g: start + order[g])


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@quick
@given(c=st.sampled_from([-1e6, -1.0, 1e-8, 0.3, 10.0, 1e8]))
def test_scaling_the_response(reml, c):
    d, b = table(), base(reml)
    d["y"] *= c
    a = dmixed.lmer(FORMULA, d, reml=reml)
    sd = np.sqrt(np.diag(b.cov_re))
    df = N - len(b.fe_params) if reml else N
    assert a.llf == pytest.approx(b.llf - df * np.log(abs(c)), abs=1e-7)
    assert np.all(np.abs(a.fe_params / c - b.fe_params) <= 1e-7 * b.bse_fe)
    assert np.allclose(a.bse_fe, abs(c) * b.bse_fe, rtol=1e-7, atol=0)
    assert a.scale == pytest.approx(c**2 * b.scale, rel=1e-7)
    assert np.all(np.abs(a.cov_re / c**2 - b.cov_re) <= 1e-7 * np.outer(sd, sd))
    assert np.allclose(a.bse_re, c**2 * b.bse_re, rtol=1e-6, atol=0)  # units of y squared
    assert np.allclose(a.ranef(), c * b.ranef(), rtol=0, atol=1e-6 * abs(c) * sd.max())


FIXED = ["Intercept", "f[T.b]", "f[T.c]", "x"]


def fixed_design(d):
    return np.column_stack([np.ones(N), d.f == "b", d.f == "c", d.x])


@quick
@given(
    st.floats(-1e6, 1e6),
    st.lists(st.floats(-100, 100), min_size=2, max_size=2),
    st.floats(-1e6, 1e6),
)
def test_adding_fixed_effects_to_the_response(intercept, contrasts, slope):
    """Contrasts lose eps (|d|/sigma)^2; nothing is lost for the intercept and the covariate."""
    t, b = table(), base()
    d = [intercept, *contrasts, slope]
    t["y"] += fixed_design(t) @ d
    a = dmixed.lmer(FORMULA, t)
    assert a.llf == pytest.approx(b.llf, abs=1e-7)
    assert np.all(np.abs(a.fe_params[FIXED] - b.fe_params[FIXED] - d) <= 1e-6 * b.bse_fe[FIXED])
    assert np.allclose(a.cov_re, b.cov_re, rtol=1e-6, atol=1e-7)
    assert a.scale == pytest.approx(b.scale, rel=1e-7)


@pytest.mark.parametrize("slope", [1e4, 1e6, 1e8])
def test_a_covariate_that_explains_nearly_all(slope):
    """But for 1 part in slope: what is lost is the rounding of y itself."""
    t, b = table(), base()
    t["y"] += slope * t.x
    a = dmixed.lmer(FORMULA, t)
    assert a.llf == pytest.approx(b.llf, abs=1e-14 * slope * N)
    assert a.optimizer_summary.certificate


@pytest.mark.parametrize("slope", [1e4, 1e6, 1e8])
def test_lost_digits_are_never_silent(slope):
    """A contrast that explains y but for 1 part in slope: right, or said to be uncertain."""
    t, b = table(), base()
    t["y"] += slope * (t.f == "b")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            a = dmixed.lmer(FORMULA, t)
        except dmixed.DataError:
            return  # no residual variance left: said so
    if not caught:
        assert a.llf == pytest.approx(b.llf, abs=1e-4)
        assert a.optimizer_summary.certificate
    assert {w.category for w in caught} <= {dmixed.ConvergenceWarning}


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@quick
@given(
    shift=st.sampled_from([0, 1, -100, 2**14, -(2**20), 2**27]),
    log2_scale=st.sampled_from([-27, -7, 0, 3, 27]),
)
def test_shifting_and_rescaling_a_column(reml, shift, log2_scale):
    """Mean/sd up to 1e8, units from 1e-8 to 1e8; powers of two, so that the data are exact."""
    d, b, s = table(), base(reml), 2.0**log2_scale
    d["x"] = (d.x + shift) * s
    a = dmixed.lmer(FORMULA, d, reml=reml)
    jacobian = np.log(s) if reml else 0  # log|X'H^-1 X| sees the units of x
    assert a.llf == pytest.approx(b.llf - jacobian, abs=1e-7)
    assert abs(a.fe_params["x"] * s - b.fe_params["x"]) <= 1e-7 * b.bse_fe["x"]
    assert a.bse_fe["x"] * s == pytest.approx(b.bse_fe["x"], rel=1e-7)
    assert a.scale == pytest.approx(b.scale, rel=1e-7)
    assert a.cov_re.loc["x", "x"] * s**2 == pytest.approx(b.cov_re.loc["x", "x"], rel=1e-6)
    assert np.allclose(a.fittedvalues, b.fittedvalues, rtol=0, atol=1e-6)
    assert a.optimizer_summary.certificate


def test_shifting_the_response():
    d, b = table(), base()
    d["y"] = np.round(d.y * 2**16) / 2**16
    reference = dmixed.lmer(FORMULA, d)
    d["y"] += 2.0**33
    a = dmixed.lmer(FORMULA, d)
    assert reference.llf == pytest.approx(b.llf, abs=1e-2)
    assert a.llf == pytest.approx(reference.llf, abs=1e-7)
    assert a.scale == pytest.approx(reference.scale, rel=1e-7)


# Addition of moments


def moments_of(d):
    return model_of(FORMULA, d).moments


def content(moments, like):
    """The sums in a `CellMoments`, about the shifts and in the order of another's."""
    own, other = reframe(moments.group, like.group.frame), like.group
    groups = keys.lookup(moments.labels, like.labels)
    columns = [own.columns.index(c) for c in other.columns]
    random = [own.columns.index(other.columns[j]) for j in other.random]
    assert len(own.columns) == len(columns)
    assert own.n_groups == other.n_groups
    WtF = own.WtF[groups][:, [own.random.index(j) for j in random]][:, :, columns]
    return WtF, own.FtF[np.ix_(columns, columns)], own.counts[groups]


@quick
@given(cuts.filter(lambda c: len(c) >= 2))
def test_moments_add_in_any_order(where):
    parts = [moments_of(p) for p in pieces(table(), where) if len(p)]
    whole = moments_of(table())
    for total in (
        functools.reduce(operator.add, parts),
        functools.reduce(operator.add, parts[::-1]),
        functools.reduce(lambda a, b: b + a, parts),
    ):
        assert_same_moments(total, whole)


def assert_same_moments(a, b):
    for ours, theirs in zip(content(a, b), content(b, b), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


# Continuity


@quick
@given(st.floats(-12, -2), st.sampled_from([True, False]))
def test_continuous_as_the_variances_vanish(exponent, reml):
    """f(t L) = f(0) + t^2/2 u'Hu + O(t^4): no jump, no special case, gradient 0 at 0."""
    model = model_of(FORMULA, table())
    u, t = np.array([0.8, 0.3, 0.5]), 10**exponent
    f0, g0, H0 = model.criterion(np.zeros(3), reml)
    f, g, _ = model.criterion(t * u, reml)
    assert np.allclose(g0, 0, atol=1e-9)
    assert f - f0 == pytest.approx(t**2 / 2 * u @ H0 @ u, abs=1e-9 + 3e4 * t**4)
    assert np.allclose(g, t * H0 @ u, rtol=0, atol=1e-9 + 3e4 * t**3)


def test_fits_are_continuous_as_the_variance_vanishes():
    """Group effects shrunk to nothing: estimates go to least squares without a jump."""
    rng = np.random.default_rng(4)
    g = np.arange(N) % GROUPS
    x, b = rng.normal(0, 1, N), rng.normal(0, 1, GROUPS)
    e = rng.normal(0, 1, N)
    e -= (np.bincount(g, e) / np.bincount(g))[g]  # residuals without any group effect
    fits = []
    for tau in (0.6, 0.4, 0.3, 0.2, 0.1, 0.0):
        d = pd.DataFrame({"y": x + tau * b[g] + e, "x": x, "g": g})
        fits.append(dmixed.lmer("y ~ x + (1 | g)", d))
    theta = np.array([fit.theta[0] for fit in fits])
    assert np.all(np.diff(theta) <= 0)
    assert theta[-1] == 0
    assert fits[-1].singular
    assert not fits[0].singular
    ols, *_ = np.linalg.lstsq(np.column_stack([np.ones(N), x]), x + e)
    assert np.allclose(fits[-1].fe_params, ols, atol=1e-9)
    assert np.allclose(fits[-1].ranef(), 0, atol=1e-12)


def test_a_pilot_that_is_not_like_the_rest():
    """Shifts 2000 standard deviations away: noticed, and no digit is lost."""
    rng = np.random.default_rng(5)
    g = np.arange(6000) % 60
    x = rng.normal(2000.0, 1.0, 6000)
    y = 0.01 * (x - 2000) ** 2 + rng.standard_normal(60)[g] + rng.standard_normal(6000)
    d = pd.DataFrame({"y": y, "x": x, "g": g})
    good, bad = (model_of("y ~ x + I(x**2) + (1 + x | g)", d) for _ in range(2))
    names = bad.spec.frame.names
    far = Frame(names, (0.0,) * len(names), (1.0,) * len(names))
    vars(bad)["spec"] = dataclasses.replace(bad.spec, frame=far)
    assert bad.moments.spec.frame != far
    a, b = good.fit(), bad.fit()
    assert b.llf == pytest.approx(a.llf, abs=1e-7)
    assert np.all(np.abs(b.fe_params - a.fe_params) <= 1e-7 * a.bse_fe)
    assert not b.aliased
    assert b.optimizer_summary.certificate
