"""Fits from and to a real object store: listings in pages, refusals, daemons that are killed.

Answers are those of the same files on a local disk, to the last bit.
"""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmixed
from dmixed.errors import DataError, DmixedError
from dmixed.folders import Folder
from dmixed.places import new_place
from dmixed.sources import open_source
from dmixed.sources.files import find_files
from dmixed.sources.storages import reason
from tests.objectstore import LISTED, ObjectStore, User

FORMULA = "y ~ x + (1 | g)"
FILES, YEARS, ROWS = 5, 2, 40
ONCE = {"config_kwargs": {"retries": {"max_attempts": 1}}}
"""For s3fs: botocore tries each request once, so that refusals do not take minutes."""


def table(seed: int, rows: int = ROWS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, 12, rows), rng.normal(size=rows)
    effect = np.random.default_rng(99).normal(size=12)
    return pd.DataFrame({"y": 1 + x + effect[g] + rng.normal(size=rows), "x": x, "g": g})


@dataclass(frozen=True)
class Rows:
    """The same files in the store and on a disk."""

    uri: str
    folder: Path

    @property
    def bucket(self) -> str:
        return self.uri.split("/")[2]


@pytest.fixture(scope="module")
def kept(one_object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Files in hive folders, more than a page of a listing holds."""
    fs = storage(one_object_store)
    fs.mkdir("lake-of-rows")
    folder = tmp_path_factory.mktemp("rows")
    assert FILES > 2 * LISTED
    for number in range(FILES):
        name = f"year={2021 + number % YEARS}/part-{number}.parquet"
        content = io.BytesIO()
        table(number).to_parquet(content)
        fs.pipe_file(f"lake-of-rows/rows/{name}", content.getvalue())
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.getvalue())
    return Rows("s3://lake-of-rows/rows", folder)


@pytest.fixture
def rows(object_store: ObjectStore, kept: Rows) -> Rows:
    """The files, in a store of which all daemons run."""
    return kept


@pytest.fixture
def signed_in(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The owner's credentials in the environment."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    return object_store


def storage(store: ObjectStore) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**store.storage_options())


def fit(data: Any, options: dict[str, Any] | None = None, **more: Any) -> dmixed.MixedLMResults:
    return dmixed.lmer(FORMULA, data, storage_options=options, **more)


def assert_same_bits(a: dmixed.MixedLMResults, b: dmixed.MixedLMResults) -> None:
    assert a.converged
    for name in ("params", "bse", "cov_re", "scale", "llf", "nobs", "group_sizes"):
        np.testing.assert_array_equal(np.asarray(getattr(a, name)), np.asarray(getattr(b, name)))


def secrets_of(store: ObjectStore, *more: User) -> list[str]:
    return [
        text for u in (store.owner, store.guest, store.other, *more) for text in (u.key, u.secret)
    ]


def assert_no_secret(text: str | bytes, store: ObjectStore, *more: User) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    for secret in secrets_of(store, *more):
        assert secret.encode() not in content


@pytest.fixture
def refused(object_store: ObjectStore, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Asserts that a call ends in one line that names a URI, and what to do, and tells nobody."""

    def check(call: Callable[[], Any], uri: str, *words: str, users: tuple[User, ...] = ()) -> str:
        with (
            caplog.at_level(logging.DEBUG, logger="dmixed"),
            pytest.raises(DmixedError) as caught,
        ):
            call()
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        for word in (uri, *words):
            assert word in text
        assert_no_secret(text + repr(caught.value) + caplog.text, object_store, *users)
        return text

    return check


# ------------------------------------------------------------------------ reading


def test_a_folder_listed_in_pages(object_store: ObjectStore, rows: Rows) -> None:
    found = storage(object_store).call_s3("list_objects_v2", Bucket=rows.bucket, Prefix="rows/")
    assert (found["IsTruncated"], found["KeyCount"]) == (True, LISTED)
    result = fit(rows.uri, object_store.storage_options())
    assert result.nobs == FILES * ROWS
    assert_same_bits(result, fit(rows.folder))


@pytest.mark.parametrize(
    ("below", "given", "files"),
    [
        ("/year=202[13]/*.parquet", {}, 3),
        ("/*/part-[0-3].parquet", {}, 4),
        ("/year=2022", {}, 2),
        ("/year=2022/part-3.parquet", {}, 1),
        ("", {"filters": [("year", "==", 2022)]}, 2),
        ("", {"filters": [("year", "!=", 2022), ("x", "<", 0.5)]}, 3),
    ],
)
def test_patterns_and_filters(
    object_store: ObjectStore, rows: Rows, below: str, given: dict[str, Any], files: int
) -> None:
    options = object_store.storage_options()
    ours = open_source(rows.uri + below, options, **given)
    assert len(ours.fingerprints()) == files
    here = open_source(f"{rows.folder}{below}", **given)
    assert content(ours).equals(content(here))
    assert [x.name.removeprefix(rows.uri) for x in ours.fingerprints()] == [
        x.name.removeprefix(str(rows.folder)) for x in here.fingerprints()
    ]


def content(source: Any) -> pa.Table:
    return pa.concat_tables([part.task() for part in source.parts(["y", "x", "g"])])


def test_credentials_of_the_environment(signed_in: ObjectStore, rows: Rows) -> None:
    assert_same_bits(fit(rows.uri), fit(rows.folder))


def test_files_that_came_later(object_store: ObjectStore, bucket: str) -> None:
    """No listing of before is used, neither for data nor for fingerprints."""
    options, fs = object_store.storage_options(), storage(object_store)
    uri = f"s3://{bucket}/growing"
    for number in range(1, LISTED + 3):
        buffer = io.BytesIO()
        table(number).to_parquet(buffer)
        fs.pipe_file(f"{bucket}/growing/{number}.parquet", buffer.getvalue())
        assert len(open_source(uri, options).fingerprints()) == number


# ------------------------------------------------------------------------ refusals


def wrong_secret(store: ObjectStore) -> User:
    return replace(store.owner, secret="0123456789" * 4)


def wrong_key(store: ObjectStore) -> User:
    return replace(store.owner, key=f"{store.owner.key}ship")


CREDENTIALS = "check the credentials"


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (wrong_secret, ["Forbidden", CREDENTIALS]),
        (wrong_key, ["Forbidden", CREDENTIALS]),
        (lambda store: store.guest, ["Forbidden", CREDENTIALS]),
        (lambda store: store.other, ["no bucket 'lake-of-rows'", "whose it is"]),
    ],
    ids=["wrong secret", "wrong key id", "no access", "another account"],
)
def test_whoever_may_not_read(
    object_store: ObjectStore,
    rows: Rows,
    refused: Callable[..., str],
    who: Callable[[ObjectStore], User],
    words: list[str],
) -> None:
    user = who(object_store)
    options = object_store.storage_options(user)
    for below in ("", "/year=2022/*.parquet", "/year=2022/part-3.parquet"):
        uri = rows.uri + below
        for call in (fit, lambda *x: dmixed.plan(FORMULA, x[0], storage_options=x[1])):
            refused(lambda call=call, uri=uri: call(uri, options), uri, *words, users=(user,))


