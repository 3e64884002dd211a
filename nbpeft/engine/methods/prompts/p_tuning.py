"""P-tuning: a prompt that a small network computes (Liu et al. 2021, arXiv:2103.10385).

    x' = [f(h_1) … f(h_n), E(x)]        f: an MLP, or a bidirectional LSTM before it; h and f are trained

A file contains the computed tokens, as in PEFT, and the network, too, so that training continues where it stopped. From
a file without the network, the computed tokens themselves are trained.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from nbpeft.engine.calls.token_prompt import EncodedPrompt, derived_tokens, rows_of, with_rows
from nbpeft.engine.config.prompt_config import PROMPT_KEY, PromptLearningConfig, prompt_listing
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.method_records import FileFormat
from nbpeft.engine.contract.registry import register

_MLP_LAYERS = 2


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that computes a prompt. Values as in PEFT's files."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Config of P-tuning. Field names and defaults are PEFT's; see ``PromptLearningConfig``.

    Attributes:
        encoder_reparameterization_type: the network: MLP, or LSTM.
        encoder_hidden_size: features inside it; by default those of a token.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: share that is dropped between those in training, from 0 to 1.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = field(
        default=PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = field(default=None)
    encoder_num_layers: int = field(default=_MLP_LAYERS)
    encoder_dropout: float = field(default=0.0)

    method_type: ClassVar[str] = "P_TUNING"
    counts: ClassVar[tuple[str, ...]] = (*PromptLearningConfig.counts, "encoder_hidden_size", "encoder_num_layers")
    shares: ClassVar[tuple[str, ...]] = ("encoder_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "encoder_reparameterization_type": tuple(PromptEncoderReparameterizationType)
    }

    @property
    def has_encoder(self) -> bool:
        """True: a network computes the tokens."""
        return True

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        super().fill_in_sizes(model, width)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


@register(
    PromptEncoderConfig,
    label="P-tuning",
    listing=prompt_listing(
        when="small models, where plain prompt tuning learns slowly",
        paper="arXiv:2103.10385",
        more=lambda config: {
            "encoder": PromptEncoderReparameterizationType(config.encoder_reparameterization_type).value
        },
    ),
    sample_configs={
        "mlp": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
        "lstm": {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
    },
    files=FileFormat(keys={"embedding.weight": PROMPT_KEY}, derived=derived_tokens, unpack=with_rows),
)
class PromptEncoder(EncodedPrompt):
    """The network and its inputs, (tokens, features); or only the tokens that it computed."""

    mlp_head: nn.Sequential
    lstm_head: nn.LSTM

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__(config)
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        self.token_count, width = config.num_virtual_tokens, config.token_dim
        self.set_rows(nn.Embedding(config.total_tokens, width), encoded=config.encoded)
        if not config.encoded:
            return
        hidden = config.encoder_hidden_size or width
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            settings: Any = {"dropout": config.encoder_dropout, "bidirectional": True, "batch_first": True}
            self.lstm_head = nn.LSTM(width, hidden, config.encoder_num_layers, **settings)
            layers = (nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
            self.mlp_head = nn.Sequential(*layers)
        else:
            inner = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            self.mlp_head = nn.Sequential(*inner, nn.Linear(hidden, width))

    def encoded(self) -> Tensor:
        """All tokens, (1, tokens, features)."""
        values = rows_of(self.embedding)
        if "lstm_head" in self._modules:
            values = self.lstm_head(values)[0]
        return self.mlp_head(values) if "mlp_head" in self._modules else values

    def all_tokens(self, base: BaseLayer) -> Tensor:
        return self.encoded()

    def input_tokens(self, base: BaseLayer) -> Tensor:
        return self.encoded()[:, : self.token_count]

    @classmethod
    def config_warnings(
        cls, config: PromptEncoderConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]
    ) -> Iterable[str]:
        mlp = config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP
        if mlp and config.encoder_num_layers != _MLP_LAYERS:
            yield (
                f"for MLP, the argument `encoder_num_layers` is ignored. Exactly {_MLP_LAYERS} MLP layers are used; "
                "LSTM takes another number"
            )
