"""Effects of groups with new rows, against dense algebra and against the fit itself."""

from __future__ import annotations

import pickle
from dataclasses import replace

import dask.dataframe as dd
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from models import model_of
from scipy.linalg import block_diag

import dmixed
from dmixed import DataError, MissingDataError, NotSupportedError, onelevel
from dmixed.blocks import Recoding
from dmixed.design import block
from dmixed.folded import _Clusters
from dmixed.nested import Bucket
from dmixed.precision import _candidates

N = 200


def table(n=N, groups=10, seed=0, spread=1.0):
    """Rows of groups g0, g1, ... with classes h inside, and rooms r of their own name."""
    rng = np.random.default_rng(seed)
    g, h = rng.integers(0, groups, n), rng.integers(0, 4, n)
    d = pd.DataFrame({"x": rng.normal(size=n), "f": rng.choice(["a", "b"], n)})
    d["w"], d["off"] = rng.uniform(0.5, 2.0, n), rng.normal(size=n)
    b = np.random.default_rng(7)
    d["y"] = d.x + spread * b.normal(size=50)[g] * (1 + 0.7 * d.x) + b.normal(size=(50, 9))[g, h]
    d["y"] += b.normal(size=9)[h] + rng.normal(size=n)
    d["g"], d["h"], d["r"] = (
        [f"g{i}" for i in g],
        h,
        [f"r{i}-{j}" for i, j in zip(g, h, strict=True)],
    )
    return d


def rows():
    """New rows of a group that the fit has, of others, and of a new class in an old group."""
    new = table(25, 3, seed=1)
    new.loc[new.g == "g1", "g"] = "new"
    new.loc[new.g == "g2", "g"] = "newer"
    new.loc[new.index[new.g == "g0"][:2], "h"] = 8
    new["r"] = [f"{g}-{h}".replace("g", "r", 1) for g, h in zip(new.g, new.h, strict=True)]
    return new


def columns(d, names):
    made = {"1": np.ones(len(d)), "x": d.x.to_numpy(), "fb": (d.f == "b").to_numpy(float)}
    made["fa"] = 1 - made["fb"]
    return np.column_stack([made[name] for name in names])


class Dense:
    """b = D Z'V^-1 (y - X beta) and D - D Z'V^-1 Z D of all rows, effect by effect.

    Terms are (label of the bar, names of the columns of Z, columns of the key).
    """

    def __init__(self, result, d, terms, weights=None, offset=None):
        varcorr, n = result.varcorr(), len(d)
        Z, D, self.names = [], [], []
        for label, own, key in terms:
            columns_of_term = columns(d, own)
            codes, labels = pd.factorize(pd.MultiIndex.from_frame(d[key]), sort=True)
            for i, level in enumerate(labels):
                Z.append(columns_of_term * (codes == i)[:, None])
                D.append(varcorr[label].to_numpy())
                self.names += [(label, level, name) for name in own]
        self.Z, self.D = np.hstack(Z), block_diag(*D)
        X = columns(d, ["1", "x", "fb"])
        R = result.scale * np.diag(1 / (np.ones(n) if weights is None else d[weights]))
        self.V = self.Z @ self.D @ self.Z.T + R
        residual = d.y - (0 if offset is None else d[offset]) - X @ result.fe_params
        self.b = self.D @ self.Z.T @ np.linalg.solve(self.V, residual)
        self.C = self.D - self.D @ self.Z.T @ np.linalg.solve(self.V, self.Z @ self.D)
        self.B = self.D @ self.Z.T @ np.linalg.solve(self.V, X)

    def values(self, label, index):
        """Effects of the levels of an index, and their standard errors."""
        b, se = {}, {}
        found = zip(self.names, self.b, np.diag(self.C), strict=True)
        for (own, level, _), value, variance in found:
            if own == label:
                b.setdefault(level, []).append(value)
                se.setdefault(level, []).append(np.sqrt(variance))
        levels = [x if isinstance(x, tuple) else (x,) for x in index]
        return np.array([b[x] for x in levels]), np.array([se[x] for x in levels])


