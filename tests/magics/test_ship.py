"""``%lora ship``, and ``%lora load`` of a revision or a folder of a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback import COMMIT, Hub
from tests.magics.notebook import Notebook
from tests.shipping.support import tokenizer


def test_ship_and_load(adapted: Any, tmp_path: Path) -> None:
    outcome = adapted.run(f"%lora ship sql --for vllm --to {tmp_path / 'served'}")
    assert outcome.error is None and outcome.value.written
    adapted.do(f"%lora load {tmp_path / 'served'} --name again")
    assert "again" in adapted["model"].manager.names


def test_merged_for_llama_cpp(adapted: Any, tmp_path: Path) -> None:
    place = tmp_path / "served"
    line = adapted.run(f"%lora ship sql --for llama.cpp --merged --to {place}").line
    assert "includes its tokenizer: give it (--tokenizer)" in line
    adapted["tokenizer"] = tokenizer()
    line = adapted.run(f"%lora ship sql --for llama.cpp --merged --to {place}").line
    assert line == "the tokenizer has the id 279, but the model's embedding has only 97 rows"
    outcome = adapted.run(f"%lora ship sql --for transformers --merged --quantize f16 --dry-run --to {place}")
    assert outcome.value.stored_as == "f16" and not place.exists()


def test_mistakes_are_one_line(adapted: Any, tmp_path: Path) -> None:
    place = tmp_path / "served"
    assert "%lora ship needs --for" in adapted.run("%lora ship sql").line
    assert "no engine is called 'vlm'" in adapted.run("%lora ship sql --for vlm").line
    assert "name the one to ship (--name)" in adapted.run(f"%lora ship --for vllm --to {place}").line
    adapted.do("%lora add model --name dora r=2 target_modules=q_proj use_dora=True")
    line = adapted.run(f"%lora ship dora --for vllm --to {place}").line
    assert "DoRA on 2 layers" in line and "(--merged)" in line
    adapted.do(f"%lora ship sql --for vllm --to {place}")
    assert "replace it (--replace)" in adapted.run(f"%lora ship sql --for vllm --to {place}").line
    adapted.do(f"%lora ship sql --for vllm --to {place} --replace")


def test_completion_and_help(adapted: Notebook) -> None:
    assert "vllm" in adapted.complete("%lora ship sql --for ")
    assert "q8_0" in adapted.complete("%lora ship sql --for llama.cpp --quantize ")
    assert "sql" in adapted.complete("%lora ship ")
    assert "--dry-run" in adapted.complete("%lora ship sql --")
    assert "one of vllm, llama.cpp, ollama" in str(adapted.run("%lora help ship").value)


def test_revisions_and_folders_of_a_repository(hub: Hub, adapted: Any) -> None:
    adapted.do("%lora push me/sql --adapter sql --revision v1")
    adapted.do("%lora load me/sql@v1 --name one")
    adapted.do(f"%lora load me/sql --revision {COMMIT} --name two")
    assert any("/resolve/v1/adapter_config.json" in request for request in hub.asked)
    assert "has no revision 'v9'" in adapted.run("%lora load me/sql@v9 --name x").line
    assert (
        "and --revision v2 name different revisions" in adapted.run("%lora load me/sql@v1 --revision v2 --name x").line
    )
    hub.files["me/many"] = {f"french/{name}": content for name, content in hub.files["me/sql"].items()}
    outcome = adapted.run("%lora load me/many --subfolder french")
    assert outcome.value.adapter.name == "french"
    assert {"one", "two", "french"} <= set(adapted["model"].manager.names)


def test_a_private_repository_needs_the_token(hub: Hub, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted.do("%lora push me/sql --adapter sql --private")
    hub.accepted = {"hf_" + "y" * 30}
    line = adapted.run("%lora load me/sql --name one").line
    assert "me/sql" in line and "hf_x" not in line
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 30)
    adapted.do("%lora load me/sql --name one")
    assert "hf_" + "y" * 30 in hub.tokens
