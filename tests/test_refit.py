"""``dmixed refit``: what is appended and published, by whom, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster
from typer.testing import CliRunner, Result

import dmixed
from dmixed import cli, drift, planning, published, refitting, store, turnover
from dmixed import refit as runs
from dmixed.evaluation import RemoteMoments
from dmixed.folders import Folder
from dmixed.jobs import Job, read_job
from dmixed.published import Published
from tests.objectstore import ObjectStore

FORMULA = "y ~ x + f + (1 + x | g)"
JOB = f"""\
schema: dmixed-refit/1
formula: "{FORMULA}"
data: rows
store: moments
publish: results
"""


def rows(day: int, n: int = 300, shift: float = 0.0, towns: int = 30) -> pd.DataFrame:
    """A day's rows; towns are the same every day, some are new."""
    rng = np.random.default_rng([7, day])
    b = np.random.default_rng(7).normal(size=(200, 2))
    g, x, h = rng.integers(0, towns + 2 * day, n), rng.normal(size=n), rng.integers(0, 6, n)
    y = 1 + shift + x + b[g, 0] + 0.5 * b[g, 1] * x + 0.3 * h + rng.normal(size=n)
    labels = np.array([f"town {j:03}" for j in range(200)])
    d = pd.DataFrame({"y": y, "x": x, "g": labels[g], "h": h, "f": rng.choice(["a", "b"], n)})
    d["w"] = rng.uniform(1, 2, n)
    d.loc[[3, 5], "x"] = np.nan
    return d


