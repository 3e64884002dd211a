"""The adapter engine: torch only, knows no files and no notebook."""

from nbpeft.engine import backends, layer_kinds, methods

__all__ = ["backends", "layer_kinds", "methods"]
