"""What the checks of ``deploy/`` share; they skip where the extra ``deploy`` is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from checks import BIN, estimates, run

HERE = Path(__file__).parent
TOOLS = ("asyncssh", "cryptography", "dask_jobqueue", "dask_kubernetes", "jsonschema")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of this folder where the extra ``deploy`` is not installed."""
    absent = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if absent:
        reason = f"extra deploy: no {', '.join(absent)}; pip install '.[deploy]'"
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def local_fit(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Arguments of a fit of the bundled pupils in several files, and its estimates on threads."""
    import pyarrow.parquet as pq

    from dmixed import example

    folder = tmp_path_factory.mktemp("pupils")
    with example.data() as path:
        table = pq.read_table(path)
    for part in range(4):
        pq.write_table(table[part * 2000 : (part + 1) * 2000], folder / f"{part}.parquet")
    words = ["dmixed", "fit", "--data", str(folder), "--formula", example.FORMULA]
    out = tmp_path_factory.mktemp("local")
    run([BIN / words[0], *words[1:], "--out", out])
    return words, estimates(out)
