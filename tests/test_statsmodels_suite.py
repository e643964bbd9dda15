"""statsmodels' own tests of MixedLM, from its wheel, on dmixed: what fails is known, with a reason.

They run in a process of their own, where `statsmodels_plugin` has put dmixed's names in place of
statsmodels' before the tests are imported. Faults are numbered as in `test_faults`.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

import dmixed

statsmodels = pytest.importorskip("statsmodels")

pytestmark = pytest.mark.skipif(
    not version("statsmodels").startswith("0.15."),
    reason=f"the list is of statsmodels 0.15, here is {version('statsmodels')}",
)

SELECTED = 91
"""Tests that are not about the private ``_smw_solver`` and ``_smw_logdet``."""

EXPECTED_FAILURES = {
    "TestMixedLM::test_compare_numdiff[False-False-False]": (
        "F3: after an ML fit it packs and unpacks the estimates, and takes the likelihood of the "
        "copy to be ML because the model was last fitted so"
    ),
    "test_singular": (
        "class: it wants statsmodels' SingularMatrixWarning; here a zero variance is an ordinary "
        "estimate, flagged by `singular` and in the summary"
    ),
    "test_summary_after_remove_data": "class: it wants statsmodels' Summary",
}

INI = """[pytest]
markers =
    slow
    smoke
    high_memory
filterwarnings = default
"""


def outcomes(folder: Path) -> dict[str, str | None]:
    """Message of each test that failed, None where it passed."""
    report, ini = folder / "report.xml", folder / "pytest.ini"
    ini.write_text(INI)
    paths = [Path(__file__).parent, Path(dmixed.__file__).parents[1]]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [
        *(sys.executable, "-m", "pytest", "-c", ini, "-p", "statsmodels_plugin"),
        *("-p", "no:cacheprovider", "--noconftest", "-k", "not smw", f"--junitxml={report}"),
        *("--pyargs", "statsmodels.regression.tests.test_lme"),
    ]
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert report.exists(), run.stdout + run.stderr
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        owner = re.search(r"\bTest\w+$", case.get("classname", ""))
        name = f"{owner[0]}::{case.get('name')}" if owner else str(case.get("name"))
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        found[name] = str(bad[0].get("message")) if bad else None
    return found


def test_statsmodels_own_tests_pass(tmp_path):
    found = outcomes(tmp_path)
    assert len(found) == SELECTED
    failed = {name: message for name, message in found.items() if message is not None}
    unexpected = {name: m for name, m in failed.items() if name not in EXPECTED_FAILURES}
    assert unexpected == {}
    assert EXPECTED_FAILURES.keys() - failed.keys() == set(), "these pass now: take them off"
