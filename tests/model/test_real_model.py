"""SmolLM2-135M-Instruct read from a GGUF file: trains, saves, merges and reloads like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.smollm2 import SUMS, load
from tests.tiny_models import logits

pytestmark = [pytest.mark.slow, pytest.mark.slice, pytest.mark.real_model]


def test_trains_saves_merges_and_reloads(tmp_path: Path) -> None:
    base, tokenizer = load()
    assert base.is_quantized
    batch = tokenizer("An order: two chairs for Ana in Lima.", return_tensors="pt")
    ids = batch["input_ids"]
    before = logits(base, ids)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), before)
    optimizer = torch.optim.AdamW(model.manager.parameters("default"), lr=1e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    adapted = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size < 12e6
    plain = model.unload()
    assert torch.equal(logits(plain, ids), before)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert_close(logits(again.eval(), ids), adapted, **SUMS)
    merged = again.merge_and_unload()
    assert_close(logits(merged, ids), adapted, **SUMS)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded, ids), logits(merged, ids))
