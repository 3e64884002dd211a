"""How a config says that the weights of a model are stored."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BitsAndBytesConfig, LlamaConfig

from nbpeft.memory.forecast import Stored, stored_as


@pytest.mark.parametrize(
    ("told", "stored"),
    [
        (None, Stored()),
        (BitsAndBytesConfig(load_in_8bit=True), Stored("int8")),
        (BitsAndBytesConfig(load_in_4bit=True), Stored("fp4", False)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, Stored("nf4")),
        ({"quant_method": "gptq", "bits": 4}, Stored("nf4", True, "weights stored by gptq are counted as nf4")),
        ({"quant_method": "gguf"}, Stored()),
    ],
)
def test_a_config_tells(told: Any, stored: Stored) -> None:
    config = LlamaConfig() if told is None else LlamaConfig(quantization_config=told)
    assert stored_as(config, config) == stored


def test_a_file_of_the_gguf_format_is_ordinary_weights_once_loaded() -> None:
    quantizers = pytest.importorskip("transformers.quantizers.auto")
    gguf = quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING.get("gguf")
    if gguf is None:
        pytest.skip("this version of transformers has no config of the GGUF format")
    config = LlamaConfig(quantization_config=gguf())
    assert stored_as(config, config) == Stored()
