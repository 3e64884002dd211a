"""CorDA and LoRA-GA: adapters that start in a part of the weights that data chose."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import corda as peft_corda
from peft.tuners.lora import loraga as peft_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nbpeft
from nbpeft import CordaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_corda, preprocess_loraga
from nbpeft.engine.methods.lora.initialization.decompositions import randomized_svd
from nbpeft.errors import CheckpointError, ConfigError
from nbpeft.model import get_peft_model_state_dict
from tests.closeness import assert_approximates, assert_close, is_close
from tests.tiny_models import same_state, state

TARGETS = ["one", "two"]
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # PEFT's


class Net(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Linear(24, 32)
        self.two: nn.Module = Conv1D(16, 32) if turned else nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x)))
        return out


def data() -> Tensor:
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(5))


def config(init: str, library: Any = nbpeft, **more: Any) -> Any:
    field, name = ("corda_config", "CordaConfig") if init == "corda" else ("lora_ga_config", "LoraGAConfig")
    own = {key: more.pop(key) for key in list(more) if key in getattr(nbpeft, name).__dataclass_fields__}
    made = getattr(library if library is nbpeft else peft.tuners.lora.config, name)(**own)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, field: made, **more}
    return library.LoraConfig(init_lora_weights=init, **settings)


def prepare(model: nn.Module, given: Any, *, theirs: bool = False) -> None:
    x = data()
    if given.init_lora_weights == "corda":
        (peft_corda.preprocess_corda if theirs else preprocess_corda)(model, given, run_model=lambda: model(x))
        return

    def step() -> None:
        for part in x.split(32):
            model(part).square().mean().backward()

    (peft_loraga.preprocess_loraga if theirs else preprocess_loraga)(model, given, step)


def started(init: str, base: nn.Module | None = None, **more: Any) -> PeftModel:
    base, given = Net() if base is None else base, config(init, **more)
    prepare(base, given)
    return get_peft_model(base, given)


def train(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("corda", {}),
    ("corda", {"corda_method": "kpm", "rank_pattern": {"one": 6}}),
    ("corda", {"use_rslora": True, "alpha_pattern": {"two": 3}}),
    *(("lora_ga", {"direction": direction}) for direction in ("ArBr", "A2rBr", "ArB2r", "random")),
    *(("lora_ga", {"scale": scale}) for scale in ("weight_svd", "gd_scale", "unit")),
]


@pytest.mark.parametrize(("init", "more"), CASES)
def test_factors_and_outputs_are_those_of_peft(
    init: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT draws for its decompositions what comes next, and so has other signs each time."""

    def decomposed(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = randomized_svd(matrix, q, niter)
        return left, values, right.T

    monkeypatch.setattr(torch, "svd_lowrank", decomposed)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    theirs: Any = Net()
    given = config(init, peft, **more)
    prepare(theirs, given, theirs=True)
    theirs = peft.get_peft_model(theirs, given)
    base = Net()
    given = config(init, **more)
    prepare(base, given)
    ours = get_peft_model(base, given)
    own, expected = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert own.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(own[key], value, message=key)
    assert_close(ours(data()), Net()(data()))
    for model in (ours, theirs):
        train(model)
    assert_close(ours(data()), theirs(data()))
    with ours.disable_adapter():
        assert torch.equal(ours(data()), Net()(data()))
    assert same_state(state(ours.unload()), state(Net()))
    assert not any(hasattr(layer, "eigens") or hasattr(layer, "_peft_loraga_grad") for layer in base.children())


def test_the_directions_of_a_gradient_are_those_that_peft_draws() -> None:
    models = []
    for library in (nbpeft, peft):
        base, given = Net(), config("lora_ga", library)
        prepare(base, given, theirs=library is peft)
        models.append(library.get_peft_model(base, given))
    own, expected = get_peft_model_state_dict(models[0]), peft.get_peft_model_state_dict(models[1])
    for key, value in expected.items():
        assert_approximates(own[key].abs(), value.abs(), 0.05, message=key)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"one": 2}, "alpha_pattern": {"two": 3}}])
