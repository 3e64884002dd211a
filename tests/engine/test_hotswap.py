"""Hot-swapping: equal to loading afresh, in place, all or nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.engine.hotswap import prepare_for_hotswap, swap
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree import model_tree
from nbpeft.errors import ConfigError, HotSwapError, UnknownAdapterError
from tests.closeness import assert_close, differ, is_close

TARGETS = ["embed", "conv", "grouped", "first", "turned"]


class Zoo(nn.Module):
    """Every kind of layer in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.first = nn.Linear(6, 10)
        self.turned = Conv1D(7, 10)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.grouped(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        output: Tensor = self.head(torch.tanh(self.turned(torch.relu(self.first(hidden)))))
        return output


IDS = torch.arange(12).view(2, 6) % 13


def fresh(config: LoraConfig, weights: AdapterWeights | None = None, *, name: str = "default") -> Any:
    """A zoo, always the same, with one adapter."""
    torch.manual_seed(0)
    model = Zoo().eval()
    AdapterManager.attach(model).add(name, config, weights)
    return model


def manager_of(model: nn.Module) -> AdapterManager:
    manager = model_tree.manager_of(model)
    assert manager is not None
    return manager


def trained(config: LoraConfig, seed: int = 1) -> AdapterWeights:
    """Weights of an adapter as training would leave them: nothing at zero, magnitudes moved, outputs near one."""
    weights = manager_of(fresh(config)).weights("default")
    generator = torch.Generator().manual_seed(seed)
    for named in (*weights.adapters.values(), *weights.copies.values(), weights.base):
        for key, tensor in named.items():
            noise = torch.randn(tensor.shape, generator=generator)
            named[key] = (
                tensor.detach() * (1 + 0.3 * noise)
                if key == "lora_magnitude_vector"
                else noise / noise[0].numel() ** 0.5
            )
    return weights


def config_of(rank: int, **options: Any) -> LoraConfig:
    settings: dict[str, Any] = {"lora_alpha": rank + 3, "target_modules": TARGETS, **options}
    return LoraConfig(r=rank, **settings)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


PLAIN = [target for target in TARGETS if target != "grouped"]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "rank-pattern": {"rank_pattern": {"first": 2, "embed": 6}, "alpha_pattern": {"turned": 31.0}},
    "dora": {"use_dora": True, "target_modules": PLAIN},
    "lora-bias": {"lora_bias": True, "target_modules": ["conv", "grouped", "first", "turned"]},
    "modules-to-save": {"modules_to_save": ["head"]},
    "trained-biases": {"bias": "lora_only"},
}


@pytest.mark.drawn(20)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_loading_the_adapter(variant: str, rank: int, prepared: bool) -> None:
    options = VARIANTS[variant]
    old, new = config_of(4, **options), config_of(rank, **options)
    weights = trained(new)
    expected = fresh(new, weights)(IDS)
    model = fresh(old, trained(old, seed=2))
    manager = manager_of(model)
    before = model(IDS)
    if prepared:
        prepare_for_hotswap(manager, 8)
        assert_close(model(IDS), before)
    assert differ(before, expected)
    result = swap(manager, "default", new, weights, grow=not prepared)
    assert_close(model(IDS), expected)
    assert (result.layers, result.zeroed) == (len(weights.adapters), ())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_follows_and_what_is_saved_loads_equal(variant: str) -> None:
    options = VARIANTS[variant]
    old, new = config_of(8, **options), config_of(2, lora_dropout=0.25, **options)
    weights = trained(new)
    model = fresh(old, trained(old, seed=2))
    manager = manager_of(model)
    prepare_for_hotswap(manager, 16)
    swap(manager, "default", new, weights)
    saved_config: Any = manager.configs["default"]
    assert (saved_config.r, saved_config.lora_alpha, saved_config.lora_dropout) == (2, 5, 0.25)
    saved = manager.weights("default")
    for path, named in weights.adapters.items():
        assert saved.adapters[path].keys() == named.keys()
        assert all(torch.equal(saved.adapters[path][key], tensor) for key, tensor in named.items())
    assert_close(fresh(saved_config, saved)(IDS), model(IDS))


