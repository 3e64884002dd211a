"""What the methods share whose weights are two low-rank factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import Adapter, Host

MAGNITUDE = "lora_magnitude_vector"
"""The parameter that DoRA has beside the factors."""

_START = ("start_A", "minus_start_B")


class FactoredAdapter(Adapter):
    """Two factors A and B whose product, times a scaling, is added to a weight.

    Args:
        tensors: parameter name -> parameter.
        host: the kind of layer.
        scaling: factor on the product.
        dropout: probability on the adapter's input.
        start: A0 and B0 where the adapter starts in a part of the base, whose product it subtracts.

    Attributes:
        scaling: factor on the product; a 0-d tensor once the model is prepared for compiled hot-swapping.
        dropout: probability on the adapter's input.
    """

    def __init__(
        self,
        tensors: Mapping[str, nn.Parameter],
        host: Host,
        scaling: float,
        dropout: float,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._parameters.update(tensors)
        self.factor_names = host.factor_names
        self.scaling = scaling
        self.dropout = dropout
        if start is not None:
            for name, tensor in zip(_START, (start[0], -start[1]), strict=True):
                self.register_buffer(name, tensor, persistent=False)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A0 and -B0 where the adapter started in a part of the base, else None."""
        name_A, name_B = _START
        start_A, start_B = self._buffers.get(name_A), self._buffers.get(name_B)
        return None if start_A is None or start_B is None else (start_A, start_B)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of what is added to the weight; twice the trained rank where there is a ``start``."""
        lora_A, lora_B = self.trained_factors
        if self.start is None:
            return lora_A, lora_B
        start_A, start_B = self.start
        return torch.cat([lora_A, start_A]), torch.cat([lora_B, start_B], 1)

    @property
    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """A and B, the parameters."""
        name_A, name_B = self.factor_names
        lora_A, lora_B = self.held[name_A], self.held[name_B]
        assert lora_A is not None and lora_B is not None
        return lora_A, lora_B

    @property
    def detached_factors(self) -> tuple[Tensor, Tensor]:
        """A and B, detached."""
        lora_A, lora_B = self.factors
        return lora_A.detach(), lora_B.detach()

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"rank={self.trained_factors[0].shape[0]}, scaling={float(self.scaling):g}, dropout={self.dropout:g}"
