"""Diagnosis of the installation: versions, problems and what to install. Imports no large packages."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from dataclasses import dataclass

from packaging.version import Version

from nbpeft.display.numbers import size
from nbpeft.errors import in_one_line
from nbpeft.session.results.doctor import Check, DoctorReport


@dataclass(frozen=True)
class _Need:
    package: str
    minimum: str
    optional: str = ""
    """What needs the package; empty if it is always needed."""
    flaw: tuple[str, str, str] | None = None
    """The first version with a known bug, the first one without it, and its effect."""


_NEEDS = (
    _Need("torch", "2.6"),
    _Need("transformers", "5.3"),
    _Need("safetensors", "0.4.4"),
    _Need("accelerate", "1.3", optional="training with transformers' Trainer"),
    _Need("bitsandbytes", "0.50", optional="4-bit and 8-bit models"),
    _Need("ipython", "7.34"),
    # https://github.com/ipython/ipykernel/pull/1529
    _Need("ipykernel", "5.5", "notebooks", ("7.0", "7.4", "sometimes a cell or a click is not run")),
    _Need("ipywidgets", "7.7", optional="panels with buttons; results stay HTML and text"),
)


def version_of(package: str) -> str:
    """Returns the installed version of a package without importing it; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def older(version: str, minimum: str) -> bool:
    """Returns whether a version is older than another; a pre-release or local build counts as its release."""
    return Version(Version(version).base_version) < Version(minimum)


def install(packages: str) -> str:
    """Returns the command that installs packages (names separated by spaces) for the running Python."""
    return f"{shlex.quote(sys.executable)} -m pip install -U {packages}"


def examine() -> DoctorReport:
    """Examines the installation."""
    checks = [Check("python", f"{platform.python_version()} · {sys.executable}", *_python_problem())]
    checks.append(Check("nbpeft", version_of("nbpeft") or "not installed as a package", optional=True))
    checks.extend(_check(need) for need in _NEEDS)
    checks.append(_accelerator())
    return DoctorReport(tuple(checks))


def _check(need: _Need) -> Check:
    version = version_of(need.package)
    if not version:
        without = f"needed for {need.optional}" if need.optional else "needed"
        return Check(need.package, "", without, install(need.package), optional=bool(need.optional))
    if older(version, need.minimum):
        return Check(need.package, version, f"older than {need.minimum}", install(need.package))
    if need.flaw is not None:
        first, fixed, effect = need.flaw
        if not older(version, first) and older(version, fixed):
            return Check(need.package, version, f"{effect} before {fixed}", install(need.package), optional=True)
    return Check(need.package, version)


def _python_problem() -> tuple[str, str]:
    return ("older than 3.11", "use Python 3.11 or newer") if sys.version_info < (3, 11) else ("", "")


def _accelerator() -> Check:
    """Returns a check of the device that torch uses, if torch is already imported."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):
        return Check("device", "not checked: torch is not imported yet", optional=True)
    if torch.cuda.is_available():
        try:
            free, total = torch.cuda.mem_get_info()
            return Check("device", f"{torch.cuda.get_device_name()}, {size(free)} free of {size(total)}")
        except RuntimeError as error:  # no memory for a CUDA context, or an earlier kernel has failed
            return Check("device", "cuda", f"does not answer ({in_one_line(error):.120})", "restart the kernel")
    if torch.backends.mps.is_available():
        return Check("device", "mps")
    return Check("device", "cpu", note=_slow_dtypes())


def _slow_dtypes() -> str:
    """Returns the dtypes that the processor is slow at, with advice, as text. Torch must be imported."""
    from nbpeft.memory.processor import HALF, slow_dtype_message, slow_here

    slow = [dtype for dtype in HALF if slow_here(dtype)]
    return slow_dtype_message(*slow) if slow else ""
