"""The two sides of a merge: where weights come from, and what adapters add to them.

A weight comes from the live model (dequantized module by module) or from the safetensors files
of a full-precision base (read tensor by tensor); the deltas come from the adapters on the live
model or from a saved adapter alone. All four combinations meet in names and paths of the base.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import ModelFolder, TensorSpec
from nbpeft.engine.adapter import Adapter, AdapterSite
from nbpeft.engine.base import BaseLayer, onloaded
from nbpeft.engine.build import shared_state
from nbpeft.engine.layer import add_deltas
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.merge_checks import merge_refusal
from nbpeft.engine.merging import check_together
from nbpeft.engine.model_tree import bare_modules, embedding_of, is_quantized_layer
from nbpeft.engine.plan import Target, make_adapters
from nbpeft.engine.registry import backend_named, layer_kind_named, resolve_backend, resolve_layer_kind
from nbpeft.errors import CheckpointNotFoundError, ConfigError, MergeError, few
from nbpeft.model import files


@dataclass(frozen=True)
class LayerDelta:
    """What adapters add to one layer.

    Attributes:
        base: the layer; of a base that is not loaded only shapes are there.
        adapters: (adapter, factor on its delta).
    """

    base: BaseLayer
    adapters: tuple[tuple[Adapter, float], ...]

    @property
    def turned(self) -> bool:
        """Whether the layer is a quantized stand-in for one that stores its weight transposed."""
        return is_turned(self.base.module)

    @property
    def quantized(self) -> bool:
        """Whether the live layer is stored quantized."""
        return self.base.backend.name != "dense"

    @property
    def device(self) -> torch.device:
        """Where the adapters lie."""
        adapter, _ = self.adapters[0]
        return next(itertools.chain(adapter.parameters(), adapter.buffers())).device

    def add_to_(self, weight: Tensor) -> None:
        """Adds to a floating weight in the module's own orientation, in place."""
        add_deltas(self.base.kind.canonical(self.base.module, weight), self.base, self.adapters)

    def bias(self) -> Tensor | None:
        """What is added to the layer's bias, or None."""
        parts = [(adapter.delta_bias(self.base), scale) for adapter, scale in self.adapters]
        added = [part * scale for part, scale in parts if part is not None]
        return torch.stack(added).sum(0) if added else None


