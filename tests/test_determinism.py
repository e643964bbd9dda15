"""Answers are the same to the last bit on threads and on clusters of any size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dmixed
from dmixed import cellmoments, onelevel, planning, preparation
from dmixed.sources import base

ROWS, GROUPS, PARTS = 12_000, 900, 24
FEW = 128
"""Groups from which equal ones are put together here."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "intercept": ("y ~ x + (1 | g)", {}),
    "slope": ("y ~ x + (1 + x | g)", {}),
    "factor": ("y ~ x + f + (1 | g) + (0 + x | g)", {}),
    "weights": ("y ~ x * f + (1 + x | label)", {"weights": "w", "reml": False}),
    "far": ("y ~ far + (1 + far | g)", {}),
    "nested": ("y ~ x + (1 | f / g)", {}),
}
"""Formula and options; the variable of "far" is far from zero: sums have references."""

pytestmark = pytest.mark.timeout(180)


def table() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    g, x = rng.integers(0, GROUPS, ROWS), rng.normal(size=ROWS)
    level = 1e5 * rng.normal(size=GROUPS)[g]
    return pd.DataFrame(
        {
            "y": 1 + x + rng.normal(size=GROUPS)[g] * (1 + 0.5 * x) + rng.normal(size=ROWS),
            "x": x,
            "far": 1e6 + level + x,
            "tall": x + 10 * level + rng.normal(size=ROWS),
            "f": rng.choice(["a", "b", "c"], ROWS, p=[0.7, 0.29, 0.01]),
            "w": rng.uniform(0.5, 2.0, ROWS),
            "g": g,
            "label": np.array([f"group {i}" for i in range(GROUPS)])[g],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Files of unlike sizes, of several row groups each."""
    folder = tmp_path_factory.mktemp("files")
    ends = [1000, 1200, 4321, 4400, 9000]
    for i, rows in enumerate(np.split(np.arange(ROWS), ends)):
        table().iloc[rows].to_parquet(folder / f"part-{i}.parquet", row_group_size=333)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, groups put together, and evaluations on workers, however few rows."""
    monkeypatch.setattr(base, "ROWS", ROWS // PARTS)
    monkeypatch.setattr(onelevel, "MANY", FEW)
    monkeypatch.setattr(preparation, "MERGED", 0)


@pytest.fixture(params=["whole", "shards"])
def divided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "shards":
        monkeypatch.setattr(planning, "WHOLE", 0)
    return bool(request.param == "shards")


def bits(result: dmixed.MixedLMResults) -> dict[str, str]:
    """Numbers of a result, exactly."""
    names = ("llf", "theta", "fe_params", "cov_re", "bse", "bse_fe", "bse_re", "scale")
    return {name: np.asarray(getattr(result, name), np.float64).tobytes().hex() for name in names}


def fit(case: str, data: Any, **options: Any) -> dmixed.MixedLMResults:
    formula, own = CASES[case]
    return dmixed.lmer(formula, data, progress=False, **own, **options)


_THREADS: dict[tuple[str, bool], dict[str, str]] = {}


def threads(case: str, folder: str, divided: bool) -> dict[str, str]:
    """What the threads of this process find."""
    if (case, divided) not in _THREADS:
        _THREADS[case, divided] = bits(fit(case, folder))
    return _THREADS[case, divided]


def few_here() -> None:
    """What `small` does, in a worker."""
    onelevel.MANY = FEW


def many_parts(enough: int = 8) -> None:
    """Shards of a worker in several parts."""
    cellmoments.ENOUGH = enough


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=4, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as found:
        yield found


@pytest.fixture(scope="module", params=["4 workers", "2 workers", "1 worker", "2 threads"])
def client(request: pytest.FixtureRequest, cluster: LocalCluster) -> Iterator[Client]:
    """A cluster that gets smaller, and one whose worker has several threads."""
    if request.param == "2 threads":
        with (
            LocalCluster(
                n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0"
            ) as other,
            Client(other, set_as_default=False) as found,
        ):
            found.run(few_here)
            yield found
        return
    n = int(request.param.split()[0])
    cluster.scale(n)
    with Client(cluster, set_as_default=False) as found:
        while len(found.nthreads()) != n:
            time.sleep(0.01)
        found.run(few_here)
        yield found


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_finds_what_threads_find(
    client: Client, folder: str, divided: bool, case: str
) -> None:
    here = threads(case, folder, divided)
    assert bits(fit(case, folder, client=client, evaluate_on="driver")) == here


@pytest.mark.parametrize("case", [case for case in CASES if case != "nested"])
def test_workers_find_what_threads_find(
    client: Client, folder: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the workers, and here from what they have put together."""
    monkeypatch.setattr(planning, "WHOLE", 0)
    here = threads(case, folder, True)
    there = fit(case, folder, client=client, evaluate_on="workers")
    assert there._prepared.problem.factors.elsewhere is not None
    assert bits(there) == here


def test_shards_of_several_parts(
    client: Client, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker adds up part by part within its shards is added up so here."""
    monkeypatch.setattr(planning, "WHOLE", 0)
    monkeypatch.setattr(cellmoments, "ENOUGH", 8)
    client.run(many_parts)
    formula = "tall ~ x + (1 + x | g)"  # with references
    try:
        there = dmixed.lmer(formula, folder, client=client, evaluate_on="workers", progress=False)
    finally:
        client.run(many_parts, 2**14)
    assert bits(there) == bits(dmixed.lmer(formula, folder, progress=False))


def test_a_dask_frame(client: Client, divided: bool) -> None:
    """One task for each partition, and a deeper tree."""
    frame = dd.from_pandas(table(), npartitions=PARTS, sort=False)
    here = bits(fit("slope", frame))
    assert bits(fit("slope", frame, client=client, evaluate_on="driver")) == here


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads(folder: str, divided: bool, case: str) -> None:
    here = threads(case, folder, divided)
    for n in (1, 3):
        with dask.config.set(num_workers=n):
            assert bits(fit(case, folder)) == here


def test_the_cases_are_what_they_are_meant_to_be(folder: str) -> None:
    """Parts, groups put together, references: or the tests above would prove less."""
    found = {case: fit(case, folder) for case in CASES}
    assert found["intercept"]._prepared.problem.factors.evaluated[0].n_groups < GROUPS // 2
    assert found["far"].model.spec.references
    assert not found["slope"].model.spec.references
    assert len(found["slope"].model.source.parts(("x",))) > planning.TASKS
    assert all(result.converged for result in found.values())
