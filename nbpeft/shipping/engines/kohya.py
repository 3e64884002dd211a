"""kohya: one file of the Stable Diffusion front ends (sd-scripts, Automatic1111, ComfyUI)."""

from __future__ import annotations

from nbpeft.shipping.engines.diffusers import COMPONENT_RULE
from nbpeft.shipping.engines.rules import PLAIN_LORA, Engine, Form, Rule, kinds_other_than, shell_word
from nbpeft.shipping.facts import AdapterFacts


def _flow_transformer(facts: AdapterFacts) -> str:
    return (
        f"a {facts.model_class}, whose layers have other names in these programs"
        if "Transformer" in facts.model_class
        else ""
    )


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    return (f"cp {shell_word(f'{folder}/{facts.name}.safetensors')} MODELS_FOLDER/Lora",)


ENGINE = Engine(
    name="kohya",
    label="kohya's sd-scripts",
    checked="format as read by diffusers 0.42 and ComfyUI",
    source="https://github.com/kohya-ss/sd-scripts",
    adapter=Form(
        "kohya",
        rules=(
            COMPONENT_RULE,
            Rule(_flow_transformer, "export it for diffusers"),
            *PLAIN_LORA,
            Rule(kinds_other_than(("linear", "convolution2d")), "leave them out of target_modules"),
        ),
    ),
    merged=None,
    start=_start,
)
