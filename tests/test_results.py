"""Results as objects: nothing changes them, labels are exact, the summary fits a terminal."""

from __future__ import annotations

import copy
import datetime
import operator
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed.resultfiles import write_result


def table(n: int = 240, groups: int = 30, columns: int = 1, seed: int = 3) -> pd.DataFrame:
    """Data with a random coefficient for every column x0, x1, ..."""
    rng = np.random.default_rng(seed)
    g = np.arange(n) % groups
    names = [f"x{j}" for j in range(columns)]
    d = pd.DataFrame(rng.normal(size=(n, columns)), columns=names)
    d["y"] = 1 + rng.normal(size=n) + rng.normal(size=groups)[g]
    for name in names:
        d["y"] += d[name] * (0.5 + rng.normal(size=groups)[g])
    return d.assign(g=g, t=np.array([f"town {j}" for j in range(groups)])[g], h=g % 7)


@pytest.fixture(scope="module")
def result() -> dmixed.MixedLMResults:
    return dmixed.lmer("y ~ x0 + (x0 | t)", table())


# ------------------------------------------------------------------------ immutable

VALUES = (
    *("fe_params", "cov_fe", "bse_fe", "theta", "cov_re", "cov_re_unscaled", "bse_re", "params"),
    *("bse", "tvalues", "pvalues", "fittedvalues", "resid", "group_sizes"),
)
CALLS = {
    **{name: operator.attrgetter(name) for name in VALUES},
    **{name: operator.methodcaller(name) for name in ("cov_params", "conf_int", "ranef")},
    "predict": operator.methodcaller("predict"),
    "varcorr": lambda r: r.varcorr()["t"],
    "random_effects": lambda r: r.random_effects["town 3"],
    "random_effects_cov": lambda r: r.random_effects_cov["town 3"],
}


@pytest.mark.parametrize("name", CALLS)
def test_changing_what_is_returned_changes_nothing(
    result: dmixed.MixedLMResults, name: str
) -> None:
    def everything() -> list[object]:
        text = str(result.summary()) + str(result.to_dict())
        return [text, *(np.array(get(result)).tolist() for get in CALLS.values())]

    before = everything()
    value = CALLS[name](result)
    if isinstance(value, np.ndarray):
        value[:] = 99
    else:
        value.index.name = "changed"
        value.iloc[:] = 99.0
        assert CALLS[name](result).index.name != "changed"
    assert everything() == before


def test_writing_a_result_leaves_it_as_it_was(tmp_path: Path) -> None:
    d = table()
    found = dmixed.lmer("y ~ x0 + (0 + k | k)", d.assign(k=d["h"] + 1.0))
    write_result(found, tmp_path / "out")  # the file has a column "group k"
    assert found.ranef().index.names == ["k"]


def test_names_of_the_data_are_not_shared() -> None:
    d = table()
    dmixed.lmer("y ~ x0 + (1 | g)", d).predict(d).index.name = "changed"
    assert d.index.name is None


