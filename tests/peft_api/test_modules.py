"""PEFT's import paths under nbpeft's own name, and the names that nbpeft has nothing for."""

from __future__ import annotations

import importlib
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import nbpeft
from nbpeft.engine.contract.registry import methods_of_type
from nbpeft.peft_api.missing import missing
from nbpeft.peft_api.modules import add_import_paths
from nbpeft.peft_api.names import METHODS, MODULES, names_in
from tests.peft_api.processes import run
from tests.tiny_models import llama


def test_a_path_leads_to_the_public_name() -> None:
    for path, name in (
        ("utils.hotswap", "prepare_model_for_compiled_hotswap"),
        ("tuners.lora", "LoraLayer"),
        ("optimizers", "create_loraplus_optimizer"),
        ("helpers", "rescale_adapter_scale"),
        ("functional", "set_adapter"),
        ("utils.other", "ModulesToSaveWrapper"),
        ("utils.save_and_load", "get_peft_model_state_dict"),
        ("peft_model", "PeftModelForCausalLM"),
        ("config", "PeftConfig"),
        ("mapping", "get_peft_config"),
    ):
        assert getattr(importlib.import_module(f"nbpeft.{path}"), name) is getattr(nbpeft, name)


def test_asking_the_package_for_its_file_imports_nothing() -> None:
    """As ``inspect`` asks every module, which torch calls while it is being imported."""
    run("""
        import sys, nbpeft
        nbpeft.install_as_peft()
        import peft
        import os
        assert os.path.dirname(peft.__file__) == os.path.dirname(nbpeft.__file__) and os.path.isfile(peft.__file__)
        assert "nbpeft.model" not in sys.modules
    """)


def test_modules_are_attributes_of_the_packages_they_are_in() -> None:
    module = importlib.import_module("nbpeft.tuners.lora.layer")
    assert vars(sys.modules["nbpeft"])["tuners"].lora.layer is module
    assert getattr(nbpeft, "import_utils").is_bnb_available() is True  # noqa: B009 - type checkers do not know it
    assert module.__doc__ == "The names of PEFT's ``peft.tuners.lora.layer``."
    assert "LoraLayer" in dir(module) and set(module.__all__) == set(names_in("tuners.lora.layer"))


@pytest.mark.parametrize("place", MODULES)
def test_every_name_of_every_module_is_there(place: str) -> None:
    module = importlib.import_module(f"nbpeft.{place}".rstrip("."))
    assert names_in(place), "a module without names is of no use"
    for name in names_in(place):
        assert getattr(module, name) is getattr(module, name) is not None, name


def test_what_is_nowhere_is_an_import_error() -> None:
    assert find_spec("nbpeft.nothing") is None and find_spec("nbpeft.tuners.nothing") is None
    module = importlib.import_module("nbpeft.utils.hotswap")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_one_finder_is_enough() -> None:
    before = list(sys.meta_path)
    add_import_paths()
    assert sys.meta_path == before


def test_a_missing_class_can_be_compared_with_and_not_made() -> None:
    room = importlib.import_module("nbpeft.tuners.lycoris_utils")
    config = room.LycorisConfig
    assert not isinstance(nbpeft.LoraConfig(), config) and config is room.LycorisConfig
    line = "LycorisConfig is not available: nbpeft does not implement it"
    with pytest.raises(nbpeft.NotSupportedError, match=line) as raised:
        config(adapter_len=8)
    assert isinstance(raised.value, NotImplementedError) and raised.value.details == {"name": "LycorisConfig"}
    with pytest.raises(AttributeError, match="LycorisTuner is not available: nbpeft does not implement it"):
        _ = room.LycorisTuner.TEXT
    assert not hasattr(config, "__wrapped__")

    class Derived(config):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(nbpeft.NotSupportedError):
        Derived()


def test_a_model_of_mixed_methods_is_one_like_any_other(tmp_path: Path) -> None:
    first, second = (
        nbpeft.LoraConfig(target_modules=["q_proj"]),
        nbpeft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    )
    model = nbpeft.get_peft_model(llama(), first, "one", mixed=True)
    assert isinstance(model, nbpeft.PeftMixedModel)
    model.save_pretrained(tmp_path)
    loaded = nbpeft.PeftMixedModel.from_pretrained(llama(), tmp_path / "one", "one")
    loaded.add_adapter("two", second)
    loaded.set_adapter(["one", "two"])
    assert loaded.active_adapters == ["one", "two"]


def test_a_missing_function_refuses_and_a_missing_table_is_empty() -> None:
    with pytest.raises(nbpeft.NotSupportedError, match="clone_module is not available: nbpeft does not"):
        importlib.import_module("nbpeft.tuners.tuners_utils").clone_module(None)
    tables = importlib.import_module("nbpeft.utils.constants")
    assert tables.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING == {}
    assert tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"] == ["q_proj", "v_proj"]
    assert tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"] == ["down_proj"]


def test_layers_of_one_name_are_told_apart_by_their_method() -> None:
    rooms = [importlib.import_module(f"nbpeft.tuners.{room}") for room in ("vera", "loha", "lora", "ia3")]
    assert len({room.Linear for room in rooms}) == 4
    assert rooms[0].Linear is importlib.import_module("nbpeft.tuners.vera.layer").Linear
    for package, (title, names) in METHODS.items():
        if "Linear" in names.split() and not methods_of_type(package.upper()):
            room = importlib.import_module(f"nbpeft.tuners.{package}")
            assert missing("Linear", title, f"tuners.{package}") is room.Linear


def test_a_method_that_is_there_is_not_missing() -> None:
    """A row of the table stays when its method is registered: what the method has comes first."""
    for package, (_, names) in METHODS.items():
        for method in methods_of_type(package.upper()):
            title = method.config_class.__name__.removesuffix("Config")
            room = importlib.import_module(f"nbpeft.tuners.{package}")
            if method.transforms_calls:  # it has no layers: what PEFT has in the room is the method's own
                homes = {getattr(room, name).__module__ for name in names.split() if name[0].isupper()}
                assert homes <= {
                    method.adapter_class.__module__,
                    method.config_class.__module__,
                    "nbpeft.model.handle.tuner",
                }
                assert method.config_class.__module__ in homes
                continue
            for name in (f"{title}Config", f"{title}Model"):
                assert name in names.split() and getattr(room, name) is getattr(nbpeft, name), name
                assert getattr(nbpeft, name).__module__.startswith(("nbpeft.engine.", "nbpeft.model.")), name
            assert "adapters" in getattr(room, f"{title}Layer").__doc__


def test_errors_of_missing_names_can_be_pickled() -> None:
    assert isinstance(pickle.loads(pickle.dumps(nbpeft.NotSupportedError("no"))), nbpeft.NotSupportedError)
