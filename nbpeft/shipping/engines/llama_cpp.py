"""llama.cpp: GGUF files."""

from __future__ import annotations

from collections.abc import Callable

from nbpeft.shipping.engines.rules import (
    MERGE,
    PLAIN_LORA,
    RESIZED,
    TIED_ENDS,
    Engine,
    Form,
    Rule,
    completions_note,
    dtype_note,
    kinds_other_than,
    shell_word,
)
from nbpeft.shipping.facts import AdapterFacts
from nbpeft.shipping.gguf_model import LAYOUTS

TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "bf16", "f32")
"""Storage types of whole models."""
OTHER_TOOL = "merge it for transformers, and convert that with llama.cpp's convert_hf_to_gguf.py"


def _unknown(known: list[str]) -> Callable[[AdapterFacts], str]:
    """Returns a rule against model classes whose GGUF layout is not known here."""
    names = ", ".join(name.removesuffix("ForCausalLM") for name in known)
    return lambda facts: "" if facts.model_class in known else f"a {facts.model_class} (known: {names})"


ADAPTER_RULES = (
    Rule(_unknown(sorted(LAYOUTS)), OTHER_TOOL),
    *PLAIN_LORA,
    Rule(kinds_other_than(("linear", "embedding")), f"{MERGE}, or leave them out of target_modules"),
    TIED_ENDS,
    RESIZED,
)
MERGED_RULES = (
    Rule(_unknown(sorted(name for name, layout in LAYOUTS.items() if not layout.adapters_only)), OTHER_TOOL),
)


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    if merged:
        return (f"llama-server -m {shell_word(f'{folder}/model.gguf')}",)
    return (f"llama-server -m BASE_MODEL.gguf --lora {shell_word(f'{folder}/adapter.gguf')}",)


ENGINE = Engine(
    name="llama.cpp",
    label="llama.cpp",
    checked="as of llama-cpp-python 0.3.36",
    source="https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py",
    adapter=Form("gguf", rules=ADAPTER_RULES, types=("f32", "f16", "bf16", "q8_0")),
    merged=Form("gguf", merges=True, rules=MERGED_RULES, types=TYPES),
    start=_start,
    notes=(dtype_note, completions_note),
)
"""A file has one alpha, but each pair its own rank: ranks may differ; another scaling is multiplied into a factor."""
