"""PEFT's face over the engine and the files: the names its users know."""

from nbpeft.engine.adapter import AdapterConfig as PeftConfig
from nbpeft.engine.adapter import PeftType, TaskType
from nbpeft.engine.copies import CopiedModule as ModulesToSaveWrapper
from nbpeft.engine.methods.lora.config import LoraConfig, LoraRuntimeConfig
from nbpeft.engine.peft_layer_api import layer_type
from nbpeft.model.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from nbpeft.model.base_state import get_base_model_state_dict, set_base_model_state_dict
from nbpeft.model.combining import Combined
from nbpeft.model.full_precision import MergedFolder, merge_errors, merge_to_folder
from nbpeft.model.functional import (
    DoraCaching,
    cast_adapter_dtype,
    cast_mixed_precision_params,
    delete_adapter,
    get_peft_config,
    set_adapter,
    set_requires_grad,
)
from nbpeft.model.helpers import (
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from nbpeft.model.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from nbpeft.model.peft_model import PeftModel
from nbpeft.model.pool import AdapterPool
from nbpeft.model.pool_residents import PoolStatistics
from nbpeft.model.quantized import load_quantized, quantize_model
from nbpeft.model.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from nbpeft.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from nbpeft.model.tensors import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

LoraLayer = layer_type("LORA", "LoraLayer")

__all__ = [
    "AdapterPool",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Combined",
    "DoraCaching",
    "LayerStatus",
    "LoraConfig",
    "LoraLayer",
    "LoraRuntimeConfig",
    "MergedFolder",
    "ModelStatus",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PoolStatistics",
    "TaskType",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "delete_adapter",
    "disable_input_dtype_casting",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "load_quantized",
    "merge_errors",
    "merge_to_folder",
    "prepare_model_for_compiled_hotswap",
    "quantize_model",
    "rescale_adapter_scale",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]
