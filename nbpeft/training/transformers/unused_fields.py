"""Fields of the arguments class that a training does not use, because of what is given beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass(frozen=True)
class Beside:
    """What a training has beside its fields.

    Attributes:
        evaluates: whether there are rows for evaluation.
        scores: whether rows are scored.
        tracks: whether metrics are logged to a tracker.
        processes: whether several processes train.
    """

    evaluates: bool = False
    scores: bool = False
    tracks: bool = False
    processes: bool = False


def _value(setting: Any) -> str:
    """The name of a strategy, which is text or a member of an enum."""
    return str(getattr(setting, "value", setting))


def _is_untracked(settings: TrainingArguments, beside: Beside) -> bool:
    return not beside.tracks and not {*(settings.report_to or ())} - {"none"}


_EVALUATION = (
    *("eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size"),
    *("batch_eval_metrics", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    *("include_for_metrics", "bf16_full_eval", "fp16_full_eval"),
)
_PROCESSES = (
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
)
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[TrainingArguments, Beside], bool]], ...] = (
    (("do_train", "do_eval", "do_predict"), "a training always trains, and evaluates eval_data", lambda a, b: True),
    (("num_train_epochs",), "max_steps is given", lambda a, b: a.max_steps > 0),
    (_EVALUATION, "there are no evaluation rows", lambda a, b: not b.evaluates),
    (
        ("metric_for_best_model", "greater_is_better"),
        "nothing is evaluated or scored",
        lambda a, b: not (b.evaluates or b.scores),
    ),
    (("eval_steps",), "eval_strategy is not 'steps'", lambda a, b: b.evaluates and _value(a.eval_strategy) != "steps"),
    (("logging_steps",), "logging_strategy is not 'steps'", lambda a, b: _value(a.logging_strategy) != "steps"),
    (
        ("save_total_limit", "save_only_model", "save_on_each_node"),
        "save_strategy is 'no'",
        lambda a, b: _value(a.save_strategy) == "no",
    ),
    (("save_steps",), "save_strategy is not 'steps'", lambda a, b: _value(a.save_strategy) != "steps"),
    (
        ("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "push_to_hub is not given",
        lambda a, b: not a.push_to_hub,
    ),
    (
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "nothing is reported to a tracker",
        _is_untracked,
    ),
    (
        ("warmup_steps", "warmup_ratio"),
        "lr_scheduler_type 'constant' has no warmup",
        lambda a, b: _value(a.lr_scheduler_type) == "constant",
    ),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        "gradient_checkpointing is not on",
        lambda a, b: not (a.gradient_checkpointing or getattr(a, "activation_checkpointing", None)),
    ),
    (("liger_kernel_config",), "use_liger_kernel is not on", lambda a, b: not a.use_liger_kernel),
    (("fsdp_config",), "fsdp is not on", lambda a, b: not a.fsdp),
    (
        ("length_column_name",),
        "train_sampling_strategy is not 'group_by_length'",
        lambda a, b: _value(a.train_sampling_strategy) != "group_by_length",
    ),
    (
        ("optim_target_modules",),
        "only the optimizers galore and apollo take it",
        lambda a, b: not any(name in _value(a.optim) for name in ("galore", "apollo")),
    ),
    (
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        "resume_from_checkpoint is not given",
        lambda a, b: not a.resume_from_checkpoint,
    ),
    (_PROCESSES, "one process trains", lambda a, b: not b.processes),
)
"""Fields, the reason why a training does not use them, and when that is so."""


def unused_fields(given: Iterable[str], settings: TrainingArguments, beside: Beside) -> str:
    """A line about the given fields that have no effect; empty if all have.

    Args:
        given: the names of the given fields.
        settings: the arguments made of them.
        beside: what else is given.
    """
    names = [name for name in given if getattr(settings, name, None) not in (None, False)]
    parts = []
    for fields, why, applies in _RULES:
        found = [name for name in names if name in fields]
        if found and applies(settings, beside):
            parts.append(f"{', '.join(found)} ({why})")
    return f"not used: {'; '.join(parts)}" if parts else ""
