"""Moments in shards, and groups put together, give what the whole gives."""

from __future__ import annotations

from dataclasses import replace

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import keys, onelevel, planning
from dmixed.cellmoments import join, split
from dmixed.evaluation import Evaluator
from dmixed.executor import plan_pass
from dmixed.fitting import Search, fit
from dmixed.newton import CLOSE
from dmixed.onelevel import OneLevel, merged
from dmixed.preparation import prepare

FORMULAS = "y ~ x + f + (1 | g)", "y ~ x + f + (1 + x | g)", "y ~ f + (1 | g) + (0 + x | g)"


def table(n=6000, groups=500, seed=0, labels=None):
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, n)
    x = rng.normal(0, 1, n)
    y = 1 + x + rng.normal(0, 1, groups)[g] * (1 + 0.5 * x) + rng.normal(0, 1, n)
    names = np.array([f"group {i}" for i in range(groups)]) if labels is None else labels
    return pd.DataFrame({"y": y, "x": x, "f": rng.choice(["a", "b"], n), "g": names[g]})


def moments(formula, data):
    return dmixed.MixedLM._of(
        dmixed.model.parse(formula, ()), data, None, None, "drop", None, None, {}
    ).moments


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("shards", [2, 16])
def test_split_and_joined(formula, shards):
    whole = moments(formula, table())
    parts = split(whole, shards)
    assert sum(len(p.labels) for p in parts) == len(whole.labels)
    joined = join(parts)
    assert joined.sizes == tuple(len(p.labels) for p in parts)
    place = keys.lookup(joined.labels, whole.labels)
    assert np.array_equal(joined.group.WtF[place], whole.group.WtF)
    assert np.array_equal(joined.group.counts[place], whole.group.counts)
    assert np.array_equal(joined.group.FtF, whole.group.FtF)
    assert joined.dropped == whole.dropped

    a, b = (fit(prepare(m)) for m in (whole, joined))
    assert a.value == pytest.approx(b.value, abs=1e-8)
    assert np.allclose(a.theta, b.theta, rtol=1e-8, atol=1e-10)
    assert np.allclose(a.beta, b.beta, rtol=1e-10)


def test_shards_of_shards_are_the_shards():
    whole = moments(FORMULAS[1], table())
    once = split(whole, 32)
    twice = [fine for coarse in split(whole, 8) for fine in split(coarse, 4, 8)]
    for a, b in zip(once, twice, strict=True):
        assert a.labels.arrays[0].to_pylist() == b.labels.arrays[0].to_pylist()
        assert np.array_equal(a.group.WtF, b.group.WtF)
        assert np.array_equal(a.group.FtF, b.group.FtF)
        assert a.dropped == b.dropped


def test_random_effects_of_shards():
    whole = moments(FORMULAS[1], table())
    joined = join(split(whole, 8))
    results = []
    for m in (whole, joined):
        prepared = prepare(m)
        results.append(dmixed.MixedLMResults(prepared, fit(prepared)))
    a, b = results
    assert np.allclose(a.ranef(), b.ranef(), atol=1e-9)
    assert a.ranef().index.equals(b.ranef().index)
    for x, y in zip(a.ranef_cov().values(), b.ranef_cov().values(), strict=True):
        assert np.allclose(x, y, atol=1e-9)
    for label in ("group 3", "group 400", "group 499"):
        assert np.allclose(a.random_effects[label], b.random_effects[label], atol=1e-9)
        assert np.allclose(a.random_effects_cov[label], b.random_effects_cov[label], atol=1e-9)


def test_shards_do_not_depend_on_what_else_there_is():
    data = table()
    whole = split(moments(FORMULAS[0], data), 8)
    some = split(moments(FORMULAS[0], data[data["g"] < "group 3"]), 8)
    for a, b in zip(whole, some, strict=True):
        assert set(b.labels.arrays[0].to_pylist()) <= set(a.labels.arrays[0].to_pylist())


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("labels", ["text", "integers", "pairs"])
def test_a_pass_in_shards(formula, labels, tmp_path, monkeypatch):
    """The whole engine, made to divide what is small."""
    data = table(labels=None if labels == "text" else np.arange(500) * 1_000_003)
    if labels == "pairs":
        data["h"] = data["g"] % 7
        formula = formula.replace("g)", "g:h)")
    for i, part in enumerate(np.array_split(np.arange(len(data)), 6)):
        data.iloc[part].to_parquet(tmp_path / f"part-{i}.parquet")
    once = dmixed.lmer(formula, data)
    monkeypatch.setattr(planning, "WHOLE", 0)
    again = dmixed.lmer(formula, str(tmp_path))
    assert len(again._prepared.moments.sizes) == planning.SHARDS
    assert again.llf == pytest.approx(once.llf, abs=1e-7)
    assert np.allclose(again.fe_params, once.fe_params, rtol=1e-9)
    assert np.allclose(again.ranef(), once.ranef(), atol=1e-7)
    assert again.ranef().index.equals(once.ranef().index)


