"""Paths as they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbpeft._util.paths import from_here


def test_a_path_inside_the_working_directory_is_shown_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "runs" / "a") == from_here(Path("runs/a")) == Path("runs/a")
    assert from_here(tmp_path.parent / "runs") == tmp_path.parent / "runs"
