"""The classifier of X-LoRA: from hidden states to the weight of each adapter for each token."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.methods.lora.variants.xlora_config import XLoraConfig


class XLoraClassifier(nn.Module):
    """Linear layers with ReLU and dropout between them.

    Args:
        config: the adapter's config; read in each call.
        n_classes: number of adapters.
        n_layers: number of adapted layers.

    Attributes:
        layers: the linear layers with ReLU and dropout.
        log_scalings: logged weights, each (rows, length, layers, adapters).
        latest: the last predicted weights, with their graph, for custom losses.
        scalings_logging: whether weights are logged.
    """

    def __init__(self, config: XLoraConfig, n_classes: int, n_layers: int) -> None:
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        self.log_scalings: list[Tensor] = []
        self.latest: Tensor | None = None
        self.scalings_logging = False
        sizes = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1)]
        parts: list[nn.Module] = []
        for taken, given in itertools.pairwise(sizes):
            parts += [nn.Linear(taken, given), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                parts.append(nn.Dropout(config.xlora_dropout_p))
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        self.layers = nn.Sequential(*parts, nn.Linear(sizes[-1], outputs))

    @property
    def override_scaling_pass_value(self) -> float:
        """The weight of each adapter in the first pass; PEFT's name."""
        return self.config.scaling_pass_value

    def forward(self, hidden: Tensor) -> Tensor:
        """Predicts the weights.

        Args:
            hidden: (rows, length, features).

        Returns:
            (rows, length, layers, adapters).
        """
        weight: Any = self.layers[-1].weight
        logits: Tensor = self.layers(hidden.to(weight.device, weight.dtype))
        scalings = logits.view(*logits.shape[:2], -1, self.n_classes)
        if self.config.enable_softmax:
            scalings = torch.softmax(scalings / self.config.softmax_temperature, -1)
        scalings = scalings.expand(-1, -1, self.n_layers, -1)
        self.latest = scalings
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None}

    def chosen(self, scalings: Tensor) -> Tensor:
        """The weights, with those of adapters that a token does not use set to zero; same shape."""
        config = self.config
        if config.top_k_lora is None:
            return torch.softmax(scalings, -1) if config.enable_softmax_topk else scalings
        values: Tensor
        values, places = scalings.topk(config.top_k_lora, -1)
        values = torch.softmax(values, -1) if config.enable_softmax_topk else values
        return torch.zeros_like(scalings).scatter(-1, places, values)

    def bucketed(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The logged weights by length: length -> indices in the log, and the weights."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.log_scalings):
            places, values = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            values.append(scalings)
        return found
