"""The arguments of a training that are stored with its run, and those that a resumed run reuses.

An argument is stored as a plain value, or by its name as an object that has to be given again. A run's folder may come
from someone else, so only listed arguments are reused: those that affect the losses or what is shown during the
training. Where files are written and what is published or reported is up to the user, so those arguments are only
named. Arguments on neither list may affect the losses, and have to be given again.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from nbpeft.names import ROW_OPTIONS
from nbpeft.training.objectives.objective import fields_by_name

_TAKEN_OVER = frozenset(
    {
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
        *("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "use_cpu", "full_determinism"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cache", "torch_empty_cache_steps"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "loss_chunk_size", "recompute"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
        *("seed", "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last"),
        *("dataloader_in_order", "dataloader_pin_memory", "fsdp", "fsdp_config"),
        *("ignore_data_skip", "remove_unused_columns", "label_names", "include_num_input_tokens_seen"),
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("eval_accumulation_steps", "batch_eval_metrics", "prediction_loss_only", "include_for_metrics"),
        *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
        *("max_length", "packing", "columns", "separator", "skip_bad", "members", "patience", "sample", "every"),
        *("metric", "max_score_rows", "max_new_tokens", "halving", "stop_on_divergence", "objective", "reference"),
        *ROW_OPTIONS,
        "eval_by",
    }
)
"""Arguments that affect the losses or what is shown during the training."""
_COUNTS = ("processes", "dataloader_num_workers")
"""Arguments that start processes; values up to the number of this machine's processors are accepted."""
_OUTSIDE = frozenset(
    {
        *("output_dir", "logging_dir", "run_name", "report_to", "track", "project", "trackio_space_id", "push_to_hub"),
        *("trackio_bucket_id", "trackio_static_space_id", "overwrite_output_dir", "save_on_each_node"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "enable_jit_checkpoint"),
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "debug", "skip_memory_metrics"),
        *("do_train", "do_eval", "do_predict", "local_rank", "dataloader_num_workers", "dataloader_prefetch_factor"),
        *("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        *("data", "model", "tokenizer", "data_hint", "adapter", "control", "publish", "run_factory", "run_dir", "ctx"),
        *("trainer_class", "arguments_class", "resume_from_checkpoint", "background", "keep", "restart", "replace"),
        *("replaced", "tracked", "run", "variable", "source"),
    }
)
"""Arguments that do not affect the losses: where something is written or reported, how rows are fetched, and those
with which ``train`` is called again."""


def plain(value: Any) -> Any:
    """Converts a value to types of JSON and of Python's literals; a value without such a form is returned unchanged."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_plain_value(value: Any) -> bool:
    """Whether JSON can represent a value exactly."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain_value(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain_value, value))
    return value is None or isinstance(value, bool | int | float | str)


def to_keep(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments as plain values, and the names of those without such a form.

    Args:
        given: the arguments of a training.
    """
    values = {name: plain(value) for name, value in given.items()}
    kept = {name: value for name, value in values.items() if is_plain_value(value)}
    return kept, [name for name in values if name not in kept]


def to_take_over(kept: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the stored arguments of a run into those that a resumed training reuses and the others.

    Args:
        kept: the arguments as read from the run's folder.
    """
    stored = {str(name): value for name, value in kept.items()} if isinstance(kept, Mapping) else {}
    taken = {name: value for name, value in stored.items() if _is_taken_over(name, value)}
    return taken, {name: value for name, value in stored.items() if name not in taken}


def missing_for_losses(left_out: Mapping[str, Any]) -> list[str]:
    """The names of arguments that are not reused, may affect the losses, and have a value other than a default."""
    return [
        name
        for name, value in left_out.items()
        if name not in _OUTSIDE and not name.startswith("hub_") and value not in (None, False, [], {})
    ]


def _is_taken_over(name: str, value: Any) -> bool:
    if name == "eval_data":  # a number of rows to hold out; data sources named in a file are not opened
        return isinstance(value, int | float)
    if name in _COUNTS:
        return isinstance(value, int) and value <= (os.cpu_count() or 1)
    if name == "fsdp_config":  # a text would be the path of a file
        return isinstance(value, Mapping)
    return name in _TAKEN_OVER or name in fields_by_name()
