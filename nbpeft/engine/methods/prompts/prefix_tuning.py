"""Prefix tuning: trained keys and values in front of those of each layer (Li and Liang 2021, arXiv:2101.00190).

    attention(q, [K_p, K], [V_p, V])        K_p, V_p: (n, features) a layer, trained or computed by a trained MLP

They are passed to the model as a cache of the tokens before the input, so the model must support one; models do not
with gradient checkpointing. A file contains the keys and values, as in PEFT, and the MLP if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nbpeft.engine.calls.cached_prefix import CachedPrefix, CachedPrefixConfig
from nbpeft.engine.calls.token_prompt import EncodedPrompt, derived_tokens, rows_of, with_rows
from nbpeft.engine.config.prompt_config import PROMPT_KEY, prompt_listing
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import FileFormat
from nbpeft.engine.contract.registry import register


@dataclass
class PrefixTuningConfig(CachedPrefixConfig):
    """Config of prefix tuning. Field names and defaults are PEFT's; see ``PromptLearningConfig``.

    Attributes:
        init_weights: "zero" to start with keys and values of zeros; None for random ones.
        encoder_hidden_size: features inside the MLP; by default those of a token.
        prefix_projection: whether an MLP computes the keys and values.
    """

    init_weights: Literal["zero"] | None = field(default=None)
    encoder_hidden_size: int | None = field(default=None)
    prefix_projection: bool = field(default=False)

    method_type: ClassVar[str] = "PREFIX_TUNING"
    counts: ClassVar[tuple[str, ...]] = (*CachedPrefixConfig.counts, "encoder_hidden_size")
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_weights": ("zero", None)}
    checked_apart: ClassVar[tuple[str, ...]] = ("modules_to_save", "init_weights")

    @property
    def has_encoder(self) -> bool:
        return self.prefix_projection

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        super().fill_in_sizes(model, width)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


@register(
    PrefixTuningConfig,
    label="prefix tuning",
    listing=prompt_listing(
        when="generation tasks: steers every layer, and the input keeps its length",
        paper="arXiv:2101.00190",
        more=lambda config: {"projection": "MLP"} if config.prefix_projection else {},
    ),
    sample_configs={
        "plain": {"num_virtual_tokens": 4},
        "projected": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12},
    },
    files=FileFormat(keys={"embedding.weight": PROMPT_KEY}, derived=derived_tokens, unpack=with_rows),
)
class PrefixEncoder(EncodedPrompt, CachedPrefix):
    """Keys and values of all layers, (tokens, layers * 2 * features), or the rows that an MLP computes them from."""

    transform: nn.Sequential

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__(config)
        width, size = int(config.token_dim or 0), self.state_features
        encoded = config.prefix_projection and config.encoded
        self.set_rows(nn.Embedding(self.state_count, width if encoded else size), encoded=encoded)
        if encoded:
            hidden = int(config.encoder_hidden_size or width)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def initialise(self, config: PrefixTuningConfig, base: BaseLayer) -> None:
        if config.init_weights == "zero":
            last: Any = self.transform[-1] if "transform" in self._modules else self.embedding
            for parameter in last.parameters():
                parameter.zero_()

    def encoded(self) -> Tensor:
        """Keys and values of all layers, (1, tokens, layers * 2 * features)."""
        rows = rows_of(self.embedding)
        return self.transform(rows) if "transform" in self._modules else rows
