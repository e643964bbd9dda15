"""Many small Dask partitions: a task computes several of them, one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.delayed import Delayed
from distributed import Client, LocalCluster

import dmixed
from dmixed import executor, planning
from dmixed.sources import load, open_source
from dmixed.sources.partitions import NODES, Partition, on_their_own

FORMULA = "y ~ x + (1 + x | g)"
PARTS, ROWS = 40, 200
COLUMNS = ("y", "x", "g")

pytestmark = pytest.mark.timeout(120)


def rows(part: int) -> pd.DataFrame:
    """Rows of a partition."""
    rng = np.random.default_rng(part)
    b = np.random.default_rng(99).normal(size=(20, 2))
    g, x = rng.integers(0, 20, ROWS), rng.normal(size=ROWS)
    y = 1 + x + b[g, 0] + b[g, 1] * x + rng.normal(size=ROWS)
    return pd.DataFrame({"y": y, "x": x, "g": g, "not read": "text"})


META = rows(0).iloc[:0]


def frame(make: Any = rows, parts: int = PARTS) -> dd.DataFrame:
    return dd.from_map(make, range(parts), meta=META)


def whole(parts: int = PARTS) -> pd.DataFrame:
    return pd.concat([rows(i) for i in range(parts)], ignore_index=True)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of the partitions in each task, although there are few."""
    monkeypatch.setattr(planning, "FRAME_TASKS", 3)


def fit(data: Any, **options: Any) -> dmixed.MixedLMResults:
    return dmixed.lmer(FORMULA, data, progress=False, **options)


def layout(data: Any) -> planning.Layout:
    parsed = dmixed.model.parse(FORMULA, ())
    model = dmixed.MixedLM._of(parsed, data, None, None, "drop", None, None, {})
    return executor.plan_pass(model.spec, model.source, model._pilot)[1].layout


def parts_of(data: dd.DataFrame) -> list[Any]:
    return on_their_own(open_source(data).parts(COLUMNS))


def apart(data: dd.DataFrame) -> bool:
    """Whether each partition can be computed on its own."""
    kinds = {isinstance(part.task, Partition) for part in parts_of(data)}
    assert len(kinds) == 1
    return kinds.pop()


def bits(result: dmixed.MixedLMResults) -> list[bytes]:
    names = ("llf", "theta", "fe_params", "cov_re", "bse_fe", "scale")
    return [np.asarray(getattr(result, name), dtype=np.float64).tobytes() for name in names]


# ------------------------------------------------------------------------ which ones


@pytest.mark.parametrize(
    "data",
    [
        frame(),
        frame()[frame()["x"] > 0],
        frame().assign(x=lambda d: d["x"] + 1),
        dd.from_delayed([dask.delayed(rows)(i) for i in range(PARTS)], meta=META),
        dd.from_pandas(whole(), npartitions=PARTS, sort=False),
        frame(parts=4 * PARTS).repartition(npartitions=PARTS),
        frame().persist(scheduler="sync"),
    ],
    ids=["made", "filtered", "assigned", "delayed", "in memory", "joined", "computed"],
)
def test_partitions_on_their_own(data: dd.DataFrame) -> None:
    assert apart(data)
    expected = [part.task for part in open_source(data).parts(COLUMNS)]
    for part, delayed in zip(parts_of(data)[:3], expected[:3], strict=True):
        assert load(part).equals(load(part, delayed.compute(scheduler="sync")))
    assert len(layout(data).runs) == 3


def test_partitions_that_share_something() -> None:
    data = frame()
    assert not apart(data.assign(x=data["x"] - data["x"].mean()))
    assert not apart(data.shuffle("g", shuffle_method="tasks"))


def test_what_is_there_already() -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        data = frame().persist()
        assert not apart(data)
        assert not apart(dd.from_delayed(client.map(rows, range(PARTS)), meta=META))
        parts = open_source(data).parts(COLUMNS)
        assert on_their_own(parts) == parts
        assert all(isinstance(part.task, Delayed) for part in parts)
        assert fit(data).nobs == PARTS * ROWS


