"""Stored results: to the last bit, from a directory that is checked and never run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmixed
from dmixed import records, resultfiles
from dmixed.errors import DataError
from dmixed.folders import Folder

FILES = ("result", "manifest", "cells", "columns")
"""Beginnings of the names of all files."""
MANIFEST = "manifest-00000001.json"
OF_RESULT = ("schema", "moments", "names", "estimates", "history")
N = 240
DAY = pd.Timestamp("2024-02-27")


def name_of(path: Path, beginning: str) -> str:
    """Name of the one file that begins so; names of tables hold a random number."""
    (name,) = [x for x in os.listdir(path) if x.startswith(beginning)]
    return name


@cache
def data() -> pd.DataFrame:
    """Rows of 24 groups g in 6 larger ones h, crossed with s."""
    rng = np.random.default_rng(5)
    g, s = np.arange(N) % 24, rng.integers(0, 5, N)
    x, z, w = rng.normal(size=N), rng.uniform(1, 9, N), rng.uniform(0.5, 2, N)
    effect = rng.normal(size=(24, 2))
    y = 3 + x - 0.2 * z + effect[g, 0] + 0.5 * effect[g, 1] * x + rng.normal(size=6)[g % 6]
    frame = pd.DataFrame({"y": y + 0.6 * rng.normal(size=5)[s] + rng.normal(size=N)})
    frame["x"], frame["z"], frame["w"], frame["o"] = x, z, w, 0.1 * z
    frame["g"], frame["h"], frame["s"] = g, g % 6, s
    frame["town"] = np.array([f"Tøwn {j}" for j in range(24)])[g]
    frame["f"] = np.array(["b", "a", "c"])[rng.integers(0, 3, N)]
    frame["declared"] = pd.Categorical(frame["f"], ["c", "a", "never", "b"])
    frame["n"] = np.array([2.0, 0.5, -1.0])[rng.integers(0, 3, N)]
    frame["yes"] = x > 0.3
    frame["pi"] = w + 1
    frame["big"] = g.astype(np.uint64) + np.uint64(2**63)
    frame["half"] = g / 2 + 0.25
    frame["day"] = [(DAY + pd.Timedelta(days=int(j))).date() for j in g]
    frame["time"] = DAY + pd.to_timedelta(g * 1_000_000_007, unit="ns")
    frame["zoned"] = (DAY + pd.to_timedelta(g, unit="h")).tz_localize("Europe/Berlin")
    frame.loc[[3, 77], "x"] = np.nan
    return frame


def lmer(formula: str, table: Any = None, **options: Any) -> dmixed.MixedLMResults:
    return dmixed.lmer(formula, data() if table is None else table, **options)


def words(formula: str, **options: Any) -> dmixed.MixedLM:
    return dmixed.mixedlm(formula, data(), missing="drop", **options)


def arrays(named: bool, **options: Any) -> dmixed.MixedLM:
    d = data().dropna()
    exog = d[["z", "x"]].assign(const=1.0)
    if named:
        return dmixed.MixedLM(d["y"], exog, d["town"], exog[["const", "x"]], **options)
    return dmixed.MixedLM(d["y"].to_numpy(), exog.to_numpy(), d["g"].to_numpy(), **options)


def components() -> dmixed.MixedLM:
    """Variance components given as matrices: levels, and columns of numbers."""
    d = data().dropna().sort_values("g")
    groups = [part for _, part in d.groupby("g")]
    levels = [pd.get_dummies(part["s"]).astype(float) for part in groups]
    mats = [[x.to_numpy() for x in levels], [part[["z"]].to_numpy() for part in groups]]
    names = [[[f"s{c}" for c in x] for x in levels], [["z"] for _ in groups]]
    spec = dmixed.VCSpec(["s", "z"], names, mats)
    return dmixed.MixedLM(d["y"].to_numpy(), d[["z"]].to_numpy(), d["g"].to_numpy(), exog_vc=spec)


def constrained() -> dmixed.MixedLMResults:
    free = dmixed.MixedLMParams.from_components([1, 0], [[1, 0], [0, 1]])
    return words("y ~ x", groups="g", re_formula="~x").fit(free=free, full_output=True)


def typed() -> pa.Table:
    """Keys in types of Arrow's that pandas has not: whole seconds, decimals, views of text."""
    d = data()
    seconds = pa.array(d["g"].to_numpy() * 86_400)
    return pa.table(
        {
            **{name: pa.array(d[name]) for name in ("y", "x")},
            "s": seconds.cast(pa.timestamp("s")),
            "zoned": seconds.cast(pa.timestamp("s", "+05:30")),
            "x > 0": pa.array(d["h"]).cast(pa.decimal128(20, 0)),
            "a.b": pa.array(d["town"]).cast(pa.string()).dictionary_encode(),
            "": pa.array(d["yes"]),
        }
    )


