"""Names that modules had in earlier versions of transformers.

A model class that was rebuilt says how the keys of old checkpoints read today; the same holds
for the keys of adapters trained then.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from nbpeft.checkpoint.weights_format import Rename, by_patterns


def key_conversion_of(model: nn.Module) -> Rename | None:
    """What an old name in a model's checkpoints is called now, or None if nothing was renamed.

    Args:
        model: a base model; transformers is used only if the model comes from it.

    Returns:
        A function from a key without prefix to the key of today, for ``from_file``.
    """
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
