"""A Trainer's saving and loading of an adapted model under FSDP2: files contain the gathered adapters.

accelerate gathers whole state dicts, including the base, or saves only one process's shard of the adapter, and makes an
optimizer step in order to read an optimizer's state before the first one. Here only the adapters and their
optimizer state are gathered, into the same files as in a training with one process: a checkpoint of either can be
resumed as the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.tensor_file import unpickled
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
from nbpeft.training.adapters.shards import make_shardable
from nbpeft.training.disk.checkpoints import in_checkpoint, read_errors, save_tokenizer_and_arguments

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_LACKS = "lacks the method's training state (an earlier version wrote it), which starts from its initial value"


def prepare_base(trainer: Any) -> None:
    """Prepares the base for FSDP2, before it is sharded: see ``make_shardable``. Notes its fingerprint too."""
    manager = manager_of(trainer.model)
    if manager is None or not getattr(trainer, "is_fsdp_enabled", False):
        return
    if not manager.merged:
        note_fingerprint(manager.model)
    if getattr(trainer.accelerator, "is_fsdp2", False):  # accelerate before 1.6 does not know FSDP2
        make_shardable(manager.model, trainer.accelerator.state.fsdp_plugin)


def base_mark(trainer: Any) -> Any:
    """The fingerprint that ``prepare_base`` computed, or None."""
    manager = manager_of(trainer.model)
    return None if manager is None else noted_fingerprint(manager.model)


def save_model(
    original: Callable[..., Any], trainer: Any, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """The Trainer's method; of a sharded model it saves only the adapters, gathered."""
    if not is_sharded(trainer.model) or trainer.is_deepspeed_enabled:
        original(trainer, output_dir, _internal_call)
        return
    folder = Path(output_dir if output_dir is not None else trainer.args.output_dir)
    manager = manager_of(trainer.model)
    assert manager is not None
    write = bool(trainer.args.should_save)
    save = save_in_training if in_checkpoint(trainer) else files.save
    save(manager, folder, write=write, base=base_mark(trainer))
    if write:
        save_tokenizer_and_arguments(folder, trainer)
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def save_optimizer(original: Callable[..., Any], trainer: Any, output_dir: str) -> None:
    """The Trainer's method, which also saves the methods' training state; gathers the state of a sharded model."""
    write_method_state(trainer.model, Path(output_dir), write=bool(trainer.args.should_save))
    if not is_sharded(trainer.model) or trainer.is_deepspeed_enabled:
        original(trainer, output_dir)
        return
    state = gathered_state(trainer.optimizer.state_dict())
    if trainer.args.should_save:
        torch.save(state, Path(output_dir) / _OPTIMIZER)
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)


def load_optimizer(original: Callable[..., Any], trainer: Any, checkpoint: str | None) -> None:
    """The Trainer's method, which also loads the methods' training state; a sharded model gets its shards."""
    if checkpoint is None:
        original(trainer, checkpoint)
        return
    with read_errors(Path(checkpoint)):
        if not is_sharded(trainer.model) or not inside.leads_to_file(Path(checkpoint) / _OPTIMIZER):
            original(trainer, checkpoint)
        else:
            _load_sharded(trainer, checkpoint)
    dropped = trainer.optimizer is not None and drop_mismatched_moments(trainer.optimizer)
    if not read_method_state(trainer.model, Path(checkpoint)) or dropped:
        note(trainer, f"{Path(checkpoint).name} {_LACKS}")


def _load_sharded(trainer: Any, checkpoint: str) -> None:
    state = unpickled(Path(checkpoint) / _OPTIMIZER)
    trainer.optimizer.load_state_dict(state_like(trainer.optimizer, state))
    trainer.lr_scheduler.load_state_dict(unpickled(Path(checkpoint) / _SCHEDULER))
