"""Selects the objective of a training: the given one, or the one that follows from the rows."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model.from_data.observing import device_of, evaluated, moved
from nbpeft.names import JUDGED, REJECTED
from nbpeft.sweeps import Sweep, combinations, not_swept, swept
from nbpeft.training.adapters.adapted_model import base_of, call_columns
from nbpeft.training.data import Collator, columns_of
from nbpeft.training.data.classes import Classes
from nbpeft.training.data.forms import COMPARED, PAIR, PROMPTED, checked_columns, form_of
from nbpeft.training.data.reading import are_judged, default_length, has_template
from nbpeft.training.data.sources import first_row, is_stream
from nbpeft.training.loop.grouping import GROUPED
from nbpeft.training.loop.learning_rate import with_learning_rate
from nbpeft.training.loop.rows import classes_of, collator_for, inputs_of, is_causal, is_of_texts
from nbpeft.training.objectives.classification import metrics_for
from nbpeft.training.objectives.collator import PairCollator, ShiftedCollator, stacked
from nbpeft.training.objectives.grpo import Grpo
from nbpeft.training.objectives.log_probs import log_probs
from nbpeft.training.objectives.objective import Objective, fields_by_name, objective_named
from nbpeft.training.objectives.reference import (
    BASE,
    START,
    check_reference,
    reference_of,
    trains_only_adapters,
)
from nbpeft.training.objectives.usual import Classify
from nbpeft.training.request import TrainRequest
from nbpeft.training.rewards.functions import Rewards
from nbpeft.training.rewards.rollouts import PromptCollator
from nbpeft.training.rewards.trainer import RolloutTrainer
from nbpeft.training.transformers.objective_trainer import ObjectiveTrainer
from nbpeft.training.transformers.trainer import Trainer

_OTHER_LOSS = {
    "compute_metrics": "it does not compute complete logits",
    "preprocess_logits_for_metrics": "it does not compute complete logits",
    "compute_loss_func": "it has its own loss",
}
_NOT_WITH_PAIRS = {
    "packing": "each row has two completions, or a label",
    "data_collator": "its batches have two completions of each row",
    **_OTHER_LOSS,
    "label_smoothing_factor": "use its field label_smoothing",
}
"""Arguments of a training that an objective with two completions does not accept, with the reason."""
_NOT_WITH_GENERATION = {
    "packing": "its batches are completions that are generated before each step",
    "data_collator": "its batches are completions that are generated before each step",
    **_OTHER_LOSS,
    "label_smoothing_factor": "completions have no reference token",
    "auto_find_batch_size": "a batch has all completions of a prompt",
    "processes": "it trains in one process",
    "hosts": "it trains in one process",
    "fsdp": "it trains in one process",
    "deepspeed": "it trains in one process",
}
"""Arguments that an objective with generated completions does not accept, with the reason."""
_STEP_SIZE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Arguments whose product is the number of completions of a step, with their defaults."""


def with_objective(request: TrainRequest) -> TrainRequest:
    """Returns an opened request whose objective is chosen, and whose ``arguments`` are without the objective's fields.

    Raises:
        ConfigError: the objective, one of its fields, or an argument that it does not take is invalid.
        TrainingError: the rows or the model are not of the kind that the objective needs.
    """
    if isinstance(request.objective, Objective):
        return request
    if request.own_rows:
        return _of_all(request)
    fields = fields_by_name()
    given = {name: value for name, value in request.arguments.items() if name in fields}
    own = getattr(request.arguments_class, "__dataclass_fields__", {})  # TRL's SFTConfig has a loss_type, too
    kind = None if request.objective is None else objective_named(request.objective)
    if kind is not None and not kind.generates and request.reward is not None:
        raise ConfigError(
            f"reward requires objective='grpo', but the objective is {kind.name}: remove reward", field="reward"
        )
    if kind is not None:
        given = _fields_of(kind, given, fields, own)
    request = request.opened()
    columns, why = columns_of(request.data), ""
    if kind is None:
        kind, why = _from_rows(request, columns)
        given = _fields_of(kind, given, fields, own)
    several = swept(given)
    objective = kind(**{name: value for name, value in given.items() if name not in several})
    for values in combinations(several):
        replace(objective, **values)
    rest = {name: value for name, value in request.arguments.items() if name not in given or name in several}
    request = replace(request, objective=objective, objective_reason=why, arguments=rest)
    _check_model(request, objective, columns)
    if not objective.rows:
        if request.reference is not None:
            raise ConfigError(f"objective={objective.name!r} uses no reference: remove it", field="reference")
        return with_learning_rate(request, objective)
    _check_arguments(request, objective)
    request = with_learning_rate(request, objective)
    if isinstance(objective, Grpo):
        return _with_rewards(request, objective, columns)
    return replace(request, trainer_class=ObjectiveTrainer)


