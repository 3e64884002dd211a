"""The adapter engine: torch only, knows no files and no notebook."""

from nbpeft.engine import backends, hosts, methods

__all__ = ["backends", "hosts", "methods"]
