"""Boundary cases, weights, rank, missing values, refusals, and standard errors of variances."""

from __future__ import annotations

import dataclasses
import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from oracle import Bar, block_diagonal, evaluate, joint_criterion, second_difference, unpack

import dmixed
from dmixed import DataError, FormulaError, MissingDataError


def table(groups=10, size=6, tau=1.0, seed=0):
    """Group effects of standard deviation tau; None: residuals without any group mean."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(groups), size)
    n = len(g)
    x, z = rng.normal(2, 1, n), rng.normal(0, 1, n)
    b, e = rng.normal(0, 1, groups), rng.normal(0, 1, n)
    e += -(np.bincount(g, e) / size)[g] if tau is None else tau * b[g]
    y = 1 + 2 * x - z + e
    return pd.DataFrame({"y": y, "x": x, "z": z, "g": g, "w": rng.uniform(0.5, 3, n)})


def columns(d, names):
    return np.column_stack([np.ones(len(d)) if c == "1" else d[c] for c in names.split()])


def assert_matches_oracle(result, d, fixed, random, weights=None, offset=None):
    """The fit equals the oracle's algebra at the fit's own theta."""
    X = columns(d, fixed) if fixed else np.empty((len(d), 0))
    Z = columns(d, random)
    codes = np.unique(d.g, return_inverse=True)[1]
    L = unpack(result.theta, [Z.shape[1]])[0]
    want = evaluate(d.y, X, [Bar(Z, codes, L @ L.T)], result.reml, weights, offset)
    sd = np.sqrt(want.sigma2)
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-9)
    assert np.allclose(result.fe_params, want.beta, rtol=1e-9, atol=1e-10)
    assert np.allclose(result.bse_fe, want.se, rtol=1e-9)
    assert result.scale == pytest.approx(want.sigma2, rel=1e-9)
    assert np.allclose(result.cov_re, want.sigma2 * L @ L.T, rtol=1e-9, atol=1e-12)
    assert np.allclose(result.ranef(), want.blups[0], rtol=0, atol=1e-9 * sd)
    for got, expected in zip(result.random_effects_cov.values(), want.condcov[0], strict=True):
        assert np.allclose(got, expected, rtol=0, atol=1e-9 * want.sigma2)
    assert np.allclose(result.fittedvalues, want.fitted, rtol=0, atol=1e-8 * sd)
    assert np.allclose(result.resid, d.y - want.fitted, rtol=0, atol=1e-8 * sd)
    assert result.converged


# Boundaries and shapes


@pytest.mark.parametrize("reml", [True, False])
def test_a_variance_of_zero_is_an_ordinary_result(reml):
    d = table(tau=None)  # group means vary less than their own noise would make them
    result = dmixed.lmer("y ~ x + z + (1 | g)", d, reml=reml)
    assert result.singular
    assert result.theta.tolist() == [0.0]
    assert result.cov_re.to_numpy().tolist() == [[0.0]]
    assert np.all(result.ranef() == 0)
    assert all(series.iloc[0] == 0 for series in result.random_effects.values())
    assert all(frame.iloc[0, 0] == 0 for frame in result.random_effects_cov.values())
    assert_matches_oracle(result, d, "1 x z", "1")
    X = columns(d, "1 x z")
    assert np.allclose(result.fe_params, np.linalg.lstsq(X, d.y)[0])
    assert "singular" in str(result.summary()).lower()


def test_a_covariance_of_rank_one():
    d = table(groups=40, tau=0, seed=3)
    b = np.random.default_rng(1).normal(0, 1, 40)[d.g]
    d["y"] += b + 0.5 * b * d.x  # the slope is a multiple of the intercept
    result = dmixed.lmer("y ~ x + (1 + x | g)", d)
    assert_matches_oracle(result, d, "1 x", "1 x")
    assert result.singular
    assert abs(np.linalg.det(result.cov_re)) <= 1e-12 * np.prod(np.diag(result.cov_re))
    effects = result.ranef().to_numpy()
    assert np.linalg.matrix_rank(effects, tol=1e-8) == 1


def test_some_groups_of_one_row():
    d = table(groups=30, size=3)
    d = d.drop(d.index[d.g < 12][np.arange(36) % 3 > 0])
    assert (d.groupby("g").size() == 1).sum() == 12
    assert_matches_oracle(dmixed.lmer("y ~ x + (1 | g)", d), d, "1 x", "1")
    assert_matches_oracle(dmixed.lmer("y ~ x + (1 + x | g)", d), d, "1 x", "1 x")


def test_groups_smaller_than_the_number_of_random_effects():
    d = table(groups=60, size=2, seed=2)
    d["y"] += 0.8 * np.random.default_rng(0).normal(0, 1, 60)[d.g] * d.z
    result = dmixed.lmer("y ~ x + z + (1 + x + z | g)", d)
    assert_matches_oracle(result, d, "1 x z", "1 x z")


def test_groups_of_one_row_with_a_slope_only():
    # variance 1 + psi x^2 differs between the rows, so psi is identified
    d = table(groups=200, size=1)
    d["y"] += 2 * np.random.default_rng(0).normal(0, 1, 200) * d.x
    assert_matches_oracle(dmixed.lmer("y ~ x + (0 + x | g)", d), d, "1 x", "x")


def test_nothing_but_groups_of_one_row():
    with pytest.raises(DataError, match=r"\(1 \| g\).*single row"):
        dmixed.lmer("y ~ x + (1 | g)", table(groups=30, size=1))


def test_one_group():
    d = table(groups=1, size=30)
    with pytest.raises(DataError, match=r"\(1 \| g\).*one group"):
        dmixed.lmer("y ~ x + (1 | g)", d)
    assert_matches_oracle(dmixed.lmer("y ~ x + (1 | g)", d, reml=False), d, "1 x", "1")
    # no fixed intercept: one draw of the group's effect, but it can be estimated
    assert_matches_oracle(dmixed.lmer("y ~ 0 + x + (1 | g)", d), d, "x", "1")


@pytest.mark.parametrize("reml", [True, False])
def test_no_fixed_effects(reml):
    d = table()
    d["y"] -= d.y.mean()
    result = dmixed.lmer("y ~ 0 + (1 | g)", d, reml=reml)
    assert len(result.fe_params) == 0
    assert_matches_oracle(result, d, "", "1")
    if reml:  # nothing to integrate out: the two criteria are one
        assert result.llf == pytest.approx(dmixed.lmer("y ~ 0 + (1 | g)", d, reml=False).llf)


def test_no_intercept():
    d = table()
    assert_matches_oracle(dmixed.lmer("y ~ 0 + x + z + (1 | g)", d), d, "x z", "1")
    assert_matches_oracle(dmixed.lmer("y ~ x - 1 + (0 + z | g)", d), d, "x", "z")


def test_dependent_columns_are_left_out_last_first():
    d = table()
    d["x2"] = 3 * d.x - 2
    d["sum"] = d.x + d.z
    result = dmixed.lmer("y ~ x + x2 + z + sum + (1 | g)", d)
    assert result.aliased == ("x2", "sum")
    assert list(result.fe_params.index) == ["Intercept", "x", "z"]
    assert_matches_oracle(result, d, "1 x z", "1")
    assert "x2" in str(result.summary())


def test_nearly_dependent_columns_are_kept():
    d = table()
    d["x2"] = d.x + 1e-3 * d.z
    result = dmixed.lmer("y ~ x + x2 + (1 | g)", d)
    assert result.aliased == ()
    assert -2 * result.llf == pytest.approx(
        -2 * dmixed.lmer("y ~ x + z + (1 | g)", d).llf - 2 * np.log(1e3), abs=1e-7
    )


def test_a_group_effect_far_above_the_noise():
    """Sums are about a row of each group: 1e-6 is what the dense oracle loses."""
    d = table(tau=1e4, seed=5)
    result = dmixed.lmer("y ~ x + z + (1 | g)", d)
    X, Psi = columns(d, "1 x z"), np.array([[result.theta[0] ** 2]])
    want = evaluate(d.y, X, [Bar(X[:, :1], d.g.to_numpy(), Psi)])
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-6)
    assert np.all(np.abs(result.fe_params - want.beta) <= 1e-5 * want.se)


# Weights and offset


@pytest.mark.parametrize("reml", [True, False])
def test_weights_are_inverse_relative_variances(reml):
    d = table()
    result = dmixed.lmer("y ~ x + (1 + z | g)", d, weights="w", reml=reml)
    assert_matches_oracle(result, d, "1 x", "1 z", weights=d.w)


def test_multiplying_all_weights_only_changes_the_units_of_sigma2():
    d = table()
    one = dmixed.lmer("y ~ x + (1 | g)", d, weights="w")
    d["w"] *= 64
    other = dmixed.lmer("y ~ x + (1 | g)", d, weights="w")
    assert other.llf == pytest.approx(one.llf, abs=1e-9)
    assert other.scale == pytest.approx(64 * one.scale)
    assert np.allclose(other.cov_re, one.cov_re, rtol=1e-7)


def test_offset_is_added_to_the_predictor():
    d = table()
    d["o"] = 3 * d.z + d.x**2
    result = dmixed.lmer("y ~ x + (1 | g)", d, offset="o")
    assert_matches_oracle(result, d, "1 x", "1", offset=d.o)
    d["less"] = d.y - d.o
    other = dmixed.lmer("less ~ x + (1 | g)", d)
    assert other.llf == pytest.approx(result.llf, abs=1e-9)
    assert np.allclose(other.resid, result.resid, atol=1e-8)


def test_weights_and_offset_together():
    d = table()
    d["o"] = np.arange(len(d)) / 7
    result = dmixed.lmer("y ~ x + (1 | g)", d, weights="w", offset="o")
    assert_matches_oracle(result, d, "1 x", "1", weights=d.w, offset=d.o)


# Missing values


def test_missing_rows_are_dropped_and_counted_by_reason():
    d = table(groups=20)
    d["g"] = d.g.astype(object)
    d["o"] = 0.0
    d.loc[[0, 1], "y"] = np.nan
    d.loc[[1, 5, 6], "x"] = [np.nan, np.inf, -np.inf]  # row 1 counts under y
    d.loc[9, "g"] = None
    d.loc[17, "w"] = np.nan
    d.loc[23, "o"] = np.nan
    d.loc[30, "z"] = np.nan  # not in the model
    result = dmixed.lmer("y ~ x + (1 | g)", d, weights="w", offset="o")
    assert sum(result.dropped.values()) == 7
    assert {reason.split(":")[0]: n for reason, n in result.dropped.items()} == {
        "y": 2, "x": 2, "g": 1, "w": 1, "o": 1,
    }  # fmt: skip
    kept = d.drop(index=[0, 1, 5, 6, 9, 17, 23])
    assert result.nobs == len(kept)
    assert list(result.fittedvalues.index) == list(kept.index)
    kept = kept.assign(g=kept.g.astype(int))
    assert_matches_oracle(result, kept, "1 x", "1", weights=kept.w)


def test_values_made_infinite_by_a_transform_are_counted_apart():
    d = table(groups=20)
    d["x"] = d.x.abs()
    d.loc[3, "x"] = 0.0
    d.loc[4, "x"] = np.nan
    result = dmixed.lmer("y ~ log(x) + (1 | g)", d)
    assert sum(result.dropped.values()) == 2
    (transform,) = (reason for reason in result.dropped if "log(x)" in reason)
    assert result.dropped[transform] == 1


@pytest.mark.parametrize("column", ["y", "x", "g", "w"])
@pytest.mark.parametrize("missing", ["raise", "none"])
def test_missing_values_are_refused_by_name_and_row(column, missing):
    d = table()
    d[column] = d[column].astype(object if column == "g" else float)
    d.loc[[7, 20], column] = None
    with pytest.raises(MissingDataError, match=rf"\b{column}\b.*\b7\b"):
        dmixed.lmer("y ~ x + (1 | g)", d, weights="w", missing=missing)


def test_statsmodels_words_default_to_refusing_missing_values():
    d = table()
    d.loc[4, "x"] = np.nan
    with pytest.raises(MissingDataError, match="x"):
        dmixed.MixedLM.from_formula("y ~ x", d, groups="g").fit()


def test_missing_must_be_one_of_three_words():
    with pytest.raises((DataError, ValueError), match="ignore"):
        dmixed.lmer("y ~ x + (1 | g)", table(), missing="ignore")


# Refusals


def refused(error, pattern, formula="y ~ x + (1 | g)", data=None, **options):
    with pytest.raises(error, match=pattern):
        dmixed.lmer(formula, table() if data is None else data, **options)


def test_constant_response():
    refused(DataError, r"'?y'?.*constant", data=table().assign(y=3.0))
    refused(DataError, r"'?y'?.*constant", data=table().assign(y=1e9 + 0.1))


def test_response_without_residual():
    refused(DataError, r"\by\b", data=table().assign(y=lambda d: 2 * d.x + 1))


def test_empty_data():
    refused(DataError, "no row", data=table().iloc[:0])


def test_all_rows_missing():
    refused(DataError, r"no row.*x", data=table().assign(x=np.nan))
    refused(DataError, r"no row.*y", data=table().assign(y=np.nan))


def test_too_few_rows():
    d = table(groups=2, size=1)
    refused(DataError, r"2 rows", data=d)


@pytest.mark.parametrize(
    "values",
    [["a", "b"] * 30, pd.Categorical(["a", "b"] * 30), pd.date_range("2024-01-01", periods=60)],
    ids=["text", "categorical", "dates"],
)
def test_response_must_be_a_number(values):
    refused((DataError, FormulaError), r"\by\b", data=table().assign(y=values))


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_weights_must_be_positive(value):
    d = table()
    d.loc[11, "w"] = value
    refused(DataError, r"\bw\b.*\b11\b", data=d, weights="w")


def test_unknown_columns():
    for formula in ("nope ~ x + (1 | g)", "y ~ nope + (1 | g)", "y ~ x + (1 | nope)",
                    "y ~ x + (nope | g)", "y ~ log(nope) + (1 | g)"):  # fmt: skip
        refused((DataError, FormulaError), "nope", formula)
    refused(DataError, "nope", weights="nope")
    refused(DataError, "nope", offset="nope")


def test_random_columns_that_cannot_be_told_apart():
    d = table().assign(x2=lambda d: 2 * d.x)
    refused(DataError, r"x2", "y ~ x + (1 + x + x2 | g)", d)


def test_endog_must_be_a_vector():
    d = table()
    with pytest.raises(DataError, match=r"endog.*\(60, 2\)"):
        dmixed.MixedLM(d[["y", "x"]].to_numpy(), columns(d, "1 x"), d.g)


def test_lengths_must_agree():
    d = table()
    X, y = columns(d, "1 x"), d.y.to_numpy()
    with pytest.raises(DataError, match=r"exog\b.*59.*60|60.*exog\b.*59"):
        dmixed.MixedLM(y, X[:-1], d.g).fit()
    with pytest.raises(DataError, match=r"groups.*50.*60|60.*groups.*50"):
        dmixed.MixedLM(y, X, d.g[:50]).fit()
    with pytest.raises(DataError, match=r"exog_re.*7.*60|60.*exog_re.*7"):
        dmixed.MixedLM(y, X, d.g, X[:7]).fit()


def test_names_that_mean_two_things():
    refused(DataError, "x", data=pd.concat([table(), table()[["x"]]], axis=1))


# Arrays in statsmodels' words


def test_arrays_and_formula_are_the_same_model():
    d = table()
    X, Z = columns(d, "1 x z"), columns(d, "1 x")
    a = dmixed.MixedLM(d.y, X, d.g, Z).fit()
    b = dmixed.lmer("y ~ x + z + (1 + x | g)", d)
    assert a.llf == pytest.approx(b.llf, abs=1e-9)
    assert np.allclose(a.fe_params, b.fe_params, rtol=1e-8)
    assert np.allclose(a.cov_re, b.cov_re, rtol=1e-6)
    intercept = dmixed.MixedLM(d.y.to_numpy(), X, d.g.to_numpy()).fit(reml=False)
    assert intercept.llf == pytest.approx(dmixed.lmer("y~x+z+(1|g)", d, reml=False).llf, abs=1e-9)


# Standard errors of variances


def numerical_bse(d, result, bars):
    """From the numerical Hessian of the joint (cov, sigma2) likelihood in user units."""
    X, codes = columns(d, "1 x"), np.unique(d.g, return_inverse=True)[1]
    sizes = [len(bar.split()) for bar in bars]
    Z = np.column_stack([columns(d, bar) for bar in bars])

    def criterion(parameters):
        *packed, sigma2 = parameters
        lower = block_diagonal(unpack(packed, sizes))
        cov = lower + lower.T - np.diag(np.diag(lower))
        return joint_criterion(d.y, X, [Bar(Z, codes, cov)], sigma2, result.reml)

    cov = list(result.varcorr().values())
    at = np.concatenate([c.to_numpy()[j:, j] for c in cov for j in range(len(c))])
    at = np.append(at, result.scale)
    information = second_difference(criterion, at, 0.2 * np.abs(at)) / 2
    return np.sqrt(np.diag(np.linalg.inv(information)))


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@pytest.mark.parametrize("bars", [["1"], ["1 x"], ["1", "x"]], ids=["q1", "q2", "two bars"])
def test_standard_errors_of_variances(bars, reml):
    d = table(groups=12, size=5, seed=8)
    d["y"] += 0.7 * np.random.default_rng(1).normal(0, 1, 12)[d.g] * d.x
    terms = " + ".join(
        f"({'' if '1' in bar else '0 + '}{bar.replace(' ', ' + ')} | g)" for bar in bars
    )
    result = dmixed.lmer(f"y ~ x + {terms}", d, reml=reml)
    want = numerical_bse(d, result, bars)
    assert not result.singular
    assert np.allclose(result.bse_re, want[:-1], rtol=1e-5)
    assert result.bse_scale == pytest.approx(want[-1], rel=1e-5)


def test_standard_error_of_a_variance_in_a_balanced_design():
    """One-way layout, ML: closed form of Searle, Casella & McCulloch (1992), section 4.7.

    With G groups of m rows, lambda = sigma2 + m tau2: var(sigma2) = 2 sigma2^2 / (G (m - 1)) and
    var(tau2) = (2 lambda^2 / G + 2 sigma2^2 / (G (m - 1))) / m^2. Both are in units of y to the
    fourth, so y times 10 multiplies the standard errors by 100.
    """
    groups, m = 25, 4
    d = table(groups, m, tau=1.5)
    fits = [dmixed.lmer("y ~ 1 + (1 | g)", d.assign(y=c * d.y), reml=False) for c in (1, 10)]
    one, ten = fits
    tau2, sigma2 = one.cov_re.iloc[0, 0], one.scale
    within = 2 * sigma2**2 / (groups * (m - 1))
    between = 2 * (sigma2 + m * tau2) ** 2 / groups
    assert one.bse_re.iloc[0] == pytest.approx(np.sqrt((between + within) / m**2), rel=1e-6)
    assert one.bse_scale == pytest.approx(np.sqrt(within), rel=1e-6)
    assert ten.bse_re.iloc[0] == pytest.approx(100 * one.bse_re.iloc[0], rel=1e-6)
    # the ratio scale of `params` has no units
    assert ten.params.iloc[-1] == pytest.approx(one.params.iloc[-1], rel=1e-6)
    assert ten.bse.iloc[-1] == pytest.approx(one.bse.iloc[-1], rel=1e-6)


def test_variances_at_the_boundary_have_no_standard_error():
    result = dmixed.lmer("y ~ x + z + (1 | g)", table(tau=None))
    assert np.isnan(result.bse_re.iloc[0])
    assert np.all(np.isfinite(result.bse_fe))


def test_ratio_scale_of_params():
    d = table(groups=30)
    result = dmixed.lmer("y ~ x + (1 + x | g)", d)
    assert len(result.params) == len(result.cov_params()) == 2 + 3
    assert np.allclose(result.params[:2], result.fe_params)
    assert result.params.iloc[2] == pytest.approx(result.cov_re.iloc[0, 0] / result.scale)
    limits = result.conf_int(alpha=0.1)
    assert np.allclose(limits.mean(axis=1), result.params)
    assert np.allclose(limits[1] - limits[0], 2 * 1.6448536269514722 * result.bse)
    assert np.allclose(result.tvalues, result.params / result.bse)
    assert np.all((result.pvalues > 0) & (result.pvalues <= 1))


# Results are values


def snapshot(result):
    return {
        "llf": result.llf,
        "scale": result.scale,
        "beta": result.fe_params.to_numpy().tolist(),
        "se": result.bse_fe.to_numpy().tolist(),
        "cov": result.cov_re.to_numpy().tolist(),
        "blups": result.ranef().to_numpy().tolist(),
        "fitted": result.fittedvalues.to_numpy().tolist(),
        "method": result.method,
        "summary": str(result.summary()),
    }


def test_a_second_fit_leaves_the_first_alone():
    model = dmixed.MixedLM.from_formula("y ~ x", table(), groups="g", re_formula="~x")
    first = model.fit(reml=True)
    before = snapshot(model.fit(reml=True))
    second = model.fit(reml=False)
    assert second.method == "ML"
    assert second.llf != first.llf
    assert snapshot(first) == before  # evaluated only now: nothing is read from the model


def test_results_cannot_be_changed():
    result = dmixed.lmer("y ~ x + (1 | g)", table())
    for name in ("llf", "scale", "fe_params", "converged", "reml", "anything"):
        with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
            setattr(result, name, 1)
    with pytest.raises(TypeError):
        result.random_effects[0] = 1
    with pytest.raises(TypeError):
        result.dropped["x"] = 1


def test_what_is_handed_out_is_not_the_result_itself():
    result = dmixed.lmer("y ~ x + (1 | g)", table())
    before = snapshot(result)
    for name in ("bse_fe", "cov_re", "theta", "params"):
        value = getattr(result, name)
        value[:] = 0
    for table_ in (result.varcorr()["g"], result.ranef()):
        table_.iloc[:] = 0
    assert snapshot(result) == before


def test_results_can_be_pickled():
    d = table()
    result = dmixed.lmer("y ~ x + (1 + x | g)", d)
    copy = pickle.loads(pickle.dumps(result))
    want = snapshot(result)
    assert copy.llf == result.llf
    assert copy.ranef().equals(result.ranef())
    assert str(copy.summary()) == want["summary"]
    assert np.allclose(copy.predict(d), result.predict(d), atol=0)


def test_the_same_fit_twice_has_the_same_bits():
    d = table()
    one, two = (dmixed.lmer("y ~ x + (1 + x | g)", d) for _ in range(2))
    assert snapshot(one) == snapshot(two)


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-exact", "BFGS", "Nelder-Mead"])
def test_the_optimisers_of_scipy_by_name(method):
    d = table(groups=30)
    model = dmixed.MixedLM.from_formula("y ~ x", d, groups="g", re_formula="~x")
    ours = model.fit()
    with warnings.catch_warnings():  # their own stopping rules may fall short of the certificate
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        theirs = model.fit(method=method)
    assert theirs.llf == pytest.approx(ours.llf, abs=1e-4)
    assert re.search(re.escape(method), str(theirs.optimizer_summary), re.IGNORECASE)


def test_an_unknown_optimiser_is_refused_by_name():
    with pytest.raises(ValueError, match="no-such-method"):
        dmixed.lmer("y ~ x + (1 | g)", table(), method="no-such-method")