FITS: dict[str, Callable[[], dmixed.MixedLMResults]] = {
    "intercept": lambda: lmer("y ~ 1 + (1 | g)"),
    "one bar": lambda: lmer("y ~ x + z + (1 + x | town)"),
    "ML": lambda: lmer("log(y + 20) ~ center(x) * z + (x | g)", reml=False),
    "another method": lambda: lmer("y ~ x + (x | g)", method="L-BFGS-B"),
    "bars of one factor": lambda: lmer("y ~ x + z + (1 | g) + (0 + x | g) + (0 + z | g)"),
    "crossed": lambda: lmer("y ~ x + (x | g) + (1 | s)"),
    "nested": lambda: lmer("y ~ x + (1 | h/g)"),
    "a variance of zero": lambda: lmer("y ~ x + (1 | n) + (1 | g)"),
    "a component": lambda: words("y ~ x", groups="g", vc_formula={"s": "0 + C(s)"}).fit(),
    "components": lambda: words(
        "y ~ x", groups="h", re_formula="~z",
        vc_formula={"b": "0 + C(town)", "a": "C(s)", "cut": "0 + C(x > 0)"},
    ).fit(),
    "weights and offset": lambda: lmer("y ~ x + (1 | g)", weights="w", offset="o"),
    "arrays of weights": lambda: lmer("y ~ z + (1 | g)", weights=data()["w"], offset=data()["o"]),
    "categories": lambda: lmer("y ~ f * x + declared:z + C(n) + yes + (1 | g)"),
    "contrasts": lambda: lmer("y ~ 0 + C(f, contr.sum) + C(n, levels=[2, 0.5, -1]) + (0 + f | g)"),
    "aliased": lambda: lmer("y ~ x + I(2 * x) + z + (1 | g)"),
    "splines": lambda: lmer(
        "y ~ bs(z, knots=[4, 6], degree=3, lower_bound=0, upper_bound=10)"
        " + poly(x, 2) + I(x**2 * w) + (1 | g)"
    ),
    "pi, the number": lambda: lmer("y ~ I(pi * x) + (1 | g)", data().drop(columns="pi")),
    "pi, a column": lambda: lmer("y ~ I(pi * x) + (1 | g)"),
    **{f"key {x}": lambda x=x: lmer(f"y ~ x + (1 | {x})")
       for x in ("g", "town", "big", "half", "day", "time", "zoned", "town:h", "day:town:time")},
    **{f"key of type {x}": lambda x=x: lmer(f"y ~ x + (1 | {x})", typed())
       for x in ("s", "zoned", "`a.b`", "`a.b`:s:`x > 0`")},
    "keys of one name": lambda: dmixed.mixedlm(
        "y ~ x", typed(), groups="x > 0", missing="drop", vc_formula={"v": "0 + C(x > 0):`a.b`"}
    ).fit(),
    "no fixed effect": lambda: lmer("y ~ 0 + (1 | g)"),
    "groups as an array": lambda: words("y ~ x", groups=data()["town"].to_numpy()).fit(),
    "arrays": lambda: arrays(False).fit(),
    "arrays with names": lambda: arrays(True).fit(reml=False),
    "arrays of components": lambda: components().fit(),
    "constrained": constrained,
    "no search": lambda: words("y ~ x", groups="g").fit(do_cg=False),
    "shrunk": lambda: words("y ~ x + z + f", groups="g").fit_regularized(alpha=20.0),
}  # fmt: skip


@cache
def fitted(name: str) -> dmixed.MixedLMResults:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmixed.ConvergenceWarning)
        return FITS[name]()


