"""PEFT's documentation runs: with the one word replaced, and unchanged while nbpeft is installed as ``peft``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbpeft import NbpeftError
from tests.peft_api import snippets
from tests.peft_api.processes import python

# Snippets that run only while nbpeft answers for ``peft``: transformers 5.24 takes no PEFT before 0.22.
ONLY_AS_PEFT = {"integrations: transformers"}
# Snippets that nbpeft refuses: a layer of one's own is a kind of layer or a method here.
REFUSED = {"custom_models: custom layers"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("saved")
    snippets.prepare(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in snippets.SNIPPETS if name not in REFUSED | ONLY_AS_PEFT])
def test_it_runs_with_the_word_replaced(name: str, saved: Path) -> None:
    snippets.run(name, "nbpeft", saved)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_run_is_refused_in_a_line(name: str, saved: Path) -> None:
    with pytest.raises(NbpeftError) as raised:
        snippets.run(name, "nbpeft", saved)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["peft", "as-peft"])
def test_all_run_unchanged(library: str, saved: Path) -> None:
    printed = python("-W", "ignore", "tests/peft_api/snippets.py", library, str(saved))
    errors: dict[str, str] = json.loads(printed.splitlines()[-1])
    assert errors.keys() == (REFUSED if library == "as-peft" else ONLY_AS_PEFT), errors
