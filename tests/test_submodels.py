"""Models of the columns of moments equal models fitted to the rows, whatever the columns are.

A direct fit is the reference: of the same rows, with columns of groups merged into the data.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import case, data_path
from scipy.stats import chi2

import dmixed
from dmixed.accumulation import accumulate
from dmixed.blocks import Recoding
from dmixed.collected import Moments
from dmixed.derived import coarsen, derive, selection
from dmixed.design import block
from dmixed.model import MixedLM
from dmixed.precision import _candidates

LARGE = "y ~ x * z * f + I(x**2) + (1 + x | g)"
CARRY = ("x", "z", "f", "f:x", "I(x**2)")


def rows(n=700, groups=40, seed=1):
    """Covariates of rows and of groups, two factors of rows, keys that nest and cross."""
    rng = np.random.default_rng(seed)
    g, k = rng.integers(0, groups, n), rng.integers(0, 6, n)
    ses, x = rng.standard_normal(groups), rng.standard_normal(n)
    x = x + 0.7 * ses[g]
    b = rng.standard_normal((groups, 2))
    d = pd.DataFrame(
        {
            "g": g,
            "h": g % 7,
            "k": k,
            "x": x,
            "z": 50.0 + 3.0 * rng.standard_normal(n),
            "f": rng.choice(["u", "v", "w"], n),
            "w": rng.uniform(0.5, 2.0, n),
            "o": rng.standard_normal(n),
        }
    )
    d["y"] = 1 + x * (1 + 0.5 * b[g, 1]) + b[g, 0] + ses[g] + 0.1 * d.z + rng.standard_normal(n)
    d["y"] += 0.5 * rng.standard_normal(6)[k] + rng.standard_normal(7)[g % 7]
    return d


def of_groups(groups=40, seed=2):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "g": np.arange(groups),
            "ses": rng.standard_normal(groups),
            "region": rng.choice(list("abcd"), groups),
        }
    )


DATA = rows()
GROUPS = of_groups()
KEPT = {"carry": {"carry": CARRY}, "all": {"group_crossproducts": True}}


def weighted(weights):
    return {"weights": "w", "offset": "o"} if weights else {}


def mean_of(d, column, by, weights=False):
    """Mean of a column over the rows of a group, in each row."""
    w = d.w if weights else pd.Series(1.0, d.index)
    sums = (d[column] * w).groupby(d[by]).transform("sum")
    return sums / w.groupby(d[by]).transform("sum")


def merged(weights=False, data=DATA):
    """Rows with the columns that moments get after the pass."""
    d = data.merge(GROUPS, on="g", how="left")
    mean = mean_of(d, "x", "g", weights)
    return d.assign(x_mean=mean, x_within=d.x - mean)


def quiet_fit(fit, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        return fit(*arguments, **options)


@functools.cache
def direct_fit(formula, reml, weights):
    """A fit of the rows; columns of groups stand in them."""
    return quiet_fit(dmixed.lmer, formula, merged(weights), reml, **weighted(weights))


def assert_same(a, b, rel=1e-10):
    """Two fits of one model to the same rows."""
    assert a.nobs == b.nobs
    assert a.llf == pytest.approx(b.llf, rel=rel, abs=1e-9)
    assert list(a.fe_params.index) == list(b.fe_params.index)
    assert a.aliased == b.aliased
    size = np.abs(b.bse_fe).max()
    assert np.allclose(a.fe_params, b.fe_params, rtol=1e-7, atol=1e-6 * size)
    assert np.allclose(a.bse_fe, b.bse_fe, rtol=1e-5)
    assert np.allclose(a.theta, b.theta, rtol=1e-4, atol=1e-5)
    assert a.scale == pytest.approx(b.scale, rel=1e-7)


def recoded_moments(formula, d, seed, references=True, **options):
    """Moments about references, recoded at random, as bad data make them."""
    model = MixedLM._of(
        dmixed.collected._parsed(formula, None, None, None, {}), d,
        options.get("weights"), options.get("offset"), "drop", None, None, None,
        options.get("carry", ()), options.get("group_crossproducts", False),
    )  # fmt: skip
    spec = dataclasses.replace(model.spec, references=references, recoding=None)
    if seed is not None:
        made = block(spec, pa.Table.from_pandas(d))
        columns = _candidates(made.block)
        S = np.triu(np.random.default_rng(seed).standard_normal((len(columns),) * 2), 1)
        S += np.diag(np.exp2(np.arange(len(columns)) % 3))
        spec = dataclasses.replace(spec, recoding=Recoding(columns, tuple(map(tuple, S.tolist()))))
    vars(model)["spec"] = spec
    found = Moments(model.moments)
    assert (found.cells.group.reference is not None) == references
    assert (found.cells.group.recoding is not None) == (seed is not None)
    return found


SMALLER = [
    LARGE,
    "y ~ 1 + (1 | g)",
    "y ~ 0 + x + (1 | g)",
    "y ~ x + (1 | g)",
    "y ~ f + (x || g)",
    "y ~ poly(x, 2) + C(f, contr.sum) + (0 + x | g)",
    "y ~ scale(x) * f + center(z) + (x | g)",
    "y ~ z + (1 + z | g)",
    "y ~ x + (f | g)",
    "y ~ 0 + f + f:x + (0 + f | g)",
    "y ~ x:z + I((x - 1) ** 2) + (1 + I(x ** 2) | g)",
    "y ~ C(f, contr.treatment(base='v')) * x + (f:x | g)",
]

AFTER = [
    "y ~ ses * x + (x | g)",
    "y ~ region * x + f:ses + (1 | g)",
    "y ~ x_mean + x_within + (x_within | g)",
    "y ~ x_mean + x_within * ses + region:f + (x | g)",
    "y ~ log(ses + 10) + C(ses > 0) * x + (1 | g)",
    "y ~ poly(ses, 2) + scale(ses) + x + (0 + ses | g)",
    "y ~ 0 + region + region:x + (ses:x | g)",
    "y ~ x + I(x * ses) + I(x_within ** 2) + (1 | g)",
    "y ~ x + (1 | g) + (1 | region)",
    "y ~ z * x_mean + (x:ses | g)",
]


class TestSubmodels:
    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("kept", KEPT)
    def test_equal_fits_of_the_rows(self, kept, weights):
        moments = dmixed.collect(LARGE, DATA, **KEPT[kept], **weighted(weights))
        for i, formula in enumerate(SMALLER):
            reml = i % 2 == 0
            own = quiet_fit(moments.fit, reml=reml, formula=formula)
            assert_same(own, direct_fit(formula, reml, weights))
            small = moments.submodel(formula)
            assert_same(quiet_fit(small.fit, reml=reml), own)
            assert len(small.cells.group.columns) <= len(moments.cells.group.columns)

    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("kept", KEPT)
    @pytest.mark.parametrize(("references", "seed"), [(True, None), (True, 3), (False, 4)])
    def test_about_references_and_recoded(self, references, seed, kept, weights):
        moments = recoded_moments(LARGE, DATA, seed, references, **KEPT[kept], **weighted(weights))
        for i, formula in enumerate(SMALLER):
            reml = i % 2 == 0
            own = moments.submodel(formula).fit if i % 3 == 0 else moments.model(formula).fit
            assert_same(quiet_fit(own, reml=reml), direct_fit(formula, reml, weights))

    def test_own_formula_with_more_than_it_needs(self):
        plain = dmixed.lmer(LARGE, DATA)
        for kept in KEPT.values():
            assert_same(dmixed.collect(LARGE, DATA, **kept).fit(), plain)

    def test_rows_are_those_of_the_large_model(self):
        d = DATA.copy()
        d.loc[:9, "z"] = np.nan
        moments = dmixed.collect("y ~ x + z + (1 | g)", d)
        own = moments.fit(formula="y ~ x + (1 | g)")
        assert own.nobs == len(d) - 10
        assert_same(own, dmixed.lmer("y ~ x + (1 | g)", d.iloc[10:]))

    def test_digits_are_kept(self):
        """Nearly dependent columns and large group effects: a sub-model is recoded, too."""
        rng = np.random.default_rng(0)
        d = DATA.assign(z=DATA.x + 1e-5 * rng.standard_normal(len(DATA)))
        d["y"] += 1e4 * rng.standard_normal(40)[d.g]
        moments = dmixed.collect("y ~ x + z + f + (1 | g)", d)
        group = moments.cells.group
        assert group.reference is not None
        assert group.recoding is not None
        for formula in ("y ~ x + z + (1 | g)", "y ~ z + f + (1 | g)", "y ~ x + (1 | g)"):
            small, direct = moments.submodel(formula), dmixed.lmer(formula, d)
            own = small.fit()
            assert own.llf == pytest.approx(direct.llf, abs=2e-6)
            assert np.allclose(own.fe_params, direct.fe_params, atol=1e-5 * direct.bse_fe.max())
            lost = own.optimizer_summary.certificate.rounding
            assert lost <= 10 * direct.optimizer_summary.certificate.rounding + 1e-9
            S = np.array(small.cells.group.recoding.S)
            assert S[0, 0] == 1.0
            assert np.array_equal(S, np.triu(S))

    def test_words_of_statsmodels(self):
        d = DATA.assign(c=DATA.k)
        moments = dmixed.collect(
            "y ~ x + z", d, groups="h", re_formula="x", vc_formula={"g": "0 + C(g)"}
        )
        for words in (
            {"re_formula": "1", "vc_formula": {"g": "0 + C(g)"}},
            {"re_formula": "x"},
            {"vc_formula": {"g": "0 + C(g)"}},
        ):
            own = moments.fit(formula="y ~ x", groups="h", **words)
            direct = MixedLM.from_formula("y ~ x", d, groups="h", **words).fit()
            assert own.llf == pytest.approx(direct.llf, rel=1e-10)
            assert np.allclose(own.vcomp, direct.vcomp, rtol=1e-5)
        assert_same(moments.fit(formula="y ~ x + (1 | h)"), dmixed.lmer("y ~ x + (1 | h)", d))

    @pytest.mark.parametrize("references", [False, True])
    @pytest.mark.parametrize("weights", [False, True])
    def test_grouping_factors_that_are_dropped(self, weights, references):
        large = "y ~ x + z + f + (x | h/g) + (1 | k)"
        moments = recoded_moments(large, DATA, None, references, **weighted(weights))
        for formula in (
            "y ~ x + (1 | h/g) + (1 | k)",
            "y ~ x + (x | h/g)",
            "y ~ f + (1 | k)",
            "y ~ x + z + (1 | g) + (1 | k)",
            "y ~ x + (x | h)",
            "y ~ x + C(k) + (1 | h:g)",
        ):
            for fit in (lambda f=formula: moments.fit(formula=f), moments.submodel(formula).fit):
                direct = quiet_fit(dmixed.lmer, formula, DATA, **weighted(weights))
                assert_same(quiet_fit(fit), direct)

    def test_held_parameters(self):
        moments = dmixed.collect("y ~ x + z + (1 + x | g)", DATA)
        free = dmixed.MixedLMParams.from_components(
            fe_params=np.ones(2), cov_re=np.array([[1.0, 0.0], [0.0, 1.0]])
        )
        own = moments.fit(formula="y ~ x + (1 + x | g)", free=free)
        direct = MixedLM.from_formula("y ~ x", DATA, re_formula="x", groups="g").fit(free=free)
        assert own.llf == pytest.approx(direct.llf, rel=1e-10)
        assert own.cov_re.iloc[0, 1] == 0.0

    def test_the_moments_stay_as_they_are(self):
        moments = dmixed.collect(LARGE, DATA, group_crossproducts=True)
        before = moments.cells.group.WtF.copy()
        own = moments.fit(formula="y ~ x + (1 | g)")
        assert own.predict(DATA.head(3)).shape == (3,)
        assert own.ranef().shape == (40, 1)
        assert np.array_equal(moments.cells.group.WtF, before)
        with pytest.raises(dmixed.NotSupportedError, match="no rows"):
            _ = moments.model("y ~ x + (1 | g)").exog

    def test_sums_of_days_and_submodels(self):
        one, two = (dmixed.collect(LARGE, d, carry=CARRY) for d in (DATA[:300], DATA[300:]))
        own = (one + two).fit(formula="y ~ f * x + (f | g)")
        assert_same(own, dmixed.lmer("y ~ f * x + (f | g)", DATA), rel=1e-9)
        with pytest.raises(dmixed.DataError, match="before columns are joined"):
            _ = one.join(GROUPS) + two


terms = st.lists(
    st.sampled_from(["x", "z", "f", "x:z", "x:f", "I(x**2)", "scale(z)", "C(f, contr.sum):z"]),
    unique=True,
    max_size=4,
)
random = st.sampled_from(["1", "x", "0 + x", "f", "z", "x + I(x**2)", "0 + f:x"])
quick = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow], database=None
)


@quick
@given(terms, random, st.booleans(), st.sampled_from([None, 1, 2]))
def test_any_submodel(fixed, bar, reml, seed):
    """The criterion at some theta: no search, so that models may be singular."""
    formula = f"y ~ {' + '.join(['1', *fixed])} + ({bar} | g)"
    moments = recoded_moments(LARGE, DATA, seed, seed is not None, group_crossproducts=True)
    direct = MixedLM._of(
        dmixed.collected._parsed(formula, None, None, None, {}), DATA, None, None, "drop",
        None, None, None,
    )  # fmt: skip
    m = len(direct._blocks.pairs)
    theta = np.linspace(0.4, 1.1, m)
    own = dmixed.model.evaluate(moments.model(formula)._prepared, theta, reml)
    # An intercept at z = 0, 17 standard deviations from the data, costs each derivative digits:
    # what is near 1e6 in the coordinates of the data cancels to 40 in those of the user.
    digits = (1e-11, 1e-7, 1e-5)
    for a, b, lost in zip(own, direct.criterion(theta, reml), digits, strict=True):
        assert np.allclose(a, b, rtol=1e-9, atol=lost * max(1.0, np.abs(b).max()))


class TestAfterThePass:
    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("kept", KEPT)
    @pytest.mark.parametrize("seed", [None, 5])
    def test_equal_fits_of_merged_rows(self, kept, weights, seed):
        moments = recoded_moments(
            LARGE, DATA, seed, seed is not None, **KEPT[kept], **weighted(weights)
        )
        moments = moments.join(GROUPS).group_means("x").centred("x")
        for i, formula in enumerate(AFTER):
            if weights and "scale" in formula:
                formula = formula.replace("poly(ses, 2) + ", "")
            reml = i % 2 == 0
            own = moments.submodel(formula).fit if i % 3 == 0 else moments.model(formula).fit
            assert_same(quiet_fit(own, reml=reml), direct_fit(formula, reml, weights), 1e-9)

    def test_published_data(self):
        """High School and Beyond as Raudenbush & Bryk fit it, from what files of pupils hold."""
        table = pq.read_table(data_path("hsb82")).to_pandas()
        schools = table.groupby("school", observed=True).sector.first().reset_index()
        pupils = table[["school", "ses", "mAch"]]
        moments = dmixed.collect("mAch ~ ses + (ses | school)", pupils).join(schools)
        moments = moments.group_means("ses", "meanses").centred("ses", "cses")
        for method, fit in case("hsb82")["fits"].items():
            own = moments.fit(method == "REML", "mAch ~ cses * sector + meanses + (cses | school)")
            assert -2 * own.llf == pytest.approx(fit["crit"], rel=1e-9)
            names = own.fe_params.index.str.replace("[T.Public]", "Public")
            assert ["(Intercept)", *names[1:]] == fit["fixef_names"]
            assert np.allclose(own.fe_params, fit["fixef"], rtol=1e-5)

    def test_large_shifts_and_group_effects(self):
        """What is constant in groups may be far from zero, and dwarf what varies within them."""
        d = DATA.assign(t=2e6 + 1e4 * (DATA.g % 5) + DATA.x)
        moments = dmixed.collect("y ~ t + (t | g)", d).group_means("t").centred("t")
        mean = d.t.groupby(d.g).transform("mean")
        full = d.assign(t_mean=mean, t_within=d.t - mean)
        for formula in ("y ~ t_mean + t_within + (1 | g)", "y ~ t_within + (t_within | g)"):
            assert_same(moments.fit(formula=formula), dmixed.lmer(formula, full), 1e-8)

    def test_means_by_one_of_several_keys(self):
        moments = dmixed.collect("y ~ x + z + (1 | h/g) + (1 | k)", DATA)
        with pytest.raises(dmixed.DataError, match=r"several grouping factors.*say which"):
            moments.group_means("x")
        moments = moments.group_means("x", by="h").centred("z", by=["k"]).centred("x", "xg", "g")
        mean, centre = mean_of(DATA, "x", "h"), mean_of(DATA, "z", "k")
        full = DATA.assign(
            x_mean=mean, z_within=DATA.z - centre, xg=DATA.x - mean_of(DATA, "x", "g")
        )
        formula = "y ~ x_mean + z_within + xg + (1 | h/g) + (1 | k)"
        assert_same(moments.fit(formula=formula), dmixed.lmer(formula, full))

    def test_columns_of_one_of_several_keys(self):
        schools = pd.DataFrame({"h": np.arange(7), "size": np.arange(7.0) ** 2})
        moments = dmixed.collect("y ~ x + (x | h/g)", DATA).join(schools)
        full = DATA.merge(schools, on="h")
        for formula in ("y ~ size * x + (1 | h/g)", "y ~ size + x + (x | g)"):
            assert_same(quiet_fit(moments.fit, formula=formula), dmixed.lmer(formula, full))

    def test_expressions(self):
        moments = dmixed.collect("y ~ log(z) + x + I(x**2) + (1 | g)", DATA)
        moments = moments.group_means("log(z)", "lz").centred("I(x**2 - 3 * x)", "q")
        q = DATA.x**2 - 3 * DATA.x
        full = DATA.assign(
            lz=np.log(DATA.z).groupby(DATA.g).transform("mean"),
            q=q - q.groupby(DATA.g).transform("mean"),
        )
        formula = "y ~ lz + q + (1 | g)"
        assert_same(moments.fit(formula=formula), dmixed.lmer(formula, full))

    def test_any_frame(self, tmp_path):
        GROUPS.to_parquet(tmp_path / "groups.parquet")
        moments = dmixed.collect("y ~ x + (x | g)", DATA)
        expected = dmixed.lmer("y ~ ses * x + region + (1 | g)", merged())
        shuffled = GROUPS.sample(frac=1.0, random_state=1)
        for frame in (shuffled, pa.Table.from_pandas(GROUPS), str(tmp_path / "groups.parquet")):
            found = moments.join(frame).fit(formula="y ~ ses * x + region + (1 | g)")
            assert_same(found, expected)

    def test_order_of_declared_categories(self):
        declared = GROUPS.assign(region=pd.Categorical(GROUPS.region, list("dcba")))
        own = dmixed.collect("y ~ x + (x | g)", DATA).join(declared)
        formula = "y ~ region + (1 | g)"
        assert_same(own.fit(formula=formula), dmixed.lmer(formula, DATA.merge(declared, on="g")))

    def test_groups_without_a_value_are_dropped_where_that_can_be(self):
        some = GROUPS[3:].assign(ses=GROUPS.ses[3:].where(GROUPS.g[3:] != 9))
        formula = "y ~ ses * x + f + (x | g)"
        full = DATA.merge(some, on="g", how="left")
        for seed in (None, 2):
            moments = recoded_moments(LARGE, DATA, seed, seed is not None, group_crossproducts=True)
            with pytest.raises(dmixed.DataError, match=r"no row for g = 0, 1, 2; missing="):
                moments.join(some)
            with pytest.raises(dmixed.DataError, match=r"'ses' to join is missing for g = 9;"):
                moments.join(pd.concat([GROUPS[:3], some]))
            left = moments.join(some, missing="drop")
            assert left.n_cells == 36
            lost = int(np.isin(DATA.g, [0, 1, 2, 9]).sum())
            assert left.dropped == {"no value to join": lost}
            assert_same(left.fit(formula=formula), dmixed.lmer(formula, full))
        with pytest.raises(dmixed.NotSupportedError, match="group_crossproducts=True"):
            dmixed.collect(LARGE, DATA).join(some, missing="drop")

    def test_levels_of_groups_that_are_dropped(self):
        """A level that only they have is gone, as from the data."""
        d = DATA.assign(f=np.where(DATA.g == 0, "only", DATA.f))
        moments = dmixed.collect("y ~ f + x + (1 | g)", d, group_crossproducts=True)
        left = moments.join(GROUPS[1:], missing="drop")
        assert_same(left.fit(), dmixed.lmer("y ~ f + x + (1 | g)", d[d.g > 0]))

    @pytest.mark.parametrize("seed", [None, 2])
    def test_stored_results(self, seed, tmp_path):
        """What a fit of derived moments stores is what a fit of rows could have stored."""
        moments = recoded_moments(LARGE, DATA, seed, seed is not None, carry=CARRY).join(GROUPS)
        moments = moments.group_means("x").centred("x")
        for i, formula in enumerate(
            (
                "y ~ x + (1 | g)",
                "y ~ ses * x + region + (1 | g)",
                "y ~ x_within + x_mean + f + (x_within | g)",
                "y ~ x + (1 | region)",
            )
        ):
            own = quiet_fit(moments.fit, formula=formula)
            own.save(tmp_path / str(i))
            again = dmixed.MixedLMResults.load(tmp_path / str(i))
            assert again.llf == own.llf
            assert str(again.summary()) == str(own.summary())
            assert np.array_equal(again.ranef(), own.ranef())

    def test_predictions_need_the_columns(self):
        moments = dmixed.collect("y ~ x + (x | g)", DATA).join(GROUPS).centred("x")
        formula = "y ~ ses + x_within + (1 | g)"
        own, direct = moments.fit(formula=formula), dmixed.lmer(formula, merged())
        assert np.allclose(own.predict(merged().head(9)), direct.predict(merged().head(9)))
        with pytest.raises(dmixed.DataError, match="'ses'"):
            own.predict(DATA.head(9))


class TestRefusals:
    moments = dmixed.collect("y ~ x + z + f + (1 + x | g)", DATA)

    @pytest.mark.parametrize(
        ("formula", "message"),
        [
            ("y ~ q + (1 | g)", r"do not have q; collect them with carry=\['q'\], or"),
            ("y ~ log(x) + k + (1 | g)", r"do not have k"),
            ("y ~ log(x) + exp(z) + (1 | g)", r"do not have log\(x\), exp\(z\); .*carry="),
            ("y ~ x:z + (1 | g)", r"do not have x:z;"),
            ("y ~ x:f + (1 | g)", r"do not have f:x"),
            ("y ~ I(z**3) + (1 | g)", r"do not have I\(z \*\* 2\), I\(z \*\* 3\)"),
            ("y ~ C(x) + (1 | g)", r"do not have C\(x\)"),
            ("y ~ x + (z | g)", r"z in total only, not by group; .*carry=\['z'\]"),
            ("y ~ x + (f | g)", r"have f in total only"),
            ("y ~ x + (1 | k)", r"not divided by 'k', but by g; .*\(1 \| k\)"),
            ("z ~ x + (1 | g)", r"response 'y', not of 'z'"),
            ("log(y) ~ x + (1 | g)", r"response 'y', not of 'log\(y\)'"),
        ],
    )
    def test_columns_that_are_not_carried(self, formula, message):
        with pytest.raises(dmixed.DataError, match=message):
            self.moments.fit(formula=formula)

    def test_what_is_asked_for_can_be_collected(self):
        """The message's own words work."""
        with pytest.raises(dmixed.DataError) as error:
            self.moments.fit(formula="y ~ I(z**2) + x:f + (z | g)")
        carry = eval(str(error.value).split("carry=")[1].split("]")[0] + "]")
        more = dmixed.collect("y ~ x + z + f + (1 + x | g)", DATA, carry=carry)
        assert more.fit(formula="y ~ I(z**2) + x:f + (z | g)").nobs == len(DATA)

    def test_products_by_group(self):
        moments = self.moments.join(GROUPS).centred("z")
        with pytest.raises(dmixed.DataError, match=r"z in total only.*carry=\['z'\]"):
            moments.fit(formula="y ~ z * ses + (1 | g)")
        with pytest.raises(dmixed.DataError, match=r"z in total only.*carry=\['z'\]"):
            moments.fit(formula="y ~ x + (z_within | g)")
        assert moments.fit(formula="y ~ z_within + x:ses + (1 | g)").converged

    @pytest.mark.parametrize(
        ("join", "message"),
        [
            (lambda m: m.join(pd.concat([GROUPS, GROUPS[3:5]])), "more than one row for g = 3, 4"),
            (lambda m: m.join(GROUPS[9:]), "no row for g = 0, 1, 2, 3, 4 and 4 more"),
            (lambda m: m.join(GROUPS, on="school"), "'school' is not a key"),
            (lambda m: m.join(GROUPS[["g"]]), "no column beside the keys"),
            (lambda m: m.join(GROUPS, columns=["size"]), "no column 'size'"),
            (lambda m: m.join(GROUPS.rename(columns={"ses": "x"})), "'x' already"),
            (lambda m: m.join(GROUPS).join(GROUPS), "'ses' already"),
            (lambda m: m.join(GROUPS, missing="ignore"), "missing='ignore'"),
            (lambda m: m.group_means("x + z"), "name one column"),
            (lambda m: m.group_means("I(x * z)"), "what to call"),
            (lambda m: m.group_means("I(x * z)", "xz"), "no column x:z"),
            (lambda m: m.group_means("log(x)", "lx"), r"no column 'log\(x\)'"),
            (lambda m: m.group_means("q"), "no column 'q'"),
            (lambda m: m.group_means("x", by="f"), "'f' is not a key"),
            (lambda m: m.centred("x", "z"), "'z' already"),
            (lambda m: m.fit(groups="g"), "groups: give the formula"),
        ],
    )
    def test_columns_after_the_pass(self, join, message):
        with pytest.raises(dmixed.DataError, match=message):
            join(self.moments)

    def test_statistics_of_rows_without_their_weights(self):
        moments = dmixed.collect("y ~ x + (x | g)", DATA, weights="w").join(GROUPS).centred("x")
        for formula in ("y ~ scale(x_within) + (1 | g)", "y ~ scale(I(x * ses)) + (1 | g)"):
            with pytest.raises(dmixed.NotSupportedError, match="learned from rows without"):
                moments.fit(formula=formula)
        formula = "y ~ scale(ses) + scale(x) + (1 | g)"
        assert_same(moments.fit(formula=formula), dmixed.lmer(formula, merged(), weights="w"))

    def test_constant_within_groups(self):
        d = DATA.assign(c=DATA.g % 3 + 0.1)
        with pytest.raises(dmixed.DataError, match="all the same within"):
            dmixed.collect("y ~ c + (1 | g)", d).centred("c")


