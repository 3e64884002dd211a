"""Reward models: a classifier of texts with one label, whose logit is the reward of a text (Bradley-Terry)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.names import SCORED_PAIRS
from nbpeft.training.objectives.objective import DROPOUT, Completions, PairObjective, curves

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reward(PairObjective):
    """Gives the chosen completions a greater reward than the rejected ones, by the row's ``margin`` if it has one.

    Attributes:
        center_rewards_coefficient: factor on the squared sum of both rewards, which keeps them around 0.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "reward"
    rows: ClassVar[str] = SCORED_PAIRS
    scores: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 0.3

    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "Factor on the squared sum of both rewards, which keeps them around 0."}
    )
    disable_dropout: bool = DROPOUT

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid.
        """
        super().__post_init__()
        if self.center_rewards_coefficient < 0:
            raise ConfigError(
                f"center_rewards_coefficient must be at least 0, not {self.center_rewards_coefficient!r}",
                field="center_rewards_coefficient",
            )

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the chosen completions; their ``log_probs`` are rewards.
            rejected: the rejected completion of each row.
        """
        from torch.nn.functional import logsigmoid

        rewards = chosen.log_probs, rejected.log_probs
        margin = rewards[0] - rewards[1]
        losses = -logsigmoid(margin if chosen.margins is None else margin - chosen.margins)
        found = curves(rewards[0], rewards[1], *rewards)
        return losses + self.center_rewards_coefficient * (rewards[0] + rewards[1]) ** 2, {
            name: values for name, values in found.items() if name.startswith("rewards/")
        }
