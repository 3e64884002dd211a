"""A cache of keys and values for a model and its side network."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from transformers import DynamicCache

from nbpeft.engine.calls.two_pass_cache import TwoPassCache


class ShadowCache(TwoPassCache):
    """A model's cache that contains the network's cache; reordering and cropping apply to both."""

    needed_because: ClassVar[str] = "ShadowPEFT runs a second network, whose keys and values are cached, too"

    @property
    def base(self) -> Self:
        """The cache of the model: this one."""
        return self

    @property
    def shadow(self) -> DynamicCache:
        """The cache of the network."""
        return self.first_pass

    @property
    def is_compileable(self) -> Any:
        """False: there are two."""
        return False
