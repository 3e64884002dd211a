"""Terms that methods add to the training loss (AdaLoRA, KaSA, MonteCLoRA), each at most once.

    output = model(labels=…)       output.loss includes the terms, except in a training step of a Trainer
    model._get_kasa_loss()         returns a LossTerm; adding it to a loss that includes it already has no effect
    Trainer.training_step          adds the terms to what compute_loss returns, unless they are included

Whether a loss includes a term is read from its autograd graph, whatever was computed with the loss in between. Without
a graph (``torch.no_grad()``) that is unknown, and the term is added again. Two calls of ``backward``, one for a loss
that includes the term and one for the term, give its gradient twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.kernels.numerics import composes, summed
from nbpeft.names import IGNORED_LABEL

Key = tuple[Any, str]
"""Identifies a term: the manager, and the name of the adapter."""
_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_JOINS = {"stack", "cat", "concat", "concatenate", "hstack", "vstack"}
"""Functions that collect losses and terms in one tensor, which is then summed."""


@dataclass
class TrainerStep:
    """A training step of a Trainer, which adds the terms itself.

    Attributes:
        manager: the ``AdapterManager`` of its model.
        share: factor on each term, so that with gradient accumulation the terms count once for all batches.
        requested: whether a term was returned to the user during the step, so that the loss may include it.
    """

    manager: Any
    share: float
    requested: bool = False


# By context, because threads may train different models at the same time.
_step: ContextVar[TrainerStep | None] = ContextVar("nbpeft_trainer_step", default=None)


@contextmanager
def added_by_trainer(manager: Any, share: float) -> Iterator[TrainerStep]:
    """Context manager: the model returns losses without the terms, and the caller adds them.

    Args:
        manager: the ``AdapterManager`` of the model.
        share: factor on each term.

    Yields:
        The step.
    """
    step = TrainerStep(manager, share)
    token = _step.set(step)
    try:
        yield step
    finally:
        _step.reset(token)


def current_step(manager: Any) -> TrainerStep | None:
    """The Trainer step that is running for a manager's model, or None."""
    step = _step.get()
    return step if step is not None and step.manager is manager else None


def share_of_batch(labels: Any, items: Any, *, shifts: bool) -> Tensor | float:
    """The share of a batch in the learned tokens of all batches whose gradients are accumulated.

    Args:
        labels: labels of the batch, (rows, length).
        items: number of learned tokens in all of these batches; None if gradients are not accumulated.
        shifts: whether the model shifts labels, so that the first label of a row is not learned.

    Returns:
        A number from 0 to 1; 1.0 without ``items``.
    """
    if items is None or not isinstance(labels, Tensor) or labels.ndim < 2:
        return 1.0
    return (labels[..., int(shifts) :] != IGNORED_LABEL).sum() / items


def requested_loss(manager: Any, terms: Mapping[str, Iterable[Tensor]]) -> Tensor | float:
    """What functions with PEFT's names (``_get_kasa_loss``) return, for the user to add to a loss.

    Args:
        manager: the ``AdapterManager`` of the model.
        terms: adapter name -> its terms.

    Returns:
        Their sum as a :class:`LossTerm`; 0.0 without any.
    """
    total = marked_sum(manager, terms)
    if total is None:
        return 0.0
    step = current_step(manager)
    if step is not None:
        step.requested = True
        total = total * step.share
    return total.as_subclass(LossTerm)


def marked_sum(manager: Any, terms: Mapping[str, Iterable[Tensor]]) -> Tensor | None:
    """The sum of terms, marked in the autograd graph so that ``terms_in`` finds them in a loss.

    Args:
        manager: the ``AdapterManager`` of the model.
        terms: adapter name -> its terms.

    Returns:
        A scalar; None without any term.
    """
    sums = ((name, summed(scalars)) for name, scalars in terms.items())
    return summed(_marked(total, (manager, name)) for name, total in sums if total is not None)


class LossTerm(Tensor):
    """A part of a loss; adding it to a loss that includes it already returns that loss."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles additions and joins; every other function behaves as for an ordinary tensor."""
        name = getattr(func, "__name__", "")
        if name in _JOINS and args and not all(isinstance(part, cls) for part in args[0]):
            return func(_joined(args[0]), *args[1:], **(kwargs or {}))
        if name in _ADDITIONS and len(args) == 2 and all(isinstance(x, Tensor) for x in args):
            term, loss = args if isinstance(args[0], cls) else reversed(args)
            if not isinstance(loss, cls):
                own = terms_in(term)
                if own and own <= terms_in(loss, own):
                    return loss
                return func(*(x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def _joined(parts: Iterable[Tensor]) -> list[Tensor]:
    """The parts of a join as ordinary tensors; a term that one of the losses includes already becomes zero."""
    parts = list(parts)
    present = set[Key]().union(*(terms_in(part) for part in parts if not isinstance(part, LossTerm)))
    plain = (part.as_subclass(Tensor) if isinstance(part, LossTerm) else part for part in parts)
    return [
        part * 0 if isinstance(given, LossTerm) and (own := terms_in(given)) and own <= present else part
        for given, part in zip(parts, plain, strict=True)
    ]


class _Marked(torch.autograd.Function):
    """The identity; its node marks the term in the autograd graph of a loss."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, key: Key) -> Tensor:
        ctx.key = key
        return term.view_as(term)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _marked(term: Tensor, key: Key) -> Tensor:
    if composes() or not torch.is_grad_enabled():
        return term
    if not term.requires_grad:  # otherwise no node would be recorded
        term = term.detach().requires_grad_()
    return _Marked.apply(term, key)


def terms_in(loss: Tensor, wanted: Iterable[Key] = ()) -> set[Key]:
    """The terms that a loss includes, read from its autograd graph.

    Args:
        loss: a tensor; without a graph nothing is found.
        wanted: stop the search once these are found; if empty, search the whole graph.

    Returns:
        The keys found.
    """
    limit, found = set(wanted), set[Key]()
    waiting = deque([] if loss.grad_fn is None else [loss.grad_fn])
    seen = set(waiting)
    while waiting and not (limit and limit <= found):
        node: Any = waiting.popleft()
        if getattr(node, "_forward_cls", None) is _Marked:
            found.add(node.key)
            continue
        nodes = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= nodes
        waiting.extend(nodes)
    return found
