"""Job files: what is accepted, and the line of what is not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import dmixed
from dmixed.errors import JobError
from dmixed.jobs import Job, job_schema, read_job

FULL = """\
schema: dmixed-refit/1
formula: "log(price) ~ area + (1 + area | town)"
data: s3://bucket/sales/
store: s3://bucket/moments/
publish: s3://bucket/results/
reml: false
weights: w
offset: o
missing: raise
filters:
  - [year, ">=", 2024]
  - [day, "!=", 2024-02-29]
  - [town, in, [a, b]]
carry: [rooms, "area:rooms"]
group_crossproducts: true
window: 30
changed: replace
vanished: error
keep: 7
drift: {limit: 2, action: hold}
scheduler: tcp://scheduler:8786
"""

LEAST = """\
schema: dmixed-refit/1
formula: y ~ x + (1 | g)
data: rows
store: moments
publish: results
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, *problems: str) -> None:
    """Every problem with its line, and no other."""
    path = written(folder, text)
    with pytest.raises(JobError) as error:
        read_job(path, {})
    assert len(error.value.problems) == len(problems), error.value.problems
    for found, wanted in zip(error.value.problems, problems, strict=True):
        assert found.startswith(f"{path}:")
        assert wanted in found.removeprefix(f"{path}:"), found


def test_all_fields(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, FULL))
    assert (job.formula, job.reml, job.keep) == ("log(price) ~ area + (1 + area | town)", False, 7)
    assert job.data == "s3://bucket/sales/"
    assert job.conditions is not None
    assert [x[:2] for x in job.conditions] == [("year", ">="), ("day", "!="), ("town", "in")]
    assert (job.drift.limit, job.drift.action) == (2.0, "hold")
    fields = set(yaml.safe_load(FULL))
    assert fields == {info.alias or name for name, info in Job.model_fields.items()}


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    written(folder, LEAST.replace("data: rows", "data: ../rows/*.parquet"))
    monkeypatch.chdir(tmp_path)
    job = read_job("jobs/job.yaml")
    assert job.data == str(tmp_path / "rows" / "*.parquet")
    assert job.store == str(folder / "moments")
    assert job.scheduler is None


