"""Plots: what is drawn, that it can be read, and that nothing large comes here."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import dask.dataframe as dd
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import dmixed
from dmixed.binned import Binned
from dmixed.errors import DataError, DmixedError, NotSupportedError
from dmixed.plots import blups, partial, residuals, search
from dmixed.plots.canvas import BLUE, RED, effect_on, model_lines, plain, told_apart

mpl.use("Agg")
import matplotlib.pyplot as plt

SLEEP = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def sleepstudy() -> pd.DataFrame:
    return pd.read_parquet("tests/reference/sleepstudy.parquet")


@pytest.fixture(scope="module")
def slope(sleepstudy: pd.DataFrame) -> Any:
    return dmixed.lmer(SLEEP, sleepstudy)


def rows(groups: int, n: int, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, n)
    x = rng.normal(5.0, 2.0, n)
    u = rng.normal(size=(groups, 2)) * [1.0, 0.4]
    y = 3 + 0.5 * x + u[g, 0] + u[g, 1] * (x - 5) + rng.normal(size=n)
    return pd.DataFrame({"y": y, "x": x, "g": g})


@pytest.fixture(scope="module")
def many() -> Any:
    return dmixed.lmer("y ~ x + (x | g)", rows(3_000, 20_000))


LONG = [f"Department of very long names, number {i} $\\frac{{x}}$ <b>&\nof 40" for i in range(40)]


@pytest.fixture(scope="module")
def odd() -> Any:
    """A singular fit with names and labels that are hard to show."""
    rng = np.random.default_rng(3)
    n = 320
    data = pd.DataFrame({
        "dep $x_": np.array(LONG)[np.arange(n) % 40],
        "t": rng.normal(size=n),
        "arm": rng.choice(["a very long label of an arm, which goes on", "b$", "_c"], n),
    })  # fmt: skip
    data["y_$^2"] = rng.normal(size=n) + 0.3 * data.t + (data.arm == "b$")
    mean = data.groupby("dep $x_")["y_$^2"].transform("mean")
    data["y_$^2"] -= mean
    return dmixed.lmer("`y_$^2` ~ t * arm + (t | `dep $x_`)", data)


def array(axes: Any) -> list[Any]:
    return [x for x in np.asarray(axes, dtype=object).ravel() if x.get_visible()]


def assert_readable(axes: Any) -> None:
    """Labels and titles are there and inside the figure; tick labels do not overlap."""
    figure = array(axes)[0].figure
    figure.draw_without_rendering()
    renderer, whole = figure.canvas.get_renderer(), figure.bbox.padded(1.0)
    for ax in array(axes):
        box = ax.get_window_extent(renderer)
        assert box.width > 60
        assert box.height > 60
        texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis, way in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            labels = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            ends = [t.get_window_extent(renderer) for t in labels]
            low, high = (box.x0, box.x1) if way == "x" else (box.y0, box.y1)
            shown = [
                (getattr(e, f"{way}0"), getattr(e, f"{way}1"), t)
                for e, t in zip(ends, labels, strict=True)
                if low - 1 <= (getattr(e, f"{way}0") + getattr(e, f"{way}1")) / 2 <= high + 1
            ]
            shown.sort(key=lambda x: x[:2])
            for a, b in pairwise(shown):
                assert a[1] <= b[0] + 0.5, (a[2].get_text(), b[2].get_text())
            texts += [t for *_, t in shown]
        for text in texts:
            if text.get_text() and text.get_visible():
                own = text.get_window_extent(renderer)
                assert whole.x0 <= own.x0, text.get_text()
                assert own.x1 <= whole.x1, text.get_text()
                assert whole.y0 <= own.y0, text.get_text()
                assert own.y1 <= whole.y1, text.get_text()
    if figure._suptitle is not None:
        top = figure._suptitle.get_window_extent(renderer)
        assert all(top.y0 >= ax.title.get_window_extent(renderer).y1 - 1 for ax in array(axes))


# --------------------------------------------------------------------------- bins that add

numbers = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False) | st.sampled_from([0.0, 1.5, -2.0]),
    min_size=1, max_size=60,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(0, 60), st.sampled_from([4, 64, 4096]))
def test_bins_do_not_depend_on_the_parts(values, cut, limit):
    x = np.array(values)[:, None]
    w = np.arange(len(x), dtype=float)
    whole = Binned.of(x, (limit,), w)
    both = Binned.of(x[:cut], (limit,), w[:cut]) + Binned.of(x[cut:], (limit,), w[cut:])
    assert both.exponents == whole.exponents
    assert np.array_equal(both.bins, whole.bins)
    assert np.array_equal(both.counts, whole.counts)
    assert np.allclose(both.sums, whole.sums)
    assert whole.total == len(x)
    assert whole.bins.max() - whole.bins.min() < limit
    for p in (0.0, 0.3, 1.0):  # of the points, to a bin
        exact = np.sort(x[:, 0])[max(int(np.ceil(p * len(x))) - 1, 0)]
        assert abs(whole.quantiles(np.array([p]))[0] - exact) <= whole.widths[0]


def test_bins_of_two_columns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5_000, 2)) * [1e-8, 1e8]
    found = Binned.of(x, (64, 32))
    assert (np.ptp(found.bins, axis=0) < [64, 32]).all()
    assert (np.ptp(found.bins, axis=0) >= [32, 16]).all()  # and not twice as wide
    mean = found.counts @ found.centres / found.total
    assert np.allclose(mean, x.mean(axis=0), atol=0.05 * x.std(axis=0))


# --------------------------------------------------------------------------- texts


def test_texts_are_drawn_as_they_are():
    assert plain("a$b\n\tc\x1b") == r"a\$b c"
    assert plain("x" * 50, 11) == "xxxxxx…xxxx"
    assert told_apart(["a", "b"], 5) == ["a", "b"]
    found = told_apart(LONG, 26)
    assert len(set(found)) == 40
    assert max(len(x.replace("\\", "")) for x in found) <= 26
    assert "number 7" in found[7]
    assert len(told_apart(["same" * 20] * 2, 10)) == 2
    assert len(model_lines("y ~ " + " + ".join(f"x{i}" for i in range(200)), 50)) == 2


# --------------------------------------------------------------------------- random effects


def test_caterpillar(slope):
    axes = slope.plot.caterpillar()
    table = slope.ranef_table().sort_values("Intercept")
    assert axes.shape == (2,)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == table["Subject"].tolist()
    for ax, name in zip(axes, ("Intercept", "Days"), strict=True):
        (bars,) = ax.containers
        assert np.allclose(bars.lines[0].get_xdata(), table[name])
        ends = np.array([s[:, 0] for s in bars.lines[2][0].get_segments()])
        half = norm.ppf(0.975) * table[f"se({name})"].to_numpy()
        assert np.allclose(ends, np.column_stack([table[name] - half, table[name] + half]))
    assert axes[1].get_xlabel() == "Reaction per unit of Days"
    assert SLEEP in axes[0].figure.get_suptitle()
    assert_readable(axes)
    one = slope.plot.caterpillar("Subject", "Days", alpha=0.5)
    assert one.get_title() == f"Days by Subject, 50% intervals\n{SLEEP}"
    assert_readable(one)


def test_caterpillar_of_many(many):
    table = many.ranef_table()
    ax = many.plot.caterpillar(effects="Intercept", k=5, strip=False)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    ordered = table.sort_values("Intercept")["g"].astype(str).tolist()
    assert labels[:10] == ordered[:5] + ordered[-5:]
    assert labels[10] == f"… {len(table) - 10:,} between …"
    assert_readable(ax)
    strip = many.plot.caterpillar(effects="Intercept")  # by default
    assert f"{len(table):,} levels" in strip.get_xlabel()
    x, y = strip.lines[0].get_data()
    exact = np.quantile(table["Intercept"], x / 100, method="inverted_cdf")
    assert np.allclose(y, exact, atol=2 * np.ptp(table["Intercept"]) / blups.FINE)
    band = strip.collections[0].get_paths()[0].vertices
    middle = band[np.isclose(band[:, 0], 50.0), 1]
    near = table.sort_values("Intercept")["se(Intercept)"]
    near = near.iloc[int(0.495 * len(table)) : int(0.505 * len(table))]
    assert np.ptp(middle) == pytest.approx(2 * norm.ppf(0.975) * near.mean(), rel=0.03)
    assert_readable(many.plot.caterpillar())


def test_caterpillar_of_hard_labels_and_no_effect(odd):
    assert odd.singular
    axes = odd.plot.caterpillar()
    assert_readable(axes)
    assert len({t.get_text() for t in axes[0].get_yticklabels()}) == 25
    assert_readable(odd.plot.caterpillar(k=40, effects="t"))  # labels that have little room
    none = rows(30, 300)
    none["y"] -= none.groupby("g")["y"].transform("mean")
    zero = dmixed.lmer("y ~ 1 + (1 | g)", none)
    ax = zero.plot.caterpillar()
    assert "estimated as zero" in ax.get_xlabel()
    assert_readable(ax)


def test_several_factors_and_wrong_names(slope):
    data = pd.read_parquet("tests/reference/penicillin.parquet")
    fit = dmixed.lmer("diameter ~ 1 + (1 | plate) + (1 | sample)", data)
    ax = fit.plot.caterpillar("sample")
    assert ax.get_ylabel() == "sample"
    assert fit.plot.caterpillar().get_ylabel() == "plate"
    assert_readable(ax)
    with pytest.raises(DataError, match="no random factor is called 'lab': they are plate"):
        fit.plot.caterpillar("lab")
    with pytest.raises(DataError, match="no random effect is called 'day': they are Intercept"):
        slope.plot.caterpillar(effects=["day"])
    with pytest.raises(DataError, match="k=0"):
        slope.plot.caterpillar(k=0)
    with pytest.raises(DataError, match="no bar has two columns"):
        fit.plot.scatter_matrix()


def test_scatter_matrix_and_ellipse(slope, many, odd):
    ax = slope.plot.scatter_matrix()
    table = slope.ranef_table()
    drawn = np.asarray(ax.collections[0].get_offsets())
    assert np.allclose(np.sort(drawn[:, 0]), np.sort(table["Intercept"]))
    line = np.array(ax.lines[0].get_data())
    cov = slope.cov_re.to_numpy()
    distance = np.einsum("in,ij,jn->n", line, np.linalg.inv(cov), line)
    assert np.allclose(distance, -2 * np.log(0.05))  # chi-squared with two degrees of freedom
    assert_readable(ax)
    counts = many.plot.scatter_matrix()
    assert int(counts.collections[0].get_array().sum()) == many.n_groups
    assert_readable(counts)
    flat = np.array(odd.plot.scatter_matrix().lines[0].get_data())
    assert np.linalg.matrix_rank(flat, tol=1e-6 * np.abs(flat).max()) == 1
    rng = np.random.default_rng(5)
    data = rows(60, 900).assign(a=rng.normal(size=900))
    more = dmixed.lmer("y ~ x + (x + a | g)", data).plot.scatter_matrix()
    assert more.shape == (2, 2)
    assert len(array(more)) == 3
    assert_readable(more)


# --------------------------------------------------------------------------- likelihood


def test_profiles_have_lme4s_limits(sleepstudy):
    """confint(fm1) of lme4's documentation: profiles of the ML fit."""
    fit = dmixed.lmer(SLEEP, sleepstudy, reml=False)
    known = {"Days": (7.3587, 13.5759), "Days Var": (3.8012, 8.7534)}
    for parameter in search.parameters(fit, list(known)):
        found = search.zeta_of(parameter, fit.llf, norm.ppf(0.975), 7)
        assert (found.low, found.high) == pytest.approx(known[parameter.name], rel=2e-3)
        assert (np.diff(found.zeta) > 0).all()


