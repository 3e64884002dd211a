"""QLoRA on SmolLM2-135M-Instruct: read from GGUF, quantized, trained, saved, in peft and back, merged."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from nbpeft.model.quantization.quantize import load_quantized
from nbpeft.model.quantization.weight_storage import stored_parts
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.training import prepare_model_for_kbit_training
from tests.closeness import assert_close
from tests.model.allocations import Allocations, bytes_of
from tests.smollm2 import GGUF, SUMS, source
from tests.tiny_models import logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]


def test_quantized_trained_saved_in_peft_and_back_and_merged(tmp_path: Path) -> None:
    path = source()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=GGUF)
    base = load_quantized(source(), quant_type="nf4", double_quant=True, compute_dtype="float32")
    fresh, again = copy.deepcopy(base), copy.deepcopy(base)  # to read the file takes ten seconds
    parts = {part.name: part for part in stored_parts(base)}
    layers = parts["quantized layers"]
    print({name: (part.module_count, part.byte_count, round(part.share, 4)) for name, part in parts.items()})
    assert layers.module_count == 210 and layers.kinds == ("nf4 double",) and layers.share <= 0.27
    assert parts["embedding"].kinds == ("fp32",), "the embedding stays as it is"

    batch = tokenizer("An order: two chairs for Ana in Lima.", return_tensors="pt")
    ids = batch["input_ids"]
    prepare_model_for_kbit_training(base)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW(model.manager.parameters("default"), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")

    with Allocations() as counted:
        done = merge_to_folder(model, "default", tmp_path / "merged", tokenizer=tokenizer)
    adapter = bytes_of(model.manager.parameters("default"))
    print(done, counted.peak / max(done.shard_bytes), [round(value / 1e6, 1) for value in done.shard_bytes])
    assert counted.peak <= 1.3 * max(done.shard_bytes) + adapter
    assert done.errors is not None and done.errors.full_precision < (done.errors.requantized or 0) < 0.1

    # Each handle gets its own copy of the base, quantized alike: after a forward in eval mode, state_dict() (which
    # peft calls) makes bitsandbytes round the constants of double quantization a second time.
    ours = logits(model.eval(), ids).float()
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert_close(logits(theirs.eval(), ids), ours, **SUMS)
    print("peft:", float((logits(theirs.eval(), ids) - ours).abs().max()), "of", float(ours.abs().max()))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = PeftModel.from_pretrained(again, tmp_path / "theirs")
    assert_close(logits(back.eval(), ids), ours, **SUMS)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    difference = (logits(merged, ids) - ours).norm() / ours.norm()
    print("merged copy:", float(difference))
    assert difference < 0.02
    text = tokenizer.decode(merged.generate(**batch, max_new_tokens=5, do_sample=False)[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"]
