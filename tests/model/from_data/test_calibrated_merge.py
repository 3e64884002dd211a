"""Merging into 4 and 8 bits so that outputs stay: against merging as PEFT does, and where it fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nbpeft.model.from_data.calibrated_merge as module
from nbpeft.engine.backends.bnb4bit import Bnb4bit
from nbpeft.errors import BusyError, ConfigError, MergeError
from nbpeft.model import merge_calibrated
from nbpeft.model.quantization.quantize import quantize_model
from tests.closeness import assert_close
from tests.tiny_models import adapted, gpt2, llama, randomize, tokens

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:merging into bnb")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantized(bits: int = 4, scale: float = 0.03, base: nn.Module | None = None, **changes: Any) -> Any:
    model = adapted(
        quantize_model(llama(hidden_size=64, intermediate_size=128) if base is None else base, bits=bits),
        **{"target_modules": TARGETS} | changes,
    )
    randomize(model, scale=scale)
    return model.eval()


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    found = [tokens(8, 24, seed) % 6 for seed in range(count)]  # inputs that have something in common
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in found]


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches()])


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm())


def stored(model: Any) -> list[Tensor]:
    return [layer.base.weight().clone() for layer in model.manager.layers.values()]


@pytest.mark.parametrize(("bits", "better"), [(4, 0.7), (8, 0.9)])
def test_more_of_what_was_learned_is_left_than_by_the_nearest_level(bits: int, better: float) -> None:
    model = quantized(bits)
    wanted, frozen = outputs(model), stored(model)
    model.merge_adapter()
    plainly = distance(outputs(model), wanted)
    model.unmerge_adapter()
    done = merge_calibrated(model, batches())
    assert model.manager.merged == ("default",) and done.names == ("default",)
    assert distance(outputs(model), wanted) < better * plainly
    assert done.lost.keys() == model.manager.layers.keys() and 0 < min(done.lost.values()) < 1
    assert done.token_count == 4 * 8 * 24
    told = r"calibrated on 768 tokens: rounding loses \d+ % of what default adds to .*, \d+ % at worst \(model\.layers"
    assert re.match(told, str(done))
    merged = outputs(model)
    model.unmerge_adapter()
    assert all(map(torch.equal, stored(model), frozen)) and torch.equal(outputs(model), wanted)
    merge_calibrated(model, batches(), "default")
    base = model.merge_and_unload()
    assert not hasattr(base, "peft_config") and torch.equal(outputs(base), merged)


def test_layers_that_do_not_fit_at_once_see_the_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized()
    merge_calibrated(whole, batches())
    monkeypatch.setattr(module, "_GRAM_BYTES", 1)
    apart = quantized()
    merge_calibrated(apart, iter(batches()))
    assert all(map(torch.equal, stored(whole), stored(apart)))


def test_padding_counts_for_nothing() -> None:
    plain, padded = quantized(), quantized()
    merge_calibrated(plain, batches())
    longer = [{name: nn.functional.pad(value, (0, 7)) for name, value in batch.items()} for batch in batches()]
    done = merge_calibrated(padded, longer)
    assert done.token_count == 4 * 8 * 24
    for first, second in zip(stored(plain), stored(padded), strict=True):
        assert float((first != second).float().mean()) < 0.01  # products are summed in another order


def test_other_layers_are_merged_as_ever() -> None:
    model = quantized(target_modules=[*TARGETS, "lm_head"])
    dense = model.manager.layers["lm_head"]
    wanted = dense.base.weight() + dense.get_delta_weight("default")
    done = merge_calibrated(model, batches())
    assert "lm_head" not in done.lost
    assert_close(dense.base.weight(), wanted)


def test_dora_and_layers_in_place_of_conv1d() -> None:
    for model in (quantized(use_dora=True), quantized(base=gpt2(n_embd=64), target_modules=["c_attn"])):
        wanted = outputs(model)
        merge_calibrated(model, batches())
        near = distance(outputs(model), wanted)
        model.unmerge_adapter()
        model.merge_adapter()
        assert near < 0.8 * distance(outputs(model), wanted)


def test_blocks_that_go_over_the_ends_of_rows_have_no_grid() -> None:
    model = quantized(base=gpt2(n_embd=96), target_modules=["c_attn", "c_proj"])
    done = merge_calibrated(model, batches())
    assert {path.rpartition(".")[2] for path in done.lost} == {"c_proj"} and len(done.lost) == 2  # 384 of the MLP's
    with pytest.raises(MergeError, match="blocks of the adapted 4-bit layers extend over several rows"):
        merge_calibrated(quantized(base=gpt2(n_embd=96), target_modules=["c_attn"]), batches())


def test_a_failure_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    model.train()
    wanted, restore, calls = outputs(model.eval()), Bnb4bit.restore, []
    before = stored(model.train())

    def fails(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no place")
        restore(self, *args)

    monkeypatch.setattr(Bnb4bit, "restore", fails)
    with pytest.raises(MemoryError):
        merge_calibrated(model, batches())
    monkeypatch.undo()
    assert model.manager.merged == () and model.training
    assert all(map(torch.equal, stored(model), before)) and torch.equal(outputs(model.eval()), wanted)
    assert not any(layer._forward_pre_hooks for layer in model.manager.layers.values())


def test_what_cannot_be_is_one_line() -> None:
    model = quantized()
    with pytest.raises(ConfigError, match=r"needs rows, and none reached \S+q_proj \(6 layers in all\)"):
        merge_calibrated(model, [])
    with pytest.raises(MergeError, match="no adapted layer is quantized by bitsandbytes"):
        merge_calibrated(adapted(llama()), batches())
    with pytest.raises(MergeError, match="LlamaForCausalLM has no adapters"):
        merge_calibrated(llama(), batches())
    with model.disable_adapter(), pytest.raises(BusyError):
        merge_calibrated(model, batches(), "default")
    merge_calibrated(model, batches())
    with pytest.raises(MergeError, match="merged"):
        merge_calibrated(model, batches())
