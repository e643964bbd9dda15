"""Predictions, augmented rows and tables of effects, wherever they go, against dense algebra."""

from __future__ import annotations

import json
from pathlib import Path

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster
from scipy.linalg import block_diag
from typer.testing import CliRunner

import dmixed
from dmixed import cli, grouped, keys, outputs
from dmixed.errors import DataError, NotSupportedError
from dmixed.inference import cells
from dmixed.lookup import Errors, Known, Lookup, TermEffects
from dmixed.nested import SparseMeans

N = 240
Z975 = 1.959963984540054


def table(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, h = rng.integers(0, 12, N), rng.integers(0, 4, N)
    d = pd.DataFrame({"x": rng.normal(size=N), "f": rng.choice(["a", "b"], N)})
    d["w"], d["off"] = rng.uniform(0.5, 2.0, N), rng.normal(size=N)
    d["y"] = d.x + rng.normal(size=12)[g] * (1 + 0.7 * d.x) + rng.normal(size=(12, 4))[g, h]
    d["y"] += rng.normal(size=4)[h] + rng.normal(size=N)
    d["g"], d["h"] = [f"g{i}" for i in g], h
    d.index = np.arange(N) * 3 + 5
    return d


@pytest.fixture(scope="module")
def data():
    return table()


@pytest.fixture(scope="module")
def one(data):
    return dmixed.lmer("y ~ x + f + (1 + x | g)", data)


@pytest.fixture(scope="module")
def nested(data):
    return dmixed.lmer("y ~ x + f + (1 + x | g) + (1 | g:h)", data)


def new_rows() -> pd.DataFrame:
    """Rows of known groups, of unknown ones, and with missing values."""
    return pd.DataFrame(
        {
            "x": [0.3, -1.0, 2.0, 0.5, np.nan, 1.0],
            "f": ["a", "b", "a", "b", "a", "b"],
            "w": [1.0, 2.0, 0.5, 1.0, 1.0, 4.0],
            "g": ["g1", "nobody", "g2", None, "g3", "g0"],
            "h": pd.array([0, 1, 77, 1, 2, None], dtype="Int64"),
        },
        index=list("abcdef"),
    )


# --------------------------------------------------------------------------- standard errors


def design(d: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Columns 1, x, f of rows."""
    made = {"1": np.ones(len(d)), "x": d.x.to_numpy(), "f": (d.f == "b").to_numpy(float)}
    return np.column_stack([made[name] for name in names])


def random_part(
    d: pd.DataFrame, new: pd.DataFrame, terms: dict[tuple[str, ...], list[str]]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Z of the data and of new rows, with columns for all levels of either, and numbers of levels.

    Terms are keys -> columns; a level with a missing key is one of its own.
    """
    both, found, levels = pd.concat([d, new], ignore_index=True), [], []
    for key, columns in terms.items():
        label = both[list(key)].astype(object).where(both[list(key)].notna(), "missing")
        codes = pd.factorize(label.astype(str).agg("/".join, axis=1))[0]
        values = np.nan_to_num(design(both, columns))
        Z = np.zeros((len(both), codes.max() + 1, len(columns)))
        Z[np.arange(len(both)), codes] = values
        found.append(Z.reshape(len(both), -1))
        levels.append(codes.max() + 1)
    Z = np.hstack(found)
    return Z[: len(d)], Z[len(d) :], levels


def mixed_model_equations(result, d, new, terms, weights=None):
    """Predictions and standard errors of rows from Henderson's equations, in spherical effects.

    b = L u with Psi = L L', so that a singular Psi needs no inverse.
    """
    X, Xn = design(d, ["1", "x", "f"]), design(new, ["1", "x", "f"])
    Z, Zn, levels = random_part(d, new, terms)
    roots = []
    for cov, n in zip(result.varcorr().values(), levels, strict=True):
        size, U = np.linalg.eigh(cov.to_numpy() / result.scale)
        roots.append(np.kron(np.eye(n), U * np.sqrt(np.maximum(size, 0.0))))
    L = block_diag(*roots)
    T, W = np.hstack([X, Z @ L]), np.ones(len(d)) if weights is None else d[weights].to_numpy()
    C = (T.T * W) @ T
    C[X.shape[1] :, X.shape[1] :] += np.eye(L.shape[1])
    t = np.hstack([np.nan_to_num(Xn), Zn @ L])
    error = np.sqrt(result.scale * np.einsum("ni,ij,nj->n", t, np.linalg.inv(C), t))
    mean = t @ np.linalg.solve(C, T.T @ (W * d.y.to_numpy()))
    missing = new.x.isna().to_numpy()
    return np.where(missing, np.nan, mean), np.where(missing, np.nan, error)


CASES = {
    "(1 | g)": {("g",): ["1"]},
    "(1 + x | g)": {("g",): ["1", "x"]},
    "(1 | g) + (0 + x | g)": {("g",): ["1"], ("g", "g"): ["x"]},
    "(1 | g:h)": {("g", "h"): ["1"]},
    "(1 + x | g) + (1 | g:h)": {("g", "h"): ["1"], ("g",): ["1", "x"]},
    "(1 | g) + (1 + x | g:h)": {("g", "h"): ["1", "x"], ("g",): ["1"]},
    "(1 + x | h) + (1 | g) + (1 | g:h)": {("g", "h"): ["1"], ("g",): ["1"], ("h",): ["1", "x"]},
    "(1 + x | g) + (1 | h)": {("g",): ["1", "x"], ("h",): ["1"]},
}


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("bars", CASES)
def test_errors_are_those_of_the_mixed_model_equations(data, bars, weights):
    result = dmixed.lmer(f"y ~ x + f + {bars}", data, weights=weights)
    new = pd.concat([new_rows(), data.head(40)])
    if "| h)" in bars:  # crossed: levels that were not seen together are another test
        new = new.drop(index="f")
    found = result.predict(new, groups=True, se=True, interval="prediction")
    mean, error = mixed_model_equations(result, data, new, CASES[bars], weights)
    assert np.allclose(found["predicted"], mean, rtol=0, atol=1e-9, equal_nan=True)
    assert np.allclose(found["se"], error, rtol=1e-9, equal_nan=True)
    half = Z975 * np.sqrt(error**2 + result.scale / (1.0 if weights is None else new.w))
    assert np.allclose(found["upper"], mean + half, rtol=1e-9, equal_nan=True)
    assert np.allclose(found["lower"], mean - half, rtol=1e-9, equal_nan=True)
    within = result.predict(new, groups=True, interval="confidence", alpha=0.5)
    assert list(within.columns) == ["predicted", "lower", "upper"]
    assert np.allclose(within.upper - mean, 0.6744897501960817 * error, rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("bars", ["(1 | g)", "(1 + x | g)", "(1 + x | g) + (1 | g:h)"])
def test_errors_where_a_variance_is_zero(data, bars):
    d = data.assign(y=np.random.default_rng(5).normal(size=N))
    result = dmixed.lmer(f"y ~ x + f + {bars}", d)
    assert result.singular
    found = result.predict(d, groups=True, se=True)
    mean, error = mixed_model_equations(result, d, d, CASES[bars])
    assert np.allclose(found["predicted"], mean, rtol=0, atol=1e-9)
    assert np.allclose(found["se"], error, rtol=1e-9)


def test_population_errors(one, data):
    X = design(data, ["1", "x", "f"])
    found = one.predict(data, se=True, interval="prediction")
    variance = np.einsum("np,pq,nq->n", X, np.asarray(one.cov_fe), X)
    assert np.allclose(found["predicted"], X @ one.fe_params, rtol=0, atol=1e-10)
    assert np.allclose(found["se"], np.sqrt(variance), rtol=1e-10)
    Z = X[:, :2]  # a new row of the population is one of a new group
    variance += np.einsum("np,pq,nq->n", Z, np.asarray(one.cov_re), Z) + one.scale
    assert np.allclose(found["upper"] - found["predicted"], Z975 * np.sqrt(variance), rtol=1e-10)
    assert list(one.predict(data, interval="confidence")) == ["predicted", "lower", "upper"]
    bare = data[["x", "f"]]
    assert one.predict(bare, se=True)["se"].equals(found["se"])


def test_many_crossed_levels(monkeypatch):
    rng = np.random.default_rng(11)
    d = pd.DataFrame({"x": rng.normal(size=900), "f": rng.choice(["a", "b"], 900)})
    d["g"], d["h"] = rng.integers(0, 120, 900), rng.integers(0, 60, 900)
    d["y"] = d.x + rng.normal(size=120)[d.g] + rng.normal(size=60)[d.h] + rng.normal(size=900)
    result = dmixed.lmer("y ~ x + f + (1 | g) + (1 | h)", d)
    assert isinstance(result._prepared.problem.factors.parts[0].abar, SparseMeans)
    found = result.predict(d, groups=True, se=True)
    mean, error = mixed_model_equations(result, d, d, {("g",): ["1"], ("h",): ["1"]})
    assert np.allclose(found["predicted"], mean, rtol=0, atol=1e-9)
    assert np.allclose(found["se"], error, rtol=1e-9)
    monkeypatch.setattr(cells, "MAX_NUMBERS", 1000)
    again = dmixed.lmer("y ~ x + f + (1 | g) + (1 | h)", d)
    with pytest.raises(NotSupportedError, match="7,200 numbers: too many"):
        again.predict(d, groups=True, se=True)


def test_crossed_levels_never_seen_together(data):
    d = data[~((data.g == "g1") & (data.h == 0))]
    result = dmixed.lmer("y ~ x + f + (1 | g) + (1 | h)", d)
    row = pd.DataFrame({"x": [0.0], "f": "a", "g": "g1", "h": 0})
    blups = result.ranef()
    want = result.fe_params["Intercept"] + blups["g"].loc["g1"].item() + blups["h"].loc[0].item()
    assert result.predict(row, groups=True).item() == pytest.approx(want, rel=1e-12)
    with pytest.raises(NotSupportedError, match=r"g='g1', h=0.*not together"):
        result.predict(row, groups=True, se=True)


def test_variance_components(data):
    parts = {"h": "0 + C(h)", "slope": "0 + x"}
    result = dmixed.mixedlm("y ~ x + f", data, groups="g", vc_formula=parts).fit()
    found = result.predict(data, groups=True, se=True)
    assert np.allclose(found.predicted, result.fittedvalues, rtol=0, atol=1e-12)
    terms = {("g", "h"): ["1"], ("g",): ["x"]}
    assert np.allclose(found.se, mixed_model_equations(result, data, data, terms)[1], rtol=1e-9)


def test_a_fixed_effect_that_was_held_has_no_error(data):
    model = dmixed.mixedlm("y ~ x", data, groups="g")
    params = dmixed.MixedLMParams.from_components(np.array([0.0, 1.0]), np.eye(1))
    free = dmixed.MixedLMParams.from_components(np.array([1.0, 0.0]), np.eye(1))
    result = model.fit(start_params=params, free=free)
    at0, at5 = (result.predict(pd.DataFrame({"x": [x]}), se=True)["se"].item() for x in (0.0, 5.0))
    assert at0 == pytest.approx(at5, rel=1e-12)
    assert at0 > 0


# --------------------------------------------------------------------------- groups


def test_fitted_values_and_offset(data):
    result = dmixed.lmer("y ~ x + f + (1 + x | g)", data, offset="off", weights="w")
    found = result.predict(data, groups=True)
    assert np.allclose(found, result.fittedvalues, rtol=0, atol=1e-12)
    assert found.index.equals(data.index)
    assert np.allclose(result.predict(groups=True), found, rtol=0, atol=0)
    blups = result.ranef().loc[data.g].to_numpy()
    own = (design(data, ["1", "x"]) * blups).sum(axis=1)
    assert np.allclose(found, result.predict(data) + data.off + own, rtol=0, atol=1e-10)
    with pytest.raises(DataError, match="'off' is not in the data"):
        result.predict(data.drop(columns="off"), groups=True)
    assert len(result.predict(data.drop(columns=["off", "w"]))) == N


def test_unknown_and_missing_groups(one, nested):
    new = new_rows()
    population = one.predict(new)
    found = one.predict(new, groups=True)
    assert np.isnan(found["e"])
    assert found[["b", "d"]].equals(population[["b", "d"]])
    assert abs(found["a"] - population["a"]) > 1e-3
    gone = one.predict(new, groups=True, new_groups="nan")
    assert gone.isna().tolist() == [False, True, False, True, True, False]
    with pytest.raises(DataError, match=r"2 rows are of groups.*g='nobody'"):
        one.predict(new, groups=True, new_groups="error")
    with pytest.raises(DataError, match=r"1 rows are of groups.*g=None \(missing\)"):
        one.predict(new.drop(index="b"), groups=True, new_groups="error")
    known = new.loc[["a", "f"]]
    assert one.predict(known, groups=True, new_groups="error").equals(found[["a", "f"]])
    # of several factors those that are known count: g2 is, its part 77 is not
    outer = nested.predict(new, groups=True)
    blups = nested.ranef()["g"].loc["g2"]
    want = nested.predict(new)["c"] + blups["Intercept"] + 2.0 * blups["x"]
    assert outer["c"] == pytest.approx(want, rel=1e-12)
    assert nested.predict(new, groups=True, new_groups="nan").isna().sum() == 5
    with pytest.raises(DataError, match="4 rows"):
        nested.predict(new, groups=True, new_groups="error")


def test_key_columns_by_other_names(nested, data):
    want = nested.predict(data, groups=True)
    other = data.rename(columns={"g": "school", "h": "class"})
    assert nested.predict(other, groups=["school", "class"]).equals(want)
    other["class"] = other["class"].astype(float)
    assert nested.predict(other, groups=["school", "class"]).equals(want)
    for bad, message in (
        ("school", "keys g, h"), (["school"], "keys g, h"), (3, "groups=3"),
        (["school", "room"], "'room' is not in the data"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            nested.predict(other, groups=bad)
    with pytest.raises(DataError, match="'h' has type"):
        nested.predict(data.assign(h=data.g), groups=True)


def test_keys_that_are_computed(data):
    result = dmixed.mixedlm("y ~ x", data, groups="g", vc_formula={"s": "0 + C(x > 0)"}).fit()
    found = result.predict(data, groups=True)
    assert np.allclose(found, result.fittedvalues, rtol=0, atol=1e-12)
    with pytest.raises(DataError, match="computed"):
        result.predict(data, groups=["g", "s"])


def test_arguments_that_make_no_sense(one, data, tmp_path):
    for bad, message in (
        ({"new_groups": "nan"}, "groups=True"),
        ({"groups": True, "new_groups": "zero"}, "new_groups='zero'"),
        ({"interval": "both"}, "interval='both'"),
        ({"se": "yes"}, "se='yes'"),
        ({"interval": "confidence", "alpha": 5}, "alpha=5"),
        ({"out": ""}, "out=''"),
    ):
        with pytest.raises(DataError, match=message):
            one.predict(data, **bad)
    with pytest.raises(NotSupportedError, match="design matrix"):
        one.predict(np.ones((2, 3)), groups=True, transform=False)
    X, z = design(data, ["1", "x"]), data.g
    arrays = dmixed.MixedLM(data.y.to_numpy(), X, z.to_numpy()).fit()
    assert isinstance(arrays.predict(groups=True), np.ndarray)
    assert np.allclose(arrays.predict(groups=True), arrays.fittedvalues, rtol=0, atol=1e-12)
    assert np.allclose(arrays.predict(X), arrays.predict(exog=X), rtol=0, atol=0)
    with pytest.raises(NotSupportedError, match="arrays"):
        arrays.augment(data)


def test_a_stored_result_predicts(nested, data, tmp_path):
    nested.save(tmp_path / "fit")
    loaded = dmixed.MixedLMResults.load(tmp_path / "fit")
    want = nested.predict(data, groups=True, se=True)
    found = loaded.predict(data, groups=True, se=True)
    assert np.allclose(found, want, rtol=1e-10, atol=1e-10)
    with pytest.raises(AttributeError, match="give new data"):
        loaded.predict(groups=True)


# --------------------------------------------------------------------------- lookups


def labels(*columns) -> keys.Labels:
    arrays = [pa.array(c) if not isinstance(c, pa.Array) else c for c in columns]
    arrays = [a.cast(pa.large_string()) if pa.types.is_string(a.type) else a for a in arrays]
    return keys.Labels(tuple(f"k{i}" for i in range(len(arrays))), tuple(arrays))


LABELS = {
    "integers": lambda i: (i * 7 - 300,),
    "floats": lambda i: (i / 4 - 20.0,),
    "text": lambda i: (pa.array([f"k{j}" for j in i]),),
    "dates": lambda i: (pa.array(i.astype(np.int32)).cast(pa.date32()),),
    "times": lambda i: (pa.array(i).cast(pa.timestamp("us", "UTC")),),
    "pairs": lambda i: (i // 10, pa.array([f"k{j % 10}" for j in i])),
    "triples": lambda i: (i % 2 == 0, i // 10, pa.array([f"k{j % 10}" for j in i])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_the_index_finds_what_alignment_finds(kind):
    rng = np.random.default_rng(3)
    known = Known(labels(*LABELS[kind](rng.permutation(500))))
    queries = labels(*LABELS[kind](rng.choice(800, 40, replace=False)))
    found = known.find(queries)
    assert known._index  # few queries: it was used
    assert (found == keys.lookup(known.labels, queries)).all()
    assert 0 < np.count_nonzero(found < 0) < 40
    assert not Known(known.labels)._index


def test_lookups_of_disjoint_groups_concatenate(nested, data):
    whole = nested._lookup(True)
    assert whole.errors is not None
    first = {g for i, g in enumerate(sorted(set(data.g))) if i % 2}

    def half(inside: bool) -> Lookup:
        def some(known: Known) -> np.ndarray:
            own = known.labels.arrays[0].to_pylist()
            return np.array([(x in first) == inside for x in own]).nonzero()[0]

        terms = []
        for term in whole.terms:
            at = some(term.known)
            terms.append(TermEffects(term.key, Known(term.known.labels.take(at)), term.effects[at]))
        at, e = some(whole.errors.known), whole.errors
        errors = Errors(Known(e.known.labels.take(at)), e.cov[at], e.slope[at], e.prior)
        return Lookup(whole.names, tuple(terms), errors)

    joined = Lookup.concatenate([half(True), half(False)])
    assert joined.nbytes > 0
    source = dmixed.sources.open_source(data)
    predictor = nested._wanted(True, "population", True, None, 0.05, source)
    rows = source.parts(predictor.columns)[0].task()
    a, b = predictor(whole, rows, ""), predictor(joined, rows, "")
    assert np.array_equal(a.values, b.values)


# --------------------------------------------------------------------------- Dask


def never(*_, **__):
    raise AssertionError("something was computed")


def partitions() -> tuple[pd.DataFrame, dd.DataFrame]:
    """Rows in partitions, of which one is empty, one has no key; the index is text."""
    rows = pd.concat([new_rows(), table().head(30), table(2).tail(20)])
    rows["h"] = rows["h"].astype("Int64")
    rows.index = [f"row {i}" for i in range(len(rows))]
    pieces = [rows.iloc[:6], rows.iloc[:0], rows.iloc[3:4], rows.iloc[6:]]
    frame = dd.from_map(lambda i: pieces[i], range(4), meta=rows.iloc[:0])
    return pd.concat(pieces), frame


@pytest.mark.parametrize("fit", ["one", "nested"])
def test_dask_frames_stay_lazy(request, fit):
    result = request.getfixturevalue(fit)
    rows, frame = partitions()
    with dask.config.set(scheduler=never):
        series = result.predict(frame, groups=True)
        lazy = result.predict(frame, groups=True, se=True, interval="prediction")
        plain = result.predict(frame)
    assert isinstance(series, dd.Series)
    assert series.npartitions == lazy.npartitions == 4
    assert lazy.dtypes.tolist() == [np.dtype(float)] * 4
    with dask.config.set(scheduler="threads"):
        want = result.predict(rows, groups=True, se=True, interval="prediction")
        pd.testing.assert_frame_equal(lazy.compute(), want, check_index_type=False)
        pd.testing.assert_series_equal(series.compute(), want["predicted"], check_index_type=False)
        pd.testing.assert_series_equal(
            plain.compute(), result.predict(rows), check_index_type=False
        )
        strict = result.predict(frame, groups=True, new_groups="error")
        with pytest.raises(DataError, match="groups that the fit has not seen"):
            strict.compute()


def test_predictions_can_be_assigned_to_their_frame(one, data, tmp_path):
    for i in range(7):
        data.iloc[i::7].assign(**{f"u{j}": 0.0 for j in range(9)}).to_parquet(
            tmp_path / f"{i}.parquet"
        )
    frame = dd.read_parquet(tmp_path)
    found = frame.assign(p=one.predict(frame, groups=True)).compute(scheduler="threads")
    want = one.predict(found[["x", "f", "g"]], groups=True)
    assert np.allclose(found["p"], want, rtol=0, atol=1e-12)
    known = dd.from_pandas(data, npartitions=5)
    assert one.predict(known, groups=True).divisions == known.divisions


def test_a_fit_to_a_dask_frame(data):
    frame = dd.from_pandas(data, npartitions=3, sort=False)
    result = dmixed.lmer("y ~ x + f + (1 + x | g)", frame)
    lazy = result.predict(groups=True)
    assert isinstance(lazy, dd.Series)
    assert np.allclose(lazy.compute(scheduler="threads"), result.fittedvalues, rtol=0, atol=1e-12)
    rows = result.augment()
    assert rows.npartitions == 3
    assert rows.compute(scheduler="threads").index.equals(data.index)


# --------------------------------------------------------------------------- augment


def assert_augmented(found: pd.DataFrame, result, rows: pd.DataFrame) -> None:
    assert np.allclose(found["y"], rows["y"], rtol=0, atol=0, equal_nan=True)
    want = result.predict(rows, groups=True)
    assert np.allclose(found["fitted"], want, rtol=0, atol=1e-12, equal_nan=True)
    assert np.allclose(found["resid"], rows.y - want, rtol=0, atol=1e-12, equal_nan=True)
    assert np.allclose(found["population"], result.predict(rows), rtol=0, atol=0, equal_nan=True)


def test_augment(one, nested, data, tmp_path):
    found = one.augment(data, columns=["w", "h", "y"])
    assert list(found) == ["g", "w", "h", "y", "fitted", "resid", "population"]
    assert found.index.equals(data.index)
    assert_augmented(found, one, data)
    frame = dd.from_pandas(data, npartitions=4, sort=False)
    with dask.config.set(scheduler=never):
        lazy = nested.augment(frame, columns=["w"])
    assert list(lazy.columns) == ["g", "h", "w", "y", "fitted", "resid", "population"]
    assert_augmented(lazy.compute(scheduler="threads"), nested, data)
    data.iloc[:100].to_parquet(tmp_path / "0.parquet", row_group_size=40)
    data.iloc[100:].to_parquet(tmp_path / "1.parquet")
    with dask.config.set(scheduler=never):
        lazy = nested.augment(str(tmp_path), columns=["f"])
    assert lazy.known_divisions
    assert_augmented(lazy.compute(scheduler="threads"), nested, data)
    assert lazy.compute(scheduler="threads").index.equals(pd.RangeIndex(N))
    with pytest.raises(DataError, match="'fitted' of the data has the name of a result"):
        one.augment(data.assign(fitted=1.0), columns=["fitted"])
    with pytest.raises(DataError, match="list of names"):
        one.augment(data, columns="w")


def test_augment_of_the_rows_used(data):
    d = data.copy()
    d.loc[d.index[[3, 50]], "x"] = np.nan
    d.loc[d.index[7], "g"] = None
    for rows in (d, dd.from_pandas(d, npartitions=4, sort=False)):
        result = dmixed.lmer("log(exp(y)) ~ x + f + (1 | g)", rows, weights="w")
        found = result.augment()
        if not isinstance(found, pd.DataFrame):
            found = found.compute(scheduler="threads")
        assert found.index.equals(d.index.delete([3, 7, 50]))
        assert list(found) == ["g", "log(exp(y))", "fitted", "resid", "population"]
        assert np.allclose(found["fitted"], result.fittedvalues, rtol=0, atol=1e-12)
        assert np.allclose(found["resid"], result.resid, rtol=0, atol=1e-12)
    whole = result.augment(d.drop(columns="w"))
    assert whole["fitted"].isna().sum() == 2  # a missing key is an unknown group
    assert whole["population"].isna().sum() == 2


# --------------------------------------------------------------------------- files


def read(place: str | Path) -> tuple[pd.DataFrame, dict]:
    manifest = json.loads((Path(place) / "_manifest.json").read_text())
    files = [Path(place) / x["file"] for x in manifest["files"]]
    tables = [pq.read_table(f) for f in files]
    assert all(t.schema.equals(tables[0].schema) for t in tables)
    assert [len(t) for t in tables] == [x["rows"] for x in manifest["files"]]
    assert manifest["rows"] == sum(map(len, tables))
    assert sorted(p.name for p in Path(place).iterdir()) == [
        "_manifest.json",
        *(f.name for f in files),
    ]
    return pa.concat_tables(tables).to_pandas(), manifest


def test_files_of_predictions(nested, tmp_path):
    rows, frame = partitions()
    want = nested.predict(rows, groups=True, se=True)
    out = nested.predict(frame, groups=True, se=True, out=tmp_path / "made" / "here")
    found, manifest = read(out)
    assert list(found) == ["g", "h", "predicted", "se"]
    assert manifest["schema"] == "dmixed-rows/1"
    assert manifest["formula"] == nested.formula
    assert list(manifest["columns"]) == list(found)
    assert len(manifest["files"]) == 4
    assert np.allclose(found[["predicted", "se"]], want, rtol=0, atol=0, equal_nan=True)
    assert found["g"].fillna("").tolist() == rows["g"].fillna("").tolist()
    again = dmixed.sources.open_source(out)
    assert again.columns == ("g", "h", "predicted", "se")
    with pytest.raises(DataError, match="not empty"):
        nested.predict(frame, groups=True, out=out)
    (tmp_path / "empty").mkdir()
    rows.assign(g=rows.g.astype("category")).to_parquet(tmp_path / "rows.parquet")
    nested.predict(str(tmp_path / "rows.parquet"), groups=True, out=str(tmp_path / "empty"))
    assert np.allclose(
        read(tmp_path / "empty")[0]["predicted"], want["predicted"], rtol=0, atol=0, equal_nan=True
    )
    nested.predict(rows[["x", "f"]], out=tmp_path / "population")
    assert list(read(tmp_path / "population")[0]) == ["predicted"]


def test_files_of_augmented_rows(one, data, tmp_path):
    frame = dd.from_pandas(data, npartitions=3, sort=False)
    found, _ = read(one.augment(frame, columns=["w"], out=tmp_path / "a"))
    assert list(found) == ["g", "w", "y", "fitted", "resid", "population"]
    assert_augmented(found.set_axis(data.index), one, data)


def test_after_an_error_nothing_is_there(one, data, tmp_path):
    bad = data.assign(f=np.where(np.arange(N) == 200, "unseen", data.f))
    frame = dd.from_pandas(bad, npartitions=4, sort=False)
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(DataError, match="unseen"):
            one.predict(frame, groups=True, out=out)
        assert not out.exists() or not list(out.iterdir())
        (tmp_path / "old").mkdir(exist_ok=True)
    strange = dd.from_pandas(data.assign(g="nobody"), npartitions=4, sort=False)
    with pytest.raises(DataError, match="240 rows"):
        one.predict(strange, groups=True, new_groups="error", out=tmp_path / "old")
    assert not list((tmp_path / "old").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not a directory"):
        one.predict(data, out=tmp_path / "file")
    with pytest.raises(DataError, match="cannot write"):
        one.predict(data, out=tmp_path / "file" / "below")
    meta = data.iloc[:0].assign(k=pd.Series([], dtype=object))
    mixed = dd.from_map(lambda i: data.iloc[:9].assign(k=["a", 1][i]), range(2), meta=meta)
    with (
        dask.config.set({"dataframe.convert-string": False}),
        pytest.raises(DataError, match="'k'"),
    ):
        one.augment(mixed, columns=["k"], out=tmp_path / "old")
    assert not list((tmp_path / "old").iterdir())


def test_files_on_other_storage(one, data):
    fs = fsspec.filesystem("memory")
    try:
        out = one.predict(data, groups=True, out="memory://bucket/new")
        assert out == "memory://bucket/new"
        assert {p.rpartition("/")[2] for p in fs.ls("/bucket/new", detail=False)} == {
            "part-00000.parquet", "_manifest.json",
        }  # fmt: skip
        with pytest.raises(DataError, match="not empty"):
            one.predict(data, groups=True, out="memory://bucket/new")
    finally:
        fs.rm("/bucket", recursive=True)


def test_files_on_an_object_store(one, data):
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {
            "key": "AKIDEXAMPLE",
            "secret": "hush-hush",
            "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
        }
        fs = fsspec.filesystem("s3", **options)
        fs.mkdir("effects")  # servers in one process share their buckets
        frame = dd.from_pandas(data, npartitions=3, sort=False)
        out = one.augment(frame, out="s3://effects/made/new", storage_options=options)
        assert len(fs.ls("effects/made/new")) == 4
        source = dmixed.sources.open_source(out, options)
        rows = pa.concat_tables([p.task() for p in source.parts(source.columns)]).to_pandas()
        assert_augmented(rows.set_axis(data.index), one, data)
        with pytest.raises(DataError, match="not empty"):
            one.predict(frame, out=out, storage_options=options)
        bad = frame.assign(f="unseen")
        with pytest.raises(DataError, match="unseen"):
            one.predict(bad, out="s3://effects/other", storage_options=options)
        assert not fs.exists("effects/other")
        with pytest.raises(DataError, match="cannot write to s3://nowhere/x") as error:
            one.predict(data, out="s3://nowhere/x", storage_options=options)
        assert "hush" not in str(error.value)
        assert "nowhere" not in {bucket.rstrip("/") for bucket in fs.ls("")}
        fs.rm("effects", recursive=True)
    finally:
        server.stop()


# --------------------------------------------------------------------------- tables of effects


def test_tables_of_effects(one, nested, data, tmp_path, monkeypatch):
    found, blups = one.ranef_table(), one.ranef()
    assert list(found) == ["g", "Intercept", "x", "se(Intercept)", "se(x)", "rows"]
    assert found["g"].tolist() == blups.index.tolist()
    assert np.array_equal(found[["Intercept", "x"]], blups)
    errors = np.sqrt(np.einsum("gaa->ga", one.ranef_cov()["g"]))
    assert np.allclose(found[["se(Intercept)", "se(x)"]], errors, rtol=1e-12)
    assert found["rows"].tolist() == data.g.value_counts().sort_index().tolist()
    assert list(one.ranef_table(condvar=False)) == ["g", "Intercept", "x", "rows"]
    tables, blups = nested.ranef_table(), nested.ranef()
    assert tables.keys() == blups.keys() == {"g:h", "g"}
    for label, table in tables.items():
        own = blups[label]
        assert table.set_index(label.split(":"))[list(own)].equals(own)
        errors = np.sqrt(np.einsum("gaa->ga", nested.ranef_cov()[label]))
        assert np.allclose(table[[f"se({name})" for name in own]], errors, rtol=1e-12)
        assert table["rows"].sum() == N
    monkeypatch.setattr(grouped, "FILE_ROWS", 5)
    out = one.ranef_table(out=tmp_path / "one")
    assert [x["rows"] for x in read(out)[1]["files"]] == [5, 5, 2]
    pd.testing.assert_frame_equal(read(out)[0], found)
    nested.ranef_table(out=tmp_path / "two")
    assert [p.name for p in sorted((tmp_path / "two").iterdir())] == [
        "00-g_h", "01-g", "_manifest.json",
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "two" / "01-g").num_rows == 12


def test_tables_of_bars_and_components(data):
    same = dmixed.lmer("y ~ x + (1 + x | g) + (0 + x | g)", data)
    assert list(same.ranef_table(condvar=False))[1:-1] == list(same.ranef())
    own = dmixed.lmer("y ~ h + (0 + x | h)", data.rename(columns={"h": "x", "x": "h"}).assign(
        x=data.h)[["y", "x", "h"]].rename(columns={"x": "k", "h": "rows"}).rename(
        columns={"rows": "x", "k": "h"}))  # fmt: skip
    assert list(own.ranef_table()) == ["h", "x", "se(x)", "rows"]
    parts = {"h": "0 + C(h)", "slope": "0 + x"}
    result = dmixed.mixedlm("y ~ x", data, groups="g", re_formula="1", vc_formula=parts).fit()
    tables, blups = result.ranef_table(), result.ranef()
    assert list(tables) == list(blups)
    for label in parts:
        table, own = tables[label], blups[label]
        assert list(table) == ["g", "effect", label, f"se({label})", "rows"]
        assert table.set_index(["g", "effect"])[label].tolist() == own[label].tolist()
        assert table["effect"].tolist() == own.index.get_level_values(1).tolist()
    sizes = data.groupby(["g", "h"]).size()
    assert sorted(tables["h"]["rows"]) == sorted(sizes)


# --------------------------------------------------------------------------- the command line


def test_the_command_predicts(data, tmp_path):
    rows, place = tmp_path / "rows.parquet", tmp_path / "predicted"
    data.to_parquet(rows)
    new = tmp_path / "new.parquet"
    new_rows().to_parquet(new)

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="dmixed")

    formula = "y ~ x + f + (1 + x | g)"
    fitted = run("fit", "--data", rows, "--formula", formula, "--save", tmp_path / "fit")
    assert fitted.exit_code == cli.Status.FITTED
    told = ("predict", "--model", tmp_path / "fit", "--data", new)
    found = run(*told, "--out", place, "--se", "--interval", "prediction", "--alpha", 0.1)
    assert found.exit_code == cli.Status.FITTED
    assert found.output == ""
    want = dmixed.lmer(formula, data).predict(
        new_rows(), groups=True, se=True, interval="prediction", alpha=0.1
    )
    table = read(place)[0]
    assert list(table) == ["g", *want]
    assert np.allclose(table[list(want)], want, rtol=1e-8, equal_nan=True)
    for arguments, message in (
        ((*told, "--out", place), "not empty"),
        ((*told, "--out", tmp_path / "x", "--new-groups", "error"), "2 rows are of groups"),
        (("fit", "--data", rows, "--formula", formula, "--save", place), "--save"),
    ):
        failed = run(*arguments)
        assert failed.exit_code == cli.Status.ERROR
        assert len(failed.stderr.splitlines()) == 1
        assert message in failed.stderr
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------- a cluster


@pytest.mark.timeout(120)
def test_on_a_cluster(one, nested, data, tmp_path, monkeypatch):
    want = nested.predict(data, groups=True, se=True)
    rows = one.augment(data)
    local = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")
    with local as cluster, Client(cluster):
        for ahead in (outputs.SENT_AHEAD, 0):  # with the graph, and before it
            monkeypatch.setattr(outputs, "SENT_AHEAD", ahead)
            found = nested.predict(data, groups=True, se=True)
            assert np.allclose(found, want, rtol=0, atol=1e-12)
            frame = dd.from_pandas(data, npartitions=4, sort=False)
            lazy = nested.predict(frame, groups=True, se=True)
            assert np.allclose(lazy.compute(), want, rtol=0, atol=1e-12)
            assert lazy.compute().index.equals(data.index)
            out = one.augment(frame, out=tmp_path / f"out-{ahead}")
            assert np.allclose(read(out)[0]["fitted"], rows["fitted"], rtol=0, atol=1e-12)
            with pytest.raises(DataError, match="240 rows"):
                one.predict(frame.assign(g="nobody"), groups=True, new_groups="error",
                            out=tmp_path / "none")  # fmt: skip
            assert not (tmp_path / "none").exists()
        nested.save(tmp_path / "fit")
        data.to_parquet(tmp_path / "rows.parquet")
        told = ["predict", "--model", tmp_path / "fit", "--data", tmp_path / "rows.parquet"]
        told += ["--out", tmp_path / "told", "--se", "--scheduler", cluster.scheduler_address]
        done = CliRunner().invoke(cli.app, [str(x) for x in told])
        assert done.exit_code == cli.Status.FITTED, done.output
        found = read(tmp_path / "told")[0][["predicted", "se"]]
        assert np.allclose(found, want, rtol=0, atol=1e-10)


def test_a_model_without_columns_predicts_every_row(tmp_path):
    frame = pd.DataFrame({"y": np.arange(12.0) ** 2, "g": np.arange(12) % 3})
    frame.to_parquet(tmp_path / "rows.parquet")
    result = dmixed.lmer("y ~ 1 + (1 | g)", frame)
    for data in (frame, str(tmp_path / "rows.parquet"), dd.from_pandas(frame, npartitions=2)):
        found = np.asarray(result.predict(data))
        np.testing.assert_array_equal(found, np.full(12, result.fe_params["Intercept"]))
