"""nn.Embedding, also those that scale their output (Gemma's ``embed_scale``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.adapter import Dropout
from nbpeft.engine.lowrank import add_delta, compute_dtype
from nbpeft.engine.registry import register_host
from nbpeft.errors import ConfigError


@register_host
class Embedding:
    """A (r, vocabulary), B (features, r); the stored weight (vocabulary, features) is transposed.

    The input are ids, so there is nothing to drop. A starts at zero and B random: a lookup
    gives gradient only to the rows of A that were looked up.
    """

    name = "embedding"
    priority = 20
    factor_names = ("lora_embedding_A", "lora_embedding_B")
    zero_factor = 0
    multiplies = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.T

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ConfigError(f"an embedding whose embed_scale has shape {tuple(scale.shape)} cannot be adapted")
        vocabulary, features = self.features(module)
        return (rank, vocabulary), (features, rank)

    def low_rank(
        self,
        module: nn.Module,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        dropout: Dropout,
        onto: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x, lora_A)
        hidden = self._look_up(module, x.to(lora_A.device), lora_A.T).to(dtype)
        delta = F.linear(hidden * scaling, lora_B.to(dtype)) * self.output_scale(module, dtype)
        return delta if onto is None else add_delta(onto, delta)

    def linear(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return self._look_up(module, x, weight.T) * self.output_scale(module, weight.dtype)

    def product(self, module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_B @ lora_A

    def product_refusal(self, module: nn.Module) -> str:
        return ""

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector

    @staticmethod
    def _look_up(module: nn.Module, ids: Tensor, table: Tensor) -> Tensor:
        # Without max_norm: it would rescale the table in place.
        assert isinstance(module, nn.Embedding)
        return F.embedding(ids, table, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)

    @staticmethod
    def output_scale(module: nn.Module, dtype: torch.dtype) -> float | Tensor:
        """The factor on what is looked up."""
        scale = getattr(module, "embed_scale", None)
        if scale is None:
            return 1.0
        return scale.to(dtype) if isinstance(scale, Tensor) else float(scale)
