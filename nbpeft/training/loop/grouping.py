"""Batches of rows that are about as long, so that little of them is padding."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import transformers

from nbpeft.training.data import PackedRows
from nbpeft.training.data.lengths import GroupedByLength, lengths_of

GROUPED = "group_by_length"
_OLDER_FIELD = "group_by_length"
"""What said so before ``train_sampling_strategy``."""


def wants_groups(fields: Mapping[str, Any]) -> bool:
    """Whether rows are to be grouped by length, which they are unless a field of the arguments says otherwise."""
    strategy = fields.get("train_sampling_strategy", GROUPED)
    return getattr(strategy, "value", strategy) == GROUPED and fields.get(_OLDER_FIELD, True) is True


def group_rows(trainer: Any, *, wanted: bool) -> None:
    """Lets a Trainer go through its rows in groups of about the same length.

    transformers' own sampler draws from the generator that everything else draws from, so that a run that is resumed
    goes on with other rows than it would have had; and it groups rows to evaluate on as well.

    Where it would change nothing (one row a batch, rows of one length) or the lengths are not known, the order stays
    the Trainer's; so it does where the class of the Trainer has an order of its own.

    Args:
        trainer: made already; has not trained yet.
        wanted: whether to do so at all.
    """
    if not wanted or type(trainer)._get_train_sampler is not transformers.Trainer._get_train_sampler:
        return
    args = trainer.args
    size = args.train_batch_size * args.world_size
    lengths = None if size < 2 or isinstance(trainer.train_dataset, PackedRows) else lengths_of(trainer.train_dataset)
    if lengths is None or len(set(lengths)) < 2 or len(lengths) <= size:
        return
    reference = weakref.ref(trainer)

    def epoch() -> int:
        """Passes done, before the run was resumed too; accelerate tells it to no sampler whose batches it skips."""
        owner = reference()
        return 0 if owner is None else int(owner.state.epoch or 0)

    seed = args.data_seed if args.data_seed is not None else args.seed
    trainer._get_train_sampler = lambda dataset=None: GroupedByLength(lengths, size, seed, epoch)
