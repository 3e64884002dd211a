"""What a Trainer does instead where FSDP2 shards a model of ours: files hold every process's part of the adapters.

accelerate gathers whole state dicts, base and all, or the adapter's part of one process, and to read an optimizer's
state before its first step it does a step. Here the adapters and what trains them are gathered alone, into the files
that a training of one process has: a checkpoint of the one goes on as the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.model.saving import files
from nbpeft.model.saving.sharded import gathered_state, is_sharded, note_fingerprint, noted_fingerprint, state_like
from nbpeft.training.adapters.method_state import (
    drop_mismatched_moments,
    note,
    read_method_state,
    save_in_training,
    write_method_state,
)
from nbpeft.training.disk.checkpoints import in_checkpoint, save_beside

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_LACKS = "lacks what the method keeps from step to step (an earlier version wrote it): that begins anew here"


def note_base(trainer: Any) -> None:
    """Takes the fingerprint of the base before it is sharded."""
    manager = manager_of(trainer.model)
    if manager is not None and not manager.merged and getattr(trainer, "is_fsdp_enabled", False):
        note_fingerprint(manager.model)


def base_mark(trainer: Any) -> Any:
    """The fingerprint that ``note_base`` took, or None."""
    manager = manager_of(trainer.model)
    return None if manager is None else noted_fingerprint(manager.model)


def save_model(
    original: Callable[..., Any], trainer: Any, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """As the Trainer's; of a sharded model the adapters alone, whole."""
    if not is_sharded(trainer.model) or trainer.is_deepspeed_enabled:
        original(trainer, output_dir, _internal_call)
        return
    folder = Path(output_dir if output_dir is not None else trainer.args.output_dir)
    manager = manager_of(trainer.model)
    assert manager is not None
    write = bool(trainer.args.should_save)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    save = save_in_training if in_checkpoint(trainer) else files.save
    save(manager, folder, write=write, base=base_mark(trainer))
    if write:
        save_beside(folder, trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None), trainer.args)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def save_optimizer(original: Callable[..., Any], trainer: Any, output_dir: str) -> None:
    """As the Trainer's, with what methods measure beside it; of a sharded model as if it were not."""
    write_method_state(trainer.model, Path(output_dir), write=bool(trainer.args.should_save))
    if not is_sharded(trainer.model) or trainer.is_deepspeed_enabled:
        original(trainer, output_dir)
        return
    state = gathered_state(trainer.optimizer.state_dict())
    if trainer.args.should_save:
        torch.save(state, Path(output_dir) / _OPTIMIZER)
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)


def load_optimizer(original: Callable[..., Any], trainer: Any, checkpoint: str | None) -> None:
    """As the Trainer's, with what methods measured; reads what ``save_optimizer`` wrote into a sharded model's."""
    if checkpoint is None:
        original(trainer, checkpoint)
        return
    if not is_sharded(trainer.model) or not (Path(checkpoint) / _OPTIMIZER).is_file():
        original(trainer, checkpoint)
    else:
        _load_sharded(trainer, checkpoint)
    dropped = trainer.optimizer is not None and drop_mismatched_moments(trainer.optimizer)
    if not read_method_state(trainer.model, Path(checkpoint)) or dropped:
        note(trainer, f"{Path(checkpoint).name} {_LACKS}")


def _load_sharded(trainer: Any, checkpoint: str) -> None:
    state = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
    trainer.optimizer.load_state_dict(state_like(trainer.optimizer, state))
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))
