"""Small things that PEFT does and that code written for it relies on."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import nbpeft
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.contract.adapter import TaskType
from nbpeft.engine.runtime.adapter_tensors import is_training
from nbpeft.model import (
    LoraConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from nbpeft.model.from_data.observing import evaluated
from tests.closeness import assert_close
from tests.tiny_models import adapted, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def trained(model: nn.Module, name: str) -> set[bool]:
    """Whether the factors of an adapter take gradients, of nbpeft or of PEFT."""
    marks = (f"_A.{name}.", f"_B.{name}.")
    return {p.requires_grad for key, p in model.named_parameters() if any(mark in key for mark in marks)}


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_loaded_adapter_takes_gradients_as_in_peft(tmp_path: Path, is_trainable: bool) -> None:
    adapted().save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ours: Any = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for model in (theirs, ours):
        model.load_adapter(tmp_path, "second", is_trainable=is_trainable)
        assert trained(model, "default") == {True}
        assert trained(model, "second") == {is_trainable}
        assert model.active_adapters == ["default"]
        model.set_adapter("second")
        assert trained(model, "second") == {True}
        assert trained(model, "default") == {False}


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize(("chosen", "deleted"), [(["a"], "a"), (["a"], "b"), (["a", "b"], "a"), (["b"], "b")])
def test_what_is_active_after_another_is_deleted_takes_gradients(
    tmp_path: Path, chosen: list[str], deleted: str, is_trainable: bool
) -> None:
    adapted().save_pretrained(tmp_path)
    found = []
    for library in (peft, nbpeft):
        model: Any = library.PeftModel.from_pretrained(llama(), tmp_path, "a", is_trainable=is_trainable)
        for name in "bc":
            model.load_adapter(tmp_path, name)
        if chosen != ["a"]:
            model.base_model.set_adapter(chosen, inference_mode=not is_trainable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter(deleted)
        found.append(({name: trained(model, name) for name in model.peft_config}, model.active_adapters))
    assert found[0] == found[1]
    assert deleted not in chosen or all(found[0][0][name] == {True} for name in found[0][1])


def test_tensors_of_another_shape_that_are_skipped_are_named_and_missing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    tensors[first] = torch.zeros(9, 32)
    save_file(tensors, file)
    for library in (peft, nbpeft):
        model = library.PeftModel.from_pretrained(llama(), tmp_path, config=None, ignore_mismatched_sizes=True)
        for load in (
            partial(library.set_peft_model_state_dict, model, tensors),
            partial(model.load_adapter, tmp_path, "default"),
        ):
            with pytest.warns(UserWarning, match=r"q_proj\.lora_A"):
                missing = load(ignore_mismatched_sizes=True).missing_keys
            assert [key for key in missing if "lora_" in key] == [first.replace(".weight", ".default.weight")]


def test_so_does_one_that_replaces_another(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.load_adapter(tmp_path, "second")
    assert trained(model, "second") == {False}
    model.load_adapter(tmp_path, "second", is_trainable=True)
    assert trained(model, "second") == {True}
    assert trained(model, "default") == {False}


class Headed(nn.Module):
    """A classifier whose head has a name that no task expects."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.verdict = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        verdict: Tensor = self.verdict(self.body(input_ids).relu())
        return verdict


def test_a_classifier_of_a_config_without_a_task_may_have_another_head() -> None:
    settings: dict[str, Any] = {"target_modules": ["body"], "init_lora_weights": False}
    peft.PeftModelForSequenceClassification(Headed(), peft.LoraConfig(**settings))
    with pytest.warns(UserWarning, match="no module classifier or score: if its head"):
        model = PeftModelForSequenceClassification(Headed(), LoraConfig(**settings))
    assert model(input_ids=torch.randn(2, 4)).shape == (2, 2)
    assert model.peft_config["default"].task_type == TaskType.SEQ_CLS
    with pytest.warns(UserWarning, match="no module classifier or score"):
        model.add_adapter("second", LoraConfig(**settings))


