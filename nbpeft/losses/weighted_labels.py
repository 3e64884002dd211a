"""Labels of which each counts by a weight of its own in a cross entropy, in any model's own forward.

A model shifts, pads and flattens labels in its own way before it compares them with logits. The weights go the same
way: :class:`WeightedLabels` is a tensor of labels that takes them along, and ``cross_entropy`` finds them there,
whether the logits are whole or computed in chunks. The mean of n labels is the sum of their weighted losses over
the sum of their weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nbpeft.errors import TrainingError
from nbpeft.names import LOSS_WEIGHTS

_RESHAPING: frozenset[Any] = frozenset(
    [getattr(Tensor, name) for name in ("view", "reshape", "flatten", "contiguous", "clone", "__getitem__")]
    + [torch.reshape, torch.flatten, torch.clone]
)
"""What places labels otherwise, and their weights with them."""
_MOVING: frozenset[Any] = frozenset([Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.long])
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


class WeightedLabels(Tensor):
    """Labels and their weights.

    Attributes:
        weights: float32, in the shape of the labels.
        uses: what took the weights into account; shared with all that was made of these labels.
    """

    weights: Tensor
    uses: list[str]

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor, uses: list[str] | None = None) -> WeightedLabels:
        """Returns labels that take their weights along.

        Args:
            labels: int64, of any shape.
            weights: at least 0, in the same shape.
            uses: of the labels that these are made of.
        """
        made = labels.as_subclass(cls)
        made.weights, made.uses = weights, [] if uses is None else uses
        return made

    @property
    def plain(self) -> Tensor:
        """The labels alone."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.cross_entropy:
                return _cross_entropy(*args, **kwargs)
            result = func(*_plain(args), **_plain(kwargs))
            labels = next((value for value in (*args, *kwargs.values()) if isinstance(value, WeightedLabels)), None)
            if labels is None and func is torch.cat:
                labels = next(value for value in args[0] if isinstance(value, WeightedLabels))
            weights = None if labels is None else _placed(func, labels, args, kwargs, result)
            return result if labels is None or weights is None else cls.of(_plain(result), weights, labels.uses)


def with_loss_weights(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a batch for a model whose labels count by the ``loss_weights`` beside them; one without is as it was.

    Args:
        batch: as a collator makes it.
    """
    found = dict(batch)
    weights = found.pop(LOSS_WEIGHTS, None)
    if weights is not None and found.get("labels") is not None:
        found["labels"] = WeightedLabels.of(found["labels"], weights.float())
    return found


def check_weights_used(labels: object, model: str) -> None:
    """Refuses a loss that left weights out.

    Args:
        labels: that a loss was computed of.
        model: whose loss it is.

    Raises:
        TrainingError: they are weighted, and the loss is not.
    """
    if isinstance(labels, WeightedLabels) and not labels.uses:
        raise TrainingError(
            f"the rows have weights, and the loss of {model} does not use them: leave the weights out, or give only "
            "0 and 1, which say what is learned at all"
        )


def sum_of_weights(labels: Tensor, weights: Tensor, ignore_index: int = -100) -> Tensor:
    """By what a sum over labels is divided: the weights of those that are learned."""
    return (weights * labels.ne(ignore_index)).sum()


def _cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """``cross_entropy`` of logits as a whole, weighted."""
    given = _CROSS_ENTROPY.bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    labels, reduction = values["target"], values["reduction"]
    plain = {name: _plain(value) for name, value in values.items()}
    if not isinstance(labels, WeightedLabels) or values["weight"] is not None or reduction not in ("mean", "sum"):
        return F.cross_entropy(**plain)
    losses = F.cross_entropy(**plain | {"reduction": "none"})
    weights = labels.weights.to(losses)
    labels.uses.append("cross_entropy")
    total = (losses * weights).sum()
    if reduction == "sum":
        return total
    return total / sum_of_weights(plain["target"].to(losses.device), weights, values["ignore_index"])


def _placed(
    func: Callable[..., Any], labels: WeightedLabels, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Tensor | None:
    """Returns the weights of what a function made of labels; None where it is none that places them."""
    first: Any = args[0] if args else None
    if func is torch.cat:
        parts = [
            one.weights if isinstance(one, WeightedLabels) else torch.ones_like(one, dtype=torch.float32)
            for one in first
        ]
        return torch.cat(parts, *args[1:], **kwargs)
    if first is not labels:
        return None
    if func in _RESHAPING:
        placed: Tensor = func(labels.weights, *_plain(args[1:]), **kwargs)
        return placed
    if func is F.pad:
        return F.pad(labels.weights, args[1] if len(args) > 1 else kwargs["pad"])
    return labels.weights.to(result.device) if func in _MOVING and not result.is_floating_point() else None


def _plain(values: Any) -> Any:
    return tree_map_only(WeightedLabels, lambda labels: labels.plain, values)
