"""The adapter engine: torch only; it knows neither PEFT's files nor a notebook."""

from nbpeft._util import hooks
from nbpeft.engine import backends, layer_kinds, methods

__all__ = ["backends", "layer_kinds", "methods"]

hooks.engine_imported()
