"""Prompts in calls whose rows have adapters of their own: each row as it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForTokenClassification, T5Config, T5ForConditionalGeneration

from nbpeft import MultitaskPromptTuningConfig, PrefixTuningConfig, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import LLAMA, randomize, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


class Tagger(LlamaForTokenClassification):  # type: ignore[misc]
    """Takes no cache, though its backbone does."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return self.score(self.model(input_ids=input_ids, **given).last_hidden_state)  # type: ignore[no-any-return]


def t5() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def check_rows(base: Any, kind: Any, fields: dict[str, Any], **inputs: Tensor) -> None:
    """Each row of a mixed batch has what the batch gives with its adapter, and that is not what the base gives."""
    model: Any = get_peft_model(base, kind(**fields, num_virtual_tokens=3), "a")
    model.add_adapter("b", kind(**fields, num_virtual_tokens=2))
    for seed, name in enumerate("ab"):
        randomize(model, name, seed)
    model.eval()

    def last(**more: Any) -> Tensor:
        found = model(**inputs, **more)
        return getattr(found, "logits", found)[:, -4:]  # type: ignore[no-any-return]

    with torch.no_grad():
        mixed, bare = last(adapter_names=["a", "b"]), last(adapter_names=["__base__", "__base__"])
        for row, name in enumerate("ab"):
            with model.use(name):
                assert_close(mixed[row], last()[row])
            assert differ(mixed[row], bare[row])


def test_a_prefix_is_put_into_the_cache_of_a_backbone() -> None:
    torch.manual_seed(0)
    base = Tagger(LlamaConfig(**LLAMA, num_labels=3))
    check_rows(base, PrefixTuningConfig, {}, input_ids=tokens(2, 5))


def test_a_prompt_of_a_decoder_is_put_before_the_tokens_of_its_row() -> None:
    torch.manual_seed(0)
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_tasks": 2}
    inputs = {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4, seed=5), "task_ids": torch.tensor([0, 1])}
    check_rows(t5(), MultitaskPromptTuningConfig, fields, **inputs)