ONE = [("g", ["1", "x"], ["g"])]
MODELS = {
    "y ~ x + f + (1 | g)": [("g", ["1"], ["g"])],
    "y ~ x + f + (1 + x | g)": ONE,
    "y ~ x + f + (0 + f | g)": [("g", ["fa", "fb"], ["g"])],
    "y ~ x + f + (1 | g) + (0 + x | g)": [("g", ["1"], ["g"]), ("g.1", ["x"], ["g"])],
    "y ~ x + f + (1 | g/h)": [("g", ["1"], ["g"]), ("h:g", ["1"], ["h", "g"])],
    "y ~ x + f + (1 + x | g) + (1 | g:h)": [*ONE, ("g:h", ["1"], ["g", "h"])],
    "y ~ x + f + (1 | g) + (1 + x | g:h)": [
        ("g", ["1"], ["g"]),
        ("g:h", ["1", "x"], ["g", "h"]),
    ],
    "y ~ x + f + (1 | g) + (1 | r)": [("g", ["1"], ["g"]), ("r", ["1"], ["r"])],
    "y ~ x + f + (1 + x | g) + (1 | h)": [*ONE, ("h", ["1"], ["h"])],
}
NESTED = [m for m in MODELS if "h)" not in m.replace("g:h)", "") and "| r" not in m]


def fitted(formula, d=None, **options):
    return dmixed.lmer(formula, table() if d is None else d, **options)


def assert_dense(folded, dense, terms):
    """Effects, standard errors and covariances are the dense ones, for all levels reported."""
    effects, errors, covariances = folded.ranef(), folded.ranef_table(), folded.ranef_cov()
    if not isinstance(effects, dict):
        effects, errors = {terms[0][2][0]: effects}, {terms[0][2][0]: errors}
    start = {}
    for label, own, _ in terms:
        factor = label.split(".")[0]
        table, at = effects[factor], start.get(factor, 0)
        start[factor] = stop = at + len(own)
        b, se = dense.values(label, table.index)
        assert np.allclose(table.iloc[:, at:stop], b, rtol=0, atol=1e-9)
        shown = errors[factor].filter(like="se(").iloc[:, at:stop]
        assert np.allclose(shown, se, rtol=0, atol=1e-9)
        found = np.einsum("naa->na", covariances[label])
        assert np.allclose(np.sqrt(found), se, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"weights": "w", "offset": "off"}], ids=["", "weights"])
@pytest.mark.parametrize("formula", MODELS)
def test_effects_are_the_dense_ones(formula, options):
    d, new, terms = table(), rows(), MODELS[formula]
    result = fitted(formula, d, **options)
    llf, beta = result.llf, result.fe_params.copy()
    folded = result.fold_in(new)
    both = pd.concat([d, new], ignore_index=True)
    assert_dense(folded, Dense(result, both, terms, **options), terms)
    assert folded.nobs == len(new)
    assert result.llf == llf
    assert result.fe_params.equals(beta)
    tables = folded.ranef()
    groups = (tables["g"] if isinstance(tables, dict) else tables).index
    assert set(new.g) <= set(groups)
    if formula in NESTED:
        assert set(groups) == set(new.g)
        unseen = new[~new.g.isin(d.g)]
        assert {"new", "newer"} <= set(folded.new_groups.get_level_values("g"))
        if folded.new_groups.nlevels == 1:
            assert sorted(unseen.g.unique()) == list(folded.new_groups)


@pytest.mark.parametrize("formula", NESTED)
def test_new_rows_alone(formula):
    """With "replace" the rows of the fit do not count, in any level of the group."""
    new, terms = rows(), MODELS[formula]
    result = fitted(formula)
    folded = result.fold_in(new, combine="replace")
    assert_dense(folded, Dense(result, new, terms), terms)
    tables = folded.ranef_table()
    tables = list(tables.values()) if isinstance(tables, dict) else [tables]
    assert [t.rows.sum() for t in tables] == [len(new)] * len(tables)
    old = table()
    gone = old[(old.g == "g0") & ~old.h.isin(new.h[new.g == "g0"])].iloc[:1]
    if "h" in formula and len(gone):  # a class that has no rows any more: its group's effect alone
        own = folded.predict(gone).iloc[0] - result.predict(gone).iloc[0]
        b, _ = Dense(result, new, terms).values("g", ["g0"])
        Z = columns(gone, terms[0][1])
        assert own == pytest.approx(float(Z[0] @ b[0]), abs=1e-9)


