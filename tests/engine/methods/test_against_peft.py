"""Every method that peft has, too, on whole models: targets, files, training, memory, folders of strangers."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import nbpeft
from nbpeft.engine.contract.adapter import swap_refusal
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.errors import HotSwapError, MergeError, NbpeftError
from nbpeft.memory import forecast
from nbpeft.model import PeftModel, get_peft_model, hotswap_adapter
from nbpeft.peft_api import mappings
from nbpeft.session import Session
from tests.closeness import assert_close
from tests.fuzz import mutations
from tests.fuzz.mutations import mutated
from tests.tiny_models import gpt2, llama, logits, randomize, same_state, state, tokens

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def bert() -> Any:
    return seeded(lambda: BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64)))


def bloom() -> Any:
    return seeded(lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)))


def gpt_neox() -> Any:
    return seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)))


def opt() -> Any:
    return seeded(lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)))


def qwen2() -> Any:
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)))


def t5() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes)))


def of_decoder(name: str, config_name: str = "", **sizes: Any) -> Any:
    """A tiny decoder of transformers: ``Mistral``, ``Phi``."""
    config = getattr(transformers, f"{config_name or name}Config")(**{**SIZES, "pad_token_id": 0, **sizes})
    return seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config))


GATED: dict[str, Any] = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": lambda: of_decoder("Mistral", **GATED),
    "qwen2": qwen2,
    "qwen3": lambda: of_decoder("Qwen3", **GATED),
    "gemma2": lambda: of_decoder("Gemma2", **GATED),
    "gemma3_text": lambda: of_decoder("Gemma3", "Gemma3Text", **GATED),
    "phi": lambda: of_decoder("Phi", intermediate_size=64),
    "falcon": lambda: of_decoder("Falcon"),
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "bloom": bloom,
    "bert": bert,
    "t5": t5,
}

SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
}
"""Fields without which a method has no config, or is too large for the models here."""

OLDER = {"LORA", "IA3", "TRAINABLE_TOKENS"}
"""Methods with tests of their own for all of this, as those have that act on whole calls (``test_prompts``)."""
ALL_METHODS = [
    method
    for method in {method.peft_type: method for method in reversed(methods()) if method.sample_configs}.values()
    if hasattr(peft.PeftType, method.peft_type) and method.shares.companion is None and not method.transforms_calls
]
METHODS = [method for method in ALL_METHODS if method.peft_type not in OLDER]
SAMPLES = [
    pytest.param(method, dict(fields), id=f"{method.peft_type.lower()}-{name}")
    for method in METHODS
    for name, fields in method.sample_configs.items()
]
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
NORMS = {"target_modules": ["input_layernorm", "norm"]}


def targets(method: Method) -> dict[str, Any]:
    return NORMS if method.kinds.only else TARGETS


# On one layer no gradient passes through another adapter.
ONE_LAYER = {"target_modules": ["down_proj"], "layers_to_transform": [1]}
TRAINED = {"C3A": ONE_LAYER}
"""Methods whose gradient of the input is wrong in peft."""

REPEATED = ("randlora_A", "randlora_B")
"""What layers share that peft writes once more for each of them."""

every_method_alike = pytest.mark.parametrize("method", ALL_METHODS, ids=lambda method: method.peft_type.lower())
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.peft_type.lower())
every_sample = pytest.mark.parametrize(("method", "fields"), SAMPLES)
pytestmark = [pytest.mark.filterwarnings("ignore")]


def merges(model: PeftModel) -> bool:
    """Whether what its adapter adds is a change of the weights and biases that are there."""
    try:
        for layer in model.manager.layers.values():
            layer.check_mergeable(["default"])
    except MergeError:
        return False
    return True


def both_configs(method: Method, **fields: Any) -> tuple[Any, Any]:
    ours = method.config_class(**fields)
    theirs = getattr(peft, method.config_class.__name__)
    return ours, theirs(**fields)


def counted(make: Callable[[], Any]) -> Any:
    """What a library makes of a model: shapes of the adapter's tensors, or that it refuses."""
    try:
        model = make()
    except (ValueError, TypeError, NotImplementedError, NbpeftError, AssertionError):
        return "refused"
    module = peft if isinstance(model, peft.PeftModel) else nbpeft
    shapes = {name: tuple(value.shape) for name, value in module.get_peft_model_state_dict(model).items()}
    # Of what GLoRA lacks, and what AdaMSS finds again in peft.
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith((".zeros", "adamss_clusters"))}
    return {name: shape for name, shape in shapes.items() if not name.endswith(REPEATED) or name.count(".") == 1}


