"""The stored reference fits (`tests/reference`): read once, as plain dictionaries."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "reference"
CASES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
METHODS = ("REML", "ML")


@functools.cache
def case(name: str) -> dict[str, Any]:
    """One case; see README.md in the folder for its keys."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def data_path(name: str) -> str:
    """Path of the Parquet file a case is fitted to."""
    return str(FOLDER / case(name)["data"])
