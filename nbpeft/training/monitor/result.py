"""The result of a training, for the output of a cell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbpeft.display import numbers
from nbpeft.display.blocks import Line, bold, line
from nbpeft.display.shown import Shown
from nbpeft.display.training import headline_words
from nbpeft.state import TrainState


@dataclass(frozen=True)
class TrainResult(Shown):
    """How a training ended. Contains only numbers and text, so it keeps no tensors alive in ``Out``."""

    status: Literal["finished", "stopped"]
    adapter: str
    steps: int
    total_steps: int | None
    loss: float | None
    """Loss of the last step that was logged, as the Trainer reports it."""
    eval_loss: float | None
    seconds: float
    """Time spent training and evaluating, without pauses."""
    token_count: int
    tokens_per_second: float | None
    output_dir: str | None
    """Folder with the adapter and its checkpoints; None if ``output_dir`` was not given."""
    state: TrainState = field(repr=False)
    """The run's last state, with its curves."""
    objective: str = "sft"
    """What was minimized."""
    reference: str | None = None
    """What the objective compared the adapter with; None if it has no reference."""
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict, repr=False)
    """The Trainer's metrics of the whole run."""
    train_loss: float | None = None
    """Mean loss over all steps of this run."""
    held_out: tuple[int, ...] = field(default=(), repr=False)
    """Numbers of the rows of the data that were held out for evaluation, 0 for the first row; empty if there are none,
    if each adapter had rows of its own, or if the numbers are not known, as in a stream."""
    shown: Literal["", "text", "card"] = field(default="", repr=False, compare=False)
    """How a front end has shown the run's last state, whose content is then not repeated below it."""

    @property
    def kept_step(self) -> int | None:
        """The step whose weights were restored after divergence; else None."""
        return self.state.kept_step

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, or None."""
        return self.state.best_step

    def __str__(self) -> str:
        return " · ".join(self._parts())

    def __repr__(self) -> str:
        return f"TrainResult({' · '.join(self._parts(message=not self.shown))})"

    def _ipython_display_(self) -> None:
        if self.shown != "card":
            raise NotImplementedError  # IPython then shows it like any other object
        object.__setattr__(self, "shown", "")  # a later display has no card above it

    def view(self) -> Line:
        """The same as ``str``, with the adapter and status in bold."""
        first, *others = self._parts(message=not self.shown)
        return line(bold(first), *(f"· {part}" for part in others))

    def _parts(self, *, message: bool = True) -> list[str]:
        steps = (
            f"{self.steps:,}" if self.total_steps in (None, self.steps) else f"{self.steps:,} of {self.total_steps:,}"
        )
        noun = "step" if (self.total_steps or self.steps) == 1 else "steps"
        parts = [f"{self.adapter or 'model'} {self.status}", f"{steps} {noun}", _duration(self.seconds)]
        parts += headline_words(self.state, None)
        tells = "loss" in self.state.headline
        if tells and self.loss is not None:
            mean = f" (mean {numbers.loss(self.train_loss)})" if self.train_loss is not None else ""
            parts.append(f"loss {numbers.loss(self.loss)}{mean}")
        if tells and self.eval_loss is not None:
            best = self.best_step
            at = f" (best at step {best:,})" if best is not None and best != self.state.eval_step else ""
            parts.append(f"eval loss {numbers.loss(self.eval_loss)}{at}")
        parts += [f"{name} {numbers.metric(value)}" for name, value in self.state.metrics.items()]
        if self.tokens_per_second is not None:
            parts.append(f"{numbers.rate(self.tokens_per_second)} tokens/s")
        if self.output_dir is not None:
            parts.append(f"saved in {self.output_dir}")
        if message and self.status != "stopped":
            parts.append(self.message)
        elif message:  # the rest of the message repeats that the run was stopped
            parts += (*self.state.errors, *self.state.warnings)
        return [part for part in parts if part]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
