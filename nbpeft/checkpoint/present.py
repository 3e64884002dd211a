"""Detects a different adapter in a target folder or repository, so that it is not overwritten by accident."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.config_format import LARGEST_CONFIG
from nbpeft.checkpoint.identity import Fingerprint, describe_difference
from nbpeft.checkpoint.source import CONFIG_NAME
from nbpeft.checkpoint.tensor_file import LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, TensorFile
from nbpeft.errors import CheckpointError, shortened

NAME_KEY = "nbpeft.adapter"
"""Metadata key of a tensor file: the adapter's name when it was saved."""
_LONGEST_NAME = 60
Shapes = Mapping[str, tuple[int, ...]]


def other_adapter(
    folder: Path, name: str, shapes: Shapes, base: Fingerprint | None, *, optional: Set[str] = frozenset()
) -> str:
    """Describes a different adapter that is already in a folder.

    An adapter is different if its files show another name, base model or set of tensors.

    Args:
        folder: the folder to save to.
        name: name of the adapter to save.
        shapes: key -> shape of the adapter's tensors.
        base: fingerprint of its base model.
        optional: keys that either of the two may lack, such as embeddings.

    Returns:
        A noun phrase for a message, or the empty string if there is no different adapter.
    """
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not inside.leads_to_file(weights):
        if inside.leads_to_file(folder / LEGACY_WEIGHTS_NAME):
            return f"an adapter in {LEGACY_WEIGHTS_NAME}"
        return "the config of an adapter" if inside.leads_to_file(config) else ""
    try:
        file = TensorFile(weights)
    except (CheckpointError, OSError):
        return "an adapter that cannot be read"
    saved_as = file.metadata.get(NAME_KEY)
    if saved_as is not None and saved_as != name:
        return f"another adapter, {shortened(saved_as, _LONGEST_NAME)!r}"
    then = Fingerprint.from_metadata(file.metadata)
    if then is not None and base is not None and (difference := describe_difference(then, base)):
        return f"an adapter of another base model ({difference})"
    present = {key: tuple(tensor.shape) for key, tensor in file.header.items()}
    unshared = (present.keys() ^ shapes.keys()) - optional
    if unshared or any(present[key] != shapes[key] for key in present.keys() & shapes.keys()):
        return f"an adapter with other tensors{_described(config)}"
    return ""


def other_config(text: str, own: str) -> str:
    """Describes the adapter of an ``adapter_config.json`` if it differs from that of another one.

    Args:
        text: text of the existing config; may be empty.
        own: text of the config to save.

    Returns:
        A noun phrase for a message, or the empty string if no difference is known.
    """
    then, now = _fields(text), _fields(own)
    if not text or then is None or now is None:
        return "an adapter that cannot be read" if text and then is None else ""
    differing = [key for key in ("peft_type", "r", "target_modules") if _comparable(then, key) != _comparable(now, key)]
    bases = [str(fields.get("base_model_name_or_path") or "") for fields in (then, now)]
    on_hub = all(base.count("/") == 1 and base[:1] not in "./~" for base in bases)
    if on_hub and bases[0] != bases[1]:
        return f"an adapter of another base model, {shortened(bases[0], _LONGEST_NAME)}"
    return f"an adapter with another {differing[0]}" if differing else ""


def _fields(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _comparable(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(key)
    return sorted(map(str, value)) if isinstance(value, list) else value


def _described(config: Path) -> str:
    """Returns text such as `` (LORA, r=2)``; empty if the config cannot be read."""
    try:
        fields = _fields(inside.read_file(config, LARGEST_CONFIG).decode("utf-8"))
    except (CheckpointError, OSError, UnicodeDecodeError):
        fields = None
    if fields is None:
        return ""
    words = [shortened(str(fields.get("peft_type") or ""), _LONGEST_NAME)]
    words += [f"r={fields['r']}"] if isinstance(fields.get("r"), int) else []
    return f" ({', '.join(filter(None, words))})" if any(words) else ""
