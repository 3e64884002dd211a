"""Runs language models so that their own forward computes its loss in chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.changes.active_state import NO_ADAPTERS, ActiveAdapters, RowAssignment
from nbpeft.engine.tree.model_tree import base_model_of, embedding_of
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.losses.cross_entropy import Head
from nbpeft.losses.lazy_logits import ChunkedHead, LazyLogits
from nbpeft.losses.weighted_labels import check_weights_used, with_loss_weights
from nbpeft.names import LOSS_CHUNK_SIZE

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
"""Classes of a head whose weight is whole during its own call alone."""


def chunked_loss(model: nn.Module, /, *, loss_chunk_size: int = LOSS_CHUNK_SIZE, **inputs: Any) -> Tensor:
    """Returns the loss of a language model, equal to ``model(**inputs).loss``, without logits as a whole.

    Hidden states of learned tokens alone go through the output head, a chunk at a time, and their gradient is
    computed with the loss. For loops of your own::

        loss = nbpeft.chunked_loss(model, **batch)
        loss.backward()

    A model without an output head, a compiled one and one whose loss is no cross entropy compute theirs as ever.

    Args:
        model: a language model of transformers, with or without adapters, wrapped by DDP or FSDP or not.
        loss_chunk_size: tokens whose logits are in memory at once; 0 for all.
        **inputs: of the model, ``labels`` among them, ``num_items_in_batch`` where batches are accumulated, and
            ``loss_weights`` in the shape of the labels where they do not all count alike.

    Returns:
        The loss, a scalar; float32 as a rule.

    Raises:
        ConfigError: ``loss_chunk_size`` is no whole number of at least 0.
        TrainingError: the model returns no loss for these inputs.
    """
    inputs = with_loss_weights(inputs)
    with chunked_head(model, loss_chunk_size, inputs.get("num_items_in_batch")), without_logits(model):
        output = model(**inputs)
    check_weights_used(inputs.get("labels"), type(base_model_of(model)).__name__)
    loss = output.get("loss") if isinstance(output, dict) else output[0] if "labels" in inputs else None
    if not isinstance(loss, Tensor):
        raise TrainingError(f"{type(base_model_of(model)).__name__} returned no loss: give it labels=…")
    return loss


def check_chunk_size(size: object) -> int:
    """Returns the size of a chunk as given.

    Raises:
        ConfigError: it is no whole number of at least 0.
    """
    if type(size) is not int or size < 0:
        raise ConfigError(
            f"loss_chunk_size must be a whole number of tokens, or 0 for logits as a whole, not {size!r:.60}",
            field="loss_chunk_size",
        )
    return size


@contextmanager
def chunked_head(
    model: nn.Module, chunk_size: int = LOSS_CHUNK_SIZE, divisor: Tensor | float | None = None
) -> Iterator[ChunkedHead]:
    """A block in which losses of a language model are computed in chunks, for the thread that enters it.

    The logits that the model returns in it have data once they are used.

    Args:
        model: a language model, with or without adapters and wrappers. One without an output head, and a compiled
            one, is left as it is.
        chunk_size: tokens whose logits are in memory at once; 0 leaves the model as it is.
        divisor: what sums over tokens will be divided by, where that is known.

    Yields:
        What became of the logits.
    """
    found = ChunkedHead(check_chunk_size(chunk_size), divisor)
    head = None if not chunk_size or is_compiled(model) else _head_of(model)
    size = getattr(head, "out_features", None)
    if head is None or not isinstance(size, int):
        yield found
        return
    lazy = _LazyForward(head, size, found)
    try:
        with HeldInterrupts():
            head.__dict__["forward"] = lazy
        yield found
    finally:
        with HeldInterrupts(to_the_end=True):
            lazy.end()


@contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """A block in which a model leaves logits without data out of what it returns: wrappers would read them."""
    handle = base_model_of(model).register_forward_hook(lambda module, args, output: _without_lazy(output))
    try:
        yield
    finally:
        handle.remove()


def is_compiled(model: nn.Module) -> bool:
    """Returns whether a model, or one in it that is called as a whole, was compiled."""
    wrappers = [model, getattr(model, "module", model), base_model_of(model)]
    return any("_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) for part in wrappers)


class _LazyForward:
    """The ``forward`` of a head whose logits wait, for the thread that made it; for all others the head's own.

    Args:
        head: that has it until ``end``.
        size: of the vocabulary.
        settings: how the logits are computed.
    """

    def __init__(self, head: nn.Module, size: int, settings: ChunkedHead) -> None:
        self._head, self._size, self._settings = head, size, settings
        self._forward, self._before = head.forward, head.__dict__.get("forward")
        self._thread = threading.get_ident()
        self._ended = False

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        elsewhere = self._ended or threading.get_ident() != self._thread
        state: Any = getattr(self._head, "active_state", None)
        active = NO_ADAPTERS if state is None else state.current()
        if elsewhere or args or kwargs or hidden.dim() < 2 or active.context:
            return self._forward(hidden, *args, **kwargs)
        if active.rows is None:
            return LazyLogits.of(hidden, self._forward, self._size, self._settings)
        whole, parts = self._as_served(state, active), self._parts(state, active.rows, len(hidden))
        return LazyLogits.of(hidden, whole, self._size, self._settings, parts)

    def _parts(self, state: Any, rows: RowAssignment, batch: int) -> dict[tuple[int, int], Head]:
        """Returns the head as it computes for rows of a mixed batch that one adapter serves: their first and last but one."""
        scales = dict(zip(rows.names, rows.scales, strict=True))
        return {
            (part.start, part.stop): self._as_served(
                state, ActiveAdapters((name,), (scales[name],)) if name else NO_ADAPTERS
            )
            for name, part in rows.runs(batch)
        }

    def _as_served(self, state: Any, active: ActiveAdapters) -> Head:
        def compute(hidden: Tensor) -> Tensor:
            with state.call(active):
                logits: Tensor = self._forward(hidden)
                return logits

        return compute

    def end(self) -> None:
        """Takes it off, and with it those that it was put on while blocks of other threads have not ended."""
        self._ended = True
        held = self._head.__dict__
        while isinstance(now := held.get("forward"), _LazyForward) and now._ended:
            if now._before is None:
                del held["forward"]
            else:
                held["forward"] = now._before


def _without_lazy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if isinstance(value, LazyLogits) else value for value in output)
    if isinstance(output, dict):
        return type(output)(**{name: value for name, value in output.items() if not isinstance(value, LazyLogits)})
    return output


def _head_of(model: nn.Module) -> nn.Module | None:
    """Returns the output head, where it can be called for some tokens alone and after its own call."""
    head = None if isinstance(model, nn.DataParallel) else embedding_of(base_model_of(model), output=True)
    if head is None or any(cls.__name__ in _SHARDED for cls in type(head).__mro__):
        return None
    return None if any(hasattr(parameter, "ds_id") for parameter in head.parameters()) else head
