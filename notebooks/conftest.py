"""For the notebooks: an object store for the one on a data lake, unless the environment has a lake.

Notebooks are no functions, so that fixtures do not reach them: hooks start the store, and set the
environment that kernels get.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.objectstore import LAKE, ObjectStore, reason_why_not

LAKE_NOTEBOOK = "03-data-lake-on-dask.ipynb"

running = pytest.StashKey[ExitStack]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the store before the notebook that needs it."""
    if item.path.name != LAKE_NOTEBOOK or LAKE in os.environ:
        return
    with ExitStack() as starting:
        directory = Path(starting.enter_context(tempfile.TemporaryDirectory()))
        reason = reason_why_not(directory)
        if reason is not None:
            pytest.skip(reason)
        store = starting.enter_context(ObjectStore(directory))
        os.environ.update(store.lake())
        item.config.stash[running] = starting.pop_all()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the store."""
    if running in config.stash:
        config.stash[running].close()
