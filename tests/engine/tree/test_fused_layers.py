"""Experts and routers by the names they had as linear layers, beside PEFT: configs, and files of then."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nbpeft
from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.errors import ConfigError, TargetError
from tests.closeness import assert_close, differ, is_close
from tests.former_adapters import LAYERS, by_hand, file_of_then
from tests.tiny_models import adapted, logits, mixture, same_state, state, tokens

ALONG = "includes the experts"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{ALONG}", "ignore::UserWarning:peft")
JOINED = ("mixtral", "qwen3_moe", "olmoe")
"""Mixtures that PEFT 0.21 knows by their former names, too."""


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if ".lora_" in name}


def both(base: nn.Module, **fields: Any) -> tuple[Any, Any]:
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **fields}
    made = []
    for library in (peft, nbpeft):
        torch.manual_seed(7)
        made.append(library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**settings)).eval())
    return made[0], made[1]


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["o_proj", "gate_proj", "up_proj", "down_proj"], ["down_proj"], r".*\.(k_proj|gate_proj|up_proj)"],
    ids=str,
)
@pytest.mark.parametrize("model_type", JOINED)
def test_targets_of_then_are_the_parameters_that_peft_takes(model_type: str, targets: Any) -> None:
    if model_type == "mixtral" and not isinstance(targets, str):
        targets = [{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(name, name) for name in targets]
    elif model_type == "mixtral":
        targets = targets.replace("gate_proj|up_proj", "w1|w3")
    theirs, ours = both(mixture(model_type), target_modules=targets)
    assert shapes(ours) == shapes(theirs)
    nbpeft.set_peft_model_state_dict(ours, dict(peft.get_peft_model_state_dict(theirs)))
    assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_all_linear_takes_experts_and_the_layers_that_are_still_there(model_type: str, tmp_path: Path) -> None:
    theirs, ours = both(mixture(model_type), target_modules="all-linear")
    wanted, found = shapes(theirs), shapes(ours)
    assert wanted == {name: found.get(name) for name in wanted}
    # PEFT takes the experts of one and leaves out all other layers of their names, and of the other the reverse.
    assert any("shared_expert" in name for name in found) and any(".experts." in name for name in found)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture(model_type), tmp_path).eval()
    assert shapes(again) == found and torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"up_proj": 4}}], ids=str
)
def test_names_that_layers_still_have_mean_these_as_in_files_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs, _ = both(mixture("qwen2_moe"), target_modules=["gate_proj", "up_proj", "down_proj"], **fields)
    assert not any(".experts." in name for name in shapes(theirs))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(mixture("qwen2_moe"), tmp_path).eval()
    assert_close(logits(ours), logits(theirs))
    assert not any(".experts." in path for path in ours.manager.layers)
    alone = get_peft_model(mixture("deepseek_v3"), LoraConfig(r=2, target_modules=["q_a_proj", "up_proj"], **fields))
    assert {path.rpartition(".")[2] for path in alone.manager.layers} == {"q_a_proj", "up_proj"}


def test_excluded_experts_are_left_out_and_nothing_else_is_said(tmp_path: Path) -> None:
    for excluded in (["experts", "gate"], ["gate_proj", "gate"], r".*\.(experts|gate)(\..*)?"):
        config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = get_peft_model(mixture("deepseek_v3"), config)
        said = " ".join(str(one.message) for one in told)
        assert "no modules were excluded" not in said
        assert (ALONG in said) == any(path.endswith(".experts.down_proj") for path in model.manager.layers)
        assert not any(path.endswith("gate_up_proj") for path in model.manager.layers)
        move(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(mixture("deepseek_v3"), tmp_path)
        assert again.manager.layers.keys() == model.manager.layers.keys()
        assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*share one weight")
        config = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"], exclude_modules=["w2"])
        model = get_peft_model(mixture("mixtral"), config)
    assert {path.rpartition(".")[2] for path in model.manager.layers} == {"q_proj", "gate_up_proj"}


@pytest.mark.filterwarnings("ignore:.*are not adapted unless target_parameters")
def test_a_router_that_is_trained_as_a_whole_is_no_target() -> None:
    for copied in ("gate", "mlp"):
        model = get_peft_model(
            mixture("mixtral"), LoraConfig(r=2, target_modules="all-linear", modules_to_save=[copied])
        )
        assert f"model.layers.0.mlp{'.gate' if copied == 'gate' else ''}" in model.manager.copies
        assert not any("gate.weight" in path for path in model.manager.layers)


def test_layers_by_their_full_former_paths() -> None:
    count = 4
    whole = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2" for layer in (0, 1) for expert in range(count)
    ]
    for targets in (whole, ["block_sparse_moe.gate", *whole], ["block_sparse_moe.gate"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules=targets))
        assert {path.rpartition("mlp.")[2] for path in model.manager.layers} == {
            *(["experts.down_proj"] if targets[-1].endswith("w2") else []),
            *(["gate.weight"] if targets[0].endswith("gate") else []),
        }
    with pytest.raises(TargetError, match="names 1 of 4 experts: they are one parameter now"):
        get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules=["experts.3.w2"]))


def test_parameters_that_are_named_keep_the_rank_of_the_config() -> None:
    named = ["layers.0.mlp.experts.gate_up_proj"]
    model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules=["w1", "w3"], target_parameters=named))
    ranks = {path: layer.adapter("default").rank for path, layer in model.manager.layers.items()}
    assert ranks == {f"model.layers.{layer}.mlp.experts.gate_up_proj": rank for layer, rank in ((0, 2), (1, 4))}


class Experts(nn.Module):
    """Experts as transformers 4 had them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in ("w1", "w2")}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (expert["w2"](expert["w1"](x)) for expert in self.experts)  # type: ignore[operator]
        output: Tensor = first + second
        return output


