"""What the author of a method declares is checked, and an error says what to declare instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.contract import registry
from nbpeft.engine.contract.capabilities import HasFixedTensors, HotSwaps
from nbpeft.errors import ConfigError
from nbpeft.methods import Adapter, MethodConfig, Paddable, register


@dataclass
class OneConfig(MethodConfig):
    one: int = 1


class NoDataclassConfig(MethodConfig):
    two: int = 2


@dataclass
class CopyConfig(MethodConfig):
    copy: bool = False  # type: ignore[assignment]


class One(Adapter):
    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
        columns, rows = kind.features(module)
        return {"one_w": (rows, columns)}

    def delta_weight(self, weight: Any, base: Any) -> Any:
        return self.one_w


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, registered for one test."""
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])
    register(OneConfig, peft_type="ONE", label="One")(One)


@pytest.mark.parametrize(
    ("config_class", "given", "message"),
    [
        (
            OneConfig,
            {"peft_type": "two"},
            "Two: peft_type must be a name in upper case, such as 'MY_METHOD', not 'two'",
        ),
        (OneConfig, {"peft_type": "A B"}, "peft_type must be a name in upper case"),
        (OneConfig, {"peft_type": "LORA"}, "peft_type 'LORA' is that of LoraConfig in nbpeft"),
        (OneConfig, {"default_targets": ["q_proj"]}, r"default_targets must be a function of the model type, not \["),
        (OneConfig, {"applies": True}, "applies must be a function of the config, not True"),
        (OneConfig, {"sample_configs": [{}]}, "sample_configs must map names to the fields of a config"),
        (OneConfig, {"sample_configs": {"a": {"won": 1}}}, "OneConfig has no field 'won'. Did you mean 'one'"),
        (NoDataclassConfig, {}, r"NoDataclassConfig has fields \(two\) but is no dataclass: write @dataclass"),
        (CopyConfig, {}, "CopyConfig cannot have a field 'copy'"),
    ],
)
def test_what_register_is_given_is_checked(config_class: Any, given: dict[str, Any], message: str) -> None:
    before = registry.methods()
    with pytest.raises(ConfigError, match=message):
        register(config_class, **{"peft_type": "TWO", "label": "Two", **given})(One)
    assert registry.methods() == before


def test_a_cell_that_runs_again_registers_again() -> None:
    register(OneConfig, peft_type="ONE", label="One")(One)
    assert [method.label for method in registry.methods()].count("One") == 1


def test_a_cell_that_renames_its_config_registers_again() -> None:
    @dataclass
    class RenamedConfig(MethodConfig):
        one: int = 1

    register(RenamedConfig, peft_type="ONE", label="One")(One)
    assert [method.config_class for method in registry.methods() if method.label == "One"] == [RenamedConfig]


