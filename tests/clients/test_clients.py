"""Libraries that call PEFT give with nbpeft by that name what they give with PEFT: transformers, diffusers, others."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.clients.client_run import CASES
from tests.clients.packages import DIFFUSERS, installed
from tests.peft_api.processes import ROOT, python

# What each client needs that is not installed beside nbpeft.
PACKAGES = {
    "transformers": (),
    "torch": (),
    "lm_eval": ("lm-eval==0.4.13",),
    "diffusers": DIFFUSERS,
    "sentence": (
        *("sentence-transformers==6.2.0", "scikit-learn==1.9.1", "scipy==1.17.1", "joblib==1.6.0"),
        *("threadpoolctl==3.8.0", "narwhals==2.29.0", "cloudpickle==3.1.3"),
    ),
}
ONE_WORD = {
    "transformers": ("transformers_adapters", "transformers_trainer"),
    "sentence": ("sentence_transformers",),
}
"""What runs without the name ``peft``."""


@functools.cache
def of_peft(client: str) -> dict[str, Any]:
    """What PEFT gives in all cases of a client; a case seeds what it draws, whichever ran before it."""
    with tempfile.TemporaryDirectory() as folder:
        return results(client, "peft", cases_of(client), Path(folder))


def cases_of(client: str) -> list[str]:
    """The names of its cases."""
    return [name for name in CASES if name.startswith(client)]


def results(client: str, library: str, names: list[str], folder: Path) -> dict[str, Any]:
    """What one side gives in some cases of a client."""
    file, packages = folder / f"{library}.json", PACKAGES[client]
    paths = [str(ROOT), *([str(installed(*packages))] if packages else [])]
    script = str(ROOT / "tests/clients/client_run.py")
    python("-W", "ignore", script, library, str(file), *names, PYTHONPATH=os.pathsep.join(reversed(paths)))
    found: dict[str, Any] = json.loads(file.read_text())
    assert found.pop("library") == ("peft" if library == "peft" else "nbpeft")
    return found


def close(one: Any, other: Any) -> bool:
    """Whether two results are the same, numbers up to rounding."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(other, float) else other)


@pytest.mark.slow
@pytest.mark.parametrize("client", PACKAGES)
def test_a_client_gives_what_it_gives_with_peft(client: str, tmp_path: Path) -> None:
    compare(client, "as-peft", cases_of(client), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("client", ONE_WORD)
def test_a_client_takes_configs_by_the_one_word_replaced(client: str, tmp_path: Path) -> None:
    compare(client, "nbpeft", list(ONE_WORD[client]), tmp_path)


def compare(client: str, library: str, names: list[str], folder: Path) -> None:
    """Asserts that a client gives in some cases what it gives with PEFT."""
    pytest.importorskip("peft")
    theirs, ours = {name: of_peft(client)[name] for name in names}, results(client, library, names, folder)
    failed = {name: found for name, found in (theirs | ours).items() if isinstance(found, str)}
    assert not failed, "\n".join(failed.values())
    assert [name for name in names if not close(ours[name], theirs[name])] == [], (ours, theirs)
