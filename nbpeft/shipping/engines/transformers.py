"""transformers: the adapter's folder in PEFT's format, or a merged model."""

from __future__ import annotations

from nbpeft.shipping.engines.peft import OWN_METHOD
from nbpeft.shipping.engines.rules import PROMPT, Engine, Form, base_word, dtype_note
from nbpeft.shipping.facts import AdapterFacts


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    place = folder if merged else base_word(facts)
    load = f"model = {facts.model_class}.from_pretrained({place!r})"
    return (load,) if merged else (load, f"model.load_adapter({folder!r})  # needs peft")


ENGINE = Engine(
    name="transformers",
    label="transformers",
    checked="5.24",
    source="https://huggingface.co/docs/transformers/peft",
    adapter=Form("folder", rules=(OWN_METHOD, PROMPT)),
    merged=Form("model", merges=True, types=("bf16", "f16", "f32")),
    start=_start,
    notes=(dtype_note,),
)
