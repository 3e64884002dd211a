"""PEFT's other names for ShadowPEFT, whose import needs transformers."""

from __future__ import annotations

from torch import nn

from nbpeft.engine.calls.side_network import has_side_network
from nbpeft.engine.methods.shadow.cache import ShadowCache as ShadowCache
from nbpeft.engine.methods.shadow.detached import DetachedShadowModel as DetachedShadowModel
from nbpeft.engine.methods.shadow.shadow import ShadowNetwork


class _OfBlocks(type):
    """A metaclass: ``isinstance`` is true for blocks whose input a side network changes."""

    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, nn.Module) and has_side_network(module)


class ShadowLayer(metaclass=_OfBlocks):
    """The blocks that ShadowPEFT adapts, for ``isinstance``; they have hooks and are not wrapped."""

    adapter_layer_names = tuple(ShadowNetwork.peft.parameters.split())
    other_param_names = tuple(ShadowNetwork.peft.others.split())