def test_zeta_plot(slope, odd):
    ax = slope.plot.zeta("Days", points=3)
    x, y = ax.lines[1].get_data()
    assert np.interp(0.0, y, x) == pytest.approx(slope.fe_params["Days"], rel=1e-3)
    limits = [float(t.get_text()) for t in ax.texts]
    assert limits[0] < slope.fe_params["Days"] < limits[1]
    assert ax.get_xlabel() == "Days\nReaction per unit of Days"
    assert_readable(ax)
    _, axes = plt.subplots(1, 2)
    names = odd.params_user.index
    two = odd.plot.zeta(str(names[1]), "dep $x_ Var", points=3, ax=axes)
    assert len(two[1].texts) == 1  # the data cannot tell this deviation from zero: no lower limit
    assert two[1].get_xlabel().startswith("sd of Intercept by ")
    with pytest.raises(DataError, match="no parameter is called 'day'"):
        slope.plot.zeta("day")


def test_convergence(slope, sleepstudy):
    ax = slope.plot.convergence()
    path = slope.optimizer_summary.path
    height, decrement, rounding = search.path_lines(slope.optimizer_summary)
    assert len(height) == len(path)
    assert height.min() == 0.0
    assert np.allclose(ax.lines[1].get_ydata(), np.maximum(height, rounding))
    assert ax.get_yscale() == "log"
    assert np.isfinite(decrement).any()
    assert_readable(ax)
    without = dmixed.MixedLM.from_formula("Reaction ~ Days", sleepstudy, groups="Subject")
    assert_readable(without.fit(method="nm").plot.convergence())
    assert len(without.fit(do_cg=False).plot.convergence().lines) == 3


