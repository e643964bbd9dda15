"""Every reference fit (`tests/reference`), by REML and ML, through the public interface.

Tolerances, in units that mean something whatever the scale of the data: criterion 1e-7 absolute
plus 1e-12 relative; fixed effects 1e-5 standard errors; standard errors 1e-6 relative; sigma2 1e-5
relative and covariances 1e-5 of sqrt(ii jj); random effects and their conditional covariances
1e-5 of the component's standard deviation. In a singular fit the reference itself is known to
about 1e-4 sigma2 near a zero variance.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from models import model_of
from reference import CASES, METHODS, case, data_path

import dmixed

STATSMODELS_CASES = [name for name in CASES if "statsmodels" in case(name)]


@functools.cache
def fitted(name: str, method: str) -> SimpleNamespace:
    stored = case(name)
    given = {"weights": stored["weights"], "offset": stored["offset"]}
    return SimpleNamespace(
        model=model_of(stored["formula"], data_path(name), **given),
        result=dmixed.lmer(stored["formula"], data_path(name), reml=method == "REML", **given),
        want=stored["fits"][method],
        case=stored,
    )


@pytest.fixture(params=[(name, m) for name in CASES for m in METHODS], ids="-".join)
def fit(request):
    return fitted(*request.param)


def assert_estimates(result, want):
    """Criterion, fixed effects, sigma2 and the covariance of the random effects."""
    se = np.sqrt(np.diag(want["vcov"]))
    assert -2 * result.llf == pytest.approx(want["crit"], abs=1e-7, rel=1e-12)
    assert np.all(np.abs(result.fe_params.to_numpy() - want["fixef"]) <= 1e-5 * se)
    assert np.allclose(result.bse_fe, se, rtol=1e-6, atol=0)
    assert result.scale == pytest.approx(want["sigma2"], rel=1e-5)
    slack = 1e-4 * want["sigma2"] if want["singular"] else 0
    bars = list(result.varcorr().values())
    assert len(bars) == len(want["bars"])
    for got, bar in zip(bars, want["bars"], strict=True):
        expected = np.array(bar["cov"])
        sd = np.sqrt(np.diag(expected))
        assert got.shape == expected.shape
        assert np.all(np.abs(got.to_numpy() - expected) <= 1e-5 * np.outer(sd, sd) + slack)


def test_estimates(fit):
    assert_estimates(fit.result, fit.want)


def test_state(fit):
    result = fit.result
    assert result.converged
    assert result.optimizer_summary.certificate
    assert result.singular == fit.want["singular"]
    assert result.nobs == fit.case["nobs"]
    assert sum(result.dropped.values()) == fit.case["nobs_file"] - fit.case["nobs"]
    assert result.aliased == tuple(fit.case["dropped"])
    if "group" in fit.want["bars"][0]:
        assert result.factors == {b["group"]: len(b["levels"]) for b in fit.want["bars"]}
    else:
        assert result.n_groups == len(fit.want["bars"][0]["levels"])
    assert result.method == ("REML" if result.reml else "ML")


def test_names_are_those_of_formulaic(fit):
    # (Intercept) -> Intercept, SexMale -> Sex[T.Male], I(age^2) -> I(age**2) or as written
    for ours, lme4 in zip(fit.result.fe_params.index, fit.want["fixef_names"], strict=True):
        if lme4 == "(Intercept)":
            assert ours == "Intercept"
        elif not lme4.startswith("I("):
            assert ours.replace("[T.", "").replace("[", "").replace("]", "") == lme4


def test_information_criteria(fit):
    result = fit.result
    if result.reml:  # as statsmodels
        assert np.isnan(result.aic)
        assert np.isnan(result.bic)
    else:
        assert result.aic == pytest.approx(fit.want["AIC"], abs=1e-6)
        assert result.bic == pytest.approx(fit.want["BIC"], abs=1e-6)


def test_covariance_of_the_fixed_effects(fit):
    want = np.array(fit.want["vcov"])
    got = fit.result.cov_fe.to_numpy()
    se = np.sqrt(np.diag(want))
    assert np.allclose(got / np.outer(se, se), want / np.outer(se, se), rtol=0, atol=2e-6)


def by_text(index):
    """Labels by their text, the columns of a composite key joined by ':' as lme4 does."""
    return {":".join(map(str, x)) if isinstance(x, tuple) else str(x): x for x in index}


def test_random_effects(fit):
    """Conditional modes of every level of every factor, found under their own label."""
    tables = tables_of(fit.result)
    at = dict.fromkeys(tables, 0)
    for bar in fit.want["bars"]:
        factor, q = bar.get("group") or next(iter(tables)), len(bar["components"])
        table = tables[factor]
        assert len(table) == len(bar["levels"])
        labels = by_text(table.index)
        got = table.loc[[labels[level] for level in bar["levels"]]].to_numpy()
        got = got[:, at[factor] : at[factor] + q]
        at[factor] += q
        assert np.all(np.abs(got - np.array(bar["values"])) <= 1e-5 * bar_sd(bar, fit.want))


def tables_of(result):
    """Random effects by factor."""
    found = result.ranef()
    return {":".join(found.index.names): found} if isinstance(found, pd.DataFrame) else found


def test_random_effects_by_group(fit):
    """The mapping of statsmodels has what the table has."""
    tables = tables_of(fit.result)
    if len(tables) > 1:  # no common groups
        with pytest.raises(dmixed.NotSupportedError, match="use ranef"):
            _ = fit.result.random_effects
        return
    (table,) = tables.values()
    effects = fit.result.random_effects
    assert list(effects) == list(table.index)
    assert np.array_equal(np.array([b.to_numpy() for b in effects.values()]), table.to_numpy())


def test_conditional_covariances(fit):
    covariances = fit.result.ranef_cov()
    index = {label: by_text(table.index) for label, table in tables_of(fit.result).items()}
    for (label, got), bar in zip(covariances.items(), fit.want["bars"], strict=True):
        q = len(bar["components"])
        sd = bar_sd(bar, fit.want)
        place = {text: i for i, text in enumerate(index[bar.get("group") or next(iter(index))])}
        want = np.array([np.array(bar["condcov"][k]).reshape(q, q) for k in bar["condcov_of"]])
        got = got[[place[level] for level in bar["levels"]]]
        assert got.shape == want.shape, label
        assert np.all(np.abs(got - want) <= 1e-5 * np.outer(sd, sd))


def bar_sd(bar, want):
    """(q,) standard deviations of a bar's effects; 1e-2 sigma where a variance vanished."""
    variances = np.diag(np.array(bar["cov"]))
    return np.sqrt(np.maximum(variances, 1e-4 * want["sigma2"] if want["singular"] else 0))


