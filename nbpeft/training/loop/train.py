"""``train(model, data)``: training in one call."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft._util.optional import needs
from nbpeft.checkpoint import PromptFormat, name_classes, prompt_format, scratch_folder, set_prompt_format
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.trained import mark_unsaved
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, NbpeftError, TrainingError, TrainingInterrupted
from nbpeft.memory.processor import slow_dtype_message, slow_here
from nbpeft.model.saving import files
from nbpeft.names import JUDGED
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState
from nbpeft.sweeps import swept
from nbpeft.training.adapters.adapted_model import active_names, base_of, is_adapted, trainable, trained_names
from nbpeft.training.adapters.learning_check import why_no_gradient
from nbpeft.training.data import PackedRows, StreamedRows, TokenizedRows, is_stream
from nbpeft.training.launch.parent import train_in_subprocesses
from nbpeft.training.launch.processes import Launch, launch_of
from nbpeft.training.loop.grouping import group_rows, wants_groups
from nbpeft.training.loop.objective import batches_of, chosen_reference, metrics_of, objective_text, with_objective
from nbpeft.training.loop.packing import PackingCheck, pack
from nbpeft.training.loop.restoring import restoring
from nbpeft.training.loop.rows import TrainingRows, training_rows
from nbpeft.training.loop.sampled_rows import sample_prompts
from nbpeft.training.monitor.callback import RunCallback
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.failures import explain_failure, free_memory, is_out_of_memory, oom_error, trains_in_half
from nbpeft.training.monitor.result import TrainResult
from nbpeft.training.monitor.run import Run
from nbpeft.training.monitor.run_checkpointer import RunCheckpointer, check_rows_are_those, mark_of_rows
from nbpeft.training.objectives.objective import Objective, fields_by_name
from nbpeft.training.objectives.reference import reference_of
from nbpeft.training.request import TrainRequest
from nbpeft.training.rewards.functions import Rewards
from nbpeft.training.sweep.adapters import side_by_side
from nbpeft.training.sweep.evaluations import check_halving
from nbpeft.training.sweep.members import SideBySide, kept_of
from nbpeft.training.sweep.rows import with_own_rows
from nbpeft.training.sweep.trainer import SideBySideCallback, callbacks_of
from nbpeft.training.transformers.arguments import build_arguments, check_options, reason_of, split_arguments
from nbpeft.training.transformers.trainer import Trainer, adapter_trainer, has_own_loss, step_settings
from nbpeft.training.watching.divergence import DivergenceStop
from nbpeft.training.watching.early_stop import EarlyStop, check_patience
from nbpeft.training.watching.generation import Prompt
from nbpeft.training.watching.prompts import SamplePrompts
from nbpeft.training.watching.sampling import SampleCallback
from nbpeft.training.watching.scoring import ScoreCallback, Scorer, scorer_of
from nbpeft.training.watching.trackers import TrackCallback, check_report_to, tracker_names


def train(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    skip_bad: bool = False,
    learn: str = "all",
    reasoning: str = "keep",
    long: str = "cut",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eval_by: str | None = None,
    data_hint: str = "",
    adapter: str | None = None,
    patience: int | None = None,
    sample: str | Sequence[Prompt] | int | None = None,
    every: int | None = None,
    score: Any = None,
    metric: Any = None,
    max_score_rows: int | None = None,
    packing: bool = False,
    control: RunControl | None = None,
    publish: Callable[[TrainState], None] | None = None,
    run_factory: Callable[..., Run] = Run,
    trainer_class: type[Any] = Trainer,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    run_dir: RunPlace | str | os.PathLike[str] | None = None,
    track: str | Sequence[str] | None = None,
    members: Mapping[str, Mapping[str, Any]] | SideBySide | None = None,
    stop: str | None = None,
    stop_on_divergence: bool = True,
    processes: int | None = None,
    machines: Sequence[str] | None = None,
    replace: bool = False,
    objective: str | None = None,
    reference: str | None = None,
    rewards: Any = None,
    **arguments: Any,
) -> TrainResult:
    """Trains the active adapters of ``model``.

    A stopped training (Stop or Pause of ``control``) returns its result like any other, and the model keeps what it
    learned. An interrupted one (KeyboardInterrupt) does the same and then raises ``TrainingInterrupted`` with the
    result. After an error before the first step, the model and its active and merged adapters are unchanged.

    With ``sweep(…)`` as a field, e.g. ``learning_rate=sweep(1e-4, 3e-4)`` or ``r=sweep(8, 64)``, one adapter per value
    or combination is trained side by side with the others, as if alone: ``codes-lr1e-4`` and so on. They start from
    the active adapter, or from a new init if the config varies. The result is a :class:`SweepResult`; its best adapter
    is active afterwards.

    With rows for several adapters by name, each is trained on its own, side by side over the same base model::

        result = nbpeft.train(model, {"sql": queries, "chat": dialogs}, tokenizer=tokenizer, num_train_epochs=1)
        sql, chat = result.members

    Weights and losses are bit by bit those of a training of the adapter alone. Each makes the steps that its own rows
    give, or ``max_steps``. None is the best; of the active adapters, one that was trained stays active.

    Args:
        model: A model with adapters.
        data: Training rows or their source; see :mod:`nbpeft.training.data` for their forms and
            :func:`nbpeft.training.data.open_data` for sources. A stream needs ``max_steps``. A mapping from names of
            adapters gives each its own rows.
        eval_data: Evaluation rows, in the same forms; or a share (0.1) or number (64) of the rows of ``data`` to hold
            out, drawn with ``seed``. If each adapter has its own rows, these are for all, or a mapping as for ``data``.
        tokenizer: Needed unless the rows are tokenized.
        max_length: Maximum length of a row in tokens; longer rows are truncated. The default is the tokenizer's limit,
            at most 1024.
        columns: Names of the columns in the data, e.g. ``{"prompt": "question", "completion": "answer"}``.
        separator: Character between the cells of a ``.csv`` or ``.tsv`` file, e.g. ``";"``; detected by default.
        skip_bad: Leave out rows that cannot be read, with a note; by default they are refused. Rows without a token to
            learn are always left out.
        learn: Assistant turns of a conversation to learn: ``all``, the ``last`` one, or the ``completion``, which are
            all turns after the last message of the user.
        reasoning: ``keep`` the reasoning of the assistant (``reasoning_content`` of a turn, or ``<think>`` in its
            content) and learn it, ``mask`` it, so that it is read but not learned, or ``drop`` it.
        long: Rows longer than ``max_length``: ``cut`` them, ``drop`` them, or ``split`` texts into several rows.
        chat_template_kwargs: Variables of the chat template, e.g. ``{"enable_thinking": False}``, which are saved with
            the adapter and used when it is asked. A row's own, in a column with this name, have priority.
        eval_by: Name of a column. ``eval_data`` holds out either all or none of the rows with the same value in it.
        data_hint: Text that is appended to notes about truncated and omitted rows, e.g. a command that shows them.
        adapter: Adapter to activate first; merged adapters are unmerged for it. It stays active once a step was done.
        patience: Stop after this many evaluations without improvement, and restore the best state. ``eval_data`` is
            evaluated ten times per run unless ``eval_strategy`` or ``eval_steps`` is given. With ``score``, the scores
            are the evaluations.
        sample: One or several prompts (texts or conversations) that the adapter and the base model answer during
            training; or a number of evaluation rows (without ``eval_data``, training rows) to answer, whose reference
            answers are shown too. The answers are in ``result.state.samples``.
        every: Steps between samples and between scores; by default about five samples and ten scores per run.
        score: Rows to score during training, or their source, as for :func:`nbpeft.score`. The scores are reported
            like the metrics of an evaluation: in the card, in the run folder and to trackers.
        metric: Name of a metric of :func:`nbpeft.score` (default: ``exact``; ``accuracy`` for a classifier), a function
            ``(answer, row) -> bool | float``, or a list of them, of which the first determines the best state.
        max_score_rows: Maximum number of rows that are scored each time. More rows than that are sampled, the same
            ones each time. The default is 200 for metrics of answers, which are generated, and all rows for others.
        packing: Pack several rows into each sequence of ``max_length`` tokens, without padding. Each row is learned as
            it would be alone, the batch size counts sequences, and evaluation rows are not packed. Without packing,
            a batch has rows of similar length, in an order drawn with ``seed``, unless ``train_sampling_strategy`` is
            given (``"random"``).
        control: Receives the requests to stop and pause.
        publish: Called with each new state of the run.
        run_factory: Creates the run; called like :class:`Run`.
        trainer_class: A Trainer class of another library to use.
        arguments_class: The arguments class of ``trainer_class``.
        run_dir: Folder in which the run creates its own folder, ``ADAPTER-N``, with its settings, its curves and, every
            few seconds, a checkpoint to resume from. If it cannot be written, training continues without it.
        track: ``tensorboard``, ``wandb`` or ``trackio``, or several of them, to which the metrics are logged.
        members: Adapters of the model to train side by side, each with its own fields:
            ``{"a": {"learning_rate": 1e-4}, "b": {"learning_rate": 3e-4}}``. A sweep creates its members itself.
        stop: ``"half"`` for successive halving of a sweep: each time the number of steps has doubled, the worse half of
            the adapters by evaluation loss or score is stopped, until one remains in the second half of the steps.
        stop_on_divergence: Stop if the loss is NaN or infinite or the weights explode, and restore the last good
            weights; in a sweep only that adapter stops. Copying the trainable weights takes about 1 % of the time, and
            host memory of their size. See :mod:`nbpeft.training.watching.divergence`.
        processes: Number of training processes on this machine, one per GPU; see :mod:`nbpeft.training.launch`. Each
            takes ``per_device_train_batch_size`` rows per step. ``fsdp=True`` shards the model over them.
        machines: Addresses of machines with the same folders, this one's first; ``processes`` is the number on each.
        replace: Overwrite another adapter in ``output_dir``: one with another name, base model or other tensors.
        objective: ``sft``, ``classify``, ``dpo``, ``orpo``, ``simpo``, ``cpo``, ``kto``, ``reward`` or ``grpo``. By
            default it follows from the rows and the model: ``dpo`` for rows with chosen and rejected, ``reward`` if
            the model is a classifier with one label, ``kto`` for rows with labels of good and bad completions,
            ``grpo`` with ``rewards``. See :mod:`nbpeft.training.objectives`.
        reference: Reference of ``dpo`` and ``kto``: ``base`` (the model without adapters), ``start`` (the adapter's
            weights at the beginning) or the name of another adapter. By default ``base`` for an adapter that does not
            change the model yet, and ``start`` for others.
        rewards: For ``grpo``: one or several functions that score completions of the rows' prompts:
            ``f(completions, prompts, **columns) -> list[float]``, as for TRL's GRPOTrainer. See
            :mod:`nbpeft.training.rewards`.
        **arguments: Fields of the arguments class (``learning_rate``, ``max_steps``, …) and of the objective
            (``beta``, ``loss_type``, …), and options of the Trainer (``callbacks``, ``compute_metrics``,
            ``data_collator``, …). With ``output_dir`` the adapter is saved there at the end; without it, nothing is
            saved.

    Raises:
        AdapterExistsError: ``output_dir`` contains another adapter.
        ConfigError: an argument is unknown or invalid.
        MissingPackageError: accelerate, which transformers' Trainer needs, is not installed.
        TrainingError: nothing is trainable, the data cannot be read, or memory ran out.
        TrainingInterrupted: an interruption ended the run; the model keeps what it learned.
    """
    return run_training(TrainRequest(**locals()))


def run_training(request: TrainRequest) -> TrainResult:
    """Trains like :func:`train`, which documents the errors.

    Args:
        request: its arguments.
    """
    with needs("accelerate", "Training"):
        importlib.import_module("accelerate")
    request = with_own_rows(request)
    if request.members is None and not swept(request.given):  # a sweep activates its adapters first
        known = fields_by_name()
        plain = {name: value for name, value in request.arguments.items() if name not in known}
        _checked(replace(request, arguments=plain))
    return _run(with_objective(request))


@side_by_side
def _run(request: TrainRequest) -> TrainResult:
    model, launch, fields, options = _checked(request)
    request = request.opened()
    rows = training_rows(request)
    _check_length_known(rows.train, fields)
    scorer = scorer_of(request, fields, rows.classes)
    judged = {"evaluates": rows.evaluation is not None, "scores": scorer is not None}
    check_halving(request, fields, **judged)
    check_patience(request.patience, fields, **judged)
    request = replace(request, sample=_sample_prompts(request, rows))
    given = _not_none(**options)
    learned, objective = rows.train, request.objective
    assert isinstance(objective, Objective)
    collator: Any = batches_of(request, objective)
    packed: list[PackedRows] = []
    if request.packing:
        learned, collator = _packed(request, rows, collator, given)
        packed = list(learned.values()) if request.own_rows else [learned]
    options = {"data_collator": collator, "processing_class": request.tokenizer}
    options |= metrics_of(request, rows.classes) | given
    with scratch_folder() as folder:
        evaluates = rows.evaluation is not None
        settings = build_arguments(fields, request.arguments_class, folder=str(folder), evaluates=evaluates)
        measured = rows.evaluation
        if isinstance(request.members, SideBySide):
            learned, measured = request.members.take_rows(learned, measured)
        options |= {"args": settings, "train_dataset": learned, "eval_dataset": measured}
        failures: list[Exception] = []
        try:
            with _activated(model, request.adapter) as activation:
                shown = {"control": request.control, "publish": request.publish}
                activation.run = run = request.run_factory(model, None, **shown)
                activation.note_format(model, rows)
                run.output_dir = str(fields.get("output_dir", ""))
                if objective.rows:
                    request = replace(request, reference=chosen_reference(request, learned))
                rows_note = _note(run, request, objective, rows, settings)
                kept = given | fields | request.kept() | kept_of(request.members)
                kept.pop("resume_from_checkpoint", None)
                if launch is not None:
                    scored = replace(request, score=scorer)
                    metrics = _fit_in_subprocesses(scored, run, launch, rows, rows_note, kept)
                else:
                    options |= _objective_options(request, objective)
                    # Callbacks are not in a variable: a stored error would keep their copies of weights alive.
                    checks = [PackingCheck(run, part, collator) for part in packed]
                    outer = _outer_callbacks(request, run, kept, rows)
                    metrics = _fit(request, run, options, outer, _inner_callbacks(request, run, checks, scorer), fields)
        except Exception as error:
            failures.append(_error_to_raise(error, model, settings))
            if failures[0] is error and not isinstance(error, NbpeftError):
                failures.clear()
                raise
    if failures:  # raised outside of the handler, so that the new error does not reference the frames of the old one
        raise failures.pop().with_traceback(None)
    return _unless_interrupted(_result(request, run, metrics), run)


def _packed(request: TrainRequest, rows: TrainingRows, collator: Any, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the packed training rows, of each adapter if it has its own, and their collator."""
    sizes = {"max_length": request.max_length, "tokenizer": request.tokenizer, "given": given}
    if not request.own_rows:
        return pack(request.model, rows.train, collator, **sizes)
    found = {name: pack(request.model, part, collator, **sizes) for name, part in rows.train.items()}
    return {name: part for name, (part, _) in found.items()}, next(iter(found.values()))[1]


