"""Prompts that a script asks for and puts into a call itself, as code for PEFT does, are not put in a second time.

prompts = model.get_prompt(batch_size=len(ids))
model.base_model(inputs_embeds=torch.cat([prompts, model.word_embeddings(ids)], 1))
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import PeftWarning

_requested: ContextVar[Callable[[], object] | None] = ContextVar("_requested", default=None)
"""Returns the state of the model whose prompt was asked for last in this thread or task, or ``_ANY``; None inside the
own calls of a handle."""
_ANY = object()
_given: ContextVar[Callable[[int], Tensor] | None] = ContextVar("_given", default=None)
"""Rows of the batch -> the tokens to put in instead of the adapter's, (rows, tokens, features)."""
_with_prompt: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Cache of a generation -> whether the script put the prompt in, which its first call shows."""


def note_requested(state: object = _ANY) -> None:
    """Notes that a script asked for the prompt of a model.

    Args:
        state: the ``ActiveState`` of the model; by default the prompt may be that of any model.
    """
    _requested.set(weakref.ref(state) if state is not _ANY else lambda: _ANY)


@contextmanager
def inserting_prompts(given: Callable[[int], Tensor] | None = None) -> Iterator[None]:
    """Context manager around a call of a model into which prompts are put, whoever asked for them before.

    Args:
        given: returns the tokens to put in, (rows, tokens, features); None for the adapter's.
    """
    requested, tokens = _requested.set(None), _given.set(given)
    try:
        yield
    finally:
        _given.reset(tokens)
        _requested.reset(requested)


def given_tokens(batch: int, *, usable: bool) -> Tensor | None:
    """The tokens to put in instead of the adapter's, (batch, tokens, features); None for the adapter's.

    Args:
        batch: rows of the batch.
        usable: whether this prompt can be replaced by tokens; if not, tokens to put in cause a warning.
    """
    give = _given.get()
    if give is None:
        return None
    if not usable:
        warnings.warn(
            "get_prompt() of a script is not used for a prefix, for an encoder-decoder model, or for several prompts: "
            "what the adapters have is put in",
            PeftWarning,
            stacklevel=2,
        )
        return None
    found = give(batch)
    _requested.set(None)  # by the function, which calls the model's own
    return found


def is_put_in(layer: AdaptedLayer, call: Mapping[str, Any], cache: Any) -> bool:
    """Whether the caller has put the prompt into a call: after it asked for it, the call has embeddings or a cache.

    Args:
        layer: the layer with the prompts.
        call: name -> argument.
        cache: the cache in the call, or None.
    """
    requested = _requested.get()
    if requested is None and not _with_prompt:
        return False
    has_cache = hasattr(cache, "get_seq_length")
    filled = has_cache and bool(cache.get_seq_length())
    if filled and cache in _with_prompt:
        return _with_prompt[cache]
    if requested is None or requested() not in (_ANY, layer._shared_state()):
        return False
    found = filled or call.get("inputs_embeds") is not None
    if has_cache:
        _with_prompt[cache] = found
    return found
