"""Adapters trained when a model's modules had other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from nbpeft.checkpoint import Expected, from_file, key_conversion_of, remapped
from tests.checkpoint.peft_files import expected_by_peft, saved_by_peft
from tests.tiny_models import llama


def llava() -> LlavaForConditionalGeneration:
    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
            text_config=LlamaConfig(vocab_size=32, **sizes),
        )
    )


def test_old_nesting_of_a_model_that_transformers_rebuilt(tmp_path: Path) -> None:
    adapted = saved_by_peft(llava(), tmp_path, target_modules=["q_proj"])
    expected = expected_by_peft(adapted)
    path = "language_model.model.layers.0.self_attn.q_proj"
    assert "model.language_model.layers.0.self_attn.q_proj" in expected.adapters
    old = {
        f"base_model.model.{path}.lora_A.weight": torch.zeros(8, 16),
        f"base_model.model.{path}.lora_B.weight": torch.zeros(16, 8),
    }
    text = {key: value for key, value in expected.adapters.items() if "language_model" in key}
    loaded = from_file(old, Expected(text), peft_type="LORA", conversion=key_conversion_of(llava()))
    assert loaded.missing == []
    assert loaded.unexpected == []


def test_patterns_on_the_model_itself() -> None:
    model = nn.Module()
    model._checkpoint_conversion_mapping = {"^old": "new", "^new": "never"}  # type: ignore[assignment]
    conversion = key_conversion_of(model)
    assert conversion is not None and conversion.rename is not None
    assert conversion.rename("old.a") == "new.a"
    assert conversion.rename("other.a") == "other.a"


def test_models_without_renames() -> None:
    assert key_conversion_of(nn.Linear(2, 2)) is None
    conversion = key_conversion_of(llama())
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert conversion is None or conversion.rename is None or conversion.rename(key) == key


def test_remapped() -> None:
    tensors = {"base_model.model.old.a": torch.zeros(1), "old.b": torch.zeros(1)}
    assert list(remapped(tensors, {"^old": "new"})) == ["base_model.model.new.a", "new.b"]
    assert remapped(tensors, None) == tensors
