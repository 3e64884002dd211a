"""nbpeft: parameter-efficient fine-tuning in Jupyter.

In a notebook ``%load_ext nbpeft`` brings ``%%lora``, ``%lora`` and ``%%lora_train``. In Python the
names below are those of PEFT. Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbpeft.hooks import when_adapted

__version__ = "0.1.0"

_HOMES = {
    "nbpeft.model": (
        "AdapterPool",
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "DoraCaching",
        "LayerStatus",
        "LoraConfig",
        "LoraLayer",
        "LoraRuntimeConfig",
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
    ),
    "nbpeft.training": (
        "Run",
        "RunCallback",
        "RunControl",
        "TrainResult",
        "Trainer",
        "adapter_trainer",
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "patch_trainer",
        "prepare_model_for_kbit_training",
        "train",
        "unpatch_trainer",
    ),
    "nbpeft.memory": ("Forecast", "forecast"),
    "nbpeft.session": ("Session", "get_session", "session", "track"),
    "nbpeft.state": ("AdapterState", "MemoryState", "ModelState", "SessionState", "TrainState"),
    "nbpeft.errors": (
        "AdapterError",
        "AdapterExistsError",
        "BaseMismatchError",
        "BusyError",
        "CellError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "CorruptCheckpointError",
        "HotSwapError",
        "LayerKindError",
        "MergeError",
        "NbpeftError",
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
        "StaleModelError",
        "TargetError",
        "TrainingError",
        "UnknownAdapterError",
        "UnknownMethodError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from nbpeft.errors import (
        AdapterError,
        AdapterExistsError,
        BaseMismatchError,
        BusyError,
        CellError,
        CheckpointError,
        CheckpointNotFoundError,
        ConfigError,
        CorruptCheckpointError,
        HotSwapError,
        LayerKindError,
        MergeError,
        NbpeftError,
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
        StaleModelError,
        TargetError,
        TrainingError,
        UnknownAdapterError,
        UnknownMethodError,
    )
    from nbpeft.memory.forecast import Forecast, forecast
    from nbpeft.model import (
        AdapterPool,
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        DoraCaching,
        LayerStatus,
        LoraConfig,
        LoraLayer,
        LoraRuntimeConfig,
        ModelStatus,
        ModulesToSaveWrapper,
        PeftConfig,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftType,
        TaskType,
        cast_adapter_dtype,
        cast_mixed_precision_params,
        check_if_peft_model,
        delete_adapter,
        disable_input_dtype_casting,
        get_base_model_state_dict,
        get_layer_status,
        get_model_status,
        get_peft_config,
        get_peft_model,
        get_peft_model_state_dict,
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        load_quantized,
        merge_errors,
        merge_to_folder,
        prepare_model_for_compiled_hotswap,
        quantize_model,
        rescale_adapter_scale,
        set_adapter,
        set_base_model_state_dict,
        set_peft_model_state_dict,
        set_requires_grad,
        update_forward_signature,
        update_generate_signature,
        update_signature,
    )
    from nbpeft.session import Session, get_session, session, track
    from nbpeft.state import AdapterState, MemoryState, ModelState, SessionState, TrainState
    from nbpeft.training import (
        Run,
        RunCallback,
        RunControl,
        Trainer,
        TrainResult,
        adapter_trainer,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        patch_trainer,
        prepare_model_for_kbit_training,
        train,
        unpatch_trainer,
    )

__all__ = [
    "AdapterError",
    "AdapterExistsError",
    "AdapterPool",
    "AdapterState",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BaseMismatchError",
    "BusyError",
    "CellError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "CorruptCheckpointError",
    "DoraCaching",
    "Forecast",
    "HotSwapError",
    "LayerKindError",
    "LayerStatus",
    "LoraConfig",
    "LoraLayer",
    "LoraRuntimeConfig",
    "MemoryState",
    "MergeError",
    "ModelState",
    "ModelStatus",
    "ModulesToSaveWrapper",
    "NbpeftError",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "Run",
    "RunCallback",
    "RunControl",
    "Session",
    "SessionState",
    "StaleModelError",
    "TargetError",
    "TaskType",
    "TrainResult",
    "TrainState",
    "Trainer",
    "TrainingError",
    "UnknownAdapterError",
    "UnknownMethodError",
    "__version__",
    "adapter_trainer",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "delete_adapter",
    "disable_input_dtype_casting",
    "forecast",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_session",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "load_quantized",
    "merge_errors",
    "merge_to_folder",
    "patch_trainer",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "quantize_model",
    "rescale_adapter_scale",
    "session",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "track",
    "train",
    "unpatch_trainer",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


def _patch_trainer() -> None:
    from nbpeft.training.patching import patch_for_models

    patch_for_models()


when_adapted(_patch_trainer)


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext nbpeft``."""
    from nbpeft.magics import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext nbpeft``: leaves nothing behind; adapters stay in their models."""
    from nbpeft.magics import unload

    unload(shell)
