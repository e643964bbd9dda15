"""A real object store for tests: OpenStack Swift with its S3 interface, in processes of its own.

Four daemons on loopback (account, container, object and proxy servers), rings of one device, data
in a directory. Signatures are checked as at Amazon: a wrong secret is refused. Each daemon can be
killed and started again by its name. Imports nothing of dmixed.

    with ObjectStore(directory) as store:
        fs = s3fs.S3FileSystem(**store.storage_options())
        store.kill("object")
        store.start("object")

    python -m tests.objectstore COMMAND ...

runs a command with a store in its environment, an empty bucket at DMIXED_LAKE.

Access keys are "account:user". The user "owner" may do everything in its account; "guest" of the
same account nothing; "other" is the owner of an account of its own, where no bucket is.
"""

from __future__ import annotations

import http.client
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DAEMONS = ("account", "container", "object", "proxy")
LISTED = 2  # names on a page of a listing: a few files make many pages
READY = 60.0  # seconds a daemon may take to answer
REGION = "us-east-1"
LAKE = "DMIXED_LAKE"  # variable with the URI of a bucket

# A daemon ends with the process that started it, also when that one is killed. What it keeps need
# not outlive a loss of power.
DAEMON = """
import contextlib, ctypes, os, signal, sys, warnings
warnings.simplefilter("ignore")
with contextlib.suppress(AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.fsync = os.fdatasync = lambda fd: None
from swift.common.wsgi import run_wsgi
sys.exit(run_wsgi(sys.argv[1], sys.argv[2], verbose=True))
"""

RINGS = """
import sys, warnings
warnings.simplefilter("ignore")
from swift.common.ring import RingBuilder
for argument in sys.argv[2:]:
    name, port = argument.split("=")
    builder = RingBuilder(2, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1.0, "device": "disk", "ip": "127.0.0.1",
                     "port": int(port), "replication_ip": "127.0.0.1",
                     "replication_port": int(port)})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""

BACKEND = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {root}
devices = {root}/devices
mount_check = false
user = {user}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {root}
user = {user}
[pipeline:main]
pipeline = catch_errors listing_formats bulk s3api tempauth copy slo dlo proxy-server
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_bucket_listing = {listed}
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
{users}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 5
recoverable_node_timeout = 5
conn_timeout = 1
error_suppression_limit = 1000000
{filters}
"""
FILTERS = ("catch_errors", "listing_formats", "bulk", "copy", "slo", "dlo")


@dataclass(frozen=True)
class User:
    """Who signs requests.

    Attributes
    ----------
    key
        access key id
    secret
        what requests are signed with
    groups
        what Swift lets it do, ".admin" for everything in its account
    """

    key: str
    secret: str = field(repr=False)
    groups: str = ""

    @property
    def setting(self) -> str:
        """The line of tempauth's settings."""
        account, user = self.key.split(":")
        return f"user_{account}_{user} = {self.secret} {self.groups}".rstrip()


def reason_why_not(directory: Path) -> str | None:
    """Why a store cannot keep its data in a directory, None if it can."""
    if find_spec("swift") is None:
        return "swift is not installed"
    if not hasattr(os, "setxattr"):
        return "swift keeps metadata in extended attributes, which this system lacks"
    try:
        os.setxattr(directory, "user.swift.metadata", b"1" * 1024)
        os.removexattr(directory, "user.swift.metadata")
    except OSError as error:
        return f"the file system of {directory} has no extended attributes: {error.strerror}"
    return None


