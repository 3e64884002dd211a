"""One seed, one training: losses are those of peft with dropout, and so is the generator after a new adapter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbpeft
from nbpeft.engine.contract.registry import Method, methods
from tests.closeness import assert_close
from tests.engine.contract.test_initial_draws import samples
from tests.tiny_models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
NORMS = {"target_modules": ["input_layernorm", "norm"]}
NOT_ALIKE = {
    "KaSA": "the loss of the model has its penalty, which peft leaves to the trainer",
    "MonteCLoRA": "peft draws the noise of many steps before the first",
    "QALoRA": "peft has it on GPTQ layers alone",
    "OFT": "peft does not drop what module_dropout asks for",
}
"""Methods whose losses under dropout are others than in peft, and why."""


def trained(library: Any, config: str, fields: dict[str, Any], *, steps: int = 5, **call: Any) -> Any:
    """The losses of a training from one seed, with drawn batches, and the state of the generator after it."""
    base = llama()
    torch.manual_seed(7)
    model = library.get_peft_model(base, getattr(library, config)(**fields)).train()
    batches: DataLoader[Any] = DataLoader(tokens(2 * steps, 9), batch_size=2, shuffle=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, **call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, torch.get_rng_state()


def check_alike(config: str, fields: dict[str, Any], **call: Any) -> None:
    (losses, state), (wanted, state_of_peft) = (trained(one, config, fields, **call) for one in (nbpeft, peft))
    assert_close(losses, wanted)
    assert torch.equal(state, state_of_peft)


def dropouts(method: Method) -> dict[str, float]:
    """Every dropout that a config of the method has."""
    names = [one.name for one in dataclasses.fields(method.config_class)]
    return {name: 0.1 for name in names if name.endswith("dropout")}


LEARNING = [
    method
    for method in methods()
    if method.sample_configs and hasattr(peft.PeftType, method.peft_type) and method.label not in NOT_ALIKE
]


@pytest.mark.drawn(12)
@pytest.mark.parametrize("method", LEARNING, ids=lambda method: method.label)
def test_losses_of_every_method_are_those_of_peft(method: Method) -> None:
    targets = {} if method.transforms_calls else NORMS if method.kinds.only else LINEAR
    fields = next(iter(method.sample_configs.values()))
    task = {"task_ids": torch.zeros(2, dtype=torch.long)} if method.calls.arguments else {}
    check_alike(
        method.config_class.__name__, {"task_type": "CAUSAL_LM", **targets, **fields, **dropouts(method)}, **task
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "init_lora_weights": False},
    ],
    ids=str,
)
def test_losses_of_lora_with_dropout(fields: dict[str, Any]) -> None:
    check_alike("LoraConfig", {"r": 4, "lora_dropout": 0.1, **LINEAR, **fields})


def test_losses_of_both_parts_of_gralora() -> None:
    check_alike("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2, "gralora_dropout": 0.2, **LINEAR})


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(20, 16),
    "Conv1d": lambda: nn.Conv1d(8, 16, 3),
    "Conv2d": lambda: nn.Conv2d(8, 16, 3),
    "Conv3d": lambda: nn.Conv3d(8, 16, 2),
}
OTHER_STARTS: dict[str, list[dict[str, Any]]] = {
    "LoHa": [{"r": 2, "use_effective_conv2d": True}],
    "LoKr": [{"r": 2, "use_effective_conv2d": True}, {"r": 2, "use_effective_conv2d": True, "init_weights": "lycoris"}],
    "HiRA": [{"r": 2, "init_weights": False}],
}


def started(library: Any, config: str, layer: str, fields: dict[str, Any]) -> Any:
    """Name -> trained parameter of a new adapter on one layer, and the state of the generator after it."""
    torch.manual_seed(7)
    base = nn.ModuleDict({"layer": LAYERS[layer]()})
    model = library.get_peft_model(base, getattr(library, config)(target_modules=["layer"], **fields))
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}, torch.get_rng_state()


@pytest.mark.parametrize("method", LEARNING, ids=lambda method: method.label)
def test_adapters_of_every_kind_of_layer_start_as_peft_s(method: Method) -> None:
    config = method.config_class.__name__
    samples = [next(iter(method.sample_configs.values())), *OTHER_STARTS.get(method.label, [])]
    for layer, fields in itertools.product(LAYERS, samples):
        try:
            wanted, state_of_peft = started(peft, config, layer, fields)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError):
            continue  # peft does not take such layers, or the layer has not enough features
        if not wanted:
            continue
        tensors, state = started(nbpeft, config, layer, fields)
        assert [*tensors] == [*wanted] and torch.equal(state, state_of_peft), (layer, fields)
        assert_close(tensors, wanted, message=f"{layer} {fields}")


def test_losses_of_hira_with_narrow_factors() -> None:
    check_alike("HiraConfig", {"r": 2, "init_weights": "gaussian", **LINEAR})


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Fails if something draws from the default generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def states(library: Any, config: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The state of the generator after each command that makes a new adapter, each from one seed."""
    found, config_class = {}, getattr(library, config)

    def run(name: str, command: Callable[[], Any]) -> Any:
        torch.manual_seed(5)
        made = command()
        found[name] = torch.get_rng_state()
        return made

    model = run("get_peft_model", lambda: library.get_peft_model(llama(), config_class(**fields)))
    if config != "AdaLoraConfig":
        run("add_adapter", lambda: model.add_adapter("second", config_class(**fields)))
        run("delete_adapter", lambda: model.delete_adapter("second"))
    if not issubclass(getattr(peft, config), peft.PromptLearningConfig):
        with contextlib.suppress(ValueError):  # peft refuses methods with shared tensors
            peft.inject_adapter_in_model(getattr(peft, config)(**fields), llama())
            run("inject", lambda: library.inject_adapter_in_model(config_class(**fields), llama()))
    return found