@pytest.mark.parametrize("formula", MODELS)
def test_the_rows_of_the_fit_under_other_names(formula):
    """Groups of the fit, taken for unseen ones, have the effects that they have in the fit."""
    result, d = fitted(formula), table()
    if "(1 | h)" in formula:
        d["h"] += 100
    d["g"], d["r"] = "new " + d.g, "new " + d.r
    found, want = result.fold_in(d), result.ranef_table()
    assert len(found.new_groups) == result.n_groups
    tables = found.ranef_table()
    if not isinstance(want, dict):
        want, tables = {"": want}, {"": tables}
    for name, own in want.items():
        numbers = own.select_dtypes("number").drop(columns="h", errors="ignore")
        got = tables[name][numbers.columns]
        assert np.allclose(got, numbers, rtol=0, atol=1e-9)


@pytest.mark.parametrize("formula", NESTED)
def test_the_rows_of_the_fit_in_place_of_themselves(formula):
    result, d = fitted(formula), table()
    some = d[d.g.isin(["g2", "g5"])]
    found = result.fold_in(some, combine="replace")
    assert len(found.new_groups) == 0
    rows_ = d[d.g.isin(["g2", "g5", "g7"])]
    a, b = (x.predict(rows_, groups=True, se=True) for x in (found, result))
    assert np.allclose(a, b, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------- batches and sources


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 24), max_size=3, unique=True).map(sorted), st.randoms())
def test_unchanged_by_batches(cuts, random):
    result, new = nested_fit(), rows()
    order = list(range(len(new)))
    random.shuffle(order)
    pieces = np.split(np.array(order), cuts)
    folded = result.fold_in(new.iloc[pieces[0]])
    for piece in pieces[1:]:
        folded = folded.fold_in(new.iloc[piece])
    want = result.fold_in(new)
    assert folded.nobs == want.nobs == len(new)
    assert folded.new_groups.equals(want.new_groups)
    for a, b in zip(folded.ranef_table().values(), want.ranef_table().values(), strict=True):
        assert a.select_dtypes(exclude="number").equals(b.select_dtypes(exclude="number"))
        assert np.allclose(a.select_dtypes("number"), b.select_dtypes("number"), rtol=0, atol=1e-10)


_kept = []


def nested_fit():
    if not _kept:
        _kept.append(fitted("y ~ x + f + (1 | g/h)"))
    return _kept[0]


@pytest.mark.parametrize("kind", ["arrow", "polars", "dask", "parquet"])
def test_any_data(kind, tmp_path):
    result, new = fitted("y ~ x + f + (1 + x | g)"), rows()
    want = result.fold_in(new).ranef_table()
    options = {}
    if kind == "parquet":
        for i, part in enumerate(np.array_split(np.arange(len(new)), 3)):
            new.iloc[part].assign(day=i).to_parquet(tmp_path / f"{i}.parquet")
        new.assign(day=9, y=1e3).to_parquet(tmp_path / "9.parquet")
        options = {"filters": [("day", "<", 9)], "storage_options": {}}
        given_ = f"file://{tmp_path}"
    else:
        given_ = {
            "arrow": pa.Table.from_pandas,
            "polars": pl.from_pandas,
            "dask": lambda d: dd.from_pandas(d, npartitions=3, sort=False),
        }[kind](new)
    found = result.fold_in(given_, **options).ranef_table()
    assert found.g.tolist() == want.g.tolist()
    assert np.allclose(found.iloc[:, 1:], want.iloc[:, 1:], rtol=0, atol=1e-12)


