"""What PEFT pickled whole, read with nbpeft by its name: configs are taken, modules are refused at once, in words."""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest

import nbpeft
from nbpeft.errors import CheckpointError
from tests.tiny_models import llama

LORA: dict[str, Any] = {"target_modules": ["q_proj"]}
PICKLED: dict[str, Callable[[], Any]] = {
    "a model": lambda: peft.get_peft_model(llama(), peft.LoraConfig(**LORA, task_type="CAUSAL_LM")),
    "an injected one": lambda: peft.inject_adapter_in_model(peft.LoraConfig(**LORA), llama()),
    "of another method": lambda: peft.inject_adapter_in_model(peft.LoHaConfig(**LORA), llama()),
    "of tokens": lambda: peft.inject_adapter_in_model(peft.TrainableTokensConfig(token_indices=[1]), llama()),
    "a prompt": lambda: peft.get_peft_model(
        llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ),
    "a tuner": lambda: peft.get_peft_model(llama(), peft.IA3Config(**LORA, feedforward_modules=[])).base_model,
    "a copy": lambda: (
        peft.get_peft_model(llama(), peft.LoraConfig(**LORA, modules_to_save=["lm_head"])).base_model.model.lm_head
    ),
}


class Renamed(pickle.Unpickler):
    """As where nbpeft answers by the name ``peft``."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "peft":
            return super().find_class(module, name)
        return getattr(importlib.import_module(f"nbpeft{module.removeprefix('peft')}"), name)


@pytest.mark.parametrize("what", PICKLED)
@pytest.mark.filterwarnings("ignore")
def test_modules_are_refused_at_once(what: str) -> None:
    data = pickle.dumps(PICKLED[what]())
    with pytest.raises(CheckpointError, match=r"pickled by PEFT.*save the adapter with save_pretrained\(\)"):
        Renamed(io.BytesIO(data)).load()


def test_configs_are_taken() -> None:
    read = Renamed(io.BytesIO(pickle.dumps(peft.LoraConfig(**LORA, task_type="CAUSAL_LM")))).load()
    assert read == nbpeft.LoraConfig(**LORA, task_type="CAUSAL_LM")
    assert nbpeft.get_peft_model(llama(), read).active_adapters == ["default"]
