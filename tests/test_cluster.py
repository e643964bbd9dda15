"""A real cluster gives the answer that threads give."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dmixed
from dmixed.dispatch import check_workers
from dmixed.evaluation import _by_thread

FORMULA = "y ~ x + f + (1 + x | g)"


def table():
    rng = np.random.default_rng(0)
    n, groups = 600, 40
    g = rng.integers(0, groups, n)
    x = rng.normal(0, 1, n)
    y = 1 + x + rng.normal(0, 1, groups)[g] * (1 + 0.5 * x) + rng.normal(0, 1, n)
    labels = np.array([f"group {i}" for i in range(groups)])
    d = pd.DataFrame({"y": y, "x": x, "f": rng.choice(["a", "b"], n), "g": labels[g]})
    d.loc[[3, 500], "x"] = np.nan
    return d


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def threads():
    """The answer of this process, computed while no client is about."""
    return dmixed.lmer(FORMULA, table())


@pytest.fixture(params=["pandas", "dask", "parquet"])
def source(request, tmp_path):
    if request.param == "pandas":
        return table()
    frame = dd.from_pandas(table(), npartitions=5, sort=False)
    if request.param == "dask":
        return frame
    for i, part in enumerate(np.array_split(np.arange(600), 4)):
        table().iloc[part].to_parquet(tmp_path / f"part-{i}.parquet", row_group_size=70)
    return str(tmp_path)


def assert_equal(a, b):
    assert a.llf == pytest.approx(b.llf, rel=1e-10)
    assert np.allclose(a.fe_params, b.fe_params, rtol=1e-10)
    assert np.allclose(a.bse_fe, b.bse_fe, rtol=1e-10)
    assert a.scale == pytest.approx(b.scale, rel=1e-10)
    assert np.allclose(a.cov_re, b.cov_re, rtol=1e-8)
    assert a.ranef().index.equals(b.ranef().index)
    assert np.allclose(a.ranef(), b.ranef(), rtol=0, atol=1e-8)
    assert np.allclose(a.fittedvalues, b.fittedvalues, rtol=0, atol=1e-8)
    assert a.dropped == b.dropped
    assert a.nobs == b.nobs == 598


@pytest.mark.timeout(120)
def test_with_the_client_given(threads, cluster, source):
    with Client(cluster, set_as_default=False) as client:
        assert_equal(dmixed.lmer(FORMULA, source, client=client), threads)


@pytest.mark.timeout(120)
def test_with_the_current_client(threads, cluster, source):
    with Client(cluster) as client:
        before = client.run(lambda dask_worker: dask_worker.state.transition_counter)
        assert_equal(dmixed.lmer(FORMULA, source), threads)
        after = client.run(lambda dask_worker: dask_worker.state.transition_counter)
    assert before != after  # the workers did something


@pytest.mark.timeout(120)
def test_errors_travel_back_from_the_workers(cluster):
    d = table()
    d["w"] = 1.0
    d.loc[321, "w"] = -1.0
    frame = dd.from_pandas(d, npartitions=3, sort=False)
    with Client(cluster), pytest.raises(dmixed.DataError, match=r"\bw\b"):
        dmixed.lmer(FORMULA, frame, weights="w")


@pytest.mark.timeout(120)
def test_results_from_a_cluster_outlive_it(threads, cluster):
    with Client(cluster) as client:
        result = dmixed.lmer(FORMULA, table(), client=client)
    assert str(result.summary()) == str(threads.summary())
    assert np.allclose(result.fittedvalues, threads.fittedvalues, atol=1e-8)


# ------------------------------------------------------------------------ moments on workers


@pytest.mark.timeout(120)
@pytest.mark.parametrize("formula", [FORMULA, "y ~ x + (1 | g)", "y ~ x + (1 | g) + (0 + x | g)"])
def test_evaluated_on_the_workers(cluster, source, formula):
    with Client(cluster) as client:
        here = dmixed.lmer(formula, source, client=client)
        there = dmixed.lmer(formula, source, client=client, evaluate_on="workers")
        assert there._prepared.shards
        assert there.llf == pytest.approx(here.llf, abs=1e-8)
        assert np.allclose(there.fe_params, here.fe_params, rtol=1e-9)
        assert np.allclose(there.bse_fe, here.bse_fe, rtol=1e-8)
        assert np.allclose(there.bse_re, here.bse_re, rtol=1e-6)
        assert there.n_groups == here.n_groups == 40
        assert there.nobs == here.nobs
        assert there.dropped == here.dropped
        assert str(there.summary()).splitlines()[4:] == str(here.summary()).splitlines()[4:]
        with pytest.raises(dmixed.NotSupportedError, match="on the workers"):
            there.ranef()
        with pytest.raises(dmixed.NotSupportedError, match="cannot be pickled"):
            pickle.dumps(there)


@pytest.mark.timeout(120)
def test_groups_are_gone_with_the_client(cluster, tmp_path):
    with Client(cluster) as client:
        result = dmixed.lmer(FORMULA, table(), client=client, evaluate_on="workers")
    assert "598" in str(result.summary())
    for use in (
        lambda: result.ranef_table(),
        lambda: result.ranef_table(out=str(tmp_path / "out")),
        lambda: result.predict(table(), groups=True),
    ):
        with pytest.raises(dmixed.DmixedError, match="whose client is closed"):
            use()
    assert not (tmp_path / "out").exists()


def test_lost_shards_are_made_again_apart():
    class Scheduler:
        def who_has(self, futures):
            return {"a": ("w1",), "b": ("w1",), "c": (), "d": ("w2",), "e": ()}

        def nthreads(self):
            return {"w1": 1, "w2": 4}

    futures = [SimpleNamespace(key=key) for key in "abcde"]
    assert sorted(_by_thread(Scheduler(), futures)) == [[0, 1], [2], [3], [4]]


def test_a_worker_lost_while_it_is_asked_is_no_refusal():
    class Scheduler:
        def get_versions(self, packages):
            return {"workers": {"w": {"packages": {"dmixed": dmixed.__version__}}}}

        def run(self, probe, on_error):
            return {"w": None, "lost": OSError("closed"), "blind": self.blind}

    client = Scheduler()
    client.blind = None
    check_workers(client, lambda: None)
    client.blind = "no such file"
    with pytest.raises(dmixed.DmixedError, match=r"the worker blind has no access.*no such file"):
        check_workers(client, lambda: None)


@pytest.mark.timeout(120)
def test_what_cannot_be_evaluated_on_workers(cluster):
    with pytest.raises(dmixed.DmixedError, match="needs a cluster"):
        dmixed.lmer(FORMULA, table(), evaluate_on="workers")
    with pytest.raises(dmixed.DataError, match='"auto", "driver" or "workers"'):
        dmixed.lmer(FORMULA, table(), evaluate_on="moon")
    with Client(cluster), pytest.raises(dmixed.NotSupportedError, match="one grouping factor"):
        dmixed.lmer("y ~ x + (1 | g/f)", table(), evaluate_on="workers")


def by_group(frame):
    frame = frame.assign(g=frame["g"].astype(object))  # text of Dask's frames, or of pandas'
    return frame.set_index("g").sort_index()


@pytest.mark.timeout(180)
def test_outputs_of_groups_on_the_workers(cluster, threads, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    new = table().drop(columns="y").assign(g=lambda d: d["g"].where(d.index % 9 > 0, "unknown"))
    with Client(cluster) as client:
        there = dmixed.lmer(FORMULA, source, client=client, evaluate_on="workers")
        wanted = by_group(threads.ranef_table())
        effects = there.ranef_table()
        assert effects.npartitions > 1
        pd.testing.assert_frame_equal(by_group(effects.compute()), wanted, atol=1e-8)
        there.ranef_table(out=str(folder / "effects"))
        pd.testing.assert_frame_equal(
            by_group(pd.read_parquet(folder / "effects")), wanted, atol=1e-8
        )
        for options in ({}, {"se": True, "interval": "prediction"}):
            a = threads.predict(new, groups=True, **options)
            b = there.predict(new, groups=True, **options)
            assert np.allclose(a, b, atol=1e-7, equal_nan=True)
        there.predict(new, groups=True, se=True, out=str(folder / "predictions"))
        found = pd.read_parquet(folder / "predictions")
        errors = threads.predict(new, groups=True, se=True)["se"]
        assert np.allclose(found["se"], errors, atol=1e-7, equal_nan=True)
        assert np.allclose(there.fittedvalues, threads.fittedvalues, atol=1e-7)
        lazy = there.predict(dd.from_pandas(new, npartitions=3), groups=True)
        assert np.allclose(lazy.compute(), threads.predict(new, groups=True), equal_nan=True)
        assert np.allclose(there.predict(new), threads.predict(new), equal_nan=True)


# ------------------------------------------------------------------------ workers that cannot


def hide(hidden):
    """Make a worker tell of another dmixed, or of none."""
    from distributed import versions

    found = versions.get_package_info
    versions.get_package_info = lambda names: {**dict(found(names)), "dmixed": hidden}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("hidden", "words"), [("0.0.9", "dmixed 0.0.9"), (None, "no dmixed")])
def test_workers_with_another_dmixed(hidden, words):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as own,
        Client(own) as client,
    ):
        one = next(iter(client.scheduler_info()["workers"]))
        client.run(hide, hidden=hidden, workers=[one])
        with pytest.raises(dmixed.DmixedError, match=f"the worker {one} has {words}: install"):
            dmixed.lmer(FORMULA, table())


@pytest.mark.timeout(120)
def test_data_that_workers_cannot_see(cluster):
    uri = "memory://only-here/data.parquet"  # of this process
    table().to_parquet(uri)
    with (
        Client(cluster),
        pytest.raises(dmixed.DmixedError, match=r"2 workers, such as tcp.* have no access to the "
                      r"data: .*only-here/data\.parquet"),
    ):  # fmt: skip
        dmixed.lmer(FORMULA, uri)
