"""Builds all parts of an adapter before any of them touches the model."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts, check_interrupt
from nbpeft.engine.calls.first_pass import NeedsFirstPass, put_first_pass
from nbpeft.engine.calls.inner_calls import put_inner_hooks
from nbpeft.engine.calls.model_calls import put_hooks, take_hooks
from nbpeft.engine.calls.side_network import put_side_network
from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.called_modules import called_modules, outside
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, AdapterWeights, ChangesBase, SharedSite, SharedState
from nbpeft.engine.contract.base import Backend, BaseLayer, Composite, offloading
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import backend_named, backends, layer_kind_named, method_of
from nbpeft.engine.injection.custom_layers import CustomAdapter, CustomLayer
from nbpeft.engine.injection.encoder_fast_paths import is_encoder_layer, refresh_fast_paths
from nbpeft.engine.injection.injection_plan import InjectionPlan, Target
from nbpeft.engine.injection.plan import make_adapters
from nbpeft.engine.injection.replication import pending_replication, replicate_layers_, undo_replication
from nbpeft.engine.kernels.storage import StoredWeight, is_packed, loaded
from nbpeft.engine.tree.model_tree import Site, says_untied, site_at
from nbpeft.engine.wrappers import fake_quant
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.composite_layer import AdaptedComposite
from nbpeft.engine.wrappers.extension import class_of_wrapper
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter, wrappers_of
from nbpeft.errors import AdapterError, ConfigError

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_HALF = (torch.float16, torch.bfloat16, *_EIGHT_BITS)
_PREPARED = "_nbpeft_prepared_by"
"""Attribute of a layer that a backend has prepared and must release: the backend's name."""
_NO_COPIES = "modules_to_save"
"""Attribute of a module without a trained copy any more: an empty dictionary, which other libraries read there."""


@dataclass
class Parts:
    """Parts that ``commit`` will add to the model; none of them is in the model yet.

    Attributes:
        adapters: (sites of one module, its wrapper, the new adapter) in model order.
        copies: (sites, wrapper, trained copy).
        shared: the state that the adapters share, or None.
        model: the base model.
        complete: with ``layer_replication``, a function that replicates the layers and then builds the parts.
    """

    adapters: list[tuple[list[Site], AdaptedLayer, Adapter]]
    copies: list[tuple[list[Site], ModulesToSaveWrapper, nn.Module]]
    shared: SharedState | None
    model: nn.Module
    complete: Callable[[Transaction], Parts] | None = None


def build(
    model: nn.Module,
    plan: InjectionPlan,
    active_state: ActiveState,
    weights: AdapterWeights | None,
    name: str = "default",
    *,
    half: bool = False,
    training: bool | None = None,
    draws: bool = True,
) -> Parts:
    """Creates the adapters and copies of a plan.

    Args:
        model: the base model.
        plan: the plan.
        active_state: state of the model, for new wrappers.
        weights: loaded tensors; paths and parameters missing there are initialized.
        name: name of the adapter, for custom layer classes.
        half: use the base's dtype for adapters even if it has half precision; by default they
            are float32 then, which training needs.
        training: mode of new adapters and their wrappers; None for the mode of the replaced adapter or of the layer.
        draws: whether initializing new parameters advances torch's generator. An adapter with weights never does.

    Returns:
        The new parts.

    Raises:
        ConfigError: a module to be copied is offloaded.
    """
    layer_map = pending_replication(model, plan.config)
    if layer_map is not None:

        def complete(change: Transaction) -> Parts:
            replicate_layers_(model, layer_map, change)
            return build(model, plan, active_state, weights, name, half=half, training=training, draws=draws)

        return Parts([], [], None, model, complete)
    by_path = {path: site_at(model, path) for path in plan.module_paths}
    others = {path: [site_at(model, other) for other in plan.other_paths.get(path, ())] for path in by_path}
    sites = {path: [site, *others[path]] for path, site in by_path.items()}
    layers = {target.path: _layer(by_path[target.module_path], target, plan, active_state) for target in plan.targets}
    first = layers[plan.targets[0].path].base if plan.targets else None
    bases = {path: layer.base for path, layer in layers.items()}
    parts = Parts([], [], None, model)
    with torch.random.fork_rng(devices=(), enabled=weights is not None or not draws):
        if first is not None:
            dtype = adapter_dtype(first.backend, first.module, half=half)
            parts.shared = shared_state(plan, weights, bases, first.device, dtype)
        made = make_adapters(
            plan, lambda target: _created(target, bases[target.path], weights, parts.shared, name, half)
        )
    for target, adapter in made:
        layer = layers[target.path]
        if training and not layer.adapters._modules:
            layer.training = True
        adapter.train(_mode(layer, name) if training is None else training)
        if parts.shared is not None and not parts.adapters:
            adapter._modules["shared"] = parts.shared  # in the first layer, so that it moves with the model
        parts.adapters.append((sites[target.module_path], layer, adapter))
    if plan.config.is_quantization_aware:
        _check_rounded(layers, parts, is_new=weights is None)
    tie = getattr(plan.config, "ensure_weight_tying", False) and not says_untied(model)
    tied: dict[int, Any] | None = {} if tie else None
    for path in plan.copies:
        site = by_path[path]
        wrapper = _copies_wrapper(site, active_state, training=training)
        trained = copy_module(site.module, None if weights is None else weights.copies.get(path), tied)
        parts.copies.append((sites[path], wrapper, trained))
    return parts