def test_a_model_whose_experts_are_layers_still_keeps_them(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        whole = nn.Sequential(Experts())
        whole.config = mixture("mixtral").config
        return whole

    model = get_peft_model(made(), LoraConfig(r=2, target_modules=["w1", "w2"], init_lora_weights=False))
    assert len(model.manager.layers) == 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(made(), tmp_path)
    assert torch.equal(again(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert not nbpeft.set_peft_model_state_dict(again, nbpeft.get_peft_model_state_dict(model)).missing_keys


@pytest.mark.parametrize("model_type", ["mixtral"])
def test_a_file_of_then_is_swapped_in(model_type: str, tmp_path: Path) -> None:
    file_of_then(tmp_path / "one", model_type)
    model = PeftModel.from_pretrained(mixture(model_type), tmp_path / "one").eval()
    before = logits(model)
    nbpeft.hotswap_adapter(model, str(tmp_path / "one"), "default")
    assert torch.equal(logits(model), before)


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=generator, std=0.1)


def test_all_linear_says_what_the_experts_add() -> None:
    with pytest.warns(UserWarning, match=rf"{ALONG}, 7,776 of the adapter's 9,348 parameters \(83%\)"):
        model = get_peft_model(mixture("qwen3_moe"), LoraConfig(r=3, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == 9348
    named = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(mixture("qwen3_moe"), LoraConfig(r=3, target_modules="all-linear", target_parameters=named))
    experts = model.manager.layers["model.layers.0.mlp.experts.gate_up_proj"].adapter("default")
    assert experts.rank == 3, "named by themselves they have the rank that the config has"


def test_all_linear_leaves_experts_that_it_cannot_adapt_and_says_so() -> None:
    with pytest.warns(UserWarning, match="the experts .* are not adapted"):
        model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    assert not any("mlp" in path for path in model.manager.layers)
    with pytest.warns(UserWarning, match=r"does not adapt gate_up_proj: .* does not work with lora_bias=True"):
        model = get_peft_model(mixture("mixtral"), LoraConfig(r=2, target_modules="all-linear", lora_bias=True))
    assert not any("mlp" in path for path in model.manager.layers)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["w1", "q_proj"]}, TargetError, "names w1 of the experts and not w3: they are fused into"),
        (
            {"target_modules": ["w1", "w3"], "rank_pattern": {"w1": 2}},
            ConfigError,
            "'w1' names a part of .*gate_up_proj",
        ),
        ({"target_modules": ["w2"], "use_dora": True}, ConfigError, "target_parameters does not work with DoRA"),
    ],
    ids=str,
)
def test_what_cannot_be_taken_over_is_refused_in_one_line(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mixture("mixtral")
    before = state(model)
    with pytest.raises(error, match=message) as raised:
        get_peft_model(model, LoraConfig(r=2, **fields))
    assert "\n" not in str(raised.value) and same_state(state(model), before)


def test_only_the_experts_of_chosen_blocks_are_named_by_their_paths() -> None:
    config = LoraConfig(r=2, target_modules=["w2", "w1", "w3"], layers_to_transform=[1])
    model = get_peft_model(mixture("mixtral"), config)
    assert set(model.manager.layers) == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert model.manager.layers["model.layers.1.mlp.experts.gate_up_proj"].adapter("default").rank == 4


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("model_type", LAYERS)
def test_files_of_transformers_4_act_as_they_did(model_type: str, use_rslora: bool, tmp_path: Path) -> None:
    tensors = file_of_then(tmp_path / "then", model_type, use_rslora=use_rslora)
    ours = PeftModel.from_pretrained(mixture(model_type), tmp_path / "then").eval()
    wanted = logits(by_hand(model_type, tensors, 6 / (2**0.5 if use_rslora else 2)))
    assert differ(wanted, logits(mixture(model_type)))
    assert_close(logits(ours), wanted)
    theirs = peft.PeftModel.from_pretrained(mixture(model_type), tmp_path / "then").eval()
    # PEFT scales the joined layers by alpha / sqrt(2 r) times two there, which is sqrt(2) times what was trained.
    assert is_close(logits(theirs), wanted) is not use_rslora
    ours.save_pretrained(tmp_path / "now")
    again = peft.PeftModel.from_pretrained(mixture(model_type), tmp_path / "now").eval()
    assert_close(logits(again), wanted)
    assert_close(logits(ours.merge_and_unload()), wanted)


def test_a_file_that_lacks_an_expert_is_told_and_not_joined(tmp_path: Path) -> None:
    tensors = file_of_then(tmp_path, "qwen3_moe")
    missing = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
    part = {key: tensor for key, tensor in tensors.items() if key != missing}
    save_file(part, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"missing.*layers\.1\.mlp\.experts|layers\.1\.mlp\.experts.*missing"):
        model = PeftModel.from_pretrained(mixture("qwen3_moe"), tmp_path)
    joined = model.manager.weights("default").adapters["model.layers.0.mlp.experts.gate_up_proj"]["lora_A"]
    assert torch.equal(joined[:2], tensors[missing.replace("layers.1", "layers.0").replace("2.up_proj", "0.gate_proj")])


def test_models_without_experts_are_asked_nothing() -> None:
    model = adapted()
    assert nbpeft.get_peft_model_state_dict(model)
    assert logits(model, tokens()).isfinite().all()