def test_environment_variables_stand_in_places_only(tmp_path: Path) -> None:
    text = LEAST.replace("data: rows", "data: s3://${BUCKET}/${DAY}/rows")
    text = text.replace("store: moments", "store: ${ROOT}/moments")
    path = written(tmp_path, text)
    job = read_job(path, {"BUCKET": "b", "DAY": "7", "ROOT": "/mnt"})
    assert (job.data, job.store) == ("s3://b/7/rows", "/mnt/moments")
    with pytest.raises(JobError) as error:
        read_job(path, {"BUCKET": "b", "DAY": ""})
    assert error.value.problems == (
        f"{path}:3: data: the environment variable DAY is not set",
        f"{path}:4: store: the environment variable ROOT is not set",
    )
    refused(tmp_path, LEAST.replace("rows", "${not-a-name}"), "3: data: a variable is written")
    refused(tmp_path, LEAST.replace("(1 | g)", "(1 | ${G})"), "2: formula: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LEAST.replace("formula:", "formla:"), "2: unknown field 'formla': did you mean 'formula'"),
        (LEAST + "reml: maybe\n", "6: reml: must be a valid boolean"),
        (LEAST + "keep: true\n", "6: keep: must be a valid integer"),
        (LEAST + "keep: 0\n", "6: keep: must be greater than or equal to 1"),
        (LEAST + "keep:\n", "6: keep: must have a value"),
        (LEAST + "missing: dropp\n", "6: missing: must be 'drop', 'raise' or 'none', not 'dropp'"),
        (LEAST + "drift:\n  limit: 3\n  act: hold\n", "8: unknown field 'drift.act': did you mean"),
        (LEAST + "drift: {limit: .inf}\n", "6: drift.limit: must be a finite number"),
        (LEAST + "drift: 3\n", "6: drift: "),
        (LEAST + "carry:\n  - x\n  - 3\n", "8: carry[1]: must be a valid string"),
        (LEAST + "filters: [[a, '>', 1], [b]]\n", "6: filters[1]: must be a list of [column, "),
        (LEAST + "filters: [[a, '~', 1]]\n", "6: filters: operator '~'"),
        (LEAST + "filters: []\n", "6: filters: "),
        (LEAST + "zzz: 1\n", "6: unknown field 'zzz': fields here are schema, formula, data"),
        (LEAST.replace("/1", "/2"), "1: schema: must be 'dmixed-refit/1', not 'dmixed-refit/2'"),
        (LEAST.replace("(1 | g)", "(1 | "), "2: formula: "),
        (LEAST.replace("(1 | g)", "eval(x)"), "2: formula: "),
        (LEAST.replace("y ~ x + (1 | g)", "7"), "2: formula: must be a valid string"),
        (LEAST + "weights: ''\n", "6: weights: must have at least 1 character"),
    ],
)
def test_a_problem_and_its_line(text: str, problem: str, tmp_path: Path) -> None:
    if "formla" in text:
        refused(tmp_path, text, "1: the field 'formula' is missing", problem)
    else:
        refused(tmp_path, text, problem)


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = LEAST + "keep: x\nmising: drop\nreml: 1\n"
    refused(tmp_path, text, "6: keep", "7: unknown field 'mising'", "8: reml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: must hold fields"),
        ("[1, 2]\n", "1: must hold fields"),
        (LEAST + "reml: true\nreml: false\n", "7: reml: is there twice"),
        (LEAST + "carry: &a [x]\n", "6: anchors and aliases are not read"),
        (LEAST + "carry: *a\n", "6: anchors and aliases are not read"),
        (LEAST + "carry: [x\n", "7: is not YAML"),
        (LEAST + "\tkeep: 1\n", "6: is not YAML"),
        (LEAST + "carry: !!python/object/apply:os.system [ls]\n", "6: the tag"),
        (LEAST + "keep: !!python/name:os.system\n", "6: is not YAML: could not determine"),
        (LEAST + "? [a, b]\n: 1\n", "6: the name of a field must be text"),
        (LEAST + "window: 2024-99-99\n", "6: '2024-99-99' cannot be read"),
        (LEAST + "---\nschema: x\n", "6: is not YAML: but found another document"),
    ],
)
def test_no_more_than_plain_yaml(text: str, problem: str, tmp_path: Path) -> None:
    refused(tmp_path, text, problem)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    for content, why in (
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: \x00", "is not YAML"),
        (b"[" * 60_000, "has lists within lists"),
        (b"#" * 70_000, "has more than"),
    ):
        path.write_bytes(content)
        with pytest.raises(JobError, match=why):
            read_job(path)
    with pytest.raises(JobError, match=r"nosuch\.yaml: cannot be read: No such file"):
        read_job(tmp_path / "nosuch.yaml")
    with pytest.raises(JobError, match="cannot be read: Is a directory"):
        read_job(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "storage_options: {key: AKIDEXAMPLE, secret: SeCrEt}",
        "secret: SeCrEt",
        "aws_access_key_id: SeCrEt",
        "sas_token: SeCrEt",
        "password: SeCrEt",
    ],
)
def test_secrets_are_refused_and_not_repeated(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"{LEAST}{line}\n")
    with pytest.raises(JobError) as error:
        read_job(path)
    (problem,) = error.value.problems
    assert f"{path}:6: " in problem
    assert "holds no credentials and no storage options" in problem
    assert "SeCrEt" not in problem


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIDEXAMPLE:SeCrEt@bucket/rows",
        "https://account.blob.core.windows.net/rows?sv=2024&sig=SeCrEt",
        "s3://${SECRET}@bucket/rows",
    ],
)
def test_secrets_in_uris_are_refused(uri: str, tmp_path: Path) -> None:
    path = written(tmp_path, LEAST.replace("rows", uri))
    with pytest.raises(JobError) as error:
        read_job(path, {"SECRET": "AKID:SeCrEt"})
    (problem,) = error.value.problems
    assert f"{path}:3: data: a job file holds no credentials" in problem
    assert "SeCrEt" not in problem


