"""The files beside the weights of a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nbpeft.model.saving.merge_export import LayerError, MergeErrors, merge_to_folder
from tests.closeness import assert_close
from tests.tiny_models import adapted, llama


def test_the_generation_config_goes_with_a_merged_model(tmp_path: Path) -> None:
    base = llama()
    base.generation_config.max_new_tokens = 7
    merge_to_folder(adapted(base), "default", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "vocabulary.txt").write_text("a\nb")


def test_a_given_tokenizer_goes_with_a_merged_model(tmp_path: Path) -> None:
    merge_to_folder(adapted(), "default", tmp_path / "merged", tokenizer=Tokenizer())
    assert (tmp_path / "merged" / "vocabulary.txt").read_text() == "a\nb"


def test_a_saved_adapter_is_merged_into_the_files_of_its_base(tmp_path: Path) -> None:
    model = adapted()
    llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("error", "text"), [(0.0712, "7.1 %"), (0.994, "99 %"), (0.995, "100 %"), (1.12, "112 %"), (20.0, "2,000 %")]
)
def test_an_error_is_told_as_a_share_of_what_the_adapters_add(error: float, text: str) -> None:
    errors = MergeErrors((LayerError("q", full_precision=error, requantized=None, norm=2, delta_norm=2),), "float32")
    assert errors.delta_message(error) == text
