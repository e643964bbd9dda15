"""``deploy/systemd``: systemd's own opinion of the units, and what the service may call."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
from checks import BIN, DEPLOY, run, tool

FOLDER = DEPLOY / "systemd"
UNITS = sorted(p.name for p in FOLDER.glob("dmixed-*"))
EXPOSURE = 2.0  # of 10 for a service without any restriction; below 5 systemd says OK


def settings(unit: str, text: str | None = None) -> dict[str, list[str]]:
    """Values of each setting of a unit, in order."""
    lines = (FOLDER / unit).read_text() if text is None else text
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", lines, re.M):
        found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with the program of this environment where README.md installs one."""
    tool("systemd-analyze")
    for name in UNITS:
        text = (FOLDER / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/dmixed/bin", str(BIN)))
    return tmp_path


def complaints(folder: Path) -> str:
    names = [folder / name.replace("@.", "@dmixed-refit.service.") for name in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, names)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr  # its status is 0 for settings that it does not know


def test_systemd_has_no_complaint(units: Path) -> None:
    assert UNITS == ["dmixed-alert@.service", "dmixed-refit.service", "dmixed-refit.timer"]
    assert not complaints(units)


@pytest.mark.parametrize(
    ("unit", "old", "new"),
    [
        ("dmixed-refit.service", "ProtectSystem=", "ProtectSystems="),
        ("dmixed-refit.service", "Restart=on-failure", "Restart=always"),
        ("dmixed-refit.service", str(BIN), "/nowhere"),
        ("dmixed-refit.timer", "*-*-* 02:30:00", "*-*-* 25:30:00"),
    ],
)
def test_systemd_finds_mistakes(units: Path, unit: str, old: str, new: str) -> None:
    text = (units / unit).read_text()
    assert old in text
    (units / unit).write_text(text.replace(old, new))
    assert complaints(units)


def test_the_service_is_hardened(units: Path) -> None:
    for name in ("dmixed-refit.service", "dmixed-alert@.service"):
        limit = f"--threshold={int(EXPOSURE * 10)}"
        run(["systemd-analyze", "security", "--offline=true", limit, units / name])


def test_the_timer_fires_once_a_night() -> None:
    tool("systemd-analyze")
    (when,) = settings("dmixed-refit.timer")["OnCalendar"]
    said = run(["systemd-analyze", "calendar", "--iterations=3", when]).stdout
    days = re.findall(r"(?:Next elapse|Iteration #\d+|Iter\. #\d+): \w+ (\S+) 02:30:00", said)
    assert len(set(days)) == 3


def test_secrets_are_references() -> None:
    """Keys come from a file of root's; the unit, which all may read, has none."""
    service = settings("dmixed-refit.service")
    (credential,) = service["LoadCredential"]
    name, _, path = credential.partition(":")
    assert path.startswith("/etc/dmixed/")
    environment = dict(
        word.split("=", 1) for line in service["Environment"] for word in shlex.split(line)
    )
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == f"%d/{name}"
    assert not [v for v in environment if re.search("KEY|SECRET|TOKEN|PASSWORD", v)]


def test_what_is_tried_again() -> None:
    service = settings("dmixed-refit.service")
    assert service["RestartPreventExitStatus"] == ["2 3 4"]
    assert service["ExecStart"] == ["/opt/dmixed/bin/dmixed refit /etc/dmixed/job.yaml"]


@cache
def system_calls() -> dict[str, frozenset[str]]:
    """Members of systemd's groups of system calls."""
    groups: dict[str, set[str]] = {}
    for line in run(["systemd-analyze", "syscall-filter"]).stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            members = groups[word] = set()
        elif word and not word.startswith("#") and groups:
            members.add(word)

    def flat(name: str) -> frozenset[str]:
        parts = groups[name]
        return frozenset().union(*(flat(m) if m.startswith("@") else {m} for m in parts))

    return {name: flat(name) for name in groups}


def test_dmixed_calls_nothing_that_the_service_forbids(tmp_path: Path) -> None:
    """System calls of a fit, with threads, are those that remain of the filters."""
    tool("systemd-analyze", "strace")
    if subprocess.run(["strace", "-qq", "-o", tmp_path / "none", "true"]).returncode:
        pytest.skip("this machine lets no process trace another")
    allowed: set[str] = set()
    for line in settings("dmixed-refit.service")["SystemCallFilter"]:
        words = line.removeprefix("~").split()
        calls = set().union(*(system_calls().get(word, {word}) for word in words))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    run(["strace", "-f", "-qq", "-o", tmp_path / "trace", BIN / "dmixed", "demo"])
    made = set(re.findall(r"^\d+ +([a-z0-9_]+)\(", (tmp_path / "trace").read_text(), re.M))
    assert len(made) > 20
    assert made <= allowed
    assert "mount" not in allowed