def test_containers_of_azure_are_no_secrets(tmp_path: Path) -> None:
    uri = "abfss://rows@account.dfs.core.windows.net/day"
    assert read_job(written(tmp_path, LEAST.replace("rows", uri))).data == uri


@pytest.mark.parametrize(
    ("store", "publish", "problem"),
    [
        ("rows", "results", "4: store: lies within the folder of data"),
        ("rows/moments", "results", "4: store: lies within the folder of data"),
        ("moments", "rows/results", "5: publish: lies within the folder of data"),
        ("moments", "moments", "4: store: lies within the folder of publish"),
        ("results/moments", "results", "4: store: lies within the folder of publish"),
    ],
)
def test_places_lie_apart(store: str, publish: str, problem: str, tmp_path: Path) -> None:
    text = LEAST.replace("store: moments", f"store: {store}")
    text = text.replace("publish: results", f"publish: {publish}")
    path = written(tmp_path, text)
    with pytest.raises(JobError) as error:
        read_job(path)
    assert f"{path}:{problem}" in error.value.problems[0]


def test_what_is_not_read_as_data_may_lie_there(tmp_path: Path) -> None:
    text = LEAST.replace("store: moments", "store: rows/_moments")
    assert read_job(written(tmp_path, text)).store == str(tmp_path / "rows" / "_moments")


# ------------------------------------------------------------------------ the model


def test_what_decides_the_model(tmp_path: Path) -> None:
    """Places and what is done about drift may change without another model."""
    first = read_job(written(tmp_path, LEAST)).model
    for line in ("keep: 2", "drift: {limit: 1}", "scheduler: 'x:1'", "changed: replace"):
        assert read_job(written(tmp_path, f"{LEAST}{line}\n")).model == first
    assert read_job(written(tmp_path, LEAST.replace("results", "others"))).model == first
    others = {
        read_job(written(tmp_path, f"{LEAST}{line}\n")).model
        for line in ("reml: false", "weights: w", "offset: o", "missing: raise", "window: 3",
                     "filters: [[d, '>', 2024-01-01]]", "filters: [[d, '>', 2024-01-02]]")
    }  # fmt: skip
    assert len(others | {first}) == 8


# ------------------------------------------------------------------------ the schema


def test_the_published_schema_is_that_of_the_code() -> None:
    path = Path(dmixed.__file__).parent / "data" / "refit-job.schema.json"
    assert json.loads(path.read_text()) == job_schema(), (
        "write it anew: dmixed refit --schema > dmixed/data/refit-job.schema.json"
    )


def plain(text: str) -> object:
    """As JSON has it: dates are text."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def test_the_schema_accepts_and_refuses_the_same() -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for text in (FULL, LEAST):
        check.validate(plain(text))
    for line in ("keep: 0", "reml: 1", "drift: {limit: 0}", "drift: {x: 1}", "missing: x",
                 "filters: [[a, '~', 1]]", "filters: [[a, '>']]", "window: 1.5", "zzz: 1",
                 "carry: x", "data: ''", "storage_options: {}"):  # fmt: skip
        text = LEAST.replace("data: rows\n", "") if line.startswith("data") else LEAST
        assert not check.is_valid(plain(f"{text}{line}\n")), line


# ------------------------------------------------------------------------ anything


def test_errors_can_be_pickled() -> None:
    found = pickle.loads(pickle.dumps(JobError(["a", "b"])))
    assert (found.problems, str(found)) == (("a", "b"), "a\nb")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
values = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*yaml.safe_load(FULL), "drfit"]) | st.text()


@given(st.dictionaries(names, values, max_size=6))
def test_any_yaml_is_a_job_or_told(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, object]
) -> None:
    text = yaml.safe_dump({**yaml.safe_load(LEAST), **extra}, allow_unicode=True)
    path = written(tmp_path_factory.getbasetemp(), text)
    problems: tuple[str, ...] = ()
    try:
        read_job(path, {})
    except JobError as error:
        problems = error.problems or ("none",)
    assert all(problem.startswith(str(path)) for problem in problems)


@given(st.text(max_size=200))
def test_any_text_is_a_job_or_told(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(JobError):
        read_job(path, {})
