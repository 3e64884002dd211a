"""One seed, one training: losses are those of peft with dropout, and so is the generator after every command."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbpeft
from nbpeft.engine.changes.random_numbers import Advance
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


def moved(run: Callable[[], Any]) -> bool:
    """Whether something draws from the default generator."""
    before = torch.get_rng_state()
    run()
    return not torch.equal(torch.get_rng_state(), before)


NOT_ALIKE_EMPTY = ("lora-olora-lora", "lora-pissa-lora", "lora-dora-pissa-dora", "shadow-one-layer")
"""Samples of which peft makes no adapter without values."""


def states(library: Any, config: str, fields: dict[str, Any], folder: Path, *, empty: bool) -> dict[str, Any]:
    """The state of the generator after each command that adds or removes an adapter, each from one seed."""
    model, found = None, {}
    config_class, options = getattr(library, config), {"low_cpu_mem_usage": True} if empty else {}

    def run(name: str, command: Callable[[], Any]) -> Any:
        torch.manual_seed(5)
        made = command()
        found[name] = torch.get_rng_state()
        return made

    model = run("get_peft_model", lambda: library.get_peft_model(llama(), config_class(**fields), **options))
    if config != "AdaLoraConfig":
        run("add_adapter", lambda: model.add_adapter("second", config_class(**fields), **options))
        run("delete_adapter", lambda: model.delete_adapter("second"))
    if not hasattr(peft, "PromptLearningConfig") or not issubclass(getattr(peft, config), peft.PromptLearningConfig):
        with contextlib.suppress(ValueError):  # peft refuses methods with shared tensors
            peft.inject_adapter_in_model(getattr(peft, config)(**fields), llama())
            run("inject", lambda: library.inject_adapter_in_model(config_class(**fields), llama(), **options))
    loaded = run("from_pretrained", lambda: library.PeftModel.from_pretrained(llama(), folder, **options))
    run("load_adapter", lambda: loaded.load_adapter(str(folder), "other", **options))
    run("load_adapter again", lambda: loaded.load_adapter(str(folder), "other", **options))
    run("set_adapter", lambda: loaded.set_adapter("other"))
    # Peft cannot merge learned prompts, Polytropon, and biases into layers without one.
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
        run("merge_and_unload", loaded.merge_and_unload)
    return found


@pytest.mark.drawn(30)
@pytest.mark.parametrize("empty", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("config", "fields"), samples())
def test_the_generator_is_where_peft_leaves_it(
    config: str, fields: dict[str, Any], empty: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if empty and any(name in request.node.name for name in NOT_ALIKE_EMPTY):
        pytest.skip("peft makes no such adapter without values")
    fields = {"task_type": "CAUSAL_LM", **fields}
    peft.get_peft_model(llama(), getattr(peft, config)(**fields)).save_pretrained(tmp_path)
    ours, theirs = (states(library, config, fields, tmp_path, empty=empty) for library in (nbpeft, peft))
    differing = [name for name in theirs.keys() & ours.keys() if not torch.equal(ours[name], theirs[name])]
    assert not differing and {"get_peft_model", "from_pretrained", "load_adapter"} <= theirs.keys() & ours.keys()


def test_loading_many_numbers_skips_them_in_the_background(tmp_path: Path) -> None:
    fields = {"r": 64, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(llama(hidden_size=256), peft.LoraConfig(**fields)).save_pretrained(tmp_path)
    base = partial(llama, hidden_size=256)
    assert torch.equal(*(loaded_state(library, tmp_path, base) for library in (nbpeft, peft)))


def loaded_state(library: Any, folder: Path, make: Callable[[], Any]) -> torch.Tensor:
    base = make()
    torch.manual_seed(5)
    library.PeftModel.from_pretrained(base, folder)
    return torch.get_rng_state()


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_loading_factors_that_two_layers_share_draws_as_peft_does(init: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "init_lora_weights": init}
    base = partial(llama, tie_word_embeddings=True)
    nbpeft.get_peft_model(base(), nbpeft.LoraConfig(r=4, **fields)).save_pretrained(tmp_path)
    assert torch.equal(*(loaded_state(library, tmp_path, base) for library in (nbpeft, peft)))


def test_skipping_and_drawing_meanwhile() -> None:
    """Numbers that another thread draws while words are skipped are not drawn again."""
    torch.manual_seed(5)
    advance = Advance(100_000)
    first = torch.rand(3)
    advance.finish()
    last = torch.rand(3)
    torch.manual_seed(5)
    wanted = torch.rand(100_006)
    assert torch.equal(first, wanted[:3]) and torch.equal(last, wanted[-3:])


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
    assert not moved(lambda: pickle.loads(pickle.dumps(copy.deepcopy(made))))


@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "ties", "dare_linear", "dare_ties_svd", "magnitude_prune"])
@pytest.mark.parametrize(
    "fields",
    [{"r": 4}, {"r": 4, "rank_pattern": {"v_proj": 6}}, {"r": 4, "init_lora_weights": False, "lora_bias": True}],
    ids=str,
)
def test_combining_draws_as_peft_does(kind: str, fields: dict[str, Any]) -> None:
    density = 0.5 if kind not in ("linear", "svd", "cat") else None
    check_combined_alike("LoraConfig", fields, combination_type=kind, density=density)


def test_combining_to_another_rank_draws_as_peft_does() -> None:
    check_combined_alike("LoraConfig", {"r": 4}, combination_type="svd", svd_rank=2)


@pytest.mark.parametrize("fields", [{"use_dora": True, "r": 4}, {"init_lora_weights": "orthogonal", "r": 4}], ids=str)
def test_combining_variants_draws_as_peft_does(fields: dict[str, Any]) -> None:
    check_combined_alike("LoraConfig", fields, combination_type="linear")


def test_combining_other_methods_draws_as_peft_does() -> None:
    check_combined_alike("IA3Config", {"feedforward_modules": []})


def check_combined_alike(config: str, fields: dict[str, Any], **settings: Any) -> None:
    states = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(llama(), getattr(library, config)(**LINEAR, **fields))
        model.add_adapter("second", getattr(library, config)(**LINEAR, **fields))
        torch.manual_seed(5)
        model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", **settings)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
