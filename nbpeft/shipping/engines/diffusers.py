"""diffusers: one LoRA file for ``load_lora_weights`` of its pipelines."""

from __future__ import annotations

from nbpeft.shipping.engines.rules import PLAIN_LORA, Engine, Form, Rule, kinds_other_than
from nbpeft.shipping.facts import AdapterFacts

COMPONENTS = {"UNet": "unet", "Transformer": "transformer", "CLIPText": "text_encoder"}
"""Part of a model's class name -> name of the pipeline component."""


def component_of(model_class: str) -> str:
    """Returns the pipeline component of a model class; empty if it is not a component."""
    return next((component for part, component in COMPONENTS.items() if part in model_class), "")


def _no_component(facts: AdapterFacts) -> str:
    return "" if component_of(facts.model_class) else f"a {facts.model_class}, which is not a component of a pipeline"


COMPONENT_RULE = Rule(_no_component, "choose an engine for language models, such as vllm")


def _start(facts: AdapterFacts, merged: bool, folder: str) -> tuple[str, ...]:
    return (f"pipeline.load_lora_weights({folder!r}, adapter_name={facts.name!r})",)


ENGINE = Engine(
    name="diffusers",
    label="diffusers",
    checked="0.42",
    source="https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference",
    adapter=Form(
        "diffusers",
        rules=(
            COMPONENT_RULE,
            *PLAIN_LORA,
            Rule(kinds_other_than(("linear", "convolution2d")), "leave them out of target_modules"),
        ),
    ),
    merged=None,
    start=_start,
)
"""A file has the factors of each layer with the scaling multiplied in, so ranks and scalings may differ."""
