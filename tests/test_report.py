"""Reports: what they say, that it is right, that nothing in data can do anything, and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from reference import CASES, case, data_path
from test_refit import JOB, Place
from typer.testing import CliRunner, Result
from webpage import Page

import dmixed
from dmixed import cli
from dmixed.records import made_record, record_bytes
from dmixed.report import pictures
from dmixed.report.facts import SCHEMA, Facts, facts_of
from dmixed.results import MixedLMResults

SLEEP = "Reaction ~ Days + (Days | Subject)"
SECTIONS = [
    "At a glance",
    "Model",
    "Fixed effects",
    "Variance decomposition",
    "Random effects",
    "Diagnostics",
    "Convergence certificate",
    "Drift since the last fit",
    "Data and provenance",
]
DRAWN = {"dietox_vc", "pastes_nested", "cbpp_weights", "dyestuff2"}
EFFECTS, VARIANCES = (
    "Estimates of the fixed effects",
    "Variances of the random effects and of the error",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)], prog_name="dmixed")


def written(result: Any, tmp_path: Path, **options: Any) -> tuple[str, Page]:
    out = tmp_path / f"{len(os.listdir(tmp_path))}.html"
    result.report(out, **options)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def sleepstudy() -> pd.DataFrame:
    return pd.read_parquet("tests/reference/sleepstudy.parquet")


@pytest.fixture(scope="module")
def slope(sleepstudy: pd.DataFrame) -> MixedLMResults:
    return dmixed.lmer(SLEEP, sleepstudy)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "fit"
    dmixed.lmer(SLEEP, "tests/reference/sleepstudy.parquet", filters=[("Days", "<", 9)]).save(path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two versions of a model of two factors; estimates have drifted, and groups came and went."""
    text = JOB.replace("(1 + x | g)", "(1 + x | g) + (1 | h)") + "drift: {limit: 2.0}\n"
    place = Place(tmp_path_factory.mktemp("published"), text)
    place.add(0)
    place.done(0)
    place.add(1, shift=1.0)
    place.done(4)
    return place


