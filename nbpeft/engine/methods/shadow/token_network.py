"""The network for diffusion transformers: an MLP on each token, which reads the input of the model's first block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TokenNetworkConfig:
    """The sizes of the network.

    Attributes:
        in_features: features of the model's hidden states.
        hidden_size: features of the network.
        layers: number of its blocks.
        inner: features inside a block.
    """

    in_features: int
    hidden_size: int
    layers: int
    inner: int


class TokenNetwork(nn.Module):
    """Residual MLPs on each token, with PEFT's names and initial values."""

    def __init__(self, config: TokenNetworkConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.proj_in = nn.Linear(config.in_features, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.inner), nn.GELU(), nn.Linear(config.inner, size))
            for _ in range(config.layers)
        )

    def forward(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The state of each token: (rows, length, in_features) -> (rows, length, hidden_size); ``call`` is not used."""
        state: Tensor = self.proj_in(hidden.to(self.proj_in.weight.dtype))
        for block in self.blocks:
            state = state + block(state)
        return state
