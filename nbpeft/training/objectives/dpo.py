"""Direct Preference Optimization (https://arxiv.org/abs/2305.18290), with the variants of its loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

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


@dataclass(frozen=True)
class Dpo(PairObjective):
    """Makes the chosen completions more likely, relative to the reference, than the rejected ones.

    Attributes:
        beta: strength of the pull towards the reference.
        loss_type: the loss of a row as a function of its margin.
        label_smoothing: probability that chosen and rejected are swapped in the data.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "dpo"
    uses_reference: ClassVar[bool] = True

    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the reference; for ipo its regularization."}
    )
    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": "The loss of a row as a function of its margin.",
            "choices": ("sigmoid", "hinge", "ipo", "robust"),
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability that chosen and rejected are swapped in the data; for sigmoid and robust."},
    )
    disable_dropout: bool = DROPOUT

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid, or not used by this ``loss_type``.
        """
        super().__post_init__()
        check_smoothing(self, ("sigmoid", "robust"))

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        rewards = [self.beta * part.log_ratios for part in (chosen, rejected)]
        return self._losses(chosen, rejected), curves(rewards[0], rewards[1], chosen.log_probs, rejected.log_probs)

    def _losses(self, chosen: Completions, rejected: Completions) -> Tensor:
        from torch.nn.functional import logsigmoid

        if self.loss_type == "ipo":  # per token, so that beta has the same meaning for completions of any length
            per_token = [part.log_ratios / part.token_counts for part in (chosen, rejected)]
            return (per_token[0] - per_token[1] - 1 / (2 * self.beta)) ** 2
        margin = self.beta * (chosen.log_ratios - rejected.log_ratios)
        if self.loss_type == "hinge":
            return (1 - margin).relu()
        share = self.label_smoothing
        if self.loss_type == "robust":
            return (share * logsigmoid(-margin) - (1 - share) * logsigmoid(margin)) / (1 - 2 * share)
        return smoothed_logistic(margin, share)
