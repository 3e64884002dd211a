"""Batches of rows with similar lengths, to reduce padding."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import transformers

from nbpeft.training.data import PackedRows
from nbpeft.training.data.lengths import GroupedByLength, lengths_of

GROUPED = "group_by_length"


def wants_groups(fields: Mapping[str, Any]) -> bool:
    """Returns whether rows are grouped by length, which is the default unless a field of the arguments differs."""
    strategy = fields.get("train_sampling_strategy", GROUPED)
    return bool(getattr(strategy, "value", strategy) == GROUPED)


def group_rows(trainer: Any, *, wanted: bool) -> None:
    """Makes a Trainer draw batches of rows with similar lengths.

    transformers' own sampler uses the global random generator, so that a resumed run would continue with other rows
    than without the interruption; and it also groups evaluation rows.

    The Trainer's order is used if grouping would change nothing (batches of one row, rows of one length), if the
    lengths are unknown, or if the Trainer's class has its own sampler.
    """
    if not wanted or type(trainer)._get_train_sampler is not transformers.Trainer._get_train_sampler:
        return
    # Weakly: the sampler becomes an attribute of the Trainer.
    args, reference = trainer.args, weakref.ref(trainer)
    size = args.train_batch_size * args.world_size
    seed = args.data_seed if args.data_seed is not None else args.seed

    def epoch() -> int:
        """Returns the number of complete epochs, including those before resuming, which accelerate does not report."""
        owner = reference()
        done = getattr(owner, "epochs_done", None)  # of one of several adapters, each with its own rows
        return int((0 if owner is None else owner.state.epoch or 0) if done is None else done)

    def sampler(dataset: Any = None) -> Any:
        owner: Any = reference()
        rows = owner.train_dataset if dataset is None else dataset
        lengths = None if size < 2 or isinstance(rows, PackedRows) else lengths_of(rows)
        if lengths is None or len(set(lengths)) < 2 or len(lengths) <= size:
            return type(owner)._get_train_sampler(owner, dataset)
        return GroupedByLength(lengths, size, seed, epoch)

    trainer._get_train_sampler = sampler