def test_partitions_made_of_very_many() -> None:
    assert apart(frame(parts=NODES).repartition(npartitions=2))
    assert not apart(frame(parts=4 * NODES).repartition(npartitions=2))


def test_few_and_large_partitions_are_tasks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    few = frame(parts=executor.MANY_FRAMES - 1)
    assert len(layout(few).runs) == executor.MANY_FRAMES - 1
    assert len(layout(frame()).runs) == 3
    monkeypatch.setattr(executor, "SMALL_FRAME", ROWS - 1)
    assert len(layout(frame()).runs) == PARTS


@pytest.mark.parametrize(
    ("parts", "each", "tasks"),
    [(40, 10, 40), (1000, 10, 128), (10_000, 200, 625), (50, 60_000, 50)],
)
def test_tasks_of_small_partitions(
    monkeypatch: pytest.MonkeyPatch, parts: int, each: int, tasks: int
) -> None:
    monkeypatch.undo()
    source = open_source(frame(parts=parts))
    spec = dmixed.MixedLM._of(
        dmixed.model.parse(FORMULA, ()), whole(), None, None, "drop", None, None, {}
    ).spec
    own = on_their_own(source.parts(COLUMNS))
    keys = planning.Keys(20.0, False, 0.1)
    runs = planning.layout(spec, own, parts * each, keys, 100).runs
    assert len(runs) == tasks
    assert [i for run in runs for i in run] == list(range(parts))


# ------------------------------------------------------------------------ what comes out


def test_the_same_fit() -> None:
    one, many = fit(whole()), fit(frame())
    assert many.llf == pytest.approx(one.llf, rel=1e-12)
    assert np.allclose(many.fe_params, one.fe_params, rtol=1e-10)
    assert many.nobs == PARTS * ROWS
    assert np.allclose(many.fittedvalues, one.fittedvalues, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as found,
    ):
        yield found


def test_the_same_bits(client: Client) -> None:
    here = bits(fit(frame()))
    for n in (1, 3):
        with dask.config.set(num_workers=n):
            assert bits(fit(frame())) == here
    assert bits(fit(frame(), client=client)) == here


MADE: list[int] = []
LAST: list[Any] = []


def recorded(part: int) -> pd.DataFrame:
    """Rows of a partition, of which the one before is forgotten by now."""
    assert all(ref() is None for ref in LAST)
    found = rows(part)
    MADE.append(part)
    LAST[:] = [weakref.ref(found)]
    return found


def computed() -> list[int]:
    """Partitions that a fit computes."""
    MADE.clear()
    with dask.config.set(scheduler="sync"):
        assert fit(frame(recorded)).nobs == PARTS * ROWS
    return sorted(MADE)


def test_each_is_computed_once_and_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = computed()
    # 15 have the rows of the pilot, and the first one is counted
    assert found == sorted([0, *range(15), *range(PARTS)])
    monkeypatch.setattr(executor, "SMALL_FRAME", 0)
    assert computed() == found


def test_progress_counts_partitions() -> None:
    events: list[Any] = []
    dmixed.lmer(FORMULA, frame(), progress=events.append)
    read = [event for event in events if event.stage == "pass"]
    assert max(event.done for event in read) == PARTS
    assert max(event.rows for event in read) == PARTS * ROWS


def odd(part: int) -> pd.DataFrame:
    found = rows(part)
    return found.astype({"x": str}) if part == 29 else found


def failing(part: int) -> pd.DataFrame:
    if part == 31:
        raise ArithmeticError("no such rows")
    return rows(part)


@pytest.mark.parametrize("cluster", [False, True])
def test_errors_name_the_partition(request: pytest.FixtureRequest, cluster: bool) -> None:
    there = request.getfixturevalue("client") if cluster else None
    with pytest.raises(dmixed.DataError, match="partition 29: column 'x' has type"):
        fit(frame(odd), client=there)
    with pytest.raises(ArithmeticError, match="no such rows") as caught:
        fit(frame(failing), client=there)
    assert any("partition 31" in note for note in caught.value.__notes__)