# --------------------------------------------------------------------------- fixed effects


@pytest.mark.parametrize(
    ("variable", "at"),
    [("x", {}), ("x", {"f": "b"}), ("f", {"x": 4.0}), ("z", {"x": 1.0, "f": "c"})],
)
def test_partial_effects_are_predictions(variable, at):
    rng = np.random.default_rng(7)
    data = rows(40, 800).assign(f=rng.choice(["a", "b", "c"], 800), z=np.exp(rng.normal(size=800)))
    spline = "bs(x, knots=(4.0, 6.0), lower_bound=-9.0, upper_bound=19.0)"
    fit = dmixed.lmer(f"y ~ poly(x, 2) * f + log(z) + {spline}:z + (1 | g)", data)
    found = partial.partial_effect(fit, variable, at={"z": 2.0, **at} if variable != "z" else at)
    frame = pd.DataFrame({variable: found.values}).assign(
        **{"x": 4.0, "f": "a", "z": 2.0, **at, variable: found.values}
    )
    if variable == "x" or "x" in at:
        expected = fit.predict(frame, se=True)
        assert np.allclose(found.mean, expected["predicted"])
        assert np.allclose(found.se, expected["se"])
    if variable == "x":
        assert found.values[0] == pytest.approx(data.x.mean() - 2 * data.x.std(ddof=0))
    ax = fit.plot.partial(variable, at={"z": 2.0, **at} if variable != "z" else at)
    assert_readable(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (variable, "y")


def test_partial_holds_others_at_mean_and_first_level():
    data = rows(40, 800).assign(f=lambda d: np.where(d.g % 3 == 0, "b", "a"))
    data.loc[::7, "x"] = np.nan
    used = data.dropna()
    fit = dmixed.lmer("y ~ 0 + f + f:x + (1 | g)", data)  # x is carried in the cells of f only
    found = partial.partial_effect(fit, "f")
    frame = pd.DataFrame({"f": ["a", "b"], "x": used.x.mean()})
    assert np.allclose(found.mean, fit.predict(frame))
    assert found.values == ["a", "b"]
    curve = partial.partial_effect(fit, "x", grid=[1.0, 2.0])
    assert np.allclose(curve.mean, fit.predict(pd.DataFrame({"f": "a", "x": [1.0, 2.0]})))
    assert curve.held == ("f = a",)


def test_partial_says_what_it_cannot_know(slope, odd):
    assert_readable(odd.plot.partial("arm"))
    data = rows(40, 800).assign(z=lambda d: d.x.abs() + 1)
    fit = dmixed.lmer("y ~ I(z > 3) + log(z + x**2) + (1 | g)", data)
    with pytest.raises(DataError, match="give grid="):
        fit.plot.partial("z")
    with pytest.raises(DataError, match="needs a value of 'x': give at="):
        fit.plot.partial("z", grid=[1.0, 2.0])
    assert_readable(fit.plot.partial("z", grid=[1.0, 9.0], at={"x": 2.0}))
    with pytest.raises(DataError, match="no fixed effect uses a column 'day'"):
        slope.plot.partial("day")
    with pytest.raises(DataError, match="'q' is not another column"):
        slope.plot.partial("Days", at={"q": 1})


# --------------------------------------------------------------------------- residuals


def test_residuals_are_those_of_the_fit(slope):
    found = slope.plot._own_residuals
    pearson = slope.resid / np.sqrt(slope.scale)
    assert found.alone.total == found.fitted.total == slope.nobs
    x, y = residuals.normal_quantiles(found)
    assert np.allclose(y, np.sort(pearson), atol=found.alone.widths[0])
    assert np.allclose(x, norm.ppf((np.arange(180) + 0.5) / 180))
    for picture in (slope.plot.residuals, slope.plot.qq, slope.plot.scale_location):
        assert_readable(picture())
    ax = slope.plot.residuals()
    drawn = np.asarray(ax.collections[0].get_offsets())
    at = np.argmax(drawn[:, 1])
    most = np.argmax(slope.resid)
    assert drawn[at, 1] == pytest.approx(slope.resid.iloc[most], abs=1.0)
    assert drawn[at, 0] == pytest.approx(slope.fittedvalues.iloc[most], abs=1.0)
    assert ax.get_ylabel() == "residual Reaction"


def test_residuals_do_not_depend_on_the_parts(tmp_path):
    data = rows(50, 6_000).assign(w=lambda d: 1.0 + (d.g % 4))
    data.loc[::11, "x"] = np.nan
    options = {"weights": "w"}
    here = dmixed.lmer("y ~ x + (1 | g)", data, **options)
    found = here.plot._own_residuals
    weighted = here.resid * np.sqrt(data.w[here.resid.index] / here.scale)
    _, y = residuals.normal_quantiles(found)
    assert y[[0, -1]] == pytest.approx([weighted.min(), weighted.max()], abs=1e-2)
    frame = dd.from_pandas(data, npartitions=7)
    other = residuals.residuals_of(here, frame)
    for a, b in (
        (found.alone, other.alone),
        (found.fitted, other.fitted),
        (found.size, other.size),
    ):
        assert a.exponents == b.exponents
        assert np.array_equal(a.bins, b.bins)
        assert np.array_equal(a.counts, b.counts)
    ax = here.plot.residuals(frame)
    assert int(ax.collections[0].get_array().sum()) == here.nobs
    assert ax.get_ylabel() == "residual y, times root weight"
    assert_readable(here.plot.scale_location())
    here.save(tmp_path / "fit")
    stored = dmixed.MixedLMResults.load(tmp_path / "fit")
    with pytest.raises(AttributeError, match="rows do not travel"):
        stored.plot.residuals()
    assert len(stored.plot.qq(data).lines) == 2
    assert len(stored.plot.caterpillar().containers) == 1
    assert len(stored.plot.convergence().lines) >= 2
    here.remove_data()
    with pytest.raises(AttributeError, match="rows do not travel"):
        here.plot.residuals()


def test_one_pass_for_all_pictures_of_residuals(monkeypatch):
    fit = dmixed.lmer("y ~ x + (1 | g)", rows(50, 500))
    passes = []
    real = residuals.outputs.summed
    monkeypatch.setattr(residuals.outputs, "summed", lambda *a: passes.append(1) or real(*a))
    fit.plot.residuals(), fit.plot.qq(), fit.plot.scale_location()
    fit.diagnose(residuals=True)
    assert len(passes) == 1


# --------------------------------------------------------------------------- groups on workers


def test_groups_on_workers_are_summarised_there():
    data = dd.from_pandas(rows(400, 6_000), npartitions=4)
    here = dmixed.lmer("y ~ x + (x | g)", data)
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        there = dmixed.lmer("y ~ x + (x | g)", data, client=client, evaluate_on="workers")
        assert there._prepared.shards
        a, b = (blups.summarised(fit, None, None, 5)[1] for fit in (here, there))
        assert a.labels == b.labels
        assert a.total == b.total == 400
        assert np.allclose(a.values, b.values, atol=1e-6)
        assert np.allclose(a.se, b.se, rtol=1e-5)
        assert len(there.plot.caterpillar()) == 2
        drawn = there.plot.scatter_matrix().collections[0].get_offsets()
        assert len(drawn) == 400
        drawn = there.plot.residuals().collections[0].get_array()
        assert int(drawn.sum()) == 6_000
        assert there.diagnose().ok


# --------------------------------------------------------------------------- axes


def test_axes_that_are_given(slope):
    figure, axes = plt.subplots(1, 2)
    assert slope.plot.qq(ax=axes[0]) is axes[0]
    found = slope.plot.caterpillar(ax=axes)
    assert list(found) == list(axes)
    assert figure.get_suptitle() == ""
    with pytest.raises(DataError, match="ax has 2 Axes: this plot needs 1"):
        slope.plot.qq(ax=axes)
    with pytest.raises(DataError, match="must be matplotlib Axes"):
        slope.plot.qq(ax="axes")
    assert len(plt.get_fignums()) == 1


def test_small_axes_side_by_side(odd):
    """Titles and legends keep to their Axes, also where those are small."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    odd.plot.qq(ax=axes[0])
    odd.plot.convergence(ax=axes[1])
    figure.draw_without_rendering()
    left, right = (ax.title.get_window_extent() for ax in axes)
    assert left.x1 < right.x0
    for ax in axes:
        box = ax.get_legend().get_window_extent()
        assert ax.bbox.x0 - 1 <= box.x0
        assert box.x1 <= ax.bbox.x1 + 1


def test_units_of_effects():
    assert effect_on("y [ml]", "Intercept") == "y [ml]"
    assert effect_on("y [ml]", "dose [mg]") == "y [ml] per unit of dose [mg]"
    assert effect_on("y [ml]", "arm[T.b]") == "y [ml], arm[T.b]"


def test_matplotlib_is_an_extra(slope, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DmixedError, match=r"pip install 'dmixed\[plot\]'"):
        slope.plot.caterpillar()
    assert "caterpillar" in repr(slope.plot)


def test_models_of_arrays(sleepstudy):
    exog = np.column_stack([np.ones(180), sleepstudy.Days])
    fit = dmixed.MixedLM(sleepstudy.Reaction.to_numpy(), exog, sleepstudy.Subject.to_numpy()).fit()
    assert len(fit.plot.caterpillar().containers) == 1
    assert fit.plot.residuals().get_xlabel().startswith("fitted")
    with pytest.raises(NotSupportedError, match="model of arrays"):
        fit.plot.residuals(sleepstudy)
    with pytest.raises(DataError, match="model of arrays"):
        fit.plot.partial("x1")


def test_colours_differ_in_lightness():
    """Red, green, blue as luminance: lines are told apart without colour too."""
    from matplotlib.colors import to_rgb

    light = [np.dot(to_rgb(c), [0.2126, 0.7152, 0.0722]) for c in (BLUE, RED)]
    assert abs(light[0] - light[1]) > 0.05
