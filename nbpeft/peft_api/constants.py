"""``peft.utils.constants``: file names, config keys and the default targets of the methods of nbpeft."""

from __future__ import annotations

import torch

import nbpeft.engine.methods  # noqa: F401 - registers the methods
from nbpeft.engine.config.default_targets import default_targets_of
from nbpeft.engine.contract.peft_types import PeftType
from nbpeft.engine.methods.vectors.ia3 import USUAL_INPUTS

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


TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = default_targets_of("LORA")
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = default_targets_of("IA3")
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = USUAL_INPUTS
