"""nn.Embedding, including subclasses that scale their output (Gemma's ``embed_scale``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_layer_kind


@register_layer_kind
class Embedding:
    """The stored weight is (vocabulary, features): the canonical one transposed."""

    name = "embedding"
    peft_name = "Embedding"
    priority = 20
    is_linear = False
    takes_ids = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        vocabulary, features = self.features(module)
        return features, vocabulary

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.T

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return self.look_up(module, x, weight.T) * self.output_scale(module, weight.dtype)

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector

    @staticmethod
    def look_up(module: nn.Module, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of a table (vocabulary, n) for ids of any shape: (*ids.shape, n), unscaled."""
        # ``max_norm`` is not passed on, because it would rescale the table in place.
        assert isinstance(module, nn.Embedding)
        return F.embedding(ids, table, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)

    @staticmethod
    def output_scale(module: nn.Module, dtype: torch.dtype) -> float | Tensor:
        """The factor on the embedding's output."""
        scale = getattr(module, "embed_scale", None)
        if scale is None:
            return 1.0
        return scale.to(dtype) if isinstance(scale, Tensor) else float(scale)