def everything(found: dmixed.MixedLMResults) -> Iterator[tuple[str, Any]]:
    """All that a result says without its rows."""
    yield "summary", str(found.summary())
    yield "html", found.summary()._repr_html_()
    yield "to_dict", found.to_dict()
    for name in (
        *("params", "params_user", "bse", "bse_user", "bse_re", "cov_re", "vcomp", "tvalues"),
        *("theta", "scale", "bse_scale", "llf", "aic", "bic", "group_sizes", "group_name"),
        *("notes", "formula", "factors", "dropped", "aliased", "endog_name", "hist", "converged"),
        *("singular", "df_resid", "df_modelwc", "optimizer_summary"),
    ):
        yield name, getattr(found, name)
    for name in ("cov_params", "cov_params_user", "conf_int", "varcorr", "ranef", "ranef_cov"):
        yield name, getattr(found, name)()
    known = np.isfinite(np.diag(found.cov_fe))
    if known.any():
        yield "t_test", found.t_test(np.eye(found.k_fe)[known]).summary_frame()
    if known.any() and known.all():
        yield "terms", found.wald_test_terms().summary_frame()
    if found._effects.within_groups:
        yield "random_effects", dict(found.random_effects)
        yield "random_effects_cov", dict(found.random_effects_cov)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal to the last bit, and in the same types."""
    assert type(a) is type(b) or {type(a), type(b)} == {float, np.float64}, where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for one, other in zip(a, b, strict=True):
            assert_same(one, other, where)
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    elif isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b, check_exact=True)
    elif isinstance(a, np.ndarray | float):
        np.testing.assert_array_equal(a, b, where)
    else:
        assert a == b or repr(a) == repr(b), where  # NaN in a dataclass


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A stored result with everything in it: weights, categories, two keys, a component."""
    path = tmp_path / "stored"
    weighted_components().save(path)
    return path


@cache
def weighted_components() -> dmixed.MixedLMResults:
    model = words(
        "y ~ x * f", groups=["town", "h"], vc_formula={"s": "0 + C(s)"}, weights="w", re_formula="1"
    )
    return model.fit(full_output=True)


# ------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", FITS)
def test_a_round_trip(name: str, tmp_path: Path) -> None:
    found = fitted(name)
    found.save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    for (what, a), (_, b) in zip(everything(found), everything(loaded), strict=True):
        assert_same(a, b, what)
    loaded.save(tmp_path / "b")
    assert len(os.listdir(tmp_path / "b")) == len(FILES)
    for one, other in (
        [tmp_path / x / name_of(tmp_path / x, file) for x in "ab"] for file in FILES
    ):
        if one.suffix == ".parquet":
            assert one.read_bytes() == other.read_bytes()
        else:
            assert unnamed(one) == unnamed(other)


def unnamed(file: Path) -> str:
    """A record without what differs each time: the names of files, their time, and checksums."""
    text = re.sub(r"-[0-9a-f]{8}(-\d{5})?\.parquet", r"\1.parquet", file.read_text())
    return re.sub(r'"(id|created|sha256|moments)": "[^"]*"', r'"\1": ""', text) + "\n"


@pytest.mark.parametrize("name", ["one bar", "categories", "splines", "pi, a column", "shrunk"])
def test_predictions(name: str, tmp_path: Path) -> None:
    found = fitted(name)
    found.save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(str(tmp_path / "a"))
    new = data().tail(50).drop(columns=["y", "g"])
    assert_same(found.predict(new), loaded.predict(new), "predict")


def test_levels_that_the_fit_has_not_seen(tmp_path: Path) -> None:
    fitted("categories").save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    with pytest.raises(DataError, match="unseen"):
        loaded.predict(data().assign(f="unseen"))


def test_predictions_of_arrays(tmp_path: Path) -> None:
    for named in (False, True):
        fitted("arrays with names" if named else "arrays").save(tmp_path / str(named))
        loaded = dmixed.MixedLMResults.load(tmp_path / str(named))
        new: Any = data()[["z", "x"]].assign(const=1.0)
        new = new if named else new.to_numpy()
        found = loaded.predict(new)
        assert isinstance(found, pd.Series if named else np.ndarray)
        assert isinstance(loaded.params, pd.Series if named else np.ndarray)


