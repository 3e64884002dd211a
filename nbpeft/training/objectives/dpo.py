"""Direct Preference Optimization (https://arxiv.org/abs/2305.18290), with the variants of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.names import PAIRS
from nbpeft.training.objectives.objective import Completions, Objective

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHED = ("sigmoid", "robust")


@dataclass(frozen=True)
class Dpo(Objective):
    """Makes the chosen completions more likely, relative to the reference, than the rejected ones.

    Attributes:
        beta: strength of the pull towards the reference.
        loss_type: the loss of a row as a function of its margin.
        label_smoothing: probability that chosen and rejected are swapped in the data.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "dpo"
    rows: ClassVar[str] = PAIRS
    uses_reference: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-6}
    metrics: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins")

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
    disable_dropout: bool = field(default=True, metadata={"help": "Switch off dropout in the model and the adapter."})

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid, or not used by this ``loss_type``.
        """
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"beta must be greater than 0, not {self.beta!r}", field="beta")
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ConfigError(
                f"loss_type={self.loss_type!r} has no label_smoothing; {' and '.join(map(repr, _SMOOTHED))} have",
                field="label_smoothing",
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing must be at least 0 and less than 0.5, not {self.label_smoothing!r}",
                field="label_smoothing",
            )

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        rewards = [self.beta * part.log_ratios.detach() for part in (chosen, rejected)]
        return self._losses(chosen, rejected), {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "logps/chosen": chosen.log_probs.detach(),
            "logps/rejected": rejected.log_probs.detach(),
        }

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
        if not share:
            return -logsigmoid(margin)
        return -(1 - share) * logsigmoid(margin) - share * logsigmoid(-margin)
