"""Tokenizing prompts with the session's tokenizer, in the form of the rows that the adapters were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nbpeft._util.conversations import is_conversation, system_text
from nbpeft.errors import AdapterError
from nbpeft.training.watching.generation import Conversation, Prompt, PromptBatch, continued

if TYPE_CHECKING:
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel

NO_TEMPLATE = "a conversation needs the chat template, which is not applied here: start a new one"


def prompt_batch(
    ctx: SessionContext,
    tracked: TrackedModel,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    chat: bool | None,
    system: str | None,
    names: Iterable[str] = (),
    earlier: Conversation = (),
) -> PromptBatch:
    """Tokenize prompts with the given tokenizer, or with the last one for this model.

    Args:
        ctx: context of the session, which stores the tokenizer.
        tracked: the model.
        prompts: texts or conversations.
        tokenizer: None for the last one given.
        chat: apply the chat template to texts; None decides by how the adapters were trained, or else by whether the
            tokenizer has one.
        system: the system prompt, empty for none; None for that of the rows the adapters were trained on.
        names: the adapters that answer. If it is unknown how they were trained, all adapters of the model count.
        earlier: the messages of a conversation that each prompt continues, with its system prompt.

    Raises:
        AdapterError: there is no tokenizer, or it is invalid, or it does not support the prompts; or the system prompt
            would have no effect.
    """
    from nbpeft.checkpoint import PromptFormat, common_format

    manager = tracked.manager
    chosen = chosen_tokenizer(ctx, tracked, tokenizer)
    if chosen is None:
        raise AdapterError("a tokenizer is needed to read prompts (tokenizer=…)")
    templated = bool(getattr(chosen, "chat_template", None))
    own = common_format(config for name in names if (config := _config(manager, name)) is not None)
    form = own or common_format(manager.configs.values()) or PromptFormat(templated)
    chat = False if chat is None and not form.chat else chat
    if earlier:
        prompts = [continued(earlier, prompt) for prompt in prompts]
        system = system_text(earlier[0]) if system is None else system
    if system is not None:
        _check_system(system, prompts, applied=templated if chat is None else chat)
    default = (form.system or "") if system is None else system
    return PromptBatch.of(prompts, chosen, manager.model, chat=chat, system=default, template=form.variables)


def _config(manager: AdapterManager, name: str) -> AdapterConfig | None:
    """The config of an adapter of the model or of its pool; None for another name."""
    if name in manager.configs or manager.provider is None:
        return manager.configs.get(name)
    return manager.provider.config_of(name)


def chosen_tokenizer(ctx: SessionContext, tracked: TrackedModel, tokenizer: Any) -> Any:
    """Return the given tokenizer, which is stored for the model, or the last one for it; None if there is none.

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


def _check_system(system: object, prompts: Sequence[Prompt], *, applied: bool) -> None:
    """Refuse a system prompt that would have no effect."""
    if not isinstance(system, str):
        raise AdapterError(f"system must be a text, not {system!r:.60}")
    if system and not applied and any(isinstance(prompt, str) for prompt in prompts):
        raise AdapterError("a system prompt is part of a chat, and the chat template is not applied here (chat=…)")
    for prompt in prompts:
        own = system_text(prompt[0]) if is_conversation(prompt) else system
        if own and own != system:
            raise AdapterError(f"the conversation already has another system prompt: {own:.60}")
