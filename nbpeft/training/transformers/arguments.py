"""Training arguments by name, with defaults for notebooks."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError, cut, did_you_mean, few, in_one_line
from nbpeft.training.transformers.argument_source import NOTEBOOK_DEFAULTS, OTHER_NAMES

_GIVEN_BY_TRAIN = {"self", "model", "args", "train_dataset", "eval_dataset", "processing_class", "model_init", "kwargs"}

_LEAST = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"), 0),
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha", "warmup_steps", "warmup_ratio", "eval_delay"), 0),
    **dict.fromkeys(("dataloader_num_workers", "seed"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval_accumulation_steps", "save_total_limit", "torch_empty_cache_steps", "ddp_timeout"), 1),
}
"""The smallest values of fields that the arguments class does not check."""
_MOST = {"label_smoothing_factor": 1, "warmup_ratio": 1, "seed": 2**32 - 1}
"""The greatest values of such fields."""
_BELOW_ONE = ("adam_beta1", "adam_beta2")
_STEPS = ("logging_steps", "eval_steps", "save_steps")
"""Fields with a whole number of steps, or a share of all steps."""

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a dictionary",
    type(None): "None",
}
"""Types of values that are checked -> their name in messages."""
_ACCEPTED: dict[type, tuple[type, ...]] = {
    str: (str, os.PathLike, Enum),
    list: (list, tuple),
    dict: (Mapping,),
}
_CALLED = ("data_collator", "compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
_LONGEST_REASON, _SHOWN_CHOICES = 250, 12


def split_arguments(
    given: Mapping[str, Any],
    trainer_class: type[Any],
    arguments_class: type[TrainingArguments],
    *,
    others: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates keywords of the arguments class from those of the Trainer's constructor.

    Args:
        given: the keywords.
        trainer_class: the Trainer class.
        arguments_class: ``TrainingArguments`` or a subclass.
        others: further names that a message may suggest, such as the fields of objectives.

    Returns:
        The fields of the arguments class, and the options of the Trainer.

    Raises:
        ConfigError: a name belongs to neither; the message suggests similar names.
    """
    fields = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    options: set[str] = set()
    for cls in trainer_class.__mro__:
        if "__init__" in vars(cls):
            options |= set(inspect.signature(vars(cls)["__init__"]).parameters)
    options -= _GIVEN_BY_TRAIN | {"kwargs", "args"}
    for name in given:
        if name not in fields and name not in options:
            other = OTHER_NAMES.get(name)
            hint = f" Did you mean {other!r}?" if other else did_you_mean(name, [*fields, *options, *others])
            if name in {field.name for field in dataclasses.fields(LoraConfig)}:
                hint = " It is a field of an adapter: set it where the adapter is added."
            raise ConfigError(f"{name!r} is not a field of {arguments_class.__name__}.{hint}", name=name)
    return (
        {name: value for name, value in given.items() if name in fields},
        {name: value for name, value in given.items() if name not in fields},
    )


def build_arguments(
    fields: Mapping[str, Any], arguments_class: type[TrainingArguments], *, folder: str, evaluates: bool
) -> TrainingArguments:
    """Creates the arguments object, with defaults for notebooks and ``folder`` as that of ``output_dir``.

    By default nothing is reported, printed or saved, and each step's loss is logged. Evaluation data is evaluated once
    per epoch.

    Raises:
        ConfigError: values contradict each other or are invalid.
    """
    values: dict[str, Any] = NOTEBOOK_DEFAULTS | {
        "train_sampling_strategy": "random",  # the Trainer's own value: rows are grouped by nbpeft's GroupedByLength
        "output_dir": folder,
        "eval_strategy": "epoch" if evaluates else "no",
        "use_cpu": not _has_accelerator(),
        "dataloader_pin_memory": _has_accelerator(),
    }
    if fields.get("load_best_model_at_end"):
        if not evaluates:
            raise ConfigError("load_best_model_at_end needs evaluation data: pass eval_data=…")
        values["eval_strategy"] = fields.get("eval_strategy", "steps" if "eval_steps" in fields else "epoch")
        values["save_strategy"] = values["eval_strategy"]
        if "eval_steps" in fields:
            values["save_steps"] = fields["eval_steps"]
        values["save_total_limit"] = 1
    elif evaluates and "eval_steps" in fields:
        values["eval_strategy"] = "steps"
    keeps = str(getattr(fields.get("save_strategy", "no"), "value", fields.get("save_strategy", "no"))) != "no"
    if keeps and "output_dir" not in fields and not fields.get("load_best_model_at_end"):
        raise ConfigError(
            f"save_strategy={fields['save_strategy']!r} writes checkpoints: set their folder with output_dir=…"
        )
    check_values(fields, arguments_class)
    if fields.get("resume_from_checkpoint") is True and "output_dir" not in fields:
        raise ConfigError(
            "resume_from_checkpoint=True needs output_dir=…, the folder of the checkpoints",
            field="resume_from_checkpoint",
        )
    values.update(_current_names(fields, arguments_class))
    known = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    try:
        return arguments_class(**{name: value for name, value in values.items() if name in known})
    except Exception as error:
        raise _impossible(reason_of(error), fields) from error