def test_missing_values_as_the_fit_was_told():
    new = rows()
    new.loc[3, "x"], new.loc[5, "y"], new.loc[7, "g"] = np.nan, np.nan, None
    result = fitted("y ~ x + f + (1 | g)")
    folded = result.fold_in(new)
    assert folded.nobs == len(new) - 3
    assert folded.dropped == {"y: missing": 1, "x: missing": 1, "g: missing": 1}
    want = result.fold_in(new.drop(index=[3, 5, 7])).ranef()
    assert np.allclose(folded.ranef(), want, rtol=0, atol=1e-12)
    strict = fitted("y ~ x + f + (1 | g)", missing="raise")
    with pytest.raises(MissingDataError, match="x: missing in row 3"):
        strict.fold_in(new)


def test_arrays_of_weights_and_offset():
    d, new = table(), rows()
    result = fitted("y ~ x + f + (1 | g)", d, weights=d.w, offset=d.off)
    named = fitted("y ~ x + f + (1 | g)", d, weights="w", offset="off")
    found = result.fold_in(new, weights=new.w, offset=new.off.to_numpy()).ranef()
    assert np.allclose(found, named.fold_in(new).ranef(), rtol=0, atol=1e-10)
    with pytest.raises(DataError, match="given weights as an array: give weights="):
        result.fold_in(new, offset=new.off)
    with pytest.raises(DataError, match="weights='w'"):
        result.fold_in(new, weights="w", offset=new.off)
    with pytest.raises(DataError, match="has them in the column 'w'"):
        named.fold_in(new, weights=new.w)
    with pytest.raises(DataError, match=r"offset= goes with .* this has none"):
        fitted("y ~ x + f + (1 | g)").fold_in(new, offset=new.off)


# --------------------------------------------------------------------------- predictions


def dense_errors(result, dense, d, terms):
    """Standard errors of the means of rows: z'Cz + (x - B'z)'Cov(beta)(x - B'z)."""
    X = columns(d, ["1", "x", "fb"])
    Z = np.zeros((len(d), len(dense.names)))
    for label, own, key in terms:
        values = columns(d, own)
        for j, name in enumerate(own):
            for i, level in enumerate(zip(*(d[k] for k in key), strict=True)):
                Z[i, dense.names.index((label, level, name))] = values[i, j]
    A = X - Z @ dense.B
    cov = result.cov_fe.to_numpy()
    return np.sqrt(np.einsum("ij,jk,ik->i", Z, dense.C, Z) + np.einsum("ij,jk,ik->i", A, cov, A))


@pytest.mark.parametrize("formula", NESTED)
def test_predictions_use_the_new_effects(formula):
    d, new, terms = table(), rows(), MODELS[formula]
    result = fitted(formula, d)
    folded = result.fold_in(new)
    both = pd.concat([d, new], ignore_index=True)
    dense = Dense(result, both, terms)
    fixed = columns(both, ["1", "x", "fb"]) @ result.fe_params
    found = folded.predict(both, se=True)
    assert np.allclose(found.predicted, fixed + dense.Z @ dense.b, rtol=0, atol=1e-9)
    assert np.allclose(found.se, dense_errors(result, dense, both, terms), rtol=0, atol=1e-9)
    assert np.array_equal(folded.predict(both), found.predicted)
    others = d[~d.g.isin(new.g)]
    assert np.array_equal(folded.predict(others), result.predict(others, groups=True))
    assert np.array_equal(folded.predict(both, groups=False), result.predict(both))
    shown = folded.augment(new, columns=["f"])
    assert np.allclose(shown.fitted, found.predicted[len(d) :], rtol=0, atol=1e-12)


def test_predictions_of_unknown_groups():
    result, new = fitted("y ~ x + f + (1 | g)"), rows()
    folded = result.fold_in(new)
    strange = new.assign(g="nobody")
    assert np.allclose(folded.predict(strange), result.predict(strange), rtol=0, atol=1e-12)
    assert folded.predict(strange, new_groups="nan").isna().all()
    assert folded.predict(new, new_groups="error").notna().all()
    with pytest.raises(DataError, match="g='nobody'"):
        folded.predict(strange, new_groups="error")
    with pytest.raises(DataError, match="give the rows to predict"):
        folded.predict(None)


