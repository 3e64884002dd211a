"""Arithmetic: dtypes to compute in, products of quantized matrices, activations that are computed again.

Nothing here knows of adapters.
"""
