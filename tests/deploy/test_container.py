"""``deploy/container``: built for real, without an engine, from packages of Debian; and run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checks import BIN, DEPLOY, TOP, root, run, tool
from packaging.requirements import Requirement

FOLDER = DEPLOY / "container"
EXTRAS = ("s3", "delta")  # in the image
TIMEOUT = 840  # seconds; a base and an image take two minutes on two idle processors

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


@dataclass(frozen=True, slots=True)
class Images:
    """A store of images that are nobody else's."""

    folder: Path

    def buildah(self, *words: str | Path, status: int = 0) -> str:
        store = [f"--root={self.folder}/root", f"--runroot={self.folder}/run"]
        store.append("--storage-driver=vfs")  # needs no mounts, which a sandbox may not allow
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
        return run(
            ["buildah", *store, *words], status=status, timeout=TIMEOUT, env=environment
        ).stdout.strip()


def pip_secrets(folder: Path) -> list[str]:
    """Options that lend the index of this machine to a build: its pip settings, and its CAs."""
    shown = run([sys.executable, "-m", "pip", "config", "list"]).stdout.splitlines()
    settings = {
        name.partition(".")[2].lstrip("."): ast.literal_eval(value)
        for name, _, value in (line.partition("=") for line in shown)
    }
    kept = {k: settings[k] for k in ("index-url", "extra-index-url", "proxy") if k in settings}
    urls = {k: [u for u in v.split() if not u.startswith("file:")] for k, v in kept.items()}
    lines = [f"{name} = {' '.join(value)}" for name, value in urls.items() if value]
    options = [f"--secret=id=pip,src={folder}/pip.conf"]
    if "cert" in settings:
        shutil.copy(settings["cert"], folder / "ca")
        lines.append("cert = /run/secrets/ca")
        options.append(f"--secret=id=ca,src={folder}/ca")
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return options


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """A store with the image, built as README.md tells on a base made of Debian's packages."""
    tool("buildah", "mmdebstrap")
    root()
    folder = tmp_path_factory.mktemp("images")
    images = Images(folder)
    try:
        run(["sh", FOLDER / "debian-base.sh", folder / "base.tar"])
        container = images.buildah("from", "scratch")
        images.buildah("add", "--quiet", container, folder / "base.tar", "/")
        images.buildah("commit", "--quiet", "--rm", container, "localhost/base")
        (folder / "base.tar").unlink()
        images.buildah(
            *("build", "--quiet", "--pull-never", *pip_secrets(folder)),
            *("--build-arg=BASE_IMAGE=localhost/base", "--build-arg=VERSION=1.2.3"),
            f"--ignorefile={FOLDER / 'Dockerfile.dockerignore'}",
            *(f"--file={FOLDER / 'Dockerfile'}", "--tag=localhost/dmixed", TOP),
        )
        yield images
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def container(images: Images) -> Iterator[str]:
    name = images.buildah("from", "--pull-never", "localhost/dmixed")
    yield name
    images.buildah("rm", name)


def test_demo_runs_as_another_user_than_root(images: Images, container: str) -> None:
    """Through the image's entry point, on nothing but what it holds."""
    said = images.buildah("run", container, "--", "tini", "--", "dmixed", "demo")
    assert "REML" in said
    script = "import os; print(os.getuid(), os.getgid(), os.environ['OMP_NUM_THREADS'])"
    assert images.buildah("run", container, "--", "python", "-c", script) == "10001 10001 1"


def test_scheduler_and_worker_are_in_the_image(images: Images, container: str) -> None:
    for command in ("scheduler", "worker"):
        said = images.buildah("run", container, "--", "dask", command, "--version")
        assert re.search(r"\d{4}\.\d", said)
    modules = "s3fs, deltalake, distributed"
    images.buildah("run", container, "--", "python", "-c", f"import {modules}")


def test_what_the_image_says_of_itself(images: Images) -> None:
    config = json.loads(images.buildah("inspect", "--type=image", "localhost/dmixed"))["OCIv1"]
    config = config["config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["tini", "--"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.licenses"] == "BSD-3-Clause"
    assert "org.opencontainers.image.revision" in labels


def test_nothing_of_the_build_is_in_the_image(images: Images, container: str) -> None:
    """No compiler, no pip, no settings of the index, nothing that its user could change."""
    for program in ("cc", "gcc", "make", "pip", "pip3", "git"):
        images.buildah("run", container, "--", "sh", "-c", f"! command -v {program}")
    top = Path(images.buildah("mount", container))
    try:
        assert not [p for p in ("src", "opt/build", "var/cache/pip") if (top / p).exists()]
        secrets = [p for p in (top / "run/secrets", top / "etc/pip.conf") if p.exists()]
        assert not [p for p in secrets if p.is_file() or any(p.iterdir())]
        venv = top / "opt" / "dmixed"
        owned = [p for p in venv.rglob("*") if p.lstat().st_uid != 0 or p.lstat().st_mode & 0o022]
        assert not [p for p in owned if not p.is_symlink()]
        installed = {p.name for p in venv.glob("lib/python3*/site-packages/*.dist-info")}
        assert not [name for name in installed if name.startswith(("pip-", "pytest-"))]
        (recorded,) = [p for p in venv.glob("lib/python3*/site-packages/dmixed-*.dist-info")]
        assert "/src" in (recorded / "direct_url.json").read_text()
    finally:
        images.buildah("umount", container)


def test_hadolint_finds_nothing() -> None:
    run([BIN / "hadolint", FOLDER / "Dockerfile"])


def test_the_lock_is_of_these_dependencies() -> None:
    """Each dependency of dmixed and of the extras in the image, at a version that it allows."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    text = (FOLDER / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, re.M))
    assert "://" not in text
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), (
            f"{requirement}: README.md of deploy/container tells how to make requirements.lock anew"
        )


def test_only_what_is_copied_enters_the_build() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.M)
    assert {f"!{path}" for line in copied for path in line.split()} == {
        line for line in lines if line.startswith("!")
    }
    assert "*" in lines