@pytest.mark.parametrize("name", ["one bar", "components", "nested"])
def test_fits_of_what_was_loaded(name: str, tmp_path: Path) -> None:
    found = fitted(name)
    found.save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    for arguments in ((0, "re"), ("x", "fe"), *([("b", "vc")] if name == "components" else [])):
        sizes = {"num_low": 1, "num_high": 1, "dist_low": 0.01, "dist_high": 0.01}
        assert_same(*(x.profile_re(*arguments, **sizes) for x in (found, loaded)), str(arguments))


def test_pairs_of_levels(tmp_path: Path) -> None:
    found = fitted("categories")
    found.save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    frames = (x.t_test_pairwise("C(n)").result_frame for x in (found, loaded))
    assert_same(*frames, "t_test_pairwise")


def test_rows_do_not_travel(tmp_path: Path) -> None:
    lmer("y ~ x + (1 | g)").save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    for name in ("fittedvalues", "resid", "model"):
        with pytest.raises(AttributeError, match="rows do not travel"):
            getattr(loaded, name)
    with pytest.raises(AttributeError, match="rows do not travel"):
        loaded.predict()


def test_rows_can_be_forgotten(tmp_path: Path) -> None:
    found = lmer("y ~ x + (1 | g)")
    found.save(tmp_path / "a")
    assert len(found.resid) == N - 2
    found.save(tmp_path / "b", remove_data=True)
    with pytest.raises(AttributeError, match="rows do not travel"):
        _ = found.resid


def test_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROW_GROUP", 512)
    found = fitted("one bar")
    found.save(tmp_path / "a")
    assert pq.ParquetFile(tmp_path / "a" / name_of(tmp_path / "a", "cells")).num_row_groups > 3
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    assert_same(found.ranef(), loaded.ranef(), "ranef")


def test_moments_that_were_loaded_add(tmp_path: Path) -> None:
    found = fitted("weights and offset")
    found.save(tmp_path / "a")
    moments = dmixed.MixedLMResults.load(tmp_path / "a")._prepared.moments
    assert (moments + found._prepared.moments).nobs == 2 * found.nobs
    with pytest.raises(ValueError, match="read-only"):
        moments.group.WtF[:] = 0


# ------------------------------------------------------------------------ the format


def test_the_format(stored: Path) -> None:
    """What other programs rely on: change it, and the schema's number changes."""
    result = json.loads((stored / "result.json").read_text())
    record = json.loads((stored / MANIFEST).read_text())
    assert list(result) == [*OF_RESULT, "sha256"]
    assert list(record) == [
        *("schema", "version", "versions", "machine", "formula", "words", "inputs"),
        *("text_columns", "weights", "offset", "missing", "carry", "group_crossproducts"),
        *("deltas", "sha256"),
    ]
    (delta,) = record["deltas"]
    assert list(delta) == [
        *("id", "created", "sources", "references", "dropped", "frame", "levels", "columns"),
        *("random", "log_weights", "recoding", "nobs", "shards", "sums", "files"),
    ]
    assert result["schema"] == "dmixed-stored-result/2"
    assert record["schema"] == "dmixed-moments/2"
    assert record["version"] == 1
    assert result["moments"] == record["sha256"]
    cells_file, sums_file = f"cells-{delta['id']}-00000.parquet", f"columns-{delta['id']}.parquet"
    assert sorted(os.listdir(stored)) == sorted(["result.json", MANIFEST, cells_file, sums_file])
    assert delta["sums"] == sums_file
    assert delta["shards"] == [
        {"name": cells_file, "nobs": N - 2, "key_types": ["large_string", "int64", "int64"]}
    ]
    assert record["words"] == {
        "groups": ["town", "h"], "re_formula": "1", "vc_formula": [["s", "0 + C(s)"]]
    }  # fmt: skip
    assert delta["columns"][:2] == [
        {"cell": [], "powers": []},
        {"cell": [], "powers": [["x", 1]]},
    ]
    assert delta["levels"] == {"f": {"levels": ["b", "a", "c"], "categories": None}}
    assert list(result["estimates"]) == [
        *("reml", "value", "beta", "cov_beta", "working_beta", "sigma2", "root", "theta"),
        *("variances", "summary", "beta_slope", "free_beta", "free_pairs", "shrunk", "penalised"),
    ]
    assert list(result["estimates"]["variances"]) == [
        *("Psi", "root", "zero", "cov_ratio", "cov_user"),
    ]
    assert list(result["estimates"]["summary"]) == [
        *(
            "method",
            "converged",
            "reason",
            "evaluations",
            "path",
            "certificate",
            "checks",
            "sampled",
        ),
    ]
    cells = pq.read_table(stored / cells_file)
    assert cells.column_names == ["town", "h", "s", "rows", "WtF"]
    assert cells.schema.types[:3] == [pa.large_string(), pa.int64(), pa.int64()]
    assert sum(cells["rows"].to_pylist()) == N - 2
    columns = pq.read_table(stored / sums_file)
    assert columns.column_names == ["FtF", "plain"]
    assert len(columns) == len(delta["columns"])
    assert list(delta["files"]) == [cells_file, sums_file]
    for name, known in delta["files"].items():
        assert (stored / name).stat().st_size == known["size"]
        assert hashlib.sha256((stored / name).read_bytes()).hexdigest() == known["sha256"]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    found = fitted("one bar")
    assert found.optimizer_summary.certificate.boundary == np.inf
    found.save(tmp_path / "a")
    text = (tmp_path / "a" / "result.json").read_text()
    json.loads(text, parse_constant=lambda x: pytest.fail(x))
    assert '"boundary": "inf"' in text
    assert all(ord(x) < 128 for x in text)


