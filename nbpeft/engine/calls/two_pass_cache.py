"""A cache of keys and values that contains a second one, for a model that runs twice or next to a side network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import DynamicCache

from nbpeft.errors import AdapterError


class TwoPassCache(DynamicCache):
    """The cache of a call that also contains the cache of the pass before it; rows and length change in both.

    Attributes:
        first_pass: the cache of the first pass, or of the side network.
    """

    needed_because: ClassVar[str] = "the active adapter runs the model twice for each call"
    first_pass: DynamicCache

    def reorder_cache(self, beam_idx: Any) -> None:
        """As ``DynamicCache``, for both caches."""
        super().reorder_cache(beam_idx)
        self.first_pass.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As ``DynamicCache``, for both caches."""
        super().crop(*args, **kwargs)
        self.first_pass.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As ``DynamicCache``, for both caches."""
        super().batch_repeat_interleave(repeats)
        self.first_pass.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As ``DynamicCache``, for both caches."""
        super().batch_select_indices(indices)
        self.first_pass.batch_select_indices(indices)

    def reset(self) -> None:
        """As ``DynamicCache``, for both caches."""
        super().reset()
        self.first_pass.reset()


def with_first_pass(
    cache: Any, model: nn.Module, other: nn.Module | None = None, kind: type[TwoPassCache] = TwoPassCache
) -> TwoPassCache:
    """Adds a cache for the first pass to the cache of a call.

    Args:
        cache: the call's cache; None for a new one.
        model: the model that is called.
        other: the side network that runs before it, if any.
        kind: class that the cache gets.

    Returns:
        The given cache, or a new one.

    Raises:
        AdapterError: calls without a first pass have filled the cache, or its class cannot contain another cache.
    """
    extended: Any = DynamicCache(config=_config(model)) if cache is None else cache
    if type(extended) not in (kind, DynamicCache):
        raise AdapterError(
            f"{kind.needed_because}, and a {type(extended).__name__} cannot store two caches: omit "
            "cache_implementation, or pass use_cache=False"
        )
    if extended.get_seq_length() != (extended.first_pass.get_seq_length() if type(extended) is kind else 0):
        raise AdapterError(
            "the cache contains tokens that the active adapter has not seen: begin with an empty one, or pass "
            "use_cache=False"
        )
    if type(extended) is not kind:
        # The caller's object is extended in place, since the caller continues to use it.
        extended.__class__ = kind
        extended.first_pass = DynamicCache(config=_config(model if other is None else other))
    return extended


def _config(model: nn.Module) -> Any:
    """The config of a model's decoder; None if the model has no config."""
    config: Any = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True)
