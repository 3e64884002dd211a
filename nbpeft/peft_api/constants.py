"""``peft.utils.constants``: file names, config keys and the default targets of the methods of nbpeft."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import nbpeft.engine.methods  # noqa: F401 - registers the methods
from nbpeft.engine.config.targets import usual_model_types
from nbpeft.engine.contract.peft_types import PeftType
from nbpeft.engine.contract.registry import config_class_of, methods_of_type

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
CONFIG_KEYS_TO_CHECK = {PeftType("LORA"): ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
"""Fields that must be equal for hot-swapping in PEFT; nbpeft allows differences and checks what has to fit."""
ENABLE_DORA_CACHING = True
VARIANT_KWARG_KEYS = ["alora_offsets"]
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


@cache
def usual_targets_of(peft_type: str) -> dict[str, Any]:
    """Returns model type -> default targets of a method; the same dictionary each time."""
    usual = methods_of_type(peft_type)[0].default_targets
    return {name: targets for name in usual_model_types() if (targets := usual(name)) is not None}


def _feedforward_modules(model_type: str) -> Any:
    config: Any = config_class_of("IA3")()
    config.fill_in(model_type)
    return sorted(config.feedforward_modules)


TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = usual_targets_of("LORA")
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = usual_targets_of("IA3")
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    name: _feedforward_modules(name) for name in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
}
"""Changing these tables does not change any defaults: set the targets in the config instead."""