# ------------------------------------------------------------------------ equal groups


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("formula", ["y ~ x + (1 | g)", "y ~ t + (1 + t | g)"])
def test_groups_of_equal_R_are_put_together(formula, reml, monkeypatch):
    rng = np.random.default_rng(1)
    groups = 900
    sizes = rng.integers(1, 7, groups) if "x" in formula else np.full(groups, 5)
    g = np.repeat(np.arange(groups), sizes)
    t = np.concatenate([np.arange(n) for n in sizes]).astype(float)
    data = pd.DataFrame({"g": g, "t": t, "x": rng.normal(size=len(g))})
    data["y"] = rng.normal(size=groups)[g] * (1 + 0.3 * t) + data["x"] + rng.normal(size=len(g))
    found = moments(formula, data)
    plain = prepare(found)
    monkeypatch.setattr(onelevel, "MANY", 100)
    short = prepare(found)
    assert plain.problem.factors.evaluated[0].n_groups == groups
    assert short.problem.factors.evaluated[0].n_groups < 60
    assert short.problem.factors.parts[0].n_groups == groups
    for root in (np.eye(plain.k_re), np.zeros((plain.k_re,) * 2), 1e4 * np.eye(plain.k_re)):
        for order in (0, 1, 2):
            a, b = (Evaluator(p.problem.factors)(root, order) for p in (plain, short))
            for name in ("logdet", "FtHiF", "first", "second", "dF", "d2F"):
                x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
                assert np.allclose(x, y, rtol=1e-10, atol=1e-10 * np.abs(x).max(initial=0.0))
    a, b = fit(plain, reml), fit(short, reml)
    assert a.value == pytest.approx(b.value, abs=1e-8)
    assert np.allclose(a.beta, b.beta, rtol=1e-9)


def test_groups_that_differ_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(onelevel, "MANY", 100)
    found = prepare(moments(FORMULAS[1], table())).problem.factors
    assert found.evaluated[0] is found.parts[0]
    few = OneLevel(np.ones((1, 9, 50)))
    assert merged(few, 1) is few


# ------------------------------------------------------------------------ planning


def test_keys_of_shuffled_clustered_and_few_groups():
    rng = np.random.default_rng(0)
    shuffled = planning.keys_of(rng.integers(0, 100_000, 16384), 10**8)
    assert 70_000 < shuffled.groups < 140_000
    assert not shuffled.clustered
    clustered = planning.keys_of(np.repeat(np.arange(200), 82)[:16384], 10**8)
    assert clustered.clustered
    assert clustered.groups == pytest.approx(10**8 / 82, rel=0.02)
    few = planning.keys_of(rng.integers(0, 10, 16384), 10**8)
    assert few.groups == pytest.approx(10)
    all_new = planning.keys_of(np.arange(16384), 10**8)
    assert all_new.groups == 10**8
    one = planning.keys_of(np.zeros(100, int), 10**8)
    assert one.share == 1.0
    assert planning.keys_of(np.full(3, -1), 10).groups == 0


def test_ranges_of_keys():
    shuffled = planning.Keys(10.0**8, False, 0.0)
    found = planning.with_ranges(shuffled, [(0, 999)] * 5)
    assert (found.groups, found.clustered) == (1000, False)
    found = planning.with_ranges(shuffled, [(0, 999), (1000, 1999), (1999, 3000)])
    assert (found.groups, found.clustered) == (3001, True)
    some = planning.Keys(900.0, False, 0.0)  # as many as the first of three parts has
    assert planning.with_ranges(some, [(0, 999), (1000, 1999), (2000, 2999)]).groups == 2700
    assert planning.with_ranges(shuffled, []) == shuffled
    assert planning.with_ranges(shuffled, [("a", "b")]) == shuffled
    assert not planning.with_ranges(shuffled, [(0, 999)]).clustered


@pytest.mark.parametrize("rows", [10, 10**5, 10**8, 10**10])
@pytest.mark.parametrize("groups", [1, 10**4, 10**6, 10**9])
@pytest.mark.parametrize("clustered", [True, False])
def test_tasks_keep_their_states_small(rows, groups, clustered):
    size = 144
    keys_ = planning.Keys(float(min(groups, rows)), clustered, 0.0)
    tasks = planning._tasks(rows, keys_, size)
    assert keys_.met(rows / tasks, rows) * size <= planning.STATE
    assert tasks >= planning.FEW_TASKS
    shards = planning._shards(keys_.groups * size)
    assert shards == 1 or keys_.groups * size / shards <= planning.SHARD