# ------------------------------------------------------------------------ what is not written


def cut(x: Any) -> Any:
    return np.minimum(x, 1.0)


@pytest.mark.parametrize(
    "formula", ["y ~ cut(x) + (1 | g)", "cut(y) ~ x + (1 | g)", "y ~ x + (0 + I(1 + cut(x)) | g)"]
)
def test_functions_cannot_be_stored(formula: str, tmp_path: Path) -> None:
    found = lmer(formula, context={"cut": cut, "unused": cut})
    with pytest.raises(DataError, match=r"calls cut, .*functions cannot be stored"):
        found.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_functions_of_the_caller_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calls cut, "):
        words("y ~ cut(x)", groups="g").fit().save(tmp_path / "a")


def test_functions_that_are_not_called(tmp_path: Path) -> None:
    found = lmer("y ~ x + (1 | g)", context={"cut": cut})
    found.save(tmp_path / "a")
    loaded = dmixed.MixedLMResults.load(tmp_path / "a")
    assert str(loaded.summary()) == str(found.summary())


def test_what_is_there_is_kept(stored: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in stored.iterdir()}
    with pytest.raises(DataError, match="not empty"):
        fitted("one bar").save(stored)
    assert {file.name: file.read_bytes() for file in stored.iterdir()} == before
    with pytest.raises(DataError, match="is not a directory"):
        fitted("one bar").save(stored / "result.json")
    with pytest.raises(DataError, match="URI"):
        fitted("one bar").save("s3://bucket/result")
    assert os.listdir(tmp_path) == ["stored"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    inode = tmp_path.stat().st_ino
    fitted("one bar").save(tmp_path)
    assert tmp_path.stat().st_ino == inode
    assert dmixed.MixedLMResults.load(tmp_path).converged


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "new" / "a"
    if exists:
        path.mkdir(parents=True)
    monkeypatch.setattr(Folder, "put", full_disk)
    with pytest.raises(OSError, match="No space"):
        fitted("one bar").save(path)
    assert os.listdir(tmp_path / "new") == (["a"] if exists else [])
    assert not exists or os.listdir(path) == []


# ------------------------------------------------------------------------ what is not loaded


def refused(path: Path, file: str, *words: str) -> None:
    """Loading names the file and says what is wrong with it."""
    with pytest.raises(DataError) as error:
        dmixed.MixedLMResults.load(path)
    for word in (str(path / file), *words):
        assert word in str(error.value)


def loads(path: Path) -> tuple[dmixed.MixedLMResults | None, str]:
    """A result, or what is wrong with it."""
    try:
        return dmixed.MixedLMResults.load(path), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_missing(stored: Path, file: str) -> None:
    name = name_of(stored, file)
    (stored / name).unlink()
    if file == "manifest":
        refused(stored, "", "there are no moments: it has no manifest-*.json")
    else:
        refused(stored, name, "No such file")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("size", [0, 1, 0.5, -2])
def test_a_truncated_file(stored: Path, file: str, size: float) -> None:
    file = name_of(stored, file)
    whole = (stored / file).read_bytes()
    (stored / file).write_bytes(whole[: int(size * len(whole)) if 0 < size < 1 else int(size)])
    refused(stored, file, "damaged")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(stored: Path, file: str) -> None:
    file = name_of(stored, file)
    whole = (stored / file).read_bytes()
    rng = random.Random(3)
    for at in rng.sample(range(len(whole)), 60):
        bad = bytearray(whole)
        bad[at] ^= 1 << rng.randrange(8)
        (stored / file).write_bytes(bad)
        loaded, message = loads(stored)
        assert str(stored / file) in message or file.endswith(".json")
        if loaded is not None:  # a bit between the values of JSON
            assert loaded.to_dict() == weighted_components().to_dict()


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "result.json", "No such file")
    (tmp_path / "file").write_text("1")
    refused(tmp_path / "file", "result.json", "Not a directory")
    (tmp_path / "result.json").mkdir()
    refused(tmp_path, "result.json", "Is a directory")
    with pytest.raises(DataError, match="URI"):
        dmixed.MixedLMResults.load("s3://bucket/result")


