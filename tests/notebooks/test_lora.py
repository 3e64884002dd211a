"""The quickstart, and using what it saved."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder, so that notebook 03 finds what notebook 01 saved."""
    return tmp_path_factory.mktemp("notebooks")


def test_01_teaches_what_the_base_model_cannot_do(shared: Path) -> None:
    found = summary(execute(nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4), shared))
    assert percent(found["score base"]) < 20
    assert percent(found["score adapter"]) >= 80
    assert found["score adapter"] == found["score adapter loaded"] == found["score adapter merged"]
    size = float(found["adapter on disk"].removesuffix(" MB"))
    assert 0.5 < size < 10
