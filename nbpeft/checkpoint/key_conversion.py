"""Loads adapters that were trained on an earlier version of a model's class in transformers.

When transformers renames the modules of a class, it declares how keys of old checkpoints are renamed; the same
renaming applies to the keys of adapters. When it fuses the layers of all experts into one parameter, the factors of
the experts are joined into those of the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nbpeft.checkpoint.weights_format import Rename, by_patterns
from nbpeft.engine.contract.registry import methods_of_type
from nbpeft.engine.tree.fused_layers import fused_layers, renaming


@dataclass(frozen=True)
class KeyConversion:
    """How to read an adapter that was trained on an earlier version of the model's class.

    Attributes:
        rename: old key -> current key, both without prefix; None if nothing was renamed.
        fused: name of a fused expert parameter -> names of the former layers of each expert, in the parameter's order.
    """

    rename: Rename | None
    fused: Mapping[str, tuple[str, ...]]

    def joined(self, tensors: Mapping[str, Tensor], peft_type: str) -> Mapping[str, Tensor]:
        """See ``Conversion``."""
        join = next((method.files.fuse for method in methods_of_type(peft_type) if method.files.fuse is not None), None)
        return join(tensors, self.fused) if join is not None and self.fused else tensors


def key_conversion_of(model: nn.Module) -> KeyConversion | None:
    """Returns the conversion of older adapters for a model, or None if nothing was renamed or fused.

    Args:
        model: a base model; transformers is imported only if the model comes from it.
    """
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    rename = by_patterns(mapping) if isinstance(mapping, Mapping) and mapping else renaming(model)
    fused = {layer.name: layer.layers for layer in fused_layers(model) if layer.per_expert}
    return KeyConversion(rename, fused) if rename is not None or fused else None
