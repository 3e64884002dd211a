"""PEFT's other names for ShadowPEFT, whose import needs transformers."""

from __future__ import annotations

from nbpeft.engine.methods.shadow.cache import ShadowCache as ShadowCache
from nbpeft.engine.methods.shadow.detached import DetachedShadowModel as DetachedShadowModel
from nbpeft.engine.methods.shadow.flux_network import DetachedFluxShadowModel as DetachedFluxShadowModel
from nbpeft.peft_api.layers import layer_class

ShadowLayer = layer_class("shadow.ShadowLayer")
