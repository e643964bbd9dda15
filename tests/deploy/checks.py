"""Helpers of the checks of ``deploy/``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "deploy"
BIN = Path(sys.executable).parent


def tool(*names: str) -> None:
    """Skip the test unless all of these programs are there."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in names if shutil.which(name, path=path) is None]
    if absent:
        pytest.skip(f"system package: no {', '.join(absent)}; .ci/setup installs them")


def root() -> None:
    """Skip the test unless it may start daemons and make file systems."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts daemons, or makes the file system of an image")


def run(
    command: Sequence[str | Path], *, status: int = 0, timeout: float = 280, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Output of a command that must end with this status."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout, **options
    )
    assert done.returncode == status, (
        f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def estimates(out: Path) -> dict[str, Any]:
    """Estimates that a fit wrote with ``--out``: the same data give the same bits anywhere."""
    return json.loads((out / "result.json").read_text())
