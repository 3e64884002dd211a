"""vLLM: adapters in PEFT's format, served together with the base model."""

from __future__ import annotations

from shlex import quote

from nbpeft.shipping.engines.rules import (
    MERGE,
    PLAIN_LORA,
    RESIZED,
    TIED_ENDS,
    Engine,
    Form,
    Rule,
    base_word,
    completions_note,
    dtype_note,
    kinds_other_than,
    shell_word,
)
from nbpeft.shipping.facts import AdapterFacts

RANK_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's max_lora_rank; an adapter may have any rank up to it."""


def _rank(facts: AdapterFacts) -> str:
    rank = max(facts.ranks, default=0)
    return f"rank {rank} (at most {RANK_LIMITS[-1]})" if rank > RANK_LIMITS[-1] else ""


def rank_limit(facts: AdapterFacts) -> int:
    """Returns the smallest max_lora_rank that is sufficient for an adapter."""
    rank = max(facts.ranks, default=1)
    return next((limit for limit in RANK_LIMITS if limit >= rank), RANK_LIMITS[-1])


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    if merged:
        return (f"vllm serve {shell_word(folder)}",)
    modules = f"--lora-modules {quote(f'{facts.name}={folder}')}"
    base = shell_word(base_word(facts))
    return (f"vllm serve {base} --enable-lora --max-lora-rank {rank_limit(facts)} {modules}",)


def _embeddings(facts: AdapterFacts) -> str:
    ends = facts.paths_of("embedding")
    return f"vLLM adapts {ends[0]} only in models whose class lists it among its embedding modules" if ends else ""


ENGINE = Engine(
    name="vllm",
    label="vLLM",
    checked="0.26",
    source="https://docs.vllm.ai/en/v0.26.0/api/vllm/config/lora/",
    adapter=Form(
        "folder",
        rules=(
            *PLAIN_LORA,
            Rule(_rank, f"{MERGE}, or train with a smaller r"),
            Rule(kinds_other_than(("linear", "conv1d", "embedding")), f"{MERGE}, or leave them out of target_modules"),
            TIED_ENDS,
            RESIZED,
        ),
        one_rank=True,
    ),
    merged=Form("model", merges=True, types=("bf16", "f16", "f32")),
    start=_start,
    notes=(_embeddings, dtype_note, completions_note),
)
"""vLLM reads one r and one lora_alpha for all layers, ignores patterns, and refuses keys that are not factors."""