@pytest.mark.parametrize("travelled", [False, True])
def test_moments_are_read_only(travelled: bool) -> None:
    moments = dmixed.MixedLM.from_formula("y ~ x0", table(), groups="g").moments
    if travelled:
        moments = pickle.loads(pickle.dumps(moments))
    for name in ("counts", "WtF", "FtF", "plain"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(moments.group, name)[:] = 1
    assert moments.group.plain is moments.group.FtF
    assert (moments + moments).nobs == 480


# ------------------------------------------------------------------------ copies, equality, sums


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_the_rows(result: dmixed.MixedLMResults, make) -> None:
    pd.testing.assert_series_equal(make(result).resid, result.resid)
    pd.testing.assert_series_equal(make([result])[0].predict(), result.predict())


def test_a_pickle_has_no_rows(result: dmixed.MixedLMResults) -> None:
    stored = pickle.loads(pickle.dumps(result))
    assert str(stored.summary()) == str(result.summary())
    with pytest.raises(AttributeError, match="the rows do not travel"):
        _ = stored.resid


def test_equality_and_hash(result: dmixed.MixedLMResults) -> None:
    other = pickle.loads(pickle.dumps(result))
    assert result == result
    assert result != other
    assert len({result, other, result}) == 2
    model = dmixed.MixedLM.from_formula("y ~ x0", table(), groups="g")
    for moments in (model.moments, model.moments.group):
        twin = pickle.loads(pickle.dumps(moments))
        assert moments != twin
        assert len({moments, twin}) == 2


def test_sums_of_moments() -> None:
    d = table()
    parts = [
        dmixed.MixedLM.from_formula("y ~ x0", p, groups="g").moments for p in (d[:100], d[100:])
    ]
    total = sum(parts)
    assert isinstance(total, dmixed.cellmoments.CellMoments)
    assert total.nobs == 240
    for moments in (parts[0], parts[0].group):
        for other in (3, "a", None, 0.5):
            with pytest.raises(TypeError):
                moments + other
            with pytest.raises(TypeError):
                other + moments


# ------------------------------------------------------------------------ labels


def by_label(d: pd.DataFrame, group: str, labels: list[object], not_labels: list[object]) -> None:
    found = dmixed.lmer(f"y ~ x0 + (1 | {group})", d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for effects in (found.random_effects, found.random_effects_cov):
            for label in labels:
                assert label in effects
            for label in [*not_labels, [], {}, None, slice(0, 2), slice(None), ..., np.arange(3)]:
                with pytest.raises(KeyError):
                    effects[label]
            assert list(effects) == list(found.ranef().index)
    values = found.ranef()["Intercept"]
    for label, value in zip(values.index, values, strict=True):
        assert found.random_effects[label].to_list() == [value]


def test_labels_of_text() -> None:
    missing = ["town", "TOWN 3", "", 3, ("town 3",), ["town 3"], [True] * 30]
    by_label(table(), "t", ["town 3", np.str_("town 4")], missing)


def test_labels_of_numbers() -> None:
    missing = [-1, 30, 2**100, 0.5, np.nan, "3", [3], (3,), slice(0, 3), [True] * 30]
    by_label(table(), "g", [0, 29, np.int64(3), 3.0], missing)


def test_composite_labels() -> None:
    missing = ["town 3", ("town 3",), ("town 3", 4), ("town 3", slice(None)), ("town 3", 3, 1)]
    by_label(table(), "t:h", [("town 3", 3), ("town 8", 1)], [*missing, 3, [("town 3", 3)]])


def test_labels_of_time() -> None:
    d = table()
    day = pd.Timestamp("2020-01-01") + pd.to_timedelta(d["g"], unit="D")
    missing = ["2020", "2020-01", "2020-01-02", "nonsense", 3, pd.NaT, pd.Timestamp("2021-01-01")]
    by_label(d.assign(d=day), "d", [pd.Timestamp("2020-01-02")], missing)
    dates = d.assign(d=day.dt.date)
    by_label(dates, "d", [datetime.date(2020, 1, 2)], ["2020-01", "2020-01-02", 3])
    by_label(d.assign(d=day), "t:d", [("town 1", pd.Timestamp("2020-01-02"))],
             [("town 1", "2020-01"), ("town 1", "2020-01-02"), ("town 1",)])  # fmt: skip


# ------------------------------------------------------------------------ summary


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 5, 95, np.nan, np.inf])
def test_alpha_is_checked(result: dmixed.MixedLMResults, alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        result.conf_int(alpha)
    with pytest.raises(ValueError, match="between 0 and 1"):
        result.summary(alpha=alpha)


def test_limits_of_another_level(result: dmixed.MixedLMResults) -> None:
    half = result.conf_int(0.3173105078629141)[1] - result.params
    np.testing.assert_allclose(half, result.bse, rtol=1e-12)
    assert list(result.summary(alpha=0.1).tables[1].columns[-2:]) == ["[0.05", "0.95]"]


def test_small_models_look_as_ever(result: dmixed.MixedLMResults) -> None:
    text = str(result.summary())
    header = next(line for line in text.splitlines() if "Variance" in line)
    assert header.split() == ["Group", "Levels", "Name", "Variance", "Std.Dev.", "Corr"]
    assert "Correlations" not in text


@pytest.mark.parametrize("stem", ["x", "income_of_the_household_in_thousands_", "z" * 100])
@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_the_summary_fits_a_terminal(columns: int, stem: str) -> None:
    d = table(600, 30, columns)
    names = {f"x{j}": f"{stem}{j}" for j in range(columns)}
    d = d.rename(columns=names)
    terms = " + ".join(names.values())
    found = dmixed.lmer(f"y ~ {terms} + (1 + {terms} | g)", d)
    with pd.option_context("display.width", 40, "display.max_colwidth", 5, "display.max_rows", 2):
        text = str(found.summary())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("\\") for line in lines)
    words = text.replace("\n", "").replace(" ", "")
    assert all(words.count(name) >= 3 for name in names.values())
    cov = found.cov_re.to_numpy()
    sd = np.sqrt(np.diag(cov))
    correlations = cov / np.outer(sd, sd)
    for a in range(columns + 1):
        for b in range(a):
            assert f"{correlations[a, b]:.3f}" in text
    assert ("Correlations of the random effects" in text) == (columns > 2)
    html = found.summary()._repr_html_()
    assert ("Correlations of the random effects" in html) == (columns > 2)


def test_many_columns_and_bars() -> None:
    d = table(3000, 100, 13)
    terms = " + ".join(f"x{j}" for j in range(11))
    summary = dmixed.lmer(f"y ~ 1 + (1 + {terms} | g) + (0 + x11 + x12 | g)", d).summary()
    assert max(map(len, str(summary).splitlines())) <= 80
    assert [len(part) for _, part in summary.correlations] == [12, 2]
    assert "Correlations of the random effects, g.1" in str(summary)


@pytest.mark.parametrize(("rows", "noted"), [(62, True), (63, False)])
def test_fewer_rows_than_random_effects(rows: int, noted: bool) -> None:
    found = dmixed.lmer("y ~ x0 + (x0 | g)", table(rows))  # 30 groups x 2 + 2
    assert (
        "the variances are hardly determined" in " ".join(str(found.summary()).split())
    ) == noted