def _checked(request: TrainRequest) -> tuple[nn.Module, Launch | None, dict[str, Any], dict[str, Any]]:
    """Refuses arguments that cannot be trained with, before rows are read.

    Returns:
        The model, how many processes train it, fields of the arguments class, and options of the Trainer.
    """
    model = request.model
    _can_train(model, request.adapter)
    _takes_labels(model, request.trainer_class, request.arguments)
    trainer_class = adapter_trainer(_checked_class(request.trainer_class, transformers.Trainer, "trainer_class"))
    arguments_class = _checked_class(request.arguments_class, TrainingArguments, "arguments_class")
    fields, options = split_arguments(request.arguments, trainer_class, arguments_class)
    check_options(options)
    check_report_to(fields.get("report_to"))
    tracker_names(request.track)
    launch = launch_of(request.processes, request.machines, sharded=bool(fields.get("fsdp")))
    if launch is not None and request.members is not None:
        raise ConfigError("A sweep trains in one process: remove processes or the sweep", field="processes")
    _refuse_other_adapters(model, {} if request.replace else fields)
    return model, launch, fields, options


def _unless_interrupted(result: TrainResult, run: Run) -> TrainResult:
    """Returns the result, or raises TrainingInterrupted with it."""
    if run.interrupted:
        left = run.lost or ("progress is kept" if run.steps_done else "the adapters are unchanged")
        raise TrainingInterrupted(f"{result} · {left}", result)
    return result