def changed_arguments(arguments: TrainingArguments, fields: Mapping[str, Any]) -> TrainingArguments:
    """A copy with other values, for a running training; constructing a new object would reset accelerate's state.

    Raises:
        ConfigError: a value is invalid.
    """
    check_values(fields, type(arguments))
    copied = copy.copy(arguments)
    for name, value in fields.items():
        kind = type(getattr(arguments, name))
        try:
            setattr(copied, name, kind(value) if issubclass(kind, Enum) else value)
        except ValueError as error:
            raise _impossible(reason_of(error), fields) from error
    return copied


def reason_of(error: Exception) -> str:
    """The message of another library's error, in one line of limited length."""
    text = in_one_line(error)
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__}: {text}"
    return cut(text, _LONGEST_REASON)


def _impossible(reason: str, fields: Mapping[str, Any]) -> ConfigError:
    """The error for arguments that the arguments class refuses; for an unknown value of an enum it suggests others."""
    unknown = re.match(r"(.+) is not a valid (\w+)", reason)
    name = next((name for name, value in fields.items() if unknown and str(value) == unknown[1].strip("'")), None)
    if unknown is None or name is None:
        return ConfigError(f"Invalid training arguments: {reason}")
    value = str(fields[name])
    choices = _choices(unknown[2])
    expected = did_you_mean(value, choices) or (
        f" It is one of: {few(choices, _SHOWN_CHOICES, quoted=False)}" if choices else ""
    )
    return ConfigError(f"{name} {value!r:.60} is unknown.{expected}", field=name, value=value)


