"""Prompts that are rows of an embedding of their own, and what those start as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.config.prompt_config import ENCODER_KEY, PROMPT_KEY, InitialisedPromptConfig, PromptLearningConfig
from nbpeft.engine.contract.base import BaseLayer, onloaded
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of

_NETWORKS = ("mlp_head.", "lstm_head.", "transform.")
"""How names of parameters of the networks begin that compute prompts."""


class TokenPrompt(ModelAdapter):
    """Trained embeddings in front of the input's.

    Attributes:
        embedding: (tokens, features); of an encoder-decoder model those of the encoder come first.
    """

    embedding: nn.Embedding

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.token_count = config.num_virtual_tokens
        self.embedding = nn.Embedding(config.total_tokens, config.token_dim)

    def initialise(self, config: Any, base: BaseLayer) -> None:
        """Copies rows of the model's embedding where the config asks for it; see ``ModelAdapter``."""
        tokens = self.initial_tokens(config, base)
        if tokens is not None:
            with onloaded(base.module):
                rows = base.module(tokens.to(base.device))
            self.embedding.weight.copy_(rows)

    @staticmethod
    def initial_tokens(config: InitialisedPromptConfig, base: BaseLayer) -> Tensor | None:
        """Ids, int64 (tokens,), that the prompt starts as; None for random vectors."""
        total = config.total_tokens
        if config.starts_as("SAMPLE_VOCAB"):
            return torch.randint(0, base.in_features, (total,), dtype=torch.long)
        if not config.starts_as("TEXT"):
            return None
        from transformers import AutoTokenizer

        # A config from a stranger must not run code of its own.
        options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
        tokenizer: Any = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
        return torch.tensor((ids * math.ceil(total / max(len(ids), 1)))[:total], dtype=torch.long)

    def input_tokens(self, base: BaseLayer) -> Tensor:
        """The first rows of its embedding; see ``ModelAdapter``."""
        return self.embedding.weight[: self.token_count].unsqueeze(0)


class EncodedPrompt(ModelAdapter):
    """A prompt that a network computes from rows of an embedding, or, without the network, those rows themselves.

    Attributes:
        embedding: the rows.
        encodes: whether a network reads them.
    """

    embedding: nn.Embedding
    encodes: bool

    def hold(self, rows: nn.Embedding, *, encoded: bool) -> None:
        """Keeps the rows, which a network reads or which are the prompt."""
        self.embedding = rows
        self.encodes = encoded

    def name_in_files(self, name: str) -> str:
        """The rows that a network reads are not the prompt, which files have under the name of an embedding."""
        return ENCODER_KEY if self.encodes and name == "embedding.weight" else name

    def encoded(self) -> Tensor:
        """What the network computes, (1, tokens, features)."""
        raise NotImplementedError


def with_rows(config: PromptLearningConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file of a prompt with a network, of those of a file or of a model.

    A model names the rows that the network reads as a file names the tokens that it computes.

    Args:
        config: of the adapter.
        tensors: key -> tensor.
    """
    has_network = any(key.startswith(_NETWORKS) for key in tensors)
    if ENCODER_KEY in tensors or not (has_network and config.has_encoder and config.encoded):
        return tensors
    return {ENCODER_KEY if key == PROMPT_KEY else key: tensor for key, tensor in tensors.items()}


def derived_tokens(config: PromptLearningConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT's files hold of a prompt with a network: the tokens that it computes.

    Args:
        config: of the adapter.
        tensors: its parameters by their path.

    Returns:
        (tokens, features) under PEFT's key; nothing where there is no network.
    """
    if not (config.has_encoder and config.encoded):
        return {}
    adapter: Any = method_of(config).adapter_class
    with torch.no_grad():
        made: EncodedPrompt = adapter.bound(config, tensors).eval()
        return {PROMPT_KEY: made.encoded()[0]}