def test_tables_on_disk(tmp_path):
    folded = nested_fit().fold_in(rows())
    folded.ranef_table(out=tmp_path / "effects")
    want = folded.ranef_table()["g"]
    files = sorted((tmp_path / "effects").glob("*-g/*.parquet"))
    assert np.allclose(pd.read_parquet(files[0])["Intercept"], want["Intercept"], rtol=0, atol=0)


# --------------------------------------------------------------------------- variance components


@pytest.mark.parametrize("component", ["0 + C(h)", "C(h)", "0 + C(h):x", "0 + x"])
@pytest.mark.parametrize("re_formula", ["1", None])
def test_variance_components(component, re_formula):
    """Against a fit of all rows with every parameter held, which sums them by another way."""
    d, new = table(), rows()
    if component == "C(h)":  # the new level comes first, and becomes the base of its group
        new.loc[new.h == 8, "h"] = -1
    options = {"groups": "g", "re_formula": re_formula, "vc_formula": {"v": component}}
    result = dmixed.MixedLM.from_formula("y ~ x + f", d, **options).fit()
    folded = result.fold_in(new)
    model = dmixed.MixedLM.from_formula("y ~ x + f", pd.concat([d, new]), **options)
    params = result.params_object
    held = params.from_components(
        np.zeros(result.k_fe), np.zeros((result.k_re,) * 2), vcomp=np.zeros(1)
    )
    all_rows = model.fit(start_params=params, free=held)
    assert np.allclose(all_rows.fe_params, result.fe_params, rtol=1e-12)
    found, want = folded.random_effects, all_rows.random_effects
    assert set(found) == set(new.g)
    ratio = result.scale / all_rows.scale
    for g in found:
        assert list(found[g].index) == list(want[g].index)
        assert np.allclose(found[g], want[g], rtol=0, atol=1e-8)
        cov = all_rows.random_effects_cov[g] * ratio
        assert np.allclose(folded.random_effects_cov[g], cov, rtol=0, atol=1e-8)


# --------------------------------------------------------------------------- special designs


@pytest.mark.parametrize("recoded", [False, True])
@pytest.mark.parametrize("bar", ["(1 + x | g)", "(1 | g/h)"])
def test_a_combination_of_levels_without_rows_in_the_fit(bar, recoded):
    """Its cell is a column that the sums of the fit do not have."""
    d, new = table(seed=3), rows()
    d["k"] = np.where(np.arange(len(d)) % 3 > 0, "p", "q")
    d = d[~((d.f == "a") & (d.k == "q"))].reset_index(drop=True)
    new["k"] = np.where(np.arange(len(new)) % 2 > 0, "p", "q")
    assert ((new.f == "a") & (new.k == "q")).any()
    model = model_of(f"y ~ x * f * k + {bar}", d)
    if recoded:
        made = block(model.spec, pa.Table.from_pandas(d)).block
        names = _candidates(made)
        S = np.triu(np.random.default_rng(1).normal(size=(len(names),) * 2), 1) + np.eye(len(names))
        recoding = Recoding(names, tuple(map(tuple, S.tolist())))
        vars(model)["spec"] = replace(model.spec, references=True, recoding=recoding)
    result = model.fit()
    assert (result._prepared.here.group.recoding is not None) == recoded
    if "h" in bar:
        strange = new[new.f.eq("a") & new.k.eq("q")].assign(g="new", h=0)
        found = result.fold_in(strange).predict(strange) - result.predict(strange)
        tau2 = sum(x.iloc[0, 0] for x in result.varcorr().values())
        residual = (strange.y - result.predict(strange)).mean()
        assert np.allclose(found, tau2 / (tau2 + result.scale / len(strange)) * residual, atol=1e-8)
        return
    check_by_predictions(result, new, ["1", "x"], pd.concat([d, new], ignore_index=True))


