"""PEFT's other names for ShadowPEFT, whose import needs transformers."""

from __future__ import annotations

from nbpeft.engine.methods.shadow.cache import ShadowCache as ShadowCache
from nbpeft.engine.methods.shadow.detached import DetachedShadowModel as DetachedShadowModel
