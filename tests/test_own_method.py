"""A method that is written with the public names alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.contract import registry
from nbpeft.engine.contract.adapter import configure, keep_settings
from nbpeft.errors import ConfigError, UnknownMethodError
from nbpeft.methods import Adapter, MethodConfig, register
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, tokens


@dataclass
class ShiftConfig(MethodConfig):
    start: float = 0.0


class Shift(Adapter):
    """Adds to each output a multiple of it."""

    from_config: ClassVar[Mapping[str, str]] = {"start": "start"}

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
        return {"shift_s": (1,)}

    @classmethod
    def initial_tensors(cls, config: Any, site: Any) -> dict[str, torch.Tensor]:
        return {"shift_s": site.new((1,)).fill_(config.start)}

    def forward(self, x: torch.Tensor, base_output: torch.Tensor, base: Any) -> torch.Tensor:
        return base_output * self.shift_s

    def delta_weight(self, weight: torch.Tensor, base: Any) -> torch.Tensor:
        return weight * self.shift_s.detach()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])
    fields: dict[str, Any] = {"default_targets": lambda model_type: "all-linear"}
    register(ShiftConfig, peft_type="SHIFT", label="Shift", **fields)(Shift)


def test_a_config_that_is_not_registered_says_so() -> None:
    with pytest.raises(UnknownMethodError, match="ShiftConfig"):
        ShiftConfig()


@pytest.mark.usefixtures("registered")
def test_it_trains_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    config = ShiftConfig(start=0.1)
    assert config.peft_type == "SHIFT" and isinstance(config, nbpeft.PeftConfig)
    model = nbpeft.get_peft_model(llama(), config)
    adapted = {path.rsplit(".", 1)[-1] for path in model.manager.layers}
    assert {"q_proj", "down_proj"} <= adapted and "lm_head" not in adapted
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.manager.parameters("default"))
    model.save_pretrained(str(tmp_path))
    loaded = nbpeft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    wanted = logits(model)
    assert torch.equal(logits(loaded), wanted)
    assert_close(logits(loaded.merge_and_unload()), wanted)


@dataclass
class PlainConfig(MethodConfig):
    pass


class Plain(Adapter):
    """Says nothing but how it changes the weight and the bias."""

    plain_w: torch.Tensor
    plain_b: torch.Tensor

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
        return {"plain_w": kind.weight_shape(module), "plain_b": (kind.features(module)[1],)}

    def delta_weight(self, weight: torch.Tensor, base: Any) -> torch.Tensor:
        return self.plain_w * 2.0

    def delta_bias(self, base: Any) -> torch.Tensor | None:
        return None if base.bias is None else self.plain_b * 3.0


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(6, 4), torch.linspace(-1, 1, 36).view(2, 3, 6)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1), torch.linspace(-1, 1, 200).view(2, 4, 5, 5)),
        (lambda: nn.Embedding(7, 4), torch.arange(6)),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_what_is_added_to_the_output_follows_from_the_weight(layer: Any, x: torch.Tensor) -> None:
    register(PlainConfig, peft_type="PLAIN", label="Plain")(Plain)
    base = nn.Sequential(layer())
    model = nbpeft.get_peft_model(base, PlainConfig(target_modules=["0"]))
    parameters = list(model.manager.parameters("default"))
    before = model(x)
    for parameter in parameters:
        parameter.data.normal_()
    learned = model(x)
    learned.square().sum().backward()
    assert not torch.equal(learned, before) and all(parameter.grad is not None for parameter in parameters[:1])
    merged = model.merge_and_unload()
    assert_close(merged(x), learned)


@pytest.mark.usefixtures("registered")
def test_its_targets_are_checked_as_those_of_other_methods() -> None:
    with pytest.raises(ConfigError, match="target_modules must be"):
        ShiftConfig(target_modules=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="start"):
        ShiftConfig(start="much")  # type: ignore[arg-type]
    assert ShiftConfig(target_modules=["q_proj"]).target_modules == {"q_proj"}


def test_a_keyword_that_register_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"register\(\) takes no filse\. Did you mean 'files'"):
        register(ShiftConfig, peft_type="OTHER", label="Other", filse=None)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("tie_to", "has no effect unless the class derives from nbpeft.engine.contract.capabilities.TiedAdapter"),
        (
            "fixed_tensors",
            "has no effect unless the class derives from nbpeft.engine.contract.capabilities.HasFixedTensors",
        ),
        ("swap_refusal", "has no effect unless the class derives from nbpeft.engine.contract.capabilities.HotSwaps"),
    ],
)
def test_an_override_that_nothing_reads_is_refused(name: str, instead: str) -> None:
    derived = type("Derived", (type("Base", (Shift,), {name: None}),), {})
    with pytest.raises(ConfigError, match=rf"Base\.{name} .*{re.escape(instead)}"):
        register(ShiftConfig, peft_type="OTHER", label="Other")(derived)


def test_a_record_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Other: files must be a FileFormat, not \{'prefix': 'shift_'\}"):
        register(ShiftConfig, peft_type="OTHER", label="Other", files={"prefix": "shift_"})(Shift)


@pytest.mark.usefixtures("registered")
def test_what_it_takes_from_its_config_is_set_swapped_and_shown() -> None:
    model = nbpeft.get_peft_model(llama(), ShiftConfig(start=0.1))
    layer = next(iter(model.manager.layers.values()))
    adapter: Any = layer.adapter("default")
    assert adapter.start == 0.1 and adapter.extra_repr() == "shift_s=(1,), start=0.1"
    with pytest.raises(RuntimeError), model.manager.transaction() as change:
        keep_settings(adapter, change)
        configure(adapter, ShiftConfig(start=0.5), "")
        assert adapter.start == 0.5
        raise RuntimeError
    assert adapter.start == 0.1
    adapter.reset_(layer.base)
    assert adapter.shift_s.item() == 0.0
