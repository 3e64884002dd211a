"""How the side network of a model is built, and with which tensors it begins."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.config.prompt_config import WIDTHS
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import ConfigError, in_one_line, shortened, shown

_PROJECTION = "shadow_hidden_projection.weight"


def width_of(config: Any) -> int:
    """Features of the hidden states, from a model's config.

    Raises:
        ConfigError: the config does not have it.
    """
    found = next((getattr(config, name) for name in WIDTHS if hasattr(config, name)), None)
    of_heads = [getattr(config, name, None) for name in ("num_attention_heads", "attention_head_dim")]
    if found is None and all(isinstance(size, int) for size in of_heads):  # in configs of diffusers
        found = math.prod(of_heads)  # type: ignore[arg-type]
    if not isinstance(found, int):
        raise ConfigError(f"{type(config).__name__} does not say its hidden_size")
    return found


class Recipe:
    """Describes how a model's side network is built.

    Attributes:
        network_class: class of the network.
        network_config: its config.
        source: folder or hub id of its weights; empty for a new one.
        is_projected: whether the weights include a projection.
        width: features of the model's hidden states.
        shares: whether it reads the model's input embeddings.
        reads_states: whether it reads the input of the model's first block instead of the input of the model.
        is_lm: whether the network has a language modeling loss, with the model's head.
        head: a classification head without data, or None.
    """

    def __init__(
        self, network_class: Any, network_config: Any, source: str = "", *, is_projected: bool = False
    ) -> None:
        self.network_class, self.network_config = network_class, network_config
        self.source, self.is_projected = source, is_projected
        self.width = 0
        self.shares = self.is_lm = self.reads_states = False
        self.head: nn.Module | None = None
        self._source_of_head: Any = None

    def set_head(self, head: nn.Module) -> None:
        """Uses the head of a classification, whose tensors it does not own."""
        tensors = (*head.parameters(), *head.buffers())
        memo: dict[int, Any] = {id(one): nn.Parameter(torch.empty_like(one, device="meta")) for one in tensors}
        self.head = copy.deepcopy(head, memo)
        self._source_of_head = weakref.ref(head)

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors of that head, by name."""
        head = None if self._source_of_head is None else self._source_of_head()
        return {} if head is None else dict(head.named_parameters())

    @property
    def starts_from_tensors(self) -> bool:
        """Whether a new network begins with given tensors and not with random ones; see ``weights``."""
        return bool(self.source)

    def network(self) -> Any:
        """A new network, without an embedding if it reads the model's."""
        # All weights will be loaded, so torch's random state must not depend on initializing them.
        with torch.random.fork_rng(devices=()) if self.source and not self.is_projected else nullcontext():
            made = self.network_class(self.network_config)
        if self.shares and isinstance(getattr(made, "embed_tokens", None), nn.Module):
            del made.embed_tokens
        return made

    def projection(self) -> nn.Module:
        """A new projection from the network's features to the model's."""
        own = width_of(self.network_config)
        if own == self.width and not self.is_projected:
            return nn.Identity()
        return nn.Linear(own, self.width, bias=False)

    def frozen_modules(self, network: nn.Module) -> list[nn.Module]:
        """The modules of a network that are not trained: a pretrained network's embeddings, which are large."""
        embedding = embedding_of(network) if self.source else None
        return [] if embedding is None else [embedding]

    def weights(
        self, network: nn.Module, reads: Callable[[str], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The tensors of a network that starts from given ones, and that of its projection, if any.

        Args:
            network: the network.
            reads: returns the tensors of a file.

        Raises:
            ConfigError: they cannot be read.
        """
        try:
            if not self.is_projected:
                from transformers import AutoModel

                return dict(AutoModel.from_pretrained(self.source).state_dict()), None
            found = reads(file_of(self.source, "model.safetensors"))
            prefix = "shadow_model."
            own = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
            return own, found[_PROJECTION]
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(self.source, error) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source_of_head": None}


def file_of(source: str, name: str) -> str:
    """The path of a file in a folder, or of one of the hub."""
    from transformers.utils.hub import cached_file

    return str(cached_file(source, name))


def unreadable(source: str, error: Exception) -> ConfigError:
    """The error for a saved network that cannot be read."""
    reason = shortened(in_one_line(error), 200)
    return ConfigError(f"shadow_model {shown(source)} cannot be read: {reason}", field="shadow_model")
