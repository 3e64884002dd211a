"""Adapters of mixtures as PEFT saved them with transformers 4, where each expert was linear layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny_models import mixture

LAYERS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
EXPERTS = {"mixtral": 4, "qwen3_moe": 6}


def file_of_then(folder: Path, model_type: str, **fields: Any) -> dict[str, Tensor]:
    """Writes an adapter as PEFT did with transformers 4: one pair of factors for each expert, and for the router."""
    base = mixture(model_type)
    block = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    first, second, last = LAYERS[model_type]
    generator = torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {}
    for layer, held in enumerate(base.model.layers):
        wide, hidden = held.mlp.experts.down_proj.shape[2], held.mlp.experts.down_proj.shape[1]
        sizes = {first: (wide, hidden), second: (wide, hidden), last: (hidden, wide)}
        names = {f"experts.{e}.{name}": size for e in range(EXPERTS[model_type]) for name, size in sizes.items()}
        for name, (outside, inside) in {**names, "gate": tuple(held.mlp.gate.weight.shape)}.items():
            stem = f"base_model.model.model.layers.{layer}.{block}.{name}"
            made[f"{stem}.lora_A.weight"] = torch.randn(2, inside, generator=generator) * 0.2
            made[f"{stem}.lora_B.weight"] = torch.randn(outside, 2, generator=generator) * 0.2
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["gate", *LAYERS[model_type]], **fields}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(made, folder / "adapter_model.safetensors")
    return made


def by_hand(model_type: str, tensors: dict[str, Tensor], scaling: float) -> nn.Module:
    """The base with each expert's own product in its rows of the parameters."""
    base = mixture(model_type)
    block = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    first, second, last = LAYERS[model_type]
    with torch.no_grad():
        for layer, held in enumerate(base.model.layers):

            def delta(name: str, layer: int = layer) -> Tensor:
                stem = f"base_model.model.model.layers.{layer}.{block}.{name}"
                return scaling * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]

            held.mlp.gate.weight += delta("gate")
            for e in range(EXPERTS[model_type]):
                held.mlp.experts.gate_up_proj[e] += torch.cat([delta(f"experts.{e}.{one}") for one in (first, second)])
                held.mlp.experts.down_proj[e] += delta(f"experts.{e}.{last}")
    return base
