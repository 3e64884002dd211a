"""Reasons are complete, and are found by the file and the text of a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation import reasons as module
from tests.mutation.mutants import mutants_of
from tests.mutation.reasons import reason_of, reasons

ENTRY = """
[[fault]]
file = "nbpeft/area.py"
what = "flip a sign: width * 2 -> (width / 2)"
kind = "{kind}"
why = "The area is read nowhere."
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "FILES", tmp_path)
    reasons.cache_clear()
    monkeypatch.setattr(module, "reasons", reasons.__wrapped__)
    return tmp_path


def test_a_reason_is_found_wherever_its_line_is_now(folder: Path) -> None:
    (folder / "rooms.toml").write_text(ENTRY.format(kind="equivalent"))
    source = "def area(width):\n    return width * 2\n"
    for moved in (source, f"\n\n{source}"):
        found = {mutant.operator: reason_of(mutant) for mutant in mutants_of("nbpeft/area.py", moved)}
        assert found["flip a sign"] == ("equivalent", "The area is read nowhere.")
        assert found["change a constant"] is None


def test_a_kind_that_is_not_known_is_refused(folder: Path) -> None:
    (folder / "rooms.toml").write_text(ENTRY.format(kind="unlikely"))
    with pytest.raises(ValueError, match=r"rooms\.toml: .* a kind of equivalent, cost, elsewhere"):
        module.reasons()


def test_what_is_stored_can_be_read() -> None:
    assert [why for _, why in reasons().values() if len(why.split()) < 4 or not why.endswith(".")] == []
