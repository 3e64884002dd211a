"""nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_layer_kind

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


class Convolution:
    """A convolution over some number of dimensions; the weight is (out, in / groups, *kernel)."""

    dimensions: ClassVar[int]
    priority = 20
    is_linear = False
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dimensions - 1])

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_channels, module.out_channels  # type: ignore[return-value]

    def weight_shape(self, module: Any) -> tuple[int, ...]:
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def apply(self, module: Any, x: Tensor, weight: Tensor) -> Tensor:
        return self.convolve(module, x, weight, groups=module.groups)

    def convolve(self, module: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The layer's convolution, padding mode included, with another weight, other groups and no bias."""
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return _CONVOLVE[self.dimensions - 1](x, weight, None, module.stride, padding, module.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """A convolution with kernel 1, stride 1 and no bias; the weight is (out, in / groups, 1, …)."""
        return _CONVOLVE[self.dimensions - 1](x, weight, groups=groups)

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * self.dimensions)


@register_layer_kind
class Conv1d(Convolution):
    """A convolution over 1 dimension."""

    name = "convolution1d"
    peft_name = "Conv1d"
    dimensions = 1


@register_layer_kind
class Conv2d(Convolution):
    """A convolution over 2 dimensions."""

    name = "convolution2d"
    peft_name = "Conv2d"
    dimensions = 2


@register_layer_kind
class Conv3d(Convolution):
    """A convolution over 3 dimensions."""

    name = "convolution3d"
    peft_name = "Conv3d"
    dimensions = 3