def test_merging_after_a_swap_keeps_the_output() -> None:
    options: dict[str, Any] = {"target_modules": PLAIN}
    model = fresh(config_of(4, **options))
    manager = manager_of(model)
    prepare_for_hotswap(manager, 8)
    swap(manager, "default", config_of(2, **options), trained(config_of(2, **options)))
    before = model(IDS)
    manager.merge()
    assert_close(model(IDS), before)


def test_a_scaling_that_was_changed_is_that_of_the_config_after_a_swap() -> None:
    config = config_of(4, target_modules=PLAIN)
    model = fresh(config)
    manager = manager_of(model)
    adapters: list[Any] = [layer.adapter("default") for layer in manager.layers.values()]
    own = adapters[0].scaling
    adapters[0].rescale(7.0)
    with pytest.raises(HotSwapError, match="did not pass"):
        swap(manager, "default", config, trained(config), validate=lambda: False)
    assert adapters[0].scaling == 7.0 and adapters[0].trained_scaling == own
    swap(manager, "default", config, trained(config))
    assert {adapter.scaling for adapter in adapters} == {own}


def test_parameters_stay_where_they_are_and_train_on() -> None:
    model = fresh(config_of(4))
    manager = manager_of(model)
    parameters = manager.parameters("default")
    prepare_for_hotswap(manager, 8)
    places = [(id(parameter), parameter.data_ptr()) for parameter in manager.parameters("default")]
    assert [place for place, _ in places] == [id(parameter) for parameter in parameters]
    for rank, seed in ((2, 1), (8, 2), (4, 3)):
        swap(manager, "default", config_of(rank), trained(config_of(rank), seed))
        assert places == [(id(parameter), parameter.data_ptr()) for parameter in manager.parameters("default")]
    model(IDS).square().sum().backward()
    optimizer = torch.optim.AdamW(manager.parameters("default"), lr=1e-2)
    optimizer.step()
    padded = model.first.adapters["default"]
    assert torch.count_nonzero(padded.lora_A[4:]) == torch.count_nonzero(padded.lora_B[:, 4:]) == 0


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_layers_the_new_adapter_lacks_add_nothing(variant: str) -> None:
    options = VARIANTS[variant]
    model = fresh(config_of(4, **options), trained(config_of(4, **options), seed=2))
    manager = manager_of(model)
    fewer = {**options, "target_modules": ["first", "embed"]}
    new = config_of(2, **fewer)
    weights = trained(new)
    result = swap(manager, "default", new, weights)
    assert set(result.zeroed) == set(options.get("target_modules", TARGETS)) - {"first", "embed"}
    expected = fresh(new, weights)(IDS)
    assert_close(model(IDS), expected)
    kept: Any = manager.configs["default"]
    again = fresh(kept, manager.weights("default"))
    assert_close(again(IDS), expected)


def test_a_module_the_new_adapter_did_not_train_goes_back_to_the_base() -> None:
    with_head = config_of(4, modules_to_save=["head"])
    model = fresh(with_head, trained(with_head, seed=2))
    new = config_of(4)
    weights = trained(new)
    result = swap(manager_of(model), "default", new, weights)
    assert result.reset == ("head",)
    assert_close(model(IDS), fresh(new, weights)(IDS))


def test_other_adapters_stay_bit_equal() -> None:
    """One name that contains the other, and one that is part of every parameter's name."""
    model = fresh(config_of(4), trained(config_of(4)))
    manager = manager_of(model)
    for position, name in enumerate(("default2", "lora", "a")):
        manager.add(name, config_of(4), trained(config_of(4), seed=5 + position))
    others = {key: tensor for key, tensor in tensors_of(model).items() if ".default." not in f"{key}."}
    prepare_for_hotswap(manager, None)
    swap(manager, "default", config_of(2), trained(config_of(2), seed=3))
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in others.items())
    assert vars(manager.configs["default2"])["r"] == 4