# ------------------------------------------------------------------------ content


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section, of every model of the reference; pictures, which take a second, of some."""
    if name not in DRAWN:
        monkeypatch.setattr(pictures, "available", lambda: False)
    stored = case(name)
    given = {"weights": stored["weights"], "offset": stored["offset"]}
    result = dmixed.lmer(stored["formula"], data_path(name), **given)
    html, page = written(result, tmp_path)
    want = stored["fits"]["REML"]
    assert page.headings[0] == (1, f"Mixed model of {result.endog_name}")
    assert [x for level, x in page.headings if level == 2] == SECTIONS
    assert [level for level, _ in page.headings].count(1) == 1
    levels = [level for level, _ in page.headings]
    assert all(b - a <= 1 for a, b in pairwise(levels))

    rows = page.tables[EFFECTS][1:]
    assert [row[0] for row in rows] == list(result.fe_params.index)
    estimates = np.array([[float(x) for x in row[1:3]] for row in rows])
    np.testing.assert_allclose(estimates[:, 0], want["fixef"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(estimates[:, 1], np.sqrt(np.diag(want["vcov"])), rtol=1e-4)

    head, *rows = page.tables[VARIANCES]
    at = head.index("Variance")
    expected = [v for bar in want["bars"] for v in np.diag(bar["cov"])]
    shown = [float(row[at]) for row in rows]
    slack = 1e-4 * want["sigma2"]
    np.testing.assert_allclose(shown, [*expected, want["sigma2"]], rtol=1e-4, atol=slack)

    conditions = page.tables["Conditions of the certificate"][1:]
    assert [row[-1] for row in conditions] == ["yes"] * 4
    assert dict(page.tables["Search"])["Evaluations"] == str(result.optimizer_summary.evaluations)
    assert dict(page.tables["Method, rows and groups"])["Rows used"] == f"{result.nobs:,}"
    assert ("singular" in page.text.lower()) == want["singular"]
    assert bool(page.all("svg")) == (name in DRAWN)
    assert html.count("<svg") == html.count('role="img"')


def test_numbers(slope: MixedLMResults, sleepstudy: pd.DataFrame, tmp_path: Path) -> None:
    _, page = written(slope, tmp_path)
    days = dict((row[0], row[1:]) for row in page.tables[EFFECTS])["Days"]
    low, high = slope.conf_int().loc["Days"] * 0 + slope.fe_params["Days"]
    half = 1.959964 * slope.bse_fe["Days"]
    assert days == ["10.4673", "1.54579", "6.771", "< 0.0001", f"{low - half:.6g}",
                    f"{high + half:.6g}"]  # fmt: skip
    intercept = page.tables[VARIANCES][1]
    assert intercept[:4] == ["Subject", "18", "Intercept", "612.09"]
    variance, se = 612.09, float(slope.bse_re.iloc[0])
    limits = [float(x) for x in intercept[4].split(" to ")]
    expected = variance * np.exp(np.array([-1, 1]) * 1.959964 * se / variance)
    np.testing.assert_allclose(limits, expected, rtol=1e-4)
    assert page.tables[VARIANCES][2][6] == "0.066 with Intercept"

    effects = page.tables["The 18 levels of Subject, in the order of Intercept"]
    table = slope.ranef_table().sort_values("Intercept")
    assert [row[0] for row in effects[1:]] == list(table["Subject"].astype(str))
    np.testing.assert_allclose([float(r[1]) for r in effects[1:]], table["Intercept"], rtol=1e-3)
    lower = table["Days"] - 1.959964 * table["se(Days)"]
    shown = [float(row[4].split(" to ")[0]) for row in effects[1:]]
    np.testing.assert_allclose(shown, lower, rtol=1e-3)

    finding = slope.diagnose().findings[0]
    assert finding.what in page.text
    assert finding.advice in page.text


@pytest.mark.parametrize("weights", [None, "w"])
def test_shares_are_those_of_the_rows(weights: str | None) -> None:
    """Mean of z' Psi z over the rows, and the variance of X beta, from the rows themselves."""
    rng = np.random.default_rng(5)
    n = 400
    g, h, x = rng.integers(0, 20, n), rng.integers(0, 9, n), rng.normal(3.0, 2.0, n)
    b, c = rng.normal(size=(20, 2)), rng.normal(size=9)
    y = 1 + 0.5 * x + b[g, 0] + 0.5 * b[g, 1] * x + 0.7 * c[h] + rng.normal(size=n)
    data = pd.DataFrame({"y": y, "x": x, "g": g, "h": h, "w": rng.uniform(0.5, 2.0, n)})
    result = dmixed.lmer("y ~ x + (1 + x | g) + (1 | h)", data, weights=weights)
    facts = facts_of(result)
    w = np.ones(n) if weights is None else data["w"].to_numpy()
    Z = np.column_stack([np.ones(n), x])
    cov = result.varcorr()
    of_g = np.average(np.einsum("ni,ij,nj->n", Z, cov["g"].to_numpy(), Z), weights=w)
    of_h, error = cov["h"].iloc[0, 0], np.average(result.scale / w, weights=w)
    total = of_g + of_h + error
    shares = [x.share for x in facts.components]
    np.testing.assert_allclose(shares, [of_g / total, of_h / total, error / total], rtol=1e-9)
    line = Z @ result.fe_params.to_numpy()
    fixed = np.average((line - np.average(line, weights=w)) ** 2, weights=w)
    expected = np.array([fixed, fixed + of_g + of_h]) / (fixed + total)
    np.testing.assert_allclose(facts.explained, expected, rtol=1e-9)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """No share of what an offset or a component of contrasts explains; no fixed effects at all."""
    stored = case("orthodont_offset")
    result = dmixed.lmer(stored["formula"], data_path("orthodont_offset"), offset=stored["offset"])
    _, page = written(result, tmp_path)
    assert "Explained by the fixed part" not in page.text
    assert "Share" in page.tables[VARIANCES][0]
    data = pd.read_parquet("tests/reference/dyestuff.parquet")
    none = dmixed.lmer("Yield ~ 0 + (1 | Batch)", data)
    _, page = written(none, tmp_path)
    assert "no fixed effects" in page.text
    assert EFFECTS not in page.tables


