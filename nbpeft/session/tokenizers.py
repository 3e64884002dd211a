"""Which tokenizer belongs to a model: the one that was given last."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


class Tokenizers:
    """Remembers a tokenizer for each base model, as long as the model lives."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def choose(self, base: nn.Module, given: Any) -> Any:
        """The tokenizer given, or the one that was given for this base before.

        Raises:
            AdapterError: there is none, or it is no tokenizer.
        """
        if given is not None and not (callable(given) and hasattr(given, "decode")):
            raise AdapterError(f"tokenizer is of type {type(given).__name__}, expected a tokenizer of transformers")
        found = given if given is not None else self._of.get(base)
        if found is None:
            raise AdapterError("a tokenizer is needed to read prompts; give it as tokenizer (--tokenizer)")
        self._of[base] = found
        return found
