"""Tokenizing prompts with the session's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.training.watching.generation import Prompt, PromptBatch

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel


def prompt_batch(
    ctx: SessionContext, tracked: TrackedModel, prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None
) -> PromptBatch:
    """Tokenize prompts with the given tokenizer, or with the last one for this model.

    Args:
        ctx: context of the session, which stores the tokenizer.
        tracked: the model.
        prompts: texts or conversations.
        tokenizer: None for the last one given.
        chat: apply the chat template to texts; None decides by how the adapters were last trained, or else by whether
            the tokenizer has one.

    Raises:
        AdapterError: there is no tokenizer, or it is invalid, or it does not support the prompts.
    """
    base = tracked.manager.model
    chosen = chosen_tokenizer(ctx, tracked, tokenizer)
    if chosen is None:
        raise AdapterError("a tokenizer is needed to read prompts (tokenizer=…)")
    return PromptBatch.of(prompts, chosen, base, chat=False if chat is None and tracked.trained_on_plain_text else chat)


def chosen_tokenizer(ctx: SessionContext, tracked: TrackedModel, tokenizer: Any) -> Any:
    """Return the given tokenizer, which is stored for the model, or the last one for it; None if there is none.

    Args:
        ctx: context of the session, which stores the tokenizer.
        tracked: the model.
        tokenizer: None for the last one given.

    Raises:
        AdapterError: it is not a tokenizer.
    """
    base = tracked.manager.model
    if tokenizer is None:
        return ctx.tokenizers.get(base)
    if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise AdapterError(f"tokenizer is of type {type(tokenizer).__name__}, expected a tokenizer of transformers")
    ctx.tokenizers[base] = tokenizer
    return tokenizer
