"""Run a dmixed command on a Dask cluster of SLURM jobs, and exit with its status.

The settings of the jobs are those of ``jobqueue.yaml`` in a folder that Dask reads. A job that
ends, by its lifetime or with its node, is replaced until the command is done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from dask_jobqueue import SLURMCluster
from distributed import Client


def main() -> int:
    """Exit status of the command, 1 if no worker started in time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=4, help="worker jobs (default: 4)")
    parser.add_argument(
        "--wait",
        type=int,
        default=3600,
        metavar="SECONDS",
        help="how long the first worker may wait in the queue (default: 3600)",
    )
    parser.add_argument("command", nargs="+", help="such as: dmixed fit --data URI --formula TEXT")
    arguments = parser.parse_args()
    with SLURMCluster() as cluster:
        cluster.adapt(minimum_jobs=arguments.jobs, maximum_jobs=arguments.jobs)
        with Client(cluster) as client:
            try:
                client.wait_for_workers(1, timeout=arguments.wait)
            except TimeoutError:
                print(
                    f"no SLURM job started in {arguments.wait} s: see squeue --me, or raise --wait",
                    file=sys.stderr,
                )
                return 1
            address = cluster.scheduler_address
            return subprocess.run([*arguments.command, "--scheduler", address]).returncode


if __name__ == "__main__":
    sys.exit(main())
