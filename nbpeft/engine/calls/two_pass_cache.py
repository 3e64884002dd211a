"""A cache of keys and values for a model that runs twice for each call, or beside another one: it carries a second."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import DynamicCache

from nbpeft.errors import AdapterError


class TwoPassCache(DynamicCache):
    """The cache of a call, and that of the pass before it; what is done to its rows and its length is done to both.

    Attributes:
        first_pass: the cache of the first pass, or of the network beside the model.
    """

    needed_because: ClassVar[str] = "the active adapter runs the model twice for each call"
    first_pass: DynamicCache

    def reorder_cache(self, beam_idx: Any) -> None:
        """As of ``DynamicCache``, of both."""
        super().reorder_cache(beam_idx)
        self.first_pass.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As of ``DynamicCache``, of both."""
        super().crop(*args, **kwargs)
        self.first_pass.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As of ``DynamicCache``, of both."""
        super().batch_repeat_interleave(repeats)
        self.first_pass.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As of ``DynamicCache``, of both."""
        super().batch_select_indices(indices)
        self.first_pass.batch_select_indices(indices)

    def reset(self) -> None:
        """As of ``DynamicCache``, of both."""
        super().reset()  # type: ignore[no-untyped-call]
        self.first_pass.reset()  # type: ignore[no-untyped-call]


def with_first_pass(
    cache: Any, model: nn.Module, other: nn.Module | None = None, kind: type[TwoPassCache] = TwoPassCache
) -> TwoPassCache:
    """The cache of a call with one for the first pass: the object that was given, or a new one.

    Args:
        cache: what the call was given; None for a new one.
        model: what is called.
        other: what runs before, where that is another network.
        kind: what it becomes.

    Raises:
        AdapterError: it is filled by calls without a first pass, or of a kind that cannot carry another one.
    """
    made: Any = DynamicCache(config=_config(model)) if cache is None else cache
    if type(made) not in (kind, DynamicCache):
        raise AdapterError(
            f"{kind.needed_because}, which a {type(made).__name__} cannot keep: leave cache_implementation out, or "
            "pass use_cache=False"
        )
    if made.get_seq_length() != (made.first_pass.get_seq_length() if type(made) is kind else 0):
        raise AdapterError(
            "the cache holds tokens that the active adapter has not seen: begin with an empty one, or pass "
            "use_cache=False"
        )
    if type(made) is not kind:
        made.__class__ = kind
        made.first_pass = DynamicCache(config=_config(model if other is None else other))
    found: TwoPassCache = made
    return found


def _config(model: nn.Module) -> Any:
    """The config of what decodes in a model; None where it has none."""
    config: Any = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True)
