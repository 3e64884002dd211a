"""The deltas of adapters for a merge: of adapters on a loaded model, or of a saved adapter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, source_of
from nbpeft.engine.contract.base import BaseLayer, offloading
from nbpeft.engine.contract.registry import backend_named, layer_kind_named
from nbpeft.engine.injection.build import shared_state
from nbpeft.engine.injection.injection_plan import Target
from nbpeft.engine.injection.plan import make_adapters
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.merging import check_compatible
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import bare_modules, embedding_of, frozen_module, sharing_embedding
from nbpeft.engine.tree.tied_weights import change_of
from nbpeft.engine.wrappers.layer import add_deltas
from nbpeft.engine.wrappers.merge_checks import unmergeable_reason
from nbpeft.errors import MergeError, few
from nbpeft.model.saving import loading
from nbpeft.model.saving.merge_weights import is_transposed


@dataclass(frozen=True)
class LayerDelta:
    """The deltas of adapters on one layer.

    Attributes:
        base: the layer, without weights if the base model is not loaded.
        adapters: pairs of an adapter and the factor on its delta.
    """

    base: BaseLayer
    adapters: tuple[tuple[Adapter, float], ...]

    @property
    def transposed(self) -> bool:
        """Whether the layer is quantized and replaces one that stores its weight transposed."""
        return is_transposed(self.base.module)

    @property
    def quantized(self) -> bool:
        """Whether the loaded layer is quantized."""
        return self.base.backend.name != "dense"

    @property
    def device(self) -> torch.device:
        """Device of the adapters' tensors, or of the layer if they have none; the CPU instead of the meta device."""
        owners = [source_of(adapter) or adapter for adapter, _ in self.adapters]
        first = next((tensor for own in owners for tensor in itertools.chain(own.parameters(), own.buffers())), None)
        device = self.base.device if first is None else first.device
        return torch.device("cpu") if device.type == "meta" else device

    def weight_name(self, path: str) -> str:
        """Returns the name of the changed tensor: the weight of the layer at a path, or the parameter at the path."""
        view = self.base.module
        if not isinstance(view, ParameterView):
            return f"{path}.weight"
        own = view.parameter_name
        return path if path.endswith(f".{own}") else f"{path}.{own}"

    def add_to_(self, weight: Tensor) -> None:
        """Adds the deltas in place to a floating-point weight, (out, in) or in the layout of the module."""
        add_deltas(self.base.kind.canonical(self.base.module, weight), self.base, self.adapters)

    def bias(self, read: Callable[[str], Tensor] | None = None) -> Tensor | None:
        """Returns the sum of the changes of the layer's bias, (out,), or None if there is none.

        Args:
            read: returns a parameter of the layer by name, for a layer on the meta device. Without it, the values for
                such a layer are meaningless, and only whether the result is None can be used.
        """
        base = self._with_data(read)
        parts = [(adapter.delta_bias(base), scale) for adapter, scale in self.adapters]
        added = [part * scale for part, scale in parts if part is not None]
        return torch.stack(added).sum(0) if added else None

    def _with_data(self, read: Callable[[str], Tensor] | None) -> BaseLayer:
        """Returns the layer; if it is on the meta device, a copy with parameters from ``read`` or zeros."""
        module, backend = self.base.module, self.base.backend
        empty = {
            name: parameter
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta
        }
        if not empty or isinstance(module, ParameterView) or offloading(module) is not None:
            return self.base
        twin = backend.twin(module)  # type: ignore[attr-defined]
        for name, parameter in empty.items():
            value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape) if read is None else read(name)
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
        return BaseLayer(twin, self.base.kind, backend)


