"""The modules that users of PEFT find in a LoRA layer: ``lora_A["default"](x)``, ``lora_dropout["default"].p``.

They compute with the adapter's parameters when other code calls them; the layer itself does not call them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.bindable import set_plain
from nbpeft.engine.views.part_modules import Observed, ParameterModule


class LinearFactor(ParameterModule, nn.Linear):
    """A factor of a product on a linear layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the factor."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the factor."""
        return int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """The product with the factor, in its dtype or autocast's; hooks may change the dtype during a call."""
        return nn.Linear.forward(self, x.to(self.weight.dtype))

    def extra_repr(self) -> str:
        """As of ``nn.Linear``."""
        return nn.Linear.extra_repr(self)

    def _get_name(self) -> str:
        return "Linear"


class TiedFactor(LinearFactor):
    """A factor that is a view of another layer's, without a parameter of its own.

    Args:
        adapter: the adapter with the view.
        name: name of the factor in the adapter.
    """

    _adapter: Any
    _name: str

    def __init__(self, adapter: Any, name: str) -> None:
        super().__init__()
        set_plain(self, _adapter=adapter, _name=name, bias=None)

    def _showing(self) -> tuple[nn.Module]:
        return (self.adapter,)

    @property
    def adapter(self) -> Any:
        return self._adapter

    @property
    def shown_parameter(self) -> str:
        return self._name

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The factor."""
        return self.adapter.tensor(self.shown_parameter)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self.weight.copy_(state_dict[f"{prefix}weight"])


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """A block-diagonal matrix.

    Args:
        blocks: its blocks, stacked along the rows: (rows, columns / count).
        count: number of blocks.

    Returns:
        (rows, columns).
    """
    return torch.block_diag(*blocks.chunk(count))


class BlockDiagonalFactor(ParameterModule):
    """A block-diagonal factor of a product on a linear layer; its weight is the blocks, stacked along the rows.

    Args:
        nblocks: number of blocks.
    """

    weight: Any

    def __init__(self, nblocks: int) -> None:
        nn.Module.__init__(self)
        set_plain(self, nblocks=nblocks)

    nblocks: int

    @property
    def in_features(self) -> int:
        """Columns of the factor."""
        return int(self.weight.shape[1]) * self.nblocks

    @property
    def out_features(self) -> int:
        """Rows of the factor."""
        return int(self.weight.shape[0])

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """The factor, (out, in), zeros included."""
        return block_diagonal(self.weight, self.nblocks)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the factor, in its dtype or autocast's."""
        return F.linear(x.to(self.weight.dtype), self.weight_as_blockdiagonal_matrix())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"

    def _get_name(self) -> str:
        return "BlockDiagonalLinear"


class _ConvolutionFactor(ParameterModule):
    """A factor of a product on a convolution: A has its stride and padding, B its groups."""

    weight: Any

    def __init__(self, layer: Any, shape: tuple[int, ...], *, is_first: bool) -> None:
        nn.Module.__init__(self)
        ones, zeros = (1,) * (len(shape) - 2), (0,) * (len(shape) - 2)
        groups = 1 if is_first else layer.groups
        set_plain(
            self,
            in_channels=shape[1] * groups,
            out_channels=shape[0],
            kernel_size=shape[2:],
            stride=layer.stride if is_first else ones,
            padding=layer.padding if is_first else zeros,
            dilation=layer.dilation if is_first else ones,
            padding_mode=layer.padding_mode if is_first else "zeros",
            groups=groups,
            output_padding=zeros,
            transposed=False,
            _reversed_padding_repeated_twice=layer._reversed_padding_repeated_twice,
        )

    def _get_name(self) -> str:
        return type(self).__name__.removesuffix("Factor")


class Conv1dFactor(_ConvolutionFactor, nn.Conv1d):
    """A factor of a product on ``nn.Conv1d``."""

    extra_repr = nn.Conv1d.extra_repr


class Conv2dFactor(_ConvolutionFactor, nn.Conv2d):
    """A factor of a product on ``nn.Conv2d``."""

    extra_repr = nn.Conv2d.extra_repr


class Conv3dFactor(_ConvolutionFactor, nn.Conv3d):
    """A factor of a product on ``nn.Conv3d``."""

    extra_repr = nn.Conv3d.extra_repr


_CONVOLUTIONS = {3: Conv1dFactor, 4: Conv2dFactor, 5: Conv3dFactor}


def factor_module(base: BaseLayer, shape: tuple[int, ...], *, is_first: bool) -> nn.Module:
    """A module that computes with a factor.

    Args:
        base: the layer.
        shape: shape of the factor.
        is_first: whether the factor is A.
    """
    if len(shape) in _CONVOLUTIONS:
        return _CONVOLUTIONS[len(shape)](base.module, shape, is_first=is_first)
    return LinearFactor()


class AdapterDropout(Observed, nn.Dropout):
    """The dropout on an adapter's input; its ``p`` is the adapter's.

    Args:
        adapter: the adapter.
    """

    _adapter: Any

    def __init__(self, adapter: Any) -> None:
        nn.Module.__init__(self)
        set_plain(self, inplace=False, _adapter=adapter)

    @property
    def adapter(self) -> Any:
        return self._adapter

    @property
    def training(self) -> bool:
        """Whether the adapter is in training mode."""
        return bool(self.adapter.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if hasattr(self, "_adapter"):  # not yet in torch's constructor, which sets the mode, too
            self.adapter.training = mode

    @property
    def p(self) -> float:
        """The probability."""
        return float(self.adapter.dropout)

    @p.setter
    def p(self, value: float) -> None:
        self.adapter.dropout = float(value)

    def extra_repr(self) -> str:
        """As of ``nn.Dropout``, or of ``nn.Identity`` without dropout."""
        return super().extra_repr() if self.p else ""

    def _get_name(self) -> str:
        return "Dropout" if self.p else "Identity"
