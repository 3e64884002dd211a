"""Finds access tokens, passwords and keys, by the name of their field or by their form.

Scripts, cards, checkpoints and messages use it, so that none of them contains a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BEFORE_TOKEN = "access|api|auth|bearer|hf|hub|login|personal|refresh|session|wandb"
_NAMES = re.compile(
    rf"token|(?:\w+_)?(?:{_BEFORE_TOKEN})_token"
    r"|(?:\w+_)?(?:password|passwd|passphrase|secret|credentials?|authorization)"
    r"|(?:\w+_)?(?:api|access|account|private|secret|signing)_?key(?:_id)?",
    re.IGNORECASE,
)
"""``hub_token`` and ``WANDB_API_KEY``, but neither ``pad_token`` nor ``max_tokens``."""

_VALUES = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bwandb_v\d_[A-Za-z0-9_]{16,}"
    r"|\bgh[opsu]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-[A-Za-z0-9][\w-]{19,}"
    r"|(?<=:/)/?[^\s/@:]+:[^\s/@]+(?=@)"  # user and password in an address, also as a path shows it
)
_MASK = "***"
LOG_IN = "log in with huggingface_hub.login() or set HF_TOKEN where it runs"


def is_secret(name: object, value: object) -> bool:
    """Returns whether a value is a token, password or key, judged by its name or by its form.

    Args:
        name: name of the value, e.g. the field of a config.
        value: the value; None, booleans and the empty string are never secret.
    """
    return has_secret_name(name, value) or (isinstance(value, str) and _VALUES.search(value) is not None)


def has_secret_name(name: object, value: object) -> bool:
    """Returns whether a value is text under the name of a token, password or key.

    Args:
        name: name of the value.
        value: the value; the empty string is never secret.
    """
    return isinstance(name, str) and isinstance(value, str | bytes) and value != "" and bool(_NAMES.fullmatch(name))


def without_secrets(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns a copy of named values without the secret ones, and the names of those that were left out.

    Args:
        fields: the values. Mappings are searched (``hub_kwargs.token``); a list that contains a secret is left out as
            a whole.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in fields.items():
        if is_secret(name, value) or (isinstance(value, list | tuple | set) and _holds_secret(value)):
            left_out.append(name)
        elif isinstance(value, Mapping):
            kept[name], inside = without_secrets(value)
            left_out += [f"{name}.{inner}" for inner in inside]
        else:
            kept[name] = value
    return kept, tuple(left_out)


def masked(text: str) -> str:
    """Returns a text in which tokens and the passwords in URLs are replaced by ``***``."""
    return _VALUES.sub(_MASK, text)


def masked_assignment(line: str) -> str:
    """Returns a line of a cell with secrets replaced by ``***``, e.g. the value in ``hub_token = …``."""
    name, sign, value = line.partition("=")
    return masked(f"{name}{sign} {_MASK}" if value.strip() and _NAMES.fullmatch(name.strip()) else line)


def _holds_secret(values: list[Any] | tuple[Any, ...] | set[Any]) -> bool:
    for value in values:
        if isinstance(value, Mapping):
            if without_secrets(value)[1]:
                return True
        elif isinstance(value, list | tuple | set):
            if _holds_secret(value):
                return True
        elif is_secret("", value):
            return True
    return False
