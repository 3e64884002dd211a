"""What public scripts do to PEFT's models, tables and files besides calling its functions, on both libraries."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

import nbpeft
from tests.tiny_models import llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LIBRARIES = pytest.mark.parametrize("library", [peft, nbpeft], ids=["peft", "nbpeft"])


def module_of(library: Any, place: str) -> Any:
    return importlib.import_module(f"{library.__name__}.{place}")


def lora(library: Any, base: nn.Module | None = None, **fields: Any) -> Any:
    """A model with LoRA of drawn values, the same for both libraries."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields
    model = library.get_peft_model(llama() if base is None else base, library.LoraConfig(**settings)).eval()
    randomize_all(model)
    return model


def randomize_all(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


# Files


@LIBRARIES
@pytest.mark.parametrize("saved", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_file_may_have_the_names_of_the_trained_parameters(library: Any, saved: str, tmp_path: Path) -> None:
    model = lora(peft)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    assert any(".lora_A.default." in name for name in trained)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    (torch.save if saved.endswith(".bin") else save_file)(trained, tmp_path / saved)
    torch.testing.assert_close(logits(library.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_those_names_are_read_into_an_adapter_of_that_name_alone(tmp_path: Path) -> None:
    model = lora(peft)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    save_file({name: value.detach() for name, value in model.named_parameters() if "lora_" in name}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(nbpeft.CheckpointError, match="nothing in the checkpoint fits"):
        nbpeft.PeftModel.from_pretrained(llama(), tmp_path, "other")


# Tables


@LIBRARIES
def test_default_targets_can_be_changed_in_the_table(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = module_of(library, "utils.other").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert table is module_of(library, "utils.constants").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "llama", ["o_proj"])
    found = library.get_peft_model(llama(), library.LoraConfig()).targeted_module_names
    assert found == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    ours = library.get_peft_model(llama(), library.LoHaConfig(r=2)).targeted_module_names
    assert "model.layers.0.self_attn.q_proj" in ours, "the table of another method is another one"


@LIBRARIES
def test_so_can_those_of_a_model_that_the_library_does_not_know(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "own"}
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    tables = module_of(library, "utils.constants")
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "own", ["second"])
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, "own", ["first", "second"])
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, "own", ["second"])
    assert library.get_peft_model(Own(), library.LoraConfig()).targeted_module_names == ["second"]
    scaled = library.get_peft_model(Own(), library.IA3Config()).base_model.model
    assert [scaled.first.is_feedforward, scaled.second.is_feedforward] == [False, True]


# Names that PEFT's modules have imported from one another


@pytest.mark.parametrize(
    ("place", "home", "names"),
    [
        ("peft_model", "utils", "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights WEIGHTS_NAME"),
        ("peft_model", "tuners.tuners_utils", "BaseTuner BaseTunerLayer"),
        ("tuners.lora.model", "import_utils", "is_bnb_available is_bnb_4bit_available"),
        ("tuners.lora.model", "utils", "_get_submodules ModulesToSaveWrapper"),
        ("tuners.lora.layer", "utils.other", "transpose"),
        ("tuners.lora.config", "utils", "PeftType"),
        ("tuners.ia3.layer", "tuners.tuners_utils", "BaseTunerLayer check_adapters_to_merge"),
    ],
)
def test_names_can_be_imported_from_where_peft_uses_them(place: str, home: str, names: str) -> None:
    for name in names.split():
        for library in (peft, nbpeft):
            assert getattr(module_of(library, place), name) is getattr(module_of(library, home), name)
    assert not hasattr(nbpeft, "is_bnb_available"), "the package itself has its own names alone"


# Models


@LIBRARIES
def test_hooks_and_a_forward_of_the_tuner_run(library: Any) -> None:
    model, seen = lora(library), []
    before = logits(model)
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    torch.testing.assert_close(logits(model), before)
    assert seen == ["LoraModel"]
    hook.remove()
    model.train()
    model.base_model.register_forward_hook(lambda module, args, output: seen.append(float(output.loss)))
    assert float(model(input_ids=tokens(), labels=tokens()).loss) == pytest.approx(seen[-1])
    model = lora(library)
    inner = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: (seen.append("mine"), inner(*args, **kwargs))[1]
    torch.testing.assert_close(logits(model), before)
    assert seen[-1] == "mine"


@LIBRARIES
def test_the_settings_of_generate_can_be_replaced_on_the_handle(library: Any) -> None:
    model = lora(library)
    model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.generate(input_ids=tokens()).shape == (2, 11)
    model.generation_config.max_new_tokens = 3
    assert model.generate(input_ids=tokens()).shape == (2, 12)
    assert model.get_base_model().generation_config is model.generation_config
