"""Trainings on preferences and rewards: beside TRL's Trainers with PEFT, and DPO beside SFT on the same tokens.

Each side runs in a fresh process, and is measured as in ``rows_training``.
"""

from __future__ import annotations

import functools
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tests.benchmarks.harness import OURS, PEFT, Measure, Row, Size
from tests.benchmarks.rows_training import QUIET, VOCABULARY, adapted, base_of, in_own_process, trl

TRL_DPO, TRL_GRPO, SFT = "peft under TRL's DPOTrainer", "peft under TRL's GRPOTrainer", "nbpeft, sft"
LAYERS = 4
PAIRS, PROMPT, COMPLETION = 4, 64, (24, 96)
COPIES, GENERATED = 4, 32
STEPS = 5
OF_REWARDS: dict[str, Any] = {"num_generations": COPIES, "max_completion_length": GENERATED}


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(80)}" for _ in range(count))


def pairs(shrink: int, batches: int) -> list[dict[str, str]]:
    """Rows with a prompt and two completions, of words that are one token each; all batches have the same lengths."""
    draw = random.Random(0)
    lengths = [[draw.randint(*COMPLETION) // shrink for _ in range(2)] for _ in range(PAIRS)]
    return [
        {
            "prompt": f"{_words(draw, PROMPT // shrink)} ",
            **{name: _words(draw, count) for name, count in zip(("chosen", "rejected"), counts, strict=True)},
        }
        for _ in range(batches)
        for counts in lengths
    ]


def reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward for completions with different words."""
    return [float(len({*text.split()})) for text in completions]


def train(library: str, objective: str, *, vocabulary: int, epochs: int, shrink: int, **sizes: int) -> Any:
    """Trains and returns (peak bytes, processor seconds of a step).

    Of one epoch, these are the median without the first step; of several, the mean.
    """
    from tests.benchmarks.harness import library as imported
    from tests.benchmarks.step_costs import StepCosts
    from tests.training.trl_run import tiny_tokenizer

    base = base_of("shape", vocabulary=vocabulary, **sizes)
    source = imported(OURS if library in (OURS, SFT) else PEFT)
    model, costs, tokenizer = adapted(source, base), StepCosts(), tiny_tokenizer()
    several, steps = epochs > 1, (2 * epochs + 1 if epochs > 1 else STEPS)  # the last one is not timed
    rows = pairs(shrink, 2 if several else STEPS)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"output_dir": folder, "max_steps": steps, "use_cpu": True}
        settings["gradient_checkpointing"] = False
        settings["per_device_train_batch_size"] = {"sft": 2 * PAIRS, "grpo": 2 * COPIES}.get(objective, PAIRS)
        if objective == "grpo":
            settings |= OF_REWARDS
            rows = [{"prompt": row["prompt"]} for row in rows]
        if library not in (OURS, SFT):
            _train_with_trl(objective, model, rows, tokenizer, costs, settings)
        else:
            if objective == "sft":
                names = ("chosen", "rejected")
                rows = [{"prompt": row["prompt"], "completion": row[name]} for row in rows for name in names]
            more: dict[str, Any] = {"reward": [reward]} if objective == "grpo" else {}
            more["train_sampling_strategy"] = "sequential"
            source.train(model, rows, tokenizer=tokenizer, objective=objective, callbacks=[costs], **more, **settings)
    timed = costs.seconds[:-1]
    return costs.peak, statistics.mean(timed) if several else statistics.median(timed[1:])


def _train_with_trl(objective: str, model: Any, rows: Any, tokenizer: Any, costs: Any, settings: Any) -> None:
    import transformers
    from datasets import Dataset

    library, kind = trl(), "GRPO" if objective == "grpo" else "DPO"
    arguments = getattr(library, f"{kind}Config")(bf16=False, **settings, **QUIET)
    rewards = [[reward]] if objective == "grpo" else []
    trainer = getattr(library, f"{kind}Trainer")(
        model,
        *rewards,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[costs],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


@functools.cache
def measured(library: str, objective: str, epochs: int, size: Size) -> tuple[float, float]:
    """(peak bytes, seconds of a step); at toy size in this process, else in one of its own."""
    objective = "sft" if library == SFT else objective
    if not size.repeats:
        toy = {"hidden": size.hidden, "layers": 2, "vocabulary": 128, "epochs": epochs, "shrink": 8}
        peak, seconds = train(library, objective, **toy)
        return peak, seconds
    sizes = {"hidden": size.hidden, "layers": LAYERS, "vocabulary": VOCABULARY, "epochs": epochs, "shrink": 1}
    return in_own_process(__name__, f"train({library!r}, {objective!r}, **{sizes!r})")


def cost(objective: str, which: int, epochs: int = 1) -> Callable[[str, Size], Measure]:
    """The peak (0) or the time of a step (1)."""
    return lambda name, size: lambda: measured(name, objective, epochs, size)[which]


_COSTS: tuple[tuple[str, str, Literal["seconds", "bytes"]], ...] = (
    ("peak", "peak of a step", "bytes"),
    ("time", "that step (processor time)", "seconds"),
)


def rows_of(name: str, objective: str, title: str, rival: str, targets: tuple[float, float]) -> Iterator[Row]:
    """The rows for peak and time of a step."""
    for which, (ending, words, unit) in enumerate(_COSTS):
        measure = cost(objective, which)
        yield Row(f"{name}-{ending}", f"{words}, {title}", unit, targets[which], measure, rival=rival, repeats=1)


ROWS = [
    *rows_of("training-trl-dpo", "dpo", "DPO of 4 pairs, beside TRL", TRL_DPO, (0.45, 0.8)),
    *rows_of("training-dpo", "dpo", "DPO beside SFT on the same tokens", SFT, (1.15, 1.45)),
    Row(
        "training-dpo-epochs",
        "a step of three epochs of these",
        "seconds",
        1.2,
        cost("dpo", 1, epochs=3),
        rival=SFT,
        repeats=1,
    ),
    *rows_of("training-trl-grpo", "grpo", "GRPO of 8 completions, beside TRL", TRL_GRPO, (1.0, 1.0)),
]
