"""Every method beside LoRA: bytes kept for the backward, a training step, and putting it into many layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tests.benchmarks.harness import Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain, layers, smollm2_layers
from tests.benchmarks.rows_saved_bytes import TARGETS, saved_bytes
from tests.benchmarks.rows_step import step

NORMS = ["input_layernorm", "post_attention_layernorm"]
STEP_TARGET, INJECT_TARGET = 1.05, 0.2


@dataclass(frozen=True)
class Method:
    """How a method is measured.

    Attributes:
        label: what it is called.
        config: its config class.
        fields: of the config.
        saved: the most of the rival's bytes that ours may keep for the backward.
        step: the most of the rival's time that a step may take.
        norms: whether it adapts norms, which only a language model has, and not linear layers.
    """

    label: str
    config: str
    fields: dict[str, Any]
    saved: float = 1.02
    step: float = STEP_TARGET
    norms: bool = False

    @property
    def row(self) -> str:
        """Its part of the rows' names."""
        return self.label.strip("()³").replace(")", "").replace(" ", "-").lower()


METHODS = [
    Method("AdaLoRA", "AdaLoraConfig", {"total_step": 100}),
    Method("AdaMSS", "AdamssConfig", {"r": 16}),
    Method("BEFT", "BeftConfig", {}),
    Method("BOFT", "BOFTConfig", {"boft_block_size": 4}, saved=0.2, step=0.3),
    Method("C3A", "C3AConfig", {"block_size": 4}),
    Method("DEFT", "DeftConfig", {"r": 8}),
    Method("DeLoRA", "DeloraConfig", {"r": 8}, saved=0.86),
    Method("FourierFT", "FourierFTConfig", {"n_frequency": 200}, saved=0.3),
    Method("FRoD", "FrodConfig", {}),
    Method("GLoRA", "GloraConfig", {"r": 4}, saved=0.3),
    Method("GraLoRA", "GraloraConfig", {"r": 8, "gralora_k": 2}),
    Method("HiRA", "HiraConfig", {"r": 8}, saved=0.3),
    Method("HRA", "HRAConfig", {"r": 8}, saved=0.05),
    Method("(IA)³", "IA3Config", {"feedforward_modules": []}),
    Method("Lily", "LilyConfig", {"r": 8, "stride_A": 2, "num_B": 2}),
    Method("LN tuning", "LNTuningConfig", {}, norms=True),
    Method("LoHa", "LoHaConfig", {"r": 8, "alpha": 16}, saved=0.3),
    Method("LoKr", "LoKrConfig", {"r": 2}, saved=0.3),
    Method("MiSS", "MissConfig", {"r": 16}),
    Method("OFT", "OFTConfig", {"oft_block_size": 4}, saved=0.96),
    Method("OSF", "OSFConfig", {}),
    Method("PEANuT", "PeanutConfig", {"r": 8}, saved=0.3),
    Method("PSOFT", "PsoftConfig", {"r": 8}),
    Method("PVeRA", "PveraConfig", {"r": 64}),
    Method("RandLoRA", "RandLoraConfig", {"r": 32}),
    Method("RoAd", "RoadConfig", {"group_size": 4}),
    Method("SHiRA", "ShiraConfig", {"r": 8}, saved=0.3),
    Method("Super-Tuning", "SupertuningConfig", {}, saved=0.3),
    Method("TinyLoRA", "TinyLoraConfig", {}),
    Method("Uni-LoRA", "UniLoraConfig", {}),
    Method("VB-LoRA", "VBLoRAConfig", {"num_vectors": 64, "vector_length": 4}, saved=0.92),
    Method("VeRA", "VeraConfig", {"r": 64}),
    Method("WaveFT", "WaveFTConfig", {"n_frequency": 200}, saved=0.2),
]


def library_for(method: Method, name: str) -> Any:
    """The library, in which AdaMSS works without scikit-learn, too."""
    if method.label == "AdaMSS" and name == "peft" and find_spec("sklearn") is None:
        import_module("tests.kmeans_for_peft").install()
    return library(name)


def with_method(name: str, method: Method, model: nn.Module, targets: list[str]) -> Any:
    """The model with an adapter of a method, in the midst of a training."""
    source = library_for(method, name)
    config = getattr(source, method.config)(target_modules=targets, **method.fields)
    wrapped = source.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return wrapped.train()


def saved(method: Method) -> Callable[[str, Size], Measure]:
    """Four layers of SmolLM2 with the method on all their linear layers, or on their norms."""

    def prepare(name: str, size: Size) -> Measure:
        targets = NORMS if method.norms else TARGETS
        model = with_method(name, method, smollm2_layers(size.hidden, torch.float32), targets)
        inputs = torch.randn(1, size.sequence, size.hidden).requires_grad_()
        return lambda: saved_bytes(lambda: model(inputs_embeds=inputs).last_hidden_state)

    return prepare


def one_step(method: Method) -> Callable[[str, Size], Measure]:
    """Forward and backward in float32 of one wide layer, or of four layers of SmolLM2 for one on norms."""

    def prepare(name: str, size: Size) -> Measure:
        if method.norms:
            model = with_method(name, method, smollm2_layers(size.hidden, torch.float32), NORMS)
            inputs = torch.randn(1, size.sequence, size.hidden).requires_grad_()
            return lambda: timed(lambda: model(inputs_embeds=inputs).last_hidden_state.sum().backward(), times=3)
        width = size.wide // 2
        return step(with_method(name, method, layers(width), ["proj"]), size.tokens, width, torch.float32)

    return prepare


def inject(method: Method) -> Callable[[str, Size], Measure]:
    """``get_peft_model`` on a fresh model of many layers."""

    def prepare(name: str, size: Size) -> Measure:
        source = library_for(method, name)

        def measure() -> float:
            model = Chain(size.modules, 2 * size.small)
            settings = getattr(source, method.config)(target_modules=["proj"], **method.fields)
            return timed(lambda: source.get_peft_model(model, settings))

        return measure

    return prepare


ROWS = [
    *(
        Row(
            f"method-saved-{method.row}",
            f"saved for backward, fp32, {method.label}",
            "bytes",
            method.saved,
            saved(method),
            repeats=1,
        )
        for method in METHODS
    ),
    *(
        Row(
            f"method-step-{method.row}",
            f"{method.label} step, fp32, "
            + ("4 layers, d = 576, 128 tokens" if method.norms else "d = 1,024, 256 tokens"),
            "seconds",
            method.step,
            one_step(method),
        )
        for method in METHODS
    ),
    *(
        Row(
            f"method-inject-{method.row}",
            f"inject {method.label}, 1,001 Linear",
            "seconds",
            INJECT_TARGET,
            inject(method),
            repeats=3,
        )
        for method in METHODS
        if not method.norms
    ),
]
