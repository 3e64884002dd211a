"""Chunked loss of language models: logits are computed only for tokens with labels, and a chunk at a time."""

from nbpeft.losses.heads import (
    check_chunk_size,
    chunked_head,
    chunked_loss,
    is_compiled,
    without_logits,
)
from nbpeft.losses.lazy_logits import ChunkedHead, LazyLogits
from nbpeft.losses.weighted_labels import WeightedLabels, check_weights_used, sum_of_weights, with_loss_weights

__all__ = [
    "ChunkedHead",
    "LazyLogits",
    "WeightedLabels",
    "check_chunk_size",
    "check_weights_used",
    "chunked_head",
    "chunked_loss",
    "is_compiled",
    "sum_of_weights",
    "with_loss_weights",
    "without_logits",
]
