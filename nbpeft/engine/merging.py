"""Merging adapters into the base weights and taking them out again, over a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from nbpeft.engine.copies import CopiedModule
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.errors import MergeError


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
    layers: Mapping[str, AdaptedLayer], names: Sequence[str], scales: Sequence[float], *, keep_snapshot: bool
) -> None:
    """Merges on every layer; if one fails, those done before are put back."""
    done: list[AdaptedLayer] = []
    try:
        for layer in layers.values():
            done.append(layer)
            layer.merge(names, scales, keep_snapshot=keep_snapshot)
    except BaseException:
        if keep_snapshot:
            unmerge_layers(done)
        raise


def unmerge_layers(layers: Sequence[AdaptedLayer]) -> None:
    """Puts the frozen weights back, bit for bit."""
    for layer in layers:
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