def test_what_is_not_there(
    object_store: ObjectStore, rows: Rows, refused: Callable[..., str]
) -> None:
    options = object_store.storage_options()
    for uri in ("s3://no-such-bucket", "s3://no-such-bucket/rows", "s3://no-such-bucket/*.parquet"):
        refused(lambda uri=uri: fit(uri, options), uri, "no bucket 'no-such-bucket'", "check")
    for below in ("/nothing", "/nothing.parquet", "/nothing/*.parquet", "/year=1999/"):
        uri = f"s3://{rows.bucket}{below}"
        text = refused(lambda uri=uri: fit(uri, options), uri, "no Parquet file", "check the path")
        assert "bucket '" not in text
    refused(lambda: fit("s3://L/rows", options), "s3://L/rows", "check the name of the bucket")


def test_nobody_and_nowhere(
    object_store: ObjectStore, rows: Rows, refused: Callable[..., str]
) -> None:
    client = {"endpoint_url": object_store.endpoint}
    refused(lambda: fit(rows.uri, {"client_kwargs": client}), rows.uri, CREDENTIALS)
    refused(lambda: fit(rows.uri, {"client_kwargs": client, "anon": True}), rows.uri, "check the")
    options = {**object_store.storage_options(), **ONCE}
    options["client_kwargs"] = {"endpoint_url": "http://127.0.0.1:1"}
    refused(lambda: fit(rows.uri, options), rows.uri, "check the address")


