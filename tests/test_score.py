"""The score test of a covariance, against dense algebra and against its distribution."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, kstest

import dmixed
from dmixed.fitting import criterion_at, natural_root
from dmixed.inference.score import ScoreTest, expected_information, score_test
from dmixed.preparation import Prepared


def rows(seed: int, n: int = 240, slope: bool = True) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, 20, n), rng.normal(size=n)
    h = rng.integers(0, 6, n)
    b = rng.normal(size=(20, 2)) * [1.0, 0.5 * slope]
    y = 1 + x + b[g, 0] + b[g, 1] * x + 0.7 * rng.normal(size=6)[h] + rng.normal(size=n)
    return pd.DataFrame({"y": y, "x": x, "g": g, "h": h})


def prepared(formula: str, data: pd.DataFrame) -> Prepared:
    return dmixed.collect(formula, data).model()._prepared


def score_at(model: Prepared, Psi: np.ndarray, reml: bool) -> ScoreTest:
    factors = model.problem.factors
    at = criterion_at(model, Psi, reml)
    return score_test(factors, at, natural_root(model.problem, Psi), reml)


def dense(data: pd.DataFrame, Psi: np.ndarray, formula: str, reml: bool) -> float:
    """The statistic from n x n matrices: sigma2 and Psi together, sigma2 at its estimate."""
    n, y = len(data), data["y"].to_numpy()
    X = np.column_stack([np.ones(n), data["x"]])
    G, h = np.eye(20)[data["g"]], np.eye(6)[data["h"]]
    slopes = [[G, G * data["x"].to_numpy()[:, None]]]
    columns = [[G], [h]] if "(1 | h)" in formula else slopes
    dH, place = [], 0
    H = np.eye(n)
    for Z in columns:
        for a in range(len(Z)):
            for b in range(a + 1):
                D = Z[a] @ Z[b].T
                dH.append(D + D.T if a != b else D)
                H += Psi[place + a, place + b] * dH[-1]
        place += len(Z)
    Hi = np.linalg.inv(H)
    P = Hi - Hi @ X @ np.linalg.solve(X.T @ Hi @ X, X.T @ Hi)
    sigma2 = y @ P @ y / (n - 2 if reml else n)
    M = P if reml else Hi
    D = [*dH, H]  # with respect to log sigma2, all relative to sigma2
    gradient = np.array([np.trace(M @ d) - y @ P @ d @ P @ y / sigma2 for d in D])
    information = np.array([[np.trace(M @ c @ M @ d) for c in D] for d in D])
    return float(gradient @ np.linalg.solve(information, gradient) / 2)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("formula", ["y ~ x + (1 + x | g)", "y ~ x + (1 | g) + (1 | h)"])
def test_it_is_that_of_dense_algebra(formula: str, reml: bool) -> None:
    data = rows(1)
    model = prepared(formula, data)
    Psi = np.array([[0.8, 0.1], [0.1, 0.4]]) if "h" not in formula else np.diag([0.5, 1.2])
    found = score_at(model, Psi, reml)
    assert found.df == (2 if "h" in formula else 3)
    assert found.statistic == pytest.approx(dense(data, Psi, formula, reml), rel=1e-9)
    assert found.pvalue == pytest.approx(chi2.sf(found.statistic, found.df))


@pytest.mark.parametrize("reml", [True, False])
def test_it_is_nothing_at_the_estimate(reml: bool) -> None:
    data = rows(2)
    result = dmixed.lmer("y ~ x + (1 + x | g)", data, reml=reml)
    model = prepared("y ~ x + (1 + x | g)", data)
    found = score_at(model, np.asarray(result.cov_re_unscaled), reml)
    assert found.statistic < 1e-10
    assert found.pvalue == pytest.approx(1.0)


def test_units_do_not_matter() -> None:
    data = rows(3)
    Psi, scale = np.array([[0.8, 0.1], [0.1, 0.4]]), np.array([1.0, 1e-3])
    one = score_at(prepared("y ~ x + (1 + x | g)", data), Psi, True)
    other = data.assign(x=1e3 * data["x"], y=100 * data["y"])
    two = score_at(prepared("y ~ x + (1 + x | g)", other), Psi * np.outer(scale, scale), True)
    assert two.statistic == pytest.approx(one.statistic, rel=1e-8)


def test_a_variance_of_zero_is_not_tested() -> None:
    """Of a covariance of rank one in two columns two directions remain."""
    model = prepared("y ~ x + (1 + x | g)", rows(4))
    found = score_at(model, np.array([[1.0, 0.0], [0.0, 0.0]]), True)
    assert found.df == 2
    none = score_at(model, np.zeros((2, 2)), True)
    assert none.df == 0
    assert np.isnan(none.pvalue)


def test_the_information_is_the_mean_of_the_hessian() -> None:
    """Over data drawn from the model; sigma2 is profiled, which costs a term of 1/n."""
    rng = np.random.default_rng(5)
    g = np.repeat(np.arange(60), 5)
    found, expected = [], []
    for _ in range(120):
        y = rng.normal(size=60)[g] + rng.normal(size=300)
        model = prepared("y ~ 1 + (1 | g)", pd.DataFrame({"y": y, "g": g}))
        at = criterion_at(model, np.eye(1), True)
        found.append(at.hessian[0, 0])
        expected.append(expected_information(model.problem.factors, at, True)[0, 0])
    error = np.std(found) / np.sqrt(len(found))
    assert np.ptp(expected) < 1e-6 * expected[0]
    assert abs(np.mean(found) - expected[0]) < 4 * error


def test_it_has_its_distribution() -> None:
    """At the covariance that made the data p is uniform."""
    rng = np.random.default_rng(6)
    n, g = 600, np.repeat(np.arange(100), 6)
    pvalues = []
    for _ in range(150):
        x, b = rng.normal(size=n), rng.normal(size=(100, 2)) * [1.0, 0.5]
        y = b[g, 0] + b[g, 1] * x + rng.normal(size=n)
        model = prepared("y ~ x + (1 + x | g)", pd.DataFrame({"y": y, "x": x, "g": g}))
        pvalues.append(score_at(model, np.diag([1.0, 0.25]), True).pvalue)
    assert kstest(pvalues, "uniform").pvalue > 0.01


def test_it_finds_another_covariance() -> None:
    model = prepared("y ~ x + (1 + x | g)", rows(7, n=2000))
    assert score_at(model, np.diag([0.05, 0.25]), True).pvalue < 1e-6