REFUSED: dict[str, tuple[Callable[[], tuple[LoraConfig, AdapterWeights]], str]] = {}


def refused(message: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def keep(make: Callable[[], Any]) -> Callable[[], Any]:
        REFUSED[make.__name__] = (make, message)
        return make

    return keep


@refused("rank 8 does not fit a slot of rank 4; prepare the model for target_rank=8")
def larger_rank() -> Any:
    return config_of(8), trained(config_of(8))


@refused("is LoRA and cannot be swapped for DoRA")
def another_method() -> Any:
    config = config_of(4, use_dora=True, target_modules=PLAIN)
    return config, trained(config)


@refused("unexpected keys: the new adapter has 1 layers that 'default' does not have .head.")
def more_layers() -> Any:
    config = config_of(4, target_modules=[*TARGETS, "head"])
    return config, trained(config)


@refused(r"turned.lora_A has shape \(4, 12\), expected \(4, 10\): the adapter belongs to another base model")
def another_width() -> Any:
    weights = trained(config_of(4))
    weights.adapters["turned"]["lora_A"] = torch.randn(4, 12)
    return config_of(4), weights


@refused(r"first.lora_B has shape \(10, 4\), expected \(10, 2\)")
def config_of_another() -> Any:
    weights = trained(config_of(4))
    weights.adapters["first"]["lora_A"] = torch.randn(2, 6)
    return config_of(4, rank_pattern={"first": 2}), weights


@refused("first: the new adapter lacks lora_B")
def half_a_layer() -> Any:
    weights = trained(config_of(4))
    del weights.adapters["first"]["lora_B"]
    return config_of(4), weights


@refused("unexpected keys at conv: lora_B_bias; the slot has lora_A, lora_B")
def a_bias_of_B() -> Any:
    options = VARIANTS["lora-bias"]
    return config_of(4, **options), trained(config_of(4, **options))


@refused(r"trained head as a whole \(modules_to_save\) and 'default' did not")
def a_trained_head() -> Any:
    config = config_of(4, modules_to_save=["head"])
    return config, trained(config)


@refused("trained base biases: only one of the new adapter and .default. has conv.bias")
def trained_biases() -> Any:
    config = config_of(4, bias="lora_only")
    return config, trained(config)


@refused("grouped: a Conv1d with 2 groups cannot take rank 3")
def rank_of_groups() -> Any:
    weights = trained(config_of(3, target_modules=PLAIN))
    weights.adapters["grouped"] = trained(config_of(4)).adapters["grouped"]
    return config_of(3), weights


@pytest.mark.parametrize("case", REFUSED)
def test_everything_is_checked_before_the_first_byte(case: str) -> None:
    make, message = REFUSED[case]
    config, weights = make()
    model = fresh(config_of(4), trained(config_of(4), seed=9))
    manager = manager_of(model)
    before, revision, kept = tensors_of(model), manager.revision, manager.configs["default"]
    with pytest.raises(HotSwapError, match=message) as caught:
        swap(manager, "default", config, weights)
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)
    assert manager.revision == revision and manager.configs["default"] is kept


def test_what_state_refuses() -> None:
    model = fresh(config_of(4, target_modules=PLAIN))
    manager = manager_of(model)
    weights = trained(config_of(4, target_modules=PLAIN))
    with pytest.raises(UnknownAdapterError, match=r"'defalt' not found.*Did you mean 'default'"):
        swap(manager, "defalt", config_of(4), weights)
    manager.merge()
    with pytest.raises(HotSwapError, match="merged into the base weights: unmerge"):
        swap(manager, "default", config_of(4, target_modules=PLAIN), weights)
    with pytest.raises(HotSwapError, match="load an adapter before preparing"):
        prepare_for_hotswap(AdapterManager(Zoo()), 8)
    with pytest.raises(HotSwapError, match="embed has rank 4, more than target_rank=2"):
        prepare_for_hotswap(manager, 2)
    with pytest.raises(ConfigError, match="2 groups cannot take rank 7"):
        prepare_for_hotswap(manager_of(fresh(config_of(4))), 7)