def test_an_exchange_in_two_stages(tmp_path, monkeypatch):
    data = table()
    for i, part in enumerate(np.array_split(np.arange(len(data)), 12)):
        data.iloc[part].to_parquet(tmp_path / f"part-{i}.parquet")
    frame = dd.read_parquet(tmp_path)
    monkeypatch.setattr(planning, "WHOLE", 0)
    monkeypatch.setattr(planning, "SHARDS", 32)
    one = moments(FORMULAS[1], frame)
    monkeypatch.setattr(planning, "PIECES", 50)
    monkeypatch.setattr(planning, "STATE", 2**10)
    model = dmixed.MixedLM._of(
        dmixed.model.parse(FORMULAS[1], ()), frame, None, None, "drop", None, None, {}
    )
    layout = plan_pass(model.spec, model.source, model.spec and model._pilot)[1].layout
    assert (layout.coarse, layout.shards) == (8, 32)
    two = model.moments
    assert one.sizes == two.sizes
    place = keys.lookup(one.labels, two.labels)
    assert np.allclose(one.group.WtF[place], two.group.WtF, rtol=1e-12, atol=1e-12)
    assert np.allclose(one.group.FtF, two.group.FtF, rtol=1e-12)


@pytest.mark.parametrize("groups", [10**4, 10**7, 10**9])
def test_pieces_do_not_explode(groups):
    """Tasks that take a shard of a state, of 1e10 rows: what Dask's scheduler has to do."""
    found = planning.Keys(float(groups), False, 0.0)
    size = 144
    tasks, shards = planning._tasks(10**10, found, size), planning._shards(groups * size)
    states = found.met(10**10 / tasks, 10**10) * size
    assert states <= planning.STATE
    assert tasks * shards**0.5 < 200_000


def test_moments_of_a_task_keep_no_cell_without_rows():
    data = table(n=300, groups=30)
    data.loc[data["g"] == "group 7", "x"] = np.nan
    found = moments(FORMULAS[0], data)
    assert "group 7" not in found.labels.arrays[0].to_pylist()
    assert (found.group.counts > 0).all()


def test_totals_add():
    whole = moments(FORMULAS[1], table())
    parts = split(whole, 4)
    found = parts[0].summary
    for part in parts[1:]:
        found = found + part.summary
    a, b = whole.group.totals, found.totals
    assert (a.n_groups, a.nobs, a.nbytes // 8192) == (b.n_groups, b.nobs, b.nbytes // 8192)
    for name in ("FtF", "gram", "unweighted", "between"):
        assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-12)
    assert found.design.fixed_names == whole.design.fixed_names
    assert replace(whole, sizes=()).shards[0].n_groups == whole.n_cells


# ------------------------------------------------------------------------ the first shard


@pytest.mark.parametrize("formula", [FORMULAS[0], FORMULAS[2]])  # the other ends singular
@pytest.mark.parametrize("reml", [True, False])
def test_the_search_starts_from_the_first_shard(formula, reml):
    found = moments(formula, table(n=40_000, groups=4_000))
    assert prepare(found).problem.factors.first is None  # cells in no order are no sample
    whole, parts = prepare(found), prepare(join(split(found, 8)))
    a, b = fit(whole, reml), fit(parts, reml)
    assert a.summary.sampled == 0
    assert 0 < b.summary.sampled <= 12
    assert a.summary.converged
    assert b.summary.converged
    assert a.value == pytest.approx(b.value, abs=1e-7)
    assert np.allclose(a.theta, b.theta, rtol=1e-6)


def test_a_sample_without_variance_is_no_start():
    data = table(n=20_000, groups=2_000)
    data["y"] = np.random.default_rng(3).normal(size=len(data)) + data["x"]
    parts = prepare(join(split(moments(FORMULAS[0], data), 8)))
    whole = prepare(moments(FORMULAS[0], data))
    a, b = fit(whole), fit(parts)
    assert a.value == pytest.approx(b.value, abs=1e-7)
    assert np.allclose(a.theta, b.theta, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_small_step_is_expanded_as_if_it_were_evaluated(formula):
    """The last step of a search: value, derivatives and the matrices that estimates come from."""
    factors = prepare(moments(formula, table())).problem.factors
    blocks, terms = factors.blocks, Evaluator(factors)
    root = blocks.root(np.linspace(0.9, 0.4, len(blocks.theta_pairs)))
    moved = root * (1 + CLOSE)
    change = moved @ moved.T - root @ root.T
    found = terms(root).expanded(np.array([change[a, b] for a, b in blocks.pairs]))
    there = terms(moved)
    digits = {"logdet": 14, "FtHiF": 14, "first": 13, "dF": 13, "second": 7, "d2F": 7}
    for name, kept in digits.items():
        one, other = getattr(found, name), getattr(there, name)
        assert np.abs(one - other).max() <= 10.0**-kept * np.abs(other).max(), name
    assert terms(root).logdet != there.logdet


def test_a_search_from_its_end_takes_one_evaluation():
    prepared = prepare(moments(FORMULAS[0], table()))
    first = fit(prepared)
    again = fit(prepared, search=Search(start=first.variances.Psi))
    assert again.summary.evaluations == 1
    assert again.value == pytest.approx(first.value, abs=1e-11)
