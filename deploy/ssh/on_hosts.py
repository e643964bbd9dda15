"""Run a dmixed command on hosts reached by SSH, and exit with its status.

The scheduler runs on the first host of the file, a worker on each; all end with the command. Hosts
must be in ``known_hosts``; keys come from ``ssh-agent`` or the usual files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed import Client, SSHCluster

DEATH_TIMEOUT = 60  # seconds after which a worker ends whose scheduler is gone


def hosts(file: Path) -> list[str]:
    """Lines of a file of hosts, without empty ones and comments."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    found = [line for line in lines if line]
    if not found:
        raise SystemExit(f"{file}: no hosts")
    return found


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=Path, default=Path("hosts.txt"), metavar="FILE")
    parser.add_argument("--nthreads", type=int, default=None, help="threads of a worker")
    parser.add_argument("--memory-limit", default="auto", help="of a worker, such as 16GiB")
    parser.add_argument("--python", default=None, help="that of the hosts, if not at this path")
    parser.add_argument("--config", default=None, metavar="FILE", help="ssh_config to read too")
    parser.add_argument("command", nargs="+", help="such as: dmixed fit --data URI --formula TEXT")
    arguments = parser.parse_args()
    names = hosts(arguments.hosts)
    connect: dict[str, Any] = {} if arguments.config is None else {"config": arguments.config}
    with SSHCluster(
        [names[0], *names],
        connect_options=connect,
        remote_python=arguments.python,
        scheduler_options={"dashboard": False, "port": 0},
        worker_options={
            "nthreads": arguments.nthreads,
            "memory_limit": arguments.memory_limit,
            "death_timeout": DEATH_TIMEOUT,
        },
    ) as cluster:
        address = cluster.scheduler_address
        status = subprocess.run([*arguments.command, "--scheduler", address]).returncode
        with Client(address) as client:  # SSH ends the session of a worker, not always the worker
            client.retire_workers(close_workers=True)
        return status


if __name__ == "__main__":
    sys.exit(main())
