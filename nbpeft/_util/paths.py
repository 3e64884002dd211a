"""Paths as they are shown."""

from __future__ import annotations

from pathlib import Path


def from_here(place: Path) -> Path:
    """Returns a path relative to the working directory if it is inside, else unchanged."""
    try:
        return place.absolute().relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return place