@pytest.mark.drawn(15)
@pytest.mark.parametrize(("config", "fields"), samples())
def test_a_new_adapter_leaves_the_generator_where_peft_does_and_a_loaded_one_where_it_was(
    config: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"task_type": "CAUSAL_LM", **fields}
    ours, theirs = (states(library, config, fields) for library in (nbpeft, peft))
    assert ours.keys() == theirs.keys() and not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    peft.get_peft_model(llama(), getattr(peft, config)(**fields)).save_pretrained(tmp_path)
    base = llama()
    with unmoved():
        loaded = nbpeft.PeftModel.from_pretrained(base, tmp_path)
        loaded.load_adapter(str(tmp_path), "other")
        loaded.load_adapter(str(tmp_path), "empty", low_cpu_mem_usage=True)
        loaded.set_adapter("other")


def test_a_failed_load_leaves_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=4, **LINEAR)).save_pretrained(tmp_path)
    base = llama()
    monkeypatch.setattr(nbpeft.PeftModel, "eval", lambda self: 1 / 0)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        nbpeft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig", "VBLoRAConfig"])
def test_copying_draws_nothing(config: str) -> None:
    sizes = {"vector_length": 8} if config == "VBLoRAConfig" else {}
    made = nbpeft.get_peft_model(llama(), getattr(nbpeft, config)(r=4, **LINEAR, **sizes))
    with unmoved():
        pickle.loads(pickle.dumps(copy.deepcopy(made)))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
@pytest.mark.parametrize(
    "fields",
    [{"r": 4}, {"r": 4, "rank_pattern": {"v_proj": 6}}, {"r": 4, "init_lora_weights": False, "lora_bias": True}],
    ids=str,
)
def test_combining_at_random_draws_as_peft_does(kind: str, fields: dict[str, Any]) -> None:
    states = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(**LINEAR, **fields))
        model.add_adapter("second", library.LoraConfig(**LINEAR, **fields))
        torch.manual_seed(5)
        model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", combination_type=kind, density=0.5)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "ties", "magnitude_prune"])
def test_combining_otherwise_draws_nothing(kind: str) -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=4, **LINEAR))
    model.add_adapter("second", nbpeft.LoraConfig(r=4, **LINEAR))
    density = 0.5 if kind in ("ties", "magnitude_prune") else None
    with unmoved():
        model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", combination_type=kind, density=density)
