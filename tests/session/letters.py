"""The name that tests/fuzz still uses."""

from __future__ import annotations

from tests.char_tokenizer import CharTokenizer as Letters

__all__ = ["Letters"]
