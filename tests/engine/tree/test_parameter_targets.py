"""Which parameters ``target_parameters`` means, and what is refused in one line before anything changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.injection.plan import plan
from nbpeft.errors import ConfigError, LayerKindError, NbpeftError, TargetError
from nbpeft.model import LoraConfig, get_peft_model
from tests.tiny_models import llama, mixture, same_state, state


class Bank(nn.Module):
    """Parameters of one to four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        for dimensions in range(1, 5):
            setattr(self, f"p{dimensions}", nn.Parameter(torch.randn(*range(2, 2 + dimensions))))
        self.integers = nn.Parameter(torch.ones(2, 3, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.p2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank, self.layer = Bank(), nn.Linear(4, 2)
        self.own = nn.Parameter(torch.randn(3, 3))


def config(*names: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": [], "target_parameters": list(names)} | fields)


def test_parameters_are_found_by_the_end_of_their_path_in_model_order() -> None:
    model = mixture("mixtral")
    made = plan(model, config("experts.down_proj", "experts.gate_up_proj", "1.mlp.gate.weight"))
    layers = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    assert set(made.paths) == {
        *(f"{layer}.experts.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")),
        "model.layers.1.mlp.gate.weight",
    }
    assert [path for path in made.paths if "layers.0" in path] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    experts = made.targets[0]
    assert (experts.kind, experts.in_features, experts.out_features) == ("parameter", 32, 96)
    assert experts.shapes == {"lora_A": (8, 32), "lora_B": (96, 8)}
    assert experts.module_path == "model.layers.0.mlp.experts" and experts.parameter == "gate_up_proj"


def test_patterns_of_rank_and_alpha_mean_parameters_too() -> None:
    made = plan(mixture("mixtral"), config("experts.down_proj", rank_pattern={r"0\.mlp\.experts\.down_proj": 5}))
    assert [target.shapes["lora_A"][0] for target in made.targets] == [20, 8]


def test_a_known_architecture_gets_its_usual_modules_beside() -> None:
    made = plan(mixture("mixtral"), config("experts.down_proj", target_modules=None))
    assert {path.rpartition(".")[2] for path in made.paths} == {"q_proj", "v_proj", "down_proj"}
    made = plan(mixture("olmoe"), config("experts.down_proj", target_modules=None))
    assert {path.rpartition(".")[2] for path in made.paths} == {"down_proj"}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"lora_dropout": 0.1}, ConfigError, "does not work with lora_dropout=0.1"),
        ({"lora_bias": True}, ConfigError, "does not work with lora_bias=True"),
        ({"init_lora_weights": "pissa"}, ConfigError, "does not work with init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal"}, ConfigError, "does not work with init_lora_weights='orthogonal'"),
        ({"use_dora": True}, ConfigError, "target_parameters does not work with DoRA"),
        ({"alora_invocation_tokens": [1]}, ConfigError, "target_parameters does not work with aLoRA"),
        ({"target_parameters": "bank.p2"}, ConfigError, "target_parameters must be a list of texts"),
        ({"target_parameters": ["bank.p1"]}, LayerKindError, "bank.p1 has 1 dimensions; only 2 and 3"),
        ({"target_parameters": ["bank.p4"]}, LayerKindError, "bank.p4 has 4 dimensions; only 2 and 3"),
        ({"target_parameters": ["bank.integers"]}, TargetError, "bank.integers is a ParameterView, which cannot"),
        ({"target_parameters": ["own"]}, TargetError, "top-level module is not supported (parameter 'own')"),
        ({"target_parameters": ["bank.q3"]}, TargetError, "target_parameters 'bank.q3' not found in the base model."),
        ({"target_parameters": ["layer.weight"], "target_modules": ["layer"]}, TargetError, "adapted as a layer"),
        ({"modules_to_save": ["bank"]}, TargetError, "bank is trained as a whole (modules_to_save)"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    fields: dict[str, Any], error: type[NbpeftError], message: str
) -> None:
    model = Net()
    before = state(model)
    with pytest.raises(error, match=re.escape(message)) as raised:
        get_peft_model(model, config(**{"target_parameters": ["bank.p2"], **fields}))
    assert "\n" not in str(raised.value) and same_state(state(model), before)


def test_a_name_that_nothing_has_is_told_with_the_nearest_one() -> None:
    model, names = mixture("mixtral"), ["experts.gate_up_proj", "experts.down_prj"]
    with pytest.warns(RuntimeWarning, match=r"'experts\.down_prj' not found .* Did you mean 'experts\.down_proj'"):
        assert len(plan(model, config(*names)).targets) == 2
    with pytest.raises(TargetError, match="not found in the base model"):
        plan(model, config(*names), allow_missing=False)
    with pytest.raises(TargetError, match="The model has no parameters of several matrices"):
        plan(llama(), config("experts.down_proj"))


def test_modules_and_parameters_of_two_adapters_do_not_meet() -> None:
    model = get_peft_model(Net(), config("layer.weight", "bank.p3"))
    with pytest.raises(TargetError, match="layer has parameters that another adapter adapts"):
        model.add_adapter("other", LoraConfig(target_modules=["layer"]))
    with pytest.raises(TargetError, match="already has adapters and cannot be trained as a whole"):
        model.add_adapter("other", LoraConfig(target_modules=[], modules_to_save=["bank"]))
    other = get_peft_model(Net(), LoraConfig(target_modules=["layer"]))
    with pytest.raises(TargetError, match="layer is adapted as a layer by another adapter"):
        other.add_adapter("other", config("layer.weight"))
    other.add_adapter("other", config("bank.p3"))
    assert other.manager.names == ("default", "other")
