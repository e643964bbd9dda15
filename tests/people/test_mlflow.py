"""A fit in a local store of the real MLflow: what is logged, and the model that predicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed import tracking

pytest.importorskip("mlflow", reason="extra people: pip install '.[people]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*type hint.*:UserWarning")


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # Files need no database driver, which mlflow-skinny lacks; MLflow 3.5 and later ask for this.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    import mlflow as module

    module.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield module
    while module.active_run() is not None:
        module.end_run()
    module.set_tracking_uri(None)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    n = 300
    frame = pd.DataFrame({"x/(1)": rng.normal(size=n), "k": rng.integers(0, 5, n)})
    frame["f"] = rng.choice(["a", "b"], n)
    frame["g"] = rng.integers(0, 20, n)
    frame["w"] = rng.uniform(1, 2, n)
    b = rng.normal(size=(20, 2))
    frame["y"] = b[frame["g"], 0] + frame["x/(1)"] * b[frame["g"], 1] + rng.normal(size=n)
    return frame


FORMULA = "y ~ `x/(1)` + k + f + (1 + `x/(1)` | g)"


def test_a_fit_is_logged_and_its_model_predicts(mlflow: Any, rows: pd.DataFrame) -> None:
    result = dmixed.lmer(FORMULA, rows, weights="w")
    info = dmixed.log_mlflow(result)
    assert mlflow.active_run() is None
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.params["formula"] == FORMULA
    assert run.data.params["weights"] == "w"
    assert run.data.params["method"] == "REML"
    found = run.data.metrics
    assert found["llf"] == pytest.approx(result.llf)
    assert "aic" not in found  # NaN under REML
    assert found["rows"] == 300
    assert found["groups"] == 20
    assert found["fixed/k"] == pytest.approx(result.fe_params["k"])
    assert found["fixed/x__1_"] == pytest.approx(result.fe_params["x/(1)"])
    sd = np.sqrt(result.varcorr()["g"].iloc[0, 0])
    assert found["sd/g/Intercept"] == pytest.approx(sd)
    assert found["gradient"] < 1e-5
    assert run.data.tags["dmixed.converged"] == "true"
    assert run.data.tags["dmixed.version"] == dmixed.__version__
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/summary.txt")
    assert text == f"{result.summary()}\n"
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/result.json")["aic"] is None

    model = mlflow.pyfunc.load_model(info.model_uri)
    new = rows.drop(columns=["y", "w"]).head(30)
    expected = result.predict(new, groups=True)
    np.testing.assert_allclose(model.predict(new)["predicted"], expected, rtol=1e-12)
    population = model.predict(new, params={"groups": False})["predicted"]
    np.testing.assert_allclose(population, result.predict(new), rtol=1e-12)
    without = model.predict(new.drop(columns="g"))["predicted"]
    np.testing.assert_allclose(without, result.predict(new), rtol=1e-12)
    new.loc[0, "x/(1)"] = np.nan
    assert np.isnan(model.predict(new)["predicted"].iloc[0])
    with pytest.raises(Exception, match="k"):
        model.predict(new.drop(columns="k"))


def test_nothing_is_pickled(mlflow: Any, rows: pd.DataFrame) -> None:
    info = dmixed.log_mlflow(dmixed.lmer(FORMULA, rows))
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {"", ".json", ".parquet", ".yaml", ".yml", ".txt"}
    flavour = info.flavors["python_function"]
    assert flavour["loader_module"] == tracking.LOADER
    assert "dmixed==" in (folder / "requirements.txt").read_text()
    assert {x.name for x in info.signature.inputs} == {"x/(1)", "k", "f", "g"}


def test_in_a_run_of_the_callers(mlflow: Any, rows: pd.DataFrame) -> None:
    result = dmixed.lmer(FORMULA, rows, reml=False)
    with mlflow.start_run() as run:
        assert dmixed.log_mlflow(result, model=False) is None
        assert mlflow.active_run().info.run_id == run.info.run_id
    local = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/fit")
    assert dmixed.MixedLMResults.load(local).llf == result.llf
    assert mlflow.get_run(run.info.run_id).data.metrics["aic"] == pytest.approx(result.aic)


def test_a_loaded_result_can_be_logged(mlflow: Any, rows: pd.DataFrame, tmp_path: Path) -> None:
    result = dmixed.lmer(FORMULA, rows.assign(k=rows["k"].astype(float)))
    result.save(tmp_path / "fit")
    info = dmixed.log_mlflow(dmixed.MixedLMResults.load(tmp_path / "fit"))
    new = rows.assign(k=rows["k"].astype(float)).head(5)
    found = mlflow.pyfunc.load_model(info.model_uri).predict(new)["predicted"]
    np.testing.assert_allclose(found, result.predict(new, groups=True), rtol=1e-12)