class ObjectStore:
    """Four daemons and their directory.

    Parameters
    ----------
    directory
        an empty one, on a file system with extended attributes
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory
        account, elsewhere = (secrets.token_hex(6) for _ in range(2))
        self.owner = User(f"{account}:owner", secrets.token_hex(20), ".admin")
        self.guest = User(f"{account}:guest", secrets.token_hex(20))
        self.other = User(f"{elsewhere}:other", secrets.token_hex(20), ".admin")
        self.ports: dict[str, int] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> ObjectStore:
        try:
            self._configure()
            for name in DAEMONS:
                self._spawn(name)
            for name in DAEMONS:
                self._wait(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Address of the S3 interface."""
        return f"http://127.0.0.1:{self.ports['proxy']}"

    def storage_options(self, user: User | None = None, **more: Any) -> dict[str, Any]:
        """What s3fs takes, for the owner by default; each call with a cache of its own is new."""
        user = user or self.owner
        client = {"endpoint_url": self.endpoint, "region_name": REGION}
        return {"key": user.key, "secret": user.secret, "client_kwargs": client, **more}

    def environment(self, user: User | None = None) -> dict[str, str]:
        """Variables by which s3fs, pyarrow and delta-rs find the store and who asks."""
        user = user or self.owner
        return {
            "AWS_ACCESS_KEY_ID": user.key,
            "AWS_SECRET_ACCESS_KEY": user.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def lake(self) -> dict[str, str]:
        """Variables of a new bucket of the owner: `environment`, and its URI."""
        import s3fs

        name = f"lake-{secrets.token_hex(4)}"
        s3fs.S3FileSystem(**self.storage_options(skip_instance_cache=True)).mkdir(name)
        nobody = {name: os.devnull for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
        return {**nobody, **self.environment(), LAKE: f"s3://{name}"}

    def log(self, name: str) -> str:
        """What a daemon has written."""
        return (self.root / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone; nothing if it is not running."""
        process = self._running.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def start(self, name: str) -> None:
        """Start a daemon at its old address, unless it is running, and wait until it answers."""
        if name not in self._running:
            self._spawn(name)
        self._wait(name)

    def stop(self) -> None:
        """End all daemons."""
        for name in list(self._running):
            self.kill(name)

    def _configure(self) -> None:
        (self.root / "devices" / "disk").mkdir(parents=True)
        self.ports = dict(zip(DAEMONS, _free_ports(len(DAEMONS)), strict=True))
        user = os.environ.get("USER") or str(os.getuid())
        for name in DAEMONS:
            text = (PROXY if name == "proxy" else BACKEND).format(
                name=name,
                port=self.ports[name],
                root=self.root,
                user=user,
                region=REGION,
                listed=LISTED,
                users="\n".join(u.setting for u in (self.owner, self.guest, self.other)),
                filters="\n".join(f"[filter:{x}]\nuse = egg:swift#{x}" for x in FILTERS),
            )
            (self.root / f"{name}.conf").write_text(text)
        salt = secrets.token_hex(16)
        (self.root / "swift.conf").write_text(f"[swift-hash]\nswift_hash_path_prefix = {salt}\n")
        rings = [f"{name}={self.ports[name]}" for name in DAEMONS[:3]]
        command = [sys.executable, "-c", RINGS, str(self.root), *rings]
        subprocess.run(command, check=True, capture_output=True, timeout=READY)

    def _spawn(self, name: str) -> None:
        # the kernel ends a daemon with the thread that started it
        assert threading.current_thread() is threading.main_thread()
        command = [sys.executable, "-c", DAEMON, str(self.root / f"{name}.conf"), f"{name}-server"]
        with (self.root / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_plain(os.environ)
            )

    def _wait(self, name: str) -> None:
        """Until a daemon answers, whatever it says."""
        process, deadline = self._running[name], time.monotonic() + READY
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                link = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=5)
                try:
                    link.request("GET", "/healthcheck")
                    link.getresponse().read()
                    return
                finally:
                    link.close()
            time.sleep(0.02)
        raise RuntimeError(f"swift's {name} server did not start:\n{self.log(name)[-2000:]}")


def _free_ports(n: int) -> list[int]:
    """Ports that nobody listens at, all different."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for x in sockets:
            x.bind(("127.0.0.1", 0))
        return [x.getsockname()[1] for x in sockets]
    finally:
        for x in sockets:
            x.close()


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment without what tests and coverage tools put there for themselves."""
    return {k: v for k, v in environment.items() if not k.startswith(("AWS_", "PYTHON", "COV"))}


def main(command: list[str]) -> int:
    """Run a command with a store in its environment; the status with which it ended."""
    if not command:
        print("usage: python -m tests.objectstore COMMAND ...", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        reason = reason_why_not(Path(name))
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr)
            return 1
        with ObjectStore(Path(name)) as store:
            return subprocess.run(command, env={**os.environ, **store.lake()}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
