"""Kahneman-Tversky Optimization (https://arxiv.org/abs/2402.01306): completions that are good or bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.names import JUDGED
from nbpeft.training.objectives.objective import DROPOUT, Completions, Objective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kto(Objective):
    """Makes good completions more likely, relative to the reference, and bad ones less likely.

    How far the adapter is from the reference in general (the curve ``kl``) is estimated in each step from
    completions of other rows: the prompt of a row is followed by the completion of the row before it.

    Attributes:
        beta: strength of the pull towards the reference.
        desirable_weight: factor on the losses of good completions.
        undesirable_weight: factor on the losses of bad completions.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "kto"
    rows: ClassVar[str] = JUDGED
    uses_reference: ClassVar[bool] = True
    learns_second: ClassVar[bool] = False
    rate_factor: ClassVar[float] = 0.1
    metrics: ClassVar[tuple[str, ...]] = ("rewards/margins", "kl")

    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference."})
    desirable_weight: float = field(default=1.0, metadata={"help": "Factor on the losses of good completions."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Factor on the losses of bad completions."})
    disable_dropout: bool = DROPOUT

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid.
        """
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"beta must be greater than 0, not {self.beta!r}", field="beta")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)!r}", field=name)

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and its curves.

        Args:
            chosen: the completions, with their labels.
            rejected: completions of other rows, without gradients.
        """
        assert chosen.desirable is not None
        good, ratios = chosen.desirable.bool(), chosen.log_ratios
        kl = rejected.log_ratios.mean().clamp(min=0).detach()
        margin = self.beta * (ratios - kl)
        losses = 1 - margin.where(good, -margin).sigmoid()
        weights = ratios.new_full(ratios.shape, self.undesirable_weight).masked_fill(good, self.desirable_weight)
        rewards, log_probs = self.beta * ratios.detach(), chosen.log_probs.detach()
        found = {"kl": kl.reshape(1)}
        for name, values in (("rewards", rewards), ("logps", log_probs)):
            found |= {f"{name}/chosen": values[good], f"{name}/rejected": values[~good]}
        return weights * losses, found

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """The margin between good and bad completions, if there are both.

        Args:
            means: the means of the curves.
        """
        good, bad = means.get("rewards/chosen"), means.get("rewards/rejected")
        return {} if good is None or bad is None else {"rewards/margins": good - bad}