class Place:
    """A folder with a job, and what is done there."""

    def __init__(self, folder: Path, text: str = JOB) -> None:
        self.folder, self.path = folder, folder / "job.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows").mkdir(exist_ok=True)
        self.write(text)

    def write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")

    def add(self, day: int, **options: Any) -> pd.DataFrame:
        found = rows(day, **options)
        found.to_parquet(self.folder / "rows" / f"day-{day}.parquet")
        return found

    def run(self, *arguments: str) -> Result:
        given = ["refit", str(self.path), *arguments]
        return CliRunner().invoke(cli.app, given, prog_name="dmixed")

    def done(self, status: int, *arguments: str) -> dict[str, Any]:
        """What ``--json`` prints of a run that ends with a status."""
        result = self.run("--json", *arguments)
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    @property
    def job(self) -> Job:
        return read_job(self.path)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def pointer(self) -> dict[str, Any]:
        return json.loads((self.results / "current.json").read_text())

    @property
    def current(self) -> Path:
        return self.results / self.pointer["folder"]

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.current / name).read_text())

    @property
    def effects(self) -> pd.DataFrame:
        return pd.read_parquet(self.current / "random_effects")

    @property
    def versions(self) -> list[str]:
        return sorted(x.name for x in self.results.iterdir() if x.is_dir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def assert_one_line(result: Result, *words: str) -> None:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dmixed: ")
    for word in words:
        assert word in lines[0]


def assert_is_the_fit(place: Place, data: pd.DataFrame, formula: str = FORMULA, **o: Any) -> None:
    """What is published is the fit of all rows at once."""
    plain = dmixed.lmer(formula, data, **o)
    found = place.read("result.json")
    assert found["converged"]
    assert found["nobs"] == plain.nobs
    assert found["llf"] == pytest.approx(plain.llf, rel=1e-12)
    assert found["fe_params"] == pytest.approx(plain.fe_params.to_dict(), rel=1e-8)
    assert found["scale"] == pytest.approx(plain.scale, rel=1e-8)
    wanted = plain.ranef_table()
    tables = wanted if isinstance(wanted, dict) else {"": wanted}
    for number, (label, table) in enumerate(tables.items()):
        name = f"{number:02}-{label}" if label else ""
        effects = pd.read_parquet(place.current / "random_effects" / name)
        pd.testing.assert_frame_equal(effects, table, check_dtype=False, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------ end to end


def test_two_days(place: Place) -> None:
    first = place.add(0)
    assert place.done(0)["status"] == "published"
    assert_is_the_fit(place, first)
    drifted = place.read("drift.json")
    assert drifted["before"] is None
    assert drifted["largest_change"] == 0.0
    one = place.pointer["version"]

    second = place.add(1)
    done = place.done(0)
    assert (done["status"], done["store_version"]) == ("published", 2)
    assert done["appended"]["files"] == [str(place.folder / "rows" / "day-1.parquet")]
    assert (done["appended"]["rows"], done["appended"]["skipped"]) == (298, 1)
    assert done["folder"] == str(place.current)
    assert_is_the_fit(place, pd.concat([first, second]))
    assert place.pointer["history"] == [done["version"], one]
    assert place.versions == [one, done["version"]]

    found = place.read("drift.json")
    assert (found["version"], found["before"]) == (done["version"], one)
    assert found["groups"]["g"]["levels"] == pd.concat([first, second])["g"].nunique()
    new = sorted(set(second["g"]) - set(first["g"]))
    assert new
    assert (found["groups"]["g"]["new"], found["groups"]["g"]["gone"]) == (len(new), 0)
    assert found["groups"]["g"]["first_new"] == new
    assert found["rows"] == {"used": 596, "dropped": {"x: missing": 4}}
    assert found["rows_before"] == {"used": 298, "dropped": {"x: missing": 2}}
    assert found["added"] == {
        "parts": 1,
        "rows": 298,
        "files": [str(place.folder / "rows" / "day-1.parquet")],
        "parts_gone": 0,
    }


def test_nothing_new(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add(0)
    place.done(0)
    before = {p: p.stat().st_mtime_ns for p in place.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(runs, "fitted_from", None)  # it would be called
    done = place.done(0)
    assert done["status"] == "nothing new"
    assert done["version"] == place.pointer["version"]
    assert {p: p.stat().st_mtime_ns for p in place.folder.rglob("*") if p.is_file()} == before
    result = place.run()
    assert result.stdout == f"nothing new: {done['version']} in {place.current}\n"
    assert result.stderr == ""


def test_only_new_files_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first file the names of columns are."""
    place.add(0)
    place.add(1)
    place.done(0)
    place.add(2)
    damaged = place.folder / "rows" / "day-1.parquet"
    stat = damaged.stat()
    damaged.write_bytes(b"x" * stat.st_size)  # of the same size and time
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert place.done(0)["appended"]["rows"] == 298


def test_the_report_compares_estimates_with_their_intervals(place: Place) -> None:
    first, before = place.add(0), None
    place.done(0)
    before = dmixed.lmer(FORMULA, first)
    now = dmixed.lmer(FORMULA, pd.concat([first, place.add(1)]))
    place.done(0)
    found = place.read("drift.json")
    by_name = {x["name"]: x for x in found["estimates"]}
    assert [x["kind"] for x in found["estimates"]] == ["fixed"] * 3 + ["random"] * 3 + ["scale"]
    for name, kind in (("x", "bse_fe"), ("g Var", "bse_re")):
        one = by_name[name]
        se = getattr(before, kind)[name]
        assert one["before"]["estimate"] == pytest.approx(before.params_user[name], rel=1e-6)
        assert one["now"]["estimate"] == pytest.approx(now.params_user[name], rel=1e-6)
        assert one["before"]["se"] == pytest.approx(se, rel=1e-6)
        assert one["before"]["upper"] - one["before"]["lower"] == pytest.approx(2 * 1.959964 * se)
        change = (now.params_user[name] - before.params_user[name]) / se
        assert one["change"] == pytest.approx(change, rel=1e-4)
    assert found["largest_change"] == max(abs(x["change"]) for x in found["estimates"])
    text = (place.current / "drift.txt").read_text()
    for word in ("compared with", "[Interval]", "Score test", "Rows used: 596 (before 298)"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 78


def test_the_score_test_is_at_the_covariance_before(place: Place) -> None:
    first = place.add(0)
    place.done(0)
    Psi = dmixed.lmer(FORMULA, first).cov_re_unscaled.to_numpy()
    model = dmixed.collect(FORMULA, pd.concat([first, place.add(1)])).model()
    place.done(0)
    wanted = runs.covariance_test(model._prepared, Psi, True)
    found = place.read("drift.json")["score_test"]
    assert found["df"] == 3
    assert found["statistic"] == pytest.approx(wanted.statistic, rel=1e-5)
    assert found["pvalue"] == pytest.approx(wanted.pvalue, rel=1e-5)


def test_the_search_begins_at_the_covariance_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []
    fit = refitting.MomentsModel._fit

    def watched(self: Any, reml: bool, search: Any, *rest: Any) -> Any:
        starts.append(search.start)
        return fit(self, reml, search, *rest)

    monkeypatch.setattr(refitting.MomentsModel, "_fit", watched)
    first = place.add(0)
    place.done(0)
    place.add(1)
    place.done(0)
    assert starts[0] is None
    np.testing.assert_allclose(
        starts[1], dmixed.lmer(FORMULA, first).cov_re_unscaled, rtol=1e-6, atol=1e-9
    )
    assert len(starts) == 2


def test_a_variance_of_zero_does_not_stay_there(place: Place) -> None:
    """The first day has no variance between towns; from there a warm start would not move."""
    place.write(JOB.replace(FORMULA, "y ~ 1 + (1 | g)"))
    g = np.repeat([f"t{i}" for i in range(20)], 5)
    flat = pd.DataFrame({"y": np.tile([1.0, -1.0, 2.0, -2.0, 0.0], 20), "g": g})
    flat.to_parquet(place.folder / "rows" / "day-0.parquet")
    place.done(0)
    assert place.read("result.json")["theta"] == [0.0]
    more = flat.assign(y=flat["y"] + np.repeat(np.random.default_rng(1).normal(0, 5, 20), 5))
    more.to_parquet(place.folder / "rows" / "day-1.parquet")
    place.done(4)
    assert_is_the_fit(place, pd.concat([flat, more]), "y ~ 1 + (1 | g)")
    assert place.read("result.json")["theta"][0] > 0.5
    assert place.read("drift.json")["score_test"]["df"] == 0


def test_several_factors(place: Place) -> None:
    formula = "y ~ x + (1 | g) + (1 | h)"
    place.write(JOB.replace(FORMULA, formula))
    first = place.add(0)
    place.done(0)
    second = place.add(1)
    place.done(0)
    assert_is_the_fit(place, pd.concat([first, second]), formula)
    found = place.read("drift.json")["groups"]
    assert list(found) == ["g", "h"]
    assert (found["h"]["levels"], found["h"]["new"], found["h"]["gone"]) == (6, 0, 0)
    assert found["g"]["new"] > 0
    names = place.read("result.json")["random_effects"]
    assert all((place.current / name).exists() for name in names)


def test_all_that_a_job_can_say_of_the_model(place: Place) -> None:
    first, second = place.add(0), place.add(1)
    lines = "reml: false\nweights: w\noffset: h\nfilters: [[h, in, [1, 2, 3]]]\n"
    place.write(JOB + lines + "carry: ['f']\ngroup_crossproducts: false\n")
    place.done(0)
    data = pd.concat([first, second])
    data = data[data["h"].isin([1, 2, 3])]
    assert_is_the_fit(place, data, reml=False, weights="w", offset="h")
    assert place.read("result.json")["method"] == "ML"
    assert place.read("provenance.json")["job"]["filters"] == [["h", "in", [1, 2, 3]]]


def test_a_smaller_model_of_the_same_store(place: Place) -> None:
    """Two jobs share a store: what one has appended, the other fits without reading it."""
    formula = "y ~ x + (1 | g)"
    other = place.folder / "small.yaml"
    small = JOB.replace(FORMULA, formula).replace(": results", ": small results")
    other.write_text(small, encoding="utf-8")
    days = []
    for day in range(2):
        days.append(place.add(day))
        place.done(0)
        outcome = runs.refit(read_job(other))
        assert (outcome.status, outcome.appended.nobs) == ("published", 0)
    assert outcome.folder is not None
    found = json.loads((Path(outcome.folder) / "result.json").read_text())
    plain = dmixed.lmer(formula, pd.concat(days))
    assert found["llf"] == pytest.approx(plain.llf, rel=1e-11)
    assert found["fe_params"] == pytest.approx(plain.fe_params.to_dict(), rel=1e-7)
    assert_is_the_fit(place, pd.concat(days))


def test_a_window(place: Place) -> None:
    place.write(JOB + "window: 2\ndrift: {limit: null}\n")
    days = []
    for day in range(4):
        days.append(place.add(day, towns=30 - 10 * (day == 3)))
        place.done(0)
        assert_is_the_fit(place, pd.concat(days[-2:]))
    found = place.read("drift.json")
    gone = set(days[1]["g"]) - set(days[2]["g"]) - set(days[3]["g"])
    assert found["groups"]["g"]["gone"] == len(gone)
    assert found["groups"]["g"]["first_gone"] == sorted(gone)[: drift.NAMED]
    assert found["added"]["parts_gone"] == 0


def test_provenance(place: Place) -> None:
    place.add(0)
    place.add(1)
    place.done(0)
    found = place.read("provenance.json")
    kept = dmixed.open_moments(place.folder / "moments")
    (delta,) = found["deltas"]
    assert found["store"] == {"uri": str(place.folder / "moments"), "version": 1}
    assert delta["files"] == list(kept.files)
    assert delta["id"] == kept.deltas[0].id
    assert found["versions"]["dmixed"] == dmixed.__version__
    assert found["job"]["formula"] == FORMULA


# ------------------------------------------------------------------------ files that change


def test_files_that_changed_or_vanished(place: Place) -> None:
    first, second = place.add(0), place.add(1)
    place.done(0)
    changed = first.iloc[:200]
    changed.to_parquet(place.folder / "rows" / "day-0.parquet")
    version = place.pointer["version"]
    result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "day-0.parquet changed since the rows were summed")
    assert place.pointer["version"] == version

    place.write(JOB + "changed: replace\n")
    first.iloc[:200].to_parquet(place.folder / "rows" / "day-0.parquet")
    (place.folder / "rows" / "day-1.parquet").unlink()
    place.write(JOB + "vanished: error\nchanged: replace\n")
    result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "day-1.parquet vanished from the data")
    second.to_parquet(place.folder / "rows" / "day-1.parquet")


def test_a_file_that_was_added_alone_is_replaced(place: Place) -> None:
    first = place.add(0)
    place.done(0)
    second = place.add(1)
    place.done(0)
    place.write(JOB + "changed: replace\ndrift: {limit: null}\n")
    second = second.iloc[:100]
    second.to_parquet(place.folder / "rows" / "day-1.parquet")
    done = place.done(0)
    assert done["appended"]["changed"] == [str(place.folder / "rows" / "day-1.parquet")]
    assert_is_the_fit(place, pd.concat([first, second]))
    assert place.read("drift.json")["added"]["parts_gone"] == 1


# ------------------------------------------------------------------------ drift


def test_drift_is_published_and_told(place: Place) -> None:
    place.add(0)
    place.done(0)
    place.add(1, shift=20.0)
    result = place.run()
    assert result.exit_code == cli.Status.DRIFTED == 4
    assert_one_line(result, "drift: an estimate changed by ", "standard errors, beyond 3")
    assert "BEYOND 3" in result.stdout
    assert place.pointer["store_version"] == 2
    assert place.read("drift.json")["beyond_limit"] is True
    assert place.done(0)["status"] == "nothing new"


def test_drift_is_held_back_until_it_is_accepted(place: Place) -> None:
    place.write(JOB + "drift: {limit: 3, action: hold}\n")
    first = place.add(0)
    place.done(0)
    one = place.pointer
    second = place.add(1, shift=20.0)
    done = place.done(4)
    assert (done["status"], done["drift"]) == ("held", True)
    assert place.pointer == one
    again = place.done(4)
    assert (again["status"], again["version"]) == ("held", done["version"])
    assert again["folder"] == done["folder"]
    result = place.run()
    assert_one_line(result, "is held back, dmixed refit --accept publishes it")
    assert place.done(0, "--accept")["status"] == "published"
    assert place.pointer["version"] == done["version"]
    assert_is_the_fit(place, pd.concat([first, second]))


def test_a_limit_that_is_raised_lets_a_version_pass(place: Place) -> None:
    place.write(JOB + "drift: {limit: 0.001, action: hold}\n")
    place.add(0)
    place.done(0)
    place.add(1)
    held = place.done(4)
    place.write(JOB + "drift: {limit: 100, action: hold}\n")
    assert place.done(0)["version"] == held["version"] == place.pointer["version"]


def estimate(name: str, value: float, se: float = 1.0) -> drift.Estimate:
    return drift.Estimate("fixed", name, value, se)


def test_changes_of_estimates() -> None:
    nan = float("nan")
    now = [estimate("a", 5.0, 3.0), estimate("b", 2.0, 0.5), estimate("new", 1.0)]
    before = [estimate("gone", 1.0), estimate("b", 1.0, nan), estimate("a", 1.0, 2.0)]
    found = drift.changes_of(now, before)
    assert [change.one.name for change in found] == ["a", "b", "new", "gone"]
    assert [change.size for change in found[:2]] == [2.0, 2.0]
    assert all(np.isnan(change.size) for change in found[2:])
    held = drift.Change(estimate("a", 1.0, nan), estimate("a", 0.0, nan))
    assert np.isnan(held.size)


# ------------------------------------------------------------------------ what is refused


def test_a_job_file_that_is_not_valid(place: Place) -> None:
    place.write(JOB + "keep: 0\nmising: drop\n")
    for arguments in ((), ("--check",)):
        result = place.run(*arguments)
        assert result.exit_code == cli.Status.USAGE
        assert result.stdout == ""
        one, two = result.stderr.splitlines()
        assert one == f"dmixed: error: {place.path}:6: keep: must be greater than or equal to 1"
        assert two.startswith(f"dmixed: error: {place.path}:7: unknown field 'mising'")
    assert sorted(path.name for path in place.folder.iterdir()) == ["job.yaml", "rows"]


def test_checking_does_nothing_else(place: Place) -> None:
    result = place.run("--check")
    assert (result.exit_code, result.stdout) == (0, f"{place.path}: is valid\n")
    assert not (place.folder / "moments").exists()


def test_the_schema_is_printed(place: Place) -> None:
    result = CliRunner().invoke(cli.app, ["refit", "--schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["title"] == "dmixed refit job"
    result = CliRunner().invoke(cli.app, ["refit"])
    assert result.exit_code == cli.Status.USAGE
    assert "JOB.yaml" in result.output


def test_no_data(place: Place) -> None:
    result = place.run("--json")
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, str(place.folder / "rows"))
    found = json.loads(result.stdout)
    assert found["status"] == "error"
    assert str(place.folder / "rows") in found["reason"]


def test_a_store_of_another_model(place: Place) -> None:
    place.add(0)
    place.done(0)
    for text, word in (
        (JOB.replace("+ f ", "+ h "), "'h'"),
        (JOB + "weights: w\n", "weights is 'w', in the store it is None"),
        (JOB + "offset: w\n", "offset is 'w'"),
        (JOB + "missing: raise\n", "missing is 'raise'"),
        (JOB + "carry: [h]\n", "'h' of carry is not in the store"),
        (JOB + "group_crossproducts: true\n", "no cross-products"),
        (JOB + "filters: [[h, '>', 2]]\n", "filters"),
    ):
        place.write(text)
        result = place.run()
        assert result.exit_code == cli.Status.ERROR
        assert_one_line(result, word)


def test_another_model_on_the_same_store_is_not_compared(place: Place) -> None:
    data = place.add(0)
    place.done(0)
    one = place.pointer["version"]
    place.write(JOB + "reml: false\n")
    done = place.done(0)
    assert done["status"] == "published"
    found = place.read("drift.json")
    assert found["before"] is None
    assert found["reason"] == f"not compared with {one}, which is of another model"
    assert found["added"]["parts"] == 0
    assert_is_the_fit(place, data, reml=False)
    place.write(JOB)
    assert place.done(0)["version"] == one  # it is still there
    assert place.pointer["history"] == [one, done["version"]]


def test_no_convergence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add(0)
    place.done(0)
    one = place.pointer
    place.add(1)
    fit, starts = refitting.MomentsModel._fit, []

    def lost(self: Any, reml: bool, search: Any, *rest: Any) -> Any:
        starts.append(search.start is None)
        found = fit(self, reml, search, *rest)
        return replace(found, summary=replace(found.summary, converged=False))

    with monkeypatch.context() as context:
        context.setattr(refitting.MomentsModel, "_fit", lost)
        result = place.run()
        assert result.exit_code == cli.Status.NOT_CONVERGED
        assert_one_line(result, "did not converge", "nothing is published")
        assert place.done(3)["status"] == "not converged"
    assert starts == [False, True] * 2  # from the covariance before, then from anew
    assert place.pointer == one
    assert place.versions == [one["version"]]
    assert place.done(0)["status"] == "published"


@pytest.mark.parametrize("what", ["current.json", "version.json", "gone"])
def test_damaged_results(place: Place, what: str) -> None:
    place.add(0)
    place.done(0)
    version = place.results / place.pointer["version"]
    place.add(1)
    if what == "gone":
        shutil.rmtree(version)
    else:
        path = (place.results if what == "current.json" else version) / what
        path.write_text(path.read_text().replace("town", "tows").replace('"0000', '"0001'))
    result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "current.json" if what != "version.json" else what)
    (place.results / "current.json").unlink()
    assert place.done(0)["status"] == "published"
    assert place.read("drift.json")["before"] is None


def test_files_of_a_version_that_is_not_published_yet(place: Place) -> None:
    """A run was killed before the pointer was switched, and the disk has lost something."""
    place.add(0)
    place.done(0)
    one = place.pointer
    (place.results / "current.json").unlink()
    (place.results / one["folder"] / "result.json").write_text("{}")
    result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "result.json: is damaged", f"remove the folder {one['version']}")
    shutil.rmtree(place.results / one["version"])
    assert place.done(0)["version"] == one["version"]


def test_results_that_cannot_be_written(place: Place) -> None:
    place.add(0)
    place.results.write_text("")
    result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, str(place.results))


# ------------------------------------------------------------------------ old versions


def test_old_versions_are_removed(place: Place) -> None:
    place.write(JOB + "keep: 2\ndrift: {limit: null}\n")
    for day in range(4):
        place.add(day)
        place.done(0)
        assert len(place.versions) == min(day + 1, 2)
        assert sorted(place.pointer["history"]) == place.versions
    assert [name[:6] for name in place.versions] == ["000003", "000004"]


def test_what_killed_runs_left_is_removed_after_a_day(place: Place) -> None:
    place.add(0)
    place.done(0)
    left = place.results / "000009-0123456789ab"
    (left / "01234567").mkdir(parents=True)
    (left / "01234567" / "result.json").write_text("{}")
    half, foreign = place.results / f".{'0' * 32}.dmixed", place.results / "notes.txt"
    for path in (half, foreign):
        path.write_text("x")
    place.done(0)
    assert left.exists()
    assert half.exists()
    old = time.time() - 2 * published.ORPHAN
    for path in (half, foreign, left / "01234567" / "result.json"):
        os.utime(path, (old, old))
    place.done(0)
    assert not left.exists()
    assert not half.exists()
    assert foreign.exists()


# ------------------------------------------------------------------------ two at once


def test_two_refits_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is writing its version another does the whole job."""
    place.add(0)
    add, inside = Published.add, list[dict[str, Any]]()

    def meanwhile(self: Published, version: Any) -> Any:
        monkeypatch.setattr(Published, "add", add)
        inside.append(place.done(0))
        return add(self, version)

    monkeypatch.setattr(Published, "add", meanwhile)
    outside = place.done(0)
    (one,) = inside
    assert one["version"] == outside["version"]
    assert one["folder"] == outside["folder"] == str(place.current)
    (version,) = place.versions
    names = {path.name for path in (place.results / version).iterdir()}
    assert names == {"version.json", place.current.name}  # the other attempt has tidied up


def test_two_refits_that_append_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.add(0)
    place.done(0)
    second = place.add(1)
    append, inside = runs.MomentStore.append, list[dict[str, Any]]()

    def meanwhile(self: Any, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(runs.MomentStore, "append", append)
        inside.append(place.done(0))
        return append(self, *arguments, **options)

    monkeypatch.setattr(runs.MomentStore, "append", meanwhile)
    result = place.run()
    assert inside[0]["status"] == "published"
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "another process has changed these moments")
    assert_is_the_fit(place, pd.concat([first, second]))
    assert place.done(0)["status"] == "nothing new"


# ------------------------------------------------------------------------ killed


def assert_whole(place: Place) -> None:
    """Whatever is there is whole: the store opens, the pointer names a version with its files."""
    killing.check_whole(place.folder, (298, 596))


def test_runs_that_are_killed_at_any_instant(tmp_path: Path) -> None:
    """Of ten, half are first runs and half have a day before; the benchmark kills a hundred."""
    formula = "y ~ x + (1 | g)"
    place = Place(tmp_path / "place", JOB.replace(FORMULA, formula))
    days = [place.add(0)]
    with killing.Killer(place.path, (298, 596), seed=20) as killer:
        killer.prepare(lambda: days.append(place.add(1)))
        for later in range(2):
            killer.restore(later)
            killer.run()
            assert_is_the_fit(place, pd.concat(days[: 1 + later]), formula)
        for number in range(10):
            killer.kill(number % 2)
    assert killer.killed >= 5


class Stopped(BaseException):
    """As a process that is killed: nobody catches it."""


def stop(*_: Any, **__: Any) -> None:
    raise Stopped


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "step",
    [
        "dmixed.momentstore.commit",
        "dmixed.refit.version_name",
        "dmixed.refit._made",
        "dmixed.versions.factors_of",
        "dmixed.versions._provenance",
        "dmixed.published.Published.add",
        "dmixed.published.Published.check",
        "dmixed.published.Published.publish",
        "dmixed.published.Published.tidy",
    ],
)
def test_each_step_can_be_the_last(
    step: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    days = [place.add(0)]
    if not first:
        place.done(0)
        days.append(place.add(1))
    with monkeypatch.context() as context:
        context.setattr(step, stop)
        with pytest.raises(Stopped):
            runs.refit(place.job)
    assert_whole(place)
    done = place.done(0)
    assert done["status"] == ("nothing new" if step.endswith("tidy") else "published")
    assert_is_the_fit(place, pd.concat(days))
    assert len(place.pointer["history"]) == len(days)


# ------------------------------------------------------------------------ elsewhere


def test_on_a_cluster(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.add(0)
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
        place.done(0, "--scheduler", cluster.scheduler_address)
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        second = place.add(1)
        place.write(JOB + "scheduler: tcp://127.0.0.1:1\n")
        place.done(0)
    assert_is_the_fit(place, pd.concat([first, second]))


def test_groups_that_stay_on_the_workers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are many: the workers write the tables, and no file is longer than a shard."""
    monkeypatch.setattr(planning, "WHOLE", 0)
    monkeypatch.setattr(store, "DRIVER", 0)
    days = [place.add(0)]
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        runs.refit(place.job, client)
        days.append(place.add(1))
        runs.refit(place.job, client)
        moments = dmixed.open_moments(place.folder / "moments", client=client).moments
        assert isinstance(moments.cells, RemoteMoments)
    plain = dmixed.lmer(FORMULA, pd.concat(days))
    assert place.read("result.json")["llf"] == pytest.approx(plain.llf, rel=1e-12)
    wanted = plain.ranef_table().set_index("g")
    found = place.effects.set_index("g").loc[wanted.index]
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, rtol=1e-6, atol=1e-8)
    assert len(list((place.current / "random_effects").glob("part-*.parquet"))) > 1
    assert place.read("drift.json")["groups"]["g"]["levels"] == len(wanted)


def test_a_delta_table(place: Place) -> None:
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    table, days = str(place.folder / "rows"), []
    for day in range(2):
        days.append(rows(day))
        deltalake.write_deltalake(table, pa.Table.from_pandas(days[-1]), mode="append")
        assert place.done(0)["status"] == "published"
    assert_is_the_fit(place, pd.concat(days))
    snapshots = [delta["snapshots"] for delta in place.read("provenance.json")["deltas"]]
    assert snapshots == [["delta version 0"], ["delta version 1"]]
    assert place.done(0)["status"] == "nothing new"


def test_no_scheduler_answers(place: Place) -> None:
    import dask

    place.write(JOB + "scheduler: nonsense://x\n")
    with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
        result = place.run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, "nonsense://x")


def test_an_object_store(
    tmp_path: Path, object_store: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials come from the environment; they are in no file and no message."""
    import s3fs

    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BUCKET", bucket)
    fs = s3fs.S3FileSystem()
    text = JOB + "keep: 1\n"
    for name in ("rows", "moments", "results"):
        text = text.replace(f": {name}\n", f": s3://${{BUCKET}}/{name}\n")
    place, days = Place(tmp_path, text), []
    for day in range(2):
        days.append(rows(day))
        with fs.open(f"{bucket}/rows/day-{day}.parquet", "wb") as file:
            days[-1].to_parquet(file)
        done = place.done(0)
        assert done["status"] == "published"
        assert place.done(0)["status"] == "nothing new"
    pointer = json.loads(fs.cat_file(f"{bucket}/results/current.json"))
    assert pointer["history"] == [done["version"]]
    assert done["folder"] == f"s3://{bucket}/results/{pointer['folder']}"
    fs.invalidate_cache()
    names = {path.split("/")[2] for path in fs.find(f"{bucket}/results")}
    assert names == {"current.json", done["version"]}
    found = json.loads(fs.cat_file(f"{bucket}/results/{pointer['folder']}/result.json"))
    plain = dmixed.lmer(FORMULA, pd.concat(days))
    assert found["llf"] == pytest.approx(plain.llf, rel=1e-12)
    secret = object_store.owner.secret
    for path in fs.find(bucket):
        assert secret.encode() not in fs.cat_file(path)

    result = Place(tmp_path, text.replace("/results", "-nosuch/results")).run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, f"s3://{bucket}-nosuch/results")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    result = Place(tmp_path, text).run()
    assert result.exit_code == cli.Status.ERROR
    assert_one_line(result, f"s3://{bucket}")
    assert secret not in result.output
    assert "another-secret" not in result.output


def test_as_a_user_starts_it(place: Place) -> None:
    place.add(0)
    path = os.pathsep.join([str(Path(dmixed.__file__).parent.parent)])
    found = subprocess.run(
        [sys.executable, "-m", "dmixed", "refit", "job.yaml", "-v"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "is at version 1: 298 rows of 1 files were new" in found.stderr
    assert found.stdout.startswith(f"published: {place.pointer['version']} in {place.current}\n")


def test_the_levels_of_tables_of_other_types_are_compared_as_text(tmp_path: Path) -> None:
    found = []
    for name, keys in (("a", [1, 2, 3]), ("b", ["2", "3", "4"])):
        pd.DataFrame({"g": keys, "Intercept": 0.0}).to_parquet(tmp_path / f"{name}.parquet")
        found.append((published.Factor("g", (f"{name}.parquet",), (1,), ("g",)),))
    folder = Folder.at(tmp_path)
    now = turnover.turnover_of(found[1], folder, found[0], folder)["g"]
    assert (now.levels, now.first_new, now.first_gone) == (3, ("4",), ("1",))
