"""Valid adapter folders to start from, and the tiny base they go on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbpeft import LoraConfig, get_peft_model
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.errors import NbpeftError

CONFIG, WEIGHTS, LEGACY = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=32,
    num_attention_heads=2,
    vocab_size=40,
    max_position_embeddings=32,
)
KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(target_modules=["q_proj", "v_proj"]),
    "pattern": dict(target_modules=r".*layers\.\d+.*(q_proj|down_proj)$", exclude_modules=r".*\.1\..*down.*"),
    "dora": dict(target_modules=["o_proj", "up_proj"], use_dora=True),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
    "ranks": dict(target_modules=["q_proj", "k_proj"], rank_pattern={r"0\..*q_proj": 3}, alpha_pattern={"k_proj": 5}),
    "tokens": dict(target_modules=["v_proj"], trainable_token_indices=[1, 7]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], bias="none"),
    "layers": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "pissa": dict(target_modules=["q_proj"], init_lora_weights="pissa_niter_2"),
}


METHODS: dict[str, Method] = {method.label: method for method in methods() if method.sample_configs}


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


def write_starts(folder: Path) -> None:
    """The base into ``base``, each kind into a folder of its name, the first also as a ``.bin``."""
    base_model().save_pretrained(folder / "base")
    for kind, fields in KINDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base_model(), LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            model.save_pretrained(str(folder / kind))
        path = folder / kind / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "base")}))
    (folder / "legacy").mkdir()
    (folder / "legacy" / CONFIG).write_text((folder / "lora" / CONFIG).read_text())
    torch.save(safetensors.torch.load_file(folder / "lora" / WEIGHTS), folder / "legacy" / LEGACY)


def write_method_starts(folder: Path, label: str) -> list[Path]:
    """One folder for each sample config of a method that goes on the base."""
    made: list[Path] = []
    for name, fields in METHODS[label].sample_configs.items():
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **fields}
        names = METHODS[label].config_class.__dataclass_fields__
        if "target_modules" in names and label != "LN tuning" and not METHODS[label].transforms_calls:
            settings.setdefault(
                "target_modules", ["embed_tokens"] if label == "trainable tokens" else ["q_proj", "v_proj"]
            )
        torch.manual_seed(1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(base_model(), METHODS[label].config_class(**settings))
                model.save_pretrained(str(folder / name))
        except NbpeftError:
            continue  # it needs a larger layer, or data
        path = folder / name / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "base")}))
        made.append(folder / name)
    return made
