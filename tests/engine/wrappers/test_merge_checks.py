"""Merging is right or refused: a merged layer gives what the layer with its adapter beside it gave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from nbpeft import LoraConfig, get_peft_model
from nbpeft.engine.wrappers import merge_checks
from nbpeft.errors import MergeError
from nbpeft.model import PeftModel
from tests.closeness import assert_close, differ

IDS = torch.arange(12).view(2, 6)


def adapted(layer: nn.Module, **changes: Any) -> PeftModel:
    settings = {"r": 2, "target_modules": "0", "init_lora_weights": False}
    return get_peft_model(nn.Sequential(layer), LoraConfig(**settings | changes)).eval()


def batch(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return IDS
    return torch.randn(2, 6, 5) if isinstance(layer, nn.Conv1d) else torch.randn(3, 6)


def check(layer: nn.Module, refused: str | None) -> None:
    """Merges and compares; or sees it refused by a line that names the layer and leaves everything as it was."""
    model, x = adapted(layer), batch(layer)
    before = model(x)
    if refused is None:
        model.merge_adapter()
        assert_close(model(x), before)
        model.unmerge_adapter()
    else:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match=rf"^0: .*{refused}") as error:
                merge()
            assert "\n" not in str(error.value) and len(str(error.value)) < 250
            assert model.manager.merged == () and model.manager.alive
    assert torch.equal(model(x), before)


def linear(**kwargs: Any) -> nn.Linear:
    return nn.Linear(6, 6, **kwargs)


DERIVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(linear()), "WeightNorm"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), "SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), "Orthogonal"),
    "old weight_norm": (lambda: nn.utils.weight_norm(linear()), "weight_norm"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(linear()), "spectral_norm"),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "pruning"),
    "convolution": (lambda: parametrizations.weight_norm(nn.Conv1d(6, 4, 3)), "WeightNorm"),
    "embedding": (lambda: parametrizations.weight_norm(nn.Embedding(12, 4)), "WeightNorm"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("kind", DERIVED)
def test_a_weight_computed_from_others_is_not_merged_into(kind: str) -> None:
    make, name = DERIVED[kind]
    check(make(), name)


@pytest.mark.filterwarnings("ignore:.*parametri:UserWarning")
def test_peft_merges_there_and_loses_the_adapter() -> None:
    config = peft.LoraConfig(r=2, target_modules="0", init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(parametrizations.weight_norm(linear())), config).eval()
    x = torch.randn(3, 6)
    before = model(x)
    model.merge_adapter()
    assert differ(model(x), before)


def test_after_the_parametrization_is_removed_it_can_be_merged() -> None:
    layer = parametrizations.weight_norm(linear())
    model, x = adapted(layer), torch.randn(3, 6)
    before = model(x)
    with pytest.raises(MergeError):
        model.merge_adapter()
    parametrize.remove_parametrizations(layer, "weight")
    merged = model.merge_and_unload()
    assert_close(merged(x), before)


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def test_a_parametrization_that_gives_the_stored_weight_is_merged_into() -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Same())
    check(layer, None)


def test_a_pruned_bias_only_matters_where_the_bias_is_merged_into() -> None:
    check(prune.l1_unstructured(linear(), "bias", 2), None)
    model = adapted(prune.l1_unstructured(linear(), "bias", 2), lora_bias=True)
    with pytest.raises(MergeError, match="pruning"):
        model.merge_adapter()


# Forward hooks


SEEN: list[Any] = []


def looks(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if output.ndim > 1:
        SEEN.append(output.detach())
        return
    with torch.no_grad():
        SEEN.append(output)


def doubles(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def sometimes(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return output * 2 if output.ndim > 1 else None


def perhaps(module: nn.Module, inputs: Any, output: Tensor) -> Any:
    changed = output * 2 if output.ndim > 1 else None
    return changed


def shifts(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + 1,)


class Doubling:
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 2

    def look(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        SEEN.append(output)


def hooked(hook: Any, *, before: bool = False) -> nn.Module:
    layer = linear()
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    return layer


@pytest.mark.parametrize(
    "hook",
    [doubles, sometimes, perhaps, functools.partial(doubles), Doubling()],
    ids=["always", "sometimes", "perhaps", "partial", "object"],
)
def test_a_hook_that_may_change_the_output_is_named(hook: Any) -> None:
    check(hooked(hook), "doubles|sometimes|perhaps|Doubling")


def test_so_is_one_that_changes_the_input() -> None:
    check(hooked(shifts, before=True), "shifts")


@pytest.mark.parametrize(
    "hook", [looks, functools.partial(looks), Doubling().look], ids=["function", "partial", "method"]
)
def test_a_hook_that_only_looks_is_left_alone_and_not_called_by_merging(hook: Any) -> None:
    check(hooked(hook), None)
    model = adapted(hooked(hook))
    SEEN.clear()
    model.merge_adapter()
    assert not SEEN


def test_hooks_on_the_adapted_layer_see_the_same_output_either_way() -> None:
    model, x = adapted(linear()), torch.randn(3, 6)
    model.base_model.model[0].register_forward_hook(doubles)
    before = model(x)
    model.merge_adapter()
    assert_close(model(x), before)


def test_hooks_that_only_place_tensors_are_no_reason() -> None:
    layer = linear()
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    check(layer, None)


# Classes with a forward of their own


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Bounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-5, 5)


class Squashed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.tanh(self.weight), self.bias)


class Spelt(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(input, 0.5, self.training) @ self.weight.T + self.bias


class Noisy(Spelt):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.rand(())


class Choosy(nn.Linear):
    def forward(self, input: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        return super().forward(input) * factor


class Computed(nn.Module):
    """Linear to look at, but its weight is made anew each time."""

    in_features = out_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(6, 6))

    @property
    def weight(self) -> Tensor:
        return self.inner * 2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Showing(Computed):
    """Shows the parameter that it has under another name."""

    @property
    def weight(self) -> Tensor:
        return self.inner


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Folded(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("kind", [Halved, Bounded, Squashed, Noisy])
def test_a_linear_layer_with_a_map_of_its_own_is_refused(kind: type[nn.Module]) -> None:
    layer: Any = kind(6, 6)
    model = adapted(layer)
    with pytest.raises(MergeError, match=f"^0: the forward of {kind.__name__} does not compute W x \\+ b"):
        model.merge_adapter()


def test_so_is_one_that_cannot_be_tried() -> None:
    model = adapted(Choosy(6, 6))
    with pytest.raises(MergeError, match="Choosy"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("layer", "refused"),
    [(Scaled(12, 4), "Scaled"), (Folded(6, 4, 3), "Folded"), (nn.Embedding(12, 4, max_norm=0.5), "max_norm")],
    ids=str,
)
def test_so_are_other_kinds(layer: nn.Module, refused: str) -> None:
    check(layer, refused)


def test_an_equivalent_forward_is_tried_once_without_traces() -> None:
    layer = Spelt(6, 6).train()
    model = adapted(layer).train()
    state = torch.get_rng_state()
    model.merge_adapter()
    assert torch.equal(torch.get_rng_state(), state) and layer.training
    check(Spelt(6, 6), None)


@pytest.mark.parametrize("kind", [Computed, Showing])
def test_a_weight_that_is_a_property_counts_by_what_it_gives(kind: type[Computed]) -> None:
    check(kind(), "Computed" if kind is Computed else None)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_forward_put_over_a_layer_counts_by_what_it_gives(factor: int) -> None:
    layer: Any = linear()
    own = layer.forward
    layer.forward = functools.wraps(own)(lambda x: own(x) * factor)
    check(layer, None if factor == 1 else "Linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "make", [linear, lambda: Conv1D(4, 6), lambda: nn.Conv2d(3, 4, 2, dilation=2), lambda: Spelt(6, 6)]
)
def test_ordinary_layers_are_merged_in_every_dtype(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    adapted(make().to(dtype)).merge_adapter()


def test_a_layer_without_data_is_refused() -> None:
    with torch.device("meta"):
        layer = linear()
    model = adapted(layer)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"^0: .*meta device"):
            merge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaling_beyond_the_range_of_a_dtype_is_not_finite(dtype: torch.dtype) -> None:
    layer = linear().to(dtype)
    model, before = adapted(layer), layer.weight.detach().clone()
    model.base_model.model[0].scaling["default"] = 1e308
    with pytest.raises(MergeError, match=r"NaNs detected .* seems to be broken at 0"):
        model.merge_adapter(safe_merge=True)
    assert model.manager.merged == () and torch.equal(layer.weight, before)
    model.base_model.model[0].unscale_layer()
    model.manager.set_scale("default", 1e308)
    model.merge_adapter()
    assert not torch.isfinite(layer.weight).all()  # as the output beside it was
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_a_safe_merge_counts_the_scale_of_an_adapter() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.manager.set_scale("default", 1e308)
    before = model.get_base_model()[0].base_layer.weight.clone()
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model.get_base_model()[0].base_layer.weight, before)


def test_a_safe_merge_for_good_looks_at_what_is_merged_already() -> None:
    model = adapted(linear())
    with torch.no_grad():
        model.manager.parameters("default")[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match="is not finite"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert model.manager.merged == ("default",)


def test_merging_a_model_completes_what_was_merged_on_one_layer() -> None:
    x = torch.randn(3, 6)

    def merged_on_one() -> tuple[PeftModel, Tensor]:
        config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(linear(), linear()), config)
        before = model(x)
        next(iter(model.manager.layers.values())).merge()
        return model, before

    model, before = merged_on_one()
    base = model.merge_and_unload()
    assert_close(base(x), before)
    model, before = merged_on_one()
    model.merge_adapter()
    assert all(layer.merged for layer in model.manager.layers.values())
    model.unmerge_adapter()
    assert torch.equal(model(x), before)


class Multiplied(nn.Linear):
    """Computes a multiple of what its weight says."""

    factor: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_unknown_forward_is_compared_by_the_size_of_its_output(size: float) -> None:
    for factor, refused in ((1.0, None), (1.0 + 2e-7, None), (1.5, "does not compute W x")):
        layer = Multiplied(6, 6, bias=False)
        layer.factor = factor
        with torch.no_grad():
            layer.weight.mul_(size)
        model = adapted(layer)
        if refused is None:
            model.merge_adapter()
        else:
            with pytest.raises(MergeError, match=refused):
                model.merge_adapter()


@pytest.mark.parametrize(("value", "nothing"), [(None, True), (2, False)])
def test_what_a_hook_returns_is_read_from_the_bytecode_of_later_pythons(
    value: Any, nothing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on one instruction returns a constant."""
    step = SimpleNamespace(opname="RETURN_CONST", argval=value)
    monkeypatch.setattr(merge_checks, "dis", SimpleNamespace(get_instructions=lambda function: [step]))
    assert merge_checks._returns_nothing(looks) is nothing
