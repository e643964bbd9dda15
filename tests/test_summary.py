"""The summary: statsmodels' layout, user units, 80 columns, nothing cut, flags in words."""

from __future__ import annotations

import html.parser
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dmixed.summary import TITLE, few_rows, held_at_zero, quantile, summarise
from dmixed.tabular import latex_text

HEADINGS = ["Coef.", "Std.Err.", "z", "P>|z|", "[0.025", "0.975]"]


def covariance(q: int, seed: int = 1) -> np.ndarray:
    A = np.random.default_rng(seed).normal(size=(q, q))
    return A @ A.T


def pair_names(names: list[str]) -> list[str]:
    return [
        f"{names[a]} Var" if a == b else f"{names[b]} x {names[a]} Cov"
        for a in range(len(names))
        for b in range(a + 1)
    ]


def fit(
    fixed: dict[str, float] | None = None,
    bars: dict[str, pd.DataFrame] | None = None,
    **changes: Any,
) -> SimpleNamespace:
    """A result with standard errors of a tenth of the estimates."""
    fixed = {"Intercept": 15.724, "x": -0.5} if fixed is None else fixed
    names = ["Intercept", "x"]
    if bars is None:
        bars = {"g": pd.DataFrame([[4.0, -1.0], [-1.0, 1.0]], names, names)}
    variances = {
        f"{label} {name}": cov.to_numpy()[np.tril_indices(len(cov))][k]
        for label, cov in bars.items()
        for k, name in enumerate(pair_names(list(map(str, cov.index))))
    }
    params = pd.Series(fixed | variances, dtype=float)
    certificate = SimpleNamespace(digits_lost=1.0)
    values: dict[str, Any] = {
        "formula": "y ~ x + (x | g)",
        "endog_name": "y",
        "method": "REML",
        "reml": True,
        "nobs": 240,
        "n_groups": 30,
        "group_size_range": (7, 9, 8.0),
        "group_name": "g",
        "factors": {"g": 30},
        "scale": 1.25,
        "bse_scale": 0.125,
        "llf": -123.45678,
        "aic": np.nan,
        "bic": np.nan,
        "converged": True,
        "optimizer_summary": SimpleNamespace(reason="it did", certificate=certificate),
        "fe_params": pd.Series(fixed, dtype=float),
        "bse_fe": pd.Series(fixed, dtype=float).abs() / 10,
        "params_user": params,
        "bse_user": params.abs() / 10,
        "varcorr": lambda: {label: cov.copy() for label, cov in bars.items()},
        "dropped": {},
        "aliased": (),
        "notes": (),
        "singular": False,
    }
    return SimpleNamespace(**(values | changes))


def bar(names: list[str], cov: Any = None) -> pd.DataFrame:
    return pd.DataFrame(covariance(len(names)) if cov is None else cov, names, names)


class Cells(html.parser.HTMLParser):
    """Texts of HTML; fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ------------------------------------------------------------------------ layout


TEXT = """\
                   Mixed Linear Model Regression Results
===========================================================================
Model:            MixedLM                     Dependent Variable: y
No. Observations: 240                         Method:             REML
No. Groups:       30                          Scale:              1.25
Min. group size:  7                           Scale Std.Err.:     0.125
Max. group size:  9                           Log-Likelihood:     -123.4568
Mean group size:  8.0                         Converged:          Yes
Formula:          y ~ x + (x | g)
---------------------------------------------------------------------------
                      Coef.  Std.Err.        z  P>|z|     [0.025     0.975]
---------------------------------------------------------------------------
Intercept            15.724    1.5724   10.000  0.000    12.6422    18.8058
x                      -0.5      0.05  -10.000  0.000  -0.597998  -0.402002
g Intercept Var           4       0.4
g Intercept x x Cov      -1       0.1
g x Var                   1       0.1
---------------------------------------------------------------------------
Random effects
Group     Levels  Name       Variance  Std.Dev.    Corr
g             30  Intercept         4         2
                  x                 1         1  -0.500