class TestDerived:
    def test_needs_random_columns(self):
        group = dmixed.collect("y ~ x + z + (1 | g)", DATA).cells.group
        j = next(j for j, c in enumerate(group.columns) if c.powers == (("z", 1),))
        with pytest.raises(ValueError, match="by group"):
            derive(group, selection(group, [group.random[0], j], [group.random[0], j]))

    @pytest.mark.parametrize("weights", [None, "w"])
    def test_coarser_groups_add_up(self, weights):
        """Sums by a coarser key are those of the cells, about any references."""
        moments = recoded_moments(LARGE, DATA, None, True, weights=weights)
        labels = moments.cells.labels.arrays[0].to_numpy()
        found = coarsen(moments.cells.group, (labels % 7).astype(np.intp), 7).absolute
        direct = dmixed.collect("y ~ x * z * f + I(x**2) + (1 + x | h)", DATA, weights=weights)
        order = np.argsort(direct.cells.labels.arrays[0].to_numpy())
        other = direct.cells.group
        assert found.columns == other.columns
        assert found.frame == other.frame
        assert np.allclose(found.WtF, other.WtF[order], rtol=1e-10, atol=1e-9)
        assert np.allclose(found.FtF, other.FtF, rtol=1e-10, atol=1e-9)
        assert np.array_equal(found.counts, other.counts[order])

    @pytest.mark.parametrize("seed", [None, 1])
    def test_shards_add_up(self, seed):
        """Only the first shard has the sums over all rows; what is derived of shards is so too."""
        moments = recoded_moments(LARGE, DATA, seed, seed is not None, carry=CARRY, weights="w")
        moments = moments.join(GROUPS).centred("x")
        plan = dmixed.submodels._plan(
            *(moments.cells, dmixed.formula.parse("y ~ ses * x + region + x_within + (x | g)")),
            *(moments.known, True),
        )
        whole = derive(moments.cells.group, plan.wanted)
        half = moments.n_cells // 2
        found = []
        for i, (a, b) in enumerate(((0, half), (half, moments.n_cells))):
            own = moments.cells.group.part(a, b)
            own = dmixed.cellmoments.without_totals(own) if i else own
            varying = tuple((r, j, v[a:b]) for r, j, v in plan.wanted.varying)
            found.append(derive(own, dataclasses.replace(plan.wanted, varying=varying)).totals)
        together, expected = found[0] + found[1], whole.totals
        for name in ("FtF", "gram", "plain", "unweighted", "between"):
            a, b = getattr(together, name), getattr(expected, name)
            assert np.allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max()), name

    def test_accumulated_columns(self):
        """Moments of fewer columns are those that rows of the smaller model sum up to."""
        moments = dmixed.collect(LARGE, DATA, group_crossproducts=True)
        small = moments.submodel("y ~ x + f + (x | g)").cells
        made = block(small.spec, pa.Table.from_pandas(DATA))
        direct = accumulate(made.block)
        at = dmixed.keys.lookup(small.labels, made.labels)
        k = [small.group.columns.index(c) for c in direct.columns]
        q = [small.group.random.index(k[j]) for j in direct.random]
        assert len(k) == len(small.group.columns)
        assert len(q) == len(small.group.random)
        assert np.allclose(small.group.WtF[np.ix_(at, q, k)], direct.WtF, rtol=1e-12, atol=1e-10)
        assert np.allclose(small.group.FtF[np.ix_(k, k)], direct.FtF, rtol=1e-12, atol=1e-10)


