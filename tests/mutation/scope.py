"""Where faults are made, and the sources there."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "artifacts" / "mutation"
SCOPE = (
    "nbpeft/engine",
    "nbpeft/checkpoint",
    "nbpeft/losses",
    "nbpeft/training/data",
    "nbpeft/training/disk",
    "nbpeft/training/monitor",
    "nbpeft/model/saving",
)


@cache
def paths() -> tuple[str, ...]:
    """All files in which faults are made, below the root."""
    return tuple(
        file.relative_to(ROOT).as_posix() for folder in SCOPE for file in sorted((ROOT / folder).rglob("*.py"))
    )


@cache
def read(path: str) -> str:
    """The source of a file below the root."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def digest(path: str) -> str:
    """Of a file's source."""
    return hashlib.sha256(read(path).encode()).hexdigest()[:16]
