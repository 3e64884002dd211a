"""Fixed parts of the keys in PEFT's files; how a method's parameters are spelled there, its record says."""

PREFIX = "base_model.model."
"""Starts every key of a file."""

BASE_LAYER = "base_layer"
"""The frozen layer inside an adapted one."""

ORIGINAL_MODULE = "original_module"
"""The frozen module beside a copy that is trained as a whole."""

SHARED_PREFIX = "base_model."
"""Starts the key of a tensor that all layers of an adapter share."""