def test_the_usual_head_is_trained_without_a_task_and_loads_again(tmp_path: Path) -> None:
    def bert() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
        ).eval()

    model = PeftModelForSequenceClassification(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert isinstance(again, PeftModelForSequenceClassification)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_in_a_state_dict_are_written_whatever_the_config_has(bias: str) -> None:
    trained_one: Any = peft.get_peft_model(llama(), peft.LoraConfig(**settings(bias="all")))
    with torch.no_grad():
        for name, parameter in trained_one.named_parameters():
            if name.endswith(".bias") or "lora_" in name:
                parameter.add_(0.5)
    tensors = peft.get_peft_model_state_dict(trained_one)
    assert any(key.endswith("q_proj.base_layer.bias") for key in tensors)
    assert any(key.endswith("k_proj.bias") for key in tensors)
    theirs: Any = peft.get_peft_model(llama(), peft.LoraConfig(**settings(bias=bias)))
    ours = get_peft_model(llama(), LoraConfig(**settings(bias=bias)))
    peft.set_peft_model_state_dict(theirs, tensors)
    result = set_peft_model_state_dict(ours, tensors)
    assert not result.unexpected_keys and not result.missing_keys
    assert_close(logits(ours.eval()), logits(theirs.eval()))
    assert_close(logits(ours), logits(trained_one.eval()))


def settings(**changes: Any) -> dict[str, Any]:
    return {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}


def test_those_of_a_whole_model_are_the_other_base_s_own() -> None:
    source, target = adapted(), adapted(llama(seed=1))
    set_peft_model_state_dict(target, source.state_dict())
    bias = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(target.get_base_model().get_parameter(bias), llama(seed=1).get_parameter(bias))
    mine, its = get_peft_model_state_dict(target), get_peft_model_state_dict(source)
    assert all(torch.equal(mine[key], its[key]) for key in its)


TIED = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
]


def told(library: Any, base: nn.Module, **changes: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library.get_peft_model(base, library.LoraConfig(**settings(**changes)))
    return [str(warning.message) for warning in caught if "tie_word_embeddings" in str(warning.message)]


@pytest.mark.parametrize("changes", TIED, ids=str)
def test_tied_embeddings_are_told_where_peft_tells_them(changes: dict[str, Any]) -> None:
    assert len(told(peft, llama(tie_word_embeddings=True), **changes)) == 1
    (line,) = told(nbpeft, llama(tie_word_embeddings=True), **changes)
    targets = changes.get("target_modules", ["embed_tokens"])
    assert line.startswith("model.embed_tokens and lm_head share one weight")
    assert ("changes each separately" in line) == (len(targets) == 2)
    assert len(targets) == 2 or f"only {'model.' if targets == ['embed_tokens'] else ''}{targets[0]}" in line
    assert not told(nbpeft, llama(tie_word_embeddings=False), **changes)


@pytest.mark.parametrize("changes", [{}, {"trainable_token_indices": [1]}], ids=str)
def test_nothing_is_told_where_they_stay_alike(changes: dict[str, Any]) -> None:
    assert not told(nbpeft, llama(tie_word_embeddings=True), **changes)


def heard(library: Any, use: Callable[[Any], object], **changes: Any) -> list[str]:
    """What is told while a model with an adapter, and a second one, is used."""
    model = library.get_peft_model(llama(), library.LoraConfig(**settings(**changes)))
    model.add_adapter("second", library.LoraConfig(**settings()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use(model)
    return [str(warning.message) for warning in caught]


def disables(model: Any) -> None:
    with model.disable_adapter():
        pass


def deletes_the_active_one(model: Any) -> None:
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]


TOLD: list[tuple[Callable[[Any], object], dict[str, Any], str, str]] = [
    (
        disables,
        {"bias": "all"},
        "Careful, disabling",
        "'default' trained the base model's biases (bias='all'), which stay",
    ),
    (
        lambda model: model.base_model.disable_adapter_layers(),
        {"bias": "lora_only"},
        "Careful, disabling",
        "'default' trained the base model's biases (bias='lora_only'), which stay",
    ),
    (
        deletes_the_active_one,
        {},
        "was active which is now deleted",
        "active adapter 'default' was deleted: 'second' is",
    ),
    (
        lambda model: model.save_pretrained(tempfile.mkdtemp(), selected_adapters=["default"]),
        {"target_modules": ["embed_tokens"]},
        "Setting `save_embedding_layers` to `True`",
        "embedding layers found in `target_modules`, model.embed_tokens: whole embeddings are saved too",
    ),
]


@pytest.mark.parametrize(("use", "changes", "theirs", "ours"), TOLD)
def test_what_peft_warns_of_is_told(use: Any, changes: dict[str, Any], theirs: str, ours: str) -> None:
    assert any(theirs in line for line in heard(peft, use, **changes))
    assert [line for line in heard(nbpeft, use, **changes) if ours in line]
    others = [line for line in heard(nbpeft, use) if ours.partition(" ")[2] in line]
    assert bool(others) is (changes == {})


def test_nothing_is_told_of_what_was_asked_for(tmp_path: Path) -> None:
    for embeddings in (True, False):
        use = partial(PeftModel.save_pretrained, save_directory=tmp_path, save_embedding_layers=embeddings)
        assert not heard(nbpeft, use, target_modules=["embed_tokens"])
    assert not heard(nbpeft, lambda model: model.delete_adapter("second"))


def test_a_grouped_convolution_is_told_when_it_is_adapted_as_in_peft() -> None:
    for library, line in ((peft, "Merging is not supported"), (nbpeft, "0 cannot be merged: it is a Conv2d with 2")):
        with pytest.warns(UserWarning, match=line):
            library.get_peft_model(
                nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), library.LoraConfig(r=4, target_modules=["0"])
            )


@pytest.mark.parametrize(("count", "adapted_layers"), [(24, 2), (19, 19)])
@pytest.mark.parametrize("numbers", [0, [0]])
def test_many_paths_are_names_in_the_chosen_layers(
    count: int, adapted_layers: int, numbers: int | list[int], tmp_path: Path
) -> None:
    """PEFT condenses twenty and more paths before it asks which layers are meant; a path alone is always meant."""

    def base() -> Any:
        return llama(num_hidden_layers=12)

    paths = [name for name, _ in base().named_modules() if name.endswith(("q_proj", "v_proj"))][:count]
    fields: dict[str, Any] = {"target_modules": paths, "layers_to_transform": numbers, "init_lora_weights": False}
    ours = get_peft_model(base(), LoraConfig(r=2, **fields)).eval()
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, **fields)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(ours))
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "theirs").eval()), logits(theirs))
    names = set(theirs.base_model.targeted_module_names)
    assert len(names) == adapted_layers
    assert set(ours.manager.layers) == set(again.manager.layers) == names