def test_a_key_that_vanishes(
    object_store: ObjectStore, bucket: str, refused: Callable[..., str]
) -> None:
    fs, options = storage(object_store), object_store.storage_options()
    for number in range(2):
        buffer = io.BytesIO()
        table(number).to_parquet(buffer)
        fs.pipe_file(f"{bucket}/t/{number}.parquet", buffer.getvalue())
    (part,) = open_source(f"s3://{bucket}/t", options).parts(["x"])
    fs.rm_file(f"{bucket}/t/1.parquet")
    refused(part.task, f"s3://{bucket}/t/1.parquet", "cannot be read")


# ------------------------------------------------------------------------ daemons that die


class Reads:
    """Counts the reads of s3fs in this process, and does something at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        import s3fs.core

        self.count, self.at, self.act, self._lock = 0, at, act, threading.Lock()
        fetch = s3fs.core._fetch_range

        def counted(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self.at:
                    self.act()
            return fetch(*args, **options)

        monkeypatch.setattr(s3fs.core, "_fetch_range", counted)


def reads_of_a_fit(call: Callable[[], Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch, 0, lambda: None)
        call()
        return reads.count


@pytest.mark.parametrize("name", ["object", "proxy"])
def test_a_daemon_killed_in_the_middle(
    object_store: ObjectStore,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    name: str,
) -> None:
    options = object_store.storage_options(**ONCE)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    data = open_source(rows.uri, options)
    (part,) = data.parts(["y", "x", "g"])
    n = reads_of_a_fit(part.task)
    assert n >= FILES
    Reads(monkeypatch, n // 2, lambda: object_store.kill(name))
    text = refused(part.task, f"{rows.uri}/year=", "cannot be read", "start again")
    assert re.search(r"part-\d\.parquet cannot be read: ", text)
    refused(lambda: fit(rows.uri, options), rows.uri, "start again")
    object_store.start(name)
    assert_same_bits(fit(rows.uri, options), fit(rows.folder))


def test_a_daemon_that_comes_back(
    object_store: ObjectStore, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage library tries again, and the fit knows nothing of it."""
    options, down = object_store.storage_options(), threading.Event()

    def die() -> None:
        object_store.kill("object")
        down.set()

    reads = Reads(monkeypatch, FILES + 3, die)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(fit, rows.uri, options)
        assert down.wait(60)
        object_store.start("object")
        result = found.result(120)
    assert reads.count > FILES + 3
    assert_same_bits(result, fit(rows.folder))


# ------------------------------------------------------------------------ writing


class Stopped(Exception):
    """A listener's way out."""


def test_a_checkpoint(
    signed_in: ObjectStore, rows: Rows, bucket: str, refused: Callable[..., str]
) -> None:
    place = f"s3://{bucket}/kept/here"
    fs, options = storage(signed_in), signed_in.storage_options()

    def stop(event: Any) -> None:
        if event.evaluation:
            raise Stopped

    with pytest.raises(Stopped):
        fit(rows.uri, options, checkpoint=place, progress=stop)
    names = {path.rpartition("/")[2] for path in fs.find(f"{bucket}/kept", refresh=True)}
    assert {"manifest-00000001.json", "progress.json"} <= names
    told: list[str] = []
    again = fit(rows.uri, options, checkpoint=place, progress=lambda e: told.append(e.message))
    assert any(text.startswith(f"resumed from {place}") for text in told)
    assert_same_fit(again, fit(rows.folder))
    assert_clean(fs, f"{bucket}/kept", signed_in)
    other = "s3://no-such-bucket/here"
    refused(lambda: fit(rows.uri, options, checkpoint=other), other, "cannot be written", "make it")
    text = f"checkpoint {place}"
    denied = signed_in.environment(signed_in.guest)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in denied.items():
            patch.setenv(name, value)
        refused(lambda: fit(rows.folder, checkpoint=place), text, CREDENTIALS)


def assert_same_fit(a: dmixed.MixedLMResults, b: dmixed.MixedLMResults) -> None:
    """A search that began elsewhere ends in the same place, but for its last steps."""
    assert a.llf == pytest.approx(b.llf, rel=1e-12)
    np.testing.assert_allclose(a.fe_params, b.fe_params, rtol=1e-10)


