"""``train(model, data)``: training in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft._util.optional import needs
from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.checkpoint import PromptFormat, name_classes, prompt_format, scratch_folder, set_prompt_format
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.trained import mark_unsaved
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, NbpeftError, TrainingError, TrainingInterrupted, few
from nbpeft.memory.processor import slow_dtype_message, slow_here
from nbpeft.names import JUDGED
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState
from nbpeft.sweeps import swept
from nbpeft.training.adapters.adapted_model import base_of, trained_names
from nbpeft.training.adapters.learning_check import why_no_gradient
from nbpeft.training.data import PackedRows, StreamedRows, TokenizedRows, is_stream
from nbpeft.training.launch.parent import train_in_subprocesses
from nbpeft.training.launch.processes import Launch
from nbpeft.training.loop.checks import check_learns, check_length_known, checked, checked_scorer
from nbpeft.training.loop.fitting import fit, inner_callbacks, interrupted_once, outer_callbacks
from nbpeft.training.loop.objective import batches_of, chosen_reference, metrics_of, objective_text, with_objective
from nbpeft.training.loop.packing import PackingCheck, pack
from nbpeft.training.loop.rows import TrainingRows, training_rows
from nbpeft.training.loop.sampled_rows import sample_prompts
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.failures import explain_failure, free_memory, oom_error, trains_in_half
from nbpeft.training.monitor.result import TrainResult
from nbpeft.training.monitor.run import Run
from nbpeft.training.objectives.objective import Objective, fields_by_name
from nbpeft.training.objectives.reference import reference_of
from nbpeft.training.request import TrainRequest
from nbpeft.training.rewards.functions import Rewards
from nbpeft.training.sweep.adapters import side_by_side
from nbpeft.training.sweep.members import SideBySide, kept_of
from nbpeft.training.sweep.rows import with_own_rows
from nbpeft.training.transformers.arguments import build_arguments
from nbpeft.training.transformers.trainer import Trainer
from nbpeft.training.transformers.unused_fields import Beside, unused_fields
from nbpeft.training.watching.generation import Prompt
from nbpeft.training.watching.prompts import SamplePrompts


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
    max_new_tokens: int | None = None,
    packing: bool = False,
    control: RunControl | None = None,
    publish: Callable[[TrainState], None] | None = None,
    run_factory: Callable[..., Run] = Run,
    trainer_class: type[Any] = Trainer,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    run_dir: RunPlace | str | os.PathLike[str] | None = None,
    track: str | Sequence[str] | None = None,
    members: Mapping[str, Mapping[str, Any]] | SideBySide | None = None,
    halving: bool = False,
    stop_on_divergence: bool = True,
    processes: int | None = None,
    hosts: Sequence[str] | None = None,
    replace: bool = False,
    objective: str | None = None,
    reference: str | None = None,
    reward: Any = None,
    **arguments: Any,
) -> TrainResult:
    """Trains the active adapters of ``model``.

    A stopped training (Stop or Pause of ``control``) returns its result like any other, and the model keeps what it
    learned. An interrupted one (KeyboardInterrupt) does the same and then raises ``TrainingInterrupted`` with the
    result. After an error before the first step, the model and its active and merged adapters are unchanged.

    With ``sweep(…)`` as a field, e.g. ``learning_rate=sweep(1e-4, 3e-4)`` or ``r=sweep(8, 64)``, one adapter per value
    or combination is trained side by side with the others, as if alone: ``codes-lr1e-4`` and so on. They start as
    copies of the active adapter, or from new weights if the config varies; adapters with these names must not exist.
    The result is a :class:`SweepResult`; its best adapter is active afterwards.

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
        max_new_tokens: Limit of a scored answer, in tokens (default: as in :func:`nbpeft.score`).
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
        halving: Successive halving of a sweep: each time the number of steps has doubled, the worse half of the
            adapters by evaluation loss or score is stopped, until one remains in the second half of the steps.
        stop_on_divergence: Stop if the loss is NaN or infinite or the weights explode, and restore the last good
            weights; in a sweep only that adapter stops. Copying the trainable weights takes about 1 % of the time, and
            host memory of their size. See :mod:`nbpeft.training.watching.divergence`.
        processes: Number of training processes on this machine, one per GPU; see :mod:`nbpeft.training.launch`. Each
            takes ``per_device_train_batch_size`` rows per step. ``fsdp=True`` shards the model over them.
        hosts: Addresses of machines with the same folders, this one's first; ``processes`` is the number on each.
        replace: Overwrite another adapter in ``output_dir``: one with another name, base model or other tensors.
        objective: ``sft``, ``classify``, ``dpo``, ``orpo``, ``simpo``, ``cpo``, ``kto``, ``reward`` or ``grpo``. By
            default it follows from the rows and the model: ``dpo`` for rows with chosen and rejected, ``reward`` if
            the model is a classifier with one label, ``kto`` for rows with labels of good and bad completions,
            ``grpo`` with ``reward``. See :mod:`nbpeft.training.objectives`.
        reference: Reference of ``dpo`` and ``kto``: ``base`` (the model without adapters), ``start`` (the adapter's
            weights at the beginning) or the name of another adapter. By default ``base`` for an adapter that does not
            change the model yet, and ``start`` for others.
        reward: For ``grpo``: one or several functions that score completions of the rows' prompts:
            ``f(completions, prompts, **columns) -> list[float]``, as for TRL's GRPOTrainer. See
            :mod:`nbpeft.training.rewards`.
        **arguments: Fields of the arguments class (``learning_rate``, ``max_steps``, …) and of the objective
            (``beta``, ``loss_type``, …), and options of the Trainer (``callbacks``, ``compute_metrics``,
            ``data_collator``, …). With ``output_dir`` the adapter is saved there at the end; without it, nothing is
            saved.

    Returns:
        The losses, metrics, scores and answers of the run, and its state.

    Raises:
        AdapterExistsError: ``output_dir`` contains another adapter, or an adapter of a sweep exists already.
        ConfigError: an argument is unknown or invalid.
        MissingPackageError: accelerate, which transformers' Trainer needs, is not installed.
        TrainingError: nothing is trainable, the data cannot be read, or memory ran out.
        TrainingInterrupted: an interruption ended the run; the model keeps what it learned.
    """
    return run_training(TrainRequest(**locals()))


def run_training(request: TrainRequest) -> TrainResult:
    """Trains like :func:`train`, which documents the errors."""
    if not isinstance(request.members, SideBySide):
        request, several = _with_objective(request)
        if several:
            return side_by_side(run_training, request)
    model, launch, fields, options = checked(request)
    request = request.opened()
    rows = training_rows(request)
    check_length_known(rows.train, fields)
    scorer = checked_scorer(request, rows, fields)
    request = replace(request, sample=_sample_prompts(request, rows))
    given = {name: value for name, value in options.items() if value is not None}
    if "data_collator" in given:  # which takes all columns
        fields = {"remove_unused_columns": False, **fields}
    objective = request.objective
    assert isinstance(objective, Objective)
    learned, collator, packed = _batches(request, rows, objective, given)
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
                beside = Beside(evaluates, scorer is not None, bool(request.track), launch is not None)
                run.note(unused_fields(request.arguments, settings, beside))
                kept = given | fields | request.kept() | kept_of(request.members)
                kept.pop("resume_from_checkpoint", None)
                if launch is not None:
                    scored = replace(request, score=scorer)
                    metrics = _fit_in_subprocesses(scored, run, launch, rows, rows_note, kept)
                else:
                    options |= _objective_options(request, objective)
                    # Callbacks are not in a variable: a stored error would keep their copies of weights alive.
                    checks = [PackingCheck(run, part, collator) for part in packed]
                    outer = outer_callbacks(request, run, kept, rows)
                    metrics = fit(request, run, options, outer, inner_callbacks(request, run, checks, scorer), fields)
        except Exception as error:
            failures.append(_error_to_raise(error, model, settings))
            if failures[0] is error and not isinstance(error, NbpeftError):
                failures.clear()
                raise
    if failures:  # raised outside of the handler, so that the new error does not reference the frames of the old one
        raise failures.pop().with_traceback(None)
    return _unless_interrupted(_result(request, run, metrics), run)


def _with_objective(request: TrainRequest) -> tuple[TrainRequest, bool]:
    """Returns the request with its objective, and whether it is for several adapters."""
    with needs("accelerate", "Training"):
        importlib.import_module("accelerate")
    request = with_own_rows(request)
    several = request.members is not None or bool(swept(request.given))
    if not several:  # a sweep activates its adapters first
        known = fields_by_name()
        plain = {name: value for name, value in request.arguments.items() if name not in known}
        checked(replace(request, arguments=plain))
    return with_objective(request), several


def _batches(
    request: TrainRequest, rows: TrainingRows, objective: Objective, given: Mapping[str, Any]
) -> tuple[Any, Any, list[PackedRows]]:
    """Returns the training rows, packed if that is requested, their collator, and all packed rows."""
    collator = batches_of(request, objective)
    if not request.packing:
        return rows.train, collator, []
    sizes = {"max_length": request.max_length, "tokenizer": request.tokenizer, "given": given}
    if not request.own_rows:
        packed, collator = pack(request.model, rows.train, collator, **sizes)
        return packed, collator, [packed]
    found = {name: pack(request.model, part, collator, **sizes) for name, part in rows.train.items()}
    learned = {name: part for name, (part, _) in found.items()}
    return learned, next(iter(found.values()))[1], list(learned.values())


def _unless_interrupted(result: TrainResult, run: Run) -> TrainResult:
    """Returns the result, or raises TrainingInterrupted with it."""
    if run.interrupted:
        begun = "its first step had begun to change the adapters" if run.touched else "the adapters are unchanged"
        left = run.lost or ("progress is kept" if run.steps_done else begun)
        raise TrainingInterrupted(f"{result} · {left}", result)
    return result


def _note(
    run: Run, request: TrainRequest, objective: Objective, rows: TrainingRows, settings: TrainingArguments
) -> str:
    """Adds notes about objective, rows, slow dtypes and samples to the run; returns the note about rows."""
    if isinstance(request.members, SideBySide):
        run.note(request.members.start)
    run.headline = objective.headline()
    run.note(objective_text(objective, request.objective_reason, request.reference))
    run.note(request.rate_reason)
    if isinstance(request.reward, Rewards):
        run.note(request.reward.note)
    for part in (*rows.train_parts, *rows.evaluation_parts):
        if isinstance(part, StreamedRows):
            part.report = run.note
    run.rows = replace(run.rows, unmapped=request.unmapped, numbered=bool(rows.unlearned))
    run.unlearned = rows.unlearned
    facts = "; ".join(rows.notes) + (f" ({request.data_hint})" if request.data_hint and rows.notes else "")
    note_on_rows = "; ".join(note for note in (facts, rows.held_out) if note)
    run.note(note_on_rows)
    if objective.rows == JUDGED and request.processes is None and not settings.dataloader_drop_last:
        step = settings.train_batch_size * settings.gradient_accumulation_steps
        sizes = {"an epoch": step, "an evaluation": settings.eval_batch_size}
        for parts, (name, size) in zip((rows.train_parts, rows.evaluation_parts), sizes.items(), strict=True):
            if any(not is_stream(part) and len(part) % size == 1 for part in parts):
                run.note(f"the last batch of {name} has one row, and its kl is estimated from this row itself")
    if settings.bf16 and settings.device.type == "cpu" and slow_here(torch.bfloat16):
        run.note(slow_dtype_message(torch.bfloat16, instead="leave bf16=True out"))
    for note in request.sample.notes if isinstance(request.sample, SamplePrompts) else ():
        run.note(note)
    return note_on_rows


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
            self._note_other_format(rows)
            self._put()

    def _note_other_format(self, rows: TrainingRows) -> None:
        """Warns of adapters that were trained with the chat template and now are not, or the other way round."""
        was = {name: former for name, _, former in self._formers if former is not None and not former.classes}
        now = {name: rows.format_for(name) for name in was}
        other = [name for name, form in now.items() if form is not None and form.chat is not was[name].chat]
        if other and self.run is not None:
            how = ("with", "not ") if was[other[0]].chat else ("without", "")
            self.run.note(
                f"{few(other)} learned {how[0]} the chat template, which is {how[1]}applied here", warning=True
            )

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
        return self.run is not None and (self.run.learned or self.run.state.status == "finished")


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
            check_learns(model)
        yield activation
    finally:
        activation.end()
        if not activation.learned:
            with DeferredInterrupts(to_the_end=True), manager.transaction():
                if active:
                    manager.activate(active)
                if merged:
                    manager.merge(merged)
                if not enabled:
                    manager.disable()


def _sample_prompts(request: TrainRequest, rows: TrainingRows) -> SamplePrompts | None:
    """Returns the prompts to sample, if there are any, in the same form as the training rows."""
    if isinstance(request.sample, SamplePrompts):  # of the process that launched this one
        return request.sample
    if request.sample is not None:
        return sample_prompts(request, rows)
    if request.every is not None and request.score is None:
        raise ConfigError("every has no effect without sample=… or score=…", field="every")
    return None


def _fit_in_subprocesses(
    request: TrainRequest, run: Run, launch: Launch, rows: TrainingRows, rows_note: str, kept: Mapping[str, Any]
) -> dict[str, float]:
    """Runs a Trainer in each of several processes, as ``fit`` runs one in this process."""
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
    with interrupted_once(run), run:
        metrics = train_in_subprocesses(apart, run, launch)
    manager = manager_of(request.model)
    if manager is not None and run.steps_done and "output_dir" not in fields:
        mark_unsaved(manager, *trained_names(request.model))
    return metrics


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
    return {**found, **({"rewards": request.reward} if objective.generates else {})}


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
        held_out=run.unlearned[""].numbers if "" in run.unlearned else (),
        message=state.message,
        metrics=metrics,
        state=state,
        shown=run.shown,
    )
