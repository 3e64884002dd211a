"""Prefix tuning: trained keys and values in front of those of each layer (Li and Liang 2021, arXiv:2101.00190).

    attention(q, [K_p, K], [V_p, V])        K_p, V_p: (n, features) a layer, trained or computed by an MLP that is

They are where a cache has the tokens before the input, so the model must take one; with gradient checkpointing it
does not. A file holds the keys and values, as PEFT's, and the MLP too where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nbpeft.engine.base import BaseLayer
from nbpeft.engine.model_calls import checkpoints_gradients, part_with_cache
from nbpeft.engine.prompt_config import PROMPT_KEY, PromptLearningConfig, size_in
from nbpeft.engine.registry import register
from nbpeft.engine.token_prompt import EncodedPrompt, derived_tokens
from nbpeft.errors import ConfigError


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Config of prefix tuning. Field names and defaults are PEFT's; see ``PromptLearningConfig``.

    Attributes:
        init_weights: "zero" to start with keys and values of zeros; None for random ones.
        encoder_hidden_size: features inside the MLP; by default those of a token.
        prefix_projection: whether an MLP computes the keys and values.

    Raises:
        ConfigError: a value is impossible.
    """

    init_weights: Literal["zero"] | None = field(default=None)
    encoder_hidden_size: int | None = field(default=None)
    prefix_projection: bool = field(default=False)

    beside_embeddings: ClassVar[bool] = False
    method_type: ClassVar[str] = "PREFIX_TUNING"
    counts: ClassVar[tuple[str, ...]] = (*PromptLearningConfig.counts, "encoder_hidden_size")
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_weights": ("zero", None)}
    checked_apart: ClassVar[tuple[str, ...]] = ("modules_to_save", "init_weights")

    @property
    def has_encoder(self) -> bool:
        """Whether an MLP computes the keys and values."""
        return self.prefix_projection

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Sizes are those of the heads that have keys and values of their own; see ``PromptLearningConfig``."""
        own = (self.token_dim, self.num_attention_heads)
        super().fill_in_sizes(model, width)
        config: Any = getattr(model, "config", None)
        text = getattr(config, "text_config", None) or config
        heads = getattr(text, "num_key_value_heads", None)
        if isinstance(heads, int):
            features = getattr(text, "head_dim", None)
            if not features:
                all_heads = size_in(config, "num_attention_heads", ("num_attention_heads", "n_head", "num_heads"))
                features = size_in(config, "token_dim", ("hidden_size", "n_embd", "d_model")) // all_heads
            self.token_dim, self.num_attention_heads = features * heads, heads
        elif own[0] is None and own[1] is None and isinstance(features := getattr(text, "d_kv", None), int):
            self.token_dim = features * int(self.num_attention_heads or 1)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


@register(
    PrefixTuningConfig,
    peft_type="PREFIX_TUNING",
    label="prefix tuning",
    file_keys={"embedding.weight": PROMPT_KEY},
    derived=derived_tokens,
    summary=lambda config: (
        {"tokens": str(config.num_virtual_tokens)} | ({"projection": "MLP"} if config.prefix_projection else {})
    ),
    smaller=lambda config: config.copy(num_virtual_tokens=max(1, config.num_virtual_tokens // 2)),
    when="generation: it steers every layer, and the input keeps its length",
    paper="arXiv:2101.00190",
    listed_with={"num_virtual_tokens": 20},
    sample_configs={
        "plain": {"num_virtual_tokens": 4},
        "projected": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12},
    },
)
class PrefixEncoder(EncodedPrompt):
    """Keys and values of all layers, (tokens, layers * 2 * features), or the rows that an MLP computes them from."""

    transform: nn.Sequential

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__(config)
        assert config.num_virtual_tokens is not None and config.num_layers is not None
        self.state_count, width = config.num_virtual_tokens, int(config.token_dim or 0)
        self.layers, self.heads = config.num_layers, int(config.num_attention_heads or 1)
        self.has_decoder = config.num_transformer_submodules == 2
        size = config.num_layers * 2 * width
        encoded = config.prefix_projection and config.encoded
        self.hold(nn.Embedding(config.num_virtual_tokens, width if encoded else size), encoded=encoded)
        if encoded:
            hidden = int(config.encoder_hidden_size or width)
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def initialise(self, config: PrefixTuningConfig, base: BaseLayer) -> None:
        """Starts with zeros where the config asks for them; see ``ModelAdapter``."""
        if config.init_weights == "zero":
            last: Any = self.transform[-1] if "transform" in self._modules else self.embedding
            for parameter in last.parameters():
                parameter.zero_()

    def encoded(self) -> Tensor:
        """Keys and values of all layers, (1, tokens, layers * 2 * features)."""
        rows: Tensor = self.embedding.weight.unsqueeze(0)
        return self.transform(rows) if "transform" in self._modules else rows

    def cached_states(self, base: BaseLayer) -> Tensor:
        """The keys and values by layer and head; see ``ModelAdapter``."""
        states = self.encoded().view(1, self.state_count, self.layers, 2, self.heads, -1)
        if not self.has_decoder:
            return states
        # PEFT deals them out in fours there, two of which it then drops: files mean that.
        return states[:, :, [2 * layer % self.layers for layer in range(self.layers)]]

    @classmethod
    def check_model(cls, config: PrefixTuningConfig, model: nn.Module) -> None:
        """Refuses models that take no cache, now or ever; see ``ModelAdapter``."""
        if part_with_cache(model) is None:
            raise ConfigError(
                f"{type(model).__name__} does not support past key values, which are required for prefix tuning"
            )
        if checkpoints_gradients(model):
            raise ConfigError(
                "PREFIX_TUNING does not work with gradient checkpointing, which leaves the cache out: call "
                "gradient_checkpointing_disable() first"
            )
