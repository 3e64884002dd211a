"""LoRA files of image models: one safetensors file without a config, with keys in one of several formats.

    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight     .lora_up.weight     .alpha
    diffusers   unet.mid_block.attentions.0.proj_in.lora.down.weight          .lora.up.weight
                unet.mid_block.attn1.processor.to_q_lora.down.weight          _lora.up.weight
                text_encoder.….q_proj.lora_linear_layer.down.weight           .lora_linear_layer.up.weight
                unet.mid_block.attentions.0.proj_in.<as in PEFT's files>

Rank and alpha are read from the tensors, or from the config that diffusers writes into the file's metadata. Without an
alpha the scaling is 1.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbpeft.checkpoint.config_format import LARGEST_CONFIG, config_of
from nbpeft.checkpoint.folder import Checkpoint
from nbpeft.checkpoint.inside import expanded, leads_to_file, leads_to_folder
from nbpeft.checkpoint.source import CONFIG_NAME
from nbpeft.checkpoint.tensor_file import WEIGHTS_NAME, TensorFile, UnreadTensors, storable, write_tensors
from nbpeft.checkpoint.weights_format import PREFIX
from nbpeft.engine.contract.adapter import LowRankDelta
from nbpeft.engine.contract.registry import methods_of_type
from nbpeft.engine.kernels.storage import short_name
from nbpeft.errors import CheckpointError, few

_METHOD = "LORA"
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder")
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_KOHYA_START = re.compile(r"lora_(?:unet|transformer|te[12]?)_")
_START = re.compile(rf"(?:{'|'.join(_COMPONENTS)})\.|base_model\.model\.")
_ALPHA = ".alpha"
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_CONFIG_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass
class _Pair:
    """The keys of one layer in a file: those of its two factors, and of its alpha if it has one."""

    parts: dict[str, str] = field(default_factory=dict)
    alpha: str = ""


def write_lora_file(path: Path, deltas: Mapping[str, LowRankDelta], component: str, style: str) -> None:
    """Writes an adapter as a single LoRA file for other programs.

    Args:
        path: the file.
        deltas: path of a layer -> the low-rank update of its weight.
        component: component of the pipeline: ``unet``, ``text_encoder``, …
        style: ``kohya`` or ``diffusers``. The latter has no alpha in its files, so the scaling is multiplied into
            the up factor.
    """
    tensors: dict[str, Tensor] = {}
    down_key, up_key = _peft_endings()
    for where, delta in deltas.items():
        if style == "kohya":
            stem = f"{_KOHYA[component]}_{where.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = delta.down, delta.up
            tensors[stem + _ALPHA] = torch.tensor(delta.scaling * delta.rank)
        else:
            stem = f"{component}.{where}"
            up = delta.up if delta.scaling == 1 else (delta.up.float() * delta.scaling).to(delta.up.dtype)
            tensors[stem + down_key], tensors[stem + up_key] = delta.down, up
    write_tensors(path, storable(tensors), {})


def lora_file(source: str | os.PathLike[str]) -> Path | None:
    """Returns the path of a LoRA file without a config; None if the source is something else.

    Args:
        source: the file, or a folder that contains exactly one such file.
    """
    path = Path(expanded(source))
    try:
        if leads_to_folder(path) and not leads_to_file(path / CONFIG_NAME):
            found = sorted(path.glob("*.safetensors"))
            path = found[0] if len(found) == 1 else path
        if path.suffix != ".safetensors" or path.name == WEIGHTS_NAME or leads_to_file(path.parent / CONFIG_NAME):
            return None
        return path if leads_to_file(path) else None
    except (CheckpointError, OSError):  # the reader of the checkpoint reports what is wrong with the path
        return None


def read_lora_file(path: Path, modules: Iterable[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Reads a LoRA file as an adapter for one model.

    Warns about keys for other components.

    Args:
        path: the file.
        modules: paths of the model's modules. They are needed for kohya's keys, in which ``_`` replaces each dot.
        device: device of the tensors.

    Returns:
        The checkpoint; its tensors are read later.

    Raises:
        CheckpointError: no key fits the model, a layer lacks one factor, or the file is of another method.
        CorruptCheckpointError: the file cannot be read.
    """
    file = TensorFile(path)
    pairs, others = _sorted(file.header, list(modules))
    if not pairs:
        raise CheckpointError(f"nothing in {path} fits this model: it has {few(file.header, 3)}", path=str(path))
    _check(file, pairs, others)
    if others:
        warnings.warn(f"ignored in {path}, as this model has no modules for these keys: {few(others, 3)}", stacklevel=6)
    first = next(iter(next(iter(pairs.values())).parts.values()))
    fields = _fields(file, pairs) | _written_fields(file.metadata, first)
    config, _ = config_of({"peft_type": _METHOD, "target_modules": list(pairs), **fields}, str(path))
    ends = dict(zip(("down", "up"), _peft_endings(), strict=True))
    names = {key: PREFIX + where + ends[part] for where, pair in pairs.items() for part, key in pair.parts.items()}
    unread = UnreadTensors(file, device, names).changed(
        lambda tensors: {names[key]: tensor for key, tensor in tensors.items()}
    )
    return Checkpoint(config, unread, file.metadata, path.parent)