def _created(
    target: Target, base: BaseLayer, weights: AdapterWeights | None, shared: SharedState | None, name: str, half: bool
) -> Adapter:
    """The adapter of one target, loaded or new."""
    check_interrupt()  # some initialisations take a second for each layer
    start = None if weights is None else weights.starts.get(target.path)
    dtype = adapter_dtype(base.backend, base.module, half=half)
    site = AdapterSite(target.path, base, target.shapes, dtype, shared, name, start)
    given = None if weights is None else weights.adapters.get(target.path, {} if target.tied_to else None)
    if given is None:
        return target.adapter_class.create(target.config, site, None)
    return _loaded(target, site, given)


def _mode(layer: AdaptedLayer, name: str) -> bool:
    """The training mode of an adapter on a layer, or that of the layer if it has no such adapter."""
    present = layer.adapters._modules.get(name)
    return layer.training if present is None else present.training


def _copies_wrapper(site: Site, active_state: ActiveState, *, training: bool | None) -> ModulesToSaveWrapper:
    if any(offloading(part) is not None for part in site.module.modules()):
        raise ConfigError(
            f"{site.path} is offloaded and cannot be copied as a whole: load the model without offloading"
        )
    if isinstance(site.parent._modules[site.attribute], AdaptedBlock):
        raise ConfigError(f"the side network of an adapter changes {site.path}, which cannot be copied as a whole")
    _check_owner(site, active_state)
    if isinstance(site.wrapper, ModulesToSaveWrapper):
        return site.wrapper
    return ModulesToSaveWrapper(site.module, active_state, training=bool(training))


def _check_rounded(layers: Mapping[str, AdaptedLayer], parts: Parts, *, is_new: bool) -> None:
    """Raises ConfigError if a new adapter cannot be trained quantization-aware; warns if a loaded one cannot."""
    paths = {id(layer): path for path, layer in layers.items()}
    try:
        fake_quant.check((paths[id(layer)], layer, adapter) for _, layer, adapter in parts.adapters)
    except ConfigError as error:
        if is_new:
            raise
        warnings.warn(f"the adapter was trained for merging into quantized weights: {error}", stacklevel=4)


def _check_owner(site: Site, active_state: ActiveState) -> None:
    """Raises AdapterError if a layer has adapters of another model."""
    wrapper = site.wrapper
    if wrapper is None or wrapper._shared_state() is active_state:
        return
    if active_state.layer_commands.foreign_configs(wrapper) is None:
        raise AdapterError(
            f"{site.path} has adapters of another model ({', '.join(map(repr, wrapper._named())) or 'none now'}): add "
            "the adapter to that model, or unload its adapters first"
        )


