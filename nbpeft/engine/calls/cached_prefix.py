"""Prefixes: trained keys and values that come before those of the input in each layer's cache.

attention(q, [K_p, K], [V_p, V])        K_p, V_p: (n, features) per layer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_properties import checkpoints_gradients, part_with_cache
from nbpeft.engine.config.prompt_config import WIDTHS, PromptLearningConfig, size_in
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of
from nbpeft.errors import ConfigError


@dataclass
class CachedPrefixConfig(PromptLearningConfig):
    """Config of a prefix, whose sizes are those of the key and value heads; see the base class."""

    inserts_embeddings: ClassVar[bool] = False

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Fills in the sizes of the key and value heads."""
        own = (self.token_dim, self.num_attention_heads)
        super().fill_in_sizes(model, width)
        config: Any = getattr(model, "config", None)
        text = getattr(config, "text_config", None) or config
        heads = getattr(text, "num_key_value_heads", None)
        if isinstance(heads, int):
            features = getattr(text, "head_dim", None)
            if not features:
                all_heads = size_in(config, "num_attention_heads", ("num_attention_heads", "n_head", "num_heads"))
                features = size_in(config, "token_dim", WIDTHS) // all_heads
            self.token_dim, self.num_attention_heads = features * heads, heads
        elif own[0] is None and own[1] is None and isinstance(features := getattr(text, "d_kv", None), int):
            self.token_dim = features * int(self.num_attention_heads or 1)


class CachedPrefix(ModelAdapter):
    """Keys and values of all layers; subclasses implement ``encoded``."""

    needs_embedding: ClassVar[bool] = False

    def __init__(self, config: CachedPrefixConfig) -> None:
        super().__init__(config)
        assert config.num_virtual_tokens is not None and config.num_layers is not None
        self.state_count, self.layers = config.num_virtual_tokens, config.num_layers
        self.heads = int(config.num_attention_heads or 1)
        self.has_decoder = config.num_transformer_submodules == 2
        self.state_features = config.num_layers * 2 * int(config.token_dim or 0)

    def encoded(self) -> Tensor:
        """Keys and values of all layers, (1, tokens, layers * 2 * features)."""
        raise NotImplementedError

    def cached_states(self, base: BaseLayer) -> Tensor:
        """The keys and values, (1, tokens, layers, 2, heads, features)."""
        states = self.encoded().view(1, self.state_count, self.layers, 2, self.heads, -1)
        if not self.has_decoder:
            return states
        # For a decoder, PEFT doubles the list of layers and splits it in groups of two layers, of which only the first
        # is used. So the decoder's layer i reads the states of layer 2 i, and prefixes in files are trained that way.
        return states[:, :, [2 * layer % self.layers for layer in range(self.layers)]]

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Overwrites the keys and values.

        Args:
            prompt_embeddings: (tokens, layers * 2 * features), as in a file.

        Raises:
            ConfigError: the shape differs, or a network computes the keys and values.
        """
        parameters, shape = [*self.parameters()], (self.state_count, self.state_features)
        if any(parameter.shape[1:] != shape[1:] for parameter in parameters):
            raise ConfigError("prompt_embeddings cannot be loaded if a network computes them (prefix_projection)")
        if tuple(prompt_embeddings.shape) != shape:
            raise ConfigError(f"prompt_embeddings must have the shape {shape}, not {tuple(prompt_embeddings.shape)}")
        start = 0
        for parameter in parameters:
            parameter.copy_(prompt_embeddings[start : start + len(parameter)])
            start += len(parameter)

    @classmethod
    def check_model(cls, config: CachedPrefixConfig, model: nn.Module) -> None:
        """Refuses models that take no cache or use gradient checkpointing."""
        if part_with_cache(model) is None:
            raise ConfigError(
                f"{type(model).__name__} does not support past key values, which are required for "
                f"{method_of(config).label}"
            )
        if checkpoints_gradients(model):
            raise ConfigError(
                f"{config.method_type} does not work with gradient checkpointing, which drops the cache: call "
                "gradient_checkpointing_disable() first"
            )
