"""Architectures of transformers that run: adapted, trained for a step, saved, loaded and merged, also in 4 bits.

The guide lists them on its page "Models and platforms".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import nbpeft
from tests.closeness import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:target_modules='all-linear' includes the experts")

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, "vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_ENCODER = {**_SIZES, "vocab_size": 128, "max_position_embeddings": 64}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
_WHISPER = {
    **_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_VISION = {**_SIZES, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of an architecture.

    Attributes:
        name: the name of its model class in transformers.
        settings: fields of its config; a dict whose key ends with ``_config`` is a config of a part.
        task: the task type of its adapter.
        inputs: which inputs it takes besides tokens: ``pixels`` or ``features``.
        experts: experts that never were layers, which an adapter names.
    """

    name: str
    settings: dict[str, Any] = field(hash=False)
    task: str = "CAUSAL_LM"
    inputs: str = ""
    experts: tuple[str, ...] = ()

    def config(self, **fields: Any) -> nbpeft.LoraConfig:
        return nbpeft.LoraConfig(
            r=4, target_modules="all-linear", target_parameters=list(self.experts) or None, **fields
        )


DECODERS = [
    Architecture("LlamaForCausalLM", _DECODER),
    Architecture("MistralForCausalLM", _DECODER),
    Architecture("Qwen2ForCausalLM", _DECODER),
    Architecture("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    Architecture("Gemma2ForCausalLM", {**_DECODER, "head_dim": 16}),
    Architecture("Gemma3ForCausalLM", {**_DECODER, "head_dim": 16}),
    Architecture("Phi3ForCausalLM", _DECODER),
    Architecture("GraniteForCausalLM", _DECODER),
    Architecture("SmolLM3ForCausalLM", {**_DECODER, "bos_token_id": 1, "eos_token_id": 2}),
    Architecture("Olmo2ForCausalLM", {**_DECODER, "eos_token_id": 2}),
    Architecture("GPT2LMHeadModel", _GPT2),
    Architecture("GPTNeoXForCausalLM", _ENCODER),
    Architecture("OPTForCausalLM", {**_SIZES, "vocab_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    Architecture("BloomForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Architecture("FalconForCausalLM", {**_SIZES, "vocab_size": 128}),
    Architecture("MambaForCausalLM", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
]
MIXTURES = [
    Architecture("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    Architecture("Qwen2MoeForCausalLM", {**_DECODER, **_MOE, "shared_expert_intermediate_size": 64}),
    Architecture("Qwen3MoeForCausalLM", {**_DECODER, **_MOE, "head_dim": 16}),
    Architecture("OlmoeForCausalLM", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2}),
    Architecture(
        "GptOssForCausalLM",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
]
ENCODER_DECODERS = [
    Architecture("T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, "SEQ_2_SEQ_LM"),
    Architecture("BartForConditionalGeneration", _BART, "SEQ_2_SEQ_LM"),
    Architecture("WhisperForConditionalGeneration", _WHISPER, "SEQ_2_SEQ_LM", "features"),
]
CLASSIFIERS = [
    Architecture("LlamaForSequenceClassification", _DECODER, "SEQ_CLS"),
    Architecture("BertForSequenceClassification", _ENCODER, "SEQ_CLS"),
    Architecture("RobertaForSequenceClassification", {**_ENCODER, "max_position_embeddings": 66}, "SEQ_CLS"),
    Architecture("ModernBertForSequenceClassification", {**_ENCODER, "pad_token_id": 0}, "SEQ_CLS"),
    Architecture("BertForTokenClassification", _ENCODER, "TOKEN_CLS"),
    Architecture("ViTForImageClassification", _VISION, "SEQ_CLS", "pixels"),
]
VISION_LANGUAGE = [
    Architecture(
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "text_config": {"model_type": "llama", **_DECODER},
            "image_token_index": 127,
            "vision_feature_layer": -1,
        },
        inputs="pixels",
    ),
]
GROUPS = {
    "decoders": DECODERS,
    "mixtures of experts": MIXTURES,
    "encoder-decoders": ENCODER_DECODERS,
    "classifiers": CLASSIFIERS,
    "vision-language models": VISION_LANGUAGE,
}
ALL = [architecture for group in GROUPS.values() for architecture in group]


def built(architecture: Architecture) -> Any:
    kind: Any = getattr(transformers, architecture.name)
    torch.manual_seed(0)
    return kind(kind.config_class(**copy.deepcopy(architecture.settings))).eval()


def batch_of(architecture: Architecture) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    if architecture.name.startswith("Llava"):
        batch["input_ids"] = torch.cat([torch.full((2, 4), 127), ids], dim=1)  # a picture has four patches
        batch["labels"] = torch.cat([torch.full((2, 4), -100), ids], dim=1)
    if architecture.inputs == "pixels":
        batch["pixel_values"] = torch.randn(2, 3, 16, 16)
    if architecture.inputs == "features":
        batch["input_features"] = torch.randn(2, 8, 32)
    if architecture.task == "SEQ_CLS":
        batch["labels"] = torch.tensor([0, 1])
    if architecture.task == "TOKEN_CLS":
        batch["labels"] = ids % 2
    if architecture.inputs and not architecture.name.startswith("Llava"):
        del batch["input_ids"]
    return batch


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def trained(model: Any, batch: dict[str, Tensor], steps: int = 2) -> list[float]:
    """The losses of some steps of all that is to be trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.drawn(6)
@pytest.mark.parametrize("architecture", ALL, ids=lambda item: item.name)
def test_an_architecture_runs(architecture: Architecture, tmp_path: Path) -> None:
    base, batch = built(architecture), batch_of(architecture)
    before = logits_of(base, batch)
    task = None if architecture.name == "ViTForImageClassification" else architecture.task
    model = nbpeft.get_peft_model(copy.deepcopy(base), architecture.config(task_type=task)).eval()
    assert_close(logits_of(model, batch), before)
    first, last = trained(model, batch)
    assert last < first
    after = logits_of(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = nbpeft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(logits_of(loaded, batch), after)
    assert_close(logits_of(loaded.merge_and_unload(), batch), after)


@pytest.mark.drawn(4)
@pytest.mark.parametrize(
    "architecture", [item for item in ALL if item.name != "FalconForCausalLM"], ids=lambda item: item.name
)
def test_an_architecture_runs_in_4_bits(architecture: Architecture) -> None:
    quantized = nbpeft.quantize_model(built(architecture))
    model = nbpeft.get_peft_model(nbpeft.prepare_model_for_kbit_training(quantized), architecture.config())
    first, last = trained(model, batch_of(architecture))
    assert last < first


def test_the_guide_lists_each_architecture() -> None:
    page = Path(__file__).parents[2] / "notebooks" / "guide" / "models-and-platforms.md"
    text = page.read_text(encoding="utf-8")
    assert not [item.name for item in ALL if f"`{item.name}`" not in text]