@pytest.mark.drawn(80)
@pytest.mark.parametrize("name", MODELS)
@every_method_alike
def test_default_targets_give_the_tensors_that_peft_gives(method: Method, name: str) -> None:
    ours, theirs = both_configs(method, **SMALL.get(method.peft_type, {}))
    assert MODELS[name]().config.model_type == name
    expected = counted(lambda: peft.get_peft_model(MODELS[name](), theirs))
    found = counted(lambda: get_peft_model(MODELS[name](), ours))
    # Some in peft leave GPT-2's Conv1D out, or Falcon's own class, and AdaLoRA's table is shorter than LoRA's.
    lacking = expected in ("refused", {})
    assert found == expected or (lacking and (name in ("gpt2", "falcon") or method.label == "AdaLoRA"))


NAMED_OTHERWISE = {
    "parts that are not there have no zeros": ("glora-r4", "glora-vectors", "glora-numbers"),
    "what was drawn or found is a buffer": (*("adamss-k3", "adamss-dynamic", "shira-r2", "shira-seeded"),),
}
"""Reason -> samples whose parameters, or what else is in a state dict, have other names than in peft."""


@pytest.mark.parametrize(
    ("method", "fields", "sample"),
    [
        pytest.param(
            method, dict(fields), f"{method.peft_type.lower()}-{name}", id=f"{method.peft_type.lower()}-{name}"
        )
        for method in ALL_METHODS
        for name, fields in method.sample_configs.items()
    ],
)
def test_parameters_have_pefts_names_and_order(method: Method, fields: dict[str, Any], sample: str) -> None:
    """An optimizer's state goes by the order, groups and filters of optimizers by the names."""
    wanted: dict[str, Any] = {"feedforward_modules": []} if method.peft_type == "IA3" else {}
    ours, theirs = both_configs(method, **{"task_type": "CAUSAL_LM", **fields, **targets(method), **wanted})
    models: list[Any] = [get_peft_model(llama(), ours), peft.get_peft_model(llama(), theirs)]
    mine, its = ([(key, one.shape, one.requires_grad) for key, one in model.named_parameters()] for model in models)
    equal = mine == its and set(models[0].state_dict()) == set(models[1].state_dict())
    assert equal is not any(sample in samples for samples in NAMED_OTHERWISE.values())
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()


@every_method_alike
def test_the_names_in_its_layers_are_those_of_peft(method: Method) -> None:
    module = importlib.import_module(f"peft.tuners.{method.peft_type.lower()}.layer")
    layers = [value for name, value in vars(module).items() if name == f"{method.config_class.__name__[:-6]}Layer"]
    assert [(kind.adapter_layer_names, kind.other_param_names) for kind in layers or [module.BaseTunerLayer]] == [
        (tuple(method.peft.parameters.split()), tuple(method.peft.others.split()))
    ]


def pair(method: Method, fields: dict[str, Any], folder: Path) -> tuple[PeftModel, Any]:
    """The same random adapter in both libraries."""
    # Without a task peft leaves out what a method adds to the loss.
    ours = get_peft_model(llama(), method.config_class(task_type="CAUSAL_LM", **targets(method) | fields))
    randomize(ours, scale=0.1)
    ours.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True).eval()
    if method.calls.arguments:  # which peft wants with one task, too
        theirs.register_forward_pre_hook(of_the_first_task, with_kwargs=True)
    return ours.eval(), theirs


def of_the_first_task(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "task_ids": torch.zeros(len(kwargs["input_ids"]), dtype=torch.long)}


@pytest.mark.drawn(18)
@every_method_alike
def test_its_status_and_its_names_are_those_of_peft(method: Method, tmp_path: Path) -> None:
    fields = next(iter(method.sample_configs.values()))
    own = {key: ["down_proj"] if value == ["target"] else value for key, value in fields.items()}
    ours, theirs = pair(method, own, tmp_path)
    expected = [dataclasses.asdict(layer) for layer in theirs.get_layer_status()]
    for layer in expected:
        # Whose layers do not say in peft of which method they are.
        if method.peft_type in ("BEFT", "IA3", "SUPERTUNING", "UNILORA"):
            layer["module_type"] = f"{method.peft_type.lower()}.{layer['module_type']}"
    assert [dataclasses.asdict(layer) for layer in ours.get_layer_status()] == expected
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())
    peft_type = nbpeft.PeftType(method.peft_type)
    for name in ("CONFIG", "PREFIX", "TUNER"):
        found = getattr(mappings, f"PEFT_TYPE_TO_{name}_MAPPING")[peft_type]
        wanted = getattr(peft.mapping, f"PEFT_TYPE_TO_{name}_MAPPING")[peft.PeftType(method.peft_type)]
        assert getattr(found, "__name__", found) == getattr(wanted, "__name__", wanted)


