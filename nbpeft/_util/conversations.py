"""Conversations: lists of messages, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping


def is_conversation(prompt: object) -> bool:
    """Returns whether a prompt is a list of messages, as opposed to a text or a list of prompts."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def system_text(message: object) -> str:
    """Returns the text of a system message; the empty string for a message of another role.

    Args:
        message: the first message of a conversation.
    """
    if not isinstance(message, Mapping) or message.get("role") != "system":
        return ""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
