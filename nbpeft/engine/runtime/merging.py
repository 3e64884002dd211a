"""Merging adapters into the base weights and unmerging them, over a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, WeightInitialized
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.tree.tied_weights import layers_to_untie
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import AdapterError, MergeError


def check_merge(
    layers: Mapping[str, AdaptedLayer], names: Sequence[str], scale: Callable[[str], float], *, safe: bool
) -> None:
    """Raises MergeError if a merge is impossible on any layer; changes nothing.

    Args:
        layers: path -> adapted layer.
        names: adapters to merge.
        scale: factor on an adapter's delta.
        safe: raise an error if a merged weight is not finite.
    """
    scales = [scale(name) for name in names]
    broken: list[str] = []
    for path, layer in layers.items():
        check_interrupt()
        try:
            layer.check_mergeable(names)
        except MergeError as error:
            raise MergeError(f"{path}: {error}", path=path) from None
        broken_part = layer.not_finite_when_merged(names, scales) if safe else ""
        if broken_part:
            raise MergeError(
                f"NaNs detected in the merged {broken_part}. The adapter {' or '.join(names)} seems to be broken at "
                f"{path}; nothing was merged",
                path=path,
            )
        if not safe and not layer.are_finite(names):
            broken.append(path)
    if broken:
        more = f" and at {len(broken) - 1} more layers" if len(broken) > 1 else ""
        warnings.warn(
            f"{' or '.join(map(repr, names))} is not finite at {broken[0]}{more}, so the merged weights are not either",
            stacklevel=4,
        )


def merge_layers(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    names: Sequence[str],
    scale: Callable[[str], float],
    change: Transaction,
    *,
    keep_frozen: bool,
) -> None:
    """Merges adapters on every layer; it can be interrupted between two layers.

    Args:
        model: the base model.
        layers: path -> adapted layer.
        names: adapters to merge.
        scale: factor on an adapter's delta.
        change: records the weights as they were.
        keep_frozen: keep the frozen weights afterwards as well, for ``unmerge_layers``.
    """
    untied = layers_to_untie(model, layers, names)
    scales = [scale(name) for name in names]
    for path, layer in layers.items():
        check_interrupt()
        layer.merge_into_base(names, scales, change, keep_frozen=keep_frozen, untie=path in untied)


def merge_additional(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    merged: Sequence[str],
    together: Sequence[str],
    scale: Callable[[str], float],
    change: Transaction,
    *,
    safe: bool,
) -> None:
    """Merges adapters, some of which may already be merged.

    Deltas are computed from the frozen weights, which are therefore restored first.

    Args:
        model: the base model.
        layers: path -> adapted layer.
        merged: adapters that are merged now.
        together: all adapters to be merged afterwards, including those of ``merged``.
        scale: factor on an adapter's delta.
        change: records the weights as they were.
        safe: raise an error if a merged weight is not finite.

    Raises:
        MergeError: an adapter cannot be merged.
    """
    if merged:
        unmerge_layers(layers.values(), change)
    check_merge(layers, together, scale, safe=safe)
    merge_layers(model, layers, together, scale, change, keep_frozen=True)


def check_addable(
    plan: InjectionPlan, merged: Sequence[str], layers: Mapping[str, AdaptedLayer], base: Iterable[str]
) -> None:
    """Raises MergeError if an adapter is initialized from weights into which others are merged.

    Args:
        plan: the plan of the adapter to add.
        merged: adapters that are merged now.
        layers: path -> adapted layer.
        base: names of base tensors that its file contains.
    """
    touched = {path for path, layer in layers.items() if layer.merged_names}
    if not touched:
        return
    untied = next((path for path, layer in layers.items() if layer.is_untied), None)
    if untied is not None and getattr(plan.config, "ensure_weight_tying", False):
        names = ", ".join(map(repr, merged))
        raise MergeError(f"{names} merged, so {untied} is not tied at the moment: unmerge before", path=untied)
    for target in plan.targets:
        if target.path in touched and (plan.config.initialised_from_weight or target.adapter_class.reads_weight):
            raise _uses_merged(target.path, merged)
    for path in plan.copies:
        if any(place == path or place.startswith(f"{path}.") for place in touched):
            raise _uses_merged(path, merged)
    for name in (*plan.biases, *base):
        if name in plan.biases or name.rpartition(".")[0] in touched:
            raise _uses_merged(name, merged)


def _uses_merged(place: str, merged: Sequence[str]) -> MergeError:
    names = ", ".join(map(repr, merged))
    return MergeError(f"{names} merged: unmerge before adding an adapter that is initialized from {place}", path=place)


def check_compatible(
    copies: Mapping[str, ModulesToSaveWrapper], layers: Mapping[str, AdaptedLayer], names: Sequence[str]
) -> None:
    """Raises AdapterError if two of the adapters cannot be active together.

    That is so if both trained a copy of one module, if both have a side network, or if one adapts a layer inside a
    module that the other trained a copy of.

    Args:
        copies: path -> module with trained copies.
        layers: path -> adapted layer.
        names: the adapters.
    """
    networks = {
        name: adapter
        for layer in (layers.values() if len(names) > 1 else ())
        for name, adapter in layer.adapters._modules.items()
        if name in names and isinstance(adapter, HasSideNetwork)
    }
    if len(networks) > 1:
        title = next(iter(networks.values())).title
        raise AdapterError(f"{title} requires exactly one active adapter, not {' and '.join(map(repr, networks))}")
    for path, module in copies.items() if len(names) > 1 else ():
        having = [name for name in names if name in module.modules_to_save._modules]
        if len(having) > 1:
            raise AdapterError(
                "Only one adapter can be set at a time for ModulesToSaveWrapper: adapters "
                f"{' and '.join(map(repr, having))} each trained their own copy of {path}",
                path=path,
            )
        inside = (layer for place, layer in layers.items() if having and place.startswith(f"{path}."))
        other = next((name for layer in inside for name in names if name in layer.adapters._modules), None)
        if other is not None:
            raise AdapterError(
                f"adapter {having[0]!r} trained its own copy of {path} and {other!r} adapts layers inside {path}; "
                "only one of them can be active",
                path=path,
            )


def unmerge_layers(layers: Iterable[AdaptedLayer], change: Transaction) -> None:
    """Restores the frozen weights bit for bit, in reverse order because layers may share a weight.

    Args:
        layers: the adapted layers, in the order in which they were merged.
        change: records the weights as they were.
    """
    for layer in reversed(list(layers)):
        check_interrupt()
        layer.restore_base(change)


def leave_starts(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    configs: Mapping[str, AdapterConfig],
    merged: Sequence[str],
    change: Transaction,
) -> bool:
    """Subtracts initial components (PiSSA, OLoRA, ...) from the base for adapters that are saved without them.

    PEFT's way to save such an adapter and its residual base: set ``init_lora_weights = True`` in the config, then call
    ``save_pretrained``, ``unload()``, and ``save_pretrained`` of the base.

    Args:
        model: the base model.
        layers: path -> adapted layer.
        configs: adapter name -> its config.
        merged: adapters that are merged, their initial components included.
        change: records the weights as they were.

    Returns:
        Whether there were such adapters.

    Raises:
        MergeError: a weight cannot be written.
    """
    leaving: dict[str, dict[str, WeightInitialized]] = {}
    for path, layer in layers.items():
        others = {name: layer.adapter(name) for name in layer.adapters if name not in merged}
        for name, adapter in others.items():
            if not isinstance(adapter, WeightInitialized) or adapter.taken_over is None:
                continue
            if adapter.leaves_start or not configs[name].initialised_from_weight:
                leaving.setdefault(path, {})[name] = adapter
    for path, adapters in leaving.items():
        try:
            layers[path].check_mergeable(list(adapters))
        except MergeError as error:
            raise MergeError(f"{path}: {error}", path=path) from None
    names = list(dict.fromkeys(name for adapters in leaving.values() for name in adapters))
    untied = layers_to_untie(model, {path: layers[path] for path in leaving}, names) if leaving else set()
    for path, adapters in leaving.items():
        check_interrupt()
        layers[path].take_out(list(adapters.values()), change, untie=path in untied)
    return bool(leaving)


def partly_merged(layers: Mapping[str, AdaptedLayer], merged: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns path -> adapters merged there, for layers on which only some of the merged adapters are merged.

    Args:
        layers: path -> adapted layer.
        merged: adapters that are merged on some layer.
    """
    return {
        path: layer.merged_names
        for path, layer in layers.items()
        if layer.merged_names != tuple(name for name in merged if name in layer.adapters)
    }


def warn_of_requantization(layers: Mapping[str, AdaptedLayer], names: Sequence[str]) -> None:
    """Warns once if merging requantizes weights, unless the adapters were trained with that rounding.

    Args:
        layers: path -> adapted layer.
        names: adapters to merge.
    """
    lossy = (
        layer
        for layer in layers.values()
        if layer.backend.name != "dense" and layer.changes_weight(names) and not layer.is_quantization_aware(names)
    )
    kinds = sorted({layer.backend.name for layer in lossy})
    if kinds:
        warnings.warn(
            f"merging into {', '.join(kinds)} weights rounds them again: outputs may differ from the unmerged model",
            stacklevel=4,
        )


def module_to_keep(module: ModulesToSaveWrapper, names: Sequence[str]) -> nn.Module:
    """The copy of a module that remains when adapters are merged permanently; the original if none has one.

    Args:
        module: the module with trained copies.
        names: the adapters that are merged.
    """
    copies = module.modules_to_save._modules
    having = [name for name in names if name in copies]
    last = copies[having[-1]] if having else None
    return module.original_module if last is None else last
