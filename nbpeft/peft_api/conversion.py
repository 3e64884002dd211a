"""``peft.utils.transformers_weight_conversion``: how transformers loads an adapter's file into a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from nbpeft.engine.contract.registry import methods, prefixes
from nbpeft.engine.methods.lora.fused import FACTORS, joined


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Returns the conversions from an adapter's file to the names in a model, for transformers' ``load_adapter``.

    The base model's renamings apply to adapters too. Of its conversions that change tensors, only those that join
    experts do, and only for LoRA: they join the factors.

    Args:
        weight_conversions: the ``WeightRenaming`` and ``WeightConverter`` objects of the base model.
        adapter_name: name of the adapter in the model.
        peft_config: its config; None for the parameter names of all methods.

    Returns:
        ``WeightRenaming`` and ``WeightConverter`` objects, in the order in which they are applied.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not weight_conversions:
        return []
    of_type = getattr(peft_config, "peft_type", None)
    of_type = getattr(of_type, "value", of_type)
    starts = {method.prefix for method in methods()} if of_type is None else prefixes(of_type)
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(WeightRenaming(rf"({re.escape(start)}[^\.]*)", rf"\1.{adapter_name}") for start in sorted(starts)),
        *(conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)),
        *(
            converter
            for conversion in weight_conversions
            if isinstance(conversion, WeightConverter) and of_type in (None, "LORA")
            for converter in _of_experts(conversion, adapter_name)
        ),
    ]


def get_model_conversion_mapping(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls transformers' function of the same name, which PEFT's module re-exports."""
    from transformers.conversion_mapping import get_model_conversion_mapping as found

    return found(model, *args, **kwargs)  # type: ignore[arg-type]


def _of_experts(conversion: Any, adapter_name: str) -> Iterator[Any]:
    """Yields converters that join the factors of single experts, if a conversion joins their weights."""
    from transformers.core_model_loading import WeightConverter

    target, sources = conversion.target_patterns[0], conversion.source_patterns
    if not re.search(r"\.experts\.(gate_up_proj|down_proj)$", target) or not all(".*." in source for source in sources):
        return
    # PEFT wraps a module once for each adapted parameter; the first parameter has the innermost wrapper.
    module = target.replace(".gate_up_proj", ".base_layer").removesuffix(".down_proj")
    for factor in FACTORS:
        yield WeightConverter(
            [f"{source.removesuffix('.weight')}.{factor}.*" for source in sources],
            [f"{module}.{factor}.{adapter_name}.weight"],
            [_joining()(factor)],
        )


@functools.cache
def _joining() -> Any:
    """Returns the operation class, which needs transformers for its base class."""
    from transformers.core_model_loading import ConversionOps

    class JoinExperts(ConversionOps):
        """Joins one factor of all experts."""

        def __init__(self, factor: str) -> None:
            self.factor = factor

        def convert(
            self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **kwargs: Any
        ) -> dict[str, Any]:
            """See ``ConversionOps``."""
            return {kwargs["full_layer_name"]: joined(self.factor, [input_dict[source] for source in source_patterns])}

    return JoinExperts
