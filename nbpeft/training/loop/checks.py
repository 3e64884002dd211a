"""What a training refuses before it reads rows, and before it changes the model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainingArguments

from nbpeft.display.numbers import count, plural
from nbpeft.engine.tree.model_tree import check_has_data, manager_of
from nbpeft.errors import ConfigError, TrainingError, with_article
from nbpeft.model.saving import files
from nbpeft.training.adapters.adapted_model import active_names, base_of, is_adapted, trainable
from nbpeft.training.data import is_stream, learned_prompts
from nbpeft.training.launch.processes import Launch, launch_of
from nbpeft.training.loop.rows import TrainingRows
from nbpeft.training.objectives.objective import fields_by_name
from nbpeft.training.request import TrainRequest
from nbpeft.training.sweep.evaluations import check_halving
from nbpeft.training.transformers.arguments import check_options, split_arguments
from nbpeft.training.transformers.trainer import adapter_trainer, has_own_loss
from nbpeft.training.watching.early_stop import check_patience
from nbpeft.training.watching.scoring import Scorer, scorer_of
from nbpeft.training.watching.trackers import check_report_to, tracker_names


def checked(request: TrainRequest) -> tuple[nn.Module, Launch | None, dict[str, Any], dict[str, Any]]:
    """Refuses arguments that cannot be trained with, before rows are read.

    Returns:
        The model, how many processes train it, fields of the arguments class, and options of the Trainer.
    """
    model = request.model
    _check_model(model, request.adapter)
    _takes_labels(model, request.trainer_class, request.arguments)
    trainer_class = adapter_trainer(_checked_class(request.trainer_class, transformers.Trainer, "trainer_class"))
    arguments_class = _checked_class(request.arguments_class, TrainingArguments, "arguments_class")
    fields, options = split_arguments(request.arguments, trainer_class, arguments_class, others=fields_by_name())
    check_options(options)
    check_report_to(fields.get("report_to"))
    tracker_names(request.track)
    launch = launch_of(request.processes, request.hosts, sharded=bool(fields.get("fsdp")))
    if launch is not None and request.members is not None:
        raise ConfigError("A sweep trains in one process: remove processes or the sweep", field="processes")
    _refuse_other_adapters(model, {} if request.replace else fields)
    return model, launch, fields, options


def check_names(arguments: Mapping[str, Any]) -> None:
    """Refuses names that are no arguments of a training.

    Raises:
        ConfigError: one is unknown; the message suggests similar names.
    """
    request = TrainRequest.of(nn.Module(), None, **arguments)
    of_objectives = fields_by_name()
    others = {name: value for name, value in request.arguments.items() if name not in of_objectives}
    trainer_class = adapter_trainer(_checked_class(request.trainer_class, transformers.Trainer, "trainer_class"))
    split_arguments(others, trainer_class, request.arguments_class, others=of_objectives)


def _refuse_other_adapters(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Refuses an ``output_dir`` with another adapter; a folder that training resumes from is accepted."""
    folder, manager, resumed = fields.get("output_dir"), manager_of(model), fields.get("resume_from_checkpoint")
    if manager is None or not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        return
    home = Path(os.path.expanduser(folder)).resolve()
    inside = isinstance(resumed, str | os.PathLike) and home in Path(os.path.expanduser(resumed)).resolve().parents
    if resumed is not True and not inside:
        files.refuse_other_adapters(manager, home)


def _check_model(model: nn.Module, adapter: str | None) -> None:
    """Refuses a model that cannot be trained, as it is or after activating an adapter."""
    if not isinstance(model, nn.Module):
        raise TrainingError(
            f"model is {with_article(model)} ({model!r:.60}), not a model: load it, then add an adapter"
        )
    if not is_adapted(model):
        raise TrainingError(f"{type(model).__name__} has no adapters: add one first, then train.")
    check_has_data(model)
    manager: Any = getattr(model, "manager", None)
    if adapter is not None:
        if manager is None:
            raise TrainingError(
                f"adapter {adapter!r:.60} of a {type(model).__name__} must be activated before training."
            )
        manager.require_available(adapter)
    merged = getattr(manager, "merged", ())
    if merged and (adapter is None or merged == (adapter,)):
        names = ", ".join(map(repr, merged))
        raise TrainingError(f"Merged adapters cannot be trained ({names}): unmerge first.")
    if adapter is None:
        check_learns(model)


def _takes_labels(model: nn.Module, trainer_class: Any, options: Mapping[str, Any]) -> None:
    """Refuses a model that returns no loss, unless the Trainer computes it in another way."""
    base = base_of(model)
    taken = inspect.signature(base.forward).parameters.values()
    if (
        has_own_loss(trainer_class)
        or options.get("compute_loss_func")
        or any(
            item.kind is item.VAR_KEYWORD or "label" in item.name or item.name in ("return_loss", "start_positions")
            for item in taken
        )
    ):
        return
    raise TrainingError(
        f"a Trainer cannot train a {type(base).__name__}, whose forward takes no labels and returns no loss: write the "
        "loop yourself and show it with nbpeft.start_run(model), or pass a trainer_class with a compute_loss of its own"
    )


def check_learns(model: nn.Module) -> None:
    """Refuses a model of which the active adapters would learn nothing.

    Raises:
        TrainingError: the adapters are disabled, or frozen.
    """
    if not getattr(getattr(model, "manager", None), "enabled", True):
        raise TrainingError(
            "The adapters are disabled, so nothing would be trained: enable them first (model.enable_adapter_layers())."
        )
    if next(trainable(model), None) is None:
        active = active_names(model)
        names = ", ".join(map(repr, active)) or "none"
        way = f"model.set_requires_grad({active[0]!r}) makes it trainable" if active else "activate a trainable one"
        raise TrainingError(f"Nothing is trainable (active adapters: {names}): {way}.")


def _checked_class(given: Any, base: type[Any], name: str) -> Any:
    if not (isinstance(given, type) and issubclass(given, base)):
        raise ConfigError(f"{name} must be a class derived from {base.__name__}, not {given!r:.60}", field=name)
    return given


def checked_scorer(request: TrainRequest, rows: TrainingRows, fields: dict[str, Any]) -> Scorer | None:
    """Returns what scores, if anything does, and refuses what would stop adapters without evaluations or scores.

    The scorer adds the metric that decides to ``fields``.
    """
    scorer = scorer_of(request, fields, rows.classes)
    if scorer is not None:
        _note_learned(scorer, rows)
    judged = {"evaluates": rows.evaluation is not None, "scores": scorer is not None}
    check_halving(request, fields, **judged)
    check_patience(request.patience, fields, **judged)
    return scorer


def _note_learned(scorer: Scorer, rows: TrainingRows) -> None:
    """Notes how many of the rows to score are also trained on: their scores say nothing about other rows."""
    learned = set().union(*map(learned_prompts, rows.train_parts)) if scorer.prompts else set()
    both, total = sum(map(learned.__contains__, scorer.prompts)), len(scorer.prompts)
    note = f"{count(both)} of {plural(total, 'row')} {'is' if both == 1 else 'are'} also trained on"
    if both and note not in scorer.notes:
        scorer.notes = (*scorer.notes, note)


def check_length_known(rows: Any, fields: Mapping[str, Any]) -> None:
    """Refuses a stream without a number of steps."""
    steps = fields.get("max_steps")
    if is_stream(rows) and not (isinstance(steps, int) and steps > 0):
        raise ConfigError(
            "The rows are a stream of unknown length: set the number of steps, e.g. max_steps=200",
            field="max_steps",
        )
