"""Runs a Trainer in this process, and removes everything of it from the model afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.engine.contract.trained import mark_unsaved
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, NbpeftError
from nbpeft.runs.store import RunPlace
from nbpeft.training.adapters.adapted_model import trained_names
from nbpeft.training.loop.grouping import group_rows, wants_groups
from nbpeft.training.loop.late_evaluation import late_evaluation
from nbpeft.training.loop.packing import PackingCheck
from nbpeft.training.loop.restoring import restoring
from nbpeft.training.loop.rows import TrainingRows
from nbpeft.training.monitor.callback import RunCallback
from nbpeft.training.monitor.failures import oom_error
from nbpeft.training.monitor.run import Run
from nbpeft.training.monitor.run_checkpointer import RunCheckpointer, check_rows_are_those, mark_of_rows
from nbpeft.training.request import TrainRequest
from nbpeft.training.sweep.evaluations import SweepEvaluations
from nbpeft.training.sweep.members import SideBySide
from nbpeft.training.sweep.trainer import SideBySideCallback
from nbpeft.training.transformers.arguments import reason_of
from nbpeft.training.transformers.trainer import step_settings
from nbpeft.training.watching.divergence import DivergenceStop
from nbpeft.training.watching.early_stop import EarlyStop
from nbpeft.training.watching.prompts import SamplePrompts
from nbpeft.training.watching.sampling import SampleCallback
from nbpeft.training.watching.scoring import ScoreCallback, Scorer
from nbpeft.training.watching.trackers import TrackCallback, tracker_names


def outer_callbacks(
    request: TrainRequest, run: Run, kept: Mapping[str, Any], rows: TrainingRows
) -> list[RunCheckpointer | TrackCallback]:
    """Returns the callbacks that see the end of the run."""
    keeper = _checkpointer(request, run, kept, mark_of_rows(rows.train, rows.evaluation))
    trackers = tracker_names(request.track)
    tracking = TrackCallback(trackers, run, kept) if trackers else None
    return [part for part in (keeper, tracking) if part is not None]


def inner_callbacks(
    request: TrainRequest, run: Run, checks: Sequence[PackingCheck], scorer: Scorer | None
) -> list[TrainerCallback]:
    """Returns the callbacks that end before the run does.

    One of them ends a diverging training, or removes diverging adapters from a sweep.
    """
    model, guarded, group, patience = request.model, request.stop_on_divergence, request.members, request.patience
    found: list[TrainerCallback] = [*checks]
    if isinstance(group, SideBySide):
        found += [SideBySideCallback(group, run, stop_on_divergence=guarded)]
        found += [SweepEvaluations(group, run, model, patience, halves=request.halving)]
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


def fit(
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
                block.enter_context(interrupted_once(run))
                for part in outer:
                    block.enter_context(part)
                block.enter_context(run)
                trainer = _make_trainer(request.trainer_class, model, options)
                trainer.remove_callback(PrinterCallback)  # it prints each log entry, which the run displays
                group_rows(trainer, wanted=wants_groups(fields))
                callback = RunCallback(run)
                block.enter_context(late_evaluation(trainer, run))
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
        if manager is not None and run.learned and not keep:  # checkpoints in a scratch folder go with it
            mark_unsaved(manager, *trained_names(model))
        if trainer is not None:
            _release(trainer)


def _release(trainer: Any) -> None:
    """Takes everything of a Trainer off its model, and the model, optimizer and scheduler off the Trainer."""
    noise = getattr(trainer, "neftune_hook_handle", None)  # an interrupted Trainer leaves it on
    if noise is not None:
        noise.remove()
    # A traceback or a callback may keep the Trainer alive, which must not keep the model and optimizer alive.
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


@contextmanager
def interrupted_once(run: Run) -> Iterator[None]:
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
