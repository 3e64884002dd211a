"""Where PEFT's attributes of wrappers are defined, and that every wrapper has them."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import nbpeft
from nbpeft._util.push_to_hub import PushesToHub
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.runtime.manager import require_manager
from nbpeft.peft_layers.commands import PeftWrapper
from nbpeft.peft_layers.configs import PeftConfigAttributes
from nbpeft.peft_layers.copies import PeftCopies
from nbpeft.peft_layers.layers import PeftLayer, PeftParameter
from tests.tiny_models import llama

ROOT = Path(__file__).parents[2]
PROVIDERS = (PeftConfigAttributes, PeftWrapper, PeftLayer, PeftParameter, PeftCopies)


def defined(cls: type) -> set[str]:
    """What a class defines in its own source."""
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    plain = {target.id for part in node.body if isinstance(part, ast.Assign) for target in part.targets}  # type: ignore[attr-defined]
    return plain | {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_wrappers_of_the_engine_define_none_of_them(provider: type) -> None:
    wrapper = provider.__bases__[0]
    assert defined(provider) and defined(provider).isdisjoint(defined(wrapper))
    assert all(vars(wrapper)[name] is vars(provider)[name] for name in defined(provider))


def test_a_config_of_the_engine_has_of_pefts_methods_only_those_for_files() -> None:
    of_peft = {name for name in dir(peft.PeftConfig) if not name.startswith("__")} - set(peft.PeftConfig().to_dict())
    assert of_peft & {*defined(AdapterConfig), *defined(PushesToHub)} == {
        "from_pretrained",
        "push_to_hub",
        "save_pretrained",
        "to_dict",
    }
    assert {"is_prompt_learning", "from_peft_type"} <= of_peft
    assert all(hasattr(nbpeft.PeftConfig, name) for name in of_peft if not name.startswith("_"))


def test_the_engine_does_not_name_the_attributes_of_models() -> None:
    named = [file for file in (ROOT / "nbpeft" / "engine").rglob("*.py") if "peft_config" in file.read_text("utf-8")]
    assert not named


def test_models_have_them_while_they_are_adapted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    nbpeft.inject_adapter_in_model(nbpeft.LoraConfig(target_modules=["0"]), model)
    assert list(model.peft_config) == ["default"]
    require_manager(model).unload(merge=False)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("config", "learns"),
    [
        (nbpeft.LoraConfig(), (False, False)),
        (nbpeft.PrefixTuningConfig(num_virtual_tokens=2), (True, False)),
        (nbpeft.AdaptionPromptConfig(), (False, True)),
    ],
)
def test_configs_tell_what_they_learn_by_pefts_names(config: AdapterConfig, learns: tuple[bool, bool]) -> None:
    assert (config.is_prompt_learning, config.is_adaption_prompt) == learns  # type: ignore[attr-defined]
    assert getattr(peft, type(config).__name__)().is_prompt_learning == learns[0]


def test_a_model_that_is_unpickled_in_a_fresh_process_has_them(tmp_path: Path) -> None:
    """Its file refers to classes of the engine alone."""
    torch.save(nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"])), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "layers = [m for m in model.modules() if hasattr(m, 'merged_names')]\n"
        "print(len(layers) > 0, all(layer.merged_adapters == [] for layer in layers))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