# Modes


def modes(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Which modules train, of a handle or an injected model of either library."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = base.model.layers[0].self_attn.q_proj
    return {
        "model": (model.training, getattr(model, "base_model", model).training, base.training, base.lm_head.training),
        "layer": (layer.training, layer.base_layer.training, layer.lora_A.training, layer.lora_dropout.training),
        **{name: (layer.lora_dropout[name].training, layer.lora_A[name].training) for name in names},
    }


def stages(library: Any, folder: Path, *, train: bool) -> list[Any]:
    """The modes after each thing that one does with a model that was in one of them."""
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "lora_dropout": 0.5}

    def config() -> Any:
        return library.LoraConfig(**fields, modules_to_save=["lm_head"])

    model = library.get_peft_model(llama().train(train), config())
    found = [modes(model, ("default",))]
    for mode in (False, True, False):
        found.append(modes(model.train(mode), ("default",)))
    model.add_adapter("b", library.LoraConfig(**fields))
    found.append(modes(model, ("default", "b")))
    model.save_pretrained(folder)
    for trainable in (False, True):
        read = library.PeftModel.from_pretrained(llama().train(train), folder, is_trainable=trainable)
        found.append(modes(read, ("default",)))
    read.eval().load_adapter(folder, "b", is_trainable=True)
    found.append(modes(read, ("default", "b")))
    read.load_adapter(folder, "c")
    found.append(modes(read, ("default", "b", "c")))
    injected = library.inject_adapter_in_model(library.LoraConfig(**fields), llama().train(train))
    return [*found, modes(injected, ("default",))]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore")
def test_new_adapters_train_whatever_mode_their_base_is_in(train: bool, tmp_path: Path) -> None:
    theirs, ours = (stages(library, tmp_path / library.__name__, train=train) for library in (peft, nbpeft))
    assert ours == theirs


