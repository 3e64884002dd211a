"""Prompts that are rows of a separate embedding, and their initialization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.manual_prompts import note_requested
from nbpeft.engine.changes.called_modules import is_plain
from nbpeft.engine.config.prompt_config import ENCODER_KEY, PROMPT_KEY, InitialisedPromptConfig, PromptLearningConfig
from nbpeft.engine.contract.base import BaseLayer, onloaded
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of, resolve_backend, resolve_layer_kind
from nbpeft.engine.tree.model_tree import frozen_module
from nbpeft.errors import ConfigError, with_article

_NETWORKS = ("mlp_head.", "lstm_head.", "transform.")
"""Prefixes of the parameter names of networks that compute prompts."""


class TokenPrompt(ModelAdapter):
    """Trained embeddings before those of the input.

    Args:
        config: the method's config.
        word_embeddings: the model's input embedding, for the initial values; scripts that make such a prompt
            themselves pass it, as to PEFT's class. The engine initializes what it makes later.

    Attributes:
        embedding: (tokens, features); the encoder's tokens of an encoder-decoder model come first.

    Raises:
        ConfigError: ``word_embeddings`` is no embedding.
    """

    embedding: nn.Embedding

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config)
        self.token_count = config.num_virtual_tokens
        self.embedding = nn.Embedding(config.total_tokens, config.token_dim)
        if word_embeddings is not None and not config.inference_mode:
            with torch.no_grad():
                self.initialise(config, base_of_embedding(word_embeddings))

    def initialise(self, config: Any, base: BaseLayer) -> None:
        tokens = self.initial_tokens(config, base)
        if tokens is not None:
            with onloaded(base.module):
                rows = base.module(tokens.to(base.device))
            self.embedding.weight.copy_(rows)

    @staticmethod
    def initial_tokens(config: InitialisedPromptConfig, base: BaseLayer) -> Tensor | None:
        """Ids of the tokens whose embeddings initialize the prompt, int64 (tokens,); None for random vectors."""
        total = config.total_tokens
        if config.starts_as("SAMPLE_VOCAB"):
            return torch.randint(0, base.in_features, (total,), dtype=torch.long)
        if not config.starts_as("TEXT"):
            return None
        from transformers import AutoTokenizer

        # A config from an untrusted source must not run code.
        options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
        tokenizer: Any = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
        return torch.tensor((ids * math.ceil(total / max(len(ids), 1)))[:total], dtype=torch.long)

    def all_tokens(self, base: BaseLayer) -> Tensor:
        """The rows of its embedding."""
        return rows_of(self.embedding)

    def tokens_at(self, ids: Tensor, *task_ids: Tensor) -> Tensor:
        """Rows of its embedding, if these are the prompt."""
        own = type(self)
        if own.all_tokens is not TokenPrompt.all_tokens or own.input_tokens is not TokenPrompt.input_tokens:
            return super().tokens_at(ids)
        note_requested()
        rows: Tensor = self.embedding(ids)
        return rows

    def input_tokens(self, base: BaseLayer) -> Tensor:
        """The first of all tokens."""
        return self.all_tokens(base)[:, : self.token_count]


def base_of_embedding(embedding: nn.Module) -> BaseLayer:
    """Returns the frozen layer of a model's input embedding, which may be adapted.

    Raises:
        ConfigError: it is no embedding.
    """
    bare = frozen_module(embedding)
    kind, backend = resolve_layer_kind(bare), resolve_backend(bare)
    if kind is None or backend is None or not kind.takes_ids:
        raise ConfigError(f"word_embeddings must be an embedding, not {with_article(embedding)}")
    return BaseLayer(bare, kind, backend)


class EncodedPrompt(ModelAdapter):
    """A prompt that a network computes from rows of an embedding or, without a network, those rows themselves.

    Attributes:
        embedding: the rows.
        encodes: whether a network computes the prompt from them.
    """

    embedding: nn.Embedding
    encodes: bool

    def set_rows(self, rows: nn.Embedding, *, encoded: bool) -> None:
        """Registers the rows that are the prompt, or that its network reads.

        Args:
            rows: the embedding.
            encoded: whether a network computes the prompt from them.
        """
        self.embedding = rows
        self.encodes = encoded

    def name_in_files(self, name: str) -> str:
        """The name in files; if a network reads the rows, ``embedding.weight`` is the name of the computed prompt."""
        return ENCODER_KEY if self.encodes and name == "embedding.weight" else name

    def encoded(self) -> Tensor:
        """The network's output, (1, tokens, features)."""
        raise NotImplementedError

    def tokens_at(self, ids: Tensor, *task_ids: Tensor) -> Tensor:
        """Rows of the network's output."""
        note_requested()
        return self.encoded()[0][ids]


def rows_of(embedding: nn.Embedding) -> Tensor:
    """All rows of an embedding, (1, rows, features); through its call if it has hooks."""
    if is_plain(embedding):
        return embedding.weight.unsqueeze(0)
    rows: Tensor = embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device)).unsqueeze(0)
    return rows


def with_rows(config: PromptLearningConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a prompt with a network, under their names in files.

    In PEFT's models the rows that the network reads have the name that the computed tokens have in files.

    Args:
        config: the adapter's config.
        tensors: key -> tensor.
    """
    has_network = any(key.startswith(_NETWORKS) for key in tensors)
    if ENCODER_KEY in tensors or not (has_network and config.has_encoder and config.encoded):
        return tensors
    return {ENCODER_KEY if key == PROMPT_KEY else key: tensor for key, tensor in tensors.items()}


def derived_tokens(config: PromptLearningConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokens that a prompt's network computes, which PEFT's files contain in addition to its parameters.

    Args:
        config: the adapter's config.
        tensors: parameter path -> parameter.

    Returns:
        (tokens, features) under PEFT's key; empty without a network.
    """
    if not (config.has_encoder and config.encoded):
        return {}
    adapter: Any = method_of(config).adapter_class
    with torch.no_grad():
        encoder: EncodedPrompt = adapter.bound(config, tensors).eval()
        return {PROMPT_KEY: encoder.encoded()[0]}
