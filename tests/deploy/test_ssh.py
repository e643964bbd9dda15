"""``deploy/ssh`` over a real ``sshd`` of this machine, with keys made for the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from checks import BIN, DEPLOY, TOP, estimates, root, run, tool

pytestmark = pytest.mark.timeout(600)  # seconds; each takes half a minute on idle processors

SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PidFile {folder}/sshd.pid
"""

SSH_CONFIG = """\
Host 127.0.0.1
    Port {port}
    User root
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
"""


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Client settings that reach a server, which accepts one key."""
    tool("sshd", "ssh-keygen")
    root()
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "user_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(port=port, folder=folder))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        daemon = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"], stderr=log
        )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield folder / "ssh_config"
        _, left = psutil.wait_procs(logged_in(port), timeout=20)
        assert not left, "workers outlive the command"
    finally:
        daemon.terminate()
        daemon.wait(timeout=10)


def logged_in(port: int) -> list[psutil.Process]:
    """Processes that came through the server of this port, orphans too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SSH_CONNECTION", "").endswith(f" 127.0.0.1 {port}"):
                found.append(process)
        except psutil.Error:  # it ended, or is a thread of the kernel
            continue
    return found


def test_fit_on_hosts_has_the_bits_of_a_local_fit(
    ssh_config: Path, tmp_path: Path, local_fit: tuple[list[str], dict[str, Any]]
) -> None:
    """Two workers, encrypted, with the settings of ``deploy/dask``; nothing is left running."""
    words, expected = local_fit
    (tmp_path / "hosts.txt").write_text("# two workers of one machine\n127.0.0.1\n127.0.0.1\n")
    (tmp_path / "dask").mkdir()
    shutil.copy(DEPLOY / "dask" / "dmixed.yaml", tmp_path / "dask")
    script = (
        f'. {DEPLOY}/dask/tls.sh && exec "{sys.executable}" {DEPLOY}/ssh/on_hosts.py '
        f'--hosts hosts.txt --config {ssh_config} --nthreads 1 --memory-limit 2GiB -- "$@"'
    )
    environment = os.environ | {
        "DASK_CONFIG": str(tmp_path / "dask"),
        "DMIXED_TLS": str(tmp_path / "tls"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    command = [*words, "--out", str(tmp_path / "out")]
    run(["sh", "-c", script, "on_hosts", *command], cwd=tmp_path, env=environment)
    assert estimates(tmp_path / "out") == expected
    told = ["sh", "-c", 'echo "$@"; exit 3', "dmixed", "refit"]
    said = run(
        ["sh", "-c", script, "on_hosts", *told], status=3, cwd=tmp_path, env=environment
    ).stdout
    assert said.startswith("refit --scheduler tls://")


def test_an_unknown_host_is_refused(ssh_config: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("127.0.0.1\n")
    (ssh_config.parent / "known_none").write_text("")
    config = ssh_config.read_text().replace("known_hosts", "known_none")
    (tmp_path / "ssh_config").write_text(config)
    script = DEPLOY / "ssh" / "on_hosts.py"
    command = [sys.executable, script, "--config", "ssh_config", "echo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Host key is not trusted" in done.stderr
    assert not done.stdout


def test_a_file_without_hosts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("# none\n\n")
    script = DEPLOY / "ssh" / "on_hosts.py"
    assert "no hosts" in run([sys.executable, script, "echo"], status=1, cwd=tmp_path).stderr


def test_options_of_dask_ssh_exist() -> None:
    """Options that README.md gives to ``dask ssh`` are among its own."""
    text = (DEPLOY / "ssh" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("dask ssh "))
    given = [word for word in line.split() if word.startswith("--")]
    known = run([BIN / "dask", "ssh", "--help"], cwd=TOP).stdout
    assert given
    assert all(option in known for option in given)
