"""Training of adapters: Trainer integration, tracking of people's own loops, data, optimizers.

Knows no notebook. The names in ``__init__.pyi`` are resolved when they are first used, so that
tracking a loop does not import transformers' Trainer.
"""

from __future__ import annotations

import importlib
from typing import Any

from nbpeft._util.lazy import lazy_names
from nbpeft._util.logs import collapsed

_NAMES = lazy_names(__name__, __file__)
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        # transformers' Trainer imports bitsandbytes, which says on import what it does without.
        with collapsed():
            return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
