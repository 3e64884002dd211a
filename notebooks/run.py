"""Runs a notebook of this folder on a fresh machine: ``python3 notebooks/run.py``.

Makes the virtual environment if it is not there, executes the notebook with the real model and
tells what it showed. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment

NOTEBOOKS = Path(__file__).resolve().parent
QUICKSTART = "01_lora_finetuning"


def main() -> int:
    """Reads the command line, makes the environment and hands over to it."""
    environment.require_python()
    parser = argparse.ArgumentParser(description="Runs the quickstart, or another notebook, and tells what it showed.")
    parser.add_argument("--notebook", default=QUICKSTART, metavar="NAME", help="its name or number (default: 01)")
    parser.add_argument("--lab", action="store_true", help="open it in JupyterLab instead of running it here")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="limit for one cell")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(path.stem for path in notebooks()))
        return 0
    notebook = find(arguments.notebook)
    if notebook is None:
        names = "\n  ".join(path.stem for path in notebooks()) or "none"
        print(f"There is no notebook {arguments.notebook!r}. There are:\n  {names}", file=sys.stderr)
        return 2
    try:
        python = environment.ensure("tutorials")
    except environment.SetupError as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    if arguments.lab:
        return call([str(python), "-m", "jupyterlab", str(notebook), *as_root()])
    environment.ARTIFACTS.mkdir(exist_ok=True)
    script = str(NOTEBOOKS / "execute.py")
    return call([str(python), script, str(notebook), str(environment.ARTIFACTS), "--timeout", str(arguments.timeout)])


def notebooks() -> list[Path]:
    """The notebooks of this folder in their order, then those of the gallery."""
    return [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("gallery/*.ipynb"))]


def find(name: str) -> Path | None:
    """The notebook that ``name`` means: a path, a name, a number or the beginning of a name."""
    wanted = Path(name).stem if name.endswith(".ipynb") else name
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    exact = [path for path in notebooks() if path.stem == wanted]
    begins = [path for path in notebooks() if path.stem.startswith(wanted)]
    return next(iter(exact or begins), None)


def as_root() -> list[str]:
    """The option without which JupyterLab refuses to start as root, which is the usual user of a container."""
    return ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []


def call(command: list[str]) -> int:
    """Runs a command in this terminal and gives its exit status."""
    # Threads that wait for each other leave the cores to other programs instead of spinning.
    variables = environment.child_environment(JUPYTER_PREFER_ENV_PATH="1", OMP_WAIT_POLICY="PASSIVE")
    try:
        return subprocess.run(command, env=variables).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again: it goes on from what is there.")