@pytest.mark.drawn(45)
@every_sample
def test_files_go_both_ways(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(method, fields, tmp_path / "ours")
    assert (logits(ours) - logits(llama())).abs().max() > 1e-3
    assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert_close(logits(again), logits(ours))
    if not merges(ours):
        with pytest.raises(MergeError):
            ours.merge_and_unload()
        with pytest.raises((NotImplementedError, ValueError), match=r"not supported|has no bias"):
            theirs.merge_and_unload()
        return
    expected = logits(ours)
    merged = logits(ours.merge_and_unload())
    if method.calls.arguments:  # which peft does not merge
        assert_close(merged, expected)
        return
    assert_close(logits(theirs.merge_and_unload()), merged)


SHARED = {
    "PVERA": ["pvera_A", "pvera_B"],
    "UNILORA": ["unilora_theta_d"],
    "VBLORA": ["vblora_vector_bank"],
    "VERA": ["vera_A", "vera_B"],
    "RANDLORA": ["randlora_A", "randlora_B"],
}


@pytest.mark.parametrize("method", [one for one in METHODS if one.peft_type in SHARED], ids=lambda one: one.label)
def test_what_layers_share_has_the_names_of_peft(method: Method, tmp_path: Path) -> None:
    ours, theirs = pair(method, next(iter(method.sample_configs.values())), tmp_path)
    for name in SHARED[method.peft_type]:
        layers = [model.base_model.model.model.layers[0].self_attn.v_proj for model in (ours, theirs)]
        for found, wanted in ((getattr(ours, name), getattr(theirs, name)), (getattr(one, name) for one in layers)):
            assert list(found) == list(wanted) == ["default"] and "other" not in found
            assert_close(found["default"].detach(), wanted["default"].detach())
            assert_close(found.default.detach(), wanted.default.detach())
        assert getattr(ours, name)["default"] is getattr(layers[0], name)["default"]
        with torch.no_grad():
            for model in (ours, theirs):
                getattr(model, name)["default"] += 1.0
    assert_close(logits(ours), logits(theirs))
    with pytest.raises(AttributeError):
        ours.vera_C  # noqa: B018


def trained(model: Any, steps: int = 8) -> list[float]:
    ids, losses = tokens(), []
    torch.manual_seed(0)  # of what is drawn
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.drawn(40)
@every_sample
def test_eight_steps_of_training_are_those_of_peft(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(method, TRAINED.get(method.peft_type, {}) | fields, tmp_path)
    assert_close(trained(ours), trained(theirs))
    assert_close(logits(ours.eval()), logits(theirs.eval()))


@pytest.mark.drawn(30)
@every_sample
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_in_half_precision_it_runs_trains_and_merges(method: Method, fields: dict[str, Any], dtype: Any) -> None:
    config = method.config_class(task_type="CAUSAL_LM", **targets(method) | fields)
    wide = get_peft_model(
        llama(dtype=dtype).float(), config
    ).eval()  # of the same weights: what reads them sees no other
    half = get_peft_model(llama(dtype=dtype), config, autocast_adapter_dtype=False).eval()
    for model in (wide, half):
        randomize(model, scale=0.1)
    assert_close(logits(half).float(), logits(wide), dtype=dtype)
    half.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = [one.grad for one in half.parameters() if one.requires_grad and one.grad is not None]
    assert gradients and all(one.isfinite().all() for one in gradients)
    if merges(half):
        assert_close(logits(half.eval().merge_and_unload()).float(), logits(wide), dtype=dtype)


def saved_bytes(model: Any) -> int:
    """Bytes that a training call keeps for backward, each storage once, without what the model holds anyway."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        for part in [tensor] if tensor.layout is torch.strided else [tensor._indices(), tensor._values()]:
            storage = part.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = tokens(2, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.drawn(20)
@every_sample
def test_a_step_keeps_no_more_than_that_of_peft(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(method, fields, tmp_path)
    assert saved_bytes(ours) <= 1.05 * saved_bytes(theirs)


def check_mutated_folders(method: Method, seeds: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each is right or refused in one line, and the model stays as it was; returns how many are right."""
    monkeypatch.setattr(mutations, "FIELDS", tuple(one.name for one in dataclasses.fields(method.config_class)))
    starts = []
    for name, fields in method.sample_configs.items():
        own = {key: ["down_proj"] if value == ["target"] else value for key, value in fields.items()}
        start = get_peft_model(llama(), method.config_class(**targets(method) | own))
        starts.append(tmp_path / name)
        start.save_pretrained(starts[-1])
    model = get_peft_model(llama(), nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = state(model)
    right = 0
    for seed in seeds:
        draw = random.Random(seed)
        folder = tmp_path / f"f{seed}"
        done = mutated(draw.choice(starts), folder, draw)
        try:
            model.load_adapter(str(folder), "new")
            model.set_adapter("new")
            logits(model)
            right += 1
        except NbpeftError as error:
            assert len(str(error)) <= 520 and "\n" not in str(error), (seed, done, str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {done}") from error
        finally:
            if "new" in model.peft_config:
                model.set_adapter("default")
                model.delete_adapter("new")
        assert same_state(state(model), before), (seed, done)
    return right


@pytest.mark.slow
@every_method_alike
def test_mutated_folders(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_mutated_folders(method, range(12), tmp_path, monkeypatch) < 12


@pytest.mark.long
@every_method_alike
def test_two_hundred_mutated_folders(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 20 <= check_mutated_folders(method, range(200), tmp_path, monkeypatch) < 200


@pytest.mark.drawn(10)
@every_method
def test_every_field_has_its_type_and_none_is_refused_in_one_line(method: Method) -> None:
    values: tuple[Any, ...] = (None, -1, "no", 1.5, float("nan"), True, [], {}, [1], "\n")
    for name in [one.name for one in dataclasses.fields(method.config_class)]:
        for value in values:
            try:
                config = method.config_class(**{name: value})
                get_peft_model(llama(), config)
            except NbpeftError as error:
                assert "\n" not in str(error) and len(str(error)) <= 520, (name, value, str(error))


@pytest.mark.drawn(12)
@every_sample
def test_forecast_session_hot_swap_and_combination(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    config = method.config_class(**targets(method) | fields)
    parts = {part.name: part.byte_count for part in forecast(llama(), config, batch_size=1, max_length=8).parts}
    model, other = get_peft_model(llama(), config), get_peft_model(llama(), config)
    shared = model.manager.shared("default")
    adapters = [layer.adapter("default") for layer in model.manager.layers.values()]
    fixed_tensors = [one for adapter in adapters for one in adapter.buffers()]
    fixed_tensors += [adapter.get_parameter(name) for adapter in adapters for name in adapter.peft.constants]
    tensors = [*model.manager.parameters("default"), *fixed_tensors]
    size = sum(tensor.nbytes for tensor in tensors)
    # A rank that follows from the values of a weight has its largest in a forecast.
    assert parts["adapters"] == size or (method.label == "AdaMSS" and size < parts["adapters"] < 1.1 * size)
    added = Session().add(llama(), {"peft_type": method.peft_type.lower(), **targets(method), **fields}, name="s")
    assert added.adapter.method == method.title(config) and added.adapter.summary
    randomize(other, seed=4, scale=0.1)
    other.save_pretrained(tmp_path)
    saved = model.manager.weights("default")
    layers = {path: layer.adapter("default") for path, layer in model.manager.layers.items()}
    fixed = any(named.keys() - layers[path]._parameters.keys() for path, named in saved.adapters.items())
    refusal = swap_refusal(next(iter(layers.values())))
    assert not refusal.startswith("it "), "its subject is the adapter"
    if config.initialised_from_weight:
        with pytest.raises(HotSwapError, match="is initialized from a part of the base weights"):
            hotswap_adapter(model, tmp_path, "default")
    elif refusal or fixed or (shared is not None and shared.is_saved(config)):
        with pytest.raises(HotSwapError, match=refusal or "adapter 'default' has no"):
            hotswap_adapter(model, tmp_path, "default")
    else:
        hotswap_adapter(model, tmp_path, "default")
        assert_close(logits(model.eval()), logits(other.eval()))
    with pytest.raises(NbpeftError, match="cannot be combined"):
        model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "both")
