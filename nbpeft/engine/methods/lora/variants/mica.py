"""MiCA: minor component adaptation (arXiv:2604.01694).

    y = W x + b + s * B A dropout(x)          A: (r, in), B: (out, r)

The columns of B are the left singular vectors of the r smallest singular values of W: the output directions to which
the layer contributes least. They are frozen; only A is trained, and starts at zero. A file contains both.
"""

from __future__ import annotations

from typing import ClassVar

from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.lora import LoRA


@register(
    LoraConfig,
    label="MiCA",
    listing=listing(
        when="half of LoRA's parameters, in directions that the base model uses least",
        paper="arXiv:2604.01694",
        variant=lambda config: "rsMiCA" if config.use_rslora else "",
        listed_with={"init_lora_weights": "mica"},
    ),
    applies=lambda config: config.variant == "mica",
    sample_configs={"mica": {"r": 4, "lora_alpha": 8, "init_lora_weights": "mica"}},
    **FAMILY,
)
class MiCA(LoRA):
    """A MiCA adapter on one linear layer or embedding: a LoRA whose B is not trained."""

    frozen_parameters: ClassVar[tuple[str, ...]] = ("lora_B", "lora_embedding_B")
