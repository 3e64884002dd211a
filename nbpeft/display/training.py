"""Training runs in words and as a card."""

from __future__ import annotations

from nbpeft.display import numbers
from nbpeft.display.blocks import Card, Figures, LossChart, Progress, Text, Tone, card, dim, line
from nbpeft.state import ENDED, TrainState

_TONES: dict[str, Tone] = {"failed": "error", "finished": "dim", "stopped": "dim"}


def training_card(train: TrainState, *, model_name: str = "", hint: str = "") -> Card:
    """A run: figures, progress, loss curve and what a person should know.

    Args:
        train: the run.
        model_name: what its model is called.
        hint: how to end the run, where there are no buttons.
    """
    done = min(1.0, train.step / train.total_steps) if train.total_steps else float(train.status == "finished")
    return card(
        f"training · {train.adapter}" if train.adapter else "training",
        _figures(train),
        Progress(done, train.status == "failed"),
        LossChart(train),
        line(Text(train.message, _TONES.get(train.status, "warning"))),
        line(dim(hint)),
        aside=" · ".join(part for part in (status_words(train), model_name) if part),
    )


def _figures(train: TrainState) -> Figures:
    total = f" / {train.total_steps:,}" if train.total_steps else ""
    elapsed = (numbers.clock(train.elapsed), "time")
    if train.remaining is not None and train.status not in ENDED:
        elapsed = (numbers.clock(train.remaining), f"left of {numbers.clock(train.elapsed + train.remaining)}")
    evaluated = f", step {train.eval_step:,}" if train.eval_step is not None else ""
    return Figures(
        (
            (numbers.loss(train.smoothed_loss), "loss (smoothed)", 92),
            (numbers.loss(train.eval_loss), f"eval loss{evaluated}", 96),
            (f"{train.step:,}{total}", "step" + (f" · epoch {train.epoch:.2g}" if train.epoch is not None else ""), 92),
            (numbers.rate(train.tokens_per_second), "tokens / s", 72),
            (*elapsed, 82),
            (numbers.learning_rate(train.learning_rate), "learning rate", 80),
        )
    )


def status_words(train: TrainState) -> str:
    """The status for a person."""
    return "stopping after this step" if train.status == "stopping" else train.status


def training_text(train: TrainState) -> str:
    """A run in one line of plain text."""
    total = f"/{train.total_steps}" if train.total_steps else ""
    parts = [f"{status_words(train)}: step {train.step}{total}"]
    if train.smoothed_loss is not None:
        parts.append(f"loss {numbers.loss(train.smoothed_loss)}")
    if train.eval_loss is not None:
        parts.append(f"eval loss {numbers.loss(train.eval_loss)}")
    if train.tokens_per_second is not None:
        parts.append(f"{numbers.rate(train.tokens_per_second)} tokens/s")
    if train.remaining is not None and train.status not in ENDED:
        parts.append(f"{numbers.clock(train.remaining)} left")
    else:
        parts.append(numbers.clock(train.elapsed))
    parts += [train.message] if train.message else []
    return f"training {f'{train.adapter} ' if train.adapter else ''}{' · '.join(parts)}"
