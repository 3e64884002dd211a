"""Names that modules had in earlier versions of transformers, and experts that were layers.

A model class that was rebuilt says how the keys of old checkpoints read today; the same holds
for the keys of adapters trained then. Where the weights of all experts became one parameter, the
factors of each expert become those of the parameter.
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
    """How a file of an adapter is read that was trained on an earlier version of the model's class.

    Attributes:
        rename: what a key without prefix is called today; None if nothing was renamed.
        fused: parameter of experts -> the layers of each expert that it was, in its order.
    """

    rename: Rename | None
    fused: Mapping[str, tuple[str, ...]]

    def joined(self, tensors: Mapping[str, Tensor], peft_type: str) -> Mapping[str, Tensor]:
        """See ``Conversion``."""
        join = next((method.files.fuse for method in methods_of_type(peft_type) if method.files.fuse is not None), None)
        return join(tensors, self.fused) if join is not None and self.fused else tensors


def key_conversion_of(model: nn.Module) -> KeyConversion | None:
    """How older files are read for a model, or None if nothing was renamed or joined.

    Args:
        model: a base model; transformers is used only if the model comes from it.
    """
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    rename = by_patterns(own) if isinstance(own, Mapping) and own else renaming(model)
    fused = {one.name: one.layers for one in fused_layers(model) if one.per_expert}
    return KeyConversion(rename, fused) if rename is not None or fused else None
