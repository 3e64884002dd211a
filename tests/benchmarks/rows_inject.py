"""Putting adapters into a model of many layers."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.harness import Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain, layers, with_adapters

EARLIER = 4


def config(name: str, **fields: Any) -> Any:
    """LoRA of rank 8 on every block."""
    return library(name).LoraConfig(**{"r": 8, "target_modules": ["proj"], **fields})


def first(name: str, size: Size) -> Measure:
    """``get_peft_model`` on a fresh model."""

    def measure() -> float:
        model, settings = Chain(size.modules, 2 * size.small), config(name)
        return timed(lambda: library(name).get_peft_model(model, settings))

    return measure


def another(name: str, size: Size) -> Measure:
    """``add_adapter`` on a model that has some."""

    def measure() -> float:
        model = library(name).get_peft_model(Chain(size.modules, 2 * size.small), config(name))
        for number in range(1, EARLIER):
            model.add_adapter(f"adapter{number}", config(name))
        settings = config(name)
        return timed(lambda: model.add_adapter("last", settings))

    return measure


def one_more(name: str, size: Size) -> Measure:
    """``add_adapter`` beside ``adapters`` that are there."""
    model = with_adapters(name, Chain(size.modules, 2 * size.small), size.adapters, r=8)
    settings = config(name)

    def measure() -> float:
        seconds = timed(lambda: model.add_adapter("last", settings))
        model.delete_adapter("last")
        return seconds

    return measure


def patterns(name: str, size: Size) -> Measure:
    """``get_peft_model`` with a rank of its own for every module."""

    def measure() -> float:
        model = Chain(size.modules, 2 * size.small)
        ranks = {f"blocks.{number}.proj": 4 + number % 5 for number in range(size.modules)}
        settings = config(name, rank_pattern=ranks)
        return timed(lambda: library(name).get_peft_model(model, settings))

    return measure


def olora(name: str, size: Size) -> Measure:
    """``get_peft_model`` with the QR decomposition of one wide weight."""

    def measure() -> float:
        model, settings = layers(size.wide), config(name, r=16, init_lora_weights="olora")
        return timed(lambda: library(name).get_peft_model(model, settings))

    return measure


ROWS = [
    Row("inject", "inject LoRA, 1,001 Linear", "seconds", 0.15, first),
    Row("inject-nth", "inject a 5th adapter, 1,001 Linear", "seconds", 0.15, another, repeats=3),
    Row("inject-patterns", "inject with 1,001 rank patterns", "seconds", 0.02, patterns, repeats=1),
    Row("inject-olora", "OLoRA init of one layer, d = 2,048, r = 16", "seconds", 0.02, olora, repeats=3),
]
