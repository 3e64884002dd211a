"""Models read from GGUF files: plain weights under a flag that says otherwise, and a bar that heeds nobody."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nbpeft.engine.transaction import Transaction


@contextmanager
def obedient_progress() -> Iterator[None]:
    """Inside it, transformers' progress bar for GGUF files obeys ``disable_progress_bar`` as its others do.

    It is made by tqdm directly, and in a notebook it is a widget, which a saved notebook cannot show.
    """
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    plain = getattr(reader, "tqdm", None)
    if plain is None:
        yield
        return
    reader.tqdm = importlib.import_module("transformers.utils.logging").tqdm
    try:
        yield
    finally:
        reader.tqdm = plain


def forget_gguf(model: nn.Module, change: Transaction | None = None) -> bool:
    """Drops transformers' quantized flag from a model read from a GGUF file.

    transformers dequantizes such a file while reading, so the weights are ordinary floating
    tensors; yet the flag stays, and saving or training the model is refused because of it.

    Args:
        model: the base model.
        change: records what is dropped, where that may have to be undone.

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
    if change is not None:
        change.keep_attributes(config, "quantization_config")
        change.keep_attributes(model, "hf_quantizer", "is_quantized", "quantization_method")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[union-attr]
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if name in model.__dict__:
            model.__dict__[name] = value
    return True