def _choices(enum: str) -> list[str]:
    """The values of one of transformers' enums."""
    from transformers import trainer_utils, training_args

    enum_class = getattr(trainer_utils, enum, None) or getattr(training_args, enum, None)
    return (
        [str(item.value) for item in enum_class]
        if isinstance(enum_class, type) and issubclass(enum_class, Enum)
        else []
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of a Trainer with a wrong type, which the Trainer would notice only during training.

    Raises:
        ConfigError: an option has a wrong type.
    """
    for name in _CALLED:
        value = options.get(name)
        if value is not None and not callable(value):
            raise ConfigError(f"{name} must be a function, not {value!r:.60}", field=name)
    pair = options.get("optimizers", (None, None))
    if not isinstance(pair, list | tuple) or len(pair) != 2 or any(not _is_none_or_steps(part) for part in pair):
        raise ConfigError(
            f"optimizers must be an optimizer and a scheduler, each or None, not {pair!r:.60}", field="optimizers"
        )
    callbacks = options.get("callbacks")
    if callbacks is None:
        return
    if not isinstance(callbacks, list | tuple) or not all(_is_callback(item) for item in callbacks):
        raise ConfigError(f"callbacks must be a list of TrainerCallbacks, not {callbacks!r:.60}", field="callbacks")


def _is_none_or_steps(part: Any) -> bool:
    return part is None or hasattr(part, "step")


def _is_callback(item: Any) -> bool:
    return isinstance(item, TrainerCallback) or (isinstance(item, type) and issubclass(item, TrainerCallback))


def check_values(fields: Mapping[str, Any], arguments_class: type[TrainingArguments]) -> None:
    """Refuses a value of another type than its field's, and a number out of range.

    Raises:
        ConfigError: a value is invalid.
    """
    for field in dataclasses.fields(arguments_class):
        if field.name not in fields:
            continue
        name, value = field.name, fields[field.name]
        kinds = _kinds_of(field.type)
        if name in ("resume_from_checkpoint", "fsdp") and value is True:  # valid, though not in the field's type
            continue
        if kinds and not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(_WORDS[kind] for kind in kinds if kind is not type(None))
            raise ConfigError(f"{name} must be {wanted}, not {_shown(value)}", field=name, value=value)
        if value is not None and (wanted := _range_missed(name, value)):
            raise ConfigError(f"{name} must be {wanted}, not {_shown(value)}", field=name, value=value)
    _check_duration(fields)
    if fields.get("output_dir") == "":
        raise ConfigError("output_dir must be a folder, not ''", field="output_dir")
    mode, known = fields.get("torch_compile_mode"), torch._inductor.list_mode_options()
    if mode is not None and mode not in known:
        words = did_you_mean(str(mode), known) or f" It is one of: {', '.join(known)}"
        raise ConfigError(f"torch_compile_mode {mode!r:.60} is unknown.{words}", field="torch_compile_mode")


def _range_missed(name: str, value: Any) -> str:
    """The range of a field that does not contain a value; empty if it does."""
    if name in _STEPS and not (0 < value < 1 or (value >= 1 and value == int(value))):
        return "a whole number of at least 1, or a share of all steps between 0 and 1"
    if name in _LEAST and value < _LEAST[name]:
        return f"at least {_LEAST[name]}"
    if name in _MOST and value > _MOST[name]:
        return f"at most {_MOST[name]}"
    return "less than 1" if name in _BELOW_ONE and value >= 1 else ""


def _check_duration(fields: Mapping[str, Any]) -> None:
    """Refuses a number of steps or epochs with which a Trainer would make one step, or none."""
    steps, epochs = fields.get("max_steps", -1), fields.get("num_train_epochs", 1)
    if steps < 1 and steps != -1:
        raise ConfigError(
            f"max_steps must be at least 1, not {steps}; leave it out to train num_train_epochs", field="max_steps"
        )
    if epochs <= 0 and steps == -1:
        raise ConfigError(f"num_train_epochs must be greater than 0, not {epochs}", field="num_train_epochs")


def _kinds_of(annotation: Any) -> tuple[type, ...]:
    """The types that a field takes; empty if one of them cannot be checked."""
    if isinstance(annotation, str):
        annotation = {"int": int, "float": float, "bool": bool, "str": str}.get(annotation)
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    parts = typing.get_args(annotation) if union else (annotation,)
    kinds = tuple(typing.get_origin(part) or part for part in parts)
    kinds = tuple(str if isinstance(kind, type) and issubclass(kind, Enum) else kind for kind in kinds)
    return tuple(dict.fromkeys(kinds)) if all(kind in _WORDS for kind in kinds) else ()


def _fits(value: Any, kind: type) -> bool:
    if kind in (bool, type(None)):
        return isinstance(value, kind)
    if kind in (int, float):
        number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        return number and bool(abs(value) <= (2**63 - 1 if kind is int else sys.float_info.max))  # NaN is not
    return isinstance(value, _ACCEPTED.get(kind, kind)) or type(value) not in _WORDS  # e.g. an AcceleratorConfig


def _shown(value: Any) -> str:
    return "an integer of more than 64 bits" if isinstance(value, int) and value.bit_length() > 64 else f"{value!r:.60}"


def _current_names(fields: Mapping[str, Any], arguments_class: type[TrainingArguments]) -> dict[str, Any]:
    """Fields with the names of the installed transformers: 5.24 renamed checkpointing and warns about the old name."""
    known = {field.name for field in dataclasses.fields(arguments_class)}
    renamed = {}
    for name, value in fields.items():
        newer = name.replace("gradient_checkpointing", "activation_checkpointing")
        renamed[newer if newer in known else name] = value
    return renamed


def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())
