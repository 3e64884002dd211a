"""Odds Ratio Preference Optimization (https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.training.objectives.objective import DROPOUT, Completions, PairObjective, curves

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Orpo(PairObjective):
    """The next-token loss of prompt and chosen completion, and the odds of the chosen one against the rejected one.

    Attributes:
        beta: factor on the loss of the odds.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "orpo"
    learns_prompts: ClassVar[bool] = True

    beta: float = field(default=0.1, metadata={"help": "Factor on the loss of the odds."})
    disable_dropout: bool = DROPOUT

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid.
        """
        super().__post_init__()
        if self.beta < 0:
            raise ConfigError(f"beta must be at least 0, not {self.beta!r}", field="beta")

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        from torch.nn.functional import logsigmoid

        assert chosen.prompts is not None
        parts = chosen.averages, rejected.averages
        odds = parts[0] - parts[1] - (_log1mexp(parts[0]) - _log1mexp(parts[1]))
        prompts = chosen.prompts
        likelihood = (chosen.log_probs + prompts.log_probs) / (chosen.mean_count + prompts.mean_count)
        return -likelihood - self.beta * logsigmoid(odds), curves(self.beta * parts[0], self.beta * parts[1], *parts)


def _log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of negative numbers, without loss of precision near 0 and far from it."""
    import torch

    near = values > -0.6931472
    return torch.where(near, (-torch.expm1(torch.where(near, values, -1.0))).log(), (-values.exp()).log1p())
