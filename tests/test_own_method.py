"""A method that is written with the public names alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.contract import registry
from nbpeft.errors import ConfigError, UnknownMethodError
from nbpeft.methods import Adapter, MethodConfig, register
from tests.tiny_models import llama, logits, tokens


@dataclass
class ShiftConfig(MethodConfig):
    start: float = 0.0


class Shift(Adapter):
    """Adds to each output a multiple of it."""

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
        return {"shift_s": (1,)}

    @classmethod
    def create(cls, config: Any, site: Any, tensors: Any) -> Shift:
        made = cls()
        start = torch.full((1,), config.start, device=site.base.device, dtype=site.dtype)
        made.shift_s = nn.Parameter(tensors["shift_s"] if tensors else start)
        return made

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
    assert torch.allclose(logits(loaded.merge_and_unload()), wanted, atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_its_targets_are_checked_as_those_of_other_methods() -> None:
    with pytest.raises(ConfigError, match="target_modules must be"):
        ShiftConfig(target_modules=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="start"):
        ShiftConfig(start="much")  # type: ignore[arg-type]
    assert ShiftConfig(target_modules=["q_proj"]).target_modules == {"q_proj"}
