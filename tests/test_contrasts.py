"""Linear hypotheses: how they are written, and that the tests are those of statsmodels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dmixed import contrasts
from dmixed.errors import DataError, FormulaError

NAMES = [
    "Intercept",
    "x1",
    "x10",
    "C(a)[T.b]",
    "x:z",
    "np.log(x)",
    "g Var",
    "a b",
    "x",
    "f(x, 2)=1",
]
METHODS = ["hs", "holm", "bonferroni", "sidak", "fdr_bh"]


def row(**coefficients: float) -> list[float]:
    return [coefficients.get(f"p{k}", 0.0) for k in range(len(NAMES))]


# ------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "rows", "values"),
    [
        ("x1", [row(p1=1)], [0]),
        ("x1 = x10", [row(p1=1, p2=-1)], [0]),
        ("x1 = 0, x10 - 2*x = 1", [row(p1=1), row(p2=1, p8=-2)], [0, 1]),
        ("C(a)[T.b] = 2 * x:z", [row(p3=1, p4=-2)], [0]),
        ("np.log(x)/4 + g Var = .5", [row(p5=0.25, p6=1)], [0.5]),
        ("a b - x = -1", [row(p7=1, p8=-1)], [-1]),
        ("(x1 = 1), (a b = 2)", [row(p1=1), row(p7=1)], [1, 2]),
        ("f(x, 2)=1 = 3, x1", [row(p9=1), row(p1=1)], [3, 0]),
        ("x1 = x10 = x = 3", [row(p1=1, p2=-1), row(p2=1, p8=-1), row(p8=1)], [0, 0, 3]),
        ("1 = x1", [row(p1=-1)], [-1]),
        ("x1 == 1e-3", [row(p1=1)], [1e-3]),
        ("-(x1 - x)/2 = +3", [row(p1=-0.5, p8=0.5)], [3]),
        ("x1 - -x, - x = 2*-3", [row(p1=1, p8=1), row(p8=-1)], [0, -6]),
        ("x1/-2 + 1.5E2 *-x = -x10 + 2", [row(p1=-0.5, p8=-150, p2=1)], [2]),
        ("2*(Intercept + x1) - x1*(3 - 1) = 4", [row(p0=2)], [4]),
        ("x1 - - - x = -(-1)", [row(p1=1, p8=-1)], [1]),
    ],
)
def test_texts(text: str, rows: list[list[float]], values: list[float]) -> None:
    R, q = contrasts.constraint(text, NAMES)
    np.testing.assert_array_equal(R, rows)
    np.testing.assert_array_equal(q, values)
    if "=" not in NAMES[-1] or "f(" not in text:
        again = contrasts.constraint(text.split(", "), NAMES) if "(x1 = 1)" not in text else (R, q)
        np.testing.assert_array_equal(again[0], R)


def test_every_name_is_found_as_it_is() -> None:
    for k, name in enumerate(NAMES):
        R, q = contrasts.constraint(f"3*{name} = 6", NAMES)
        np.testing.assert_array_equal(R, 3 * np.eye(len(NAMES))[[k]])
        assert q.tolist() == [6.0]


def test_texts_against_formulaic() -> None:
    constraints = pytest.importorskip("formulaic.utils.constraints")
    names = ["a", "b", "c"]
    for text in ("a = 1, b - 2*c = 1", "2*(a + b) = 4", "a/3 - 1 = c", "-a*2 = 1"):
        want = constraints.LinearConstraints.from_spec(text, names)
        R, q = contrasts.constraint(text, names)
        np.testing.assert_array_equal(R, want.constraint_matrix)
        np.testing.assert_array_equal(q, want.constraint_values)


def test_arrays() -> None:
    names = ["a", "b", "v"]
    for r in ([1, 2, 3], [[1, 2, 3]], np.array([1.0, 2, 3]), pd.Series([1, 2, 3]), ([1, 2, 3], 0)):
        R, q = contrasts.constraint(r, names)
        assert R.tolist() == [[1.0, 2.0, 3.0]]
        assert q.tolist() == [0.0]
    R, q = contrasts.constraint((np.eye(3), 2), names)
    assert q.tolist() == [2.0, 2.0, 2.0]
    assert contrasts.constraint((np.eye(3)[:2], [[1], [2]]), names)[1].tolist() == [1.0, 2.0]
    R, q = contrasts.constraint(([0, 1], 4), names, fixed=2)
    assert (R.tolist(), q.tolist()) == ([[0.0, 1.0, 0.0]], [4.0])
    assert contrasts.constraint(("a", "b = 1"), names)[1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x2 = 0", ["'x2'", "is no parameter", "closest is 'x"]),
        ("x11", ["'x11'"]),
        ("C(a)[T.d] = 0", ["'C(a)[T.d]'", "'C(a)[T.b]'"]),
        ("x1:x = 0", ["'x1:x'"]),
        ("log(x) - x", ["'log(x)'", "'np.log(x)'"]),
        ("2x1 = 0", ["'2x1'"]),
        ("x$ = 1", ["'x$'"]),
        ("x1 < 3", ["'<'"]),
        ("x1]", ["'x1]'"]),
        ("g Vax", ["'g'", "'g Var'"]),
        ("x1*x10 = 1", ["'x1*x10 = 1'", "cannot be read"]),
        ("x1 x10", ["'x1 x10'", "cannot be read"]),
        ("x1 / 0", ["cannot be read"]),
        ("x1 +", ["cannot be read"]),
        ("(x1", ["cannot be read"]),
        ("x1 = (x10", ["cannot be read"]),
        ("x1 (x10)", ["cannot be read"]),
        ("x1 =", ["cannot be read"]),
        ("", ["empty hypothesis"]),
        ("x1, , x10", ["empty hypothesis"]),
        ("x1 = x1", ["'x1 = x1'", "says nothing about any parameter"]),
        ("3 = 3", ["says nothing about any parameter"]),
        ("x1 = 1e999", ["cannot be read"]),
    ],
)
def test_texts_that_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises((FormulaError, DataError)) as caught:
        contrasts.constraint(text, NAMES)
    for word in words:
        assert word in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_name_that_two_parameters_have() -> None:
    assert contrasts.constraint("b", ["a", "a", "b"])[0].tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(FormulaError, match="several parameters are called 'a'"):
        contrasts.constraint("a", ["a", "a", "b"])


@pytest.mark.parametrize(
    ("r", "words"),
    [
        ([1, 2], "does not fit 3 parameters.*in the order a, b, c"),
        (np.zeros((0, 3)), "does not fit 3 parameters"),
        ([], "does not fit 3 parameters"),
        (np.zeros((1, 1, 3)), "does not fit 3 parameters"),
        ((np.eye(3), [1, 2]), "q has 2 values for 3 rows"),
        ([1, np.nan, 2], "not finite"),
        (None, "not finite"),
        ({"a": 1}, "hypotheses are a text"),
        (["a", 1], "hypotheses are a text"),
        (("a", 1), "hypotheses are a text"),
    ],
)
def test_arrays_that_are_refused(r: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        contrasts.constraint(r, ["a", "b", "c"])


# ------------------------------------------------------------------------ against statsmodels


@pytest.fixture(scope="module")
def ols() -> Any:
    smf = pytest.importorskip("statsmodels.formula.api")
    rng = np.random.default_rng(5)
    d = pd.DataFrame(rng.normal(size=(60, 2)), columns=["u", "v"])
    d["a"] = np.array(["p", "q", "r", "s"])[rng.integers(0, 4, 60)]
    d["y"] = 1 + d["u"] + d["a"].map({"p": 0, "q": 0.6, "r": 0.8, "s": -0.2}) + rng.normal(size=60)
    return smf.ols("y ~ u * v + a", d).fit()


def arrays(fit: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    return fit.params.to_numpy(), fit.cov_params().to_numpy(), list(fit.params.index)


HYPOTHESES = [
    "u = 1",
    "u = 0, v = 0",
    "a[T.q] = a[T.r], 2*u - v = 1, Intercept = 1",
    "a[T.q] = 0, a[T.r] = 0, a[T.s] = 0",
]


@pytest.mark.parametrize("use_t", [True, False])
@pytest.mark.parametrize("text", HYPOTHESES)
def test_t_tests(ols: Any, text: str, use_t: bool) -> None:
    b, cov, names = arrays(ols)
    R, q = contrasts.constraint(text, names)
    want = ols.t_test((R, q), use_t=use_t)
    found = contrasts.t_test(b, cov, R, q, ols.df_resid if use_t else None, names)
    for attribute in ("effect", "sd", "tvalue", "statistic", "pvalue"):
        want_value = np.ravel(getattr(want, attribute))
        np.testing.assert_allclose(np.ravel(getattr(found, attribute)), want_value, rtol=1e-10)
    assert np.shape(found.pvalue) == np.shape(want.pvalue)
    assert found.distribution == want.distribution
    assert list(found.c_names) == want.c_names
    for alpha in (0.05, 0.2):
        np.testing.assert_allclose(found.conf_int(alpha), want.conf_int(alpha), rtol=1e-10)
        pd.testing.assert_frame_equal(
            found.summary_frame(alpha=alpha), want.summary_frame(alpha=alpha), rtol=1e-10
        )
    labels = [f"row {k}" for k in range(len(R))]
    assert list(found.summary_frame(labels).index) == labels
    assert found.df_denom == (ols.df_resid if use_t else np.inf)


@pytest.mark.parametrize("use_f", [True, False])
@pytest.mark.parametrize("text", HYPOTHESES)
def test_wald_tests(ols: Any, text: str, use_f: bool) -> None:
    b, cov, names = arrays(ols)
    R, q = contrasts.constraint(text, names)
    want = ols.wald_test((R, q), use_f=use_f, scalar=True)
    found = contrasts.wald_test(b, cov, R, q, use_f, ols.df_resid, names=names)
    assert found.statistic == pytest.approx(want.statistic, rel=1e-10)
    assert found.pvalue == pytest.approx(float(want.pvalue), rel=1e-10)
    assert found.distribution == want.distribution
    assert found.df_denom == want.df_denom
    assert found.df_num == len(R)
    assert hasattr(found, "fvalue") == use_f
    if use_f:
        assert found.fvalue == found.statistic
        assert found.df_num == want.df_num
    array = contrasts.wald_test(b, cov, R, q, use_f, ols.df_resid, scalar=False)
    np.testing.assert_array_equal(array.statistic, [[found.statistic]])
    assert str(array) == str(found)


@pytest.mark.parametrize("use_f", [True, False])
def test_tests_of_terms(ols: Any, use_f: bool) -> None:
    fit = ols.model.fit(use_t=use_f)
    b, cov, names = arrays(ols)
    slices = {"Intercept": [0], "a": [1, 2, 3], "u": [4], "v": [5], "u:v": [6]}
    extra = [("both", np.eye(7)[[4, 6]])]
    for skip in (False, True):
        options = {"skip_single": skip, "combine_terms": ["u", "v"], "extra_constraints": extra}
        want = fit.wald_test_terms(scalar=True, **options)
        found = contrasts.wald_terms(
            b, cov, slices, names, use_f=use_f, df_denom=fit.df_resid, **options
        )
        pd.testing.assert_frame_equal(found.table, want.table, rtol=1e-10, check_dtype=False)
        pd.testing.assert_frame_equal(
            found.summary_frame(), want.summary_frame(), rtol=1e-10, check_dtype=False
        )
        np.testing.assert_allclose(found.pvalues, want.pvalues, rtol=1e-10)
        np.testing.assert_allclose(found.statistic, want.statistic, rtol=1e-10)
        assert found.df_constraints.tolist() == want.df_constraints.tolist()
        assert ("P>F" in str(found)) == use_f


@pytest.mark.parametrize("method", METHODS)
def test_pairs_of_levels(ols: Any, method: str) -> None:
    b, cov, _ = arrays(ols)
    rows = np.vstack([np.zeros(7), np.eye(7)[1:4]])
    want = ols.t_test_pairwise("a", method=method, alpha=0.1)
    found = contrasts.pairwise(
        b, cov, rows, list("pqrs"), term="a", method=method, alpha=0.1, df=ols.df_resid
    )
    pd.testing.assert_frame_equal(found.result_frame, want.result_frame, rtol=1e-10)
    np.testing.assert_array_equal(found.contrasts, want.contrasts)
    assert list(found.contrast_labels) == want.contrast_labels
    assert found.term == "a"


@pytest.mark.parametrize("method", METHODS)
def test_adjusted_p_values(method: str) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(2)
    for size, power in itertools.product((1, 2, 7, 30), (1, 4, 40)):
        p = rng.uniform(size=size) ** power
        p[rng.uniform(size=size) < 0.2] = 1.0
        with np.errstate(divide="ignore"):
            want = multitest.multipletests(p, 0.05, method)[1]
        np.testing.assert_allclose(contrasts.ADJUSTMENTS[method](p), want, rtol=1e-10, atol=1e-300)


def test_several_methods() -> None:
    found = contrasts.pairwise([1.0, 3.0], np.eye(2), np.eye(2), [1, 2], method=METHODS)
    assert found.result_frame.index.tolist() == ["2-1"]
    p = float(2 * stats.norm.sf(np.sqrt(2)))
    for method in METHODS:  # there is one pair, and nothing to adjust
        assert found.result_frame[f"pvalue-{method}"].item() == pytest.approx(p, rel=1e-12)
        assert not found.result_frame[f"reject-{method}"].item()
    assert "pvalue-fdr_bh" in str(found)


# ------------------------------------------------------------------------ scales, boundaries


def test_units_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    A = rng.normal(size=(4, 4))
    b, cov, R, q = rng.normal(size=4), A @ A.T, rng.normal(size=(3, 4)), rng.normal(size=3)
    want = contrasts.wald_test(b, cov, R, q).statistic
    s, t = np.array([1e-9, 1, 1e8, 1e3]), np.array([1e12, 1e-7, 1])
    got = contrasts.wald_test(b * s, cov * np.outer(s, s), R / s * t[:, None], q * t).statistic
    assert got == pytest.approx(want, rel=1e-8)
    found = contrasts.wald_test([1e-9, 2], np.diag([1e-18, 1.0]), [[1, 0], [1, 1e-9]])
    assert found.statistic == pytest.approx(5, rel=1e-6)


def test_degrees_of_freedom_of_each_hypothesis() -> None:
    df = [3.0, np.inf]
    found = contrasts.t_test([1.0, 2.0], np.eye(2), np.eye(2), df=df)
    np.testing.assert_allclose(found.pvalue, [2 * stats.t.sf(1, 3), 2 * stats.norm.sf(2)])
    np.testing.assert_allclose(found.conf_int()[:, 1] - [1, 2], stats.t.isf(0.025, df), rtol=1e-12)
    with pytest.raises(DataError, match=r"df of shape \(3,\) for 2 hypotheses"):
        contrasts.t_test([1.0, 2.0], np.eye(2), np.eye(2), df=[1, 2, 3])


def boundary() -> tuple[np.ndarray, np.ndarray, list[str]]:
    cov = np.diag([1.0, 4.0, np.nan])
    cov[2, :] = cov[:, 2] = np.nan
    return np.array([1.0, 2.0, 0.0]), cov, ["x", "z", "g Var"]


def test_a_variance_at_its_boundary() -> None:
    b, cov, names = boundary()
    each = contrasts.t_test(b, cov, np.eye(3), names=names)
    np.testing.assert_array_equal(each.sd, [1.0, 2.0, np.nan])
    np.testing.assert_array_equal(np.isnan(each.pvalue), [False, False, True])
    assert contrasts.wald_test(b, cov, np.eye(3)[:2], names=names).statistic == pytest.approx(2)
    for r in ("g Var", "x = 0, z - g Var = 1"):
        with pytest.raises(DataError, match="covariance is known for 'g Var', as of a variance"):
            contrasts.wald_test(b, cov, *contrasts.constraint(r, names), names=names)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("x, z, x", "'x = 0' repeats"),
        ("x = 1, z = 2, x - 2*z = 0", "'x - 2*z = 0' repeats"),
        ("x, 3*x = 7", "'3*x = 7' repeats"),
        ("x/3 + z/7, z, x = 1, w", "'x = 1' repeats"),
        ("x, z, w", "'w = 0' cannot be tested together"),
        ("k", "'k = 0' cannot be tested together"),
    ],
)
def test_hypotheses_that_others_imply(text: str, culprit: str) -> None:
    names = ["x", "z", "w", "k"]
    cov = np.diag([1.0, 4.0, 0.0, 0.0])
    cov[2] = cov[0] + cov[1]
    cov[:, 2] = cov[2]
    cov[2, 2] = 5.0  # w = x + z in every sample
    with pytest.raises(DataError) as caught:
        contrasts.wald_test(np.ones(4), cov, *contrasts.constraint(text, names), names=names)
    assert culprit in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_errors_of_the_tests() -> None:
    b, cov = np.ones(2), np.eye(2)
    with pytest.raises(DataError, match="row 1 of R is zero"):
        contrasts.t_test(b, cov, [[1, 0], [0, 0]])
    with pytest.raises(DataError, match="row 0 of R is zero"):
        contrasts.wald_test(b, cov, [0, 0])
    with pytest.raises(DataError, match="do not belong together"):
        contrasts.t_test(b, np.eye(3), [1, 0])
    with pytest.raises(DataError, match="needs df_denom"):
        contrasts.wald_test(b, cov, [1, 0], use_f=True)
    found = contrasts.t_test(b, cov, np.eye(2))
    for alpha in (0, 1, 95, np.nan):
        with pytest.raises(DataError, match="between 0 and 1"):
            found.conf_int(alpha)
    with pytest.raises(DataError, match="xname has 1 names for 2 hypotheses"):
        found.summary(["one"])
    with pytest.raises(AttributeError, match="no fvalue"):
        _ = contrasts.wald_test(b, cov, [1, 0]).fvalue


def test_errors_of_terms_and_pairs() -> None:
    b, cov = np.ones(2), np.eye(2)
    with pytest.raises(DataError, match="'q' is in no term's name; the terms are a, b"):
        contrasts.wald_terms(b, cov, {"a": [0], "b": [1]}, combine_terms=["q"])
    table = contrasts.wald_terms(b, cov, {"a": [0, 1], "gone": []}).table
    assert table.loc["gone", "df_constraint"] == 0
    assert np.isnan(table.loc["gone", "statistic"])
    assert table.loc["a", "statistic"] == pytest.approx(2)
    for rows, levels, words in (
        (np.eye(2), ["a"], "has 1 levels and 2 rows"),
        (np.eye(2)[:1], ["a"], "two levels or more"),
        (np.ones((2, 2)), ["a", "b"], "'t': the levels of b-a have the same"),
    ):
        with pytest.raises(DataError, match=words):
            contrasts.pairwise(b, cov, rows, levels, term="t")
    with pytest.raises(DataError, match="method='tukey': must be one of hs, holm, bonferroni"):
        contrasts.pairwise(b, cov, np.eye(2), ["a", "b"], method="tukey")
    with pytest.raises(DataError, match="alpha=5"):
        contrasts.pairwise(b, cov, np.eye(2), ["a", "b"], alpha=5)


def test_text_of_the_tests() -> None:
    found = contrasts.t_test([1.0, 2e-9], np.diag([1.0, 4e-18]), np.eye(2))
    lines = str(found).splitlines()
    assert lines[0].strip() == "Test for Constraints"
    assert lines[2].split() == ["coef", "std", "err", "z", "P>|z|", "[0.025", "0.975]"]
    assert lines[5].split()[:5] == ["c1", "2e-09", "2e-09", "1.000", "0.317"]
    assert max(map(len, lines)) <= 80
    assert found.summary(["a", "b"], 0.1, "Mine").splitlines()[0].strip() == "Mine"
    assert "0.95]" in found.summary(alpha=0.1)
    assert found.summary(title="").startswith("=")
    chi2 = contrasts.wald_test([1.0, 2.0], np.eye(2), np.eye(2))
    assert str(chi2).startswith("<Wald test (chi2): statistic=5.0, p-value=0.08208")
    F = contrasts.wald_test([1.0, 2.0], np.eye(2), np.eye(2), use_f=True, df_denom=9)
    assert str(F).startswith("<F test: F=2.5, p=0.136")
