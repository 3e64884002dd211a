"""``peft.utils.transformers_weight_conversion``: how transformers reads an adapter's file into an adapted model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nbpeft.engine.registry import methods, prefixes


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings from an adapter's file to the names in a model, which transformers' ``load_adapter`` asks for.

    Conversions of the base model that change tensors are left out: they are for its own weights.

    Args:
        weight_conversions: those of the base model, ``WeightRenaming`` and ``WeightConverter`` of transformers.
        adapter_name: the name that the adapter has in the model.
        peft_config: its config; any method's names are meant without one.

    Returns:
        ``WeightRenaming`` objects, in the order in which they are applied.
    """
    from transformers.core_model_loading import WeightRenaming

    if not weight_conversions:
        return []
    of_type = getattr(peft_config, "peft_type", None)
    starts = {method.prefix for method in methods()} if of_type is None else prefixes(str(of_type))
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(WeightRenaming(rf"({re.escape(start)}[^\.]*)", rf"\1.{adapter_name}") for start in sorted(starts)),
        *(conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)),
    ]