def check_by_predictions(result, new, random, both):
    """The fixed part as `predict` has it, the effects by the formula."""
    D = result.cov_re.to_numpy()
    table_ = result.fold_in(new).ranef()
    for g in table_.index:
        own = both[both.g == g]
        Z = columns(own, random)
        V = Z @ D @ Z.T + result.scale * np.eye(len(own))
        b = D @ Z.T @ np.linalg.solve(V, own.y - result.predict(own))
        assert np.allclose(table_.loc[g], b, rtol=0, atol=1e-8)
    assert set(table_.index) == set(new.g)


@pytest.mark.parametrize("bar", ["(1 + x | g)", "(1 + f | g)"])
@pytest.mark.parametrize("options", [{"group_crossproducts": True}, {"carry": ["f:k"]}])
def test_sums_by_group_of_columns_that_are_not_random(options, bar):
    """The bars' columns are written in cells of the others, some of which the fit has not met."""
    d, new = table(seed=3), rows()
    for t in (d, new):
        t["k"] = np.where(np.arange(len(t)) % 3 > 0, "p", "q")
    d = d[~((d.f == "a") & (d.k == "q"))].reset_index(drop=True)
    result = dmixed.collect(f"y ~ x + f * k + {bar}", d, **options).fit()
    random = ["1", "x"] if "x" in bar else ["1", "fb"]
    check_by_predictions(result, new, random, pd.concat([d, new], ignore_index=True))


@pytest.mark.parametrize("bar", ["0 + f:k", "1 + C(f, Sum):C(k, Sum)", "f * k", "0 + x:f:k"])
def test_no_random_column_is_of_a_new_combination(bar):
    """Why `folding` need not look for any: the fit refuses them."""
    d = table(seed=3)
    d["k"] = np.where(np.arange(len(d)) % 3 > 0, "p", "q")
    d = d[~((d.f == "b") & (d.k == "q"))]
    with pytest.raises(DataError, match="linear combination of the others"):
        dmixed.lmer(f"y ~ x + f + k + ({bar} | g)", d)


