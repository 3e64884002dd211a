"""The processes of a further host: python -m nbpeft.training.launch.host FOLDER PROCESSES HOSTS HOST ADDRESS PORT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nbpeft.training.launch.processes import Launch, Processes

_TURN = 0.2


def main(folder: str, processes: str, machines: str, host: str, address: str, port: str) -> int:
    """Starts them and waits for their end. Returns the status of the process."""
    launch = Launch(int(processes), (address, *["?"] * (int(machines) - 1)))
    with Processes(Path(folder), launch, host=int(host), address=address, port=int(port)) as running:
        while running.running:
            time.sleep(_TURN)
            failure = running.failure()
            if failure is not None:
                print(f"process {failure.rank} of {launch.world}: {failure.message}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