@dataclass
class Deltas:
    """What a merge changes, by names in the base model.

    Attributes:
        layers: path -> what is added to the weight of that layer.
        replaced: name -> tensor that takes the place of the base's: trained copies and biases.
        names: the adapters.
    """

    layers: dict[str, LayerDelta] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that come out different."""
        names = [f"{path}.weight" for path in self.layers] + list(self.replaced)
        return names + [f"{path}.bias" for path, layer in self.layers.items() if layer.bias() is not None]

    @property
    def byte_count(self) -> int:
        """Bytes of the adapters."""
        parameters = [
            p for layer in self.layers.values() for adapter, _ in layer.adapters for p in adapter.parameters()
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *self.replaced.values()])


def deltas_of(manager: AdapterManager, names: Sequence[str]) -> Deltas:
    """The deltas of adapters on a live model.

    Raises:
        MergeError: adapters are merged, or cannot be merged into a weight.
        AdapterError: two of them each trained a copy of one module.
    """
    manager.require(*names)
    check_together(manager.copies, manager.layers, names)
    manager.refuse_merged("merging into a copy")
    found = Deltas(names=tuple(names))
    for path, layer in manager.layers.items():
        chosen = [(layer.adapter(name), manager.scale(name)) for name in names if name in layer.adapters._modules]
        if not chosen:
            continue
        for adapter, _ in chosen:
            refusal = adapter.merge_refusal(layer.base)
            if refusal:
                raise MergeError(f"{path}: {', '.join(map(repr, names))} cannot be merged into {refusal}", path=path)
        refusal = merge_refusal(layer.base)
        if refusal:
            raise MergeError(f"{path}: {refusal}", path=path)
        found.layers[path] = LayerDelta(layer.base, tuple(chosen))
    for path, module in manager.copies.items():
        having = [name for name in names if name in module.modules_to_save._modules]
        if having:
            copy = module.modules_to_save[having[-1]]
            found.replaced.update({f"{path}.{key}": value for key, value in copy.state_dict().items()})
    for name in names:
        found.replaced.update(manager.weights(name).base)
    return found


def deltas_in(source: str | os.PathLike[str], skeleton: nn.Module, **hub: Any) -> Deltas:
    """The deltas of a saved adapter, for a base of which only the shapes are there.

    Args:
        source: a folder or a hub id.
        skeleton: the base model on the meta device.
        **hub: ``subfolder``, ``revision``, …

    Raises:
        CheckpointError: the adapter cannot be read or does not fit.
    """
    saved = checkpoint.read_checkpoint(source, **hub)
    note = checkpoint.compare(saved.metadata, skeleton)
    del note  # weights that are not loaded cannot be compared; shapes that rule the base out raise
    if saved.config.initialised_from_weight:
        raise MergeError(
            f"{source} started in a part of the weights it was trained on: load it on that model and merge there"
        )
    plan = AdapterManager(skeleton).plan(saved.config)
    loaded = checkpoint.from_file(
        saved.tensors,
        files.expected(skeleton, plan),
        peft_type=str(saved.config.peft_type),
        rename=checkpoint.renames_of(skeleton),
    )
    if loaded.missing:
        raise MergeError(f"{len(loaded.missing)} tensors of the adapter are missing: {few(loaded.missing, 3)}")
    name = os.path.basename(os.fspath(source).rstrip("/\\")) or "adapter"
    found = Deltas(names=(name,))
    bases: dict[str, BaseLayer] = {}
    shared = shared_state(plan, loaded.weights, torch.device("cpu"), torch.float32)

    def create(target: Target) -> Adapter:
        module = skeleton.get_submodule(target.path)
        base = BaseLayer(module, layer_kind_named(target.kind), backend_named(target.backend))
        tensors = {key: value.float() for key, value in loaded.weights.adapters.get(target.path, {}).items()}
        bases[target.path] = base
        site = AdapterSite(target.path, base, target.shapes, torch.float32, shared)
        adapter = target.adapter_class.create(target.config, site, tensors)
        refusal = adapter.merge_refusal(base)
        if refusal:
            raise MergeError(f"{target.path}: the adapter cannot be merged into {refusal}", path=target.path)
        return adapter

    for target, adapter in make_adapters(plan, create):
        found.layers[target.path] = LayerDelta(bases[target.path], ((adapter, 1.0),))
    for path, named in loaded.weights.copies.items():
        found.replaced.update({f"{path}.{key}": value for key, value in named.items()})
    found.replaced.update(loaded.weights.base)
    return found


def skeleton_of(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder on the meta device: modules and shapes, no weights.

    Raises:
        CheckpointNotFoundError: there is no config.
        ConfigError: its class is not known.
    """
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(os.fspath(folder))
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(f"no config of a model in {folder}: {str(error).splitlines()[0]}") from None
    names = list(getattr(config, "architectures", None) or [])
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ConfigError(f"the config in {folder} names no class of transformers ({', '.join(names) or 'none'})")
    if hasattr(config, "quantization_config"):
        raise ConfigError(f"the weights in {folder} are quantized: load that model and give it instead of the folder")
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model


class Weights(Protocol):
    """Where base weights come from."""

    specs: list[TensorSpec]

    def read(self, name: str) -> tuple[Tensor, bool]:
        """A tensor, and whether it is a copy that may be written into."""
        ...

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """How the merged tensors are spread over files."""
        ...


class FolderWeights:
    """Weights of a full-precision base on disk, in the shards they have there."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = ModelFolder(folder)
        self.specs = [spec for shard in self.files.shards for spec in shard]

    def read(self, name: str) -> tuple[Tensor, bool]:
        """A tensor of its own memory."""
        return self.files.read(name), True

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """As the base's files."""
        planned = {spec.name: spec for spec in specs}
        return [[planned[spec.name] for spec in shard] for shard in self.files.shards if shard]


