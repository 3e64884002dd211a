"""Training arguments by name, with defaults that suit a notebook."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from nbpeft.errors import ConfigError, did_you_mean

_GIVEN_BY_TRAIN = {"self", "model", "args", "train_dataset", "eval_dataset", "processing_class", "model_init", "kwargs"}

_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "steps": "max_steps",
    "total_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "evaluation_strategy": "eval_strategy",
    "output": "output_dir",
    "max_seq_length": "max_length",
}
"""What people type for names that spell quite differently."""


_LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
"""Smallest values of fields that the arguments class takes unseen."""


def split_arguments(
    given: Mapping[str, Any], trainer_class: type[Any], arguments_class: type[TrainingArguments]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts keywords into those of the arguments class and those of the Trainer's constructor.

    Raises:
        ConfigError: a name belongs to neither; the message names the near ones.
    """
    fields = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    options: set[str] = set()
    for cls in trainer_class.__mro__:
        if "__init__" in vars(cls):
            options |= set(inspect.signature(vars(cls)["__init__"]).parameters)
    options -= _GIVEN_BY_TRAIN | {"kwargs", "args"}
    for name in given:
        if name not in fields and name not in options:
            other = _OTHER_NAMES.get(name)
            hint = f" Did you mean {other!r}?" if other else did_you_mean(name, [*fields, *options])
            raise ConfigError(f"{name!r} is not a field of {arguments_class.__name__}.{hint}", name=name)
    return (
        {name: value for name, value in given.items() if name in fields},
        {name: value for name, value in given.items() if name not in fields},
    )


def build_arguments(
    fields: Mapping[str, Any], arguments_class: type[TrainingArguments], *, folder: str, evaluates: bool
) -> TrainingArguments:
    """The arguments object, with notebook defaults for what is not given.

    Nothing is reported or printed, nothing is saved, each step's loss is noted, and the learning
    rate is the one adapters want (2e-4). Held-out data is evaluated once an epoch.

    Args:
        fields: Fields as given.
        arguments_class: ``TrainingArguments`` or a subclass.
        folder: Where to write when ``output_dir`` is not given.
        evaluates: Whether there is held-out data.

    Raises:
        ConfigError: values contradict each other or are impossible.
    """
    values: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": 2e-4,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "epoch" if evaluates else "no",
        "use_cpu": not _has_accelerator(),
        "dataloader_pin_memory": _has_accelerator(),
    }
    if fields.get("load_best_model_at_end"):
        if not evaluates:
            raise ConfigError("load_best_model_at_end needs data to evaluate on: pass eval_data=…")
        values["eval_strategy"] = fields.get("eval_strategy", "steps" if "eval_steps" in fields else "epoch")
        values["save_strategy"] = values["eval_strategy"]
        if "eval_steps" in fields:
            values["save_steps"] = fields["eval_steps"]
        values["save_total_limit"] = 1
    elif evaluates and "eval_steps" in fields:
        values["eval_strategy"] = "steps"
    keeps = str(getattr(fields.get("save_strategy", "no"), "value", fields.get("save_strategy", "no"))) != "no"
    if keeps and "output_dir" not in fields and not fields.get("load_best_model_at_end"):
        raise ConfigError(f"save_strategy={fields['save_strategy']!r} writes checkpoints: say where with output_dir=…")
    _check_numbers(fields, arguments_class)
    values.update(_current_names(fields, arguments_class))
    known = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    try:
        return arguments_class(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError) as error:
        raise _impossible(str(error).splitlines()[0], fields) from error


def _impossible(reason: str, fields: Mapping[str, Any]) -> ConfigError:
    """The error for what the arguments class refuses; a word that is not one of its choices is named with the near."""
    unknown = re.match(r"(.+) is not a valid \w+, please select one of \[(.*)\]", reason)
    name = next((name for name, value in fields.items() if unknown and value == unknown[1]), None)
    if unknown is None or name is None:
        return ConfigError(f"These training arguments are not possible: {reason}")
    choices = re.findall(r"'([^']+)'", unknown[2])
    expected = did_you_mean(unknown[1], choices) or f" It is one of: {', '.join(choices)}"
    return ConfigError(f"{name} {unknown[1]!r} is unknown.{expected}", field=name, value=unknown[1])


def _check_numbers(fields: Mapping[str, Any], arguments_class: type[TrainingArguments]) -> None:
    """Raises ConfigError for a number that is none, or one that cannot be."""
    kinds = {field.name: getattr(field.type, "__name__", field.type) for field in dataclasses.fields(arguments_class)}
    for name, value in fields.items():
        whole = kinds.get(name) == "int"
        if not whole and kinds.get(name) != "float":
            continue
        accepted = int if whole else int | float
        if not isinstance(value, accepted) or isinstance(value, bool):
            wanted = "a whole number" if whole else "a number"
            raise ConfigError(f"{name} must be {wanted}, not {value!r:.60}", field=name, value=value)
        least = _LEAST.get(name)
        if least is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value!r}", field=name, value=value)


def _current_names(fields: Mapping[str, Any], arguments_class: type[TrainingArguments]) -> dict[str, Any]:
    """Fields under the names that this transformers wants: 5.24 renamed checkpointing and warns of the old name."""
    known = {field.name for field in dataclasses.fields(arguments_class)}
    renamed = {}
    for name, value in fields.items():
        newer = name.replace("gradient_checkpointing", "activation_checkpointing")
        renamed[newer if newer in known else name] = value
    return renamed


def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())
