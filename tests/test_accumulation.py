"""Sums of rows that lie group by group, and of the same rows in any order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import accumulation
from dmixed.products import gram

FORMULA = "y ~ x + z + f + (1 + x + z | g)"
ROWS, GROUPS = 40_000, 300


def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    g = np.sort(rng.integers(0, GROUPS, ROWS))
    return pd.DataFrame(
        {
            "g": g,
            "x": rng.normal(size=ROWS),
            "z": rng.normal(size=ROWS),
            "f": rng.choice(["a", "b", "c"], ROWS),
            "w": rng.uniform(0.5, 2.0, ROWS),
            "y": rng.normal(size=ROWS) + rng.normal(size=GROUPS)[g],
        }
    )


@pytest.mark.parametrize("far", [0.0, 1e7])
@pytest.mark.parametrize("weights", [None, "w"])
def test_runs(weights: str | None, far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table().assign(y=lambda d: d.y + far * d.g)  # far apart: sums about references
    calls = []
    own = accumulation.Accumulator._scatter_runs
    monkeypatch.setattr(
        accumulation.Accumulator,
        "_scatter_runs",
        lambda self, *args: calls.append(len(args[0])) or own(self, *args),
    )
    by_runs = dmixed.collect(FORMULA, rows, weights=weights).cells
    assert sum(calls) == ROWS
    monkeypatch.setattr(accumulation, "RUN", ROWS)
    calls.clear()
    one_by_one = dmixed.collect(FORMULA, rows, weights=weights).cells
    assert not calls
    assert by_runs.labels.arrays[0].equals(one_by_one.labels.arrays[0])
    a, b = by_runs.group, one_by_one.group
    assert (a.reference is not None) == (b.reference is not None) == (far > 0)
    np.testing.assert_array_equal(a.counts, b.counts)
    assert (np.abs(a.WtF - b.WtF) <= 1e-12 * np.abs(b.WtF).max(axis=0)).all()
    np.testing.assert_allclose(a.FtF, b.FtF, rtol=1e-12, atol=1e-12 * np.abs(b.FtF).max())


def test_runs_of_a_group_that_come_again() -> None:
    rows = table()
    order = np.concatenate([np.flatnonzero(np.arange(ROWS) // 50 % 3 == part) for part in range(3)])
    expected, found = dmixed.lmer(FORMULA, rows), dmixed.lmer(FORMULA, rows.iloc[order])
    assert found.llf == pytest.approx(expected.llf, rel=1e-12)
    np.testing.assert_allclose(found.fe_params, expected.fe_params, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [1, 100, 8192, 16_384])
@pytest.mark.parametrize("k", [1, 2, 7, 8, 16, 17])
def test_a_gram_matrix_is_the_same_either_way(k, n):
    rows = np.random.default_rng(k).standard_normal((k, n))
    found = gram(rows)
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-12, atol=1e-12 * n)
    np.testing.assert_allclose(found, found.T, rtol=1e-13, atol=1e-13 * n)
