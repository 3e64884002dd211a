"""Makes the forward of a language model compute its loss in chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.changes.active_state import NO_ADAPTERS, ActiveAdapters, RowAssignment
from nbpeft.engine.tree.model_tree import base_model_of, embedding_of
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.losses.cross_entropy import Head
from nbpeft.losses.lazy_logits import ChunkedHead, LazyLogits
from nbpeft.losses.weighted_labels import check_weights_used, with_loss_weights
from nbpeft.names import LOSS_CHUNK_SIZE

_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
"""Class names of FSDP modules: their weight is gathered only during their own call."""


def chunked_loss(model: nn.Module, /, *, loss_chunk_size: int = LOSS_CHUNK_SIZE, **inputs: Any) -> Tensor:
    """Returns the loss of a language model, equal to ``model(**inputs).loss``, without all logits in memory at once.

    Only the hidden states of tokens with labels go through the output head, a chunk at a time, and their gradient is
    computed together with the loss. For a custom training loop::

        loss = nbpeft.chunked_loss(model, **batch)
        loss.backward()

    The loss of a model without an output head, of a compiled model, and a loss other than cross entropy are computed
    as usual.

    Args:
        model: a language model of transformers, with or without adapters, may be wrapped by DDP or FSDP.
        loss_chunk_size: number of tokens whose logits are in memory at once; 0 for all.
        **inputs: the model's inputs with ``labels``; ``num_items_in_batch`` for gradient accumulation, and
            ``loss_weights`` in the shape of the labels for a weighted loss.

    Returns:
        The loss, a scalar; usually float32.

    Raises:
        ConfigError: ``loss_chunk_size`` is not an integer of at least 0.
        TrainingError: the model returns no loss for these inputs, or ignores ``loss_weights``.
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
    """Checks and returns the size of a chunk in tokens.

    Raises:
        ConfigError: it is not an integer of at least 0.
    """
    if type(size) is not int or size < 0:
        raise ConfigError(
            f"loss_chunk_size must be a whole number of tokens, or 0 for logits as a whole, not {size!r:.60}",
            field="loss_chunk_size",
        )
    return size


@contextmanager
def chunked_head(
    model: nn.Module,
    chunk_size: int = LOSS_CHUNK_SIZE,
    divisor: Tensor | float | None = None,
    *,
    sampled: bool = False,
) -> Iterator[ChunkedHead]:
    """Makes a language model compute its loss in chunks inside the block, in the thread that enters it.

    The logits that the model returns in the block are computed when they are first used.

    Args:
        model: a language model, with or without adapters and wrappers. A compiled model and one without an output
            head are not changed.
        chunk_size: number of tokens whose logits are in memory at once; 0 does not change the model.
        divisor: the number by which a sum over tokens will be divided, if known.
        sampled: skip chunks that allocate the same memory as another one, for a memory forecast; the loss is wrong.

    Yields:
        The settings, which also record whether a loss was computed in chunks.

    Raises:
        ConfigError: ``chunk_size`` is not an integer of at least 0.
    """
    found = ChunkedHead(check_chunk_size(chunk_size), divisor, sampled)
    head = None if not chunk_size or is_compiled(model) else _head_of(model)
    size = getattr(head, "out_features", None)
    if head is None or not isinstance(size, int):
        yield found
        return
    lazy = _LazyForward(head, size, found)
    try:
        # An attribute of the instance takes precedence over the method, and `head(…)` still runs the head's hooks.
        with DeferredInterrupts():
            head.__dict__["forward"] = lazy
        yield found
    finally:
        with DeferredInterrupts(to_the_end=True):
            lazy.end()


@contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """Removes logits without data from a model's output inside the block: wrappers such as DDP would compute them."""
    handle = base_model_of(model).register_forward_hook(lambda module, args, output: _without_lazy(output))
    try:
        yield
    finally:
        handle.remove()


def is_compiled(model: nn.Module) -> bool:
    """Returns whether a model, or the model inside its wrappers, was compiled with ``torch.compile``."""
    wrappers = [model, getattr(model, "module", model), base_model_of(model)]
    return any("_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) for part in wrappers)


class _LazyForward:
    """A ``forward`` of a head that returns lazy logits in the thread that created it, and ordinary ones in others.

    Args:
        head: the head; its ``forward`` is restored by ``end``.
        size: size of the vocabulary.
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
        """Returns (first row, end) of each adapter's rows in a mixed batch -> the head with that adapter."""
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
        """Restores the head's ``forward``.

        Blocks of several threads can end in any order. A ``forward`` below another one is only marked as ended, and is
        removed together with the one above it.
        """
        self._ended = True
        attributes = self._head.__dict__
        while isinstance(top := attributes.get("forward"), _LazyForward) and top._ended:
            if top._before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = top._before


def _without_lazy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if isinstance(value, LazyLogits) else value for value in output)
    if isinstance(output, dict):
        return type(output)(**{name: value for name, value in output.items() if not isinstance(value, LazyLogits)})
    return output


def _head_of(model: nn.Module) -> nn.Module | None:
    """Returns the output head, or None if it cannot be called for single chunks outside the model's forward.

    ``nn.DataParallel`` calls replicas of the head in threads of its own. FSDP and DeepSpeed ZeRO-3, whose parameters
    have a ``ds_id``, gather a weight only while its module runs.
    """
    head = None if isinstance(model, nn.DataParallel) else embedding_of(base_model_of(model), output=True)
    if head is None or any(cls.__name__ in _SHARDED for cls in type(head).__mro__):
        return None
    return None if any(hasattr(parameter, "ds_id") for parameter in head.parameters()) else head
