"""Data whose digits are easily lost: right, or said to be uncertain, and where it can be, exact.

Oracles import nothing of dmixed: `digits` has ninety decimal digits, and the balanced one-way
layout has its closed form in rational numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from digits import Digits, exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import model_of

import dmixed
from dmixed import keys
from dmixed.blocks import Frame, Recoding
from dmixed.design import block
from dmixed.folders import Folder
from dmixed.manifests import read_manifest, stored_spec
from dmixed.moments import combine, reframe
from dmixed.precision import _candidates

quick = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)


# ------------------------------------------------------------------ the balanced one-way layout

G, M = 40, 10


def log(q: Fraction) -> float:
    return math.log(q.numerator) - math.log(q.denominator)


def closed_form(y, reml):
    """Log-likelihood, error variance and mean of (G, M) observations: analysis of variance."""
    rows = [[Fraction(v) for v in row] for row in y.tolist()]
    means = [sum(row) / M for row in rows]
    mean = sum(means) / G
    within = sum((v - m) ** 2 for row, m in zip(rows, means, strict=True) for v in row)
    sigma2 = within / (G * (M - 1))
    between = M * sum((m - mean) ** 2 for m in means) / (G - 1 if reml else G)
    assert between > sigma2  # else the variance of the groups is zero
    df = G * M - 1 if reml else G * M
    value = G * (M - 1) * log(sigma2) + G * log(between) + df * (1 + math.log(2 * math.pi))
    value += log(Fraction(G * M)) - log(between) if reml else 0.0
    return -value / 2, float(sigma2), float(mean)


def one_way(offset, scale, tau):
    rng = np.random.default_rng(7)
    return scale * (offset + tau * rng.standard_normal((G, 1)) + rng.standard_normal((G, M)))


def as_frame(y, tmp_path):
    return pd.DataFrame({"y": y.ravel(), "g": np.repeat(np.arange(G), M)})


def shuffled(y, tmp_path):
    return as_frame(y, tmp_path).sample(frac=1, random_state=3)


def as_files(y, tmp_path):
    """Groups spread over the files: each has a reference of its own for them."""
    d = shuffled(y, tmp_path)
    for i in range(5):
        pq.write_table(
            pa.Table.from_pandas(d[i::5], preserve_index=False), tmp_path / f"{i}.parquet"
        )
    return tmp_path


@pytest.mark.parametrize("how", [as_frame, shuffled, as_files])
@pytest.mark.parametrize("tau", [1.0, 1e2, 1e4, 1e6])
def test_a_balanced_layout_is_exact(how, tau, tmp_path):
    """Offsets to 1e12, units from 1e-8 to 1e8: no digit is lost that the data have."""
    for i, (offset, scale) in enumerate(itertools.product([0, 1e6, 1e12], [1e-8, 1.0, 1e8])):
        y = one_way(offset, scale, tau)
        folder = tmp_path / str(i)
        folder.mkdir()
        data = how(y, folder)
        for reml in (True, False):
            llf, sigma2, mean = closed_form(y, reml)
            found = dmixed.lmer("y ~ 1 + (1 | g)", data, reml=reml)
            assert found.converged
            assert found.llf == pytest.approx(llf, abs=1e-7)
            assert found.scale == pytest.approx(sigma2, rel=1e-9)
            assert abs(found.fe_params["Intercept"] - mean) <= 1e-6 * found.bse_fe["Intercept"] + (
                4e-16 * abs(mean)
            )


A, B = 12, 4


def nested_closed_form(y, reml):
    """Log-likelihood and error variance of (A, B, M) observations in classes within schools."""
    cells = [[[Fraction(v) for v in row] for row in school] for school in y.tolist()]
    means = [[sum(row) / M for row in school] for school in cells]
    schools = [sum(school) / B for school in means]
    mean = sum(schools) / A
    pairs = list(itertools.product(range(A), range(B)))
    within = sum((v - means[i][j]) ** 2 for i, j in pairs for v in cells[i][j])
    sigma2 = within / (A * B * (M - 1))
    classes = M * sum((means[i][j] - schools[i]) ** 2 for i, j in pairs) / (A * (B - 1))
    between = M * B * sum((s - mean) ** 2 for s in schools) / (A - 1 if reml else A)
    assert sigma2 < classes < between  # else a variance is zero
    n = A * B * M
    value = A * B * (M - 1) * log(sigma2) + A * (B - 1) * log(classes) + A * log(between)
    value += (n - 1 if reml else n) * (1 + math.log(2 * math.pi))
    value += math.log(n) - log(between) if reml else 0.0
    return -value / 2, float(sigma2)


@pytest.mark.parametrize("offset", [0, 1e10])
@pytest.mark.parametrize("taus", [(2, 1), (1e4, 1), (2e4, 1e4), (3, 2), (1e6, 1), (2e6, 1e3)])
def test_balanced_nested_layouts_are_exact(taus, offset):
    rng = np.random.default_rng(1)
    schools, classes = (rng.standard_normal(s) for s in ((A, 1, 1), (A, B, 1)))
    y = offset + 3 * taus[0] * schools + taus[1] * classes + rng.standard_normal((A, B, M))
    school, class_, _ = (i.ravel() for i in np.indices(y.shape))
    d = pd.DataFrame({"y": y.ravel(), "s": school, "c": class_}).sample(frac=1, random_state=2)
    for reml in (True, False):
        llf, sigma2 = nested_closed_form(y, reml)
        found = dmixed.lmer("y ~ 1 + (1 | s / c)", d, reml=reml)
        assert found.converged
        assert found.llf == pytest.approx(llf, abs=1e-6)
        assert found.scale == pytest.approx(sigma2, rel=1e-8)


# ------------------------------------------------------------------ right, or said to be uncertain


def table(
    ymean=0.0, xmean=0.0, xscale=1.0, tau=1.0, tau1=0.0, collinear=None, between=0.0,
    unbalanced=False,
):  # fmt: skip
    """y, x1, x2 and 60 groups in 600 shuffled rows; the error has standard deviation 1."""
    rng = np.random.default_rng(0)
    g = rng.integers(0, 60, 600) if unbalanced else np.arange(600) % 60
    x1, x2 = rng.standard_normal((2, 600))
    x2 += between * rng.standard_normal(60)[g]
    if collinear:
        x1 = x2 + x1 / collinear
    b = rng.standard_normal((2, 60))
    y = 1 + 0.3 * x1 + 0.5 * x2 + tau * b[0, g] + tau1 * b[1, g] * x2 + rng.standard_normal(600)
    d = pd.DataFrame({"y": y + ymean, "x1": x1, "x2": (x2 + xmean) * xscale, "g": g})
    return d.sample(frac=1, random_state=1)


ORDINARY = {
    "base": {},
    "unbalanced": {"unbalanced": True},
    **{f"mean of y {v:g}": {"ymean": v} for v in (1e4, 1e8, 1e12)},
    **{f"mean of x {v:g}": {"xmean": v} for v in (1e4, 1e8, 1e10)},
    **{f"units of x {v:g}": {"xscale": v} for v in (1e-8, 1e8)},
    **{f"groups {v:g}": {"tau": v} for v in (1e1, 1e2, 1e3, 1e4, 1e6)},
    "unbalanced groups 1e5": {"tau": 1e5, "unbalanced": True},
}
HARD = {
    **{f"collinear {v:g}": {"collinear": v} for v in (1e4, 1e5, 1e6, 3e6)},
    **{f"x between groups {v:g}": {"between": v} for v in (1e2, 1e3)},
    "all at once": {"collinear": 1e2, "between": 1e3, "tau": 1e4, "ymean": 1e8, "xmean": 1e5},
}
SLOPES = {
    **{f"slopes {v:g}": {"tau": v, "tau1": v} for v in (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)},
    **{f"x between groups {v:g}": {"between": v} for v in (1e4, 1e5, 1e6)},
}
"""References and recoding help neither: what is lost is lost between the slopes of the groups."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """What is wrong with a fit: deviance units, standard errors, relative."""

    deviance: float
    excess: float
    beta: float
    sigma2: float
    rounding: float
    converged: bool


def errors(d, slope, reml):
    formula = f"y ~ x1 + x2 + (1 {'+ x2 ' * slope}| g)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        found = dmixed.lmer(formula, d, reml=reml)
    assert found.aliased == ()
    X = np.column_stack([np.ones(len(d)), d.x1, d.x2])
    oracle = Digits.of(d.y, X, X[:, [0, 2]] if slope else X[:, :1], d.g)
    L = np.zeros((1 + slope,) * 2)
    L[np.tril_indices(1 + slope)] = found.theta[[0, 1, 2] if slope else [0]]
    value, beta, se, sigma2 = oracle.fit(exact(L), reml)
    # estimates are doubles: about means of 1e12 they cannot be nearer than these
    ulp = [4e-16 * abs(float(b)) for b in beta]
    beta_errors = [
        max(abs(float(Decimal(a) - b)) - u, 0.0) / float(s)
        for a, b, s, u in zip(found.fe_params.tolist(), beta, se, ulp, strict=True)
    ]
    return Errors(
        abs(-2 * found.llf - float(value)),
        oracle.excess(exact(L), reml),
        max(beta_errors),
        abs(found.scale / float(sigma2) - 1),
        found.optimizer_summary.certificate.rounding,
        found.converged,
    )


@pytest.mark.parametrize("slope", [False, True], ids=["intercept", "slope"])
@pytest.mark.parametrize("case", [*ORDINARY, *HARD])
def test_no_digits_are_lost(case, slope):
    options = {"tau1": 0.5 if slope else 0.0, **{**ORDINARY, **HARD}[case]}
    for reml in (True, False):
        e = errors(table(**options), slope, reml)
        assert e.converged
        assert e.deviance <= min(1e-6, 15 * e.rounding + 1e-9)
        assert abs(e.excess) <= 1e-8
        assert e.beta <= 1e-5
        assert e.sigma2 <= 1e-6


@pytest.mark.parametrize("between", [1e4, 1e5, 1e6])
def test_columns_that_dwarf_the_noise_between_groups(between):
    e = errors(table(between=between), False, True)
    assert e.converged
    assert e.deviance <= 1e-6
    assert e.beta <= 1e-5


@pytest.mark.parametrize("case", SLOPES)
def test_lost_digits_are_certified(case):
    """The error is as small as anybody asks, or is announced and does not pass for converged."""
    e = errors(table(**{"tau1": 0.5, **SLOPES[case]}), True, True)
    assert e.deviance <= 15 * e.rounding + 1e-10
    if e.converged:
        assert e.beta <= 0.1
        assert e.excess <= 0.1**2
    if e.rounding <= 1e-7:
        assert e.deviance <= 1e-6


@pytest.mark.parametrize("other", ["float32", "sum", "nearly"])
def test_dependent_columns_are_named(other):
    """As in lme4: what a column has of its own below 1e-7 is rounding, not information."""
    d = table(collinear=1e5)
    with_own = d.x1 + 3 * d.x2
    made = {
        "float32": with_own.astype(np.float32).astype(float),
        "sum": with_own,
        "nearly": with_own + 1e-9 * np.random.default_rng(3).standard_normal(600),
    }
    found = dmixed.lmer("y ~ x1 + x2 + z + (1 | g)", d.assign(z=made[other]))
    without = dmixed.lmer("y ~ x1 + x2 + (1 | g)", d)
    assert without.aliased == ()
    assert found.aliased == ("z",)
    assert found.llf == pytest.approx(without.llf, abs=1e-7)


def test_digits_lost_are_told():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        hard = dmixed.lmer("y ~ x1 + x2 + (1 + x2 | g)", table(tau=1e5, tau1=1e5))
    assert "digits were lost" in str(hard.summary()).replace("\n  ", " ")
    assert "digits" not in str(dmixed.lmer("y ~ x1 + x2 + (1 | g)", table()).summary())


# ------------------------------------------------------------------ what decides


def uses(d, formula="y ~ x1 + x2 + (1 | g)", **options):
    return model_of(formula, d, **options).spec.references


def test_ordinary_data_have_no_references():
    d = table()
    d["z"] = np.random.default_rng(1).standard_normal(60)[d.g]  # a column of the groups
    assert not uses(d)
    assert not uses(d, "y ~ x1 + z + (1 + x1 | g)")
    assert not uses(table(ymean=1e9, xmean=1e9))
    assert not uses(table(tau=1e6).drop_duplicates("g"))  # single rows tell nothing
    assert uses(table(tau=1e4))
    assert uses(table(between=1e4, tau1=1.0), "y ~ x1 + x2 + (1 + x2 | g)")


def test_a_pilot_without_the_groups(tmp_path):
    """Groups longer than the pilot: the pass finds out what the first rows could not tell."""
    rng = np.random.default_rng(2)
    g = np.repeat(np.arange(6), 2500)
    y = 1e5 * rng.standard_normal(6)[g] + rng.standard_normal(len(g))
    pq.write_table(pa.table({"y": y, "g": g}), tmp_path / "a.parquet")
    model = dmixed.MixedLM.from_formula("y ~ 1", tmp_path / "a.parquet", groups="g")
    assert not model.spec.references
    assert model.moments.spec.references
    within = sum(((y[g == i] - y[g == i].mean()) ** 2).sum() for i in range(6)) / (len(g) - 6)
    assert model.fit().scale == pytest.approx(within, rel=1e-9)


def test_a_pilot_of_single_rows(tmp_path):
    """Nothing is known of the groups, but nearly dependent columns are seen all the same."""
    rng = np.random.default_rng(3)
    d = pd.concat([table(collinear=1e5).assign(y=rng.standard_normal(600))] * 7)
    d[["x1", "x2"]] *= 1 + np.repeat(np.arange(7), 600)[:, None] / 4
    d["g"] = np.arange(len(d)) % 2100
    d["y"] += d.x1 + rng.standard_normal(2100)[d.g]
    pq.write_table(pa.Table.from_pandas(d, preserve_index=False), tmp_path / "a.parquet")
    model = dmixed.MixedLM.from_formula("y ~ x1 + x2", tmp_path / "a.parquet", groups="g")
    found = model.fit()
    assert model.spec.recoding is not None
    assert found.aliased == ()
    X = np.column_stack([np.ones(len(d)), d.x1, d.x2])
    value, *_ = Digits.of(d.y, X, X[:, :1], d.g).fit(exact([[found.theta[0]]]), True)
    assert -2 * found.llf == pytest.approx(float(value), abs=1e-7)


# ------------------------------------------------------------------ moments about references

FORMULA = "y ~ x1 + I(x1**2) + f + f:x2 + (1 + x2 | g)"
N = 120


def small(tau=100.0):
    rng = np.random.default_rng(5)
    d = table(tau=0, unbalanced=True).head(N).reset_index(drop=True)
    d["g"] %= 12
    d["y"] += tau * rng.standard_normal(12)[d.g]
    return d.assign(f=rng.choice(["a", "b", "c"], N), w=rng.uniform(0.5, 2, N))


def moments_of(d, references=True, weights=None, frame=None, seed=None):
    """Moments of `FORMULA`, recoded at random if there is a seed."""
    model = model_of(FORMULA, d, weights=weights)
    frame = model.spec.frame if frame is None else frame
    spec = dataclasses.replace(model.spec, references=references, frame=frame, recoding=None)
    if seed is not None:
        spec = dataclasses.replace(spec, recoding=any_recoding(spec, d, seed))
    vars(model)["spec"] = spec
    return model.moments


def any_recoding(spec, d, seed):
    """Upper triangular, with random columns first; what cells share stays as it is."""
    made = block(dataclasses.replace(spec, recoding=None), pa.Table.from_pandas(d))
    columns = _candidates(made.block)
    S = np.triu(np.random.default_rng(seed).standard_normal((len(columns),) * 2), 1)
    S += np.diag(np.exp2(np.arange(len(columns)) % 3))
    return Recoding(columns, tuple(map(tuple, S.tolist())))


def assert_same_sums(a, b):
    """The same moments about zero, in the frame and the order of the second."""
    own, other = reframe(a.group, b.group.frame).absolute, b.group.absolute
    groups = keys.lookup(a.labels, b.labels)
    columns = [own.columns.index(c) for c in other.columns]
    random = [own.random.index(own.columns.index(other.columns[j])) for j in other.random]
    pairs = [
        (own.WtF[groups][:, random][:, :, columns], other.WtF),
        (own.FtF[np.ix_(columns, columns)], other.FtF),
        (own.unweighted[np.ix_(columns, columns)], other.unweighted),
        (own.counts[groups], other.counts),
    ]
    for ours, theirs in pairs:
        assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


cuts = st.lists(st.integers(1, N - 1), min_size=1, max_size=5, unique=True).map(sorted)


def pieces(d, where):
    return [d.iloc[a:b] for a, b in itertools.pairwise([0, *where, N])]


@settings(quick, max_examples=10)
@given(cuts, st.sampled_from([None, "w"]), st.integers(0, 63))
def test_moments_about_references_add(where, weights, which):
    """Parts with and without references, each about its own rows, in any order."""
    d = small()
    parts = [moments_of(p, bool(which >> i & 1), weights) for i, p in enumerate(pieces(d, where))]
    whole = moments_of(d, False, weights)
    for total in (
        functools.reduce(operator.add, parts),
        functools.reduce(operator.add, parts[::-1]),
    ):
        assert_same_sums(total, whole)
        assert (total.group.reference is None) == all(p.group.reference is None for p in parts)


def test_references_are_those_of_the_first_part():
    d = small()
    a, b = moments_of(d[:50]), moments_of(d[50:])
    both = (a + b).group
    here = keys.lookup(a.labels, (a + b).labels)
    columns = [a.group.columns.index(c) for c in both.columns if c in a.group.columns]
    kept = [j for j, c in enumerate(both.columns) if c in a.group.columns]
    assert (
        np.array_equal(
            both.reference[here >= 0][:, kept], a.group.reference[here[here >= 0]][:, columns]
        )
        or a.group.frame != both.frame
    )
    same = np.arange(a.group.n_groups)
    alone = combine([a.group], [same], len(same))
    assert np.array_equal(alone.reference, a.group.reference)


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("seed", [None, 1])
def test_other_shifts_of_moments_about_references(weights, seed):
    d = small()
    about = moments_of(d, True, weights, None, seed)
    names = about.group.frame.names
    frame = Frame(names, tuple(7.0 + i for i in range(len(names))), (4.0,) * len(names))
    direct = moments_of(d, True, weights, frame)
    moved = reframe(about.group, frame)
    assert_same_sums(dataclasses.replace(about, group=moved), direct)
    assert np.allclose(moved.reference, direct.group.reference, rtol=1e-6, atol=1e-6)
    back = reframe(moved, about.group.frame, about.group.recoding)
    assert np.allclose(back.reference, about.group.reference, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((back.absolute, about.group.absolute), (back, about.group)):
        size = np.abs(theirs.FtF).max()
        assert np.allclose(ours.unweighted, theirs.unweighted, rtol=1e-12, atol=1e-12 * size)
    size = np.abs(about.group.absolute.WtF).max()
    assert np.allclose(back.absolute.WtF, about.group.absolute.WtF, rtol=0, atol=1e-11 * size)


@settings(quick, max_examples=10)
@given(cuts, st.permutations(range(N)))
def test_partitioning_changes_nothing(where, order):
    """Group effects of 1e5 noises, summed about other rows and merged: still the same fit."""
    d = small(1e5)
    whole = _fitted(moments_of(d))
    parts = [moments_of(p) for p in pieces(d.iloc[list(order)], where)]
    found = _fitted(functools.reduce(operator.add, parts))
    assert found.value == pytest.approx(whole.value, abs=1e-7)
    assert found.sigma2 == pytest.approx(whole.sigma2, rel=1e-8)
    se = np.sqrt(np.diag(whole.cov_beta))
    assert np.all(np.abs(found.beta - whole.beta) <= 1e-6 * se)


def _fitted(moments):
    from dmixed.fitting import fit
    from dmixed.preparation import prepare

    return fit(prepare(moments))


@quick
@given(st.floats(-1e12, 1e12), st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2))
def test_adding_fixed_effects_to_the_response(intercept, slopes):
    """Group effects of 1e4 noises; what is lost is the rounding of y itself, 1e12 eps."""
    d = table(tau=1e4)
    before = _dwarfed()
    d["y"] = d.y + (intercept + d[["x1", "x2"]].to_numpy() @ slopes)
    after = dmixed.lmer("y ~ x1 + x2 + (1 | g)", d)
    fine = 1e-8 + 1e-13 * abs(intercept)
    assert after.converged
    assert after.llf == pytest.approx(before.llf, abs=600 * fine)
    assert after.scale == pytest.approx(before.scale, rel=fine * 10)
    change = after.fe_params - before.fe_params - [intercept, *slopes]
    assert np.all(np.abs(change) <= (1e-6 + 10 * fine) * before.bse_fe + 4e-16 * abs(intercept))


@functools.cache
def _dwarfed():
    return dmixed.lmer("y ~ x1 + x2 + (1 | g)", table(tau=1e4))


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize(
    "formula",
    [
        FORMULA,
        "y ~ 0 + f + x1 + x2 + (1 | g)",
        "y ~ poly(x1, 2) + scale(x2) + (0 + x1 | g)",
        "y ~ x1 * x2 + (1 + x1 * x2 | g)",
        "y ~ x1 + (1 + x2 | h / g)",
        "y ~ x1 + x2 + (1 | g) + (1 | k)",
    ],
)
def test_any_recoding_gives_the_same_fit(formula, weights):
    """Columns, names, predictions and tests are those of the formula, whatever was summed."""
    d = small(1.0)
    d["h"], d["k"] = d.g % 4, np.arange(N) % 7
    plain, other = model_of(formula, d, weights), model_of(formula, d, weights)
    vars(other)["spec"] = dataclasses.replace(
        other.spec, references=True, recoding=any_recoding(other.spec, d, 3)
    )
    a, b = plain.fit(), other.fit()
    assert other.moments.group.recoding is not None
    assert b.llf == pytest.approx(a.llf, abs=1e-8)
    assert list(b.fe_params.index) == list(a.fe_params.index)
    assert np.allclose(b.fe_params, a.fe_params, rtol=1e-7, atol=1e-7 * np.max(a.bse_fe))
    assert np.allclose(b.cov_params(), a.cov_params(), rtol=1e-5, atol=1e-7)
    assert np.allclose(b.fittedvalues, a.fittedvalues, rtol=0, atol=1e-6)
    assert np.allclose(b.predict(d), a.predict(d), rtol=0, atol=1e-6)
    assert plain.criterion(a.theta)[0] == pytest.approx(other.criterion(a.theta)[0], abs=1e-8)


# ------------------------------------------------------------------ stored, weighted, several terms


def both(weights=None):
    """A fit whose moments have references and a recoding."""
    d = small(1e5)
    d["x1"] = d.x2 + 1e-5 * d.x1
    found = dmixed.lmer("y ~ x1 + x2 + f + (1 | g)", d, weights=weights)
    group = found._prepared.here.group
    assert group.reference is not None
    assert group.recoding is not None
    return found


@pytest.mark.parametrize("weights", [None, "w"])
def test_stored_references_and_recoding(weights, tmp_path):
    found = both(weights)
    found.save(tmp_path / "a")
    again = dmixed.MixedLMResults.load(tmp_path / "a")
    assert str(again.summary()) == str(found.summary())
    assert np.array_equal(again.ranef(), found.ranef())
    old, new = (x._prepared.here.group for x in (found, again))
    assert np.array_equal(old.reference, new.reference)
    assert old.recoding == new.recoding


def last(S, factor):
    """S with its last row multiplied."""
    return np.vstack([S[:-1], factor * S[-1:]])


FORGED = [
    lambda S: S.T,
    lambda S: last(S, -1.0),
    lambda S: last(S, 0.0),
    lambda S: last(S, np.nan),
]


def test_forged_recoding(tmp_path):
    both().save(tmp_path / "a")
    manifest = read_manifest(Folder.at(str(tmp_path / "a")))
    stored_spec(manifest, "file")
    (delta,) = manifest.deltas
    own = delta.recoding
    forged = [
        dataclasses.replace(own, S=tuple(map(tuple, f(np.array(own.S)).tolist()))) for f in FORGED
    ]
    forged.append(dataclasses.replace(own, columns=own.columns[:1] * len(own.columns)))
    for recoding in forged:
        bad = dataclasses.replace(delta, recoding=recoding)
        bad_manifest = dataclasses.replace(manifest, deltas=(bad,))
        with pytest.raises(dmixed.DataError, match="file: recoding"):
            stored_spec(bad_manifest, "file")


def test_weights_about_references():
    """Multiplying all weights changes the units of sigma2 and nothing else; offsets too."""
    d = small(1e5).assign(o=1e6)
    one = dmixed.lmer(FORMULA, d, weights="w")
    d["w"] *= 64
    other = dmixed.lmer(FORMULA, d, weights="w", offset="o")
    assert other.llf == pytest.approx(one.llf, abs=1e-7)
    assert other.scale == pytest.approx(64 * one.scale, rel=1e-9)


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize(
    "formula",
    [
        "y ~ x1 + (1 | h / g)",
        "y ~ x1 + f + (1 + x2 | h) + (1 | h:g)",
        "y ~ x1 + (1 | h / g / k)",
        "y ~ x1 + (1 | g) + (1 | k)",
    ],
)
def test_references_in_models_of_several_factors(formula, weights):
    """The same fit as about zero, where nothing is lost there."""
    d = small(1.0)
    d["h"], d["k"] = d.g % 4, np.arange(N) % 7
    plain, about = model_of(formula, d, weights), model_of(formula, d, weights)
    vars(about)["spec"] = dataclasses.replace(about.spec, references=True)
    assert about.moments.group.reference is not None
    a, b = plain.fit(), about.fit()
    assert b.llf == pytest.approx(a.llf, abs=1e-9)
    assert b.scale == pytest.approx(a.scale, rel=1e-7)
    assert np.allclose(b.fe_params, a.fe_params, rtol=1e-7, atol=1e-9)
    theta = np.full(len(a.theta), 0.7)
    for ours, theirs in zip(about.criterion(theta), plain.criterion(theta), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-10, atol=1e-9)
