"""The loss of language models without their logits as a whole: learned tokens only, some at a time."""

from nbpeft.losses.heads import (
    check_chunk_size,
    chunked_head,
    chunked_loss,
    is_compiled,
    without_logits,
)
from nbpeft.losses.lazy_logits import ChunkedHead, LazyLogits

__all__ = [
    "ChunkedHead",
    "LazyLogits",
    "check_chunk_size",
    "chunked_head",
    "chunked_loss",
    "is_compiled",
    "without_logits",
]
