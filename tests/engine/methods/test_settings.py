"""What another config sets on an adapter, as a hot swap does, for every method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from nbpeft.engine.contract.adapter import configure, keep_settings
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.model import get_peft_model

FACTORS = {"alpha", "lora_alpha", "boft_alpha", "scaling", "scale"}
OWN: dict[str, Any] = {"use_bdlora": {"match_strict": False}}
"""Fields in place of those of a sample, which name layers."""


def other_settings(config_class: Any) -> dict[str, float]:
    """Other values of the shares and factors of a config."""
    factors = FACTORS & {field.name for field in dataclasses.fields(config_class)}
    return dict.fromkeys(config_class.shares, 0.25) | dict.fromkeys(factors, 5.0)


def settings(adapter: Any) -> dict[str, Any]:
    """The plain values of an adapter, and the config of what allocates the ranks of all layers."""
    found = {name: value for name, value in vars(adapter).items() if isinstance(value, bool | int | float | str | list)}
    return found | ({"config": adapter.allocator.config.to_dict()} if hasattr(adapter, "allocator") else {})


def layer_with(config: Any) -> tuple[Any, Any]:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    return model.manager, next(iter(model.manager.layers.values())).adapter("default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        pytest.param(method, fields, id=f"{method.label}-{name}")
        for method in methods()
        for name, fields in method.sample_configs.items()
        if not method.transforms_calls and other_settings(method.config_class)
    ],
)
def test_another_config_sets_what_a_new_adapter_has_and_a_failure_undoes_it(method: Method, fields: Any) -> None:
    own = {name: OWN.get(name, value) for name, value in fields.items()}
    config = method.config_class(**own, target_modules=["0"])
    other = config.copy(**other_settings(method.config_class))
    manager, adapter = layer_with(config)
    before = settings(adapter)
    with pytest.raises(RuntimeError, match="in between"), manager.transaction() as change:
        keep_settings(adapter, change)
        configure(adapter, other, "0")
        assert settings(adapter) == settings(layer_with(other)[1]) != before
        raise RuntimeError("in between")
    assert settings(adapter) == before
