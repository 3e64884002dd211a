"""Prompts to tokens, with the tokenizer that the session remembers."""

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
    """Tokenize prompts with the tokenizer given, or the one that was given for this model before.

    Args:
        ctx: remembers the tokenizer.
        tracked: the model.
        prompts: texts or conversations.
        tokenizer: None: the one given before.
        chat: put texts into the chat template; None: as the adapters were trained last, or else
            where there is a template.

    Raises:
        AdapterError: there is no tokenizer, or it is not one, or the prompts do not go with it.
    """
    base = tracked.manager.model
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise AdapterError(f"tokenizer is of type {type(tokenizer).__name__}, expected a tokenizer of transformers")
    found = tokenizer if tokenizer is not None else ctx.tokenizers.get(base)
    if found is None:
        raise AdapterError("a tokenizer is needed to read prompts (tokenizer=…)")
    ctx.tokenizers[base] = found
    return PromptBatch.of(prompts, found, base, chat=False if chat is None and tracked.trained_on_plain_text else chat)
