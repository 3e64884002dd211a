"""Checks of command arguments; each error message is one line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft._util.conversations import is_conversation
from nbpeft.errors import AdapterError, shown

_LONGEST_PART, _LONGEST = 255, 4095
"""Usual limits in bytes of one component of a path, and of the whole path."""


def adapter_name(name: Any, *, given: bool = True) -> str:
    """Check the name of a new adapter.

    Args:
        name: the name.
        given: whether the user gave it; False if it was derived from a folder's name.

    Raises:
        AdapterError: the name is invalid.
    """
    from nbpeft.engine.config.adapter_names import check_name

    try:
        check_name(name)
    except AdapterError as error:
        if given:
            raise
        raise AdapterError(f"{error}; give the adapter a name (name=…)", **error.details) from None
    text: str = name
    return text


def place_of(place: object, what: str) -> str:
    """Return a folder, file or hub id as text.

    Raises:
        AdapterError: it is empty or cannot be a path.
    """
    if not isinstance(place, str | os.PathLike) or not os.fspath(place):
        raise AdapterError(f"{what} needs a folder, not {place!r:.60}")
    text: str = os.fspath(place)
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raw = b"\0"
    if b"\0" in raw or len(raw) > _LONGEST or max(map(len, raw.split(os.sep.encode()))) > _LONGEST_PART:
        raise AdapterError(f"{what}: {text!r:.60} is not a path: it is too long or contains invalid characters")
    return text


def weights_of(weights: object) -> Mapping[str, float]:
    """Check that weights are a mapping from adapter names.

    Raises:
        AdapterError: they are not.
    """
    if not isinstance(weights, Mapping):
        raise AdapterError(f"weights must map adapters to numbers, e.g. {{'a': 0.7, 'b': 0.3}}, not {weights!r:.60}")
    return weights


def listed(given: object, what: str) -> list[Any]:
    """Return a text, or the elements of an iterable, as a list.

    Args:
        given: a text or an iterable.
        what: the expected type, for the message.

    Raises:
        AdapterError: it is neither.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise AdapterError(f"{what}, not {given!r:.60}")
    return list(given)


def names_of(names: object) -> tuple[Any, ...]:
    """Return one name or several as a tuple.

    Raises:
        AdapterError: they are something else.
    """
    expected = "expected the name of an adapter or a list of names"
    found = tuple(listed(names, expected))
    if not all(isinstance(name, str) for name in found):
        raise AdapterError(f"{expected}, not {shown(names)}")
    return found


def prompts_of(prompts: object) -> list[Any]:
    """Return one prompt, a text or a conversation, or several as a list."""
    if is_conversation(prompts):
        return [prompts]
    return listed(prompts, "expected a prompt, which is a text or a conversation, or a list of prompts")