class LiveWeights:
    """Weights of a model in memory, dequantized when their turn comes.

    A shared weight comes once, unless an adapter changes one of its uses: then the uses part.

    Args:
        model: the base model, with or without adapters on it.
        changed: names that adapters change.

    Attributes:
        parted: whether uses of a shared weight had to part.
    """

    def __init__(self, model: nn.Module, changed: Collection[str] = ()) -> None:
        self._owners: dict[str, tuple[nn.Module, Tensor | None]] = {}
        self.specs: list[TensorSpec] = []
        self.parted = False
        found = list(_tensors(model))
        names: dict[int, list[str]] = {}
        for name, module, tensor in found:
            names.setdefault(id(module) if tensor is None else id(tensor), []).append(name)
        for name, module, tensor in found:
            shared = names[id(module) if tensor is None else id(tensor)]
            parts = len(shared) > 1 and any(use in changed for use in shared)
            if name != shared[0] and not parts:
                continue
            self.parted = self.parted or parts
            self._owners[name] = module, tensor
            if tensor is not None:
                self.specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            else:
                backend: Any = resolve_backend(module)
                self.specs.append(TensorSpec(name, backend.dtype(module), _shape(module)))

    def read(self, name: str) -> tuple[Tensor, bool]:
        """The live tensor, or a dequantized one in the orientation of the model's class."""
        module, tensor = self._owners[name]
        if tensor is not None:
            with onloaded(module):
                present: Tensor = getattr(module, name.rpartition(".")[2]) if tensor.is_meta else tensor
                return present.detach(), False
        backend: Any = resolve_backend(module)
        weight: Tensor = backend.dequantize(module)
        return (weight.t().contiguous() if is_turned(module) else weight), True

    def shards(self, specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
        """As many as the limit asks for."""
        return checkpoint.in_shards(specs, limit)


def is_turned(module: nn.Module) -> bool:
    """Whether it is a quantized layer made of one that stores its weight transposed, as GPT-2's do."""
    made_of = getattr(module, "source_cls", None)
    return getattr(made_of, "__name__", "") == "Conv1D" and is_quantized_layer(module)


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """(name, module, tensor) of everything a model saves, without adapters; no tensor for a quantized weight."""
    quantized_prefix = None
    for path, module in bare_modules(model, repeat=True):
        prefix = f"{path}." if path else ""
        if quantized_prefix is not None and prefix.startswith(quantized_prefix):
            continue  # of a quantized layer only the dequantized weight and the bias are saved
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
    """Shape of a quantized weight in the orientation of the model's class."""
    kind = resolve_layer_kind(module)
    if kind is None or not (kind.is_linear or kind.takes_ids):
        backend: Any = resolve_backend(module)
        return tuple(backend.dequantize(module).shape)
    inputs, outputs = kind.features(module)
    rows_first = kind.takes_ids or is_turned(module)
    return (inputs, outputs) if rows_first else (outputs, inputs)


def check_names(deltas: Deltas, weights: Collection[str], where: str) -> None:
    """Refuses where a delta has no weight to go to.

    Raises:
        MergeError: names the first of them.
    """
    missing = [name for name in deltas.changed if name not in weights]
    if missing:
        raise MergeError(
            f"{where} lacks {len(missing)} of the {len(deltas.changed)} tensors that the adapter changes, "
            f"e.g. {missing[0]}"
        )


def check_tied(deltas: Deltas, model: Any, where: str) -> None:
    """Refuses to change one use of a weight that the files of a base hold once for two.

    Raises:
        MergeError: the adapter changes the embedding or the head, which share their weight.
    """
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    head = embedding_of(model, output=True)
    ends = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding) or module is head
    }
    hit = next((name for name in deltas.changed if name.replace(".base_layer", "") in ends), None)
    if hit is not None:
        raise MergeError(
            f"the adapter changes {hit}, which {where} holds together with another use: merge a loaded model"
        )