@dataclass
class Deltas:
    """The changes of a merge, by names in the base model.

    Attributes:
        layers: path -> change of the weight of the layer.
        replaced: name -> tensor that replaces the base's: trained copies of modules, and biases.
        names: the adapters.
    """

    layers: dict[str, LayerDelta] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def alike(self) -> list[set[str]]:
        """Sets of weights that the merge changes by the same tensors, so that tied weights among them stay tied."""
        groups: dict[object, set[str]] = {}
        for path, layer in self.layers.items():
            groups.setdefault(change_of(layer.adapters), set()).add(layer.weight_name(path))
        return list(groups.values())

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the merge changes."""
        names = [layer.weight_name(path) for path, layer in self.layers.items()] + list(self.replaced)
        return names + [f"{path}.bias" for path, layer in self.layers.items() if layer.bias() is not None]


def deltas_of(manager: AdapterManager, names: Sequence[str]) -> Deltas:
    """Returns the deltas of adapters on a loaded model.

    Args:
        manager: manager of the model.
        names: names of the adapters.

    Raises:
        MergeError: adapters are merged, or cannot be merged into a weight.
        AdapterError: two adapters have each trained a copy of the same module.
    """
    manager.require(*names)
    check_compatible(manager.copies, manager.layers, names)
    manager.refuse_merged("merging into a copy")
    found = Deltas(names=tuple(names))
    for path, layer in manager.layers.items():
        chosen = [(layer.adapter(name), manager.scale(name)) for name in names if name in layer.adapters._modules]
        if not chosen:
            continue
        for adapter, _ in chosen:
            refusal = adapter.unmergeable_reason(layer.base)
            if refusal:
                raise MergeError(f"{path}: {', '.join(map(repr, names))} cannot be merged into {refusal}", path=path)
        refusal = unmergeable_reason(layer.base)
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


def deltas_in(source: str | os.PathLike[str], model: nn.Module) -> Deltas:
    """Returns the deltas of a saved adapter, for a base model that is not loaded.

    Args:
        source: a folder or a hub id.
        model: the base model on the meta device.

    Raises:
        CheckpointError: the adapter cannot be read or does not fit.
    """
    saved = checkpoint.read_checkpoint(source)
    # Raises an error for another base. The returned note is ignored: without weights it cannot be reliable.
    checkpoint.compare(saved.metadata, model)
    if saved.config.initialised_from_weight:
        raise MergeError(f"the init of {source} changed its base weights: load it on that base model and merge there")
    config, tensors = saved.reconciled(saved.config)
    config = of_former_file(model, config, tensors)
    plan, loaded = loading.fitted(AdapterManager(model), None, config, tensors)
    if loaded.missing:
        raise MergeError(f"{len(loaded.missing)} tensors of the adapter are missing: {few(loaded.missing, 3)}")
    name = os.path.basename(os.fspath(source).rstrip("/\\")) or "adapter"
    found = Deltas(names=(name,))
    bases = {target.path: _base_of(target, model) for target in plan.targets}
    shared = shared_state(plan, loaded.weights, bases, torch.device("cpu"), torch.float32)

    def create(target: Target) -> Adapter:
        base = bases[target.path]
        tensors = {
            key: value.float() if value.is_floating_point() else value
            for key, value in loaded.weights.adapters.get(target.path, {}).items()
        }
        site = AdapterSite(target.path, base, target.shapes, torch.float32, shared)
        adapter = target.adapter_class.create(target.config, site, tensors)
        refusal = adapter.unmergeable_reason(base)
        if refusal:
            raise MergeError(f"{target.path}: the adapter cannot be merged into {refusal}", path=target.path)
        return adapter

    for target, adapter in make_adapters(plan, create):
        found.layers[target.path] = LayerDelta(bases[target.path], ((adapter, 1.0),))
    for path, named in loaded.weights.copies.items():
        found.replaced.update({f"{path}.{key}": value for key, value in named.items()})
    found.replaced.update(loaded.weights.base)
    return found


def _base_of(target: Target, model: nn.Module) -> BaseLayer:
    module = target.adapted_in(model.get_submodule(target.module_path))
    return BaseLayer(module, layer_kind_named(target.kind), backend_named(target.backend))


def check_names(deltas: Deltas, weights: Set[str], where: str) -> None:
    """Checks that the base has each weight that is changed, or a tied one that gets the same change.

    Args:
        deltas: the changes.
        weights: names of the base's weights.
        where: description of the base, for the message.

    Raises:
        MergeError: a weight is missing.
    """
    alike = {name: group for group in deltas.alike for name in group}
    missing = [name for name in deltas.changed if weights.isdisjoint(alike.get(name, {name}))]
    if missing:
        raise MergeError(
            f"{where} lacks {len(missing)} of the {len(deltas.changed)} tensors that the adapter changes, "
            f"e.g. {missing[0]}"
        )


def check_tied(deltas: Deltas, model: Any, where: str) -> None:
    """Checks that tied weights, which are stored only once, all get the same change.

    Args:
        deltas: the changes.
        model: the base model, with its config.
        where: description of the base, for the message.

    Raises:
        MergeError: the adapter changes only the embedding or only the head, which share their weight.
    """
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    head = embedding_of(model, output=True)
    ends = {
        f"{path}.weight"
        for path, module in bare_modules(model)
        if isinstance(module, nn.Embedding) or (head is not None and module is frozen_module(head))
    }
    sharing = {f"{path}.weight" for path in sharing_embedding(model, bare_modules(model))}
    alike = next((group for group in deltas.alike if sharing and sharing <= group), set())
    hit = next((name for name in deltas.changed if name in ends - alike), None)
    if hit is not None:
        raise MergeError(f"the adapter changes {hit}, which {where} stores once for several uses: merge a loaded model")