Residual                         1.25   1.11803
===========================================================================
* Tests and limits of the fixed effects are large-sample (z): with few groups
  they are too optimistic."""


def test_the_whole_text() -> None:
    found = summarise(fit())
    assert str(found) == repr(found) == found.as_text() == TEXT


def test_header_is_that_of_statsmodels() -> None:
    header = summarise(fit()).tables[0]
    labels = header[0].to_list() + header[2].to_list()
    assert labels == [
        *("Model:", "No. Observations:", "No. Groups:", "Min. group size:"),
        *("Max. group size:", "Mean group size:", "Formula:"),
        *("Dependent Variable:", "Method:", "Scale:", "Scale Std.Err.:"),
        *("Log-Likelihood:", "Converged:", ""),
    ]
    values = dict(zip(labels, header[1].to_list() + header[3].to_list(), strict=True))
    assert values["No. Observations:"] == "240"
    assert values["Mean group size:"] == "8.0"
    assert values["Formula:"] == "y ~ x + (x | g)"
    assert values["Log-Likelihood:"] == "-123.4568"


def test_criteria_of_maximum_likelihood() -> None:
    text = str(summarise(fit(reml=False, method="ML", aic=10.5, bic=12.25)))
    assert re.search(r"Method: +ML\n", text)
    assert re.search(r"AIC: +10\.5000\n", text)
    assert re.search(r"BIC: +12\.2500\n", text)
    assert "AIC" not in str(summarise(fit()))


def test_coefficients() -> None:
    table = summarise(fit()).tables[1]
    assert list(table.columns) == HEADINGS
    assert list(table.index) == ["Intercept", "x", "g Intercept Var", "g Intercept x x Cov",
                                 "g x Var"]  # fmt: skip
    assert table.loc["x"].to_list()[:4] == ["-0.5", "0.05", "-10.000", "0.000"]
    half = stats.norm.ppf(0.975) * 0.05
    assert float(table.loc["x", "[0.025"]) == pytest.approx(-0.5 - half, rel=1e-5)
    assert float(table.loc["x", "0.975]"]) == pytest.approx(-0.5 + half, rel=1e-5)
    assert table.loc["g x Var"].to_list() == ["1", "0.1", "", "", "", ""]


def test_small_and_large_numbers_are_seen() -> None:
    table = summarise(fit({"tiny": 1.234567e-9, "huge": 1.234567e12})).tables[1]
    assert table["Coef."].to_list()[:2] == ["1.23457e-09", "1.23457e+12"]
    sure = fit({"x": 1.0})
    sure.bse_user.iloc[0] = 1e-8
    assert summarise(sure).tables[1].loc["x", "z"] == "1.000e+08"
    sure.bse_user.iloc[0] = 0.0
    assert summarise(sure).tables[1].loc["x", ["z", "P>|z|"]].to_list() == ["inf", "0.000"]


def test_random_effects() -> None:
    table = summarise(fit()).tables[2]
    assert list(table.columns) == ["Levels", "Name", "Variance", "Std.Dev.", "Corr"]
    assert list(table.index) == ["g", "", "Residual"]
    assert table.iloc[0].to_list() == ["30", "Intercept", "4", "2", ""]
    assert table.iloc[1].to_list() == ["", "x", "1", "1", "-0.500"]
    assert table.iloc[2].to_list() == ["", "", "1.25", "1.11803", ""]


def test_several_factors_and_components() -> None:
    bars = {
        "g": bar(["Intercept"]),
        "g.1": bar(["x"]),
        "h": bar(["Intercept"]),
        "v.2": bar(["v.2"], [[0.5]]),
    }
    found = summarise(fit(bars=bars, factors={"g": 30, "h": 7, "v.2": 55}))
    assert found.tables[2]["Levels"].to_list() == ["30", "30", "7", "55", ""]
    assert "g (30), h (7), v.2 (55); groups are those of g" in str(found)
    assert len(found.tables) == 3
    assert "Factors:" not in str(summarise(fit()))
    unknown = summarise(fit(bars={"w": bar(["w"])}))
    assert unknown.tables[2]["Levels"].to_list() == ["", ""]


def test_no_fixed_effects() -> None:
    found = summarise(fit({}))
    assert next(iter(found.tables[1].index)) == "g Intercept Var"
    assert found.tables[1]["z"].to_list() == [""] * 3
    assert "large-sample" not in str(found)


# ------------------------------------------------------------------------ options


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 5, 95, np.nan, np.inf])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        summarise(fit(), alpha)


def test_limits_of_another_level() -> None:
    assert quantile(0.3173105078629141) == pytest.approx(1, rel=1e-12)
    table = summarise(fit(), 0.3173105078629141).tables[1]
    assert list(table.columns)[4:] == ["[0.158655", "0.841345]"]
    assert table.loc["x"].to_list()[4:] == ["-0.55", "-0.45"]
    assert list(summarise(fit(), 0.1).tables[1].columns)[4:] == ["[0.05", "0.95]"]


def test_names_and_title() -> None:
    found = summarise(fit(), yname="why", xname_fe=["a", "b"], xname_re=["c", "d", "e"], title="T")
    assert list(found.tables[1].index) == list("abcde")
    assert re.search(r"Dependent Variable: +why\n", str(found))
    assert str(found).splitlines()[0].strip() == found.title == "T"
    assert summarise(fit()).title == TITLE
    renamed = summarise(fit(), xname_fe=["a", "b"]).tables[1].index
    assert list(renamed)[:3] == ["a", "b", "g Intercept Var"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"xname_fe": ["a"]}, "xname_fe should be a list of length 2"),
        ({"xname_fe": "ab"}, "xname_fe should be a list of length 2"),
        ({"xname_re": ["a", "b"]}, "xname_re should be a list of length 3"),
        ({"xname_re": []}, "xname_re should be a list of length 3"),
    ],
)
def test_too_many_or_too_few_names(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        summarise(fit(), **given)


def test_tables_are_copies() -> None:
    found = summarise(fit())
    before = str(found)
    for table in found.tables:
        table.iloc[:] = "changed"
    assert str(found) == before


# ------------------------------------------------------------------------ 80 columns


def fits(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80
    assert not any(line.endswith(("\\", " ")) for line in text.splitlines())


@pytest.mark.parametrize(
    "stem", ["x", "income_of_the_household_in_thousands_", "z" * 100, "a b-c "]
)
@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_the_summary_fits_a_terminal(columns: int, stem: str) -> None:
    names = [f"{stem}{j}" for j in range(columns)]
    bars = {"g": bar(["Intercept", *names])}
    formula = f"y ~ {' + '.join(names)} + (1 + {' + '.join(names)} | g)"
    found = summarise(fit(dict.fromkeys(names, 1.5), bars, formula=formula))
    with pd.option_context("display.width", 40, "display.max_colwidth", 5, "display.max_rows", 2):
        text = str(found)
        page = found.as_html()
    fits(text)
    words = re.sub(r"\s", "", text)
    assert all(words.count(re.sub(r"\s", "", name)) >= 3 for name in names)
    assert all(page.count(name) >= 3 for name in names)
    cov = bars["g"].to_numpy()
    sd = np.sqrt(np.diag(cov))
    for a in range(columns + 1):
        assert f"{cov[a, a]:.6g}" in text
        for b in range(a):
            for shown in (text, page, found.as_latex()):
                assert f"{cov[a, b] / (sd[a] * sd[b]):.3f}" in shown
    for shown in (text, page, found.as_latex()):
        assert ("Correlations of the random effects" in shown) == (columns > 2)


def test_many_columns_and_bars() -> None:
    bars = {"g": bar([f"x{j}" for j in range(12)]), "g.1": bar(["x12", "x13"])}
    found = summarise(fit(bars=bars))
    fits(str(found))
    assert [len(part) for _, part in found.correlations] == [12, 2]
    assert [len(table) for table in found.tables[2:]] == [15, 12, 2]
    assert "Correlations of the random effects, g.1" in str(found)


def test_six_random_columns() -> None:
    names = [f"x{j}" for j in range(6)]
    found = summarise(fit(bars={"g": bar(names)}))
    fits(str(found))
    assert len(found.tables[1]) == 2 + 21
    assert list(found.tables[2].columns) == ["Levels", "Name", "Variance", "Std.Dev."]
    assert list(found.tables[3].index) == [f"{j + 1} {name}" for j, name in enumerate(names)]


@pytest.mark.parametrize("length", [5, 40, 90])
def test_long_names_of_everything(length: int) -> None:
    word = ("long_" * 20)[:length]
    found = summarise(
        fit(
            {word: 1e-300},
            {word: bar([word, "x"])},
            endog_name=word,
            formula=word * 5,
            factors={word: 10**9, "other": 3},
            group_name=word,
            llf=-1.2345678e15,
        ),
        title=word * 3,
    )
    fits(str(found))
    words = re.sub(r"\s", "", str(found))
    assert words.count(word) >= 11
    for value in ("-1234567800000000.0000", "1e-300", "1000000000"):
        assert value in words


def test_wide_numbers() -> None:
    fixed = {f"x{j}": sign * 1.23456e-105 for j, sign in enumerate((1, -1))}
    fits(str(summarise(fit(fixed, {"a_group_of_some_length": bar(["Intercept", "x", "z"])}))))


# ------------------------------------------------------------------------ boundaries, notes


def test_zero_variances() -> None:
    bars = {"g": bar(["Intercept", "x"], [[4.0, 0.0], [0.0, 0.0]])}
    found = fit(bars=bars, singular=True)
    found.bse_user.iloc[-2:] = np.nan
    summary = summarise(found)
    assert summary.tables[1].loc["g x Var"].to_list() == ["0", "", "", "", "", ""]
    assert summary.tables[2].iloc[1].to_list() == ["", "x", "0", "0", ""]
    assert "nan" not in str(summary).lower()
    assert "* Singular fit: a variance is exactly zero" in str(summary)
    fits(str(summary))


def test_notes() -> None:
    certificate = SimpleNamespace(digits_lost=9.3)
    found = fit(
        dropped={"missing x": 1200, "missing g": 3},
        aliased=("z1", "z2"),
        notes=(held_at_zero("(1 | g)"), *few_rows(62, 60, 2)),
        converged=False,
        optimizer_summary=SimpleNamespace(reason="it gave up", certificate=certificate),
    )
    text = str(summarise(found))
    fits(text)
    words = " ".join(text.split())
    for sentence in (
        "* Rows dropped, each counted under its first reason: missing x (1,200), missing g (3).",
        "columns before them: z1, z2.",
        "* (1 | g) lies within another bar",
        "* No more rows (62) than random effects (60) and fixed effects (2): the variances are",
        "* Not converged: it gave up. Do not trust these estimates",
        "* About 9 of 16 digits of the criterion are lost to rounding",
        "* Tests and limits of the fixed effects are large-sample (z)",
    ):
        assert sentence in words
    assert re.search(r"Converged: +No\n", text)
    assert "Singular" not in text
    plain = str(summarise(fit()))
    assert plain.count("\n* ") == 1


@pytest.mark.parametrize(("rows", "noted"), [(62, True), (63, False)])
def test_fewer_rows_than_random_effects(rows: int, noted: bool) -> None:
    found = few_rows(rows, 60, 2)
    assert len(found) == noted
    assert ("the variances are hardly determined" in str(found)) == noted


# ------------------------------------------------------------------------ HTML, LaTeX

NASTY = r"a<b> & $c_d$ 50% #{x}~^\ [e]|*"


def nasty() -> Any:
    return summarise(
        fit(
            {NASTY: 1.0},
            {NASTY: bar([NASTY, "x"])},
            formula=f"y ~ {NASTY}",
            endog_name=NASTY,
            dropped={NASTY: 1},
        ),
        title=NASTY,
    )


def test_html_is_escaped() -> None:
    found = nasty()
    page = found.as_html()
    assert page == found._repr_html_()
    texts = Cells(page).texts
    assert texts.count(NASTY) >= 5
    assert "a<b>" not in page
    assert f"Formula: y ~ {NASTY}" in texts
    for table in found.tables[1:3]:
        for cell in [*table.index, *table.columns, *table.to_numpy().ravel()]:
            assert not cell or cell in texts


def test_latex_is_escaped() -> None:
    found = nasty()
    text = found.as_latex("tab:fit")
    assert r"\label{tab:fit}" in text
    assert text.startswith("\\begin{table}\n\\caption{a\\textless{}b\\textgreater{} \\& \\$c\\_d")
    assert text.count(latex_text(NASTY)) >= 6
    assert NASTY not in text
    opened, closed = (re.findall(rf"\\{kind}{{(\w+)}}", text) for kind in ("begin", "end"))
    assert sorted(opened) == sorted(closed)
    assert opened.count("tabular") == 3
    for block in re.findall(r"\\begin{tabular}{(\w+)}(.*?)\\end{tabular}", text, re.DOTALL):
        columns, body = block
        rows = [row for row in body.replace(r"\hline", "").split(r"\\") if row.strip()]
        assert rows
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
            assert not row.strip().startswith(("[", "*"))
    braces = re.sub(r"\\[{}]", "", text)
    assert braces.count("{") == braces.count("}")


def test_every_special_of_latex_is_escaped() -> None:
    assert latex_text("&%$#_{}") == r"\&\%\$\#\_\{\}"
    assert latex_text("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    assert latex_text("[0.025") == "{[}0.025"
    assert latex_text("P>|z|") == r"P\textgreater{}\textbar{}z\textbar{}"
    assert latex_text("élan 1.5") == "élan 1.5"