def test_it_is_saved_as_plain_lora_for_any_copy_of_the_base(init: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = started(init, **more)
    train(model)
    expected = model(data())
    model.save_pretrained(tmp_path)
    saved: Any = LoraConfig.from_pretrained(str(tmp_path))
    assert (saved.r, saved.init_lora_weights) == (8, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(Net(), tmp_path)
    assert_close(again(data()), expected)
    assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path)(data()), expected)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore:.*specified but will be ignored")
def test_set_to_true_by_hand_it_is_saved_for_the_rest_of_the_base(init: str, tmp_path: Path) -> None:
    model = started(init)
    train(model)
    expected = model(data())
    model.peft_config["default"].init_lora_weights = True  # as PEFT's tutorials do before they save
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 4  # type: ignore[attr-defined]
    residual = model.unload()
    for library in (nbpeft, peft):
        again = library.PeftModel.from_pretrained(copy.deepcopy(residual), tmp_path)
        assert_close(again(data()), expected)
    with pytest.warns(UserWarning, match="a base model changed by its init"):
        PeftModel.from_pretrained(Net(), tmp_path)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_it_is_merged_copied_and_put_back_with_its_start(init: str) -> None:
    model = started(init, base=Net(turned=True))
    train(model)
    expected = model(data())
    assert torch.equal(copy.deepcopy(model)(data()), expected)
    model.merge_adapter()
    assert_close(model(data()), expected)
    model.unmerge_adapter()
    manager = model.manager
    taken, weights = manager.configs["default"].copy(), manager.weights("default")
    manager.remove("default")
    manager.add("default", taken, weights)
    assert_close(model(data()), expected)


def test_other_layers_of_a_lora_ga_adapter_start_as_usual(tmp_path: Path) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(64, 24)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.emb(torch.arange(len(x))))

    model = started("lora_ga", base=Mixed(), target_modules=[*TARGETS, "emb"])
    train(model)
    expected = model(data())
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(Mixed(), tmp_path)(data()), expected)


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_files_of_what_data_gave_are_those_of_peft(library: Any, tmp_path: Path) -> None:
    files = {"cache_file": str(tmp_path / "c" / "cache.pt"), "covariance_file": str(tmp_path / "c" / "cov.pt")}
    base, given = Net(), config("corda", library, **files)
    prepare(base, given, theirs=library is peft)
    expected = get_peft_model_state_dict(started("corda"))
    for name, place in files.items():
        again = Net()
        other = config("corda", **{name: place})
        preprocess_corda(again, other)
        found = get_peft_model_state_dict(get_peft_model(again, other))
        assert all(is_close(found[key], value) for key, value in expected.items()), name
    base, given, cache = Net(), config("lora_ga", library), str(tmp_path / "g" / "gradients.pt")
    run = peft_loraga.preprocess_loraga if library is peft else preprocess_loraga
    run(base, given, lambda: base(data()).square().mean().backward(), cache_file=cache)
    again = Net()
    preprocess_loraga(again, config("lora_ga"), pytest.fail, cache_file=cache)
    assert_close(again.one._peft_loraga_grad, base.one._peft_loraga_grad)  # type: ignore[arg-type]
    wider = config("lora_ga", target_modules=["one"])
    with pytest.raises(CheckpointError, match=r"was made for another model or config: it lacks 'one\.eigens"):
        preprocess_corda(again, config("corda", cache_file=cache, target_modules=["one"]))
    preprocess_loraga(Net(), wider, pytest.fail, cache_file=cache)


