"""What PEFT's package of ShadowPEFT has besides; transformers is imported with it."""

from __future__ import annotations

from nbpeft.engine.methods.shadow.cache import ShadowCache as ShadowCache
from nbpeft.engine.methods.shadow.detached import DetachedShadowModel as DetachedShadowModel
