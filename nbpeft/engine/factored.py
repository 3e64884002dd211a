"""What the methods share whose weights are two low-rank factors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nbpeft.engine.adapter import Adapter, Host

MAGNITUDE = "lora_magnitude_vector"
"""The parameter that DoRA has beside the factors."""


class FactoredAdapter(Adapter):
    """Two factors A and B whose product, times a scaling, is added to a weight.

    Attributes:
        scaling: factor on the product; a 0-d tensor once the model is prepared for compiled hot-swapping.
        dropout: probability on the adapter's input.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], host: Host, scaling: float, dropout: float) -> None:
        super().__init__()
        self._parameters.update(tensors)
        self.factor_names = host.factor_names
        self.scaling = scaling
        self.dropout = dropout

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        name_A, name_B = self.factor_names
        lora_A, lora_B = self._parameters[name_A], self._parameters[name_B]
        assert lora_A is not None and lora_B is not None
        return lora_A, lora_B

    @property
    def detached_factors(self) -> tuple[Tensor, Tensor]:
        """A and B, detached."""
        lora_A, lora_B = self.factors
        return lora_A.detach(), lora_B.detach()

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"rank={self.factors[0].shape[0]}, scaling={float(self.scaling):g}, dropout={self.dropout:g}"
