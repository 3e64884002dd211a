"""A model read from a GGUF file: plain weights under a flag that says otherwise."""

from __future__ import annotations

from torch import nn


def forget_gguf(model: nn.Module) -> bool:
    """Drops transformers' quantized flag from a model read from a GGUF file.

    transformers dequantizes such a file while reading, so the weights are ordinary floating
    tensors; yet the flag stays, and saving or training the model is refused because of it.

    Returns:
        Whether there was such a flag.
    """
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if method is None and isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if str(getattr(method, "value", method)).lower() != "gguf":
        return False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[union-attr]
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if name in model.__dict__:
            model.__dict__[name] = value
    return True