def test_another_schema(stored: Path, tmp_path: Path) -> None:
    text = (stored / "result.json").read_text()
    (stored / "result.json").write_text(text.replace("stored-result/2", "stored-result/3"))
    refused(stored, "result.json", "'dmixed-stored-result/3'", "'dmixed-stored-result/2'")
    resultfiles.write_result(fitted("one bar"), tmp_path / "cli")
    refused(tmp_path / "cli", "result.json", "'dmixed-result/1'", "'dmixed-stored-result/2'")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, '{"schema": NaN}', "\xff", "9" * 5000],
)
def test_what_is_no_manifest(stored: Path, text: str) -> None:
    (stored / "result.json").write_text(text, encoding="latin1")
    refused(stored, "result.json")


def sign(path: Path, file: str, record: dict[str, Any]) -> None:
    """Write a file of JSON with a checksum that is right, also where others name it."""
    record.pop("sha256", None)
    checksum = records._checksum(record)
    (path / file).write_text(json.dumps({**record, "sha256": checksum}))
    if file == MANIFEST:
        result = json.loads((path / "result.json").read_text())
        sign(path, "result.json", {**result, "moments": checksum})


def forge(path: Path, *where: Any, value: Any) -> None:
    """Change a value of a manifest, or of the result, by the names that lead there."""
    file = "result.json" if where[0] in OF_RESULT else MANIFEST
    record = json.loads((path / file).read_text())
    place = record
    for name in where[:-1]:
        place = place[name]
    if value is KeyError:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    sign(path, file, record)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("formula", "y ~ x * f + (1 | g)", "bar"),
        ("formula", "y ~ x + f", "columns: is not what the formula 'y ~ x + f' needs"),
        ("formula", "y ~ z * f", "no column 'z'"),
        ("formula", "y ~ __import__('os').system('false') * f", "formula"),
        ("formula", 3, "formula: must be text, not 3"),
        ("formula", KeyError, "must be an object of schema, version, versions, machine, formula"),
        ("words", None, "has no random effect"),
        ("words groups", ["town"], "inputs"),
        ("words vc_formula", [], "inputs"),
        ("words vc_formula", [["s"]], "must be a list of 2"),
        ("words vc_formula 0 1", "0 + C(", "vc_formula['s']"),
        ("text_columns", ["elsewhere"], "text_columns"),
        ("text_columns", ["town"], "frame"),
        ("inputs", ["y", "x", "f", "town", "h", "s", "z"], "inputs"),
        ("weights", None, "columns-"),
        ("missing", "sometimes", "missing"),
        ("deltas 0 dropped", {"x": "many"}, "dropped: x: must be a whole number, not 'many'"),
        ("names plain", 0, "names: plain: must be true or false, not 0"),
        ("names fixed", ["one"], "names"),
        ("names random", ["one", "two"], "names"),
        ("deltas 0 frame scale 1", 0.0, "frame"),
        ("deltas 0 frame scale 1", None, "frame"),
        ("deltas 0 frame shift 0", "inf", "frame"),
        ("deltas 0 frame shift", [], "frame: must be an object whose lists match in length"),
        ("deltas 0 levels", {}, "levels"),
        ("deltas 0 levels f levels", ["b", "a"], "columns"),
        ("deltas 0 levels f levels", [["b"], "a", "c"], "levels: f: levels: must be text"),
        ("deltas 0 levels f categories", ["b", "a"], "levels"),
        ("deltas 0 columns", [], "columns"),
        ("deltas 0 columns 0 cell", [["f", "a"]], "columns"),
        ("deltas 0 columns 0 cell", [["g", "a"]], "columns"),
        ("deltas 0 columns 1 powers", [["x", 2]], "columns"),
        ("deltas 0 random", [1], "columns"),
        ("deltas 0 random", [10**30], "columns"),
        ("deltas 0 log_weights", None, "log_weights"),
        ("deltas 0 shards 0 key_types", ["large_string", "int64"], "key_types"),
        ("deltas 0 shards 0 key_types 1", "extension<arrow.py_extension_type>", "key_types"),
        ("deltas 0 shards 0 key_types 1", "timestamp[s, tz=Nowhere/Land]", "key_types"),
        ("deltas 0 shards 0 key_types 1", "large_string", "cells"),
        ("deltas 0 files", {}, "files"),
        ("deltas 0 files ../x", {"rows": 1, "size": 1, "sha256": "0"}, "files"),
        ("deltas 0 files CELLS rows", 5, "cells"),
        ("deltas 0 files CELLS rows", -1, "files"),
        ("deltas 0 files CELLS size", 5, "cells"),
        ("deltas 0 shards", [], "files"),
        ("deltas 0 shards 0 name", "../CELLS", "files"),
        ("deltas 0 shards 0 nobs", 5, "nobs"),
        ("deltas 0 nobs", 5, "nobs"),
        ("deltas 0 sums", "CELLS", "files"),
        ("deltas 0 references", True, "cells"),
        ("deltas 0 sources", [{"kind": 1}], "sources: must be an object of kind, location"),
        ("deltas 0 sources", {"kind": 1}, "sources: must be a list"),
        ("deltas 0 id", "00000000", "deltas: 00000000: files: must be those of shards and sums"),
        ("deltas", [], "deltas: must be some"),
        ("version", 2, "is of version 2, its name says 1"),
        ("carry", ["z"], "carry: the data have no column 'z'"),
        ("carry", ["x:"], "carry"),
        ("group_crossproducts", True, "columns"),
        ("moments", "0", "is of other moments"),
        ("estimates beta", [1.0], "estimates: beta: must be numbers (6,)"),
        ("estimates beta 0", None, "estimates: beta: must hold finite numbers"),
        ("estimates beta 0", 1e9, "working coordinates"),
        ("estimates beta 0", "one", "estimates: beta: must be lists of numbers"),
        ("estimates beta 0", [1.0], "estimates: beta: must be lists of numbers"),
        ("estimates root 0 0", 1e3, "working coordinates"),
        ("estimates cov_beta", [], "cov_beta: must be numbers (6, 6)"),
        ("estimates sigma2", -1.0, "sigma2"),
        ("estimates sigma2", 10**400, "estimates: sigma2: must be"),
        ("estimates value", None, "value"),
        ("estimates free_beta", [1, 1, 1, 1, 1, 1], "free_beta: must be flags (6,)"),
        ("estimates free_beta", [True], "free_beta: must be flags (6,)"),
        ("estimates variances zero", [True], "zero: must be a list of 2"),
        ("estimates variances Psi 0", [1.0], "Psi"),
        ("estimates summary converged", 1, "summary: converged: must be true or false, not 1"),
        ("estimates summary path 0 value", "low", "path: value: must be a number, not 'low'"),
        ("estimates summary certificate", 1, "certificate: must be an object, not 1"),
        ("history", 1, "history: must be a list, not 1"),
        ("unknown", 1, "must be an object of schema"),
    ],
)  # fmt: skip
def test_a_forged_manifest(stored: Path, where: str, value: Any, message: str) -> None:
    cells = name_of(stored, "cells")
    names = [int(x) if x.isdigit() else x.replace("CELLS", cells) for x in where.split()]
    if isinstance(value, str):
        value = value.replace("CELLS", cells)
    forge(stored, *names, value=value)
    refused(stored, cells if message == "cells" else "", message)


