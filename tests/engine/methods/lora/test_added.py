"""Several active LoRAs are added to a layer's output as one product of their joined factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.methods.lora.lora import LoRA
from nbpeft.model import LoraConfig, get_peft_model
from tests.closeness import assert_close

NAMES = ("a", "b", "c")


def adapted(layer: Callable[[], nn.Module], **given: Any) -> Any:
    """A layer with three adapters of the ranks 2, 3 and 4, all active."""
    torch.manual_seed(0)
    model: Any = None
    for rank, name in enumerate(NAMES, 2):
        fields: dict[str, Any] = {"init_lora_weights": False, "lora_alpha": 2 * rank, **given}
        config = LoraConfig(r=rank, target_modules=["0"], **fields)
        if model is None:
            model = get_peft_model(nn.Sequential(layer()), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter([*NAMES])
    return model


def summed(model: Any, x: Tensor) -> Tensor:
    """The output of the layer, with the adapters' deltas computed one after the other."""
    layer = model.base_model.model[0]
    output = layer.base_layer(x)
    total = sum(layer.adapters[name](x, output, layer.own_base()) for name in NAMES)
    summed: Tensor = (output + total).to(output.dtype)
    return summed


class Counted(TorchFunctionMode):
    """Counts the matrix products of linear layers."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


def passes(model: Any, x: Tensor) -> bool:
    """Whether the layer adds its adapters in one pass: its own product and two thin ones."""
    with Counted() as counted:
        model(x)
    return counted.count <= 3


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alphas", ["alike", "apart"])
@pytest.mark.parametrize("tokens", [3, 9000], ids=["small", "large"])
def test_they_are_their_sum_with_its_gradients(
    layer: Callable[[], nn.Module], dtype: torch.dtype, alphas: str, tokens: int
) -> None:
    model = adapted(lambda: layer().to(dtype), **({} if alphas == "alike" else {"lora_alpha": 6}))
    x = torch.randn(tokens, 6, dtype=dtype, requires_grad=True)
    parameters = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    assert len(parameters) == 7
    upstream, found = torch.randn(tokens, 5, dtype=dtype), []
    for output in (model(x), summed(model, x)):
        found.append((output.detach(), *torch.autograd.grad(output, parameters, upstream)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, terms=tokens)


def test_they_are_computed_in_one_pass_and_with_the_scale_of_each() -> None:
    model, x = adapted(lambda: nn.Linear(6, 5)), torch.randn(3, 6)
    assert passes(model, x)
    layer = model.base_model.model[0]
    before = model(x)
    layer.adapters["b"].scaling = 0.5
    assert passes(model, x)
    assert_close(model(x), summed(model, x))
    assert not torch.equal(model(x), before)


def per_adapter(model: Any, scalings: tuple[float, ...], x: Tensor) -> Tensor:
    """The sum of the deltas in float64."""
    adapters = [model.base_model.model[0].adapters[name] for name in NAMES]
    wide = [[factor.double() for factor in adapter.own_factors] for adapter in adapters]
    parts = [x.double() @ A.T @ B.T * scaling for (A, B), scaling in zip(wide, scalings, strict=True)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("scalings", [(1e-4, 2e-4, 5e-5), (1.0, 1e-4, 1e-3), (0.5, 300.0, 1e-4), (1e-4,) * 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_small_and_large_scalings_keep_their_digits_in_float16(scalings: tuple[float, ...], autocast: bool) -> None:
    """As close to float64 as PEFT's products of one adapter after the other."""
    model = adapted(lambda: nn.Linear(64, 48, bias=False))
    layer = model.base_model.model[0]
    nn.init.zeros_(layer.base_layer.weight)
    for name, scaling in zip(NAMES, scalings, strict=True):
        layer.adapters[name].scaling = scaling
        layer.adapters[name].own_factors[1].data.mul_(0.1)
    model.to(torch.float32 if autocast else torch.float16)
    x = 30 * torch.randn(200, 64, dtype=torch.float32 if autocast else torch.float16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        ours = model(x).double()
        peft = torch.zeros(200, 48, dtype=torch.float16)
        for name, scaling in zip(NAMES, scalings, strict=True):
            lora_A, lora_B = (factor.half() for factor in layer.adapters[name].own_factors)
            peft = peft + x.half() @ lora_A.T @ lora_B.T * scaling
    exact = per_adapter(model, scalings, x)
    assert (ours - exact).norm() <= 1.5 * (peft.double() - exact).norm()


@pytest.mark.parametrize("reason", ["dropout", "hook", "bias", "dtypes", "another method"])
def test_others_are_added_one_after_the_other(reason: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "dropout": {"lora_dropout": 0.5}, "bias": {"lora_bias": True}, "another method": {"use_dora": True},
    }  # fmt: skip
    model, x = adapted(lambda: nn.Linear(6, 5), **fields.get(reason, {})), torch.randn(3, 6)
    layer, calls = model.base_model.model[0], list[Any]()
    if reason == "hook":
        layer.lora_A["b"].register_forward_hook(lambda *_: calls.append(1))
    if reason == "dtypes":
        layer.adapters["b"].to(torch.bfloat16)
    model.train(reason == "dropout")
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    assert_close(output, summed(model, x))
    assert bool(calls) == (reason == "hook")
    if reason == "dropout":
        assert not passes(model, x) and passes(model.eval(), x)


def test_compiled_code_and_transforms_see_each_product() -> None:
    model, x = adapted(lambda: nn.Linear(6, 5)), torch.randn(3, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRA, "own_factors", property(lambda self: pytest.fail("joined")), raising=True)
        patch.setattr(LoRA, "active_factors", LoRA.trained_factors)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert_close(compiled, model(x))
    batched = torch.func.vmap(model)(x[:, None])
    assert_close(batched[:, 0], model(x))
