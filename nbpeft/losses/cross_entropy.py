"""Cross entropy whose logits are computed a chunk of tokens at a time, together with the gradients of the inputs.

The logits of a chunk are freed once its loss and its gradient are computed. Only the gradients of the hidden states of
tokens with labels, and of trained parameters of the head, are saved for backward. If each token has a loss of its own,
the gradients of trained parameters of the head are computed in backward, where their factors are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nbpeft.names import IGNORED_LABEL, LOSS_CHUNK_SIZE

_FREE_OUTPUTS = frozenset(("MmBackward0", "AddmmBackward0", "LinearBackward0"))
"""Backward functions that do not read the output of their operation, so that it may be overwritten."""

Head = Callable[[Tensor], Tensor]
"""Computes logits (n, vocabulary) from hidden states (n, features)."""


def chunked_cross_entropy(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_size: int = LOSS_CHUNK_SIZE,
    ignore_index: int = IGNORED_LABEL,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    divisor: Tensor | float | None = None,
    sampled: bool = False,
) -> Tensor:
    """Compute ``cross_entropy(head(hidden), targets, …)`` in chunks, without all logits in memory at once.

    Args:
        head: computes logits; must process each row independently of the others.
        hidden: hidden states, floating-point, (n, features).
        targets: class of each row or ``ignore_index``, int64, (n,).
        weights: weight of each row's loss, at least 0, (n,); None for 1. A mean is divided by their sum.
        chunk_size: number of rows whose logits are in memory at once.
        ignore_index: target of rows that are left out.
        reduction: ``"mean"`` over the rows with a target, ``"sum"``, or ``"none"``.
        label_smoothing: share of the target probability that is distributed over all classes, 0 to 1.
        divisor: the number by which the caller will divide a sum, or None if unknown. If known, bfloat16 gradients are
            divided by it before they are rounded.
        sampled: compute only the first two chunks and the last one: the others allocate the same memory as the second.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits), NaN for the mean of no rows; with ``"none"`` that of
        each row, (n,), 0 for rows that are left out.
    """
    has_grad = torch.is_grad_enabled()
    trained = _trained_tensors(head, hidden) if has_grad else []
    hidden = hidden if has_grad else hidden.detach()
    learned, size, rows = targets != ignore_index, targets.shape[0], None
    if not bool(learned.all()):
        rows = learned.nonzero().flatten()
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        weights = None if weights is None else weights.to(rows.device).index_select(0, rows)
    count = targets.shape[0]
    total = count if weights is None else weights.sum()
    divisor = total if reduction == "mean" else divisor
    apply: Any = _ChunkedCrossEntropy.apply
    starts = range(0, count, chunk_size)
    chosen = (*starts[:2], *starts[2:][-1:]) if sampled else starts
    chunks = [slice(start, start + chunk_size) for start in chosen]
    each = reduction == "none"
    loss: Tensor = apply(head, chunks, label_smoothing, divisor, each, targets, weights, hidden, *trained)
    if each:
        return loss if rows is None else loss.new_zeros(size).index_copy(0, rows.to(loss.device), loss)
    if reduction == "sum":
        return loss
    return loss / total if count else loss + float("nan")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses, or each of them. Forward also computes the gradients of the hidden states.

    Backward only scales them, so that the logits of a chunk need not be saved or computed again. This holds for the
    gradients of trained tensors of the head, too, if the losses are summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        chunks: Sequence[slice],
        smoothing: float,
        divisor: Tensor | float | None,
        each: bool,
        targets: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """Computes the loss and, if a gradient is needed, the gradients of the inputs."""
        inside = bool(ctx.needs_input_grad[7])
        summed = [] if each else list(trained)
        learns = inside or bool(summed)
        hidden_gradient = torch.empty_like(hidden) if inside else None
        sums = [torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) for tensor in summed]
        total = hidden.new_zeros(targets.shape[0] if each else (), dtype=_wide(hidden.dtype))
        ctx.divisor = None
        for place in chunks:
            rows = hidden[place].detach().requires_grad_(inside)
            with torch.set_grad_enabled(learns):
                logits = head(rows)
            is_free = _is_free(logits, rows)
            losses, upstream = _losses(logits, targets[place], smoothing, learns, is_free)
            if weights is not None:
                part = weights[place].to(losses)
                losses, upstream = losses * part, None if upstream is None else upstream.mul_(part.unsqueeze(-1))
            if each:
                total[place] = losses
            else:
                total = total + losses.sum()
            if upstream is None:
                continue
            if logits.dtype == torch.bfloat16 and divisor is not None:  # divide before rounding to bfloat16
                ctx.divisor = divisor
                upstream.div_(divisor)
            upstream = _in_dtype_of(logits, upstream, is_free)
            found = list(torch.autograd.grad(logits, [rows, *summed] if inside else summed, upstream))
            del logits, upstream
            for gradient in reversed(sums):
                gradient.add_(found.pop())  # and freed before the next chunk
            if hidden_gradient is not None:
                hidden_gradient[place] = found[0]
        later = (hidden, targets, weights, *trained) if each and trained else ()
        ctx.save_for_backward(hidden_gradient, *sums, *later)
        ctx.count, ctx.again = 1 + len(sums), (head, chunks, smoothing)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *trained)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients by those of the losses."""
        (hidden_gradient, *sums), later = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        scale = upstream if ctx.divisor is None else upstream * ctx.divisor
        gradients = [
            None if hidden_gradient is None else hidden_gradient * (scale.unsqueeze(-1) if scale.dim() else scale),
            *(_of_trained(*ctx.again, *later, upstream=upstream) if later else [part * scale for part in sums]),
        ]
        scaled = [None if part is None else part.to(dtype) for part, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (None, None, None, None, None, None, None, *scaled)


def _of_trained(
    head: Head,
    chunks: Sequence[slice],
    smoothing: float,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *trained: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """Returns the gradients of trained tensors of the head, given the gradient of each row's loss, (n,)."""
    sums = [torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) for tensor in trained]
    for place in chunks:
        with torch.enable_grad():
            rows = hidden[place].detach()
            logits = head(rows)
        is_free = _is_free(logits, rows)
        _, gradient = _losses(logits, targets[place], smoothing, True, is_free)
        assert gradient is not None
        factors = upstream[place] if weights is None else upstream[place] * weights[place].to(upstream)
        gradient = _in_dtype_of(logits, gradient.mul_(factors.unsqueeze(-1)), is_free)
        found = list(torch.autograd.grad(logits, trained, gradient))
        del logits, gradient
        for part in reversed(sums):
            part.add_(found.pop())
    return sums


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _losses(
    logits: Tensor, targets: Tensor, smoothing: float, wanted: bool, is_free: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the loss of each row, (n,), and, if wanted, the gradient of their sum with respect to the logits.

    The gradient, (n, vocabulary), overwrites the logits if they have its dtype and may be overwritten.
    """
    shares = logits.detach().to(_wide(logits.dtype), copy=not is_free)
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


def _is_free(logits: Tensor, rows: Tensor) -> bool:
    """Whether the logits of some rows may be overwritten: no graph, no caller and no module may need them.

    A head may return its input, a parameter, or a part of a tensor that it keeps.
    """
    if logits.grad_fn is not None:
        return type(logits.grad_fn).__name__ in _FREE_OUTPUTS
    storage = logits.untyped_storage()
    is_input = storage._cdata == rows.untyped_storage()._cdata
    is_part = logits._is_view() or storage.nbytes() > logits.nbytes  # views of inference tensors do not say so
    return not (is_input or is_part or logits.requires_grad)


def _in_dtype_of(logits: Tensor, gradient: Tensor, is_free: bool) -> Tensor:
    """Returns a gradient of the logits in their dtype; overwrites the logits with it if they may be overwritten."""
    if gradient.dtype == logits.dtype or not is_free:
        return gradient.to(logits.dtype)
    return logits.detach().copy_(gradient)


def _trained_tensors(head: Head, hidden: Tensor) -> list[Tensor]:
    """Returns the trained tensors, other than the hidden states, from which the head computes logits.

    They are found in the autograd graph of one row, because a head may use parameters of other modules, such as the
    trained rows of the embedding that it is tied to.
    """
    with torch.enable_grad():
        logits = head(hidden[:1].detach())  # kept: up to torch 2.11, the node of a Function ends with its tensor
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [logits.grad_fn]
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