def _check(file: TensorFile, pairs: Mapping[str, _Pair], others: Iterable[str]) -> None:
    """Refuses layers that do not have exactly two matrices as factors and at most one scalar alpha."""
    path, header = file.path, file.header
    begins = tuple(f"{form}." for where in pairs for form in (where, where.replace(".", "_")))
    more = next((key for key in others if _bare(key).startswith(begins)), None)
    if more is not None:
        raise CheckpointError(
            f"{path} contains {more}: only the two factors of LoRA and its alpha are supported", path=str(path)
        )
    for where, pair in pairs.items():
        if len(pair.parts) != 2:
            raise CheckpointError(f"{path} contains only one of the two factors of {where}", path=str(path))
        if min(header[key].ndim for key in pair.parts.values()) < 2:
            raise CheckpointError(f"a factor of {where} in {path} is not a matrix", path=str(path))
        alpha = header[pair.alpha] if pair.alpha else None
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or alpha.dtype == torch.bool):
            found = f"has {alpha.numel()} elements" if alpha.numel() != 1 else f"is {short_name(alpha.dtype)}"
            raise CheckpointError(
                f"{few([pair.alpha])} in {path} {found}: an alpha, if present, is one number", path=str(path)
            )


def _fields(file: TensorFile, pairs: Mapping[str, _Pair]) -> dict[str, Any]:
    """Returns ranks and alphas as config fields."""
    ranks = {where: int(file.header[pair.parts["down"]].shape[0]) for where, pair in pairs.items()}
    given = file.read(pair.alpha for pair in pairs.values() if pair.alpha)
    numbers = {key: float(tensor) for key, tensor in given.items()}
    wrong = next((key for key, number in numbers.items() if not math.isfinite(number)), None)
    if wrong is not None:
        raise CheckpointError(
            f"{few([wrong])} in {file.path} is {numbers[wrong]}: an alpha, if present, is a finite number",
            path=str(file.path),
        )
    alphas = {where: numbers.get(pair.alpha, ranks[where]) for where, pair in pairs.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }


def _written_fields(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Returns the config fields that diffusers writes into the metadata, for the component of a key."""
    text = metadata.get(_DIFFUSERS_CONFIG, "")
    try:
        written = json.loads(text) if len(text) <= LARGEST_CONFIG else None
    except (ValueError, RecursionError):
        written = None
    if not isinstance(written, dict):
        return {}
    start = next((f"{name}." for name in _COMPONENTS if key.startswith(f"{name}.")), "")
    return {name: written[start + name] for name in _CONFIG_FIELDS if start + name in written}


def _peft_endings() -> tuple[str, str]:
    down, up, *_ = methods_of_type(_METHOD)[0].files.keys.values()
    return f".{down}", f".{up}"


def _sorted(keys: Iterable[str], modules: list[str]) -> tuple[dict[str, _Pair], list[str]]:
    """Returns path of a layer -> keys of its factors and alpha, and the keys that belong to no layer of the model."""
    known = {name: name for name in modules} | {name.replace(".", "_"): name for name in modules}
    down_key, up_key = _peft_endings()
    ends = [(".lora_down.weight", "down"), (".lora_up.weight", "up"), (down_key, "down"), (up_key, "up")]
    for mark in (".lora", "_lora", ".lora_linear_layer"):
        ends += [(f"{mark}.down.weight", "down"), (f"{mark}.up.weight", "up")]
    pairs: dict[str, _Pair] = {}
    others: list[str] = []
    for key in keys:
        end, part = next(((end, part) for end, part in ends if key.endswith(end)), (_ALPHA, "alpha"))
        where = known.get(_bare(key.removesuffix(end)), "") if key.endswith(end) else ""
        # The `to_out` of diffusers' attention is a list of a linear layer and a dropout; keys name only the list.
        where = known.get(f"{where}.0", where) if where.endswith("to_out") else where
        if not where:
            others.append(key)
        elif part == "alpha":
            pairs.setdefault(where, _Pair()).alpha = key
        else:
            pairs.setdefault(where, _Pair()).parts[part] = key
    return {where: pair for where, pair in pairs.items() if pair.parts}, others


def _bare(stem: str) -> str:
    """Returns the part of a key that names the layer."""
    return _START.sub("", _KOHYA_START.sub("", stem, count=1), count=1).replace(".processor.", ".")
