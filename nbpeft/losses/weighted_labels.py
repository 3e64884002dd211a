"""Labels with a weight each, for a weighted cross entropy in the forward of any model.

Before the loss, each model shifts, pads and flattens the labels in its own way. :class:`WeightedLabels` is a tensor
subclass that applies the same operations to the weights, so that ``cross_entropy`` finds them, with ordinary logits or
with lazy ones. A mean is the sum of the weighted losses divided by the sum of the weights.
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
from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS

_RESHAPING: frozenset[Any] = frozenset(
    [getattr(Tensor, name) for name in ("view", "reshape", "flatten", "contiguous", "clone", "__getitem__")]
    + [torch.reshape, torch.flatten, torch.clone]
)
"""Functions that rearrange labels; they are applied to the weights too."""
_MOVING: frozenset[Any] = frozenset([Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.long])
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


class WeightedLabels(Tensor):
    """Labels with their weights.

    Attributes:
        weights: float32, in the shape of the labels.
        uses: names of the functions that used the weights; the list is shared by all labels derived from these.
    """

    weights: Tensor
    uses: list[str]

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor, uses: list[str] | None = None) -> WeightedLabels:
        """Returns labels that carry their weights.

        Args:
            labels: int64, of any shape.
            weights: at least 0, in the same shape.
            uses: the list of the labels from which these are derived; a new one by default.
        """
        weighted = labels.as_subclass(cls)
        weighted.weights, weighted.uses = weights, [] if uses is None else uses
        return weighted

    @property
    def plain(self) -> Tensor:
        """The labels as an ordinary tensor."""
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
    """Returns a batch whose ``loss_weights`` are moved into its labels; a batch without them is not changed.

    Args:
        batch: a batch from a collator.
    """
    inputs = dict(batch)
    weights = inputs.pop(LOSS_WEIGHTS, None)
    if weights is not None and inputs.get("labels") is not None:
        inputs["labels"] = WeightedLabels.of(inputs["labels"], weights.float())
    return inputs


def check_weights_used(labels: object, model: str) -> None:
    """Refuses a loss that ignored the weights of its labels.

    Args:
        labels: the labels of the loss.
        model: name of the model's class, for the message.

    Raises:
        TrainingError: the labels have weights that no function used.
    """
    if isinstance(labels, WeightedLabels) and not labels.uses:
        raise TrainingError(
            f"the rows have weights, and the loss of {model} does not use them: leave the weights out, or give only "
            "0 and 1, which select the tokens to learn"
        )


def sum_of_weights(labels: Tensor, weights: Tensor, ignore_index: int = IGNORED_LABEL) -> Tensor:
    """Returns the divisor of a weighted mean: the sum of the weights of labels that are not ignored.

    Args:
        labels: int64, of any shape.
        weights: in the same shape.
        ignore_index: value of ignored labels.
    """
    return (weights * labels.ne(ignore_index)).sum()


def _cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """Computes the weighted ``cross_entropy`` of ordinary logits."""
    call = _CROSS_ENTROPY.bind(*args, **kwargs)
    call.apply_defaults()
    values = call.arguments
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
    """Returns the weights of a function's result; None if the function does not just rearrange labels."""
    first: Any = args[0] if args else None
    if func is torch.cat:
        parts = [
            part.weights if isinstance(part, WeightedLabels) else torch.ones_like(part, dtype=torch.float32)
            for part in first
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
