"""What FSDP2 shards of a quantized base, with a single process."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.training.adapters.shards import can_start_on_the_cpu, make_shardable, note_on_whole
from nbpeft.training.disk.sharded_trainer import prepare_base
from tests.tiny_models import adapted, llama, mixture, tokens

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def settings(dtype: torch.dtype | None = None, ignored: Any = None) -> Any:
    policy = None if dtype is None else MixedPrecisionPolicy(param_dtype=dtype)
    return SimpleNamespace(mixed_precision_policy=policy, ignored_modules=ignored)


def packed(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "quant_state", None) is not None]


BASES = {
    "nf4": lambda: quantize_model(llama()),
    "fp4 in float32": lambda: quantize_model(llama(), quant_type="fp4", double_quant=False, quant_storage="float32"),
    "int8": lambda: quantize_model(llama(), bits=8),
    "experts": lambda: quantize_model(mixture("qwen2_moe")),
}


@pytest.mark.parametrize("name", BASES)
def test_a_sharded_quantized_base_computes_the_same(name: str, mesh: Any) -> None:
    base = BASES[name]()
    model = adapted(base).train()
    expected = model(input_ids=tokens()).logits
    plugin = settings()
    make_shardable(base, plugin)
    ignored = {parameter for part in plugin.ignored_modules or () for parameter in part.parameters()}
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    for _ in range(2):  # the first call gathers into new tensors, the second one into the same
        output = model(input_ids=tokens()).logits
        assert torch.equal(output, expected)
        output.sum().backward()
    kinds = {type(part).__name__ for part in base.parameters() if not isinstance(part, DTensor)}
    assert kinds & {"Params4bit", "Int8Params", "QuantizedMatrices"} == {
        "int8": {"Int8Params"},
        "experts": {"QuantizedMatrices"},
    }.get(name, set())
    assert bool(note_on_whole(base)) == bool(ignored)


@pytest.mark.parametrize("policy", [None, torch.float16, torch.float32])
def test_codes_are_stored_in_a_dtype_that_mixed_precision_does_not_cast(policy: torch.dtype | None) -> None:
    base = quantize_model(llama(), quant_storage="float32")
    before = [layer.weight.detach().view(-1).view(torch.uint8).clone() for layer in packed(base)]
    make_shardable(base, settings(policy))
    dtype = policy or torch.bfloat16
    for layer, codes in zip(packed(base), before, strict=True):
        assert layer.weight.dtype == layer.weight.quant_storage == layer.quant_storage == dtype
        assert torch.equal(layer.weight.detach().view(-1).view(torch.uint8), codes)
        assert layer.quant_state is layer.weight.quant_state


@pytest.mark.parametrize("given", [None, "1", ["1"]])
def test_a_weight_whose_codes_have_an_odd_number_of_bytes_stays_whole(given: Any) -> None:
    model = torch.nn.Sequential(bnb.nn.Linear4bit(3, 6), torch.nn.Linear(6, 2), bnb.nn.Linear4bit(4, 6)).to("cpu")
    note = note_on_whole(model)
    assert note == "9 B of quantized weights cannot be sharded: each process has them whole"
    assert not can_start_on_the_cpu(model) and can_start_on_the_cpu(model[2])
    plugin = settings(ignored=[model[1]] if isinstance(given, list) else given)
    make_shardable(model, plugin)
    assert [model[0].weight.dtype, model[2].weight.dtype] == [torch.uint8, torch.bfloat16]
    ignored = [parameter for part in plugin.ignored_modules for parameter in part.parameters()]
    assert {id(parameter) for parameter in ignored} == {
        id(model[0].weight),
        *(() if given is None else map(id, model[1].parameters())),
    }


def test_the_processes_read_a_base_into_host_memory_if_all_of_it_can_be_moved_by_layers() -> None:
    assert all(can_start_on_the_cpu(base) for base in (llama(), BASES["nf4"](), BASES["fp4 in float32"]()))
    assert not any(can_start_on_the_cpu(BASES[name]()) for name in ("int8", "experts"))
    assert note_on_whole(llama()) == note_on_whole(BASES["nf4"]()) == ""


def test_an_accelerate_without_fsdp2_prepares_nothing_for_it() -> None:
    base = quantize_model(llama())
    prepare_base(SimpleNamespace(model=adapted(base), is_fsdp_enabled=True, accelerator=SimpleNamespace()))
    assert {part.weight.dtype for part in packed(base)} == {torch.uint8}


def test_a_process_that_writes_nothing_gathers_the_shards_with_the_others(
    mesh: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    model, gathered = adapted(llama()), []
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    whole: Any = DTensor.full_tensor
    monkeypatch.setattr(
        DTensor, "full_tensor", lambda tensor, **options: gathered.append(1) or whole(tensor, **options)
    )
    model.save_pretrained(str(tmp_path / "first"), is_main_process=True)
    assert (count := len(gathered)) > 0
    model.save_pretrained(str(tmp_path / "second"), is_main_process=False)
    assert len(gathered) == 2 * count and (tmp_path / "first").is_dir() and not (tmp_path / "second").exists()
