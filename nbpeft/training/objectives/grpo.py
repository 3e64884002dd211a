"""Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300), with the variants of its loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.errors import ConfigError
from nbpeft.names import PROMPTS
from nbpeft.training.objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

_LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
_LITTLE = 1e-4
"""What is added to a standard deviation by which rewards are divided."""


@dataclass(frozen=True)
class Generated:
    """Completions of one batch, and what their loss is computed from; (rows, tokens) unless it says otherwise.

    Attributes:
        log_probs: the log-probability of each token.
        earlier: the same when the completions were generated, without gradients.
        reference: the same of the reference, without gradients; None if ``beta`` is 0.
        mask: 1 for the tokens of completions, and else 0.
        advantages: the advantage of each completion, (rows,).
        share: the number of tokens, and of completions, of a step, each divided by its number of batches, (2,).
    """

    log_probs: Tensor
    earlier: Tensor
    reference: Tensor | None
    mask: Tensor
    advantages: Tensor
    share: Tensor


@dataclass(frozen=True)
class Grpo(Objective):
    """Makes completions more likely whose reward is greater than that of other completions of the same prompt.

    Attributes:
        num_generations: completions of each prompt.
        max_completion_length: the greatest number of tokens of a completion.
        temperature: what the logits are divided by when completions are drawn.
        top_p: draw from the most likely tokens whose probabilities add up to this.
        top_k: draw from this many most likely tokens; 0 for all.
        min_p: draw only tokens that are at least this likely, relative to the most likely one.
        repetition_penalty: factor against tokens that occurred already; 1 for none.
        beta: factor on the divergence (KL) from the reference; without it there is no reference.
        use_bias_correction_kl: whether the divergence is weighted by the ratio of the probabilities.
        num_iterations: steps that learn the same completions.
        epsilon: how far a ratio of probabilities below 1 counts.
        epsilon_high: how far a ratio above 1 counts; ``epsilon`` by default.
        importance_sampling_level: whether ratios are of tokens or of whole completions.
        loss_type: what the sum over tokens is divided by.
        scale_rewards: of which rewards the standard deviation is what advantages are divided by.
        reward_weights: the factor on each reward; 1 by default.
        mask_truncated_completions: whether completions without an end are not learned.
        disable_dropout: whether all dropout is off, in the model and in the adapter.
    """

    name: ClassVar[str] = "grpo"
    rows: ClassVar[str] = PROMPTS
    uses_reference: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 0.1
    metrics: ClassVar[tuple[str, ...]] = ("reward",)

    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt.", "least": 2})
    max_completion_length: int = field(
        default=512, metadata={"help": "The greatest number of tokens of a completion.", "least": 1}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "What the logits are divided by when completions are drawn."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Draw from the most likely tokens whose probabilities add up to this."}
    )
    top_k: int = field(default=0, metadata={"help": "Draw from this many most likely tokens; 0 for all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Draw only tokens that are at least this likely, relative to the most likely one."},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Factor against tokens that occurred already; 1 for none."}
    )
    beta: float = field(
        default=0.0, metadata={"help": "Factor on the divergence (KL) from the reference; 0 for no reference."}
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Weight the divergence by the ratio of the probabilities."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Steps that learn the same completions.", "least": 1})
    epsilon: float = field(default=0.2, metadata={"help": "How far a ratio of probabilities below 1 counts."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "How far a ratio above 1 counts; epsilon by default."}
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={"help": "Whether ratios are of tokens or of whole completions.", "choices": ("token", "sequence")},
    )
    loss_type: str = field(
        default="dapo", metadata={"help": "What the sum over tokens is divided by.", "choices": _LOSSES}
    )
    scale_rewards: str | bool = field(
        default="group",
        metadata={
            "help": "Of which rewards the standard deviation is what advantages are divided by.",
            "choices": ("group", "batch", "none", True, False),
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "The factor on each reward; 1 by default.", "listed": True}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not learn completions that were cut at max_completion_length."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Switch off dropout in the model and the adapter."})

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value is invalid.
        """
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):  # as TRL takes it, too
            object.__setattr__(self, "scale_rewards", "group" if self.scale_rewards else "none")
        for name, value, valid, wanted in (
            ("temperature", self.temperature, self.temperature > 0, "greater than 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("min_p", self.min_p, 0 <= (self.min_p or 0) <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "greater than 0"),
            ("beta", self.beta, self.beta >= 0, "at least 0"),
            ("epsilon", self.epsilon, 0 <= self.epsilon < 1, "at least 0 and less than 1"),
            ("epsilon_high", self.epsilon_high, (self.epsilon_high or 0) >= 0, "at least 0"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {wanted}, not {value!r}", field=name)
        if self.beta == 0 and not self.use_bias_correction_kl:
            raise ConfigError(
                "use_bias_correction_kl is for the divergence from a reference: leave it out, or set beta",
                field="use_bias_correction_kl",
            )

    @property
    def reference_needed(self) -> bool:
        """Whether there is a divergence from the reference."""
        return self.beta != 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of ``generate`` with which completions are drawn."""
        least = {} if self.min_p is None else {"min_p": self.min_p}
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {"do_sample": True, **{name: getattr(self, name) for name in names}, **least}

    def advantages(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Compares the rewards of the completions of each prompt.

        Args:
            rewards: of each completion and function, (prompts x num_generations, functions); NaN where a function gave
                none.

        Returns:
            The advantage of each completion, 0 for those without any reward; and its whole reward, NaN without any.
        """
        import torch

        weights = torch.tensor(self.reward_weights or [1.0] * rewards.shape[1], dtype=rewards.dtype)
        whole = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
        groups = whole.view(-1, self.num_generations)
        found = groups - groups.nanmean(1, keepdim=True)
        if self.scale_rewards != "none":
            spread = deviation(groups) if self.scale_rewards == "group" else deviation(groups.reshape(1, -1))
            found = found / (spread + _LITTLE)
        return found.flatten().nan_to_num(0.0), whole

    def loss_of(self, batch: Generated) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of a batch of completions, and its curves.

        Args:
            batch: the completions.
        """
        mask, advantages = batch.mask, batch.advantages.unsqueeze(1)
        changes = batch.log_probs - batch.earlier
        if self.importance_sampling_level == "sequence":
            changes = ((changes * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)
        ratios = changes.exp()
        least, most = 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        each = -(ratios * advantages).minimum(ratios.clamp(least, most) * advantages)
        cut = ((ratios < least) & (advantages < 0)) | ((ratios > most) & (advantages > 0))
        curves = {"clip_ratio/region_mean": _learned(cut.float(), mask)}
        if batch.reference is not None:
            away = batch.reference - batch.log_probs
            divergence = away.exp() - away - 1
            divergence = divergence * ratios if self.use_bias_correction_kl else divergence
            each = each + self.beta * divergence
            curves["kl"] = _learned(divergence, mask)
        return self._summed(each * mask, batch), curves

    def _summed(self, losses: Tensor, batch: Generated) -> Tensor:
        tokens, completions = batch.share[0], batch.share[1]
        if self.loss_type == "grpo":
            return (losses.sum(1) / batch.mask.sum(1).clamp(min=1)).sum() / completions
        if self.loss_type == "dr_grpo":
            return losses.sum() / (completions * self.max_completion_length)
        return losses.sum() / tokens  # bnpo divides by the tokens of a batch, dapo of a step, which is one here


def deviation(values: Tensor) -> Tensor:
    """The standard deviation of each row, (rows, 1), without NaN; 0 for a row with fewer than two numbers.

    Args:
        values: (rows, columns).
    """
    known = ~values.isnan()
    count = known.sum(1, keepdim=True)
    apart = (values - values.nanmean(1, keepdim=True)).nan_to_num(0.0)
    return (apart.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _learned(values: Tensor, mask: Tensor) -> Tensor:
    """The values of the tokens of a mask, without gradients; ``values`` may have one column for all tokens."""
    return values.detach()[:, 0] if values.shape[1] == 1 != mask.shape[1] else values.detach()[mask.bool()]
