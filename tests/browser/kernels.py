"""Kernels of other versions: environments that hold a kernel and widgets, and nothing else.

A generation (what Colab has, what is current) is one environment; the kernels of its versions are
folders beside it that come first on the path. They are made once and kept in a cache
(``NBPEFT_KERNELS``, by default below the user's cache directory). None of them has torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Generation:
    """What kernels of several versions share.

    Attributes:
        name: of its environment.
        requirements: installed with what they need.
        bare: installed without what they need: ipywidgets 7 would bring the whole Jupyter server.
    """

    name: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A kernel among the packages of its generation.

    Attributes:
        generation: the packages.
        ipykernel: the kernel's version.
    """

    generation: Generation
    ipykernel: str

    @property
    def name(self) -> str:
        """What its tests are called after."""
        return f"{self.generation.name}-{self.ipykernel}"

    @property
    def overlooks_requests(self) -> bool:
        """Whether a request may lie in the kernel's socket until somebody connects.

        ipykernel 7.0 to 7.3 answer past the stream that reads the same socket, which takes its wake-up
        away (https://github.com/ipython/ipykernel/pull/1529).
        """
        return (7, 0) <= tuple(map(int, self.ipykernel.split(".")[:2])) < (7, 4)


COLAB = Generation("colab", ("ipython==7.34.0", "ipykernel==6.17.1", "ipython_genutils"), ("ipywidgets==7.7.1",))
CURRENT = Generation("current", ("ipython>=8.20", "ipywidgets>=8.1,<9", "ipykernel>=7"))
COLAB_TODAY = Stack(COLAB, "6.17.1")
STACKS = (
    *(Stack(COLAB, "5.5.6"), COLAB_TODAY),
    *(Stack(CURRENT, version) for version in ("6.17.1", "6.31.0", "7.0.1", "7.3.0", "7.4.0")),
)


def cache_folder() -> Path:
    """Where the environments are kept."""
    named = os.environ.get("NBPEFT_KERNELS")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nbpeft" / "kernels"


@dataclass(frozen=True)
class Interpreter:
    """How a stack's Python is started.

    Attributes:
        python: the interpreter.
        kernel: the folder of the kernel's version, which comes first on the path.
    """

    python: Path
    kernel: Path


def interpreter_of(stack: Stack) -> Interpreter:
    """The interpreter of a stack, whose environment is made if it is missing; the test fails if that is impossible."""
    with _failing(stack.name):
        return _made(stack)


def python_of(generation: Generation) -> Path:
    """The interpreter of a generation, whose environment is made if it is missing; the test fails if that fails."""
    with _failing(generation.name):
        return _shared(generation)


@contextmanager
def _failing(name: str) -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{name} cannot be installed:\n{error.stderr[-2000:]}", pytrace=False)


def _shared(generation: Generation) -> Path:
    shared = _folder(generation.name, *generation.requirements, *generation.bare)
    python = shared / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with _making(shared) as missing:
        if missing:
            venv.create(shared, with_pip=False, symlinks=os.name != "nt")
            _install(python, *generation.requirements)
            if generation.bare:
                _install(python, "--no-deps", *generation.bare)
    return python


def _made(stack: Stack) -> Interpreter:
    python = _shared(stack.generation)
    shared = python.parent.parent
    kernel = shared.with_name(f"{shared.name}-ipykernel-{stack.ipykernel}")
    with _making(kernel) as missing:
        if missing:
            _install(python, "--no-deps", "--target", str(kernel), f"ipykernel=={stack.ipykernel}")
    return Interpreter(python, kernel)


def _folder(name: str, *words: str) -> Path:
    mark = hashlib.sha256(" ".join((sys.version, *words)).encode()).hexdigest()[:10]
    return cache_folder() / f"{name}-{mark}"


@contextmanager
def _making(folder: Path) -> Iterator[bool]:
    """Gives whether a folder is still to be made; one that was left half made is made anew."""
    complete = folder / "complete"
    missing = not complete.exists()
    if missing:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    yield missing
    complete.touch()


def _install(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def running_kernel(interpreter: Interpreter) -> Iterator[Any]:
    """A kernel with the package and ``fakes`` on its path; gives its blocking client."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[str(interpreter.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="kernel",
        language="python",
    )
    # IPython 7 has a package "tests" of its own on the path, so the fakes are found by their folder.
    path = os.pathsep.join(map(str, (interpreter.kernel, ROOT, ROOT / "tests" / "widgets")))
    manager.start_kernel(env={**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"})
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