def test_many_columns_and_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    n = 900
    data = pd.DataFrame(rng.normal(size=(n, 4)), columns=list("abcd"))
    data["g"], data["h"] = rng.integers(0, 40, n), rng.integers(0, 7, n)
    data["y"] = (
        rng.normal(size=(40, 5))[data.g, 0]
        + np.einsum("ni,ni->n", rng.normal(size=(40, 4))[data.g], data[list("abcd")])
        + rng.normal(size=7)[data.h]
        + rng.normal(size=n)
    )
    result = dmixed.lmer("y ~ a + (a + b + c + d | g) + (1 | h)", data, reml=False)
    _, page = written(result, tmp_path)
    triangle = page.tables["Correlations of the random effects by g"]
    cov = result.varcorr()["g"].to_numpy()
    sd = np.sqrt(np.diag(cov))
    assert triangle[3][2] == f"{cov[2, 1] / sd[2] / sd[1]:.3f}"
    assert "Correlation" not in page.tables[VARIANCES][0]
    assert "The 10 least and the 10 greatest of 40 levels of g, in the order of Intercept" in (
        page.tables
    )
    assert len(page.tables["The 7 levels of h"]) == 8
    titles = [x for x in page.texts if x.startswith("Random effects by ")]
    assert titles == ["Random effects by g: Intercept, a", "Random effects by g: b, c",
                      "Random effects by g: d", "Random effects by h"]  # fmt: skip
    assert "AIC" in dict(page.tables["Method, rows and groups"])


def test_singular(tmp_path: Path) -> None:
    data = pd.read_parquet("tests/reference/dyestuff2.parquet")
    _, page = written(dmixed.lmer("Yield ~ 1 + (1 | Batch)", data), tmp_path)
    assert "The fit is singular" in page.text
    assert "Caution: singular" in page.text
    row = page.tables[VARIANCES][1]
    assert row[page.tables[VARIANCES][0].index("Variance")] == "0"
    assert page.tables[VARIANCES][0].count("95% limits") == 1
    assert row[page.tables[VARIANCES][0].index("95% limits")] == ""


def test_not_converged(sleepstudy: pd.DataFrame, tmp_path: Path) -> None:
    model = dmixed.MixedLM.from_formula("Reaction ~ Days", sleepstudy, groups="Subject")
    with pytest.warns(dmixed.ConvergenceWarning):
        result = model.fit(method="nm", maxiter=2)
    _, page = written(result, tmp_path)
    assert "must not be used" in page.text
    assert "no" in [row[-1] for row in page.tables["Conditions of the certificate"]]


def test_residuals(saved: Path, slope: MixedLMResults, tmp_path: Path) -> None:
    """Of the rows of the fit, of data, or not at all."""
    _, without = written(slope, tmp_path)
    assert "Residuals were not looked at" in without.text
    _, own = written(slope, tmp_path, residuals=True)
    assert "Of the rows of the fit." in own.text
    resid = slope.resid / np.sqrt(slope.scale)
    smallest, largest = re.search(
        r"smallest standardised residual is (\S+) and the largest (\S+);", own.text
    ).groups()
    assert float(smallest) == pytest.approx(resid.min(), abs=0.01)
    assert float(largest) == pytest.approx(resid.max(), abs=0.01)
    assert "Caution: residuals" in own.text  # the outlier is found
    assert "Caution: residuals" not in without.text
    out = tmp_path / "data.html"
    done = run(saved, "--out", out, "--data", "tests/reference/sleepstudy.parquet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "180 residuals of Reaction" in Page(out.read_text()).text


def test_a_million_groups_make_few_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    G = 1_000_000
    g = np.concatenate([np.arange(G), rng.integers(0, G, 100_000)])
    data = pd.DataFrame({"y": rng.normal(size=G)[g] + rng.normal(size=len(g)), "g": g})
    html, page = written(dmixed.lmer("y ~ 1 + (1 | g)", data), tmp_path)
    table = page.tables["The 10 least and the 10 greatest of 1,000,000 levels of g"]
    assert len(table) == 22
    assert table[11][0] == "… 999,980 between …"
    assert len(html) < 200_000


def test_groups_on_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    g, x = rng.integers(0, 300, 3000), rng.normal(size=3000)
    y = x + rng.normal(size=300)[g] + rng.normal(size=3000)
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"y": y, "x": x, "g": g}).to_parquet(path)
    here = dmixed.lmer("y ~ x + (1 | g)", path)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        there = dmixed.lmer("y ~ x + (1 | g)", path, client=client, evaluate_on="workers")
        pages = [written(x, tmp_path, residuals=True)[1] for x in (here, there)]
    for caption in (EFFECTS, "The 10 least and the 10 greatest of 300 levels of g"):
        assert pages[0].tables[caption] == pages[1].tables[caption]


