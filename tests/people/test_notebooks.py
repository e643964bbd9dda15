"""What can be said of the notebooks without running them; `.ci/run people` runs them."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import objectstore

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = (
    "01-first-fit",
    "02-from-statsmodels",
    "03-data-lake-on-dask",
    "04-nightly-refit-and-drift",
    "05-models-from-moments",
)
LINES = 30
"""Lines of a cell at most; two helpers that make data are as long."""


@pytest.fixture(params=NAMES)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((FOLDER / f"{request.param}.ipynb").read_text(encoding="utf-8"))


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_these_and_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d-[a-z-]+)\.ipynb\)", readme) == list(NAMES)


def test_nothing_is_left_of_a_run(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert [cell["id"] for cell in notebook["cells"]] == [
        str(number) for number in range(len(notebook["cells"]))
    ]


def test_the_first_cell_says_what_a_reader_wants_to_know(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    text = "".join(first["source"])
    for words in ("# ", "**You will learn** ", "**You need** `pip install ", "**Time:** "):
        assert words in text
    assert text.startswith("# ")


def test_code_names_no_place_of_a_machine_and_proves_something(notebook: dict[str, Any]) -> None:
    code = sources(notebook, "code")
    for cell in code:
        ast.parse(cell)
        assert cell.count("\n") < LINES
        assert not re.search(r"""["'](/\w|~/|[A-Za-z]:\\)|localhost|127\.0\.0\.1""", cell)
        assert not re.search(r"\b(TODO|FIXME|XXX|breakpoint|pdb)\b", cell)
        assert not re.search(r"SECRET|ACCESS_KEY|storage_options", cell)
    assert sum(cell.count("assert ") for cell in code) >= 8
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", "".join(sources(notebook, "markdown")))


def test_links_to_other_notebooks_are_right(notebook: dict[str, Any]) -> None:
    for name in re.findall(r"(\d\d-[a-z-]+)\.ipynb", "".join(sources(notebook, "markdown"))):
        assert name in NAMES


def test_a_command_gets_a_store_and_nobody_sees_its_keys(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As whoever runs the notebook of the data lake by hand gets it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    reason = objectstore.reason_why_not(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    code = (
        "import os, fsspec\n"
        "fs, root = fsspec.url_to_fs(os.environ['DMIXED_LAKE'])\n"
        "fs.pipe_file(f'{root}/x/y', b'content')\n"
        "assert fs.cat_file(f'{root}/x/y') == b'content'\n"
        "raise SystemExit(7)\n"
    )
    assert objectstore.main([sys.executable, "-W", "ignore", "-c", code]) == 7
    assert capfd.readouterr() == ("", "")


def test_without_a_command_there_is_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert objectstore.main([]) == 2
    assert "python -m tests.objectstore COMMAND" in capsys.readouterr().err
