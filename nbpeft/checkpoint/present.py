"""What adapter a folder or a repository holds already, so that another one is not written over it unasked."""

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
"""Entry of a file's metadata: what the adapter was called when it was saved."""
_LONGEST_NAME = 60
Shapes = Mapping[str, tuple[int, ...]]


def other_adapter(
    folder: Path, name: str, shapes: Shapes, base: Fingerprint | None, *, optional: Set[str] = frozenset()
) -> str:
    """What a folder holds that is another adapter than one to be saved there, in words; empty where there is none.

    It is another one if its name, its base model or its tensors are others, as far as its files say that.

    Args:
        folder: where it is to be saved.
        name: of the adapter to be saved.
        shapes: key -> shape of its tensors.
        base: fingerprint of its base model.
        optional: keys that one of the two may lack, such as embeddings.
    """
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights.is_file():
        if (folder / LEGACY_WEIGHTS_NAME).is_file():
            return f"an adapter in {LEGACY_WEIGHTS_NAME}"
        return "the config of an adapter" if config.is_file() else ""
    try:
        file = TensorFile(weights)
    except (CheckpointError, OSError):
        return "an adapter that cannot be read"
    saved_as = file.metadata.get(NAME_KEY)
    if saved_as is not None and saved_as != name:
        return f"another adapter, {shortened(saved_as, _LONGEST_NAME)!r}"
    then = Fingerprint.from_metadata(file.metadata)
    if then is not None and base is not None and (told := describe_difference(then, base)):
        return f"an adapter of another base model ({told})"
    present = {key: tuple(tensor.shape) for key, tensor in file.header.items()}
    strange = (present.keys() ^ shapes.keys()) - optional
    if strange or any(present[key] != shapes[key] for key in present.keys() & shapes.keys()):
        return f"an adapter with other tensors{_described(config)}"
    return ""


def other_config(text: str, own: str) -> str:
    """What an ``adapter_config.json`` describes if it is another adapter than that of a second one; else empty."""
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
    """`` (LORA, r=2)``; empty where the config does not say it."""
    try:
        fields = _fields(inside.read_file(config, LARGEST_CONFIG).decode("utf-8"))
    except (CheckpointError, OSError, UnicodeDecodeError):
        fields = None
    if fields is None:
        return ""
    words = [shortened(str(fields.get("peft_type") or ""), _LONGEST_NAME)]
    words += [f"r={fields['r']}"] if isinstance(fields.get("r"), int) else []
    return f" ({', '.join(filter(None, words))})" if any(words) else ""
