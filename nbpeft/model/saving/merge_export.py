"""Merging into a full-precision copy on disk, shard by shard, and measuring merge errors.

A QLoRA adapter can be merged into the quantized weights (``PeftModel.merge_adapter``: dequantize, add, quantize), which
rounds the sum again, or into a full-precision copy, which does not. The copy is written tensor by tensor. In addition
to the model this needs memory for one weight and its sum, whatever the size of the model.

Base weights come from the loaded model, dequantized layer by layer, or from the safetensors files of a full-precision
base. Deltas come from the adapters on the loaded model or from a saved adapter.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import NewFile, TensorSpec
from nbpeft.engine.config.adapter_names import names_in
from nbpeft.engine.contract.adapter import rounds
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import is_quantized, main_dtype, manager_of
from nbpeft.errors import AdapterError, ConfigError, MergeError
from nbpeft.jsonable import AsDict
from nbpeft.model.quantization.quantize import dtype_of
from nbpeft.model.saving.merge_deltas import Deltas, LayerDelta, check_names, check_tied, deltas_in, deltas_of
from nbpeft.model.saving.merge_weights import FolderWeights, LiveWeights, Weights, meta_model
from nbpeft.model.saving.saved_places import note_written_over
from nbpeft.names import DTYPES

SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = (
    "added_tokens", "chat_template", "generation_config", "merges", "preprocessor", "processor", "sentencepiece",
    "special_tokens", "spiece", "tokenizer", "vocab",
)  # fmt: skip
"""Prefixes of the names of a model's files other than its weights and its config."""
_ROWS = 1024


@dataclass(frozen=True)
class LayerError:
    """Distance of a merged weight from the exact sum of base weight and delta, relative to the norm of that sum.

    Attributes:
        path: path of the layer.
        full_precision: error of the full-precision copy.
        requantized: error after quantizing again; None for a layer that is not quantized.
        norm: norm of the exact sum.
        delta_norm: norm of the adapters' delta.
    """

    path: str
    full_precision: float
    requantized: float | None
    norm: float
    delta_norm: float


@dataclass(frozen=True)
class MergeErrors(AsDict):
    """The merge errors by layer and in total, for the full-precision copy and for quantizing again.

    An error that is small relative to the weight can be large relative to the delta: after quantizing again, an element
    that changed by less than half a quantization step has its old value.

    Attributes:
        layers: one entry per layer, in model order; for tied weights only the first.
        dtype: dtype of the full-precision copy.
    """

    layers: tuple[LayerError, ...]
    dtype: str

    @property
    def full_precision(self) -> float:
        """Relative error of the copy in full precision over all layers."""
        return _combined_error((layer.full_precision, layer.norm) for layer in self.layers)

    @property
    def requantized(self) -> float | None:
        """Relative error after quantizing again, over all quantized layers; None if there are none."""
        found = [(layer.requantized, layer.norm) for layer in self.layers if layer.requantized is not None]
        return _combined_error(found) if found else None

    def of_delta(self, error: float) -> float:
        """Converts a total error, which is relative to the weights, to one relative to the adapters' delta."""
        added = math.hypot(*(layer.delta_norm for layer in self.layers))
        return error * math.hypot(*(layer.norm for layer in self.layers)) / added if added else 0.0

    def delta_message(self, error: float) -> str:
        """Returns ``of_delta`` as text: ``7.1 %``, ``112 %``."""
        percent = 100 * self.of_delta(error)
        return f"{percent:.2g} %" if percent < 99.5 else f"{percent:,.0f} %"

    def worst(self) -> LayerError | None:
        """Returns the layer with the largest error after quantizing again, or of rounding if none is quantized."""
        return max(self.layers, key=lambda layer: (layer.requantized or 0.0, layer.full_precision), default=None)

    def __str__(self) -> str:
        ways = [] if self.requantized is None else [("quantized again", self.requantized)]
        parts = [
            f"{way} {error:.2g} ({self.delta_message(error)} of what the adapter adds)"
            for way, error in [*ways, (f"in {self.dtype}", self.full_precision)]
        ]
        return f"relative error of the merged weights: {', '.join(parts)}"


