"""Models of transformers and diffusers take configs of nbpeft by the one word replaced, without the name ``peft``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft as integration

import nbpeft
from nbpeft.errors import NotSupportedError
from nbpeft.training.transformers import trainer_patch
from nbpeft.training.transformers.adapter_mixins import explaining, methods_with_imports
from tests.closeness import assert_close
from tests.tiny_models import llama, logits


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a PEFT that is not released."""
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", peft.__version__)


@pytest.fixture
def no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a newer PEFT than the installed one, whichever that is."""
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99")


def adapted(library: Any, folder: Path) -> list[Any]:
    """What a model of transformers gives while adapters are added, chosen, saved, read and deleted."""
    model, found = llama(), []

    def note(*more: Any) -> None:
        found.append([logits(model)[0, -1, :5].tolist(), *more])

    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
        model.add_adapter(library.LoraConfig(**fields), adapter_name=name)
        model.eval()
        note(model.active_adapters(), sorted(model.peft_config))
    model.disable_adapters()
    note()
    model.enable_adapters()
    model.set_adapter("one")
    note(sorted(model.get_adapter_state_dict()))
    model.save_pretrained(folder)
    model.load_adapter(str(folder), adapter_name="three")
    model.set_adapter(["one", "three"])
    note(sorted(path.name for path in folder.iterdir()))
    model.delete_adapter(["two", "two"])
    note(sorted(model.peft_config))
    model.delete_adapter(["one", "three"])
    note(hasattr(model, "peft_config"))
    return found


@pytest.mark.filterwarnings("ignore:there is no adapter 'two'")
def test_adapters_are_added_to_models_of_transformers_as_pefts(any_peft: None, tmp_path: Path) -> None:
    theirs, ours = adapted(peft, tmp_path / "peft"), adapted(nbpeft, tmp_path / "nbpeft")
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one[0], other[0])
        assert one[1:] == other[1:]
    assert sys.modules["peft"] is peft


@pytest.mark.usefixtures("no_peft")
@pytest.mark.parametrize("config", ["strange", peft.LoraConfig()])
def test_other_configs_are_answered_as_ever(config: Any) -> None:
    with pytest.raises(ValueError, match="The version of PEFT you are using is not compatible"):
        llama().add_adapter(config)


def test_without_peft_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = llama()
    model.add_adapter(nbpeft.LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]


@pytest.mark.usefixtures("no_peft")
def test_the_first_config_is_taken_and_none_when_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method is looked up before its argument is made."""
    model, fields = llama(), {"target_modules": ["q_proj"]}
    signature = inspect.signature(model.add_adapter)
    nbpeft.unpatch_trainer()
    try:
        nbpeft.LoraConfig()
        with pytest.raises(ValueError, match="The version of PEFT you are using is not compatible"):
            model.add_adapter(nbpeft.LoraConfig(**fields))
        monkeypatch.setattr(trainer_patch, "_declined", False)
        model.add_adapter(nbpeft.LoraConfig(**fields), adapter_name="first")
        assert model.active_adapters() == ["first"] and inspect.signature(model.add_adapter) == signature
    finally:
        nbpeft.patch_trainer()


class Mixin:
    """As that of diffusers."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> str:
        from peft import PeftConfig

        if not isinstance(adapter_config, PeftConfig):
            raise TypeError(f"adapter_config should be an instance of PeftConfig. Got {type(adapter_config)} instead.")
        return adapter_name

    def kinds(self, *configs: Any, wanted: str = "LoraConfig") -> list[bool]:
        from peft import PeftConfig
        from peft.tuners import lora

        return [isinstance(config, PeftConfig) and hasattr(lora, wanted) for config in configs]


def test_a_library_that_cannot_take_them_says_what_to_do() -> None:
    add = explaining(Mixin.add_adapter)
    with pytest.raises(NotSupportedError, match=r"call nbpeft.install_as_peft\(\) in a new process") as raised:
        add(Mixin(), nbpeft.LoraConfig())
    assert isinstance(raised.value.__cause__, TypeError)
    assert add(Mixin(), peft.LoraConfig(), adapter_name="one") == "one"
    with pytest.raises(TypeError, match="should be an instance of PeftConfig"):
        add(Mixin(), "strange")


def test_an_error_about_another_argument_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_adapter(self: object, adapter_config: Any, adapter_name: str = "default") -> None:
        raise ValueError(f"Adapter with name {adapter_name} already exists.")

    monkeypatch.setitem(sys.modules, "peft", nbpeft)
    with pytest.raises(ValueError, match="Adapter with name one already exists") as raised:
        explaining(add_adapter)(Mixin(), nbpeft.LoraConfig(), "one")
    assert not isinstance(raised.value, NotSupportedError)


def test_methods_import_from_the_library_that_an_argument_is_of() -> None:
    kinds = methods_with_imports(Mixin, lambda value: value == "ours")["kinds"]
    ours, theirs = nbpeft.LoraConfig(), peft.LoraConfig()
    assert kinds(Mixin(), ours, theirs) == kinds(Mixin(), ours, theirs, wanted="LoraLayer") == [True, False]
    assert kinds(Mixin(), theirs) == [True] and kinds(Mixin(), theirs, "ours") == [False, False]