def test_a_config_of_an_author_may_be_unlimited() -> None:
    @dataclass
    class UnlimitedConfig(MethodConfig):
        limit: float = math.inf
        steps: int | None = 3

    register(UnlimitedConfig, peft_type="UNLIMITED", label="Unlimited")(One)
    assert (UnlimitedConfig().limit, UnlimitedConfig(steps=None).steps) == (math.inf, None)
    with pytest.raises(ConfigError, match="must have a value"):
        OneConfig(one=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bases", [(HotSwaps, Paddable), (Paddable, HotSwaps), (Paddable,)])
def test_an_adapter_with_room_has_a_size_and_saves_its_buffers(bases: tuple[type, ...]) -> None:
    @dataclass
    class WideConfig(MethodConfig):
        pass

    class Wide(Adapter, *bases, HasFixedTensors):  # type: ignore[misc]
        rank_axes: ClassVar[dict[str, int]] = {"wide_w": 0}

        @classmethod
        def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
            rows: Any = np.int64(2)  # as numpy.prod returns it
            return {"wide_w": (rows, kind.features(module)[0])}

        def prepare(self, config: Any, site: Any, tensors: Any) -> None:
            self.register_buffer("wide_table", torch.ones(3))

        def forward(self, x: Any, base_output: Any, base: Any) -> Any:
            return base_output * 0

    register(WideConfig, peft_type="WIDE", label="Wide")(Wide)
    model = nbpeft.get_peft_model(nn.Sequential(nn.Linear(2, 3)), WideConfig(target_modules=["0"]))
    nbpeft.prepare_model_for_compiled_hotswap(model, target_rank=5)
    parameter = next(value for key, value in model.named_parameters() if "wide_w" in key)
    saved = nbpeft.get_peft_model_state_dict(model)
    assert (parameter.shape, [tensor.shape for tensor in saved.values()]) == ((5, 2), [(2, 2), (3,)])


def test_an_adapter_with_room_may_compute_its_size() -> None:
    class Sized(One, Paddable):
        @classmethod
        def size_of(cls, shapes: Any) -> int | None:
            return int(shapes["one_w"][1])

    @dataclass
    class SizedConfig(MethodConfig): ...

    register(SizedConfig, peft_type="SIZED", label="Sized")(Sized)


def test_a_config_derived_from_another_method_may_have_its_peft_type() -> None:
    @dataclass
    class DerivedConfig(nbpeft.LoraConfig):
        pass

    register(DerivedConfig, peft_type="LORA", label="Derived")(One)


@pytest.mark.parametrize(
    ("member", "returned", "message"),
    [
        ("parameter_shapes", None, "parameter_shapes must return a tuple of whole numbers for each parameter, by name"),
        ("parameter_shapes", {"one_w": 4}, r"by name, not \{'one_w': 4\}"),
        ("parameter_shapes", {"one_w": (2.0, 3)}, r"not \{'one_w': \(2.0, 3\)\}"),
        ("parameter_shapes", {"one_w": (2, -3)}, r"not \{'one_w': \(2, -3\)\}"),
        ("initial_tensors", None, r"initial_tensors returns none for 'one_w'; expected shape \(3, 2\)"),
        ("initial_tensors", {}, "initial_tensors returns none for 'one_w'"),
        ("initial_tensors", {"one_w": torch.zeros(2, 3)}, r"returns a tensor of shape \(2, 3\) for 'one_w'"),
    ],
)
def test_what_an_adapter_returns_is_checked_before_the_model_changes(
    member: str, returned: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    returning: Callable[..., Any] = lambda *given: returned  # noqa: E731
    monkeypatch.setattr(One, member, returning)
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ConfigError, match=f"^0: One.*{message}"):
        nbpeft.get_peft_model(model, OneConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear


def test_a_member_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(One, "delta_weight")
    model = nbpeft.get_peft_model(nn.Sequential(nn.Linear(2, 3)), OneConfig(target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="One does not implement delta_weight"):
        model(torch.ones(1, 2))


class Other(One): ...


def test_a_method_that_no_config_would_select_is_refused() -> None:
    before = registry.methods()
    with pytest.raises(ConfigError, match="Other: every OneConfig is one of One, so this method is never reached"):
        register(OneConfig, peft_type="ONE", label="Other")(Other)
    assert registry.methods() == before
    larger = register(OneConfig, peft_type="ONE", label="Larger", applies=lambda config: config.one > 5)
    with pytest.raises(ConfigError, match="Larger: every OneConfig is one of One"):
        larger(Other)


def test_methods_of_one_config_class_keep_their_order_when_a_cell_is_run_again() -> None:
    registry._methods[:] = [method for method in registry._methods if method.label != "One"]
    for _ in range(2):
        register(OneConfig, peft_type="ONE", label="Larger", applies=lambda config: config.one > 5)(Other)
        register(OneConfig, peft_type="ONE", label="One")(One)
        assert [registry.method_of(OneConfig(one=one)).label for one in (1, 6)] == ["One", "Larger"]