def assert_clean(fs: Any, root: str, store: ObjectStore) -> None:
    """No file that was written holds a credential, as it is or in a compressed column."""
    found = fs.find(root, refresh=True)
    assert found
    for path in found:
        held = fs.cat_file(path)
        assert_no_secret(held, store)
        if path.endswith(".parquet"):
            read = pq.read_table(io.BytesIO(held))
            assert_no_secret(f"{read.schema.metadata} {read.to_pylist()}", store)


def test_predictions(
    signed_in: ObjectStore, rows: Rows, bucket: str, refused: Callable[..., str]
) -> None:
    fs, options = storage(signed_in), signed_in.storage_options()
    result = fit(rows.folder)
    for given, out in ((options, f"s3://{bucket}/a"), (None, f"s3://{bucket}/b")):
        assert result.predict(rows.uri, groups=True, out=out, storage_options=given) == out
        parts = open_source(out, given).parts(["predicted"])
        made = pd.concat([part.task().to_pandas() for part in parts])
        wanted = result.predict(rows.folder, groups=True)
        np.testing.assert_array_equal(made["predicted"], np.asarray(wanted))
        assert_clean(fs, out.removeprefix("s3://"), signed_in)
    refused(lambda: result.predict(rows.uri, out=f"s3://{bucket}/a"), f"s3://{bucket}/a", "empty")
    guest = signed_in.storage_options(signed_in.guest)
    out = f"s3://{bucket}/c"
    refused(lambda: result.predict(table(0), out=out, storage_options=guest), out, CREDENTIALS)
    out = "s3://no-such-bucket/c"
    refused(lambda: result.predict(table(0), out=out), out, "make it")


def test_a_delta_table(object_store: ObjectStore, bucket: str, refused: Callable[..., str]) -> None:
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    uri, tables = f"s3://{bucket}/delta", [table(1, 200), table(2, 150)]
    own = object_store.environment()
    for frame in tables:
        deltalake.write_deltalake(
            uri, pa.Table.from_pandas(frame), mode="append", storage_options=own
        )
    options = object_store.storage_options()
    for version, frame in ((0, tables[0]), (None, pd.concat(tables))):
        found = fit(uri, options, version=version)
        assert_same_fit(found, fit(frame))
    opened = deltalake.DeltaTable(uri, storage_options=own)
    assert_same_fit(fit(opened), fit(pd.concat(tables)))
    for user in (wrong_secret(object_store), object_store.guest):
        given = object_store.storage_options(user)
        refused(lambda given=given: fit(uri, given), uri, CREDENTIALS, users=(user,))
    for path in storage(object_store).find(f"{bucket}/delta/_delta_log", refresh=True):
        storage(object_store).rm_file(path)
    refused(lambda: fit(opened, version=0), uri, "cannot be opened as a Delta table")


# ------------------------------------------------------------------------ the command line


def test_the_command_line(object_store: ObjectStore, rows: Rows) -> None:
    command = [sys.executable, "-m", "dmixed", "fit", "--data", rows.uri, "--formula", FORMULA]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}

    def run(user: User) -> subprocess.CompletedProcess[str]:
        environment = {**plain, **object_store.environment(user)}
        return subprocess.run(
            [*command, "-vv"], capture_output=True, text=True, env=environment, timeout=120
        )

    good = run(object_store.owner)
    assert good.returncode == 0, good.stderr
    assert f"{FILES * ROWS}" in good.stdout
    assert "log-likelihood" in good.stdout.lower()
    bad = run(wrong_secret(object_store))
    assert (bad.returncode, bad.stdout) == (1, "")
    last = bad.stderr.splitlines()[-1]
    assert rows.uri in last
    assert CREDENTIALS in last
    assert "Traceback" not in bad.stderr
    for found in (good, bad):
        assert_no_secret(found.stdout + found.stderr, object_store, wrong_secret(object_store))


# ------------------------------------------------------------------------ clusters