def _layer(site: Site, target: Target, plan: InjectionPlan, active_state: ActiveState) -> AdaptedLayer:
    wrapper = site.wrapper
    _check_owner(site, active_state)
    if target.adapter_class is CustomAdapter:
        fits = isinstance(wrapper, CustomLayer) and type(wrapper.custom) is target.config.layer_class
        return wrapper if fits else CustomLayer(site.module, active_state)  # type: ignore[return-value]
    kind, backend = layer_kind_named(target.kind), backend_named(target.backend)
    if isinstance(kind, Composite):
        if isinstance(wrapper, AdaptedComposite):
            return wrapper
        composite = class_of_wrapper(AdaptedComposite, target.adapter_class, kind, backend)
        return composite(site.module, target.parameter, kind, backend, active_state)
    if target.parameter:
        wrappers = {wrapper.parameter_name: wrapper for wrapper in wrappers_of(wrapper)}
        alike = wrappers.keys() == {other.parameter for other in plan.targets if other.module_path == site.path}
        if alike and target.parameter in wrappers:
            return wrappers[target.parameter]
        owner = class_of_wrapper(AdaptedParameter, target.adapter_class, kind, backend)
        return owner(site.module, target.parameter, kind, backend, active_state)
    if isinstance(wrapper, AdaptedLayer) and not isinstance(wrapper, CustomLayer):
        return wrapper
    return class_of_wrapper(AdaptedLayer, target.adapter_class, kind, backend)(site.module, kind, backend, active_state)


def shared_state(
    plan: InjectionPlan,
    weights: AdapterWeights | None,
    layers: Mapping[str, BaseLayer],
    device: torch.device,
    dtype: torch.dtype,
) -> SharedState | None:
    """Builds the state that the layers of an adapter share.

    Args:
        plan: plan of the adapter.
        weights: loaded tensors, or None to initialize.
        layers: path of each target -> the layer.
        device: device of its tensors.
        dtype: dtype of new tensors.

    Returns:
        The state; None if the method has none.
    """
    shared = method_of(plan.config).shares.state
    if shared is None:
        return None
    given = {} if weights is None else weights.shared
    whole = weights is not None and plan.shared.keys() <= given.keys()
    made = shared.create(plan.config, SharedSite(plan.shared, device, dtype), given if whole else None)
    made.place({path: layers[path] for path in plan.features})
    if not whole:
        _copy_in(made, {name: tensor for name, tensor in given.items() if name in plan.shared})
    return made


def _loaded(target: Target, site: AdapterSite, given: Mapping[str, Tensor]) -> Adapter:
    # In the order of a new adapter, because optimizer state is keyed by that order.
    device = site.base.device
    placed = {
        name: given[name].to(device, site.dtype if name in site.shapes else None)
        for name in target.saved_shapes
        if name in given
    }
    if target.tied_to or site.shapes.keys() <= placed.keys():  # a tied adapter uses its source's tensors for the rest
        return target.adapter_class.create(target.config, site, placed)
    adapter = target.adapter_class.create(target.config, site, None)
    here = adapter.paths_by_name_in_files() if isinstance(adapter, ModelAdapter) else {}
    for name, tensor in placed.items():
        own = here.get(name, name)
        owner, _, own = ("", "", own) if own in adapter._parameters else own.rpartition(".")
        holder = adapter.get_submodule(owner)
        if name in site.shapes:
            holder._parameters[own] = nn.Parameter(tensor, name not in adapter.frozen_parameters)
        else:
            holder._buffers[own] = tensor
    return adapter


def adapter_dtype(backend: Backend, module: nn.Module, *, half: bool) -> torch.dtype:
    """The dtype of an adapter's parameters.

    Args:
        backend: how the layer's weight is stored. Where it is quantized, half precision is, as in PEFT, the dtype that
            the layer computes in, or float32 if it states none.
        module: the layer.
        half: see ``build``.
    """
    dtype = backend.dtype(module)
    if dtype not in _HALF or not half:
        return torch.float32 if dtype in _HALF else dtype
    stored: Any = getattr(module, "weight", getattr(module, "qweight", None))
    computed = getattr(module, "compute_dtype", getattr(stored, "dtype", None))
    if backend.name == "dense" or computed in _EIGHT_BITS:
        return dtype
    return computed if computed is not None and computed.is_floating_point else torch.float32


