"""The base weights for a merge: from a model in memory, dequantized one by one, or from the files of a folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft._util.hub_access import config_errors
from nbpeft.checkpoint import ModelFolder, TensorSpec
from nbpeft.engine.contract.base import onloaded
from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.tree.model_tree import bare_modules, is_quantized_layer
from nbpeft.errors import CheckpointNotFoundError, ConfigError, few, in_one_line


def meta_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Creates the model of a folder on the meta device: modules and shapes, but no weights.

    Raises:
        CheckpointNotFoundError: there is no config.
        ConfigError: the config names no class of transformers, or the weights are quantized.
    """
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(os.fspath(folder))
    except config_errors() as error:
        reason = in_one_line(str(error).partition("\n\n")[0])
        raise CheckpointNotFoundError(f"{folder} has no model config: {reason}") from None
    names = list(getattr(config, "architectures", None) or [])
    model_class = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ConfigError(
            f"the config in {folder} names no class of transformers (architectures: {few(names) if names else 'none'})"
        )
    if hasattr(config, "quantization_config"):
        raise ConfigError(f"the weights in {folder} are quantized: load the model and pass it instead of the folder")
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model


class Weights(Protocol):
    """A source of base weights."""

    specs: list[TensorSpec]

    def read(self, name: str) -> tuple[Tensor, bool]:
        """Returns a tensor, and whether it is a copy that the caller may overwrite."""
        ...

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """Splits the merged tensors into files of at most ``limit`` bytes."""
        ...


class FolderWeights:
    """Weights of a full-precision base on disk, in its own shards."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = ModelFolder(folder)
        self.specs = [spec for shard in self.files.shards for spec in shard]

    def read(self, name: str) -> tuple[Tensor, bool]:
        """Returns a copy of a tensor."""
        return self.files.read(name), True

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """Returns the tensors in the shards of the base; ``limit`` is ignored."""
        planned = {spec.name: spec for spec in specs}
        return [[planned[spec.name] for spec in shard] for shard in self.files.shards if shard]


class LiveWeights:
    """Weights of a model in memory, which are dequantized when they are read.

    A tied weight is listed once. If adapters change its uses differently, each use is listed and saved separately.

    Args:
        model: the base model, with or without adapters on it.
        changed: names of the weights that adapters change.
        alike: sets of weights that adapters change by the same tensors.

    Attributes:
        untied: whether a tied weight is saved separately for each use.
    """

    def __init__(self, model: nn.Module, changed: Collection[str] = (), alike: Sequence[Set[str]] = ()) -> None:
        self._owners: dict[str, tuple[nn.Module, Tensor | None]] = {}
        self.specs: list[TensorSpec] = []
        self.untied = False
        found = list(_tensors(model))
        names: dict[int, list[str]] = {}
        for name, module, tensor in found:
            names.setdefault(id(module) if tensor is None else id(tensor), []).append(name)
        for name, module, tensor in found:
            shared = names[id(module) if tensor is None else id(tensor)]
            untied = len(shared) > 1 and any(use in changed for use in shared) and not _within(shared, alike)
            if name != shared[0] and not untied:
                continue
            self.untied = self.untied or untied
            self._owners[name] = module, tensor
            if tensor is not None:
                self.specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            else:
                backend: Any = resolve_backend(module)
                self.specs.append(TensorSpec(name, backend.dtype(module), _shape(module)))

    def read(self, name: str) -> tuple[Tensor, bool]:
        """Returns the tensor, dequantized if necessary, in the layout of the model's class."""
        module, tensor = self._owners[name]
        if tensor is not None:
            with onloaded(module):
                present: Tensor = getattr(module, name.rpartition(".")[2]) if tensor.is_meta else tensor
                if isinstance(present, QuantizedMatrices):
                    return present.dequantize(), True
                return present.detach(), False
        backend: Any = resolve_backend(module)
        weight: Tensor = backend.dequantize(module)
        return (weight.t().contiguous() if is_transposed(module) else weight), True

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """Returns shards of at most ``limit`` bytes."""
        return checkpoint.in_shards(specs, limit)


def _within(names: Sequence[str], groups: Sequence[Set[str]]) -> bool:
    return any(group >= set(names) for group in groups)


def is_transposed(module: nn.Module) -> bool:
    """Returns whether a quantized layer replaces one that stores its weight transposed, like GPT-2's ``Conv1D``."""
    source_class = getattr(module, "source_cls", None)
    return getattr(source_class, "__name__", "") == "Conv1D" and is_quantized_layer(module)


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """Yields (name, module, tensor) of everything that a model saves, without adapters; None for quantized weights."""
    quantized_prefix = None
    for path, module in bare_modules(model, repeat=True):
        prefix = f"{path}." if path else ""
        if quantized_prefix is not None and prefix.startswith(quantized_prefix):
            continue  # a quantized layer saves only its dequantized weight and its bias
        quantized = is_quantized_layer(module)
        if quantized:
            quantized_prefix = prefix
            yield f"{prefix}weight", module, None
        for name, parameter in module._parameters.items():
            if parameter is not None and (not quantized or name == "bias"):
                yield prefix + name, module, parameter
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            if buffer is not None and saved and (not quantized or name == "bias"):
                yield prefix + name, module, buffer


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a quantized weight in the layout of the model's class."""
    kind = resolve_layer_kind(module)
    if kind is None or not (kind.is_linear or kind.takes_ids):
        backend: Any = resolve_backend(module)
        return tuple(backend.dequantize(module).shape)
    inputs, outputs = kind.features(module)
    rows_first = kind.takes_ids or is_transposed(module)
    return (inputs, outputs) if rows_first else (outputs, inputs)
