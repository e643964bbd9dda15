"""For all tests: Ctrl-C works, also in the background of a shell; a real object store, if asked."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator

import pytest

from tests.objectstore import DAEMONS, ObjectStore, reason_why_not


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The one store of a session; `object_store` is for tests."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    directory = tmp_path_factory.mktemp("objects")
    reason = reason_why_not(directory)
    if reason is not None:
        pytest.skip(reason)
    with ObjectStore(directory) as store:
        yield store


@pytest.fixture
def object_store(
    one_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """An object store of which all daemons run; nobody's credentials in the environment."""
    import s3fs

    for name in ("AWS_PROFILE", *one_object_store.environment()):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")  # of whoever runs the tests
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()  # made in another environment
    for name in DAEMONS:
        one_object_store.start(name)
    yield one_object_store
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """Name of a new bucket of the store's owner."""
    import s3fs

    name = f"bucket-{secrets.token_hex(4)}"
    s3fs.S3FileSystem(**object_store.storage_options()).mkdir(name)
    return name
