"""Questions about a model: answered alike for a base model, a handle and what wraps them, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft.engine.runtime.manager import require_manager
from nbpeft.engine.tree.model_tree import (
    bare_modules,
    bare_names,
    base_model_of,
    is_quantized,
    linear_layers_to_quantize,
    manager_of,
    sharing_embedding,
    unwrapped,
)
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.memory import forecast
from nbpeft.model import LoraConfig, get_peft_model, inject_adapter_in_model, quantize_model
from nbpeft.model.quantization.weight_storage import stored_parts
from tests.tiny_models import llama


class Sharded(nn.Module):
    """Keeps its model as FSDP does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = model


class DeepSpeedEngine(nn.Module):
    """Keeps its model as DeepSpeed does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


class Holder(nn.Module):
    """A model of somebody's own that happens to have a module of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


@pytest.fixture
def distributed(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.DataParallel, Sharded, DeepSpeedEngine])
def test_the_manager_is_found_through_wrappers(wrap: Any) -> None:
    base = llama()
    assert manager_of(wrap(base)) is None and base_model_of(wrap(base)) is base
    handle = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    for model in (base, handle, handle.base_model, wrap(base), wrap(handle), Sharded(wrap(handle))):
        assert manager_of(model) is handle.manager is require_manager(model)
        assert base_model_of(model) is base
    assert unwrapped(Sharded(wrap(handle))) is handle
    assert handle.unload() is base
    dead = manager_of(wrap(handle))
    assert dead is not None and not dead.alive and manager_of(wrap(base)) is None
    with pytest.raises(AdapterError, match="No adapter layers found in the model"):
        require_manager(base)


def test_the_manager_is_found_through_ddp(distributed: None) -> None:
    handle = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert manager_of(nn.parallel.DistributedDataParallel(handle)) is handle.manager


def test_a_module_called_module_is_no_wrapper() -> None:
    model = Holder()
    assert unwrapped(model) is model


def test_names_are_those_of_the_bare_model() -> None:
    base = llama()
    modules, keys = dict(base.named_modules()), list(base.state_dict())
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]))
    assert dict(bare_modules(base)) == modules
    names = bare_names(base)
    assert [name for key in base.state_dict() if (name := names(key)) is not None] == keys


def test_a_shared_module_and_its_children() -> None:
    model = nn.Module()
    model.a = model.b = nn.Sequential(nn.Linear(2, 2))
    assert [path for path, _ in bare_modules(model)] == ["", "a", "a.0", "b"]
    assert [path for path, _ in bare_modules(model, repeat=True)] == ["", "a", "a.0", "b", "b.0"]


def test_the_layers_to_quantize_do_not_depend_on_adapters() -> None:
    base = llama()
    layers = linear_layers_to_quantize(base)
    assert len(layers) == 14 and "lm_head" not in layers and not is_quantized(base)
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["mlp"]))
    assert linear_layers_to_quantize(base) == layers
    without = linear_layers_to_quantize(base, skip=["q_proj"])
    assert without == {path: layer for path, layer in layers.items() if not path.endswith("q_proj")}
    with pytest.raises(ConfigError, match=r"skip_modules names 'q_prj'.*Did you mean 'q_proj'"):
        linear_layers_to_quantize(base, skip=["q_prj"])


def test_the_forecast_counts_the_layers_that_are_quantized() -> None:
    base = llama()
    parts = forecast(base, LoraConfig(target_modules=["q_proj"]), quantization="nf4", dtype="float32").parts
    estimate = next(part for part in parts if part.name == "base weights").byte_count
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    quantized = quantize_model(base)
    assert is_quantized(quantized) and estimate == buffers + sum(part.byte_count for part in stored_parts(quantized))


def test_the_embedding_is_the_first_of_those_that_share_its_weight() -> None:
    model = llama(tie_word_embeddings=True)
    modules = list(reversed(list(model.named_modules())))
    assert list(sharing_embedding(model, modules)) == ["model.embed_tokens", "lm_head"]
    assert sharing_embedding(llama(), llama().named_modules()) == {}


def test_a_layer_in_two_places_has_both_names() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2)
    names = [*model.state_dict()]
    inject_adapter_in_model(LoraConfig(target_modules=["a"]), model)
    bare = bare_names(model)
    assert [name for key in model.state_dict() if (name := bare(key)) is not None] == names