def _of_all(request: TrainRequest) -> TrainRequest:
    """A request in which the rows of each adapter have the same objective."""
    request = request.opened()
    found: dict[str, TrainRequest] = {}
    for name in request.own_rows:
        try:
            found[name] = with_objective(request.of_adapter(name))
        except TrainingError as error:
            raise TrainingError(f"rows of {name!r}: {error}") from error
    first, *others = found
    names = {name: getattr(part.objective, "name", "") for name, part in found.items()}
    for name in others:
        if names[name] != names[first]:
            raise ConfigError(
                f"the rows of {first!r} are for {names[first]}, those of {name!r} for {names[name]}: give objective=…, "
                "or train them one by one",
                field="objective",
            )
    return replace(found[first], data=request.data, eval_data=request.eval_data, columns=request.columns)


def _with_rewards(request: TrainRequest, objective: Grpo, columns: Sequence[str]) -> TrainRequest:
    """A request with checked reward functions, whose steps have all completions of their prompts."""
    arguments, copies = request.arguments, objective.num_generations
    if is_stream(request.data):
        raise TrainingError(f"{objective.name} repeats prompts, but a stream yields each once: pass a list of rows")
    if getattr(arguments.get("train_sampling_strategy"), "value", arguments.get("train_sampling_strategy")) == GROUPED:
        raise ConfigError(
            f"train_sampling_strategy={GROUPED!r} cannot be combined with {objective.name}, whose batches are "
            "completions of few prompts: use 'random' or 'sequential'",
            field="train_sampling_strategy",
        )
    rows, steps = (arguments.get(name, usual) for name, usual in _STEP_SIZE.items())
    if type(rows) is int and type(steps) is int and rows * steps % copies:
        size = rows * steps
        product = " x ".join(f"{name} ({number})" for name, number in zip(_STEP_SIZE, (rows, steps), strict=True))
        near = next((number for number in range(copies - 1, 1, -1) if size % number == 0), None)
        choice = "" if near is None else f", or num_generations={near}"
        raise ConfigError(
            f"num_generations={copies} does not divide the {size} completions of a step ({product}): "
            f"set per_device_train_batch_size={-(-rows // copies) * copies}{choice}",
            field="num_generations",
        )
    if getattr(request.data, "column_names", None) is None:  # rows may have different columns
        columns = tuple(dict.fromkeys(str(name) for row in request.data if isinstance(row, Mapping) for name in row))
    own = {(request.columns or {}).get(name, name) for name in (*PROMPTED.needs, *PROMPTED.may)}
    others = [name for name in columns if name not in own]
    rewards = Rewards.of(request.reward, objective.reward_weights, others)
    if request.eval_data is not None and request.score is None:  # the loss says nothing: its rewards are relative
        arguments = {"metric_for_best_model": "reward", **arguments}
    return replace(request, trainer_class=RolloutTrainer, reward=rewards, arguments=arguments)


def _fields_of(
    kind: type[Objective], given: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]], others: Container[str]
) -> dict[str, Any]:
    """The given fields of an objective; the others have to be fields of the arguments class."""
    found = {name: value for name, value in given.items() if kind.name in fields[name] or name not in others}
    for name, value in found.items():
        if kind.name not in fields[name]:
            raise ConfigError(
                f"{name!r} is a field of {', '.join(fields[name])}, but the objective is {kind.name}: remove it, or "
                f"set objective={next(iter(fields[name]))!r}",
                field=name,
            )
        if isinstance(value, Sweep) and (kind.generates or name not in kind.own_fields()):
            raise not_swept(name)
    return found


def _from_rows(request: TrainRequest, columns: Sequence[str]) -> tuple[type[Objective], str]:
    """The objective that follows from the rows, and why."""
    checked_columns(request.columns, columns)
    if request.reward is not None:
        return objective_named("grpo"), "rewards are given"
    compared = {*COMPARED.needs} <= {*columns, *(request.columns or ())} or _are_pairs(columns)
    if classes_of(request.model) is not None:
        if compared and _scores(request.model):
            return objective_named("reward"), "the rows have chosen and rejected, and the model has one label"
        return objective_named("classify"), "the model is a classifier"
    if _are_pairs(columns):
        return objective_named("dpo"), "the rows have chosen and rejected"
    first = None if is_stream(request.data) else first_row(request.data)
    chat = has_template(request.tokenizer) and is_causal(request.model)
    main = inputs_of(request).main
    form = form_of(columns, request.columns or {}, kind=None, first=first, chat=chat, main=main)
    if form is COMPARED:
        return objective_named("dpo"), f"the rows have {' and '.join(COMPARED.needs)}"
    if form is PAIR and are_judged(request.data, checked_columns(request.columns, columns)):
        return objective_named("kto"), "the rows have labels of good and bad completions"
    if form is PROMPTED:
        raise ConfigError(
            "the rows have only prompts: pass reward=…, functions that score the completions of the model "
            "(objective='grpo'), or rows with completions to learn",
            field="reward",
        )
    return objective_named("sft"), ""


