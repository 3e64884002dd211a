"""Contrastive Preference Optimization (https://arxiv.org/abs/2401.08417) and SimPO (https://arxiv.org/abs/2405.14734)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.training.objectives.objective import (
    DROPOUT,
    Completions,
    PairObjective,
    check_smoothing,
    curves,
    smoothed_logistic,
)

if TYPE_CHECKING:
    from torch import Tensor

_AVERAGED = ("ipo", "simpo")
"""Values of ``loss_type`` with log-probabilities averaged over the tokens of a completion."""


@dataclass(frozen=True)
class Cpo(PairObjective):
    """Makes the chosen completions more likely, and more likely than the rejected ones, without a reference.

    Attributes:
        beta: factor on the margin of the log-probabilities.
        loss_type: the loss of a row as a function of its margin.
        label_smoothing: probability that chosen and rejected are swapped in the data.
        cpo_alpha: factor on the next-token loss of the chosen completions.
        simpo_gamma: the margin that ``loss_type="simpo"`` aims at.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "cpo"

    beta: float = field(default=0.1, metadata={"help": "Factor on the margin of the log-probabilities."})
    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": "The loss of a row as a function of its margin.",
            "choices": ("sigmoid", "hinge", "ipo", "simpo"),
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability that chosen and rejected are swapped in the data; for sigmoid and simpo."},
    )
    cpo_alpha: float = field(default=1.0, metadata={"help": "Factor on the next-token loss of the chosen completions."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "The margin that simpo aims at."})
    disable_dropout: bool = DROPOUT

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid, or not used by this ``loss_type``.
        """
        super().__post_init__()
        check_smoothing(self, ("sigmoid", "simpo"))
        if self.cpo_alpha < 0:
            raise ConfigError(f"cpo_alpha must be at least 0, not {self.cpo_alpha!r}", field="cpo_alpha")
        if "simpo_gamma" in self.changed() and self.loss_type != "simpo":
            raise ConfigError(f"loss_type={self.loss_type!r} has no simpo_gamma; 'simpo' has one", field="simpo_gamma")

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        averaged = self.loss_type in _AVERAGED
        parts = [part.averages if averaged else part.log_probs for part in (chosen, rejected)]
        losses = self._losses(parts[0] - parts[1])
        if self.cpo_alpha:  # per token of all rows
            losses = losses - self.cpo_alpha * chosen.log_probs / chosen.mean_count
        return losses, curves(self.beta * parts[0], self.beta * parts[1], *parts)

    def _losses(self, margin: Tensor) -> Tensor:
        if self.loss_type == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "hinge":
            return (1 - self.beta * margin).relu()
        aim = self.simpo_gamma if self.loss_type == "simpo" else 0.0
        return smoothed_logistic(self.beta * margin - aim, self.label_smoothing)


@dataclass(frozen=True)
class Simpo(Cpo):
    """Makes the chosen completions more likely per token than the rejected ones, by a margin, without a reference."""

    name: ClassVar[str] = "simpo"

    loss_type: str = field(default="simpo", metadata={"help": "Only simpo.", "choices": ("simpo",)})
    cpo_alpha: float = field(default=0.0, metadata={"help": "Factor on the next-token loss of the chosen completions."})
