"""diagnose() on constructed cases, and HTML for notebooks that holds whatever names hold."""

from __future__ import annotations

import html.parser
import re
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import markup

EVIL = "<script>alert('x')</script> & \"y\""


def rows(groups: int, n: int, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, n)
    x = rng.normal(size=n)
    y = x + rng.normal(size=groups)[g] + rng.normal(size=n)
    return pd.DataFrame({"y": y, "x": x, "g": g})


class Checked(html.parser.HTMLParser):
    """Tags must be closed in order; no scripts and nothing from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in ("script", "img", "link", "iframe")
        given = dict(attrs)
        assert not {"src", "href", "onclick"} & set(given)
        style = given.get("style", "")
        assert "background" not in style  # notebooks may be dark
        assert not re.search(r"(^|;)\s*color", style)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(markup_text: str) -> str:
    parser = Checked()
    parser.feed(markup_text)
    assert not parser.open
    return parser.text


def topics(result: Any, **options: Any) -> dict[str, str]:
    found = result.diagnose(**options)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert text_of(found._repr_html_())
    order = ["problem", "caution", "note"]
    assert [x.severity for x in found] == sorted((x.severity for x in found), key=order.index)
    assert found.ok == all(x.severity == "note" for x in found)
    return {x.topic: f"{x.severity}: {x.what} {x.advice}" for x in found}


def test_nothing_to_report():
    fit = dmixed.lmer("y ~ x + (1 | g)", rows(60, 900))
    found = fit.diagnose()
    assert len(found) == 0
    assert "Nothing to report" in str(found)
    assert "Nothing to report" in text_of(found._repr_html_())


def test_singular_says_which_variance():
    data = rows(40, 800)
    flat = data.assign(y=data.y - data.groupby("g").y.transform("mean"))
    zero = topics(dmixed.lmer("y ~ x + (1 | g)", flat))
    assert "the variance of g is zero" in zero["singular"]
    assert "leave out the bar" in zero["singular"]
    line = data.assign(y=data.y + 2 * data.x * data.groupby("g").y.transform("mean"))
    rng = np.random.default_rng(1)
    u = rng.normal(size=40)[line.g]
    line["y"] = u * (1 + 0.5 * line.x) + rng.normal(size=800)
    fit = dmixed.lmer("y ~ x + (x | g)", line)
    assert fit.singular
    assert "Intercept and x by g have the correlation +1" in topics(fit)["singular"]
    assert "Intercept and x by g have the correlation +1" in " ".join(str(fit).split())
    assert "||" in topics(fit)["singular"]


def test_rows_dropped_and_columns_left_out():
    data = rows(60, 900).assign(copy=lambda d: 2 * d.x - 1)
    data.loc[::4, "x"] = np.nan
    found = topics(dmixed.lmer("y ~ x + copy + (1 | g)", data))
    assert found["dropped"].startswith("caution: 225 of 900 rows (25.0%) were dropped")
    assert "x: missing (225)" in found["dropped"]
    assert "before them: copy" in found["aliased"]
    few = data.drop(columns="copy").dropna().reset_index(drop=True)
    few.loc[0, "x"] = np.nan
    assert topics(dmixed.lmer("y ~ x + (1 | g)", few))["dropped"].startswith("note: 1 of 675")


def test_few_groups_and_a_giant_one():
    assert topics(dmixed.lmer("y ~ x + (1 | g)", rows(3, 300)))["groups"].startswith(
        "caution: g has 3 levels"
    )
    assert topics(dmixed.lmer("y ~ x + (1 | g)", rows(12, 300)))["groups"].startswith(
        "note: g has 12 levels"
    )
    giant = rows(60, 900).assign(g=lambda d: np.where(d.index < 400, 0, d.g))
    found = topics(dmixed.lmer("y ~ x + (1 | g)", giant))
    assert re.search(r"One of 60 groups of g has 4\d% of the rows", found["groups"])
    single = rows(2_000, 1_500)
    assert "rows on average" in topics(dmixed.lmer("y ~ x + (1 | g)", single))["groups"]


def test_not_converged():
    model = dmixed.MixedLM.from_formula("y ~ x", rows(60, 900), groups="g", re_formula="~x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        fit = model.fit(method="nm", maxiter=2)
    assert not fit.converged
    found = topics(fit)
    assert found["convergence"].startswith("problem: The optimum is not certified")
    assert "fit without method=" in found["convergence"]


def test_collinear_held_and_digits():
    data = rows(60, 900).assign(z=lambda d: d.x + 1e-3 * np.random.default_rng(2).normal(size=900))
    assert (
        "x and z have a correlation"
        in topics(dmixed.lmer("y ~ x + z + (1 | g)", data))["collinear"]
    )
    model = dmixed.MixedLM.from_formula("y ~ x", data, groups="g")
    free = dmixed.MixedLMParams.from_components([1.0, 0.0], np.ones((1, 1)))
    assert "1 parameter was held" in topics(model.fit(free=free))["held"]
    huge = data.assign(y=data.y + 1e9 * data.g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        fit = dmixed.lmer("y ~ x + (1 | g)", huge)
    lost = fit.optimizer_summary.certificate.digits_lost
    assert ("digits" in topics(fit)) == (lost > 6)


def test_outliers_only_when_asked():
    data = rows(60, 900)
    data.loc[5, "y"] += 60.0
    fit = dmixed.lmer("y ~ x + (1 | g)", data)
    assert "residuals" not in topics(fit)
    assert topics(fit, residuals=True)["residuals"].startswith("caution: 1 of 900 residuals")


# --------------------------------------------------------------------------- HTML


@pytest.fixture(scope="module")
def evil() -> pd.DataFrame:
    data = rows(30, 400).rename(columns={"g": EVIL, "x": f"{EVIL} x"})
    data.loc[0, f"{EVIL} x"] = np.nan
    return data


FORMULA = f"y ~ `{EVIL} x` + (1 | `{EVIL}`)"


def test_html_of_everything_is_escaped(evil, tmp_path):
    moments = dmixed.collect(FORMULA, evil)
    store = moments.save(tmp_path / "<b>store")
    model = dmixed.MixedLM.from_formula(f"y ~ `{EVIL} x`", evil, groups=EVIL, missing="drop")
    things = [
        moments, moments.model(), store, model, dmixed.plan(FORMULA, evil), moments.fit(),
        moments.fit().diagnose(),
    ]  # fmt: skip
    for thing in things:
        text = text_of(thing._repr_html_())
        assert EVIL in text or EVIL in text.replace("\n", " "), type(thing)
    assert "399" in text_of(moments._repr_html_())
    assert f"1 dropped: {EVIL} x: missing" in text_of(moments._repr_html_())
    assert "<b>store" in text_of(store._repr_html_())


def test_html_reads_no_rows(evil, tmp_path):
    evil.to_parquet(tmp_path / "rows.parquet")
    model = dmixed.MixedLM.from_formula(
        f"y ~ `{EVIL} x`", tmp_path / "rows.parquet", groups=EVIL, missing="drop"
    )
    assert "not read yet" in text_of(model._repr_html_())
    assert "moments" not in vars(model)
    model.fit()
    assert "399" in text_of(model._repr_html_())


def test_long_tables_show_the_last_rows():
    shown = markup.table(("i",), [(i,) for i in range(100)], caption="numbers")
    text = text_of(shown)
    assert "numbers (the last 20 of 100)" in text
    assert "99" in text
    assert "79" not in text


def test_text_of_long_names_fits(evil):
    data = evil.rename(columns={EVIL: "g" * 120, f"{EVIL} x": "x" * 150})
    fit = dmixed.lmer(f"y ~ {'x' * 150} + ({'x' * 150} | {'g' * 120})", data)
    for text in (str(fit), str(fit.diagnose()), str(dmixed.plan(fit.formula, data))):
        assert max(map(len, text.splitlines())) <= 80
