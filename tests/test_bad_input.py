"""What statsmodels' words are given that makes no sense: one error each, naming the argument."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import DataError, MixedLM, MixedLMParams, VCSpec, mixedlm


def table(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(size=n),
            "g": np.repeat(np.arange(10), n // 10),
            "h": np.tile([0, 1, 2], n // 3),
        }
    )


@pytest.fixture(scope="module")
def model():
    return mixedlm("y ~ x", table(), groups="g", vc_formula={"h": "0 + C(h)"})


@pytest.fixture(scope="module")
def result(model):
    return model.fit()


NOTHING = np.zeros(0)


@pytest.mark.parametrize("components", [None, VCSpec(["a"], [[]], [[]])])
def test_no_rows(components):
    with pytest.raises(DataError, match="no rows"):
        MixedLM(NOTHING, NOTHING, NOTHING, None, components).fit()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.loglike("abc"), "params must hold numbers, not 'abc'"),
        (lambda m: m.loglike([np.nan]), "finite"),
        (lambda m: m.loglike([np.nan, 1.0, 1.0], profile_fe=False), "fe_params must be finite"),
        (lambda m: m.loglike([1.0, 2.0]), "needs 1 or 3 values"),
        (lambda m: m.score(MixedLMParams.from_components(vcomp=[-1.0])), "semi-definite"),
        (lambda m: m.get_fe_params(np.eye(2), [1.0]), "2 random effects"),
        (lambda m: m.get_scale([1.0], None, [1.0]), "fe_params has shape"),
        (lambda m: m.get_scale("ab", None, [1.0]), "fe_params must hold numbers"),
        (lambda m: m.predict([1.0]), "2 fixed effects"),
        (lambda m: m.group_list(np.ones(3)), "3 rows"),
        (lambda m: m.get_distribution([0, 0, 1], -1.0, None), "scale=-1"),
        (lambda m: m.get_distribution([0, 0, 1], "a", None), "scale='a'"),
        (lambda m: m.get_distribution([0, 0, 1], 1.0, np.ones((3, 2))), r"exog.*\(3, 2\)"),
        (lambda m: m.fit(reml="yes"), "reml='yes'"),
        (lambda m: m.fit(free="all"), "free must be MixedLMParams"),
        (lambda m: m.fit(free=MixedLMParams.from_components([1], vcomp=[1])), "free has 1 fixed"),
        (lambda m: m.fit(start_params=[1, 2]), "invalid start_params"),
        (lambda m: m.fit(fe_pen=3), "fe_pen must be a penalty"),
        (lambda m: m.fit_regularized(alpha="a"), "alpha must hold numbers"),
        (lambda m: m.fit_regularized(alpha=[1, 2, 3]), "alpha must be one weight, or 2"),
        (lambda m: m.fit_regularized(method="elastic_net", alpha=1, l1_ratio=2), "l1_ratio=2"),
    ],
)
def test_of_a_model(model, call, words):
    with pytest.raises(DataError, match=words):
        call(model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.cov_params(r_matrix=[1, 2]), "r_matrix has shape"),
        (lambda r: r.profile_re("h", "vc", dist_low=np.nan), "dist_low=nan"),
        (lambda r: r.profile_re("x", "fe", num_low=-2), "num_low=-2"),
        (lambda r: r.profile_re("zz", "vc"), "zz"),
        (lambda r: r.profile_re("zz", "fe"), "zz"),
        (lambda r: r.t_test("zz = 0"), "zz"),
        (lambda r: r.t_test_pairwise("x"), "x is not one categorical factor"),
        (lambda r: r.predict("/nowhere.parquet"), "nowhere"),
    ],
)
def test_of_a_result(result, call, words):
    with pytest.raises(ValueError, match=words):
        call(result)


def test_places_that_cannot_be(result, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "inside"):
        with pytest.raises(DataError, match="not a directory"):
            result.save(place)
    assert file.read_text() == "mine"
    with pytest.raises(DataError, match="file"):
        dmixed.MixedLMResults.load(file)


@pytest.mark.parametrize("subset", [["zz"], "zz", [True, False]])
def test_subsets_that_select_nothing_sensible(subset):
    with pytest.raises(DataError, match="subset="):
        mixedlm("y ~ x", table(), groups="g", subset=subset)