# ------------------------------------------------------------------------ safety

EVIL = "<script>alert('x')</script>\"'&<!-- \u202e $\\frac{a}$ </style>"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """Whatever a user or data may name, named as badly as can be."""
    rng = np.random.default_rng(1)
    n = 240
    data = pd.DataFrame({
        f"y{EVIL}": rng.normal(size=n),
        f"g{EVIL}": np.array([f"{EVIL} {i}" for i in range(30)])[np.arange(n) % 30],
        f"f{EVIL}": rng.choice([f"{EVIL} a", f"{EVIL} b", "c"], n),
    })  # fmt: skip
    data[f"y{EVIL}"] += rng.normal(size=30)[np.arange(n) % 30]
    formula = f"`y{EVIL}` ~ `f{EVIL}` + (1 | `g{EVIL}`)"
    folder = tmp_path_factory.mktemp("evil")
    return written(dmixed.lmer(formula, data), folder, residuals=True)


def test_names_do_nothing(evil: tuple[str, Page]) -> None:
    html, page = evil
    assert not [name for name, _ in page.tags if name in ("script", "b", "iframe", "img", "object")]
    assert "<!--" not in html.removeprefix("<!doctype html>")
    assert html.count("</style>") == 1
    assert "\u202e" not in html
    assert "alert" in page.text  # it is shown
    for _, attributes in page.tags:
        assert not [x for x in attributes if x.startswith("on")]


def test_nothing_is_loaded(evil: tuple[str, Page]) -> None:
    html, page = evil
    for name, attributes in page.tags:
        for key in ("href", "src", "xlink:href", "action", "data"):
            place = attributes.get(key) or "#"
            assert place.startswith(("#", "data:")), (name, place)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    policy = next(x["content"] for x in page.all("meta") if "http-equiv" in x)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_ids_differ(evil: tuple[str, Page]) -> None:
    html, page = evil
    ids = [x["id"] for _, x in page.tags if "id" in x]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', html))
    assert used
    assert used <= set(ids)
    labelled = {x["aria-labelledby"] for _, x in page.tags if "aria-labelledby" in x}
    assert labelled <= set(ids)


def test_alternatives_have_numbers(evil: tuple[str, Page], slope: Any, tmp_path: Path) -> None:
    for _, page in (evil, written(slope, tmp_path, residuals=True)):
        seen = [x["aria-label"] or "" for x in page.all("svg")]
        assert len(seen) == len(set(seen)) == 6
        assert all(len(re.findall(r"\d", text)) > 3 for text in seen)
    assert any("from -40.4 to 34.89" in text for text in seen)


def test_tables_have_captions_and_scopes(evil: tuple[str, Page]) -> None:
    _, page = evil
    assert len(page.all("table")) == len(page.all("caption")) == len(page.tables) > 7
    assert all(x.get("scope") in ("row", "col") for x in page.all("th"))
    for rows in page.tables.values():
        assert len({len(row) for row in rows}) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_credentials_are_not_shown(saved: Path, tmp_path: Path) -> None:
    result = MixedLMResults.load(saved)
    state = result._origin.sources[0]
    place = "s3://key:secret@bucket/rows"
    object.__setattr__(state, "location", place)
    html, page = written(result, tmp_path)
    assert "secret" not in html
    assert "s3://bucket/rows" in page.text


# ------------------------------------------------------------------------ origin


def test_the_saved_fit_knows_its_rows(saved: Path, tmp_path: Path) -> None:
    result = MixedLMResults.load(saved)
    _, page = written(result, tmp_path)
    row = dict(zip(*page.tables["Data of the fit"], strict=True))
    path = os.path.abspath("tests/reference/sleepstudy.parquet")
    assert row["Place"] == path
    assert "Days" in row["Filter"]
    assert (row["Files"], row["Bytes"]) == ("1", f"{os.path.getsize(path):,}")
    origin = dict(page.tables["Origin"])
    assert origin["Fitted by"] == f"dmixed {dmixed.__version__}"
    assert origin["Date of the fit"] == result._origin.created
    again = tmp_path / "again"
    result.save(again)  # saved again, it is the same fit
    assert MixedLMResults.load(again)._origin == result._origin


