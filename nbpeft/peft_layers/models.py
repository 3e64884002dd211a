"""PEFT's attributes of adapted base models, which transformers and diffusers look for, and of what models have."""

from __future__ import annotations

from typing import Any

from nbpeft.engine.methods.lora.variants.allocator_by_names import RankAllocator
from nbpeft.engine.wrappers.extension import add_attributes, on_models

on_models["peft_config"] = "configs"


class PeftRankAllocator(RankAllocator):
    """PEFT's attribute of the allocator of an AdaLoRA."""

    @property
    def peft_config(self) -> Any:
        """The config of the adapter."""
        return self.config


add_attributes(RankAllocator, PeftRankAllocator)
