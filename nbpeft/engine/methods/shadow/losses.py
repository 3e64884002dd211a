"""The losses of the side network alone, and the inputs of its heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def in_dtype_of(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states in the dtype that a head computes in."""
    dtype = next((one.dtype for one in head.parameters() if one.is_floating_point()), hidden.dtype)
    return hidden.to(dtype)


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of tokens, (rows, length, vocabulary) and (rows, length)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device))


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a classification, (rows, classes): of numbers, one class or several, as the labels are."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.view(-1))


def last_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The states of the last token of each row, (rows, features), padding on either side left out."""
    if mask is None:
        return hidden[:, -1]
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = (mask.ne(0) * positions).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