@dataclass(frozen=True)
class MergedFolder(AsDict):
    """A merged model on disk.

    Attributes:
        folder: the folder, which ``from_pretrained`` can load.
        names: the merged adapters.
        paths: its files.
        byte_count: size of its weights in bytes.
        shard_bytes: size of each weight file in bytes.
        dtype: dtype of its weights.
        errors: the merge errors; None if they were not measured.
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
    safe_merge: bool = False,
    replace: bool = False,
) -> MergedFolder:
    """Writes the base model with adapters merged into its weights to a folder. The model itself is not changed.

    Args:
        model: an adapted model, quantized or not; or the folder of a full-precision base, which is then never loaded
            as a whole.
        adapter: name or names of the model's adapters, None for the active ones; if ``model`` is a folder, the folder
            or hub id of a saved adapter.
        folder: folder for the merged model, which must not have weights yet. Either all files are written or none.
        base: add the deltas to the full-precision weights in this folder instead of the model's dequantized weights.
            The adapter was not trained with them, and the measured errors include this difference.
        dtype: dtype of the written weights; by default that of the base.
        tokenizer: tokenizer to save; by default the files of the base's folder are copied, if it has any.
        max_shard_bytes: largest size of a file in bytes; ignored for a base from files, whose sharding is preserved.
        measure_errors: measure the merge errors.
        safe_merge: raise an error for a weight that is not finite.
        replace: replace a folder of files by the merged model, once that is complete.

    Returns:
        The written folder.

    Raises:
        MergeError: adapters are merged already, cannot be merged, or give weights that are not finite.
        CheckpointError: a folder cannot be read or written; then nothing is written.
        ConfigError: an argument is invalid.
    """
    wanted = None if dtype is None else dtype_of(dtype, "dtype", DTYPES)
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"a merged model needs a folder to be written to, not {folder!r:.60}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes!r}; expected a whole number of bytes")
    plan = _of_folder(model, adapter, base) if isinstance(model, str | os.PathLike) else _of_model(model, adapter, base)
    deltas, weights = plan.deltas, plan.weights
    if any(rounds(adapter) for delta in deltas.layers.values() for adapter, _ in delta.adapters):
        warnings.warn(
            f"{' and '.join(map(repr, deltas.names))} was trained quantization-aware: a full-precision copy gives "
            "other outputs; merge_adapter() on the quantized model preserves them",
            stacklevel=2,
        )
    wanted = wanted or plan.dtype
    merger = _Merger(deltas, weights, wanted, measure_errors, safe_merge)
    shards = weights.shards([merger.spec(spec) for spec in weights.specs], max_shard_bytes)
    stored = merger.dtype_name
    target = Path(os.path.expanduser(os.fspath(folder)))
    with checkpoint.disk_errors(target), checkpoint.scratch_folder() as scratch:
        extra = _other_files(plan, tokenizer, scratch, stored)
        with checkpoint.in_place_of(target, allowed=True) if replace else nullcontext(target) as place:
            paths = checkpoint.write_model(place, shards, merger.tensor, files=extra)
    if replace:
        note_written_over([target])
    paths = [target / path.name for path in paths]
    errors = merger.merge_errors if measure_errors else None
    sizes = tuple(sum(spec.byte_count for spec in shard) for shard in shards)
    return MergedFolder(target, deltas.names, tuple(paths), sum(sizes), sizes, stored, errors)


def merge_errors(
    model: nn.Module, adapter: str | Sequence[str] | None = None, *, dtype: torch.dtype | str | None = None
) -> MergeErrors:
    """Measures the error of merging into the weights as they are stored, and into a full-precision copy.

    Nothing is changed or written.

    Args:
        model: an adapted model.
        adapter: name or names; None for the active ones.
        dtype: dtype of the full-precision copy; by default that of the model.

    Returns:
        Both errors, as a whole and of each layer.

    Raises:
        MergeError: adapters are merged already or cannot be merged.
    """
    manager = _manager(model)
    deltas = deltas_of(manager, _names(manager, adapter))
    wanted = _own_dtype(manager.model) if dtype is None else dtype_of(dtype, "dtype", DTYPES)
    merger = _Merger(deltas, LiveWeights(manager.model, deltas.changed, deltas.alike), wanted, True, False)
    for name in merger.changed_weights:
        merger.tensor(name)
    return merger.merge_errors


@dataclass(frozen=True)
class MergedTensors:
    """The tensors of a model with adapters merged into its weights; each is computed when it is read.

    Attributes:
        names: the adapters.
        specs: name, dtype and shape of each tensor; a weight that embedding and head share is listed once, unless an
            adapter changes only one of them.
        read: computes and returns the tensor with a name.
    """

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    read: Callable[[str], Tensor]


def merged_tensors(model: nn.Module, adapter: str | Sequence[str], *, dtype: torch.dtype | str) -> MergedTensors:
    """Returns the merged weights of a loaded model, to write them in another format. Nothing is changed or written.

    Args:
        model: an adapted model, quantized or not.
        adapter: name or names.
        dtype: dtype of the tensors.

    Raises:
        MergeError: adapters are merged already or cannot be merged.
    """
    plan = _of_model(model, adapter, None)
    merger = _Merger(plan.deltas, plan.weights, dtype_of(dtype, "dtype", DTYPES), False, False)
    return MergedTensors(plan.deltas.names, tuple(merger.spec(spec) for spec in plan.weights.specs), merger.tensor)


class _Merger:
    """Computes the merged tensors one by one, and records their errors."""

    def __init__(self, deltas: Deltas, weights: Weights, dtype: torch.dtype | None, measure: bool, safe: bool) -> None:
        self._errors: dict[str, LayerError] = {}
        self._deltas = deltas
        self._weights = weights
        self._dtype = dtype
        self._measure = measure
        self._safe = safe
        self._specs = {spec.name: spec for spec in weights.specs}
        self._live = isinstance(weights, LiveWeights)

    @property
    def dtype_name(self) -> str:
        """Name of the dtype of most of the written weights."""
        dtype = self._dtype
        if dtype is None:
            floats = [spec for spec in self._specs.values() if spec.dtype.is_floating_point]
            dtype = max(floats, key=lambda spec: spec.byte_count).dtype if floats else torch.float32
        return str(dtype).removeprefix("torch.")

    @property
    def changed_weights(self) -> list[str]:
        """Names of the weights that change; of tied weights, only the stored one."""
        names = (layer.weight_name(path) for path, layer in self._deltas.layers.items())
        return [name for name in names if name in self._specs]

    @property
    def merge_errors(self) -> MergeErrors:
        """The errors of the tensors that were read, in the order of the model."""
        return MergeErrors(
            tuple(self._errors[path] for path in self._deltas.layers if path in self._errors), self.dtype_name
        )

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Returns the dtype and shape of a tensor after merging."""
        dtype = self._dtype if self._dtype is not None and spec.dtype.is_floating_point else spec.dtype
        return TensorSpec(spec.name, dtype, spec.shape)

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """Computes and returns the merged tensor with a name."""
        spec = self.spec(self._specs[name])
        replaced = self._deltas.replaced.get(name)
        value, own = (replaced.detach(), False) if replaced is not None else self._weights.read(name)
        path, _, kind = name.rpartition(".") if name not in self._deltas.layers else (name, "", "weight")
        layer = self._deltas.layers.get(path)
        if layer is None or kind not in ("weight", "bias"):
            return value.to(spec.dtype)
        if kind == "bias":
            added = layer.bias(lambda own: self._weights.read(f"{path}.{own}")[0])
            return (value if added is None else value.float() + added.to(value.device).float()).to(spec.dtype)
        return self._weight(path, layer, value, own, spec.dtype)

    def _weight(self, path: str, layer: LayerDelta, value: Tensor, own: bool, dtype: torch.dtype) -> Tensor:
        value = value.t().contiguous() if layer.transposed else value
        # Weights from files are moved to the adapters' device, which may be faster than the CPU.
        exact = value.to(layer.device, torch.float32, copy=self._measure or not own)
        layer.add_to_(exact)
        if self._safe and not bool(torch.isfinite(exact).all()):
            raise MergeError(f"the merged weight of {path} is not finite; nothing was written", path=path)
        stored = exact.to(dtype)
        if self._measure:
            delta_norm = _relative_error(value, exact) * float(exact.norm())
            del value
            self._record_error(path, layer, stored, exact, delta_norm)
        return stored.t().contiguous() if layer.transposed else stored

    def _record_error(self, path: str, layer: LayerDelta, stored: Tensor, exact: Tensor, delta_norm: float) -> None:
        if not self._live and layer.quantized:  # the adapter was trained on the quantized weight
            del exact
            exact = layer.base.backend.dequantize(layer.base.module).to(torch.float32, copy=True)
            layer.add_to_(exact)
        again = _requantized_error(layer, exact)
        self._errors[path] = LayerError(path, _relative_error(stored, exact), again, float(exact.norm()), delta_norm)


