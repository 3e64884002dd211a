"""Builds and checks a release on a fresh machine: ``python3 notebooks/release.py --dry-run``.

Makes the virtual environment if it is not there and hands over to ``release_checks.py``. Needs nothing but Python.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment


def main() -> int:
    """Makes the environment and runs the checks in it, with the options of this command."""
    environment.require_python()
    try:
        python = environment.ensure("test")
    except environment.SetupError as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    command = [str(python), str(Path(__file__).with_name("release_checks.py")), *sys.argv[1:]]
    return subprocess.run(command, env=environment.child_environment()).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again.")
