"""Settings of Dask, job files and what README files say, for all folders of ``deploy/``."""

from __future__ import annotations

import copy
import importlib.resources
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from checks import BIN, DEPLOY, TOP, run

jsonschema = pytest.importorskip("jsonschema", reason="extra deploy: no jsonschema")

JOBS = sorted(DEPLOY.glob("**/job.yaml"))
READMES = sorted(DEPLOY.glob("**/README.md"))
FOLDERS = ("container", "kubernetes", "slurm", "ssh", "systemd")


@cache
def help_of(*command: str) -> str:
    """What ``dmixed COMMAND --help`` prints."""
    return run([BIN / "dmixed", *command, "--help"]).stdout


def relative(path: Path) -> str:
    return str(path.relative_to(TOP))


def closed(schema: Any) -> Any:
    """A schema in which a field that it does not name is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: closed(value) for key, value in schema.items()}
    if isinstance(done.get("properties"), dict):
        done.setdefault("additionalProperties", False)
    return done


@pytest.fixture(scope="module")
def dask_schema() -> Any:
    text = (importlib.resources.files("distributed") / "distributed-schema.yaml").read_text()
    return jsonschema.Draft7Validator(closed(yaml.safe_load(text)))


def dask_settings() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "dask" / "dmixed.yaml").read_text())


def test_settings_of_dask_fit_its_schema(dask_schema: Any) -> None:
    assert [e.message for e in dask_schema.iter_errors(dask_settings())] == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (("scheduler",), "allowed-failure", 3),
        (("scheduler",), "allowed-failures", "three"),
        (("worker", "memory"), "spil", 0.7),
        (("nanny",), "pre-spawn-environ", 1),
    ],
)
def test_the_schema_finds_mistakes(
    dask_schema: Any, path: tuple[str, ...], name: str, value: Any
) -> None:
    settings = copy.deepcopy(dask_settings())
    node = settings["distributed"]
    for key in path:
        node = node[key]
    node[name] = value
    assert list(dask_schema.iter_errors(settings))


def test_every_platform_gives_blas_one_thread() -> None:
    """Where Dask does not start the process of a worker, its environment says so."""
    names = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert names <= set(dask_settings()["distributed"]["nanny"]["pre-spawn-environ"])
    for file in (
        "container/Dockerfile",
        "slurm/jobqueue.yaml",
        "slurm/one-node.sbatch",
        "systemd/dmixed-refit.service",
    ):
        text = (DEPLOY / file).read_text()
        assert names <= set(re.findall(r"\b(\w+_NUM_THREADS)=1\b", text)), file


# ----------------------------------------------------------------------------------- job files


@pytest.mark.parametrize("file", JOBS, ids=relative)
def test_job_files_are_valid(file: Path) -> None:
    """By ``dmixed refit --check``, which reads the job file and nothing else."""
    job = yaml.safe_load(file.read_text())
    assert {"schema", "formula", "data", "store", "publish"} <= set(job)
    if "refit" not in help_of():
        pytest.skip("dmixed has no command refit yet")
    run([BIN / "dmixed", "refit", "--check", file])


def test_every_platform_has_a_job_file() -> None:
    assert {f.relative_to(DEPLOY).parts[0] for f in JOBS} == set(FOLDERS) - {"container"}


# -------------------------------------------------------------------------------------- README


def test_every_folder_has_a_readme() -> None:
    assert {f.parent.name for f in READMES} == {"deploy", *FOLDERS}
    for folder in FOLDERS:
        text = (DEPLOY / folder / "README.md").read_text()
        titles = re.findall(r"^## (.+)$", text, re.M)
        assert titles[0] == "Prerequisites"
        assert "What is checked" in titles
        assert "Not checked" in text


@pytest.mark.parametrize("file", READMES, ids=relative)
def test_files_that_a_readme_names_are_there(file: Path) -> None:
    text = file.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    folder = rf"(?:\.\./)?(?:{'|'.join([*FOLDERS, 'dask'])})/"
    paths = re.findall(rf"(?<![\w/.~-])((?:deploy/|tests/|{folder})[\w@./-]*\w)", text)
    for path in [*links, *paths]:
        top = TOP if path.startswith(("deploy/", "tests/")) else file.parent
        assert (top / path).exists() or (DEPLOY / path).exists(), path


@pytest.mark.parametrize("file", READMES, ids=relative)
def test_commands_of_dmixed_in_a_readme_have_its_options(file: Path) -> None:
    """Except those of ``refit`` as long as there is no such command."""
    used = r"\b(?:dmixed|\w+\.sbatch) (fit|plan|predict|refit|demo)\b([^`\n]*)"
    for name, rest in re.findall(used, file.read_text()):
        if name not in help_of():
            assert name == "refit"
            continue
        for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
            assert option in help_of(name), f"dmixed {name} {option}"


def test_no_file_has_a_secret() -> None:
    for file in DEPLOY.glob("**/*"):
        if file.is_file():
            text = file.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s@:]+:[^/\s@]+@", text), file