def test_an_adapter_that_is_made_of_others_is_in_the_mode_of_the_model() -> None:
    """peft's drops then, in a model that was put into evaluation mode."""
    model = adapted(name="one", lora_dropout=0.5)
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    model.eval()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", "exact")
    model.manager.copy("one", "copy")
    assert [is_training(model.manager.layers, name) for name in model.manager.names] == [False] * 4
    model.train()
    model.manager.copy("one", "another")
    assert is_training(model.manager.layers, "another")


def test_running_a_model_to_see_what_its_layers_get_leaves_every_mode() -> None:
    model = adapted(llama().eval())
    model.get_base_model().train(False)
    model.manager.layers["model.layers.0.self_attn.q_proj"].adapters.train()
    before = [(module, module.training) for module in called_modules(model)]
    with evaluated(model):
        assert not any(module.training for module in called_modules(model))
    assert before == [(module, module.training) for module in called_modules(model)]
    assert {mode for _, mode in before} == {True, False}


def test_names_may_be_given_twice() -> None:
    for names in (["one", "one"], ["one", "two", "one"], ("one",)):
        model = adapted(name="one")
        for other in ("two", "three"):
            model.add_adapter(other, LoraConfig(target_modules=["q_proj"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter(names)
        assert list(model.peft_config) == [name for name in ("one", "two", "three") if name not in names]
        model.set_adapter(["three", "three"])
        assert model.active_adapters == ["three"]


def of_both(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What something is for nbpeft and for PEFT."""
    return make(nbpeft), make(peft)


def two_layers(library: Any, **changes: Any) -> Any:
    """A config for the layers of ``nn.Sequential``."""
    return library.LoraConfig(**{"target_modules": ["0", "1"], "r": 2, **changes})


def model_of_two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("bare", [True, False])
def test_missing_keys_are_the_model_s_names(bare: bool) -> None:
    def result(library: Any) -> tuple[list[str], list[str]]:
        config = two_layers(library)
        if bare:
            model = library.inject_adapter_in_model(config, model_of_two(), "default_0")
        else:
            model = library.get_peft_model(model_of_two(), config, "default_0")
        name = "default_0"
        tensors = dict(library.get_peft_model_state_dict(model, adapter_name=name))
        first = next(iter(tensors))
        tensors[first.replace("0.", "9.")] = tensors.pop(first)
        found = library.set_peft_model_state_dict(model, tensors, name)
        return [key for key in found.missing_keys if "base_layer" not in key], found.unexpected_keys

    ours, theirs = of_both(result)
    assert ours == theirs
    assert ours[0] == [f"{'' if bare else 'base_model.model.'}0.lora_A.default_0.weight"]


def test_so_are_those_of_a_loaded_adapter(tmp_path: Path) -> None:
    model = get_peft_model(model_of_two(), two_layers(nbpeft, use_dora=True))
    tensors = dict(get_peft_model_state_dict(model))
    setattr(model, "state_dict", dict)  # noqa: B010  # one that names no adapter is not asked
    model.save_pretrained(tmp_path)
    tensors.pop("base_model.model.1.lora_magnitude_vector")
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="1 adapter key is missing"):
        found = model.load_adapter(tmp_path, "other")
    assert found.missing_keys == ["base_model.model.1.lora_magnitude_vector.other.weight"]


def test_the_config_that_is_given_is_filled_in() -> None:
    def facts(library: Any) -> list[Any]:
        base, config, second, third = llama(), *(library.LoraConfig(task_type="CAUSAL_LM") for _ in range(3))
        base.name_or_path = base.config._name_or_path = "base"
        model = library.get_peft_model(base, config, revision="main")
        model.add_adapter("second", second)
        library.inject_adapter_in_model(third, injected := llama())
        return [
            model.peft_config["default"] is config,
            model.peft_config["second"] is second,
            injected.peft_config["default"] is third,
            *(set(one.target_modules) for one in (config, second, third)),
            config.base_model_name_or_path,
            config.revision,
        ]

    ours, theirs = of_both(facts)
    assert ours == theirs and ours[:3] == [True, True, True]


def test_a_config_given_to_a_second_model_is_what_was_given() -> None:
    config = LoraConfig(target_modules="all-linear", r=2)
    small = get_peft_model(model_of_two(), config)
    config.r = 3
    large = get_peft_model(nn.Sequential(*model_of_two(), nn.Linear(4, 4)), config)
    assert config.target_modules == {"0", "1"} and small.peft_config["default"] is config
    assert set(large.base_model.targeted_module_names) == {"0", "1", "2"}
    assert large.peft_config["default"].r == 3
    large.add_adapter("twin", large.peft_config["default"])
    assert large.peft_config["twin"] is not large.peft_config["default"]


def test_a_config_is_as_it_was_where_the_adapter_is_refused() -> None:
    config = LoraConfig(target_modules=["nowhere"], task_type="CAUSAL_LM")
    before = config.to_dict()
    with pytest.raises(nbpeft.TargetError):
        get_peft_model(llama(), config)
    assert config.to_dict() == before


def test_a_compiled_model_is_its_inner_one() -> None:
    compiled: Any = torch.compile(model_of_two(), backend="eager")
    assert nbpeft.inject_adapter_in_model(two_layers(nbpeft), compiled) is compiled
    tensors = get_peft_model_state_dict(compiled)
    inner = peft.inject_adapter_in_model(two_layers(peft), model_of_two())
    assert tensors.keys() == peft.get_peft_model_state_dict(inner).keys()
    assert set_peft_model_state_dict(compiled, tensors) == ([], [])
    again: Any = torch.compile(model_of_two(), backend="eager")
    nbpeft.inject_adapter_in_model(LoraConfig(r=2), again, state_dict=tensors)
    assert set_peft_model_state_dict(again, tensors) == ([], [])
    x = torch.ones(1, 4)
    again.load_state_dict(compiled.state_dict())
    assert torch.equal(again(x), compiled(x))


def test_a_state_dict_put_on_a_model_is_asked(tmp_path: Path) -> None:
    def saved(library: Any) -> float:
        model = library.get_peft_model(model_of_two(), two_layers(library))
        tensors = {key: value + 1 for key, value in model.state_dict().items()}
        model.state_dict = lambda *args, **kwargs: tensors
        model.save_pretrained(folder := tmp_path / library.__name__)
        kept = load_file(folder / "adapter_model.safetensors")
        alone = library.get_peft_model_state_dict(model)
        return sum(float(value["base_model.model.0.lora_B.weight"].sum()) for value in (kept, alone))

    ours, theirs = of_both(saved)
    assert ours == theirs == 16


def test_hooks_on_the_state_dict_run_when_an_adapter_is_saved(tmp_path: Path) -> None:
    def halve(module: Any, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
        tensors |= {key: tensor / 2 for key, tensor in tensors.items() if "lora_" in key}

    def saved(library: Any) -> tuple[float, int]:
        model, called = library.get_peft_model(model_of_two(), two_layers(library)), []
        model.load_state_dict({key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()})
        model.register_state_dict_pre_hook(lambda *arguments: called.append(True))
        model._register_state_dict_hook(halve)
        model.save_pretrained(folder := tmp_path / library.__name__)
        kept = load_file(folder / "adapter_model.safetensors")
        alone = library.get_peft_model_state_dict(model)
        return sum(float(value["base_model.model.0.lora_B.weight"].sum()) for value in (kept, alone)), len(called)

    ours, theirs = of_both(saved)
    assert ours == theirs == (8.0, 2)


def test_what_training_writes_into_a_config_is_not_what_was_given() -> None:
    fields: dict[str, Any] = {"target_modules": ["0"], "init_r": 2, "target_r": 1, "total_step": 9}
    config, plain = nbpeft.AdaLoraConfig(**fields), LoraConfig(target_modules=["0"], r=2)
    for one, name in ((config, "rank_pattern"), (plain, "alpha_pattern")):
        get_peft_model(model_of_two(), one)
        getattr(one, name)["0"] = [True, False] if one is config else 4
    again: Any = [get_peft_model(model_of_two(), one).peft_config["default"] for one in (config, plain)]
    assert not again[0].rank_pattern and again[1].alpha_pattern == {"0": 4}


def test_a_config_that_an_adapter_was_loaded_with_stays_that_models(tmp_path: Path) -> None:
    get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    other = llama()
    other.name_or_path = "other/base"
    second = get_peft_model(other, loaded.peft_config["default"])
    assert second.peft_config["default"] is not loaded.peft_config["default"]
    assert loaded.peft_config["default"].base_model_name_or_path != "other/base"


def test_what_fails_on_one_model_forgets_no_config_of_another() -> None:
    config = nbpeft.LoraConfig(target_modules="all-linear")
    first = get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ZeroDivisionError), first.manager.transaction():
        first.add_adapter("more", nbpeft.LoraConfig(target_modules=["v_proj"]))
        second = get_peft_model(llama(), config)
        raise ZeroDivisionError
    third = get_peft_model(llama(num_hidden_layers=3), config)
    assert second.peft_config["default"] is config is not third.peft_config["default"]
    assert len(third.targeted_module_names) == 3 * len(second.targeted_module_names) // 2


@pytest.mark.parametrize("library", [peft, nbpeft])
def test_an_injected_adapter_has_the_dtype_of_its_model(library: Any) -> None:
    def dtypes(put: Callable[[nn.Module, Any], nn.Module]) -> set[torch.dtype]:
        model = put(llama().bfloat16(), library.LoraConfig(target_modules=["q_proj"]))
        return {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}

    assert dtypes(lambda model, config: library.inject_adapter_in_model(config, model)) == {torch.bfloat16}
    assert dtypes(lambda model, config: library.LoraModel(model, config, "default")) == {torch.bfloat16}
    assert dtypes(library.get_peft_model) == {torch.float32}


@pytest.mark.parametrize("library", [peft, nbpeft])
@pytest.mark.parametrize("computed", [None, torch.float32, torch.bfloat16])
def test_an_injected_adapter_has_the_dtype_that_4_bit_layers_compute_in(library: Any, computed: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=computed)
    layer.weight = bnb.nn.Params4bit(torch.ones(64, 64, dtype=torch.bfloat16), requires_grad=False)
    model = nn.Sequential(layer.to("cpu"))
    library.inject_adapter_in_model(library.LoraConfig(target_modules=["0"]), model)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert dtypes == {computed or torch.float32}


@pytest.mark.parametrize("library", [peft, nbpeft])
def test_an_adapter_that_layers_have_active_is_deleted_from_the_model(library: Any) -> None:
    model = llama()
    for name in ("one", "two"):
        library.inject_adapter_in_model(library.LoraConfig(target_modules=["q_proj"]), model, name)
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:  # as transformers' set_adapter
        layer.set_adapter(["one", "two"])
    importlib.import_module(f"{library.__name__}.functional").delete_adapter(model, "one", "lora_")
    assert [layer.active_adapters for layer in layers] == [["two"]] * len(layers)


def distilbert() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(**shape, num_labels=3))


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (distilbert, {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}),
        (distilbert, {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ],
)
def test_modules_whose_names_end_with_a_saved_one_are_loaded_from_its_files(
    make: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **more)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = nbpeft.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    ids = torch.arange(8)[None]
    assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("path", ["classifier", "head.classifier"])
def test_a_tensor_that_a_saved_module_does_not_have_is_unexpected(path: str, tmp_path: Path) -> None:
    def whole(bias: bool) -> Any:
        head = nn.Linear(4, 3, bias=bias)
        outer, _, inner = path.partition(".")
        return nn.ModuleDict({"q": nn.Linear(4, 4), outer: nn.ModuleDict({inner: head}) if inner else head})

    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"])
    peft.get_peft_model(whole(bias=True), config).save_pretrained(str(tmp_path))
    model = nbpeft.get_peft_model(whole(bias=False), nbpeft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.warns(UserWarning, match="unexpected"):
        result = model.load_adapter(tmp_path, "saved")
    assert result.unexpected_keys == [f"base_model.model.{path}.bias"]
    assert model.peft_config["saved"].modules_to_save == ["classifier"]


def test_all_of_a_head_is_trained_for_its_task() -> None:
    config = {"r": 2, "task_type": "SEQ_CLS", "target_modules": ["q_lin"]}
    models = [library.get_peft_model(distilbert(), library.LoraConfig(**config)) for library in (nbpeft, peft)]
    ours, theirs = ({name for name, p in model.named_parameters() if p.requires_grad} for model in models)
    assert ours == theirs and any("pre_classifier" in name for name in ours)