def test_a_fit_in_memory(slope: MixedLMResults, tmp_path: Path) -> None:
    _, page = written(slope, tmp_path)
    assert page.tables["Data of the fit"][1][:2] == ["pandas", "in memory"]
    path = tmp_path / "gone.parquet"
    shutil.copy("tests/reference/sleepstudy.parquet", path)
    result = dmixed.lmer(SLEEP, path)
    path.unlink()
    _, page = written(result, tmp_path)
    assert result.fe_params.to_numpy() == pytest.approx(slope.fe_params.to_numpy())
    assert [x for x in page.headings if x[0] == 2][-1][1] == SECTIONS[-1]


def test_the_same_fit_has_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    for name in "ab":
        data = "tests/reference/sleepstudy.parquet"
        assert run(saved, "--data", data, "--out", tmp_path / name).exit_code == 0
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "path", "font.size": 5, "text.usetex": False}):
        assert run(saved, "--data", data, "--out", tmp_path / "c").exit_code == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b == c
    assert b"<svg" in a


def test_no_figure_is_left_open(slope: MixedLMResults, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    written(slope, tmp_path, residuals=True)
    assert plt.get_fignums() == before


def test_without_matplotlib(
    slope: MixedLMResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "available", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    html, page = written(slope, tmp_path, residuals=True)
    assert "<svg" not in html
    assert "pip install 'dmixed[plot]'" in page.text
    told = re.search(r"Pictures are missing.*?installed: (.*?)\. To have", page.text)
    assert told is not None
    assert len(told[1].split("; ")) == 6
    assert page.text.count("This picture is missing") == 6
    assert "from -40.4 to 34.89" in page.text


# ------------------------------------------------------------------------ published results


def test_published(published: Place, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = run(published.results, "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    page = Page(out.read_text())
    assert [x for level, x in page.headings if level == 2] == SECTIONS
    result = published.read("result.json")
    rows = {row[0]: row[1:] for row in page.tables[EFFECTS][1:]}
    for name, value in result["fe_params"].items():
        assert float(rows[name][0]) == pytest.approx(value, rel=1e-5)
    effects = pd.read_parquet(published.current / "random_effects" / "00-g")
    table = page.tables["The 10 least and the 10 greatest of 32 levels of g, in the order of "
                        "Intercept"]  # fmt: skip
    assert float(table[1][1]) == pytest.approx(effects["Intercept"].min(), rel=1e-3)
    assert table[1][0] == effects.sort_values("Intercept")["g"].iloc[0]
    assert any("levels of h" in caption for caption in page.tables)

    drift = published.read("drift.json")
    caption = "Estimates before and now; changes in standard errors of the fit before"
    shown = page.tables[caption][1:]
    assert [row[0] for row in shown] == [x["name"] for x in drift["estimates"]]
    for row, x in zip(shown, drift["estimates"], strict=True):
        assert float(row[1]) == pytest.approx(x["before"]["estimate"], rel=1e-5)
        assert float(row[3]) == pytest.approx(x["now"]["estimate"], rel=1e-5)
        assert row[4] == f"{x['now']['lower']:.5g} to {x['now']['upper']:.5g}"
        assert row[5] == f"{x['change']:+.2f}"
    assert f"{drift['largest_change']:.2f} standard errors, beyond the limit 2" in page.text
    groups = {row[0]: row[1:] for row in page.tables["Levels that are new and gone"][1:]}
    g = drift["groups"]["g"]
    assert groups["g"][:4] == ["32", str(g["new"]), "0", ", ".join(g["first_new"])]
    assert any((x["aria-label"] or "").startswith("Changes of") for x in page.all("svg"))
    assert len(page.tables["Parts of the moments, as they were added"]) == 3
    origin = dict(page.tables["Origin"])
    assert origin["Published"] == published.pointer["published"]
    assert published.pointer["version"] in origin["Report of"]


def test_first_version(tmp_path: Path) -> None:
    place = Place(tmp_path / "job")
    place.add(0)
    place.done(0)
    assert run(place.results, "--out", tmp_path / "r.html").exit_code == 0
    page = Page((tmp_path / "r.html").read_text())
    assert "Not compared: the first one" in page.text
    assert not [x for x in page.tables if x.startswith("Estimates before")]


@pytest.mark.parametrize("name", ["report.json", "drift.json", "provenance.json"])
def test_damaged_version(published: Place, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "results"
    shutil.copytree(published.results, copy)
    file = copy / published.pointer["folder"] / name
    file.write_bytes(file.read_bytes().replace(b"f[T.b]", b"f[T.c]") + b" ")
    done = run(copy, "--out", tmp_path / "r.html")
    assert_refused(done, name, "checksum")
    assert not (tmp_path / "r.html").exists()


def test_version_without_a_report(published: Place, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(published.results, copy)
    path = copy / published.pointer["version"] / "version.json"
    found = json.loads(path.read_text())
    del found["files"]["report.json"], found["sha256"]
    found["sha256"] = hashlib.sha256(json.dumps(found).encode("ascii")).hexdigest()
    path.write_text(json.dumps(found))
    assert_refused(run(copy, "--out", tmp_path / "r.html"), "has no report.json", "dmixed refit")


def test_facts_are_checked(slope: MixedLMResults) -> None:
    facts = facts_of(slope)
    content = record_bytes(facts)
    again = made_record(Facts, content, "report.json", SCHEMA)
    assert record_bytes(again) == content
    plain = json.loads(content)
    del plain["sha256"]
    plain["components"][0]["se"] = [1.0]
    plain["sha256"] = hashlib.sha256(json.dumps(plain).encode("ascii")).hexdigest()
    with pytest.raises(dmixed.DataError, match=r"report.json: components: must be"):
        made_record(Facts, json.dumps(plain).encode(), "report.json", SCHEMA)


# ------------------------------------------------------------------------ refusals


def assert_refused(done: Result, *words: str) -> None:
    assert done.exit_code == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("dmixed: error: ")
    for word in words:
        assert word in lines[0]


def test_what_a_directory_lacks(published: Place, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert_refused(run(tmp_path / "no", "--out", out), "is not there, or empty", "--save")
    version = published.results / published.pointer["version"]
    assert_refused(run(version, "--out", out), "is one version", "current.json")
    moments = tmp_path / "moments"
    shutil.copytree(saved, moments)
    (moments / "result.json").unlink()
    assert_refused(run(moments, "--out", out), "moments without a fit")
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(saved / "result.json", plain)
    assert_refused(run(plain, "--out", out), "no moments", "--save")
    (plain / "result.json").rename(plain / "notes.txt")
    assert_refused(run(plain, "--out", out), "has none of them")
    data = "tests/reference/sleepstudy.parquet"
    assert_refused(run(published.results, "--out", out, "--data", data), "hold no moments")
    cbpp = "tests/reference/cbpp.parquet"
    assert_refused(run(saved, "--out", out, "--data", cbpp), "Reaction")
    assert not out.exists()


def test_nothing_is_written_over(
    saved: Path, slope: MixedLMResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.html"
    out.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(MixedLMResults, "load", None)  # it would be called
        assert_refused(run(saved, "--out", out), "is there already", "--force")
    with pytest.raises(dmixed.DataError, match="force=True"):
        slope.report(out)
    assert out.read_text() == "mine"
    assert_refused(run(saved, "--out", tmp_path), "is a directory")
    assert_refused(run(saved, "--out", f"{out}/"), "is a directory")
    done = run(saved, "--out", out, "--force")
    assert (done.exit_code, done.stdout) == (0, f"wrote {out}\n")
    assert out.read_text().startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["r.html"]


def test_relative_paths(
    slope: MixedLMResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slope.report("r.html")
    slope.report("new/r.html")
    assert (tmp_path / "r.html").read_bytes() == (tmp_path / "new" / "r.html").read_bytes()


def test_to_a_uri(slope: MixedLMResults) -> None:
    import fsspec

    slope.report("memory://reports/r.html")
    fs = fsspec.filesystem("memory")
    assert fs.cat_file("/reports/r.html").startswith(b"<!doctype html>")
    with pytest.raises(dmixed.DataError, match=r"memory://reports/r.html: is there already"):
        slope.report("memory://reports/r.html")
    slope.report("memory://reports/r.html", force=True)
    fs.rm("/reports", recursive=True)


def test_help() -> None:
    done = CliRunner().invoke(cli.app, ["report", "--help"], prog_name="dmixed")
    assert done.exit_code == 0
    assert "dmixed report fit-1 --out report.html" in done.stdout