@dataclass(frozen=True)
class _Merge:
    """The inputs of a merge.

    Attributes:
        model: the base model, or a copy on the meta device.
        deltas: the adapters' changes.
        weights: source of the base weights.
        source: folder from which the tokenizer is copied, or None.
        dtype: dtype of the written weights, or None to preserve each tensor's.
        untied: whether embedding and head no longer share their weight.
    """

    model: nn.Module
    deltas: Deltas
    weights: Weights
    source: Path | None
    dtype: torch.dtype | None
    untied: bool = False


def _of_folder(folder: str | os.PathLike[str], adapter: Any, base: Any) -> _Merge:
    """Returns the inputs for a base in a folder and a saved adapter."""
    if not isinstance(adapter, str | os.PathLike):
        raise ConfigError("for a base model in a folder, give the folder of a saved adapter")
    if base is not None:
        raise ConfigError("base= requires a loaded model; a folder given as model is itself the base")
    base_model = meta_model(folder)
    deltas = deltas_in(adapter, base_model)
    return _from_files(base_model, deltas, folder)


def _of_model(model: nn.Module, adapter: Any, base: Any) -> _Merge:
    """Returns the inputs for adapters on a loaded model."""
    manager = _manager(model)
    deltas = deltas_of(manager, _names(manager, adapter))
    if base is not None:
        return _from_files(manager.model, deltas, base)
    weights = LiveWeights(manager.model, deltas.changed, deltas.alike)
    check_names(deltas, {spec.name for spec in weights.specs}, "the model")
    source = str(getattr(getattr(manager.model, "config", None), "_name_or_path", "") or "")
    place = Path(source) if source and os.path.isdir(source) else None
    return _Merge(manager.model, deltas, weights, place, _own_dtype(manager.model), weights.untied)


