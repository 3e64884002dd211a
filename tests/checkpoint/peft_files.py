"""Files as peft writes them, and what it expects in them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from nbpeft.checkpoint import Expected


class Mixed(nn.Module):
    """A linear layer, a convolution, an embedding, and names that contain each other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.lora_A = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)
        self.underscore = nn.Linear(8, 3)


def saved_by_peft(model: nn.Module, folder: Path, **fields: Any) -> peft.PeftModel:
    """The model with peft's adapter on it, its tensors random, saved into the folder."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder))
    return adapted


def expected_by_peft(adapted: peft.PeftModel, bias: str = "none") -> Expected:
    """What peft's own model consists of, in the engine's words."""
    names = {"lora_A": "weight", "lora_B": "weight", "lora_magnitude_vector": "weight"}
    model = adapted.get_base_model()
    adapters: dict[str, dict[str, tuple[int, ...]]] = {}
    copies: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            shapes = adapters.setdefault(path, {})
            for name in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"):
                held = getattr(module, name)
                if "default" not in held:
                    continue
                tensor = held["default"].weight if name in names else held["default"]
                shapes[name] = tuple(tensor.shape)
                if getattr(held["default"], "bias", None) is not None and name == "lora_B":
                    shapes["lora_B_bias"] = tuple(held["default"].bias.shape)
        elif isinstance(module, ModulesToSaveWrapper):
            copies[path] = shapes_of(module.modules_to_save["default"].state_dict())
    base: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        plain = name.replace("base_layer.", "").replace("original_module.", "")
        owned = ".lora_B." in name or ".modules_to_save." in name
        if plain.endswith(".bias") and not owned and (bias == "all" or (bias == "lora_only" and plain != name)):
            base[plain] = tuple(parameter.shape)
    return Expected(adapters, copies, base)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