class TestComparison:
    moments = dmixed.collect("y ~ x + z + f + (1 + x | g)", DATA)
    formulas = ("y ~ x + f + (1 | g)", "y ~ 1 + (1 | g)", "y ~ x + f + (1 + x | g)")

    def test_table(self):
        found = self.moments.compare(self.formulas)
        fits = [dmixed.lmer(f, DATA, False) for f in self.formulas]
        fits = [fits[1], fits[0], fits[2]]
        assert list(found.table.index) == ["m2", "m1", "m3"]
        assert list(found["npar"]) == [3, 6, 8]
        for name, values in {"AIC": "aic", "BIC": "bic", "logLik": "llf"}.items():
            assert np.allclose(found[name], [getattr(f, values) for f in fits], rtol=1e-9)
        chisq = 2.0 * np.diff([f.llf for f in fits])
        assert np.allclose(found["Chisq"][1:], chisq, rtol=1e-6)
        assert list(found["Df"][1:]) == [3, 2]
        assert np.allclose(found["p"][1:], chi2.sf(chisq, [3, 2]), rtol=1e-5)
        assert np.isnan(found["p"].iloc[0])
        assert found.method == "ML"
        assert "m3 against m1 tests a variance at zero" in " ".join(found.notes)

    def test_text(self):
        found = self.moments.compare(
            [*self.formulas, "y ~ " + " + ".join(["x", "z", "f"] * 9) + " + (1 | g)"]
        )
        text = str(found)
        assert max(map(len, text.splitlines())) <= 80
        for word in ("npar", "AIC", "Chisq", "< 2.2e-16", "m2: y ~ 1 + (1 | g)"):
            assert word in text
        assert "<table>" in found.as_html() == found._repr_html_()
        assert r"\begin{tabular}" in found.as_latex()
        assert len(found) == 4

    def test_restricted_likelihoods(self):
        a, b, c = (self.moments.fit(formula=f) for f in self.formulas)
        found = dmixed.compare(a, c, names=["intercept", "slope"])
        assert found.method == "REML"
        assert np.allclose(found["logLik"], [a.llf, c.llf])
        refitted = dmixed.compare(a, b)
        assert refitted.method == "ML"
        assert refitted.notes[0].endswith("having been fitted by REML: m1, m2.")
        assert np.allclose(
            refitted["deviance"], self.moments.compare(self.formulas[:2])["deviance"]
        )
        assert a.reml
        mixed = dmixed.compare(a, self.moments.fit(formula=self.formulas[1], reml=False))
        assert np.allclose(mixed["deviance"], refitted["deviance"])
        with pytest.raises(dmixed.DataError, match="restricted likelihoods"):
            dmixed.compare(a, b, refit=False)

    def test_one_variance_alone(self):
        formulas = ["y ~ x + (1 | g)", "y ~ x + (x || g)"]
        note = self.moments.compare(formulas).notes[0]
        assert note.endswith("the p-value is too large, half of it is right.")

    def test_fits_of_the_rows_and_of_moments(self):
        direct = dmixed.lmer("y ~ x + (1 | g)", DATA, reml=False)
        found = dmixed.compare(direct, self.moments.fit(formula=self.formulas[0], reml=False))
        assert found["Df"].iloc[1] == 2

    def test_what_cannot_be_compared(self):
        a = self.moments.fit(formula=self.formulas[0], reml=False)
        others = {
            "700 rows and m2 of 650": dmixed.lmer("y ~ x + (1 | g)", DATA.head(650), reml=False),
            "different responses": dmixed.lmer("z ~ x + (1 | g)", DATA, reml=False),
            "different weights": dmixed.lmer("y ~ x + (1 | g)", DATA, False, weights="w"),
            "penalised": self.moments.model("y ~ x + (1 | g)").fit_regularized(
                alpha=0.1, reml=False
            ),
        }
        for message, other in others.items():
            with pytest.raises(dmixed.DataError, match=message):
                dmixed.compare(a, other)
        with pytest.raises(dmixed.DataError, match="two models"):
            dmixed.compare(a)
        with pytest.raises(dmixed.DataError, match="result of a fit"):
            dmixed.compare(a, self.moments)
        with pytest.raises(dmixed.DataError, match="2 different names"):
            dmixed.compare(a, a, names=["a", "a"])


@pytest.mark.timeout(120)
def test_on_the_workers_of_a_cluster():
    from distributed import Client

    rng = np.random.default_rng(3)
    n = 6000
    d = pd.DataFrame({"g": rng.integers(0, 600, n), "x": rng.standard_normal(n)})
    d = d.assign(z=rng.standard_normal(n), f=rng.choice(["a", "b"], n))
    d["y"] = d.x + rng.standard_normal(600)[d.g] + rng.standard_normal(n)
    large = "y ~ x + z + f + (1 + x | g)"
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as c:
        moments = dmixed.collect(large, d, client=c, evaluate_on="workers", carry=["z"])
        for formula in (large, "y ~ x + (1 | g)", "y ~ f + (z | g)"):
            assert_same(quiet_fit(moments.fit, formula=formula), quiet_fit(dmixed.lmer, formula, d))
        assert_same(moments.submodel("y ~ x + (1 | g)").fit(), dmixed.lmer("y ~ x + (1 | g)", d))
        with pytest.raises(dmixed.NotSupportedError, match='evaluate_on="driver"'):
            moments.join(GROUPS)
