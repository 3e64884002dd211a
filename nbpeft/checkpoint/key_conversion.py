"""Names that modules had in earlier versions of transformers, and experts that were layers.

A model class that was rebuilt says how the keys of old checkpoints read today; the same holds
for the keys of adapters trained then. Where the weights of all experts became one parameter, the
factors of each expert become those of the parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nbpeft.checkpoint.weights_format import Rename, by_patterns
from nbpeft.engine.fused_layers import fused_layers, fused_parameters
from nbpeft.engine.model_tree import walk
from nbpeft.engine.registry import methods_of_type


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
        join = next((method.fuse for method in methods_of_type(peft_type) if method.fuse is not None), None)
        return join(tensors, self.fused) if join is not None and self.fused else tensors


def key_conversion_of(model: nn.Module) -> KeyConversion | None:
    """How older files are read for a model, or None if nothing was renamed or joined.

    Args:
        model: a base model; transformers is used only if the model comes from it.
    """
    rename, fused = _rename_of(model), fused_parameters(model)
    if fused:  # a model may have the layers still
        present = {one.name for one in fused_layers(model, list(walk(model)))}
        fused = {name: layers for name, layers in fused.items() if name in present}
    return KeyConversion(rename, fused) if rename is not None or fused else None


def _rename_of(model: nn.Module) -> Rename | None:
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(own, Mapping) and own:
        return by_patterns(own)
    if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
        return None
    # Any model with such a config will do, as it does for transformers' own loading.
    loose: Any = model
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers before 5 keeps the patterns on the model
        return None
    steps = [step for step in get_model_conversion_mapping(loose) if isinstance(step, WeightRenaming)]
    if not steps:
        return None

    def rename(key: str) -> str:
        for step in steps:
            key, _ = step.rename_source_key(key)
        return key

    return rename
