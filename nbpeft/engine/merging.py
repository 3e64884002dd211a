"""Merging adapters into the base weights and taking them out again, over a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from nbpeft.engine.copies import CopiedModule
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.shared import layers_to_part
from nbpeft.errors import AdapterError, MergeError


def check_merge(layers: Mapping[str, AdaptedLayer], names: Sequence[str], *, safe: bool) -> None:
    """Raises MergeError where a merge could not be done on every layer, before any is done.

    Args:
        layers: path -> adapted layer.
        names: adapters to merge.
        safe: also refuse if any merged weight would not be finite.
    """
    for path, layer in layers.items():
        try:
            layer.check_mergeable(names)
        except MergeError as error:
            raise MergeError(f"{path}: {error}", path=path) from None
        if safe and not layer.check_finite(names):
            raise MergeError(
                f"NaNs detected in the merged weights of {path}: "
                f"{' or '.join(map(repr, names))} seems to be broken; nothing was merged",
                path=path,
            )


def merge_layers(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    names: Sequence[str],
    scale: Callable[[str], float],
    *,
    keep_snapshot: bool,
) -> None:
    """Merges on every layer; if one fails, those done before are put back."""
    done: list[AdaptedLayer] = []
    parted = layers_to_part(model, layers, names)
    scales = [scale(name) for name in names]
    try:
        for path, layer in layers.items():
            done.append(layer)
            layer.merge(names, scales, keep_snapshot=keep_snapshot, apart=path in parted)
    except BaseException:
        if keep_snapshot:
            unmerge_layers(done)
        raise


def merge_besides(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    merged: Sequence[str],
    together: Sequence[str],
    scale: Callable[[str], float],
    *,
    safe: bool,
) -> None:
    """Merges adapters where some of them may be merged already; if that fails, those still are.

    Each delta is taken against the frozen weights, so those come back first.

    Args:
        model: the base model.
        layers: path -> adapted layer.
        merged: adapters that are merged now.
        together: adapters to be merged afterwards, those among them.
        scale: factor on an adapter's delta.
        safe: refuse weights that would not be finite.

    Raises:
        MergeError: they cannot be merged.
    """
    unmerge_layers(list(layers.values()))
    try:
        check_merge(layers, together, safe=safe)
        merge_layers(model, layers, together, scale, keep_snapshot=True)
    except BaseException:
        merge_layers(model, layers, merged, scale, keep_snapshot=True)
        raise


def check_together(
    copies: Mapping[str, CopiedModule], layers: Mapping[str, AdaptedLayer], names: Sequence[str]
) -> None:
    """Raises AdapterError if two of the adapters cannot act at once.

    Each trained a copy of one module, or one adapts a layer inside a module that another has a copy of.
    """
    for path, module in copies.items() if len(names) > 1 else ():
        having = [name for name in names if name in module.modules_to_save._modules]
        if len(having) > 1:
            raise AdapterError(
                f"adapters {' and '.join(map(repr, having))} each trained their own copy of {path}; "
                "only one of them can be active",
                path=path,
            )
        inside = (layer for place, layer in layers.items() if having and place.startswith(f"{path}."))
        other = next((name for layer in inside for name in names if name in layer.adapters._modules), None)
        if other is not None:
            raise AdapterError(
                f"adapter {having[0]!r} trained its own copy of {path}, inside of which {other!r} adapts layers; "
                "only one of them can be active",
                path=path,
            )


def unmerge_layers(layers: Sequence[AdaptedLayer]) -> None:
    """Puts the frozen weights back, bit for bit; the last first, since several may share one weight."""
    for layer in reversed(layers):
        layer.unmerge()


def lossy_note(layers: Mapping[str, AdaptedLayer]) -> None:
    """Warns once where merging has to quantize again."""
    kinds = sorted({layer.backend.name for layer in layers.values() if layer.backend.name != "dense"})
    if kinds:
        warnings.warn(
            f"merging into {', '.join(kinds)} weights rounds them again: outputs may differ from the unmerged model",
            stacklevel=4,
        )


def chosen_copy(module: CopiedModule, names: Sequence[str]) -> nn.Module:
    """The copy that stays when adapters are merged for good, or the original."""
    copies = module.modules_to_save._modules
    having = [name for name in names if name in copies]
    last = copies[having[-1]] if having else None
    return module.original_module if last is None else last