def test_factors_linked_through_others():
    """A chain of crossed levels: new rows at one end change the effects at the other."""
    rng, i = np.random.default_rng(4), np.arange(240)
    d = pd.DataFrame({"x": rng.normal(size=240), "f": rng.choice(["a", "b"], 240)})
    d["g"], d["h"] = [f"g{j}" for j in i // 10], (i + 5) // 10 + (i >= 120)  # two chains
    d["y"] = rng.normal(size=24)[i // 10] + rng.normal(size=26)[d.h] + rng.normal(size=240)
    result = dmixed.lmer("y ~ x + f + (1 | g) + (1 | h)", d)
    new = d.iloc[:4].assign(y=d.y + 3)
    folded = result.fold_in(new)
    terms = [("g", ["1"], ["g"]), ("h", ["1"], ["h"])]
    assert_dense(folded, Dense(result, pd.concat([d, new], ignore_index=True), terms), terms)
    assert set(folded.ranef()["g"].index) == {f"g{j}" for j in range(12)}
    assert set(folded.ranef()["h"].index) == set(range(13))
    others = d.iloc[120:]
    assert np.array_equal(folded.predict(others), result.predict(others, groups=True))


def test_learned_transforms_are_those_of_the_fit():
    d, new = table(), rows()
    result = dmixed.lmer("y ~ scale(x) + poly(x, 2):f + (1 + x | g)", d)
    check_by_predictions(result, new, ["1", "x"], pd.concat([d, new], ignore_index=True))


def dwarfed(d):
    """Group effects and a covariate that dwarf the noise, and nearly dependent columns."""
    d = d.rename(columns={"x": "z"})
    d["y"] += 1e5 * np.random.default_rng(8).normal(size=50)[d.g.str[1:].astype(int)]
    return d.assign(x=d.z + 1e-5 * d.off, y=d.y + 1e3 * d.z)


@pytest.mark.parametrize("weights", [None, "w"])
def test_references_and_recoding(weights):
    """Sums about a row of each group, of columns that are recoded: no digit is lost with them."""
    d, new = dwarfed(table()), dwarfed(table(25, 3, seed=1))
    new.loc[new.g == "g1", "g"] = "new"
    result = dmixed.lmer("y ~ x + z + f + (1 | g)", d, weights=weights)
    group = result._prepared.here.group
    assert group.reference is not None
    assert group.recoding is not None
    folded = result.fold_in(new)
    found, table_ = folded.ranef()["Intercept"], folded.ranef_table().set_index("g")
    tau2, both = result.cov_re.iloc[0, 0], pd.concat([d, new], ignore_index=True)
    for g in ("g0", "g2", "new"):
        own = both[both.g == g]
        w = own.w if weights else own.w * 0 + 1
        residual = own.y - result.predict(own)
        shrunk = tau2 / (tau2 + result.scale / w.sum())
        want = shrunk * np.average(residual, weights=w)
        assert found[g] == pytest.approx(want, rel=1e-9)
        se = np.sqrt(shrunk * result.scale / w.sum())
        assert table_.loc[g, "se(Intercept)"] == pytest.approx(se, rel=1e-9)


@pytest.mark.parametrize(
    "formula",
    ["y ~ x + z + f + (1 | g)", "y ~ x + z + f + (1 | g/h)", "y ~ z + f + (1 | g) + (1 | h)"],
)
def test_references_in_batches(formula):
    """Each batch has references of its own for the same group."""
    d = dwarfed(table())
    result = dmixed.lmer(formula, d)
    copy = d.assign(g="copy of " + d.g, h=d.h + 10)
    folded = result.fold_in(copy.iloc[::3])
    for start in (1, 2):
        folded = folded.fold_in(copy.iloc[start::3])
    found, want = folded.ranef(), result.ranef()
    if not isinstance(want, dict):
        found, want = {"": found}, {"": want}
    for name, own in want.items():
        assert np.allclose(found[name], own, rtol=1e-7, atol=1e-5)


def test_variances_of_zero():
    """Effects whose variance is zero are zero, whatever the new rows say."""
    rng = np.random.default_rng(5)
    d = table()
    d["y"] = d.x + np.repeat(rng.normal(size=N // 4), 4) + rng.normal(size=N)
    d["g"] = [f"g{i // 20}" for i in range(N)]
    d["h"] = np.arange(N) // 4 % 5
    d["y"] -= d.groupby("g").y.transform("mean")
    result = dmixed.lmer("y ~ x + f + (1 | g) + (1 | g:h)", d)
    assert result.singular
    assert result.varcorr()["g"].iloc[0, 0] == 0.0
    new = d[d.g == "g1"].assign(g="new", y=lambda t: t.y + 50.0)
    folded = result.fold_in(new)
    assert folded.ranef()["g"].loc["new", "Intercept"] == 0.0
    assert folded.ranef_table()["g"]["se(Intercept)"].tolist() == [0.0]
    assert (folded.ranef()["g:h"] > 1.0).to_numpy().all()


def test_single_groups_of_nested_factors_are_buckets_or_not():
    """New rows of one class in a new group: both factors have one level for each cell."""
    result = fitted("y ~ x + f + (1 | g) + (1 | g:h)")
    new = rows().iloc[:3].assign(g="lonely", h=1)
    terms = MODELS["y ~ x + f + (1 | g) + (1 + x | g:h)"]
    terms = [terms[0], ("g:h", ["1"], ["g", "h"])]
    folded = result.fold_in(new)
    assert isinstance(result._prepared.problem.factors.parts[0], Bucket)
    assert isinstance(folded._clusters._prepared.problem.factors.parts[0], onelevel.OneLevel)
    assert_dense(folded, Dense(result, new, terms), terms)


# --------------------------------------------------------------------------- where the fit is


def test_stored_results_and_moments(tmp_path):
    d, new = table(), rows()
    result = fitted("y ~ x + f + (1 | g/h)", d)
    want = result.fold_in(new).ranef()
    result.save(tmp_path / "fit")
    moments = dmixed.collect("y ~ x + f + (1 | g/h)", d, group_crossproducts=True, carry=["x:f"])
    loaded = dmixed.MixedLMResults.load(tmp_path / "fit")
    for other in (loaded, pickle.loads(pickle.dumps(result)), moments.fit()):
        found = other.fold_in(new).ranef()
        for name in want:
            assert np.allclose(found[name], want[name], rtol=0, atol=1e-6)
    folded = pickle.loads(pickle.dumps(result.fold_in(new)))
    assert folded.ranef()["g"].equals(want["g"])
    assert isinstance(folded._clusters, _Clusters)


@pytest.mark.parametrize("combine", ["add", "replace"])
def test_groups_on_workers(combine):
    d, new = table(2000, 40), rows()
    formula = "y ~ x + f + (1 + x | g)"
    here = fitted(formula, d).fold_in(new, combine)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None)
        as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        result = dmixed.lmer(
            formula, dd.from_pandas(d, npartitions=4), client=client, evaluate_on="workers"
        )
        found = result.fold_in(new, combine)
        assert found.new_groups.equals(here.new_groups)
        assert np.allclose(found.ranef(), here.ranef(), rtol=0, atol=1e-5)
        rows_ = pd.concat([d, new], ignore_index=True)
        a, b = (x.predict(rows_, se=True) for x in (found, here))
        assert np.allclose(a, b, rtol=0, atol=1e-5)


def test_many_groups_are_not_computed_again(monkeypatch):
    result = fitted("y ~ x + f + (1 + x | g)", table(5000, 50))
    seen = []
    whole = onelevel.solved
    from dmixed.inference import random_effects

    def solved(RT, root):
        seen.append(RT.shape[2])
        return whole(RT, root)

    monkeypatch.setattr(random_effects, "solved", solved)
    result.fold_in(rows()).ranef_table()
    assert seen == [3]


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop(columns="x"), "'x'"),
        (lambda d: d.drop(columns="y"), "'y'"),
        (lambda d: d.drop(columns="g"), "'g'"),
        (lambda d: d.assign(x="text"), "'x'"),
        (lambda d: d.assign(f=1.0), "'f' has type double"),
        (lambda d: d.assign(g=1), "group key 'g'"),
        (lambda d: d.assign(f="strange"), "'f' has the level 'strange'"),
        (lambda d: d.iloc[:0], "no rows"),
        (lambda d: d.assign(x=np.nan), "dropped 25 rows for 'x: missing'"),
        (lambda d: 7, "int"),
    ],
)
def test_bad_rows(change, message):
    result = fitted("y ~ x + f + (1 | g)")
    with pytest.raises(DataError, match=message):
        result.fold_in(change(rows()))


