"""The tutorial on one's own data."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, replaced, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "02_your_own_data.ipynb"
SHORTER = {
    "TICKET_STEPS, CHAT_STEPS, TEST_ROWS = 30, 30, 32": "TICKET_STEPS, CHAT_STEPS, TEST_ROWS = 24, 2, 12",
    "-t tokenizer --eval-data 32": "-t tokenizer --eval-data 8",
    "chats.jsonl --eval-data 32": "chats.jsonl --eval-data 4",
    "--adapter {best} --max-new-tokens 48": "--adapter {best} --max-new-tokens 12",
    "--metric json --max-new-tokens 64": "--metric json --max-new-tokens 16",
}
"""The tickets are learned, the chats are not: an adapter on those is only trained, chosen and scored."""


def test_02_goes_from_messy_files_to_a_shipped_adapter(tmp_path: Path) -> None:
    executed = execute(replaced(nbformat.read(NOTEBOOK, 4), SHORTER), tmp_path)
    assert 'Say which is which: --columns instruction="Ticket Text " output=Team.' in _errors(executed)
    found = summary(executed)
    assert found["rows left out"] == "7"
    assert percent(found["tickets right, team"].split(" (")[0]) > percent(found["tickets right, base"].split(" (")[0])
    assert (tmp_path / "adapters/own-data/adapter_model.safetensors").is_file()
    assert (tmp_path / "shipped/team/adapter_config.json").is_file()


def _errors(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.get("name") == "stderr")