@pytest.fixture(scope="module")
def cluster(one_object_store: ObjectStore) -> Iterator[Any]:
    """Processes that find the owner's credentials in their environment, and their client."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            env=one_object_store.environment(),
        ) as found,
        Client(found, set_as_default=False) as client,
    ):
        yield client


class Graph:
    """What the scheduler was sent: every task that ran, as bytes."""

    def __init__(self, scheduler: Any) -> None:
        from distributed import SchedulerPlugin

        sent: list[bytes] = []

        class Watch(SchedulerPlugin):  # type: ignore[misc]
            def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
                if finish == "processing":
                    sent.append(cloudpickle.dumps(scheduler.tasks[key].run_spec))

        self.sent, self._scheduler, self._watch = sent, scheduler, Watch()

    def __enter__(self) -> list[bytes]:
        self._scheduler.add_plugin(self._watch, name="watch")
        return self.sent

    def __exit__(self, *_: object) -> None:
        self._scheduler.remove_plugin("watch")


def test_workers_find_their_own_credentials(
    signed_in: ObjectStore, rows: Rows, bucket: str, cluster: Any
) -> None:
    with Graph(cluster.cluster.scheduler) as sent:
        result = fit(rows.uri, client=cluster)
        fit(rows.uri, client=cluster, checkpoint=f"s3://{bucket}/kept", evaluate_on="workers")
        result.predict(rows.uri, out=f"s3://{bucket}/rows")
    assert_same_bits(result, fit(rows.folder, client=cluster))
    assert rows.bucket.encode() in b"".join(sent)
    assert_no_secret(b"".join(sent), signed_in)
    assert_clean(storage(signed_in), bucket, signed_in)


def test_the_graph_has_what_was_given(object_store: ObjectStore, rows: Rows, cluster: Any) -> None:
    """What shows that the test above would see a credential."""
    with Graph(cluster.cluster.scheduler) as sent:
        fit(rows.uri, object_store.storage_options(), client=cluster)
    assert object_store.owner.secret.encode() in b"".join(sent)


def test_workers_without_access(
    signed_in: ObjectStore, rows: Rows, cluster: Any, refused: Callable[..., str]
) -> None:
    cluster.run(become, signed_in.environment(signed_in.guest))
    try:
        refused(
            lambda: fit(rows.uri, client=cluster),
            rows.uri,
            "2 workers, such as tcp://",
            "no access to the data",
            CREDENTIALS,
        )
    finally:
        cluster.run(become, signed_in.environment())
    assert_same_bits(fit(rows.uri, client=cluster), fit(rows.folder, client=cluster))


def become(environment: dict[str, str]) -> None:
    """Change who a worker is for the store."""
    import s3fs

    os.environ.update(environment)
    s3fs.S3FileSystem.clear_instance_cache()


# ------------------------------------------------------------------------ what is shown


def test_nothing_shows_credentials(object_store: ObjectStore, rows: Rows, bucket: str) -> None:
    options = object_store.storage_options()
    uri = rows.uri
    result = fit(uri, options)
    source = open_source(uri, options)
    plan = dmixed.plan(FORMULA, uri, storage_options=options)
    with new_place(f"s3://{bucket}/x", options) as place:
        shown = [place, Folder.at(uri, options), find_files(uri, options), source, result, plan]
        shown += [source.parts(["x"])[0], source.probe(["x"]), result.model, result.summary()]
        for thing in shown:
            assert_no_secret(repr(thing) + str(thing), object_store)
    storage(object_store).pipe_file(f"{bucket}/t/_delta_log/0.json", b"{}")
    found = find_files(f"s3://{bucket}/t", options)
    assert type(found).__name__ == "DeltaFolder"
    assert_no_secret(repr(found), object_store)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("Server failed to authenticate.\nRequestId:1\nErrorCode:X"),
            "RuntimeError: Server failed to authenticate; check the credentials, and what they are "
            "allowed to do",
        ),
        (
            OSError(16, "Service Unavailable"),
            "OSError: [Errno 16] Service Unavailable; check the address of the storage, or start "
            "again when it answers",
        ),
        (
            FileNotFoundError("The specified bucket does not exist."),
            "FileNotFoundError: The specified bucket does not exist; check its name, or make it",
        ),
        (
            PermissionError(13, "Permission denied", "/local/file"),
            "PermissionError: [Errno 13] Permission denied: '/local/file'",
        ),
        (ValueError(), "ValueError"),
        (ValueError("https://host/a?sig=hidden of hunter22"), "ValueError: https://host/a of ***"),
    ],
)
def test_what_storages_say(error: Exception, text: str) -> None:
    assert reason(error, {"secret": "hunter22"}) == text


def test_an_archive_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no Parquet file found at zip://a"):
        open_source("zip://a.parquet::/nowhere/at/all.zip")
