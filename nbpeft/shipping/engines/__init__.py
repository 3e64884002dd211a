"""The supported serving engines, one file each: their rules are data, with the version they were taken from."""

from __future__ import annotations

from nbpeft.shipping.engines import diffusers, kohya, llama_cpp, ollama, peft, transformers, vllm
from nbpeft.shipping.engines.rules import Engine as Engine
from nbpeft.shipping.engines.rules import Form as Form
from nbpeft.shipping.engines.rules import Rule as Rule

ENGINES: dict[str, Engine] = {
    module.ENGINE.name: module.ENGINE for module in (vllm, llama_cpp, ollama, transformers, peft, diffusers, kohya)
}
"""Name of an engine -> the engine."""
