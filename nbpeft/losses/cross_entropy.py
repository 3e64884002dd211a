"""Cross entropy of logits that are computed some tokens at a time, with the gradient of what they are computed from.

A chunk's logits live until its loss and its gradient are known. What is kept for backward is the gradient of the
hidden states of learned tokens, and of the head's parameters where some are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nbpeft.names import LOSS_CHUNK_SIZE

_FREE_OUTPUTS = frozenset(("MmBackward0", "AddmmBackward0", "LinearBackward0"))
"""Operations whose backward does not read their output, so that it may be overwritten."""

Head = Callable[[Tensor], Tensor]
"""Logits (n, vocabulary) of hidden states (n, features)."""


def chunked_cross_entropy(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_size: int = LOSS_CHUNK_SIZE,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy(head(hidden), targets, …)`` without the logits as a whole.

    Args:
        head: computes logits; must treat each row on its own.
        hidden: hidden states, (n, features), floating.
        targets: class of each row, int64 (n,), or ``ignore_index``.
        weights: how much the loss of each row counts, (n,) and at least 0; None for 1. A mean is then over their sum.
        chunk_size: rows whose logits are in memory at once.
        ignore_index: target of rows that are not learned.
        reduction: ``"mean"`` over learned rows, or ``"sum"``.
        label_smoothing: share of the target that is spread over all classes.
        divisor: what a sum will be divided by, where that is known.

    Returns:
        The loss, a scalar in float32 (float64 where logits are); NaN for the mean of no rows.
    """
    learns = torch.is_grad_enabled()
    trained = _trained_tensors(head, hidden) if learns else []
    hidden = hidden if learns else hidden.detach()
    learned = targets != ignore_index
    if not bool(learned.all()):
        rows = learned.nonzero().flatten()
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        weights = None if weights is None else weights.to(rows.device).index_select(0, rows)
    count = targets.shape[0]
    total = count if weights is None else weights.sum()
    divisor = total if reduction == "mean" else divisor
    apply: Any = _ChunkedCrossEntropy.apply
    loss: Tensor = apply(head, chunk_size, label_smoothing, divisor, targets, weights, hidden, *trained)
    if reduction == "sum":
        return loss
    return loss / total if count else loss + float("nan")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over rows. The gradients of all inputs are computed with it; backward does no more than scale them."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        chunk_size: int,
        smoothing: float,
        divisor: Tensor | float | None,
        targets: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """Computes the loss and, where one is needed, its gradient."""
        inside = bool(ctx.needs_input_grad[6])
        learns = inside or bool(trained)
        hidden_gradient = torch.empty_like(hidden) if inside else None
        sums = [torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) for tensor in trained]
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        ctx.divisor = None
        for start in range(0, hidden.shape[0], chunk_size):
            place = slice(start, start + chunk_size)
            rows = hidden[place].detach().requires_grad_(inside)
            with torch.set_grad_enabled(learns):
                logits = head(rows)
            losses, upstream = _losses(logits, targets[place], smoothing, learns)
            if weights is not None:
                part = weights[place].to(losses)
                losses, upstream = losses * part, None if upstream is None else upstream.mul_(part.unsqueeze(-1))
            total = total + losses.sum()
            if upstream is None:
                continue
            if logits.dtype == torch.bfloat16 and divisor is not None:  # so that what follows is rounded once
                ctx.divisor = divisor
                upstream.div_(divisor)
            found = torch.autograd.grad(logits, [rows, *trained] if inside else trained, upstream.to(logits.dtype))
            del logits, upstream
            if hidden_gradient is not None:
                hidden_gradient[place] = found[0]
            for gradient, new in zip(sums, found[int(inside) :], strict=True):
                gradient.add_(new)
        ctx.save_for_backward(hidden_gradient, *sums)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *trained)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients by that of the sum."""
        scale = upstream if ctx.divisor is None else upstream * ctx.divisor
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else (gradient * scale).to(dtype) for gradient, dtype in gradients]
        return (None, None, None, None, None, None, *scaled)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _losses(logits: Tensor, targets: Tensor, smoothing: float, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the loss of each row, (n,), and the gradient of their sum by the logits, (n, vocabulary), where wanted.

    The gradient takes the place of the logits where they are in its dtype and no graph holds them.
    """
    held = logits.grad_fn is not None and type(logits.grad_fn).__name__ not in _FREE_OUTPUTS
    shares = logits.detach().to(_wide(logits.dtype), copy=held)
    shares.sub_(shares.amax(-1, keepdim=True))
    index = targets.to(shares.device).unsqueeze(-1)
    of_target = shares.gather(-1, index).squeeze(-1)
    if smoothing:
        of_target = (1 - smoothing) * of_target + smoothing * shares.mean(-1)
    total = shares.exp_().sum(-1, keepdim=True)
    losses = total.squeeze(-1).log() - of_target
    if not wanted:
        return losses, None
    shares.div_(total).scatter_add_(-1, index, shares.new_full((), smoothing - 1).expand_as(index))
    return losses, shares.sub_(smoothing / logits.shape[-1]) if smoothing else shares


def _trained_tensors(head: Head, hidden: Tensor) -> list[Tensor]:
    """Returns what the head computes logits from, of what is trained, beside the hidden states.

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
