"""PEFT: the adapter's folder as it is."""

from __future__ import annotations

from nbpeft.shipping.engines.rules import Engine, Form, Rule, base_word, dtype_note
from nbpeft.shipping.facts import AdapterFacts

OWN_METHOD = Rule(
    lambda facts: f"{facts.method}, a method of another package" if facts.own_method else "",
    "merge it into the base, and export that for transformers",
)


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    return (
        f"base = {facts.model_class}.from_pretrained({base_word(facts)!r})",
        f"model = PeftModel.from_pretrained(base, {folder!r})",
    )


ENGINE = Engine(
    name="peft",
    label="PEFT",
    checked="0.21.2",
    source="https://huggingface.co/docs/peft",
    adapter=Form("folder", rules=(OWN_METHOD,)),
    merged=None,
    start=_start,
    notes=(dtype_note,),
)