def _refuse_other_adapters(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Refuses an ``output_dir`` with another adapter; a folder that training resumes from is accepted.

    Raises:
        AdapterExistsError: saving would overwrite another adapter.
    """
    folder, manager, resumed = fields.get("output_dir"), manager_of(model), fields.get("resume_from_checkpoint")
    if manager is None or not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        return
    home = Path(os.path.expanduser(folder)).resolve()
    inside = isinstance(resumed, str | os.PathLike) and home in Path(os.path.expanduser(resumed)).resolve().parents
    if resumed is not True and not inside:
        files.refuse_other_adapters(manager, home)


def _note(
    run: Run, request: TrainRequest, objective: Objective, rows: TrainingRows, settings: TrainingArguments
) -> str:
    """Adds notes about objective, rows, slow dtypes and samples to the run; returns the note about rows."""
    run.note(objective_text(objective, request.objective_reason, request.reference))
    if isinstance(request.rewards, Rewards):
        run.note(request.rewards.note)
        run.learns_from_rewards = True
    for part in (*rows.train_parts, *rows.evaluation_parts):
        if isinstance(part, StreamedRows):
            part.report = run.note
    note_on_rows = "; ".join(note for note in (*rows.notes, rows.held_out) if note)
    note_on_rows += f" ({request.data_hint})" if request.data_hint and rows.notes else ""
    run.note(note_on_rows)
    if objective.rows == JUDGED and request.processes is None and not settings.dataloader_drop_last:
        sizes = {"an epoch": settings.train_batch_size, "an evaluation": settings.eval_batch_size}
        for parts, (name, size) in zip((rows.train_parts, rows.evaluation_parts), sizes.items(), strict=True):
            if any(not is_stream(part) and len(part) % size == 1 for part in parts):
                run.note(f"the last batch of {name} has one row, and its kl is estimated from this row itself")
    if settings.bf16 and settings.device.type == "cpu" and slow_here(torch.bfloat16):
        run.note(slow_dtype_message(torch.bfloat16, instead="leave bf16=True out"))
    for note in request.sample.notes if isinstance(request.sample, SamplePrompts) else ():
        run.note(note)
    return note_on_rows


def _not_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _can_train(model: nn.Module, adapter: str | None) -> None:
    """Refuses a model that cannot be trained, as it is or after activating an adapter."""
    if not is_adapted(model):
        raise TrainingError(f"{type(model).__name__} has no adapters: add one first, then train.")
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
        _can_learn(model)


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
        "loop yourself and show it with nbpeft.track(model), or pass a trainer_class with a compute_loss of its own"
    )


def _can_learn(model: nn.Module) -> None:
    if not getattr(getattr(model, "manager", None), "enabled", True):
        raise TrainingError(
            "The adapters are disabled, so nothing would be trained: enable them first (model.enable_adapter_layers())."
        )
    if next(trainable(model), None) is None:
        names = ", ".join(map(repr, active_names(model))) or "none"
        raise TrainingError(
            f"Nothing is trainable (active adapters: {names}): unfreeze one, or activate a trainable one."
        )


class _Activation:
    """Records the run for which an adapter may have been activated, and the form of its rows with the adapters."""

    run: Run | None = None

    def __init__(self) -> None:
        self._rows: TrainingRows | None = None
        self._formers: list[tuple[str, AdapterConfig, PromptFormat | None]] = []
        self._unname: Callable[[], None] = lambda: None

    def note_format(self, model: nn.Module, rows: TrainingRows) -> None:
        """Records the form of the rows with the adapters to train, before their first state is saved."""
        manager = manager_of(model)
        names = trained_names(model)
        self._unname = name_classes(base_of(model), rows.format_for(names[0] if names else ""))
        if manager is not None and any(rows.format_for(name) is not None for name in names):
            self._rows = rows
            configs = {name: manager.configs[name] for name in names}
            self._formers = [(name, config, prompt_format(config)) for name, config in configs.items()]
            self._put()

    def end(self) -> None:
        """Restores the former form of rows of the adapters if they learned nothing."""
        if not self.learned:
            self._unname()
            for _, config, former in self._formers:
                set_prompt_format(config, former)
        elif self._rows is not None:
            self._put()  # more of a stream was read

    def _put(self) -> None:
        for name, config, _ in self._formers:
            set_prompt_format(config, None if self._rows is None else self._rows.format_for(name))

    @property
    def learned(self) -> bool:
        """Whether training has changed the model."""
        return self.run is not None and (self.run.steps_done > 0 or self.run.state.status == "finished")


@contextmanager
def _activated(model: Any, adapter: str | None) -> Iterator[_Activation]:
    """Activates an adapter; restores the active and merged adapters if nothing was learned."""
    activation = _Activation()
    if adapter is None:
        try:
            yield activation
        finally:
            activation.end()
        return
    manager = model.manager
    active, enabled, merged = manager.active, manager.enabled, manager.merged
    try:
        with manager.transaction():
            manager.activate(adapter)
            if not enabled:
                manager.enable()
            _can_learn(model)
        yield activation
    finally:
        activation.end()
        if not activation.learned:
            with HeldInterrupts(to_the_end=True), manager.transaction():
                if active:
                    manager.activate(active)
                if merged:
                    manager.merge(merged)
                if not enabled:
                    manager.disable()


def _checked_class(given: Any, base: type[Any], name: str) -> Any:
    if not (isinstance(given, type) and issubclass(given, base)):
        raise ConfigError(f"{name} must be a class derived from {base.__name__}, not {given!r:.60}", field=name)
    return given


def _sample_prompts(request: TrainRequest, rows: TrainingRows) -> SamplePrompts | None:
    """Returns the prompts to sample, if there are any, in the same form as the training rows."""
    if isinstance(request.sample, SamplePrompts):  # of the process that launched this one
        return request.sample
    if request.sample is not None:
        return sample_prompts(request, rows)
    if request.every is not None and request.score is None:
        raise ConfigError("every has no effect without sample=… or score=…", field="every")
    return None


def _check_length_known(rows: Any, fields: Mapping[str, Any]) -> None:
    """Refuses a stream without a number of steps."""
    steps = fields.get("max_steps")
    if is_stream(rows) and not (isinstance(steps, int) and steps > 0):
        raise ConfigError(
            "The rows are a stream of unknown length: set the number of steps, e.g. max_steps=200",
            field="max_steps",
        )


def _outer_callbacks(
    request: TrainRequest, run: Run, kept: Mapping[str, Any], rows: TrainingRows
) -> list[RunCheckpointer | TrackCallback]:
    """Returns the callbacks that see the end of the run."""
    keeper, trackers = (
        _checkpointer(request, run, kept, mark_of_rows(rows.train, rows.evaluation)),
        tracker_names(request.track),
    )
    tracking = TrackCallback(trackers, run, kept) if trackers else None
    return [part for part in (keeper, tracking) if part is not None]


def _inner_callbacks(
    request: TrainRequest, run: Run, checks: Sequence[PackingCheck], scorer: Scorer | None
) -> list[TrainerCallback]:
    """Returns the callbacks that end before the run does.

    One of them ends a diverging training, or removes diverging adapters from a sweep.
    """
    model, guarded, group, patience = request.model, request.stop_on_divergence, request.members, request.patience
    found: list[TrainerCallback] = [*checks]
    if isinstance(group, SideBySide):
        how = {"stop_on_divergence": guarded, "halves": request.stop is not None}
        found += callbacks_of(group, run, model, patience=patience, **how)
    else:
        found += [DivergenceStop(run, model)] if guarded else []
        found += [] if patience is None else [EarlyStop(run, model, patience)]
    if scorer is not None:
        for note in scorer.notes:
            run.note(f"rows to score: {note}")
        members = (lambda: group.training) if isinstance(group, SideBySide) else None
        found.append(ScoreCallback(run, model, scorer, request.every, members))
    prompts = request.sample
    return found + ([SampleCallback(run, model, prompts, request.every)] if isinstance(prompts, SamplePrompts) else [])


def _checkpointer(
    request: TrainRequest, run: Run, kept: Mapping[str, Any], data: Mapping[str, Any]
) -> RunCheckpointer | None:
    """Returns the callback that saves the run on disk, if it is to be saved."""
    if request.run_dir is None:
        return None
    if manager_of(request.model) is None:
        run.note("runs of models adapted by another library are not saved on disk")
        return None
    chosen = RunPlace.of(request.run_dir)
    if chosen.name is not None:
        check_rows_are_those(chosen.name, chosen.store.find(chosen.name).facts().get("data") or {}, data)
    return RunCheckpointer(chosen, run, request.model, kept, data)


def _fit(
    request: TrainRequest,
    run: Run,
    options: dict[str, Any],
    outer: Sequence[RunCheckpointer | TrackCallback],
    inner: Sequence[Any],
    fields: Mapping[str, Any],
) -> dict[str, float]:
    """Runs a Trainer, and removes everything of it from the model afterwards.

    Args:
        request: the arguments of the training.
        run: receives the progress.
        options: options of the Trainer.
        outer: callbacks that see the end of the run.
        inner: callbacks that end before the run does.
        fields: the given fields of the arguments; with ``output_dir`` the adapter is saved at the end.
    """
    model = request.model
    trainer: Any = None
    metrics: dict[str, float] = {}
    keep = "output_dir" in fields
    try:
        with restoring(model):
            with ExitStack() as block:
                block.enter_context(_interrupted_once(run))
                for part in outer:
                    block.enter_context(part)
                block.enter_context(run)
                trainer = _make_trainer(request.trainer_class, model, options)
                trainer.remove_callback(PrinterCallback)  # it prints each log entry, which the run displays
                group_rows(trainer, wanted=wants_groups(fields))
                callback = RunCallback(run)
                _connect(trainer, outer, inner)
                # Guards first: they end a diverging training before other callbacks record or save its state.
                guards = [item for item in inner if isinstance(item, DivergenceStop | SideBySideCallback)]
                for item in (*guards, *outer, callback, *(item for item in inner if item not in guards)):
                    trainer.add_callback(item)
                for item in inner:
                    if isinstance(item, EarlyStop):
                        block.enter_context(item)
                metrics = _train(trainer, model, callback, options["args"])
            if keep and trainer is not None:
                _save_and_push(trainer, run)
                for keeper in (part for part in outer if isinstance(part, RunCheckpointer)):
                    keeper.mark_saved(str(fields["output_dir"]))
        return metrics
    finally:
        manager = manager_of(model)
        if manager is not None and run.steps_done and not keep:  # checkpoints in a scratch folder go with it
            mark_unsaved(manager, *trained_names(model))
        if trainer is not None:
            noise = getattr(trainer, "neftune_hook_handle", None)  # an interrupted Trainer leaves it on
            if noise is not None:
                noise.remove()
            trainer.accelerator.free_memory()
            for owner in (trainer, trainer.callback_handler):
                owner.model = owner.optimizer = owner.lr_scheduler = None
            trainer.model_wrapped = None


def _save_and_push(trainer: Any, run: Run) -> None:
    """Saves the adapter in ``output_dir``, and pushes it if the arguments say so; a hub that fails is a warning."""
    if not trainer.args.push_to_hub:
        trainer.save_model()
        return
    trainer.save_model(_internal_call=True)  # without its push
    try:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    except Exception as error:  # of the hub's client, of its HTTP client, or of what a broken hub answers
        saved = f"the adapter is saved in {trainer.args.output_dir}, but was not pushed to {trainer.hub_model_id}"
        run.note(f"{saved} ({reason_of(error)}); push it again", warning=True)


def _connect(trainer: Any, outer: Sequence[RunCheckpointer | TrackCallback], inner: Sequence[Any]) -> None:
    """Connects callbacks that work together."""
    stops = [item for item in inner if isinstance(item, EarlyStop)]
    for guard in inner:
        if isinstance(guard, DivergenceStop) and stops:
            guard.best = stops[0]
    for part in inner:
        if isinstance(part, ScoreCallback):
            part.trainer, trainer.scored_metrics = trainer, part.metrics
    for keeper in outer:
        if isinstance(keeper, RunCheckpointer):
            keeper.trainer = trainer
            for stop in stops:
                stop.keep_last, keeper.write_more = keeper.keep_last, stop.write


def _fit_in_subprocesses(
    request: TrainRequest, run: Run, launch: Launch, rows: TrainingRows, rows_note: str, kept: Mapping[str, Any]
) -> dict[str, float]:
    """Runs a Trainer in each of several processes, as ``_fit`` runs one in this process.

    Args:
        request: the arguments of the training.
        run: receives the progress.
        launch: the processes to start.
        rows: the rows of the training.
        rows_note: note about the rows, which the processes add to their record of the run.
        kept: arguments for the record: those given here, and not those of the processes.
    """
    if is_stream(rows.train):
        raise TrainingError("several processes cannot share a stream of rows: pass a list or a dataset")
    metrics: dict[str, float] = {}
    learned, place, fields = rows.train, request.run_dir, request.arguments
    apart = replace(
        request,
        data=learned.noting(*([rows_note] if rows_note else [])) if isinstance(learned, TokenizedRows) else learned,
        eval_data=rows.evaluation.noting() if isinstance(rows.evaluation, TokenizedRows) else rows.evaluation,
        columns=None,
        data_hint="",
        adapter=None,
        control=None,
        publish=None,
        run_factory=Run,
        run_dir=None if place is None else replace(RunPlace.of(place), arguments=kept),
        replace=True,  # the folder was checked here
    )
    run.mirrors = True
    with _interrupted_once(run), run:
        metrics = train_in_subprocesses(apart, run, launch)
    manager = manager_of(request.model)
    if manager is not None and run.steps_done and "output_dir" not in fields:
        mark_unsaved(manager, *trained_names(request.model))
    return metrics


@contextmanager
def _interrupted_once(run: Run) -> Iterator[None]:
    """Suppresses the KeyboardInterrupt of an interrupted run, which is raised again after everything is restored."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.interrupted:
            raise


def _make_trainer(trainer_class: type[Any], model: nn.Module, options: dict[str, Any]) -> Any:
    try:
        return trainer_class(model=model, **options)
    except Exception as error:
        if isinstance(error, NbpeftError) or is_out_of_memory(error):
            raise
        reason = reason_of(error)
        if "to be installed" in reason:
            raise ConfigError(f"report_to: {reason}", field="report_to") from error
        library = type(error).__module__.partition(".")[0]
        network = isinstance(error, OSError) or library in ("httpx", "httpcore", "requests", "huggingface_hub")
        if options["args"].push_to_hub and network:
            raise ConfigError(
                f"push_to_hub: the hub cannot be reached ({reason}); remove it, and push after the training",
                field="push_to_hub",
            ) from error
        raise ConfigError(f"{trainer_class.__name__} refuses these arguments: {reason}") from error


def _train(trainer: Any, model: nn.Module, callback: RunCallback, settings: TrainingArguments) -> dict[str, float]:
    """Trains, and turns out-of-memory errors, and errors before the first batch, into errors of one line."""
    try:
        output = trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
        return {name: float(value) for name, value in output.metrics.items()}
    except Exception as error:
        if not is_out_of_memory(error):
            if isinstance(error, NbpeftError) or callback.run.total_steps is not None:
                raise
            raise ConfigError(f"The run cannot start with these arguments: {reason_of(error)}") from error
        failure = oom_error(
            error,
            model,
            settings,
            callback.batch_shape,
            optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            step=trainer.state.global_step,  # reading the state of the run would allocate
            costs=step_settings(trainer),
        )
    raise failure  # outside of the handler, so that it does not reference the frames of the old one


def _error_to_raise(error: Exception, model: nn.Module, settings: TrainingArguments) -> Exception:
    """Returns the error to raise: one line for known problems, with memory freed; otherwise the error itself."""
    if isinstance(error, NbpeftError):
        free_memory()
        return error
    if not is_out_of_memory(error):
        lost = "does not require grad" in str(error) and isinstance(error, RuntimeError) and why_no_gradient(model)
        return TrainingError(explain_failure(error, model)) if lost or trains_in_half(error) else error
    return oom_error(error, model, settings, None, optimizer=None, step=0)


def _objective_options(request: TrainRequest, objective: Objective) -> dict[str, Any]:
    """Returns the options of the Trainer that computes the objective's loss."""
    if not objective.rows:
        return {}
    name = request.reference
    found = {"objective": objective, "reference": None if name is None else reference_of(request.model, name)}
    return {**found, **({"rewards": request.rewards} if objective.generates else {})}


def _result(request: TrainRequest, run: Run, metrics: dict[str, float]) -> TrainResult:
    state, objective = run.state, request.objective
    return TrainResult(
        status="stopped" if state.status == "stopped" else "finished",
        adapter=state.adapter,
        steps=state.step,
        total_steps=state.total_steps,
        loss=state.loss,
        train_loss=state.mean_loss,
        eval_loss=state.eval_loss,
        seconds=state.elapsed,
        token_count=run.token_count,
        tokens_per_second=state.tokens_per_second,
        output_dir=request.arguments.get("output_dir"),
        objective=objective.name if isinstance(objective, Objective) else "",
        reference=request.reference,
        message=state.message,
        metrics=metrics,
        state=state,
        shown=run.shown,
    )