def _are_pairs(columns: Sequence[str]) -> bool:
    """Whether rows with these columns are tokenized, with two completions each."""
    names = ("input_ids", "labels")
    return {*names, *(f"{REJECTED}{name}" for name in names)} <= {*columns}


def _check_model(request: TrainRequest, objective: Objective, columns: Sequence[str]) -> None:
    model, kind = request.model, type(base_of(request.model)).__name__
    needs = f"objective={objective.name!r} needs"
    if objective.name == "classify" and classes_of(model) is None:
        raise TrainingError(f"{needs} a model for sequence or token classification; {kind} is not one")
    if objective.name == "sft" and classes_of(model) is not None:
        raise TrainingError(f"{needs} a language model; {kind} is a classifier")
    if not objective.rows:
        return
    if objective.scores and not _scores(model):
        labels = getattr(getattr(base_of(model), "config", None), "num_labels", None)
        what = f"has {labels} labels" if is_of_texts(model) else "is not one"
        raise TrainingError(f"{needs} a model for sequence classification with num_labels=1; {kind} {what}")
    if not objective.scores and not is_causal(model):
        raise TrainingError(f"{needs} a causal language model; {kind} is not one")
    if manager_of(model) is None:
        raise TrainingError(f"{needs} adapters of nbpeft, which a {type(model).__name__} does not have")
    if objective.generates:
        _check_generation(request, objective, columns)
    elif _are_pairs(columns) and objective.rows != JUDGED:
        return
    elif "input_ids" in columns and not request.columns:
        what = (
            f"{needs} rows of text with chosen and rejected, or tokenized rows with input_ids, labels, "
            f"{REJECTED}input_ids and {REJECTED}labels"
        )
        if objective.rows == JUDGED:
            what = f"{needs} rows of text with prompt, completion and label, not tokenized rows"
        raise TrainingError(what, columns=columns)
    form_of(columns, request.columns or {}, kind=objective.rows)


def _check_generation(request: TrainRequest, objective: Objective, columns: Sequence[str]) -> None:
    name, base = objective.name, base_of(request.model)
    if not hasattr(base, "generate"):
        raise TrainingError(f"{name} generates completions, but a {type(base).__name__} has no generate()")
    if call_columns(request.model):
        raise TrainingError(
            f"{name} generates completions without {', '.join(call_columns(request.model))}, which the method of the "
            "adapter takes"
        )
    if request.tokenizer is None or not hasattr(request.tokenizer, "decode"):
        raise ConfigError(f"{name} needs a tokenizer: pass tokenizer=…", field="tokenizer")
    if "prompt" not in {*columns, *(request.columns or ())} and "input_ids" in columns:
        raise TrainingError(
            f"{name} needs rows of text with a prompt, which reward functions get, not tokenized rows",
            columns=columns,
        )


def _scores(model: nn.Module) -> bool:
    """Whether a model is a classifier of texts with one label."""
    config: Any = getattr(base_of(model), "config", None)
    return is_of_texts(model) and config.num_labels == 1


