"""What is logged to MLflow, without MLflow."""

from __future__ import annotations

import re
import sys

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import tracking
from dmixed.errors import DataError, DmixedError


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"a/b": rng.normal(size=200), "a_b": rng.normal(size=200)})
    frame["../x"] = rng.normal(size=200)
    frame["g"] = rng.integers(0, 20, 200)
    frame["y"] = rng.normal(size=20)[frame["g"]] + rng.normal(size=200)
    return frame


@pytest.fixture(scope="module")
def result(rows):
    return dmixed.lmer("y ~ `a/b` + a_b + I(`../x`) + (1 | g)", rows)


def test_names_are_those_that_mlflow_takes(result):
    found = tracking.metrics(result)
    for name, value in found.items():
        assert re.fullmatch(r"[A-Za-z0-9_\-. :/]+", name)
        assert not set(name.split("/")) & {"", ".", ".."}
        assert np.isfinite(value)
    fixed = [value for name, value in found.items() if name.startswith("fixed/")]
    np.testing.assert_array_equal(fixed, result.fe_params)


def test_two_names_that_become_one_are_told_apart():
    assert tracking._safe("a/b") == tracking._safe("a_b")
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"a(b": rng.normal(size=99), "a)b": rng.normal(size=99)})
    frame["y"], frame["g"] = rng.normal(size=99), np.arange(99) % 9
    found = tracking.metrics(dmixed.lmer("y ~ `a(b` + `a)b` + (1 | g)", frame))
    assert [name for name in found if name.startswith("fixed/")] == [
        "fixed/Intercept", "fixed/a_b", "fixed/a_b 2",
    ]  # fmt: skip


def test_the_model_predicts(result, rows, tmp_path):
    result.save(tmp_path / "fit")
    model = tracking._load_pyfunc(str(tmp_path / "fit"))
    found = model.predict(rows)["predicted"]
    np.testing.assert_allclose(found, result.predict(rows, groups=True), rtol=1e-12)
    without = model.predict(rows.drop(columns="g"))["predicted"]
    np.testing.assert_allclose(without, result.predict(rows), rtol=1e-12)
    with pytest.raises(DataError, match="DataFrame"):
        model.predict([1, 2])


def test_without_mlflow(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.pyfunc", None)
    with pytest.raises(DmixedError, match=r"dmixed\[mlflow\]"):
        dmixed.log_mlflow(result)
