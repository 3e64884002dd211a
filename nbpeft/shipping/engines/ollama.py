"""Ollama: a Modelfile over a GGUF file."""

from __future__ import annotations

import re

from nbpeft.shipping.engines.llama_cpp import ADAPTER_RULES, MERGED_RULES, TYPES
from nbpeft.shipping.engines.rules import Engine, Form, dtype_note, shell_word
from nbpeft.shipping.facts import AdapterFacts


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    name = re.sub(r"[^\w-]+", "-", facts.name, flags=re.ASCII).strip("-") or "adapter"
    return (f"ollama create {name} -f {shell_word(f'{folder}/Modelfile')}", f"ollama run {name}")


ENGINE = Engine(
    name="ollama",
    label="Ollama",
    checked="(import guide and convert.go at 01cf744)",
    source="https://docs.ollama.com/import",
    adapter=Form("gguf", rules=ADAPTER_RULES, types=("f16", "f32", "bf16", "q8_0")),
    merged=Form("gguf", merges=True, rules=MERGED_RULES, types=TYPES),
    start=_start,
    notes=(dtype_note,),
)
"""GGUF, because Ollama's reader of PEFT folders supports only Llama and Gemma 2 and ignores rsLoRA and patterns."""