def copy_module(
    module: nn.Module, weights: Mapping[str, Tensor] | None, tied: dict[int, Any] | None = None
) -> nn.Module:
    """A trainable deep copy of a module.

    Args:
        module: the module.
        weights: name -> loaded tensor, which replaces the values of the copy.
        tied: the ``memo`` of ``copy.deepcopy`` from earlier copies with which this one shares tensors.

    Returns:
        The copy.
    """
    memo = {} if tied is None else tied
    memo.update({key: value for key, value in _cloned_fakes(module).items() if key not in memo})
    twin = copy.deepcopy(module, memo)
    for parameter in twin.parameters():
        if parameter.is_floating_point() and not is_packed(parameter):
            parameter.requires_grad_(True)
    _copy_in(twin, weights or {})
    return twin


@torch.no_grad()
def _copy_in(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def _cloned_fakes(module: nn.Module) -> dict[int, Tensor]:
    """Copies of fake tensors (of a memory estimate), for the ``memo`` of ``copy.deepcopy``.

    ``deepcopy`` of a fake tensor would copy its mode too, and then memory is freed twice.
    """
    fake = loaded("torch._subclasses.fake_tensor", "FakeTensor")
    memo: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, fake):
            clone, needed = tensor.detach().clone(), tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(clone, needed) if isinstance(tensor, nn.Parameter) else clone
    return memo


_MANY_OBJECTS = 10_000
"""Number of new objects that are worth moving past the collections of young objects."""


class CollectionPaused:
    """Context manager: pauses the cyclic garbage collector while thousands of modules are created.

    Nothing created here is garbage, but the allocations would trigger full collections, which take
    longer than the work itself once torch and transformers are loaded. Where so much was created that the next
    collection would visit it for long, it is moved to the oldest generation at once. ``__del__`` ends the pause
    too, since an interruption can skip ``__exit__``.
    """

    _was_enabled = False

    def __enter__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            # What the program has frozen itself, all that it had, stays frozen; Python 3.12 alone keeps hundreds there.
            if gc.get_count()[0] >= _MANY_OBJECTS > gc.get_freeze_count():
                with DeferredInterrupts():
                    gc.freeze()
                    gc.unfreeze()
            gc.enable()

    __del__ = __exit__


def hook_in(model: nn.Module, layer: AdaptedLayer, adapters: Iterable[Any], change: Transaction) -> None:
    """Registers the hooks of adapters that change calls of the model.

    Args:
        model: the base model.
        layer: the layer, in the module tree.
        adapters: its new adapters.
        change: records the hooks of modules.
    """
    for adapter in adapters:
        if isinstance(adapter, ModelAdapter):
            put_hooks(model, layer, change)
            put_inner_hooks(model, layer, change)
            put_side_network(model, layer, change)
        if isinstance(adapter._modules.get("shared"), NeedsFirstPass):
            put_first_pass(model, layer, change)


def commit(name: str, parts: Parts, change: Transaction) -> Parts:
    """Adds built parts to the model.

    Args:
        name: name of the adapter.
        parts: from ``build``.
        change: records the replaced modules; the caller records the adapters of existing wrappers.

    Returns:
        The parts that were added.
    """
    parts = parts.complete(change) if parts.complete is not None else parts
    for sites, layer, adapter in parts.adapters:
        layer.adapters[name] = adapter
        if isinstance(adapter, ChangesBase):
            adapter.change_base(layer.base, change)
        for site in sites:
            layer.attach(site.parent._modules, site.attribute, change)
        hook_in(parts.model, layer, (adapter,), change)
    for sites, module, trained in parts.copies:
        module.modules_to_save[name] = trained
        for site in sites:
            change.set_item(site.parent._modules, site.attribute, module)
    parents = (site.parent for sites, *_ in (*parts.adapters, *parts.copies) for site in sites)
    if any(is_encoder_layer(parent) for parent in parents):
        refresh_fast_paths(parts.model, change)
    return parts