def test_fitted_values(fit):
    """Of the rows used, in file order; random effects and offset included."""
    scale = 1e-5 * np.sqrt(fit.want["sigma2"])
    result = fit.result
    assert len(result.fittedvalues) == len(result.resid) == fit.case["nobs"]
    assert np.allclose(result.fittedvalues[:10], fit.want["fitted_first10"], rtol=0, atol=scale)
    assert np.allclose(result.resid[:10], fit.want["resid_first10"], rtol=0, atol=scale)


def test_objective_without_an_optimiser(fit):
    reml = fit.result.reml
    for point in fit.want["crit_at"]:
        value, gradient, _ = fit.model.criterion(np.array(point["theta"], float), reml)
        assert value == pytest.approx(point["crit"], abs=1e-7, rel=1e-12)
        # the stored gradient is numerical, good to about 8 digits
        scale = np.abs(point["grad"]).max()
        assert np.allclose(gradient, point["grad"], rtol=1e-6, atol=1e-6 * max(scale, 1))


def test_theta_is_the_optimum(fit):
    value, gradient, hessian = fit.model.criterion(fit.result.theta, fit.result.reml)
    assert value == pytest.approx(-2 * fit.result.llf, rel=1e-12)
    if not fit.want["singular"]:
        assert gradient @ np.linalg.solve(hessian, gradient) <= 1e-8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STATSMODELS_CASES)
def test_in_the_words_of_statsmodels(name, method):
    words, data = case(name)["statsmodels"], pd.read_parquet(data_path(name))
    data["__one__"] = 1
    want = case(name)["fits"][method]
    vc = words.get("vc_formula")
    model = dmixed.MixedLM.from_formula(
        words["formula"], data, groups=words["groups"], re_formula=words["re_formula"],
        vc_formula=vc, missing="drop",
    )  # fmt: skip
    result = model.fit(reml=method == "REML")
    if vc is None:
        assert_estimates(result, want)
        return
    # lme4 orders by number of levels; here the bar comes first, then components by name
    order = {bar["group"].split(":")[0]: bar for bar in want["bars"]}
    own = [order[label.split(":")[0]] for label in result.varcorr()]
    assert_estimates(result, {**want, "bars": own})
    effects, sd = result.random_effects, {g: bar_sd(b, want)[0] for g, b in order.items()}
    for group, b in effects.items():
        for name_, value in b.items():
            component, _, rest = name_.partition("[C(")
            level = rest.split(")[")[1][:-2] if rest else str(group)
            bar = order[component]
            full = level if level in bar["levels"] else f"{level}:{group}"
            expected = bar["values"][bar["levels"].index(full)][0]
            assert abs(value - expected) <= 1e-5 * sd[component]
        cov = result.random_effects_cov[group]
        assert np.all(np.linalg.eigvalsh(cov) >= -1e-9 * result.scale)
        if len(effects) > 1:
            top = order[words["groups"]]
            k = top["condcov_of"][top["levels"].index(str(group))]
            want_var = np.ravel(top["condcov"][k])[0]
            assert abs(cov.iloc[0, 0] - want_var) <= 1e-5 * sd[words["groups"]] ** 2