def _from_files(model: nn.Module, deltas: Deltas, folder: str | os.PathLike[str]) -> _Merge:
    weights = FolderWeights(folder)
    check_tied(deltas, model, os.fspath(folder))
    check_names(deltas, {spec.name for spec in weights.specs}, os.fspath(folder))
    return _Merge(model, deltas, weights, weights.files.folder, None)


def _manager(model: nn.Module) -> AdapterManager:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model with adapters or the folder of a base, not {model!r:.60}")
    manager = manager_of(model)
    if manager is None or not manager.alive or not manager.names:
        raise AdapterError(f"{type(model).__name__} has no adapters to merge")
    return manager


def _names(manager: AdapterManager, adapter: Any) -> tuple[str, ...]:
    names = manager.active if adapter is None else names_in(adapter)
    if not names:
        raise AdapterError("no adapter is active" if adapter is None else "no adapter to merge is named")
    return names


def _own_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype in which a model was loaded, unless no tensor has it any more."""
    configured = getattr(getattr(model, "config", None), "dtype", None)
    still_used = any(p.dtype == configured for p in model.parameters()) or is_quantized(model)
    if isinstance(configured, torch.dtype) and still_used:
        return configured
    return main_dtype(model)


def _other_files(plan: _Merge, tokenizer: Any, scratch: Path, dtype: str) -> list[NewFile]:
    """Returns the config, the generation config and the tokenizer's files."""
    files: dict[str, NewFile] = {}
    if plan.source is not None:
        tokenizer_files = [
            path for path in checkpoint.other_files(plan.source) if path.name.startswith(_TOKENIZER_FILES)
        ]
        files.update((path.name, NewFile.copy_of(path)) for path in tokenizer_files)
    model: Any = plan.model
    if hasattr(getattr(model, "config", None), "to_json_string"):
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = getattr(torch, dtype)
        config.architectures = [type(model).__name__]
        if plan.untied:
            config.tie_word_embeddings = False
        files["config.json"] = NewFile.of_text("config.json", config.to_json_string(use_diff=True))
    generation: Any = getattr(model, "generation_config", None)
    if "generation_config.json" not in files and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = NewFile.of_text("generation_config.json", generation.to_json_string())
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(scratch))
        files.update((path.name, NewFile.copy_of(path)) for path in sorted(scratch.iterdir()) if path.is_file())
    return list(files.values())


# Errors


@torch.no_grad()
def _requantized_error(delta: LayerDelta, exact: Tensor) -> float | None:
    """Returns the error of quantizing a merged weight like the layer, which is not changed; None if not possible.

    Args:
        delta: change of the layer.
        exact: the merged weight, (out, in) or in the layout of the module, float32.
    """
    backend, module = delta.base.backend, delta.base.module
    if not delta.quantized or not backend.can_merge:
        return None
    twin = copy.deepcopy(module)
    backend.store(twin, exact)
    return _relative_error(backend.dequantize(twin), exact)


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference divided by the norm of ``exact``, in blocks of rows to save memory."""
    difference = total = 0.0
    for start in range(0, max(exact.shape[0], 1), _ROWS):
        exact_rows = exact[start : start + _ROWS].float()
        difference += float((value[start : start + _ROWS].to(exact_rows.device).float() - exact_rows).square().sum())
        total += float(exact_rows.square().sum())
    return math.sqrt(difference / total) if total else 0.0


def _combined_error(parts: Iterable[tuple[float | None, float]]) -> float:
    errors = norms = 0.0
    for error, norm in parts:
        errors += ((error or 0.0) * norm) ** 2
        norms += norm**2
    return math.sqrt(errors / norms) if norms else 0.0
