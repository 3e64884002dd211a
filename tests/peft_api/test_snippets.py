"""PEFT's documentation runs: with the one word replaced, and unchanged while nbpeft is installed as ``peft``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.peft_api import snippets
from tests.peft_api.processes import python

# Snippets that run only while nbpeft answers for ``peft``: transformers 5.24 takes no PEFT before 0.22.
ONLY_AS_PEFT = {"integrations: transformers"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("saved")
    snippets.prepare(folder)
    return folder


@pytest.mark.drawn(25)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in snippets.SNIPPETS if name not in ONLY_AS_PEFT])
def test_it_runs_with_the_word_replaced(name: str, saved: Path) -> None:
    snippets.run(name, "nbpeft", saved)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["peft", "as-peft"])
def test_all_run_unchanged(library: str, saved: Path) -> None:
    printed = python("-W", "ignore", "tests/peft_api/snippets.py", library, str(saved))
    errors: dict[str, str] = json.loads(printed.splitlines()[-1])
    assert errors.keys() == (set() if library == "as-peft" else ONLY_AS_PEFT), errors
