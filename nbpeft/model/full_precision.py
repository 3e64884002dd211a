"""Merging into a full-precision copy on disk, shard by shard, and the error of each way to merge.

A QLoRA adapter can be merged into the quantized weights (dequantize, add, quantize again:
``PeftModel.merge_adapter``), which rounds the sum again, or into a copy in full precision, which
keeps it. The copy is written tensor by tensor: what is needed beyond the model itself is one
weight and its sum, however large the model is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import NewFile, TensorSpec
from nbpeft.engine.holder import names_in
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.model_tree import is_quantized, manager_of
from nbpeft.errors import AdapterError, ConfigError, MergeError
from nbpeft.model.merge_parts import (
    Deltas,
    FolderWeights,
    LayerDelta,
    LiveWeights,
    Weights,
    check_names,
    check_tied,
    deltas_in,
    deltas_of,
    skeleton_of,
)
from nbpeft.model.quantization import FLOATS, dtype_of
from nbpeft.model.rounding import LayerError, MergeErrors, relative_error, requantized_error

SHARD_BYTES = 5_000_000_000
_GOES_ALONG = (
    "added_tokens", "chat_template", "generation_config", "merges", "preprocessor", "processor", "sentencepiece",
    "special_tokens", "spiece", "tokenizer", "vocab",
)  # fmt: skip
"""How the names of files begin that belong to a model beside its weights and its config."""


@dataclass(frozen=True)
class MergedFolder:
    """A merged model on disk.

    Attributes:
        folder: where it is; ``from_pretrained`` loads it like any other.
        names: the adapters in it.
        paths: its files.
        byte_count: of its weights.
        shard_bytes: bytes of each file with weights.
        dtype: of its weights.
        errors: of both ways to merge; None if they were not asked for.
    """

    folder: Path
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    byte_count: int
    shard_bytes: tuple[int, ...]
    dtype: str
    errors: MergeErrors | None

    def __str__(self) -> str:
        files = f"{len(self.shard_bytes)} file{'s' if len(self.shard_bytes) != 1 else ''}"
        what = ", ".join(map(repr, self.names))
        line = f"merged {what} into {self.folder} ({self.dtype}, {self.byte_count / 1e6:,.1f} MB in {files})"
        return line if self.errors is None else f"{line}; {self.errors}"


def merge_to_folder(
    model: nn.Module | str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Sequence[str] | None,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    measure_errors: bool = True,
    safe: bool = False,
) -> MergedFolder:
    """Writes the base model with adapters added to its weights. The model itself is not changed.

    Args:
        model: an adapted model, quantized or not; or the folder of a base in full precision,
            which is then never loaded as a whole.
        adapter: name or names of its adapters (None: the active ones); for a folder as ``model``
            the folder or hub id of a saved adapter.
        folder: where the merged model goes; must not hold weights yet. All or nothing.
        base: add the deltas to the full-precision weights in this folder instead of the
            dequantized ones of the model. They are not what the adapter was trained on: the
            errors tell how far off.
        dtype: of the weights written; by default the base's own.
        tokenizer: saved along; without it the files of the base's folder are copied, if it has one.
        max_shard_bytes: largest file; the files of a folder are kept as they are split there.
        measure_errors: also tell the error of each way to merge.
        safe: refuse a weight that is not finite.

    Raises:
        MergeError: adapters are merged already, cannot be merged, or give weights that are not finite.
        CheckpointError: a folder cannot be read or written; then nothing is written.
        ConfigError: an argument is impossible.
    """
    wanted = None if dtype is None else dtype_of(dtype, "dtype", FLOATS)
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"a merged model needs a folder to be written to, not {folder!r:.60}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes!r}; expected a whole number of bytes")
    plan = _of_folder(model, adapter, base) if isinstance(model, str | os.PathLike) else _of_model(model, adapter, base)
    deltas, weights = plan.deltas, plan.weights
    wanted = wanted or plan.dtype
    merger = _Merger(deltas, weights, wanted, measure_errors, safe)
    shards = weights.shards([merger.spec(spec) for spec in weights.specs], max_shard_bytes)
    stored = merger.dtype_name
    target = Path(os.path.expanduser(os.fspath(folder)))
    with checkpoint.disk_errors(target), checkpoint.scratch_folder() as scratch:
        extra = _other_files(plan, tokenizer, scratch, stored)
        paths = checkpoint.write_model(folder, shards, merger.tensor, files=extra)
    errors = MergeErrors(tuple(merger.errors[path] for path in deltas.layers), stored) if measure_errors else None
    sizes = tuple(sum(spec.byte_count for spec in shard) for shard in shards)
    return MergedFolder(target, deltas.names, tuple(paths), sum(sizes), sizes, stored, errors)


def merge_errors(
    model: nn.Module, adapter: str | Sequence[str] | None = None, *, dtype: torch.dtype | str | None = None
) -> MergeErrors:
    """The error of merging into the weights as they are stored, and into a full-precision copy.

    Nothing is changed and nothing written.

    Args:
        model: an adapted model.
        adapter: name or names; None: the active ones.
        dtype: of the copy; by default the dtype of the model.

    Raises:
        MergeError: adapters are merged already or cannot be merged.
    """
    manager = _manager(model)
    deltas = deltas_of(manager, _names(manager, adapter))
    wanted = _own_dtype(manager.model) if dtype is None else dtype_of(dtype, "dtype", FLOATS)
    merger = _Merger(deltas, LiveWeights(manager.model, deltas.changed), wanted, True, False)
    for path in deltas.layers:
        merger.tensor(f"{path}.weight")
    return MergeErrors(tuple(merger.errors[path] for path in deltas.layers), merger.dtype_name)


class _Merger:
    """Makes the merged tensors one by one, and notes their errors."""

    def __init__(self, deltas: Deltas, weights: Weights, dtype: torch.dtype | None, measure: bool, safe: bool) -> None:
        self.errors: dict[str, LayerError] = {}
        self._deltas = deltas
        self._weights = weights
        self._dtype = dtype
        self._measure = measure
        self._safe = safe
        self._specs = {spec.name: spec for spec in weights.specs}
        self._live = isinstance(weights, LiveWeights)

    @property
    def dtype_name(self) -> str:
        """Of most of what is written."""
        dtype = self._dtype
        if dtype is None:
            floats = [spec for spec in self._specs.values() if spec.dtype.is_floating_point]
            dtype = max(floats, key=lambda spec: spec.byte_count).dtype if floats else torch.float32
        return str(dtype).removeprefix("torch.")

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """What the tensor will be."""
        dtype = self._dtype if self._dtype is not None and spec.dtype.is_floating_point else spec.dtype
        return TensorSpec(spec.name, dtype, spec.shape)

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """The merged tensor of that name."""
        spec = self.spec(self._specs[name])
        replaced = self._deltas.replaced.get(name)
        value, own = (replaced.detach(), False) if replaced is not None else self._weights.read(name)
        path, _, kind = name.rpartition(".")
        layer = self._deltas.layers.get(path)
        if layer is None or kind not in ("weight", "bias"):
            return value.to(spec.dtype)
        if kind == "bias":
            added = layer.bias()
            return (value if added is None else value.float() + added.to(value.device).float()).to(spec.dtype)
        return self._weight(path, layer, value, own, spec.dtype)

    def _weight(self, path: str, layer: LayerDelta, value: Tensor, own: bool, dtype: torch.dtype) -> Tensor:
        value = value.t().contiguous() if layer.turned else value
        # Weights read from files come to the adapters, whose device multiplies faster than a CPU.
        exact = value.to(layer.device, torch.float32, copy=self._measure or not own)
        layer.add_to_(exact)
        if self._safe and not bool(torch.isfinite(exact).all()):
            raise MergeError(f"the merged weight of {path} is not finite; nothing was written", path=path)
        stored = exact.to(dtype)
        if self._measure:
            delta_norm = relative_error(value, exact) * float(exact.norm())
            del value
            self._note(path, layer, stored, exact, delta_norm)
        return stored.t().contiguous() if layer.turned else stored

    def _note(self, path: str, layer: LayerDelta, stored: Tensor, exact: Tensor, delta_norm: float) -> None:
        if not self._live and layer.quantized:  # the adapter was trained on the quantized weight
            del exact
            exact = layer.base.backend.dequantize(layer.base.module).to(torch.float32, copy=True)
            layer.add_to_(exact)
        again = requantized_error(layer, exact)
        self.errors[path] = LayerError(path, relative_error(stored, exact), again, float(exact.norm()), delta_norm)


@dataclass(frozen=True)
class _Plan:
    """What is merged with what.

    Attributes:
        model: the base, or its skeleton.
        source: folder whose tokenizer goes along, or None.
        dtype: of what is written, or None to keep each tensor's.
        parted: whether embedding and head no longer share their weight.
    """

    model: nn.Module
    deltas: Deltas
    weights: Weights
    source: Path | None
    dtype: torch.dtype | None
    parted: bool = False


def _of_folder(folder: str | os.PathLike[str], adapter: Any, base: Any) -> _Plan:
    """A base in a folder and a saved adapter."""
    if not isinstance(adapter, str | os.PathLike):
        raise ConfigError("for a base model in a folder, give the folder of a saved adapter")
    if base is not None:
        raise ConfigError("base= goes with a loaded model; a folder as model is the base itself")
    skeleton = skeleton_of(folder)
    deltas = deltas_in(adapter, skeleton)
    return _from_files(skeleton, deltas, folder)


def _of_model(model: nn.Module, adapter: Any, base: Any) -> _Plan:
    """Adapters on a loaded model."""
    manager = _manager(model)
    deltas = deltas_of(manager, _names(manager, adapter))
    if base is not None:
        return _from_files(manager.model, deltas, base)
    weights = LiveWeights(manager.model, deltas.changed)
    check_names(deltas, {spec.name for spec in weights.specs}, "the model")
    source = str(getattr(getattr(manager.model, "config", None), "_name_or_path", "") or "")
    place = Path(source) if source and os.path.isdir(source) else None
    return _Plan(manager.model, deltas, weights, place, _own_dtype(manager.model), weights.parted)


def _from_files(model: nn.Module, deltas: Deltas, folder: str | os.PathLike[str]) -> _Plan:
    weights = FolderWeights(folder)
    check_tied(deltas, model, os.fspath(folder))
    check_names(deltas, {spec.name for spec in weights.specs}, os.fspath(folder))
    return _Plan(model, deltas, weights, weights.files.folder, None)


def _manager(model: nn.Module) -> AdapterManager:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model with adapters or the folder of a base, not {model!r:.60}")
    found = manager_of(model)
    if found is None or not found.alive or not found.names:
        raise AdapterError(f"{type(model).__name__} carries no adapters to merge")
    return found


def _names(manager: AdapterManager, adapter: Any) -> tuple[str, ...]:
    names = manager.active if adapter is None else names_in(adapter)
    if not names:
        raise AdapterError(f"no adapter to merge is {'active' if adapter is None else 'named'}")
    return names


def _own_dtype(model: nn.Module) -> torch.dtype:
    """What the model was loaded in, unless all of it is something else now: norms alone may have been raised since."""
    told = getattr(getattr(model, "config", None), "dtype", None)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    kept = any(p.dtype == told for p in floats) or is_quantized(model)
    if isinstance(told, torch.dtype) and kept:
        return told
    return max(floats, key=lambda p: p.numel()).dtype if floats else torch.float32


def _other_files(plan: _Plan, tokenizer: Any, scratch: Path, dtype: str) -> list[NewFile]:
    """Config, generation config and tokenizer."""
    files: dict[str, NewFile] = {}
    if plan.source is not None:
        kept = [path for path in checkpoint.other_files(plan.source) if path.name.startswith(_GOES_ALONG)]
        files.update((path.name, NewFile.copy_of(path)) for path in kept)
    model: Any = plan.model
    if hasattr(getattr(model, "config", None), "to_json_string"):
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = getattr(torch, dtype)
        config.architectures = [type(model).__name__]
        if plan.parted:
            config.tie_word_embeddings = False
        files["config.json"] = NewFile.of_text("config.json", config.to_json_string(use_diff=True))
    generation: Any = getattr(model, "generation_config", None)
    if "generation_config.json" not in files and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = NewFile.of_text("generation_config.json", generation.to_json_string())
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(scratch))
        files.update((path.name, NewFile.copy_of(path)) for path in sorted(scratch.iterdir()) if path.is_file())
    return list(files.values())