def drop(
    model: nn.Module,
    name: str,
    layers: Iterable[AdaptedLayer],
    copies: Iterable[ModulesToSaveWrapper],
    change: Transaction,
    keep: Parts | None = None,
) -> None:
    """Removes an adapter; wrappers without adapters are removed too, unless ``keep`` reuses them.

    Args:
        model: the base model.
        name: name of the adapter.
        layers: the adapted layers; the caller records their adapters.
        copies: the modules with copies; the caller records these.
        change: records the replaced modules.
        keep: parts of the adapter that replaces this one, or None.
    """
    kept = set() if keep is None else {id(part[1]) for part in (*keep.adapters, *keep.copies)}
    empty: dict[int, nn.Module] = {}
    left = keep is not None
    for layer in layers:
        layer.adapters._modules.pop(name, None)
        layer.hide_adapters()
        if not layer.adapters._modules and id(layer) not in kept:
            empty[id(layer)] = layer.base_layer
        else:
            left = True
    for module in copies:
        module.modules_to_save._modules.pop(name, None)
        if not module.modules_to_save._modules and id(module) not in kept:
            empty[id(module)] = original = module.original_module
            change.keep_attributes(original, _NO_COPIES)
            original.__dict__[_NO_COPIES] = nn.ModuleDict()  # not a submodule: the state dict is that of the base
        else:
            left = True
    replace_modules(model, empty, change, merged=None if left else False)


def replace_modules(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    change: Transaction,
    *,
    merged: bool | None = None,
    release: bool = False,
) -> None:
    """Replaces modules wherever they are in the model.

    Args:
        model: the base model.
        replacements: id of a module -> its replacement.
        change: records the replaced modules.
        merged: if no adapter is left, whether some were merged permanently, so that replicated layers must stay; None
            if adapters are left.
        release: whether backends undo their preparation of layers for adapters.
    """
    _replace(model, replacements, change)
    if merged is not None:
        undo_replication(model, change, keep=merged)
    if release:
        _release(model, change)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module], change: Transaction) -> None:
    if not replacements:
        return
    parents = called_modules(model)
    take_hooks(parents, replacements, change)
    blocks = [module for module in parents if isinstance(module, AdaptedBlock) and id(module.layer) in replacements]
    replacements = {**replacements, **{id(block): block.base_layer for block in blocks}}
    wrappers = outside(model)
    change.keep(wrappers)
    for key in [key for key, wrapper in wrappers.items() if id(wrapper) in replacements]:
        del wrappers[key]
    for parent in parents:
        for attribute, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                while id(child) in replacements:  # wrappers for several parameters of a module are inside each other
                    child = replacements[id(child)]
                change.set_item(parent._modules, attribute, child)
    if any(is_encoder_layer(parent) for parent in parents):
        refresh_fast_paths(model, change)


def prepare_storage(model: nn.Module, change: Transaction) -> None:
    """Lets backends prepare all quantized layers of a model, because gradients pass through unadapted ones too.

    Args:
        model: the base model.
        change: records the layers.
    """
    idle = StoredWeight.prepare
    willing = [backend for backend in backends() if getattr(type(backend), "prepare", idle) is not idle]
    for module in called_modules(model):
        for backend in willing:
            if module._parameters and backend.matches(module):
                change.keep(module.__dict__)
                if backend.prepare(module):
                    module.__dict__[_PREPARED] = backend.name


def _release(model: nn.Module, change: Transaction) -> None:
    for module in called_modules(model):
        if _PREPARED in module.__dict__ or _NO_COPIES in module.__dict__:
            change.keep(module.__dict__)
            module.__dict__.pop(_NO_COPIES, None)
        if _PREPARED in module.__dict__:
            backend_named(module.__dict__.pop(_PREPARED)).release(module)
