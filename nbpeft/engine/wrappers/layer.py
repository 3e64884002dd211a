"""AdaptedLayer: the only wrapper around a layer, whatever the method, the kind of layer and the backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveAdapters, ActiveState, LayerState, ReplicaState
from nbpeft.engine.changes.called_modules import OUTSIDE, is_plain
from nbpeft.engine.changes.spill_file import SpillFile
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import (
    Adapter,
    AddsTogether,
    FusesAdd,
    ReplacesCall,
    TransformsInput,
    TransformsOutput,
    WeightInitialized,
    add_to_,
    delta_of,
    rounds,
    source_of,
)
from nbpeft.engine.contract.base import Backend, BaseLayer, LayerKind, all_onloaded, offloading
from nbpeft.engine.contract.model_adapter import HasSideNetwork, learns_prompt
from nbpeft.engine.contract.registry import Method, method_of_adapter, methods_of_type
from nbpeft.engine.contract.shared_state import add_shared, take_shared
from nbpeft.engine.kernels.numerics import add_delta, add_scaled_, is_finite
from nbpeft.engine.views.layer_attributes import attribute_by_name, by_name, function_by_name
from nbpeft.engine.views.part_modules import AdapterDict, ParameterMapping, ShownParts
from nbpeft.engine.views.shown_modules import show_adapters, shown_under, unfilled, use_shown
from nbpeft.engine.views.shows_adapters import ShowsAdapters
from nbpeft.engine.wrappers.fake_quant import FakeQuantLayer
from nbpeft.engine.wrappers.merge_checks import unmergeable_reason
from nbpeft.engine.wrappers.mixed_batch import mixed_output
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import AdapterError, MergeError


@dataclass
class WeightBackup:
    """A backup of a layer's weight.

    Attributes:
        parameter: the parameter itself, if merging replaces it instead of writing to it because other modules share it.
        weight: otherwise the backend's snapshot, or a function that returns it.
        bias: the layer's bias, (out,), on the CPU.
        merged: names of the adapters that were merged into the weight.
        frozen: backup of the frozen weight, if adapters were merged.
    """

    parameter: nn.Parameter | None
    weight: Any
    bias: Tensor | None
    merged: tuple[str, ...]
    frozen: WeightBackup | None


class AdaptedLayer(ShowsAdapters, Wrapper):
    """A frozen layer and its named adapters.

    The output is that of the base layer plus the deltas of the active adapters. Each delta is computed with the
    frozen base, so their order does not matter. Attributes that the wrapper lacks (``weight``, ``in_features``, …),
    except private ones, are read from the base layer. Parameters and modules below it have the names that the record
    of the method declares (``engine.views``); the adapter modules themselves are not in the tree that ``named_modules``
    lists.

    Attributes:
        base_layer: the frozen layer; called as a module, so that its hooks run.
        adapters: adapter name -> adapter.
        merged_names: adapters whose deltas are in the base weight now.
    """

    base_layer: nn.Module
    adapters: AdapterDict

    def __init__(self, base_layer: nn.Module, kind: LayerKind, backend: Backend, active_state: ActiveState) -> None:
        super().__init__()
        self.__dict__["_modules"]["base_layer"] = base_layer
        adapters = AdapterDict()
        self.__dict__.update(
            adapters=adapters,
            kind=kind,
            backend=backend,
            base=BaseLayer(base_layer, kind, backend, adapters=adapters._modules),
            active_state=active_state,
            merged_names=(),
            training=base_layer.training,
            _frozen=None,
            _twin=None,
            _shown={},
            listed_apart=False,
            parts_listed_apart=False,
        )

    kind: LayerKind
    backend: Backend
    base: BaseLayer
    active_state: ActiveState | LayerState
    merged_names: tuple[str, ...]
    _frozen: WeightBackup | None
    _twin: FakeQuantLayer | None
    _shown: dict[str, Any]
    listed_apart: bool
    """Whether a handle on the model (``PeftModel``) lists the adapters that change calls, instead of this layer."""
    parts_listed_apart: bool = False
    """Whether a handle lists the modules that adapters have on the model (``PeftNames.on_model``), instead of this."""
    emptied_of: str = ""
    """The ``peft_type`` of the last deleted adapter, for a layer without adapters."""

    def _named(self) -> dict[str, Any]:
        return self.__dict__["adapters"]._modules

    def _methods(self) -> list[Method]:
        """The methods of the adapters on this layer; if it has none, that of the last deleted adapter."""
        found = [method_of_adapter(adapter) for adapter in self._named().values()]
        return [method for method in found if method is not None] or [*methods_of_type(self.emptied_of)[:1]]

    def note_method(self) -> None:
        """Records the method, whose attribute names the layer keeps when all adapters are deleted."""
        self.__dict__["emptied_of"] = next((method.peft_type for method in self._methods()), "")

    def wrapped_module(self) -> nn.Module:
        """The frozen layer; for an adapted parameter the module that has it, inside all wrappers."""
        return self.__dict__["_modules"]["base_layer"]

    @property
    def weight_module(self) -> nn.Module:
        """The module whose ``weight`` is adapted."""
        return self.base_layer

    @property
    def shared_weight(self) -> nn.Parameter | None:
        """The original shared weight, while this layer has a separate merged copy; otherwise None."""
        return None if self._frozen is None else self._frozen.parameter

    @property
    def is_untied(self) -> bool:
        """Whether the layer has a separate weight because adapters are merged; see ``shared_weight``."""
        return self.shared_weight is not None

    def path_at(self, place: str) -> str:
        """Path of the adapted layer or parameter, if the frozen module is at path ``place``."""
        return place

    def attach(self, modules: dict[str, nn.Module | None], attribute: str, change: Transaction) -> None:
        """Replaces the frozen layer in its parent, or stays outside of the tree (``is_outside``).

        Args:
            modules: ``_modules`` of the parent.
            attribute: name of the layer there.
            change: records the old entry.
        """
        change.set_item(modules, attribute, self.in_tree)
        if self.listed_apart or self.parts_listed_apart:
            model = self._commands().manager.model
            change.keep_attributes(model, OUTSIDE)
            wrappers = model.__dict__.setdefault(OUTSIDE, {})
            wrappers.pop(str(id(self)), None)
            if self.is_outside:
                wrappers[str(id(self))] = self

    @property
    def in_tree(self) -> nn.Module:
        """The module in the tree: the wrapper, or the frozen layer if the wrapper is outside."""
        return self.base_layer if self.is_outside else self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the output of the base layer plus the deltas of the active adapters.

        Args:
            x: the layer's input.
            *args: passed to the base layer.
            **kwargs: passed to the base layer.

        Returns:
            The sum, in the dtype of the base layer's output.
        """
        base_layer: Any = self._modules["base_layer"]
        if "_hf_hook" in base_layer.__dict__ and (parts := self.offloaded_parts()):
            with all_onloaded(parts):
                return self.forward(x, *args, **kwargs)
        active = self.active_state.current()
        if self.merged_names:
            return base_layer(x, *args, **kwargs)
        if self.backend.name != "dense" and self.is_quantization_aware(active.call_names):
            return self._rounded(x, active, args, kwargs)
        alone = self._alone(active)
        if isinstance(alone, TransformsInput):
            base = self.base_in(active, active.names[0])
            transformed: Tensor = base_layer(alone.transform_input(x, base), *args, **kwargs)
            return alone.transform_output(transformed, base) if isinstance(alone, TransformsOutput) else transformed
        if isinstance(alone, ReplacesCall) and not (args or kwargs) and is_plain(base_layer):
            replaced = alone.output(x, self.base_in(active, active.names[0]))
            if replaced is not None:
                return replaced
        output: Tensor = base_layer(x, *args, **kwargs)
        if x.device != output.device:  # accelerate moves inputs inside the call of a layer on another device
            x = x.to(output.device)
        if active.rows is not None:
            return mixed_output(self, x, output, active, active.rows)
        if isinstance(alone, TransformsOutput):
            return alone.transform_output(output, self.base_in(active, active.names[0]))
        if isinstance(alone, FusesAdd):
            adapter: Any = alone
            return adapter(x, output, self.base_in(active, active.names[0]), True)
        return self._with_deltas(x, output, active)

    def _alone(self, active: ActiveAdapters) -> Any:
        """The adapter on this layer if it is the model's only active one and its scale is 1; otherwise None."""
        if len(active.names) != 1 or active.scales[0] != 1.0 or active.rows is not None:
            return None
        return self.adapters._modules.get(active.names[0])

    def offloaded_parts(self) -> list[nn.Module]:
        """The modules of adapters, or that show parts of them, whose tensors accelerate has offloaded."""
        # Prompts that a handle lists can be offloaded although their embedding is not.
        if not self.listed_apart and offloading(self.base_layer) is None:
            return []
        shown = (child for name, child in self._modules.items() if name != "base_layer" and child is not None)
        parts = (part for child in (*shown, self.adapters) for part in child.modules() if offloading(part) is not None)
        return [part for part in parts if any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))]

    def onloaded_parts(self) -> AbstractContextManager[None]:
        """Context manager: loads what accelerate has offloaded of the adapters."""
        return all_onloaded(self.offloaded_parts())

    def is_quantization_aware(self, names: Sequence[str]) -> bool:
        """Whether one of these adapters is quantization-aware, so that the layer computes as if merged."""
        if self.backend.name == "dense":
            return False
        adapters: Any = self.adapters._modules
        return any(name in adapters and rounds(adapters[name]) for name in names)

    def _rounded(self, x: Tensor, active: ActiveAdapters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        if active.rows is not None:
            raise AdapterError("quantization-aware adapters do not support mixed batches: activate one adapter")
        twin = self._twin
        if twin is None:
            twin = self.__dict__["_twin"] = FakeQuantLayer()
        chosen = [pair for pair in zip(active.names, active.scales, strict=True) if pair[0] in self.adapters._modules]
        bases = {name: self.base_in(active, name) for name, _ in chosen}
        return twin.output(self, x, chosen, bases, args, kwargs)

    def _with_deltas(self, x: Tensor, output: Tensor, active: ActiveAdapters) -> Tensor:
        adapters: Any = self.adapters._modules
        present = [
            (name, adapters[name], scale)
            for name, scale in zip(active.names, active.scales, strict=True)
            if name in adapters
        ]
        if len(present) > 1 and (added := self._together(x, output, active, present)) is not None:
            return added
        total: Tensor | None = None
        for name, adapter, scale in present:
            delta: Tensor = adapter(x, output, self.base_in(active, name))
            if scale != 1.0:
                delta = delta * scale
            total = delta if total is None else total + delta
        if total is None:
            return output
        if total.device != output.device:
            total = total.to(output.device)
        return add_delta(output, total)

    def _together(
        self, x: Tensor, output: Tensor, active: ActiveAdapters, present: Sequence[tuple[str, Any, float]]
    ) -> Tensor | None:
        """The output plus the deltas of several adapters of one method, if that adds them in one pass; else None."""
        _, adapters, scales = zip(*present, strict=True)
        kind = type(adapters[0])
        if active.context or not issubclass(kind, AddsTogether) or any(type(other) is not kind for other in adapters):
            return None
        return kind.added(adapters, scales, x, output, self.own_base())

    def base_in(self, active: ActiveAdapters, name: str) -> BaseLayer:
        """The layer as an adapter sees it in the running call."""
        base = self.own_base()
        return base.within(active.context[name]) if name in active.context else base

    def own_base(self) -> BaseLayer:
        """``base``, or a new one if the frozen layer is another module, as in a replica of ``nn.DataParallel``."""
        layer = self._modules["base_layer"]
        if layer is None or layer is self.base.module:
            return self.base
        return BaseLayer(layer, self.kind, self.backend, adapters=self.adapters._modules)

    def replace_base_layer(self, module: nn.Module, change: Transaction) -> None:
        """Replaces the frozen layer.

        Args:
            module: a frozen layer of the same kind.
            change: records the old one.
        """
        change.set_item(self._modules, "base_layer", module)
        change.keep_attributes(self, "base")
        self.__dict__["base"] = self.own_base()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        adapters: Any = AdapterDict()
        for name, adapter in self.adapters._modules.items():
            adapters._modules[name] = adapter._replicate_for_data_parallel()
        replica.__dict__.update(active_state=ReplicaState(self.active_state), adapters=adapters, _twin=None)
        # torch makes a replica of the class of the original.
        replica.__class__ = LayerReplica
        return replica

    def has_any_of(self, active: ActiveAdapters) -> bool:
        """Whether this layer has one of the active adapters of a call and is not merged."""
        return not self.merged_names and any(name in self.adapters._modules for name in active.call_names)

    def adapter(self, name: str) -> Adapter:
        """The adapter with a name on this layer."""
        found = self.adapters._modules[name]
        assert isinstance(found, Adapter)
        return found

    @torch.no_grad()
    def are_finite(self, names: Sequence[str]) -> bool:
        """Whether all parameters of these adapters on this layer are finite."""
        here = [self.adapter(name) for name in names if name in self.adapters._modules]
        return all(is_finite(parameter) for adapter in here for parameter in adapter.parameters())

    @torch.no_grad()
    def not_finite_when_merged(self, names: Sequence[str], scales: Sequence[float]) -> str:
        """Checks whether merging would cause infinity or NaN; nothing is changed.

        Args:
            names: names of the adapters.
            scales: factor on the delta of each.

        Returns:
            ``weights`` or ``bias``, whichever would not be finite; empty if all would be.
        """
        chosen = [(name, scale) for name, scale in zip(names, scales, strict=True) if name in self.adapters._modules]
        if not chosen:
            return ""
        if not self.are_finite(names):
            return "weights"
        weight = self.base.weight().clone()
        self._add_deltas(weight, *zip(*chosen, strict=True))
        if not is_finite(weight):
            return "weights"
        if self.base.bias is None:
            return ""
        bias = self.base.bias.detach().clone()
        _add_bias_deltas(bias, self._bias_deltas(chosen))
        return "" if is_finite(bias) else "bias"

    @torch.no_grad()
    def merge_into_base(
        self,
        names: Sequence[str],
        scales: Sequence[float],
        change: Transaction,
        *,
        keep_frozen: bool,
        untie: bool = False,
    ) -> None:
        """Merges adapters into the weight; merged adapters are unmerged first.

        Args:
            names: names of the adapters; those not on this layer are ignored.
            scales: factor on the delta of each.
            change: records the present weight, as a copy on the CPU or on disk.
            keep_frozen: also store the frozen weight for ``restore_base``.
            untie: merge into a copy of the weight, because other modules share it.

        Raises:
            MergeError: the backend cannot store a merged weight, or an adapter adds a bias and the layer has none.
        """
        chosen = [(name, scale) for name, scale in zip(names, scales, strict=True) if name in self.adapters._modules]
        if not chosen:
            return
        self.check_mergeable([name for name, _ in chosen])
        self.restore_base(change)
        frozen = self._stored(untie=untie, spill=None if keep_frozen else change.spill)
        change.on_undo(lambda: self._restore(frozen))
        if untie:
            self._untie_weight()
        self.write_merged(chosen, self.weight_module, self.base.bias)
        self.merged_names = tuple(name for name, _ in chosen)
        self.__dict__["_twin"] = None
        self._frozen = frozen if keep_frozen else None

    @torch.no_grad()
    def take_out(self, adapters: Sequence[WeightInitialized], change: Transaction, *, untie: bool) -> None:
        """Subtracts the initial components of adapters from the weight, permanently.

        Args:
            adapters: adapters on this layer.
            change: see ``merge_into_base``.
            untie: see ``merge_into_base``.
        """
        before = self._stored(untie=untie, spill=change.spill)
        change.on_undo(lambda: self._restore(before))
        if untie:
            self._untie_weight()
        weight = self.backend.dequantize(self.weight_module)
        for adapter in adapters:
            adapter.take_out_(self.kind.canonical(self.weight_module, weight))
        self.backend.store(self.weight_module, weight)

    def _untie_weight(self) -> None:
        """Replaces the shared weight with a copy for this layer only."""
        shared: Any = self.weight_module._parameters["weight"]
        self.weight_module._parameters["weight"] = nn.Parameter(shared.detach().clone(), requires_grad=False)

    def write_merged(self, chosen: Sequence[tuple[str, float]], module: nn.Module, bias: Tensor | None) -> None:
        """Stores the frozen weight plus deltas, each computed with the frozen layer.

        Args:
            chosen: (name, scale) of adapters on this layer.
            module: to store the sum in: ``weight_module``, or a copy of it (``StoredWeight.twin``).
            bias: (out,); bias deltas are added to it in place. None if there is no bias.
        """
        # Bias deltas first: they may depend on the frozen weight, which is overwritten below.
        bias_deltas = self._bias_deltas(chosen)
        if module is not self.weight_module or self.changes_weight([name for name, _ in chosen]):
            weight = self.backend.dequantize(self.weight_module)
            self._add_deltas(self.kind.canonical(self.weight_module, weight), *zip(*chosen, strict=True))
            self.backend.store(module, weight)
        if bias is not None:
            _add_bias_deltas(bias, bias_deltas)

    def changes_weight(self, names: Sequence[str]) -> bool:
        """Whether any of these adapters changes the weight of this layer, and not only its bias."""
        return any(self.adapter(name).delta_rank != 0 for name in names if name in self.adapters._modules)

    def check_mergeable(self, names: Sequence[str]) -> None:
        """Raises MergeError if these adapters cannot be merged here."""
        present = [name for name in names if name in self.adapters._modules]
        if present and not self.backend.can_merge:
            raise MergeError(f"a {self.backend.name} weight cannot be merged into: {self.backend.unmergeable_reason}")
        if present and offloading(self.weight_module) is not None:
            raise MergeError(
                "its weight is offloaded, so a merged delta would be lost in the next call: load the model without "
                "offloading"
            )
        if present and any(tensor.is_meta for tensor in self.weight_module.parameters(recurse=False)):
            raise MergeError("its weight has no data (meta device): load the whole model")
        for name in present:
            refusal = self.adapter(name).unmergeable_reason(self.base)
            if refusal:
                raise MergeError(f"adapter {name!r} cannot be merged into {refusal}")
        biased = any(self.adapter(name).delta_bias(self.base) is not None for name in present)
        refusal = unmergeable_reason(self.base, biased=biased) if present else ""
        if refusal:
            raise MergeError(refusal)
        for name in present:
            if self.base.bias is None and self.adapter(name).delta_bias(self.base) is not None:
                raise MergeError(f"adapter {name!r} adds a bias, but the base layer has no bias to merge it into")

    def _add_deltas(self, weight: Tensor, names: Sequence[str], scales: Sequence[float]) -> None:
        adapters = [(self.adapter(name), scale) for name, scale in zip(names, scales, strict=True)]
        add_deltas(weight, self.base, [pair for pair in adapters if not self._merged_through_tied_layer(pair[0])])

    def _merged_through_tied_layer(self, adapter: Adapter) -> bool:
        """Whether merging the adapter that this one is tied to changes this layer's weight too."""
        source = source_of(adapter)
        owner = None if source is None else self._layer_with([source])
        if owner is None:
            return False
        return owner.weight_module._parameters.get("weight") is self.weight_module._parameters.get("weight")

    def _layer_with(self, adapters: Sequence[Adapter]) -> AdaptedLayer | None:
        """The layer of the model that has one of these adapters."""
        layers: Any = self._commands().manager.layers.values()
        pairs = ((layer, own) for layer in layers for own in layer.adapters._modules.values())
        return next((layer for layer, own in pairs if any(own is adapter for adapter in adapters)), None)

    def _bias_deltas(self, chosen: Sequence[tuple[str, float]]) -> list[tuple[Tensor, float]]:
        found = ((self.adapter(name).delta_bias(self.base), scale) for name, scale in chosen)
        return [(delta, scale) for delta, scale in found if delta is not None]

    def _stored(self, *, untie: bool, spill: SpillFile | None = None) -> WeightBackup:
        """A backup of everything that merging changes; tensors are copied to the CPU.

        Args:
            untie: the parameter will be replaced and not written to, so a reference to it is enough.
            spill: stores the copy of a dense weight; None for host memory.
        """
        bias: Tensor | None = self.base.bias
        weight: Any = None
        if not untie and spill is not None and self.backend.name == "dense":
            weight = spill.keep(self.backend.dequantize(self.weight_module))
        elif not untie:
            weight = self.backend.snapshot(self.weight_module)
        return WeightBackup(
            self.weight_module._parameters["weight"] if untie else None,
            weight,
            None if bias is None else bias.detach().to("cpu", copy=True),
            self.merged_names,
            self._frozen,
        )

    @torch.no_grad()
    def _restore(self, stored: WeightBackup) -> None:
        if stored.parameter is not None:
            self.weight_module._parameters["weight"] = stored.parameter
        else:
            weight = stored.weight() if callable(stored.weight) else stored.weight
            self.backend.restore(self.weight_module, weight)
        if stored.bias is not None and self.base.bias is not None:
            self.base.bias.copy_(stored.bias)
        self.merged_names, self._frozen = stored.merged, stored.frozen

    @torch.no_grad()
    def restore_base(self, change: Transaction) -> None:
        """Restores the weight from before ``merge_into_base``, bit for bit."""
        if not self.merged_names:
            return
        frozen = self._frozen
        assert frozen is not None
        untie = frozen.parameter is not None
        merged = self._stored(untie=untie)
        # Dropped, so that only one backup of the frozen weight exists: the layer itself will have that weight again.
        merged.frozen = None

        def undo() -> None:
            merged.frozen = self._frozen if self.merged_names else self._stored(untie=untie)
            self._restore(merged)

        change.on_undo(undo)
        self._restore(frozen)

    def forget_frozen(self) -> None:
        """Makes the merged weight the frozen one; the former weight is lost."""
        self.merged_names, self._frozen = (), None

    # The tree, with the names that the records of methods declare

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The submodules are made again where their names have changed since the layer was pickled.
        super().__setstate__({**state, "_shown": {}})

    def show_adapters(self) -> None:
        """Updates the submodules that show the adapters after these have changed."""
        adapters = self.adapters._modules
        if (before := self._shown) != adapters:
            parts_apart = self.parts_listed_apart
            self.__dict__["_shown"] = show_adapters(self._modules, before, adapters, self.base, parts_apart=parts_apart)

    def _shown_where_tied(self, name: str) -> nn.Module | None:
        """The attribute ``name`` of the layer to which the adapters here are tied; None if it has none."""
        here: Any = self.adapters._modules.values()
        sources = [source for adapter in here if (source := source_of(adapter)) is not None]
        if not any(name in (source.peft.container, *source._parameters) for source in sources):
            return None
        owner = self._layer_with(sources)
        if owner is None:
            return None
        owner.show_adapters()
        return shown_under(owner._modules, name)

    def hide_adapters(self) -> None:
        """Removes the submodules that show adapters which were deleted."""
        if self._shown:
            self.show_adapters()

    @property
    def is_outside(self) -> bool:
        """Whether the wrapper is not in the module tree: its adapters only change calls, and a handle lists them."""
        adapters = list(self.adapters._modules.values())
        prompts = self.listed_apart and all(map(learns_prompt, adapters))
        networks = self.parts_listed_apart and all(isinstance(one, HasSideNetwork) for one in adapters)
        return bool(adapters) and (prompts or networks)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # The adapters are no submodules themselves, so ``.to()`` would not reach them.
        for child in (*self._modules.values(), self.adapters) if recurse else ():
            child._apply(fn)  # type: ignore[union-attr]
        return super()._apply(fn, recurse=False)

    def called_children(self) -> tuple[nn.Module, nn.Module]:
        """The modules that are called, moved and switched between modes: the frozen layer and the adapters."""
        return self.base_layer, self.adapters

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode."""
        self.training = mode
        for child in self.called_children():
            child.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the adapters under their declared names; see ``nn.Module``."""
        found = super().state_dict(*args, **kwargs)
        add_shared(self._named(), found, kwargs.get("prefix", ""), keep_vars=kwargs.get("keep_vars", False))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        elsewhere = {name: adapter for name, adapter in self._named().items() if "shared" not in adapter._modules}
        take_shared(elsewhere, state_dict, prefix, args[2], args[4])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        replica = isinstance(self.__dict__.get("active_state"), ReplicaState)  # nn.DataParallel fills it in
        put = isinstance(value, nn.Module) and name != "base_layer" and not replica
        found = getattr(self, name, None) if put else None
        if not isinstance(found, ShownParts | ParameterMapping):
            super().__setattr__(name, value)
        elif isinstance(value, nn.ModuleDict | nn.ParameterDict):
            for adapter in value:
                found[adapter] = value[adapter]
        else:
            raise AdapterError(f"{name} of an adapted layer has one entry for each adapter: set {name}[adapter]")

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules") or {}
        if name == "base_layer" and name in modules:
            return modules[name]
        if name.startswith("__") or "base_layer" not in modules:
            return super().__getattr__(name)
        adapters, base_layer = self.adapters._modules, modules["base_layer"]
        self.show_adapters()
        found: Any = modules.get(name)  # first: names from named_modules() must work as attributes
        if found is None:
            found = by_name(adapters, name)
        if found is None:
            found = function_by_name(self, adapters, name)
        if found is None:
            found = shown_under(modules, name)
        if found is None:
            found = self._shown_where_tied(name)
        if found is None and not adapters:
            found = self._unfilled(name)
        if found is None and name.startswith("_"):  # private attributes, such as accelerate's _hf_hook, are not shared
            return super().__getattr__(name)
        if found is None and not hasattr(base_layer, name):
            found = attribute_by_name(adapters, name)
            found = self._unfilled(name) if found is None else found
        return getattr(base_layer, name) if found is None else found

    def _unfilled(self, name: str) -> Any:
        """An empty mapping, if PEFT's layers have the name and no adapter here uses it; otherwise None."""
        empty = (unfilled(method, name, with_settings=not self._named()) for method in self._methods())
        return next((mapping for mapping in empty if mapping is not None), None)


class LayerReplica(AdaptedLayer):
    """A replica made by ``nn.DataParallel``.

    torch copies the submodules that show the adapters to the replica's device; the adapters then use these copies.
    """

    def show_adapters(self) -> None:
        """Does nothing: a replica is never changed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        use_shown(self.adapters._modules, self._modules)
        return super().forward(x, *args, **kwargs)


def _add_bias_deltas(bias: Tensor, deltas: Sequence[tuple[Tensor, float]]) -> None:
    for delta, scale in deltas:
        add_scaled_(bias, delta.to(bias.dtype), scale)


def add_deltas(weight: Tensor, base: BaseLayer, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Adds the deltas of adapters, each computed with the frozen weight, to a canonical weight in place.

    Args:
        weight: the frozen canonical weight; becomes the merged one.
        base: the layer.
        adapters: (adapter, factor on its delta).
    """
    if len(adapters) == 1 or not any(adapter.reads_weight for adapter, _ in adapters):
        for adapter, scale in adapters:
            add_to_(adapter, weight, base, scale)
        return
    frozen = weight.clone()
    for adapter, scale in adapters:
        add_scaled_(weight, delta_of(adapter, frozen, base), scale)