def _check_arguments(request: TrainRequest, objective: Objective) -> None:
    own = {name: getattr(request, name) for name in ("packing", "processes", "hosts")}
    given = {**own, **request.arguments}
    for name, reason in (_NOT_WITH_GENERATION if objective.generates else _NOT_WITH_PAIRS).items():
        if given.get(name) not in (None, False, 0):
            raise ConfigError(f"{name} cannot be combined with {objective.name}: {reason}", field=name)
    if request.arguments.get("neftune_noise_alpha") and getattr(objective, "disable_dropout", False):
        raise ConfigError(
            "neftune_noise_alpha cannot be combined with disable_dropout=True, which disables the noise too: set "
            "disable_dropout=False",
            field="neftune_noise_alpha",
        )
    if request.trainer_class not in (Trainer, ObjectiveTrainer, RolloutTrainer):
        raise ConfigError(
            f"objective={objective.name!r} has its own Trainer: remove trainer_class", field="trainer_class"
        )
    batches = {
        "per_device_train_batch_size": request.arguments.get("gradient_accumulation_steps", 1),
        "per_device_eval_batch_size": 1,
    }
    for name, count in batches.items():
        if objective.rows == JUDGED and count == request.arguments.get(name) == 1:
            raise ConfigError(
                f"{objective.name} compares the rows of a step with each other: {name} of at least 2", field=name
            )
    sweep = request.members is not None or any(isinstance(value, Sweep) for value in request.given.values())
    if sweep and objective.generates:
        raise ConfigError(
            f"{objective.name} trains one adapter, whose completions are generated before each step: remove the sweep, "
            "or the rows of other adapters"
        )
    if not objective.reference_needed:
        if request.reference is not None:
            without = f" with beta={getattr(objective, 'beta', 0)}" if objective.uses_reference else ""
            raise ConfigError(f"objective={objective.name!r}{without} uses no reference: remove it", field="reference")
        return
    check_reference(
        request.model,
        request.reference,
        adapter=request.adapter,
        sweep=sweep,
        sharded=bool(request.arguments.get("fsdp")),
        members=tuple(request.members) if isinstance(request.members, Mapping) else (),
    )


def chosen_reference(request: TrainRequest, rows: Any) -> str | None:
    """Returns the name of the reference of a training: the given one, or ``base`` for a new adapter, else ``start``.

    An adapter is new if the model computes the same with and without it.

    Args:
        request: the arguments of the training; the adapters to train are active.
        rows: the tokenized rows, of which the first is computed.

    Raises:
        ConfigError: the reference does not support this training.
    """
    objective = request.objective
    assert isinstance(objective, Objective)
    if not objective.reference_needed:
        return None
    alone = trains_only_adapters(request.model)
    if request.reference == BASE and not alone:
        raise ConfigError(
            "weights of the base are trained too, so it cannot be the reference: set reference='start'",
            field="reference",
        )
    if request.reference is not None:
        return request.reference
    if alone and _is_new(request, objective, rows):
        return BASE
    check_reference(
        request.model,
        START,
        adapter=None,
        sweep=request.members is not None,
        sharded=bool(request.arguments.get("fsdp")),
    )
    return START


def _is_new(request: TrainRequest, objective: Objective, rows: Any) -> bool:
    """Whether the model computes the same with its active adapters and without them, on the first row."""
    model, row = request.model, dict(first_row(rows))
    collator = collator_for(model, request.tokenizer)
    if "labels" in row:
        batch = stacked(_collator_of(objective, collator)([row]))
    else:  # a prompt alone
        batch = collator([{name: row["input_ids"] for name in ("input_ids", "labels")}])
    with torch.no_grad(), evaluated(model):
        inputs = moved(batch, device_of(base_of(model)))
        now = log_probs(model, inputs)
        with reference_of(model, BASE).active():
            without = log_probs(model, inputs)
    return bool(torch.allclose(now, without, rtol=1e-5, atol=1e-4))


def batches_of(request: TrainRequest, objective: Objective) -> Any:
    """Returns the collator of the rows of a training."""
    limit = request.max_length
    if limit is None and request.tokenizer is not None:
        limit = default_length(request.tokenizer)
    return _collator_of(objective, collator_for(request.model, request.tokenizer), limit)


def metrics_of(request: TrainRequest, classes: Classes | None) -> dict[str, Any]:
    """Returns the option of the Trainer with the metrics of evaluations; empty for other models than classifiers."""
    classes = classes if isinstance(request.objective, Classify) else None
    measure = None if classes is None or request.eval_data is None else metrics_for(classes)
    return {} if measure is None else {"compute_metrics": measure}


def _collator_of(objective: Objective, collator: Collator, limit: int | None = None) -> Any:
    """Returns the collator of an objective's rows, which cuts the sequences that it makes to ``limit`` tokens."""
    if objective.rows == JUDGED:
        return ShiftedCollator(PairCollator(collator), limit)
    if objective.generates:
        return PromptCollator(collator)
    return PairCollator(collator) if objective.rows else collator


def objective_text(objective: Objective, reason: str, reference: str | None) -> str:
    """Returns the objective of a training for its card; empty for the usual one."""
    if not objective.rows:
        return ""
    changed = ", ".join(f"{name}={value}" for name, value in objective.changed().items())
    because = f", because {reason}" if reason else ""
    parts = [f"objective: {objective.name}{f' ({changed})' if changed else ''}{because}"]
    words = {BASE: "the model without adapters", START: "the adapter's weights at the beginning"}
    if reference is not None:
        parts.append(f"reference: {reference}" + (f" ({words[reference]})" if reference in words else ""))
    return "; ".join(parts)
