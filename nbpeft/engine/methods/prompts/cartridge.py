"""Cartridges: trained keys and values that represent a long text (Eyuboglu et al. 2025, arXiv:2506.06266).

    attention(q, [K_p, K], [V_p, V])        K_p, V_p: (n, features) a layer, trained, except those of the first tokens

Like prefix tuning without an MLP. The keys and values may be initialized with those of a text: see
``nbpeft.initialize_kv_prefix_from_text``. Those of the first tokens, the attention sink, are frozen.
A file contains all of them in one tensor, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.cached_prefix import CachedPrefix, CachedPrefixConfig
from nbpeft.engine.config.prompt_config import PROMPT_KEY, prompt_listing
from nbpeft.engine.contract.method_records import FileFormat
from nbpeft.engine.contract.registry import register
from nbpeft.errors import ConfigError, shown

FROZEN, TRAINED = "frozen_embedding", "trainable_embedding"


@dataclass
class CartridgeConfig(CachedPrefixConfig):
    """Config of a cartridge. Field names and defaults are PEFT's; see ``PromptLearningConfig``.

    Attributes:
        num_frozen_tokens: number of tokens at the start that are not trained.
    """

    num_frozen_tokens: int = field(default=1)

    method_type: ClassVar[str] = "CARTRIDGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens is None or self.num_frozen_tokens < 0:
            raise ConfigError(
                f"num_frozen_tokens must be a whole number of at least 0, not {shown(self.num_frozen_tokens)}",
                field="num_frozen_tokens",
            )
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens is {self.num_frozen_tokens}, more than num_virtual_tokens, "
                f"{self.num_virtual_tokens}; lower it",
                field="num_frozen_tokens",
            )


def _packed(config: CartridgeConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins both parts in one tensor, as in files."""
    parts = [tensors[name] for name in (FROZEN, TRAINED) if name in tensors]
    others = {key: tensor for key, tensor in tensors.items() if key not in (FROZEN, TRAINED)}
    return {PROMPT_KEY: torch.cat(parts), **others} if parts else others


def _unpacked(config: CartridgeConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits a file's tensor into the frozen and the trained part, which are views."""
    whole, count = tensors.get(PROMPT_KEY), config.num_frozen_tokens
    if whole is None or whole.ndim != 2 or len(whole) < count:
        return dict(tensors)
    others = {key: tensor for key, tensor in tensors.items() if key != PROMPT_KEY}
    return others | ({FROZEN: whole[:count]} if count else {}) | {TRAINED: whole[count:]}


@register(
    CartridgeConfig,
    label="Cartridge",
    listing=prompt_listing(
        when="many questions about one long text: a trained KV cache takes its place",
        paper="arXiv:2506.06266",
        more=lambda config: {"frozen": str(config.num_frozen_tokens)},
        smaller=lambda config: config.copy(
            num_virtual_tokens=max(1, config.num_frozen_tokens, config.num_virtual_tokens // 2)
        ),
    ),
    sample_configs={
        "sink": {"num_virtual_tokens": 4},
        "trained": {"num_virtual_tokens": 3, "num_frozen_tokens": 0},
    },
    files=FileFormat(pack=_packed, unpack=_unpacked),
)
class CartridgeEncoder(CachedPrefix):
    """Keys and values of all layers, (tokens, layers * 2 * features): first those that are not trained.

    Attributes:
        frozen_embedding: (frozen tokens, layers * 2 * features); None where there are none.
        trainable_embedding: (other tokens, layers * 2 * features).
    """

    frozen_parameters: ClassVar[tuple[str, ...]] = (FROZEN,)

    frozen_embedding: nn.Parameter | None
    trainable_embedding: nn.Parameter

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__(config)
        frozen, features = config.num_frozen_tokens, self.state_features
        self.frozen_embedding = nn.Parameter(torch.randn(frozen, features), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(torch.randn(self.state_count - frozen, features))

    @property
    def weight(self) -> Tensor:
        """Keys and values of all layers, (tokens, layers * 2 * features)."""
        frozen, trained = self.frozen_embedding, self.trainable_embedding
        return trained if frozen is None else torch.cat([frozen, trained])

    @property
    def embedding(self) -> Self:
        """Itself: ``embedding.weight`` is what PEFT's encoders of prompts have."""
        return self

    def encoded(self) -> Tensor:
        """Keys and values of all layers, (1, tokens, layers * 2 * features)."""
        return self.weight.unsqueeze(0)
