"""Cross entropy of logits that are computed some tokens at a time, with the gradient of what they are computed from.

A chunk's logits live until its loss and its gradient are known. What is kept for backward is the gradient of the
hidden states of learned tokens, and of the head's parameters where some are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LOSS_CHUNK_SIZE = 128
"""Tokens whose logits are in memory at once, by default."""

Head = Callable[[Tensor], Tensor]
"""Logits (n, vocabulary) of hidden states (n, features)."""


def chunked_cross_entropy(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    chunk_size: int = LOSS_CHUNK_SIZE,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy(head(hidden), targets, …)`` without the logits as a whole.

    Args:
        head: computes logits; must treat each row on its own.
        hidden: hidden states, (n, features), floating.
        targets: class of each row, int64 (n,), or ``ignore_index``.
        chunk_size: rows whose logits are in memory at once.
        ignore_index: target of rows that are not learned.
        reduction: ``"mean"`` over learned rows, or ``"sum"``.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        The loss, a scalar in float32 (float64 where logits are); NaN for the mean of no rows.
    """
    trained = _trained_tensors(head, hidden) if torch.is_grad_enabled() else []
    learned = targets != ignore_index
    if not bool(learned.all()):
        rows = learned.nonzero().flatten()
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    loss: Tensor = _ChunkedCrossEntropy.apply(head, chunk_size, label_smoothing, targets, hidden, *trained)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return loss
    return loss / targets.shape[0] if targets.shape[0] else loss + float("nan")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over rows; the gradients of all inputs are computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        chunk_size: int,
        smoothing: float,
        targets: Tensor,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """Computes the loss and, where one is needed, its gradient."""
        needed = [needs for needs in ctx.needs_input_grad[4:]]
        wanted = any(needed)
        gradients = [torch.zeros_like(tensor) if needs else None for tensor, needs in zip((hidden, *trained), needed, strict=True)]
        total: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_size):
            place = slice(start, start + chunk_size)
            rows = hidden[place].detach().requires_grad_(needed[0])
            with torch.set_grad_enabled(wanted):
                logits = head(rows)
            losses, upstream = _losses(logits.detach(), targets[place], smoothing, wanted)
            loss = losses.sum()
            total = loss if total is None else total + loss
            if upstream is not None:
                sources = [tensor for tensor, needs in zip((rows, *trained), needed, strict=True) if needs]
                found = iter(torch.autograd.grad(logits, sources, upstream.to(logits.dtype), allow_unused=True))
                del logits, upstream
                for index, gradient in enumerate(gradients):
                    new = next(found) if gradient is not None else None
                    if gradient is not None and new is not None:
                        (gradient[place] if index == 0 else gradient).add_(new)
        ctx.save_for_backward(*gradients)
        return hidden.new_zeros((), dtype=torch.float32) if total is None else total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scales the gradients by that of the sum."""
        scaled = (None if g is None else (g * upstream).to(g.dtype) for g in ctx.saved_tensors)
        return (None, None, None, None, *scaled)


def _losses(logits: Tensor, targets: Tensor, smoothing: float, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each row, (n,), and the gradient of their sum by the logits, (n, vocabulary), where wanted."""
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    log_shares = torch.log_softmax(logits, -1, dtype=wide)
    index = targets.to(log_shares.device).unsqueeze(-1)
    losses = log_shares.gather(-1, index).squeeze(-1).neg()
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_shares.mean(-1)
    if not wanted:
        return losses, None
    gradient = log_shares.exp_()
    gradient.scatter_add_(-1, index, gradient.new_full((), smoothing - 1).expand_as(index))
    return losses, gradient.sub_(smoothing / logits.shape[-1]) if smoothing else gradient


def _trained_tensors(head: Head, hidden: Tensor) -> list[Tensor]:
    """What the head computes logits from, of what is trained, beside the hidden states.

    Asked of the graph of one row, because a head may use parameters that are not below it, such as the trained
    rows of the embedding that it is tied to.
    """
    with torch.enable_grad():
        root = head(hidden[:1].detach()).grad_fn
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())
