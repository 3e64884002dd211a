"""Prompts that are rows of an embedding of their own, and what those start as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.base import BaseLayer, onloaded
from nbpeft.engine.model_adapter import ModelAdapter
from nbpeft.engine.prompt_config import PROMPT_KEY, InitialisedPromptConfig, PromptLearningConfig
from nbpeft.engine.registry import method_of


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
    """

    embedding: nn.Embedding

    def hold(self, rows: nn.Embedding, *, encoded: bool) -> None:
        """Keeps the rows, under one name where a network reads them and under another where they are the prompt."""
        self._modules["input" if encoded else "embedding"] = rows

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules", {})
        return own["input"] if name == "embedding" and "input" in own else super().__getattr__(name)

    def encoded(self) -> Tensor:
        """What the network computes, (1, tokens, features)."""
        raise NotImplementedError


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