def fails() -> bool:
    raise ValueError("the answers are worse")


@pytest.mark.drawn(20)
@pytest.mark.parametrize("verdict", [lambda: False, lambda: torch.tensor(False), fails])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("consume", [False, True])
def test_a_refused_adapter_leaves_the_old_one_bit_equal(
    variant: str, rank: int, verdict: Callable[[], object], consume: bool
) -> None:
    options = VARIANTS[variant]
    old, new = config_of(8, **options), config_of(rank, lora_dropout=0.1, **options)
    model = fresh(old, trained(old, seed=2))
    manager = manager_of(model)
    before, output, kept = tensors_of(model), model(IDS), manager.configs["default"]
    weights = trained(new)
    seen: list[Tensor] = []

    def validate() -> object:
        seen.append(model(IDS))
        return verdict()

    with pytest.raises(HotSwapError, match="'default' is unchanged"):
        swap(manager, "default", new, weights.copied(), grow=True, validate=validate, consume=consume)
    if not options.get("bias"):
        assert_close(seen[0], fresh(new, weights)(IDS))
    assert_untouched(model, before)
    assert torch.equal(model(IDS), output)
    assert manager.configs["default"] is kept and manager.weights("default").adapters.keys() == weights.adapters.keys()


@pytest.mark.parametrize("failing", range(9))
def test_an_exchange_that_fails_at_any_copy_restores_every_bit(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one shape are exchanged two at a time, with three copies each time."""
    monkeypatch.setattr("nbpeft.engine.changes.transaction._EXCHANGED_AT_ONCE", 2)
    old, new = config_of(8), config_of(8)
    model = fresh(old, trained(old, seed=2))
    before, copy, calls = tensors_of(model), torch._foreach_copy_, []

    def failing_copy(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) == failing + 1:
            copy([given[0][0]], [given[1][0]])  # a part is written
            raise MemoryError
        copy(*given, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", failing_copy)
    with pytest.raises(MemoryError):
        swap(manager_of(model), "default", new, trained(new), consume=True)
    assert (len(calls) > failing + 1) == (failing > 0)  # nothing was written before the first copy
    assert_untouched(model, before)


def test_tensors_that_are_used_twice_or_must_be_converted_are_only_copied() -> None:
    old, new = config_of(8, target_modules=["first", "turned"]), config_of(8, target_modules=["first", "turned"])
    model = fresh(old, trained(old, seed=2))
    weights = trained(new)
    first, turned = weights.adapters["first"], weights.adapters["turned"]
    memory = torch.randn(8, 10 + 6)
    first["lora_A"], turned["lora_A"] = memory[:, :6], memory[:, 6:]
    first["lora_B"], turned["lora_B"] = first["lora_B"].double(), turned["lora_B"].T.contiguous().T
    kept = weights.copied().tensors
    swap(manager_of(model), "default", new, weights, consume=True)
    swapped = manager_of(model).weights("default").tensors
    assert all(torch.equal(swapped[key], value.to(swapped[key])) for key, value in kept.items())
    assert all(torch.equal(weights.tensors[key], value) for key, value in kept.items())


def test_validation_sees_the_new_adapter_alone_and_others_wait() -> None:
    model = fresh(config_of(4), trained(config_of(4)))
    manager = manager_of(model)
    manager.add("other", config_of(4), trained(config_of(4), seed=5))
    manager.activate("other")
    new, weights = config_of(4), trained(config_of(4), seed=3)
    expected, other = fresh(new, weights)(IDS), model(IDS)
    elsewhere: list[Tensor] = []

    def call() -> None:
        with manager.active_state.call():
            elsewhere.append(model(IDS))

    thread = threading.Thread(target=call)

    def validate() -> bool:
        thread.start()
        thread.join(0.2)
        assert not elsewhere
        return is_close(model(IDS), expected)

    swap(manager, "default", new, weights, validate=validate)
    thread.join()
    assert manager.active == ("other",)
    assert torch.equal(elsewhere[0], other)


def test_a_swap_waits_for_a_running_call() -> None:
    model = fresh(config_of(4), trained(config_of(4)))
    manager = manager_of(model)
    before = model(IDS)
    done = threading.Event()

    def work() -> None:
        swap(manager, "default", config_of(4), trained(config_of(4), seed=3))
        done.set()

    with manager.active_state.call():
        thread = threading.Thread(target=work)
        thread.start()
        assert not done.wait(0.2)
        assert torch.equal(model(IDS), before)
    thread.join()
    assert done.is_set() and differ(model(IDS), before)


def test_subscribers_hear_of_a_swap() -> None:
    model = fresh(config_of(4))
    manager = manager_of(model)
    heard: list[int] = []
    manager.subscribe(lambda: heard.append(manager.revision))
    swap(manager, "default", config_of(4), trained(config_of(4)))
    prepare_for_hotswap(manager, 8)
    assert len(heard) == 2


def test_scalings_follow_every_rule() -> None:
    model = fresh(config_of(8))
    manager = manager_of(model)
    prepare_for_hotswap(manager, None)
    new = config_of(
        4, lora_alpha=6, use_rslora=True, rank_pattern={"first": 8}, alpha_pattern={"turned": 10, "first": 2}
    )
    swap(manager, "default", new, trained(new))
    scalings = {path: float(layer.adapter("default").scaling) for path, layer in manager.layers.items()}
    expected = dict.fromkeys(TARGETS, 6 / 2) | {"first": 2 / math.sqrt(8), "turned": 10 / 2}
    assert scalings == pytest.approx(expected)


def slot_config(rank: int) -> LoraConfig:
    """One that can be merged."""
    return config_of(rank, target_modules=["embed", "conv", "first", "turned"])


MEDDLING: dict[str, Callable[[Any], object]] = {
    "switches": lambda manager: manager.activate("other"),
    "switches off": lambda manager: manager.disable(),
    "scales": lambda manager: manager.set_scale("default", 0.5),
    "merges": lambda manager: manager.merge(),
    "swaps": lambda manager: swap(manager, "default", slot_config(4), trained(slot_config(4), seed=7)),
    "renames": lambda manager: manager.rename("default", "moved"),
    "deletes": lambda manager: manager.remove("default"),
    "unloads": lambda manager: manager.unload(merge=False),
}


@pytest.mark.filterwarnings("ignore:adapters are merged")
@pytest.mark.parametrize("meddling", MEDDLING)
@pytest.mark.parametrize("active", ["default", "other"])
def test_a_validation_that_changes_adapters_and_refuses(meddling: str, active: str) -> None:
    old = slot_config(2)
    model = fresh(old, trained(old))
    manager = manager_of(model)
    manager.add("other", slot_config(4), trained(slot_config(4), seed=5))
    manager.activate(active)
    before, output, kept = tensors_of(model), model(IDS), manager.configs["default"]
    with pytest.raises(HotSwapError, match=r"did not pass its validation|block is open"):
        swap(
            manager,
            "default",
            slot_config(4),
            trained(slot_config(4), seed=3),
            grow=True,
            validate=lambda: MEDDLING[meddling](manager) is not manager and False,
        )
    assert manager.configs["default"] is kept and manager.alive
    assert set(manager.configs) == {key for layer in manager.layers.values() for key in layer.adapters}
    assert_untouched(model, before)
    assert manager.active == (active,) and manager.enabled and not manager.merged and manager.scale("default") == 1.0
    assert torch.equal(model(IDS), output)
