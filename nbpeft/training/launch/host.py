"""The processes of another host: python -m nbpeft.training.launch.host FOLDER PROCESSES HOSTS HOST ADDRESS PORT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nbpeft.training.launch.processes import Launch, Processes

_POLL_INTERVAL = 0.2


def main(folder: str, processes: str, machines: str, host: str, address: str, port: str) -> int:
    """Starts the processes of this host and waits for their end.

    Args:
        folder: the folder of the job, on a file system that all hosts share.
        processes: number of processes on each host.
        machines: number of hosts.
        host: index of this host, from 1.
        address: address of the first host.
        port: port on the first host.

    Returns:
        The exit status.
    """
    launch = Launch(int(processes), (address, *["?"] * (int(machines) - 1)))
    with Processes(Path(folder), launch, host=int(host), address=address, port=int(port)) as running:
        while running.running:
            time.sleep(_POLL_INTERVAL)
            failure = running.failure()
            if failure is not None:
                print(f"process {failure.rank} of {launch.world}: {failure.message}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
