"""``deploy/slurm`` on a real SLURM of one node: jobs submit jobs, and the fit has the same bits."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml
from checks import BIN, DEPLOY, estimates, root, run, tool

pytestmark = pytest.mark.timeout(600)  # seconds; each takes half a minute on idle processors

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment with which SLURM's commands find a cluster of one node with 8 processors."""
    tool("munged", "slurmctld", "slurmd", "sbatch")
    root()
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "home"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, ports=free_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {
        "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder / "home"),
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(conf),
        "DASK_CONFIG": str(folder / "dask"),
    }
    daemons: list[subprocess.Popen[str]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("w") as log:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
            )

    try:
        files = [f"--{n}={folder}/munge.{n[:4]}" for n in ("log-file", "pid-file", "seed-file")]
        start(
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket"),
            *(f"--key-file={key}", *files),
        )
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D", "-N", host)
        wait_for_node(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def wait_for_node(environment: dict[str, str], folder: Path) -> None:
    for _ in range(120):
        state = subprocess.run(
            ["sinfo", "--noheader", "-o", "%t"], env=environment, capture_output=True, text=True
        )
        if state.stdout.strip() == "idle":
            return
        time.sleep(0.25)
    logs = "\n".join(p.read_text()[-2000:] for p in [*folder.glob("*.log"), *folder.glob("*.out")])
    pytest.fail(f"SLURM did not start: {state.stdout} {state.stderr}\n{logs}")


@pytest.fixture
def folder(slurm: dict[str, str], tmp_path: Path) -> Path:
    """A copy of ``deploy/``, with the settings where README.md puts them, sized for one node."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    settings = Path(slurm["DASK_CONFIG"])
    settings.mkdir(exist_ok=True)
    shutil.copy(DEPLOY / "dask" / "dmixed.yaml", settings)
    jobs = yaml.safe_load((DEPLOY / "slurm" / "jobqueue.yaml").read_text())
    jobs["jobqueue"]["slurm"] |= {"cores": 1, "processes": 1, "memory": "2GiB"}
    (settings / "jobqueue.yaml").write_text(yaml.safe_dump(jobs))
    return tmp_path / "deploy" / "slurm"


def submit(script: str, folder: Path, slurm: dict[str, str], *words: str | Path) -> int:
    """Exit status of a job that ran to its end."""
    options = ["--parsable", "--time=5", "--output=job.log"]
    done = run(["sbatch", *options, script, *words], cwd=folder, env=slurm)
    show = ["scontrol", "show", "job", "--oneliner", done.stdout.strip()]
    deadline = time.monotonic() + 400
    while True:
        fields = dict(f.partition("=")[::2] for f in run(show, env=slurm).stdout.split())
        if fields["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            break
        assert time.monotonic() < deadline, fields
        time.sleep(0.2)
    print(fields, (folder / "job.log").read_text(), sep="\n")
    return int(fields["ExitCode"].partition(":")[0])


def test_fit_on_worker_jobs_has_the_bits_of_a_local_fit(
    slurm: dict[str, str],
    folder: Path,
    tmp_path: Path,
    local_fit: tuple[list[str], dict[str, Any]],
) -> None:
    words, expected = local_fit
    out = tmp_path / "out"
    environment = slurm | {"DMIXED_JOBS": "2"}
    assert submit("cluster.sbatch", folder, environment, *words[1:], "--out", out) == 0
    assert estimates(out) == expected
    assert "REML" in (folder / "job.log").read_text()
    jobs = run(["scontrol", "show", "job", "--oneliner"], env=slurm).stdout.splitlines()
    workers = [job for job in jobs if "JobName=dmixed-worker" in job]
    assert len(workers) >= 2
    assert all("TimeLimit=04:00:00" in job for job in workers)
    deadline = time.monotonic() + 30
    while run(["squeue", "--noheader"], env=slurm).stdout.strip():
        assert time.monotonic() < deadline, "worker jobs outlive the command"
        time.sleep(0.2)


def test_the_cluster_is_encrypted(slurm: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """The driver's address is one of TLS; its key is for its owner alone."""
    shutil.copy("/bin/echo", tmp_path / "dmixed")
    environment = slurm | {"DMIXED_JOBS": "1", "PATH": f"{tmp_path}:{slurm['PATH']}"}
    assert submit("cluster.sbatch", folder, environment, "fit") == 0
    assert "fit --scheduler tls://" in (folder / "job.log").read_text()
    key = Path(slurm["HOME"]) / ".config" / "dmixed" / "tls" / "dask.key"
    assert key.stat().st_mode & 0o077 == 0


def test_one_node_ends_with_the_status_of_the_command(
    slurm: dict[str, str],
    folder: Path,
    tmp_path: Path,
    local_fit: tuple[list[str], dict[str, Any]],
) -> None:
    words, expected = local_fit
    out = tmp_path / "out"
    small = {"SBATCH_MEM_PER_NODE": "2G"}
    assert submit("one-node.sbatch", folder, slurm | small, *words[1:], "--out", out) == 0
    assert estimates(out) == expected
    assert submit("one-node.sbatch", folder, slurm, "fit", "--no-such-option") == 2


def test_settings_are_those_of_jobqueue() -> None:
    """No field that dask-jobqueue does not have, and a lifetime that ends before the job does."""
    import dask_jobqueue  # noqa: F401  its defaults

    ours = yaml.safe_load((DEPLOY / "slurm" / "jobqueue.yaml").read_text())["jobqueue"]["slurm"]
    known = next(d for d in dask.config.defaults if "jobqueue" in d)["jobqueue"]["slurm"]
    assert set(ours) <= set(known)
    options = ours["worker-extra-args"]
    named = dict(zip(options[::2], options[1::2], strict=True))
    lifetime, stagger = (
        dask.utils.parse_timedelta(named[name]) for name in ("--lifetime", "--lifetime-stagger")
    )
    hours, minutes, seconds = map(int, ours["walltime"].split(":"))
    assert lifetime + stagger < hours * 3600 + minutes * 60 + seconds


def test_scripts_lint() -> None:
    scripts = [*DEPLOY.glob("*/*.sbatch"), *DEPLOY.glob("*/*.sh")]
    assert len(scripts) >= 3
    run([BIN / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts])
