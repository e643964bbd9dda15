"""The oracle itself, against reference fits made with lme4 (`tests/reference`)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from oracle import Bar, difference, evaluate, joint_criterion, second_difference, unpack
from reference import METHODS, case, data_path


def ones(d):
    return np.ones(len(d))


def dummies(column):
    levels = sorted(column.unique())
    return [(column == level).to_numpy(float) for level in levels]


# case: columns of X, columns of Z per bar, grouping column
DESIGNS = {
    "sleepstudy_slope": (
        lambda d: [ones(d), d.Days],
        [lambda d: [ones(d), d.Days]],
        "Subject",
    ),
    "sleepstudy_uncorrelated": (
        lambda d: [ones(d), d.Days],
        [lambda d: [ones(d)], lambda d: [d.Days]],
        "Subject",
    ),
    "oxboys_quadratic": (
        lambda d: [ones(d), d.age, d.age**2],
        [lambda d: [ones(d), d.age, d.age**2]],
        "Subject",
    ),
    "cbpp_weights": (
        lambda d: [ones(d), *dummies(d.period)[1:]],
        [lambda d: [ones(d)]],
        "herd",
    ),
    "orthodont_offset": (
        lambda d: [ones(d), *dummies(d.Sex)[1:]],
        [lambda d: [ones(d)]],
        "Subject",
    ),
    "ergostool_nointercept": (lambda d: dummies(d.Type), [lambda d: [ones(d)]], "Subject"),
    "dyestuff2": (lambda d: [ones(d)], [lambda d: [ones(d)]], "Batch"),
    "sm_lme08_irf": (
        lambda d: [d.exog_fe_0, d.exog_fe_1],
        [lambda d: [d.exog_re_0], lambda d: [d.exog_re_1]],
        "groups",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DESIGNS)
def test_agrees_with_lme4(name, method):
    stored = case(name)
    fit = stored["fits"][method]
    d = pd.read_parquet(data_path(name))
    fixed, random, group = DESIGNS[name]
    labels = sorted(d[group].unique(), key=str)
    codes = d[group].map({g: i for i, g in enumerate(labels)}).to_numpy()
    Z = [np.column_stack(z(d)).astype(float) for z in random]
    weights, offset = (d[stored[k]] if stored[k] else None for k in ("weights", "offset"))

    def at(theta):
        factors = unpack(theta, [z.shape[1] for z in Z])
        bars = [Bar(z, codes, L @ L.T) for z, L in zip(Z, factors, strict=True)]
        X = np.column_stack(fixed(d)).astype(float)
        return evaluate(d[stored["formula"].split("~")[0].strip()], X, bars, method == "REML",
                        weights, offset)  # fmt: skip

    ours = at(fit["theta"])
    assert ours.criterion == pytest.approx(fit["crit"], abs=1e-9, rel=1e-12)
    assert np.allclose(ours.beta, fit["fixef"], rtol=0, atol=1e-7 * ours.se.max())
    assert np.allclose(ours.vcov, fit["vcov"], rtol=1e-8, atol=1e-10)
    assert ours.sigma2 == pytest.approx(fit["sigma2"], rel=1e-9)
    assert np.allclose(ours.fitted[:10], fit["fitted_first10"], rtol=1e-8)
    for bar, b, C in zip(fit["bars"], ours.blups, ours.condcov, strict=True):
        order = [[str(g) for g in labels].index(level) for level in bar["levels"]]
        expected = np.array(bar["condcov"])[bar["condcov_of"]].reshape(C.shape)
        assert np.allclose(b[order], bar["values"], rtol=1e-7, atol=1e-8)
        assert np.allclose(C[order], expected, rtol=1e-7, atol=1e-10)
    for point in fit["crit_at"]:
        assert at(point["theta"]).criterion == pytest.approx(point["crit"], abs=1e-8)
        gradient = difference(lambda t: at(t).criterion, point["theta"])
        assert np.allclose(gradient, point["grad"], rtol=1e-6, atol=1e-6)


def test_joint_criterion_profiles_to_the_criterion():
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(8), 4)
    X = np.column_stack([np.ones(32), rng.standard_normal(32)])
    y = rng.standard_normal(32) + rng.standard_normal(8)[codes]
    for reml in (True, False):
        fit = evaluate(y, X, [Bar(X[:, :1], codes, np.array([[0.7]]))], reml)
        user = [Bar(X[:, :1], codes, np.array([[0.7 * fit.sigma2]]))]
        assert joint_criterion(y, X, user, fit.sigma2, reml) == pytest.approx(fit.criterion)


def test_differences_of_a_known_function():
    def f(x):
        return float(np.exp(x[0]) * np.sin(x[1]))

    x = np.array([0.3, 0.8])
    e, s, c = np.exp(0.3), np.sin(0.8), np.cos(0.8)
    assert np.allclose(difference(f, x), [e * s, e * c], rtol=1e-11)
    assert np.allclose(second_difference(f, x), [[e * s, e * c], [e * c, -e * s]], rtol=1e-8)
