"""PEFT's attributes and methods of blocks whose input a side network changes, and names of its private classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.methods.shadow.token_network import TokenNetwork
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.extension import add_attributes
from nbpeft.peft_layers.classes import refuse_pickle_of_peft


class PeftBlock(AdaptedBlock):
    """PEFT's attributes of the wrapper of a block."""

    merged_adapters = ()
    merged = False
    quantization_backend = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "layer" not in state:
            refuse_pickle_of_peft(self, state)
        nn.Module.__setstate__(self, state)

    def get_base_layer(self) -> nn.Module:
        """Returns the frozen block."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters."""
        return self.chosen_names()

    @property
    def active_adapter(self) -> list[str]:
        """Names of the model's active adapters."""
        return self.chosen_names()

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are disabled."""
        return not self.active_state.current().names

    def _get_available_adapters(self) -> set[str]:
        """Returns the names of the adapters that change the block."""
        return set(self._named())

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes with modules of adapters."""
        return tuple(name for name in self._modules if name != "base_layer")

    @property
    def adapted_as(self) -> str:
        """PEFT's class name for the wrapper: ``shadow.ShadowLayer``."""
        return next((method.peft.layer for method in self._methods()), AdaptedBlock.__name__)

    def _get_name(self) -> str:
        return self.adapted_as


add_attributes(AdaptedBlock, PeftBlock)
TokenNetwork.__name__ = "_TokenShadowBackbone"  # scripts read it; pickles contain the qualified name
