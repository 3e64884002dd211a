"""What methods add to the loss of a training (AdaLoRA, KaSA, MonteCLoRA): each loss has it once, whoever adds it.

    output = model(labels=…)       output.loss has it, but in the step of a Trainer
    model._get_kasa_loss()         a LossTerm: a loss that has it already stays as it is when it is added
    Trainer.training_step          adds it to what compute_loss returns, where that does not have it

A loss is known to have it by its autograd graph, whatever was computed with it in between: where none is recorded
(``torch.no_grad()``), the term is added to it again. Two calls of ``backward``, one for a loss that has the term and
one for the term, give its gradient twice.
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
"""Which term it is: the manager and the name of the adapter."""
_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_JOINS = {"stack", "cat", "concat", "concatenate", "hstack", "vstack"}
"""Functions that losses and terms are put together by, to be summed then."""


@dataclass
class TrainerStep:
    """A training step of a Trainer, which adds the terms by itself.

    Attributes:
        manager: of its model.
        share: what a term is multiplied by, so that it counts once in gradients that are accumulated.
        requested: whether a term was handed out in the step, so that the loss may have it.
    """

    manager: Any
    share: float
    requested: bool = False


_step: ContextVar[TrainerStep | None] = ContextVar("nbpeft_trainer_step", default=None)


@contextmanager
def added_by_trainer(manager: Any, share: float) -> Iterator[TrainerStep]:
    """A block in which losses that a model returns are without the terms; who opens it adds them.

    Args:
        manager: of the model.
        share: of each term.
    """
    step = TrainerStep(manager, share)
    token = _step.set(step)
    try:
        yield step
    finally:
        _step.reset(token)


def current_step(manager: Any) -> TrainerStep | None:
    """The step of a Trainer that a model is in, if any."""
    step = _step.get()
    return step if step is not None and step.manager is manager else None


def share_of_batch(labels: Any, items: Any, *, shifts: bool) -> Tensor | float:
    """The share that a batch has of the learned tokens of all batches whose gradients are accumulated.

    Args:
        labels: of the batch, (rows, length).
        items: learned tokens of all of them; None for a batch alone.
        shifts: whether nothing predicts the first label of a row.
    """
    if items is None or not isinstance(labels, Tensor) or labels.ndim < 2:
        return 1.0
    share: Tensor = (labels[..., int(shifts) :] != IGNORED_LABEL).sum() / items
    return share


def requested_loss(manager: Any, terms: Mapping[str, Iterable[Tensor]]) -> Tensor | float:
    """What a function of PEFT's name (``_get_kasa_loss``) returns to be added to a loss.

    Args:
        manager: of the model.
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
    """The sum of terms, by which the graph of a loss shows that it has them; None without any.

    Args:
        manager: of the model.
        terms: adapter name -> its terms.
    """
    sums = ((name, summed(found)) for name, found in terms.items())
    return summed(_marked(total, (manager, name)) for name, total in sums if total is not None)


class LossTerm(Tensor):
    """A part of a loss; a loss that has it already stays as it is when it is added."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds it where it is lacking; all else is as for any tensor."""
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
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _joined(parts: Iterable[Tensor]) -> list[Tensor]:
    """Losses and terms that are put together: a term that one of the losses has already is zero there."""
    parts = list(parts)
    present = set[Key]().union(*(terms_in(part) for part in parts if not isinstance(part, LossTerm)))
    plain = (part.as_subclass(Tensor) if isinstance(part, LossTerm) else part for part in parts)
    return [
        part * 0 if isinstance(given, LossTerm) and (own := terms_in(given)) and own <= present else part
        for given, part in zip(parts, plain, strict=True)
    ]


class _Marked(torch.autograd.Function):
    """A term on its way into a loss, by which the graph of that loss shows that it has it."""

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
    if not term.requires_grad:  # a graph begins with what requires one
        term = term.detach().requires_grad_()
    return _Marked.apply(term, key)  # type: ignore[no-any-return, no-untyped-call]


def terms_in(loss: Tensor, wanted: Iterable[Key] = ()) -> set[Key]:
    """The terms that a loss has.

    Args:
        loss: a tensor with its graph.
        wanted: the search ends where these are found; all are found without any.
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
