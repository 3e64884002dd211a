"""SmolLM2-135M-Instruct is shipped: what llama.cpp and vLLM get answers as the adapted model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbpeft.checkpoint import read_gguf
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.shipping import ship
from tests.closeness import assert_close
from tests.smollm2 import SUMS, load, source
from tests.tiny_models import logits, randomize

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_the_real_model_is_shipped(tmp_path: Path) -> None:
    base, tokenizer = load()
    prompt = tokenizer("An order: two chairs for Ana in Lima.", return_tensors="pt")["input_ids"]
    fields: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(rank_pattern={"q_proj": 4}, use_rslora=True, **fields), "orders").eval()
    randomize(model, "orders", scale=0.02)
    expected = logits(model, prompt)

    served = ship(model, engine="vllm", to=tmp_path / "vllm")
    adapter = ship(model, engine="llama.cpp", to=tmp_path / "adapter")
    merged = ship(model, engine="ollama", quantize="f32", tokenizer=tokenizer, to=tmp_path / "ollama")
    small = ship(model, engine="ollama", quantize="q8_0", tokenizer=tokenizer, to=tmp_path / "small")
    assert small.byte_count < 0.27 * merged.byte_count

    # The pairs of the file on the weights that the base has there are the weights of the merged file.
    whole, pairs = read_gguf(merged.folder / "model.gguf"), read_gguf(adapter.folder / "adapter.gguf")
    original = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source()).tensors}
    alpha = gguf.GGUFReader(adapter.folder / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    for name in ("blk.0.attn_q.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight"):
        down, up = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
        weight = torch.from_numpy(original[name].copy()) + alpha / down.shape[0] * up @ down
        assert_close(weight, whole[name])
    template = (merged.folder / "Modelfile").read_text()
    assert "<|im_start|>assistant\n{{ .Response }}<|im_end|>" in template

    loaded = AutoModelForCausalLM.from_pretrained(merged.folder, gguf_file="model.gguf").eval()
    assert_close(logits(loaded, prompt), expected, **SUMS)
    again = peft.PeftModel.from_pretrained(model.unload(), served.folder).eval()
    assert_close(logits(again, prompt), expected, **SUMS)
    text = "¿Dos sillas, 24 € each?"
    known = AutoTokenizer.from_pretrained(merged.folder, gguf_file="model.gguf")
    assert known(text)["input_ids"] == tokenizer(text)["input_ids"]