def test_a_model_is_as_it_was_after_its_gradients_were_taken() -> None:
    base = Net().eval()
    base.one.weight.requires_grad_(False)
    base.two.weight.grad = torch.ones_like(base.two.weight)  # type: ignore[arg-type]
    before = state(base)
    prepare(base, config("lora_ga"))
    assert same_state(before, state(base)) and not base.training
    assert not base.one.weight.requires_grad and base.one.bias.requires_grad and base.one.weight.grad is None
    assert torch.equal(base.two.weight.grad, torch.ones_like(base.two.weight))  # type: ignore[arg-type]
    assert not any(layer._backward_hooks or layer._forward_pre_hooks for layer in base.children())


def test_batches_of_any_size_give_the_covariance_of_their_rows() -> None:
    flat, base, given = Net(), Net(), config("corda", prune_temporary_fields=False)
    preprocess_corda(flat, given, run_model=lambda: flat(data()))
    preprocess_corda(base, given, run_model=lambda: base(data().view(4, 16, 24)))
    assert_close(base.one.covariance_matrix, flat.one.covariance_matrix)  # type: ignore[arg-type]
    assert base.one.sample_count == 1


@pytest.mark.parametrize(
    ("init", "more", "message"),
    [
        ("corda", {"r": 5}, r"one: preprocess_corda ran for rank 4 and \(32, 24\), this is rank 5"),
        ("lora_ga", {"r": 13}, "takes a rank of at most 12 there, not 13"),
        ("corda", {"target_modules": [*TARGETS, "emb"]}, "works on linear layers only, not on Embedding"),
    ],
)
def test_what_does_not_fit_is_refused(init: str, more: dict[str, Any], message: str) -> None:
    base = Net()
    base.emb = nn.Embedding(4, 4)
    prepare(base, config(init))
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, config(init, **more))
    assert get_peft_model(base, config(init))  # what was found is still there


def test_what_is_missing_is_said() -> None:
    for init, function in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        with pytest.raises(ConfigError, match=f"init_lora_weights={init!r} needs data: call {function} first"):
            get_peft_model(Net(), config(init))
        with pytest.raises(ConfigError, match="cannot be used with use_dora=True"):
            config(init, use_dora=True)
    with pytest.raises(ConfigError, match="run_model must be specified"):
        preprocess_corda(Net(), config("corda"))
    with pytest.raises(ConfigError, match="run_model did not call 'one', 'two'"):
        preprocess_corda(Net(), config("corda"), run_model=lambda: None)
    with pytest.raises(ConfigError, match="train_step gave 'one', 'two' no gradient"):
        preprocess_loraga(Net(), config("lora_ga"), lambda: None)
    with pytest.raises(ConfigError, match="If you want to use LoRA-GA"):
        preprocess_loraga(Net(), LoraConfig(target_modules=TARGETS), lambda: None)
    with pytest.raises(ConfigError, match="direction must be one of 'ArBr'"):
        LoraGAConfig(direction="up")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="corda_method must be one of 'ipm', 'kpm', not 'x'"):
        CordaConfig(corda_method="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_of_it_brings_its_own_start(init: str, tmp_path: Path) -> None:
    """As a training does that goes on from a checkpoint, whose data was another."""
    model = started(init)
    train(model)
    expected = model(data())
    model.save_pretrained(tmp_path)
    base, given = Net(), config(init)
    prepare(base, given)
    for one in base.children():
        for found in (getattr(one, "eigens", None), getattr(one, "_peft_loraga_grad", None)):
            if isinstance(found, Tensor):
                found.mul_(torch.randn_like(found))
            elif found is not None:
                found.U_WC.mul_(1.5)
    other = get_peft_model(base, given)
    before = copy.deepcopy(get_peft_model_state_dict(other))
    tensors = nbpeft.load_peft_weights(str(tmp_path))
    nbpeft.set_peft_model_state_dict(other, tensors)
    assert_close(other(data()), expected)
    manager = other.manager
    taken, weights = manager.configs["default"].copy(), manager.weights("default")
    manager.remove("default")
    manager.add("default", taken, weights)
    assert_close(other(data()), expected)
    nbpeft.set_peft_model_state_dict(other, before)  # parameters alone: the start stays
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(other).items())