def test_bad_weights():
    result = fitted("y ~ x + f + (1 | g)", weights="w")
    with pytest.raises(DataError, match="'w'"):
        result.fold_in(rows().assign(w=0.0))
    with pytest.raises(DataError, match="'w'"):
        result.fold_in(rows().drop(columns="w"))


def test_bad_arguments():
    result, new = fitted("y ~ x + f + (1 + x | g) + (1 | h)"), rows()
    with pytest.raises(DataError, match="combine='both'"):
        result.fold_in(new, combine="both")
    with pytest.raises(NotSupportedError, match="g, h are crossed"):
        result.fold_in(new, combine="replace")
    with pytest.raises(DataError, match="combine= stays what it was"):
        result.fold_in(new).fold_in(new, combine="add")
    with pytest.raises(DataError, match="filters="):
        result.fold_in(new, filters=[("x", ">", 0)])
    d = table()
    arrays = dmixed.MixedLM(d.y, np.column_stack([np.ones(N), d.x]), d.g).fit()
    with pytest.raises(NotSupportedError, match="model of arrays"):
        arrays.fold_in(new)


def test_nothing_is_changed():
    result, new = nested_fit(), rows()
    before = result.ranef_table()
    folded = result.fold_in(new)
    first = folded.ranef_table()
    folded.fold_in(new)
    for a, b in zip(first.values(), folded.ranef_table().values(), strict=True):
        assert a.equals(b)
    for a, b in zip(before.values(), result.ranef_table().values(), strict=True):
        assert a.equals(b)
    with pytest.raises(AttributeError):
        folded.result = result
    assert "with 25 new rows at the estimates of 'y ~ x + f + (1 | g/h)'" in repr(folded)