def test_files_elsewhere(stored: Path) -> None:
    """Nothing outside the directory is read, whatever a manifest says."""
    name = name_of(stored, "cells")
    record = json.loads((stored / MANIFEST).read_text())
    for elsewhere in (f"../{name}", str(stored / name), f"./{name}", f"{name}/../{name}"):
        delta = json.loads(json.dumps(record["deltas"][0]))
        delta["shards"][0]["name"] = elsewhere
        delta["files"] = {elsewhere if x == name else x: y for x, y in delta["files"].items()}
        sign(stored, MANIFEST, {**record, "deltas": [delta]})
        refused(stored, MANIFEST, "files: must be those of shards and sums")


def leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a manifest stands."""
    yield where
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*where, key))


def test_any_forged_value_is_an_error_of_the_data(stored: Path) -> None:
    """Whatever stands anywhere in a manifest: it loads, or a DataError says why not."""
    texts = {file: (stored / file).read_text() for file in ("result.json", MANIFEST)}
    everywhere = [x for t in texts.values() for x in leaves(json.loads(t)) if x]
    everywhere = [x for x in everywhere if x != ("sha256",)]
    rng = random.Random(11)
    for where in rng.sample(everywhere, 80):
        for value in (None, -1, 0.5, True, "x", [], {}, [[1]], 10**400, KeyError):
            for file, text in texts.items():
                (stored / file).write_text(text)
            forge(stored, *where, value=value)
            with np.errstate(all="ignore"):
                loaded, message = loads(stored)
            assert loaded is not None or str(stored) in message


def replaced(path: Path, file: str, table: pa.Table) -> None:
    """Replace a table, with a checksum that is right."""
    pq.write_table(table, path / file)
    known = hashlib.sha256((path / file).read_bytes()).hexdigest()
    size = (path / file).stat().st_size
    value = {"rows": len(table), "size": size, "sha256": known}
    forge(path, "deltas", 0, "files", file, value=value)


def column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


CELLS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a row twice": lambda t: pa.concat_tables([t, t[:1]]),
    "no rows": lambda t: t[:0],
    "a column less": lambda t: t.drop_columns(["h"]),
    "other names": lambda t: t.rename_columns(["town", "g", "s", "rows", "WtF"]),
    "other types": lambda t: column(t, "h", t["h"].cast(pa.large_string())),
    "a null": lambda t: column(t, "h", pa.array([None, *t["h"].to_pylist()[1:]], pa.int64())),
    "no count": lambda t: column(t, "rows", pa.array([0] * len(t))),
    "narrow lists": lambda t: column(
        t, "WtF", pa.array([x[1:] for x in t["WtF"].to_pylist()], pa.list_(pa.float64(), 8))
    ),
    "infinite": lambda t: column(
        t, "WtF", pa.array([[np.inf] * 9] * len(t), pa.list_(pa.float64(), 9))
    ),
    "null lists": lambda t: column(t, "WtF", pa.array([None] * len(t), pa.list_(pa.float64(), 9))),
}


@pytest.mark.parametrize("name", CELLS)
def test_forged_cells(stored: Path, name: str) -> None:
    file = name_of(stored, "cells")
    table = pq.read_table(stored / file)
    assert table["WtF"].type.list_size == 9
    replaced(stored, file, CELLS[name](table))
    refused(stored, file)


def test_forged_sums(stored: Path) -> None:
    file = name_of(stored, "columns")
    table = pq.read_table(stored / file)
    k = len(table)
    lists = pa.list_(pa.float64(), k)
    for bad in (table[:-1], table.drop_columns(["plain"]), table.rename_columns(["plain", "FtF"])):
        replaced(stored, file, bad)
        refused(stored, file)
    for number in (np.nan, 0.0, -1.0, 1e300):
        replaced(
            stored,
            file,
            pa.table({x: pa.array([[number] * k] * k, lists) for x in ("FtF", "plain")}),
        )
        with np.errstate(all="ignore"):
            refused(stored, "")


def test_files_of_another_result(stored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    lmer("y ~ x + (1 | g)").save(other)
    own, others = (path / name_of(path, "cells") for path in (stored, other))
    shutil.copy(others, own)
    refused(stored, own.name, "checksum")
    replaced(stored, own.name, pq.read_table(others))
    refused(stored, own.name, "columns")


def test_no_pickle(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    for name in ("loads", "load", "dumps", "dump"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("pickled"))
    dmixed.MixedLMResults.load(stored)
