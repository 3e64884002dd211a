"""X-LoRA: held against PEFT, in every way in which a model is called, and where PEFT is wrong."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft.engine.methods.lora.variants import xlora
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, MergeError, NbpeftError
from nbpeft.memory import forecast
from nbpeft.model import PeftModel, get_peft_model
from nbpeft.training import train
from tests.closeness import assert_close, assert_same
from tests.tiny_models import gpt2, llama, logits, randomize, same_state, state, tokens

GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
DEEP: dict[str, Any] = {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 16, "xlora_dropout_p": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": DEEP,
    "top-k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "softmax_temperature": 0.5},
    "weights": {"scaling_pass_value": 0.3, "global_scaling_weight": 1.4, "softmax_temperature": 0.5},
    "trained": {"use_trainable_adapters": True},
}


def saved(folder: Path, count: int = 3, **fields: Any) -> dict[str, str]:
    """Saves LoRA adapters, the last with a layer more."""
    found = {}
    for number in range(count):
        targets = ["q_proj", "v_proj", *(["k_proj"] if number == count - 1 else [])]
        settings = {"r": 3, "target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False}
        model = get_peft_model(llama(), nbpeft.LoraConfig(**settings | fields))
        randomize(model, seed=number)
        model.save_pretrained(folder / f"expert{number}")
        found[str(number)] = str(folder / f"expert{number}")
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved(tmp_path_factory.mktemp("experts"))


def both(adapters: dict[str, str], base: Callable[..., Any] = llama, **fields: Any) -> tuple[PeftModel, Any]:
    """The same config on the same model in both libraries, from one seed."""
    models = []
    for make, library in ((get_peft_model, nbpeft), (peft.get_peft_model, peft)):
        model: Any = base(use_cache=False)
        torch.manual_seed(5)
        config = library.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **fields)
        models.append(make(model, config).eval())
    return models[0], models[1]


def made(adapters: dict[str, str], name: str = "default", sharp: float = 8.0, **fields: Any) -> PeftModel:
    """A model with a classifier that has a clear opinion."""
    model = get_peft_model(llama(), nbpeft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **fields), name)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.mul_(sharp)
    return model.eval()


def classifier_of(model: Any) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name.rpartition("classifier.")[2]: one for name, one in named if "internal_xlora_classifier" in name}


def steps(model: Any, count: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    losses = []
    for _ in range(count):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SETTINGS)
def test_start_calls_steps_and_files_are_those_of_peft(name: str, adapters: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = both(adapters, **SETTINGS[name])
    start, expected = classifier_of(ours), classifier_of(theirs)
    assert start.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(start[key], value)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert (logits(ours) - logits(llama())).abs().max() > 0.01
    assert_close(logits(ours), logits(theirs))
    assert_close(ours.get_latest_scalings(), theirs.get_latest_scalings())
    assert torch.equal(*(model.generate(input_ids=tokens(), **GENERATE) for model in (ours, theirs)))
    losses = steps(ours), steps(theirs)
    assert_close(losses[0], losses[1])
    assert losses[0][-1] < losses[0][0]
    ours.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(use_cache=False), tmp_path).eval()
    assert_close(logits(loaded), logits(ours))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(ours))


def test_the_names_of_parameters_are_those_of_peft(adapters: dict[str, str]) -> None:
    ours, theirs = both(adapters, use_trainable_adapters=True)
    found, expected = (
        {name.rpartition("layers.")[2] if "model.layers" in name else name for name, _ in model.named_parameters()}
        for model in (ours, theirs)
    )
    experts = {name for name in expected if ".lora_A." in name or ".lora_B." in name}
    assert len(experts) == 2 * (2 + 2 + 3) * 2 and experts <= found
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert list(layer.lora_A) == ["0", "1", "2"] and layer.lora_A["1"].weight.shape == (3, 32)
    assert isinstance(ours.base_model, nbpeft.XLoraModel) and ours.base_model.lora_model.model is ours.get_base_model()


def test_embeddings_are_weighed_as_in_peft(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = saved(tmp_path, 2, target_modules=["embed_tokens"])
        ours, theirs = both(own)
        ours.internal_xlora_classifier.layers[0].weight.data.normal_()
        theirs.internal_xlora_classifier.layers[0].weight.data.copy_(ours.internal_xlora_classifier.layers[0].weight)
    assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(llama())).abs().max() > 0.01


def test_what_is_logged_and_set_is_as_in_peft(adapters: dict[str, str]) -> None:
    logs = []
    for model in both(adapters, **DEEP):
        any_model: Any = model
        any_model.enable_scalings_logging()
        any_model.set_topk_lora(2)
        any_model.set_global_scaling_weight(1.5)
        any_model.set_scaling_pass_value(None)
        assert any_model.internal_xlora_classifier.override_scaling_pass_value == pytest.approx(1 / 3)
        any_model.set_scaling_pass_value(0.0)
        with torch.no_grad():
            any_model.generate(input_ids=tokens(), **GENERATE)
            any_model.disable_scalings_logging()
            any_model(input_ids=tokens())
        config = any_model.internal_xlora_classifier.config
        assert (config.top_k_lora, any_model.get_global_scaling_weight()) == (2, 1.5)
        logs.append((any_model.get_scalings_log(), any_model.get_bucketed_scalings_log()))
        any_model.clear_scalings_log()
        assert any_model.get_scalings_log() == []
    (log, buckets), (expected, theirs) = logs
    assert len(log) == len(expected) == GENERATE["max_new_tokens"] and buckets.keys() == theirs.keys()
    assert [places for places, _ in buckets.values()] == [places for places, _ in theirs.values()]
    for found, one in zip(log, expected, strict=True):
        assert_close(found, one)


def test_settings_are_saved_and_refused_where_impossible(adapters: dict[str, str], tmp_path: Path) -> None:
    model = made(adapters)
    model.set_topk_lora(1)
    model.set_global_scaling_weight(0.5)
    with pytest.raises(ConfigError, match="top_k_lora = 4 is more than the 3 adapters"):
        model.set_topk_lora(4)
    with pytest.raises(ConfigError, match="weight must be a number, not 'much'"):
        model.set_global_scaling_weight("much")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert (loaded.peft_config["default"].top_k_lora, loaded.get_global_scaling_weight()) == (1, 0.5)  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded), logits(model))
    plain = get_peft_model(llama(), nbpeft.LoraConfig(r=2))
    assert not hasattr(plain, "get_scalings_log")


# The cache


@pytest.mark.parametrize("fields", [{}, DEEP])
def test_a_cache_gives_what_generation_without_one_gives(fields: dict[str, Any], adapters: dict[str, str]) -> None:
    model = made(adapters, **fields)
    model.enable_scalings_logging()
    for options in ({}, {"num_beams": 3}):
        found = model.generate(input_ids=tokens(), **GENERATE, **options)
        assert [one.shape[1] for one in model.get_scalings_log()] == [9, 1, 1, 1, 1]
        model.clear_scalings_log()
        assert torch.equal(found, model.generate(input_ids=tokens(), **GENERATE, **options, use_cache=False))
        assert [one.shape[1] for one in model.get_scalings_log()] == [9, 10, 11, 12, 13]
        model.clear_scalings_log()


@torch.no_grad()
def test_a_cache_is_handed_on_from_call_to_call(adapters: dict[str, str]) -> None:
    model, ids = made(adapters), tokens()
    whole = logits(model)
    first = model(input_ids=ids[:, :5])
    other = model(input_ids=ids[:, 5:7], past_key_values=first.past_key_values)
    last = model(input_ids=ids[:, 7:], past_key_values=copy.deepcopy(other.past_key_values))
    found = torch.cat([one.logits for one in (first, other, last)], 1)
    assert_close(found, whole)
    other.past_key_values.crop(-2)
    again = model(input_ids=ids[:, 5:], past_key_values=other.past_key_values)
    assert_close(again.logits, whole[:, 5:])


def test_a_cache_without_the_first_pass_is_refused(adapters: dict[str, str]) -> None:
    model, ids = made(adapters), tokens()
    filled = DynamicCache()
    with model.disable_adapter():
        model(input_ids=ids, past_key_values=filled)
    with pytest.raises(AdapterError, match="contains tokens that the active adapter has not seen"):
        model(input_ids=ids, past_key_values=filled)
    static = StaticCache(model.get_base_model().config, max_cache_len=20)
    with pytest.raises(AdapterError, match="a StaticCache cannot store two caches"):
        model(input_ids=ids, past_key_values=static)


# Calls


@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_as_alone(adapters: dict[str, str]) -> None:
    model = made(adapters, **DEEP)
    model.add_adapter("sharp", nbpeft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, top_k_lora=1))
    model.add_adapter("plain", nbpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names, ids = ["default", "__base__", "sharp", "plain", "default"], tokens(5)
    model.eval()
    found = model(input_ids=ids, adapter_names=names).logits
    beams = model.generate(input_ids=ids, adapter_names=names, **GENERATE, num_beams=2)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with model.disable_adapter() if name == "__base__" else model.use(name):
            assert_close(found[row], logits(model, one)[0])
            assert torch.equal(beams[row], model.generate(input_ids=one, **GENERATE, num_beams=2)[0]), name
    model.base_model.set_adapter(["default", "plain"])
    assert (logits(model, ids) - found).abs().amax((1, 2)).min() > 1e-3


@torch.no_grad()
def test_two_that_begin_at_other_layers_share_a_first_pass(adapters: dict[str, str], tmp_path: Path) -> None:
    own = {"whole": adapters, "values": saved(tmp_path, 2, target_modules=["v_proj"])}
    found = []
    for names in (("whole", "values"), ("values", "whole")):
        model = get_peft_model(llama(), nbpeft.XLoraConfig(adapters=own[names[0]], task_type="CAUSAL_LM"), names[0])
        model.add_adapter(names[1], nbpeft.XLoraConfig(adapters=own[names[1]], task_type="CAUSAL_LM"))
        for name in names:
            randomize(model, name, seed=len(name))
        model.base_model.set_adapter(["whole", "values"])
        calls: list[int] = []
        model.get_base_model().model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(logits(model.eval()))
        assert len(calls) == 2
    assert_close(*found)


def test_the_base_model_called_by_itself_acts_likewise(adapters: dict[str, str]) -> None:
    model = made(adapters)
    base, expected = model.get_base_model(), logits(model)
    assert torch.equal(logits(base), expected)
    with pytest.raises(AttributeError):
        base(input_ids=tokens(), attention_mask="none")
    assert not model.manager.active_state.live.context
    with model.disable_adapter():
        assert torch.equal(logits(base), logits(llama()))
    model.delete_adapter("default")
    assert not base._forward_pre_hooks and not base._forward_hooks


@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_computes_with_the_weights_of_the_call(whole: bool, adapters: dict[str, str]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made(adapters, use_trainable_adapters=True, **DEEP).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        called = model if whole else model.get_base_model()
        called(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None
        assert_close(found, expected)
    assert min(one.abs().max() for one in gradients[0] if one is not None) > 0


def test_reentrant_checkpointing_is_refused(adapters: dict[str, str]) -> None:
    model = made(adapters).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with pytest.raises(AdapterError, match="does not train with reentrant gradient checkpointing"):
        loss.backward()


def test_copies_and_pickles_give_the_same(adapters: dict[str, str]) -> None:
    model = made(adapters)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        twin.set_topk_lora(1)
        assert model.internal_xlora_classifier.config.top_k_lora is None
        assert not torch.equal(logits(twin), expected)


def test_training_changes_the_classifier_alone(adapters: dict[str, str], tmp_path: Path) -> None:
    model = made(adapters, sharp=1.0)
    before = state(model)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(4)]
    train(model, rows, max_steps=2, output_dir=str(tmp_path), report_to=[], learning_rate=0.1)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed and all("internal_xlora_classifier" in name for name in changed)
    found = forecast(llama(), nbpeft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters))
    assert found.peak_bytes > 0


# Files


def test_a_folder_holds_the_adapters_and_needs_no_other(tmp_path: Path) -> None:
    own = saved(tmp_path / "sources", 2)
    model = made({"law": own["0"], "code": own["1"]}, use_trainable_adapters=True)
    randomize(model, seed=4, scale=0.2)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "sources")
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "moved")), expected)
    alone = peft.PeftModel.from_pretrained(llama(), tmp_path / "moved" / "1").eval()
    found = logits(PeftModel.from_pretrained(llama(), tmp_path / "moved" / "1"))
    assert_close(found, logits(alone))


def test_other_places_of_the_adapters_can_be_given(adapters: dict[str, str], tmp_path: Path) -> None:
    model = made(adapters)
    model.save_pretrained(tmp_path)
    swapped = {"0": adapters["1"], "1": adapters["0"], "2": adapters["2"]}
    loaded = PeftModel.from_pretrained(llama(), tmp_path, adapters=swapped)
    assert loaded.peft_config["default"].adapters == swapped  # type: ignore[attr-defined]
    assert not torch.equal(logits(loaded), logits(model))
    with pytest.raises(ConfigError, match="adapters has 1 entries, and the classifier of the file weighs 3"):
        PeftModel.from_pretrained(llama(), tmp_path, adapters={"0": adapters["0"]})


def test_a_file_of_peft_is_read_and_what_it_lacks_is_told(adapters: dict[str, str], tmp_path: Path) -> None:
    """PEFT takes ``layers.0`` of its classifier for a part of the adapter 0 and leaves it out of its file.

    In folders beside it, one for each adapter, it saves the base model.
    """
    _, theirs = both(adapters)
    theirs.save_pretrained(tmp_path / "short")
    assert not load_file(tmp_path / "short" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no tensors"):
        PeftModel.from_pretrained(llama(), tmp_path / "short")
    _, theirs = both(adapters, **DEEP | {"xlora_depth": 8})
    theirs.save_pretrained(tmp_path / "long")
    with pytest.warns(UserWarning, match="internal_xlora_classifier.layers.0.bias"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "long")
    own, expected = classifier_of(loaded), classifier_of(theirs)
    equal = {name for name in expected if torch.equal(own[name], expected[name])}
    assert {name.split(".")[1] for name in expected.keys() - equal} == {"0", "2"}
    loaded.internal_xlora_classifier.load_state_dict(theirs.internal_xlora_classifier.state_dict())
    assert_close(logits(loaded), logits(theirs))


def test_a_failed_start_leaves_the_model_as_it_was(adapters: dict[str, str]) -> None:
    base = llama()
    before = state(base)
    with pytest.raises(CheckpointError):
        get_peft_model(base, nbpeft.XLoraConfig(adapters={**adapters, "3": "no/such/folder"}))
    assert same_state(state(base), before) and not base._forward_pre_hooks


# Where PEFT is wrong


def test_peft_neither_checkpoints_nor_caches(adapters: dict[str, str]) -> None:
    """What checkpointing computes again has no weights in PEFT: torch finds other tensors, or gradients are others."""
    gradients = []
    for checkpointing in (False, True):
        _, theirs = both(adapters, use_trainable_adapters=True)
        if checkpointing:
            theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            theirs.enable_input_require_grads()
        theirs.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append(next(one.grad for name, one in theirs.named_parameters() if ".lora_A." in name))
    assert (gradients[0] - gradients[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        peft.get_peft_model(llama(), peft.XLoraConfig(hidden_size=32, adapters=adapters))


def test_names_other_than_numbers_mean_the_adapters(adapters: dict[str, str]) -> None:
    """PEFT looks for them among numbers."""
    ours, theirs = both({f"field{name}": source for name, source in adapters.items()})
    numbered, _ = both(adapters)
    assert torch.equal(logits(ours), logits(numbered))
    with pytest.raises(KeyError):
        logits(theirs)


def test_a_bias_is_weighed_with_its_adapter(tmp_path: Path) -> None:
    """In PEFT it has the weight 1, in the first pass as well, which then is not that of the base model."""
    ours, theirs = both(saved(tmp_path, 2, lora_bias=True))
    for model in (ours, theirs):
        model.internal_xlora_classifier.layers[0].weight.data.zero_()
        model.internal_xlora_classifier.layers[0].bias.data.copy_(torch.tensor([40.0, -40.0]))
    assert (logits(ours) - logits(theirs)).abs().max() > 0.01
    alone = PeftModel.from_pretrained(llama(), tmp_path / "expert0")
    assert_close(logits(ours), logits(alone))


@torch.no_grad()
def test_an_adapter_whose_steps_are_modules_is_weighed_likewise(adapters: dict[str, str]) -> None:
    layer = next(iter(made(adapters).manager.layers.values()))
    expert, x, weight = layer.adapter("default").inner_adapters["0"], torch.randn(2, 5, 32), torch.rand(2, 5, 1)
    output = layer.get_base_layer()(x)
    for given in (weight, 0.25, None):
        expert.bind(observed=None)
        plain = xlora._weighed(expert, x, output, layer.base, given)
        expert.bind(observed={})
        assert_close(xlora._weighed(expert, x, output, layer.base, given), plain)


def test_names_in_a_file_are_those_of_peft() -> None:
    here, in_peft = "base_model.model.h.0.q_proj", "base_model.lora_model.model.h.0.q_proj"
    names = {
        f"{here}.0.lora_A": f"{in_peft}.lora_A.0.weight",
        f"{here}.1.lora_B": f"{in_peft}.lora_B.1.weight",
        f"{here}.1.lora_B_bias": f"{in_peft}.lora_B.1.bias",
        f"{here}.10.lora_embedding_B": f"{in_peft}.lora_embedding_B.10",
        "base_model.internal_xlora_classifier.layers.0.bias": "base_model.internal_xlora_classifier.layers.0.bias",
    }
    config: Any = None
    packed = xlora._packed(config, dict.fromkeys(names, torch.ones(1)))
    assert list(packed) == list(names.values()) and list(xlora._unpacked(config, packed)) == list(names)


def test_weights_are_those_of_the_tokens_of_an_output(adapters: dict[str, str]) -> None:
    adapter = next(iter(made(adapters).manager.layers.values())).adapter("default")
    weights = torch.rand(2, 9, len(adapter.state.numbers), 3)
    own = weights[:, :, adapter.number]
    assert torch.equal(adapter._of_tokens(weights, torch.zeros(2, 9, 32)), own)
    assert torch.equal(adapter._of_tokens(weights, torch.zeros(18, 32)), own.flatten(0, 1))
    for shape in ((17, 32), (18, 1, 32), (9, 2, 32)):
        with pytest.raises(AdapterError, match=r"X-LoRA weighs the \(2, 9\) tokens of a call"):
            adapter._of_tokens(weights, torch.zeros(shape))


def test_the_first_pass_gives_each_adapter_the_weight_that_was_set(adapters: dict[str, str]) -> None:
    """PEFT lets ``top_k_lora`` choose among equal weights."""
    model = made(adapters, scaling_pass_value=0.5, top_k_lora=1)
    seen: list[Any] = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(module.base))
    state_of = model.manager.shared("default")
    assert state_of is not None and state_of.first_context == 0.5  # type: ignore[attr-defined]
    logits(model)
    assert len(seen) == 2


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"xlora_depth": 0}, "xlora_depth must be a positive whole number"),
        ({"xlora_dropout_p": 1.5}, "xlora_dropout_p must be between 0 and 1"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be above 0"),
        ({"top_k_lora": 0}, "top_k_lora must be a positive whole number"),
        ({"adapters": ["a"]}, "adapters must be"),
        ({"hidden_size": "large"}, "hidden_size must be a whole number"),
        ({"global_scaling_weight": float("nan")}, "global_scaling_weight must be a finite number"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nbpeft.XLoraConfig(**fields)


def test_softmaxes_that_do_not_fit_are_told() -> None:
    with pytest.warns(UserWarning, match="both enabled"):
        nbpeft.XLoraConfig(enable_softmax_topk=True, top_k_lora=2)
    with pytest.warns(UserWarning, match="`top_k_lora` is not set"):
        nbpeft.XLoraConfig(enable_softmax_topk=True, enable_softmax=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "hidden_size = 64, but the hidden states of LlamaForCausalLM have 32 features"),
        ({"top_k_lora": 4}, "top_k_lora = 4 is more than the 3 adapters"),
        ({"adapters": {}}, "adapters must map the name of each LoRA"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict[str, Any], message: str, adapters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(llama(), nbpeft.XLoraConfig(**{"adapters": adapters} | fields))


def prompt(folder: Path) -> str:
    get_peft_model(llama(), nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(
        folder / "prompt"
    )
    return str(folder / "prompt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "'0' is no plain LoRA: it has DoRA at model.layers.0.self_attn.q_proj"),
        ({"modules_to_save": ["lm_head"]}, "'0' trains 'lm_head' as a whole"),
        ({"bias": "all"}, "'0' trains .* as a whole"),
        ({"init_lora_weights": "pissa"}, r"'0' starts in the weights of the base \('pissa'\)"),
        (None, "'0' is of type PROMPT_TUNING, and X-LoRA weighs LoRA adapters"),
    ],
)
def test_adapters_that_cannot_be_weighed_are_refused(
    fields: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    own = {"0": prompt(tmp_path)} if fields is None else saved(tmp_path, 1, **fields)
    with pytest.raises(ConfigError, match=f"adapters: {message}"):
        get_peft_model(llama(), nbpeft.XLoraConfig(adapters=own))


def test_layers_without_tokens_are_refused(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(4, 4, 3)

    get_peft_model(Net(), nbpeft.LoraConfig(r=2, target_modules=["conv"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'0' is on conv, a Conv1d, whose input is no tokens"):
        get_peft_model(Net(), nbpeft.XLoraConfig(adapters={"0": str(tmp_path)}, hidden_size=4))


def test_one_adapter_on_gpt2_acts_as_alone(tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    alone = get_peft_model(gpt2(), nbpeft.LoraConfig(r=2, **targets)).eval()
    alone.save_pretrained(tmp_path)
    model = get_peft_model(gpt2(), nbpeft.XLoraConfig(adapters={"0": str(tmp_path)}, task_type="CAUSAL_LM")).eval()
    assert_close(logits(model), logits(alone))
    assert torch.equal(*(one.generate(input_ids=tokens(), **GENERATE) for one in (model, alone)))


def test_an_encoder_and_decoder_are_refused(adapters: dict[str, str]) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 97}
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        get_peft_model(T5ForConditionalGeneration(T5Config(**sizes)), nbpeft.XLoraConfig(adapters=adapters))


def test_it_is_no_weight(adapters: dict[str, str], tmp_path: Path) -> None:
    model = made(adapters)
    before = logits(model)
    with pytest.raises(MergeError, match="X-LoRA weights its adapters for each token"):
        model.merge_adapter()
    model.add_adapter("plain", nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="is X-LoRA, which cannot be combined"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both")
    model.save_pretrained(tmp_path)
    with pytest.raises(NbpeftError):
        nbpeft.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model.eval()), before)


def test_parameters_without_data_are_not_filled() -> None:
    with FakeTensorMode():
        fake = torch.zeros(2)
    real = torch.zeros(2)
    for parameter in (fake, torch.zeros(2, device="meta"), real):
        xlora._fill(parameter, torch.ones(2))
    assert torch.equal(real, torch.ones(2))
