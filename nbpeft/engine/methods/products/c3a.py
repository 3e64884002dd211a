"""C3A: block-circular convolution as the change of a weight (Chen et al. 2024, arXiv:2407.19342).

    Δ: (out, in) in blocks of (b, b), each circulant: its first row is trained, and divided by the number of inputs

A circulant product is a product of Fourier transforms, so Δ is never built: b numbers a block serve b² weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_count, check_divides, check_linear
from nbpeft.engine.config.layers_config import TrainsBiases
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.config.targets import usual_unfused_targets
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_, uniform_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta, keeping_inputs

KERNEL = "c3a_kernel"


@dataclass
class C3AConfig(TrainsBiases):
    """Config of C3A. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        block_size: size of a block, which divides the inputs and the outputs of each layer: larger ones cost less.
        block_size_pattern: layer name or pattern -> another block_size.
        init_weights: True starts at the base model; False is 'xavier_uniform'.
    """

    block_size: int = field(default=256)
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = field(default="xavier_uniform")

    method_type: ClassVar[str] = "C3A"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("block_size",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {"block_size_pattern": check_count}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "init_weights": (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"),
    }

    def block_size_at(self, path: str) -> int:
        """The size of a block at a module path."""
        return int(pattern_table(self, "block_size_pattern").get(path, self.block_size))


@register(
    C3AConfig,
    label="C3A",
    listing=Listing(
        when="high rank from few parameters; the block size must divide the layer's sizes",
        paper="arXiv:2407.19342",
        summary=lambda config: {"block": str(config.block_size)},
    ),
    default_targets=usual_unfused_targets,
    sample_configs={"b8": {"block_size": 8, "init_weights": True}, "b2": {"block_size": 2, "init_weights": True}},
)
class C3A(WeightDelta):
    """The first rows of the blocks of one layer, (out / b, in / b, b), in float32."""

    peft: ClassVar[PeftNames] = PeftNames(
        "c3a_kernel", "block_size", layer_prefix="C3A", attributes={"block_size": "size"}
    )

    @classmethod
    def parameter_shapes(cls, config: C3AConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The first rows."""
        check_linear("C3A", path, kind)
        size, (in_features, out_features) = config.block_size_at(path), kind.features(module)
        check_divides("block_size", size, path, (in_features, out_features))
        return {KERNEL: (out_features // size, in_features // size, size)}

    @classmethod
    def initial_tensors(cls, config: C3AConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        inputs, outputs, init = site.base.in_features, site.base.out_features, config.init_weights
        bound = math.sqrt(1 / inputs if init == "kaiming_uniform" else 6 / (inputs + outputs))
        fill = normal_ if init == "gaussian" else partial(uniform_, bound=bound)
        return {KERNEL: site.new(site.shapes[KERNEL], None if init is True else fill)}

    @property
    def size(self) -> int:
        """Size of a block."""
        return int(self.tensors[0].shape[2])

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        return keeping_inputs(_convolved, x, self.tensors[0])

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        kernel = parameters[0]
        rows, columns, size = kernel.shape
        step = torch.arange(size, device=kernel.device)
        blocks = kernel[:, :, (step - step[:, None]) % size]  # (rows, columns, b, b)
        return blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size) / (columns * size)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """The product of an input (…, in) with the circulant blocks, (…, out), in float32."""
    size = kernel.shape[2]
    parts = torch.fft.rfft(x.float().reshape(*x.shape[:-1], -1, size))
    product = torch.einsum("...nb,mnb->...mb", parts, torch.fft.rfft(kernel.float()).conj())
    return torch.fft.irfft(product, n=size).flatten(-2) / x.shape[-1]
