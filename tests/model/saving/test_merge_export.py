"""The files beside the weights of a merged model."""

from __future__ import annotations

import json
from pathlib import Path

from nbpeft.model.saving.merge_export import merge_to_folder
from tests.tiny_models import adapted, llama


def test_the_generation_config_goes_with_a_merged_model(tmp_path: Path) -> None:
    base = llama()
    base.generation_config.max_new_tokens = 7
    merge_to_folder(adapted(base), "default", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7
