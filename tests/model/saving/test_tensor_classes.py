"""Adapters on weights of other classes of tensors, as quantization libraries have them: what trains can be saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.checkpoint import card, fingerprint
from nbpeft.errors import PeftWarning
from tests.closeness import assert_close


class Scaled(Tensor):
    """An int8 weight with a scale that knows a linear layer, ``detach`` and little else, as torchao's tensors do."""

    codes: Tensor
    scale: Tensor

    def __new__(cls, codes: Tensor, scale: Tensor) -> Scaled:
        made: Scaled = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Scaled:
        scale = weight.detach().abs().amax() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{cls.__name__}: {func}")


class Flattened(Scaled):
    """The same for libraries that say which tensors are inside."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None


class Unreadable(Tensor):
    """An ordinary weight whose class refuses to be looked at, except by a linear layer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view:
            raise TypeError("not for you")
        return super().__torch_function__(func, types, args, kwargs or {})


CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Scaled.of,
    "flattened": Flattened.of,
    "unreadable": lambda weight: weight.detach().as_subclass(Unreadable),
}


def a_base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    if kind == "torchao":
        quantization: Any = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(CLASSES[kind](layer.weight), requires_grad=False)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", [*CLASSES, "torchao"])
def test_an_adapter_that_trains_is_saved_whatever_the_class_of_the_base_weights(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(a_base(kind), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(3, 16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(a_base(kind), tmp_path)(x), model(x))
    assert fingerprint(a_base(kind)).shapes == {"16 x 16": 1, "16 x 8": 1}


class Marked(Tensor):
    """A float weight of a class of its own, which can be trained."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)


def test_trained_weights_of_another_class_are_saved(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
        model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Marked))  # type: ignore[arg-type]
        return model

    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(3, 16)
    model(x).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


def test_a_card_that_fails_does_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("no card")

    monkeypatch.setattr(card, "card_text", fails)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(PeftWarning, match=r"README.md is not written: RuntimeError: no card"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "README.md").exists()
