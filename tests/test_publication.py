"""Results as tables of publications ask for them, by duck typing; nothing of maketables is used."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import example


@pytest.fixture(scope="module")
def pupils():
    with example.data() as path:
        return pd.read_parquet(path)


@pytest.fixture(scope="module")
def result(pupils):
    return dmixed.lmer(example.FORMULA, pupils)


@pytest.fixture(scope="module")
def column(result):
    return result.to_maketables()


def test_coefficients_are_those_of_the_summary(result, column):
    table = column.__maketables_coef_table__
    assert table.index.name == "Coefficient"
    assert list(table.columns) == ["b", "se", "t", "p", "ci95l", "ci95u"]
    np.testing.assert_array_equal(table["b"], result.fe_params)
    np.testing.assert_array_equal(table["se"], result.bse_fe)
    test = result.t_test(np.eye(result.k_fe))
    np.testing.assert_allclose(table["p"], test.pvalue, rtol=1e-12)
    np.testing.assert_allclose(table[["ci95l", "ci95u"]], test.conf_int(), rtol=1e-12)
    assert column.__maketables_depvar__ == result.endog_name
    assert column.__maketables_vcov_info__["vcov_type"] == "model-based (REML)"
    assert column.__maketables_fixef_string__ is None


def test_random_effects_are_statistics(result, column):
    (label,) = result.varcorr()
    cov = result.varcorr()[label]
    keys = column.__maketables_default_stat_keys__
    assert keys[0] == "N"
    found = {key: column.__maketables_stat__(key) for key in keys}
    assert found["N"] == 7185
    assert found[f"Groups: {label}"] == 160
    names = list(cov.index)
    for name in names:
        sd = np.sqrt(cov.loc[name, name])
        assert found[f"SD: {name} | {label}"] == pytest.approx(sd, rel=1e-14)
    a, b = names[:2]
    corr = cov.loc[a, b] / np.sqrt(cov.loc[a, a] * cov.loc[b, b])
    assert found[f"Corr: {a}, {b} | {label}"] == pytest.approx(corr, rel=1e-14)
    assert found["SD: Residual"] == pytest.approx(np.sqrt(result.scale), rel=1e-14)
    assert found["method"] == "REML"
    assert found["ll"] == result.llf


def test_what_is_not_there_is_none(pupils, column):
    assert column.__maketables_stat__("aic") is None  # NaN under REML
    assert column.__maketables_stat__("r2") is None
    ml = dmixed.lmer(example.FORMULA, pupils, reml=False)
    ml_column = ml.to_maketables()
    assert ml_column.__maketables_stat__("aic") == ml.aic
    assert ml_column.__maketables_stat__("bic") == ml.bic


def test_a_variance_of_zero_and_components():
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"x": rng.normal(size=200), "g": np.arange(200) % 10})
    frame["h"] = frame["g"] * 2 + (np.arange(200) // 10) % 2
    frame["y"] = frame["x"] + rng.normal(size=200)
    frame["y"] -= frame.groupby("g")["y"].transform("mean")  # no variance between groups
    found = dmixed.lmer("y ~ x + (1 + x | g)", frame)
    assert found.singular
    column = found.to_maketables()
    for key in column.__maketables_default_stat_keys__:
        value = column.__maketables_stat__(key)
        assert value is None or isinstance(value, str) or np.isfinite(value)
    split = dmixed.mixedlm("y ~ x", frame, groups="g", vc_formula={"part": "0 + C(h)"}).fit()
    column = split.to_maketables()
    assert "SD: part" in column.__maketables_default_stat_keys__
    assert column.__maketables_stat__("Groups: part") == 20
