"""Tiny language models of many architectures, and batches drawn for them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nbpeft.losses import chunked_head, without_logits
from tests.closeness import DEPTH, assert_close

VOCABULARY = 97
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OTHER_HEADS = ("t5", "bart", "bert")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHARED),
    "qwen2": ("Qwen2", _SHARED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _SHARED),
    "gemma2": ("Gemma2", _SHARED | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", _SHARED | {"query_pre_attn_scalar": 8}),
    "mistral": ("Mistral", _SHARED),
    "phi": ("Phi", _SHARED),
    "phi3": ("Phi3", _SHARED),
    "gpt2": ("GPT2", _GPT2),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoX", _SHARED),
    "opt": ("OPT", _SHARED | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {name: _SHARED[name] for name in _SIZES}),
    "mixtral": ("Mixtral", _SHARED | _EXPERTS | {"output_router_logits": True}),
    "olmoe": ("Olmoe", _SHARED | _EXPERTS | {"output_router_logits": True}),
    "cohere": ("Cohere", _SHARED | {"logit_scale": 0.25}),
    "granite": ("Granite", _SHARED | {"logits_scaling": 8.0}),
    "t5": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                  "decoder_start_token_id": 0}),
    "bart": ("Bart", {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                      "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
                      "decoder_attention_heads": 4, "max_position_embeddings": 64}),
    "bert": ("Bert", _SHARED),
}  # fmt: skip
"""Name -> the beginning of the class names of transformers, and fields of the config."""


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, without dropout, its logits far from zero."""
    kind, fields = MODELS[name]
    text = getattr(transformers, f"{kind}TextConfig", None)
    config = (text or getattr(transformers, f"{kind}Config"))(**fields)
    for field in vars(config):
        if field.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate", "layerdrop")):
            setattr(config, field, 0.0)
    endings = ("ForMaskedLM", "ForConditionalGeneration") if name in _OTHER_HEADS else ("ForCausalLM", "LMHeadModel")
    found = (getattr(transformers, kind + ending, None) for ending in endings)
    maker = next(model_class for model_class in found if model_class is not None)
    torch.manual_seed(0)
    model = maker(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def batch_of(draw: random.Random) -> dict[str, Tensor]:
    """A batch of a drawn shape, a drawn share of whose tokens is learned; none at all in some rows."""
    rows, length = draw.randint(1, 4), draw.randint(2, 17)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        mask[row, draw.randint(1, length) :] = 0
        labels[row, : draw.choice([0, 0, length // 2, length])] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def loss_and_gradients(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of everything that trains."""
    model.zero_grad()
    loss = compute()
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), gradients


def takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def check_chunked(model: nn.Module, batch: dict[str, Any], chunk_size: int) -> None:
    """Compares the loss in chunks and its gradients with those of whole logits; in float32."""
    whole, expected = loss_and_gradients(model, lambda: model(**batch).loss)
    with chunked_head(model, chunk_size) as head, without_logits(model):
        loss, gradients = loss_and_gradients(model, lambda: model(**batch).loss)
    assert head.chunked
    assert not head.needed_by
    assert loss.dtype == whole.dtype
    assert_close(loss, whole, equal_nan=True)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, depth=3 * DEPTH, scale=max(largest, 1.0), message=name)
