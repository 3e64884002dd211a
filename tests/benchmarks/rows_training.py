"""A training as a whole: peft under transformers' Trainer, and ``nbpeft.train``, on the same rows.

Each side runs in a fresh process. Peaks are exact: what is there before a step, and the most that torch allocated in
it beside that. Times are of the processor, so that a busy machine does not count.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.harness import OURS, Measure, Row, Size


@dataclass(frozen=True)
class Rows:
    """What is learned in a step.

    Attributes:
        title: for a person.
        lengths: tokens of the shortest and the longest row.
        count: rows.
        learned: share of each row's tokens that is learned, its last ones.
        checkpointing: whether activations are computed again.
        targets: most that ours / theirs may be: peak and time.
    """

    title: str
    lengths: tuple[int, int]
    count: int
    learned: float
    checkpointing: bool
    targets: tuple[float, float]


CASES = {
    "short": Rows("8 rows of 24 to 160 tokens, loss on the last quarter", (24, 160), 8, 0.25, False, (0.40, 0.75)),
    "long": Rows("2 rows of 512, loss on all", (512, 512), 2, 1.0, False, (0.40, 0.95)),
    "checkpointed": Rows("2 rows of 512, loss on half, checkpointing", (512, 512), 2, 0.5, True, (0.30, 0.90)),
}
VOCABULARY = 49152
LAYERS = 8


def token_rows(case: Rows, vocabulary: int, shrink: int) -> list[dict[str, list[int]]]:
    """Rows of drawn tokens, those that are not learned labelled -100."""
    draw = random.Random(0)
    rows = []
    for _ in range(case.count):
        length = draw.randint(*case.lengths) // shrink
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        unlearned = length - max(1, int(length * case.learned))
        rows.append({"input_ids": ids, "labels": [-100] * unlearned + ids[unlearned:]})
    return rows


def train(library: str, case: Rows, *, hidden: int, layers: int, vocabulary: int, steps: int, shrink: int) -> Any:
    """Trains and returns (peak bytes, median seconds of a step)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nbpeft.training import Collator
    from tests.benchmarks.harness import library as imported
    from tests.benchmarks.step_costs import StepCosts

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    source = imported(library)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = source.get_peft_model(base, source.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    costs = StepCosts()
    rows = token_rows(case, vocabulary, shrink)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": case.count,
            "max_steps": steps,
            "gradient_checkpointing": case.checkpointing,
            "use_cpu": True,
        }
        if library == OURS:
            source.train(model, rows, callbacks=[costs], data_collator=Collator(copy_labels=True), **settings)
        else:
            _train_with_trainer(model, rows, costs, Collator(copy_labels=True), settings)
    return costs.peak, statistics.median(costs.seconds[1:-1] or costs.seconds)


def _train_with_trainer(model: Any, rows: Any, costs: Any, collator: Any, settings: dict[str, Any]) -> None:
    import transformers

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(learning_rate=2e-4, logging_steps=1, **quiet, **settings)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[costs]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


@functools.cache
def measured(library: str, case: str, size: Size) -> tuple[float, float]:
    """(peak bytes, seconds of a step); at toy size in this process, else in one of its own."""
    if not size.repeats:
        sizes = {"hidden": size.hidden, "layers": 2, "vocabulary": 64, "steps": 2, "shrink": 8}
        peak, seconds = train(library, CASES[case], **sizes)
        return peak, seconds
    sizes = {"hidden": size.hidden, "layers": LAYERS, "vocabulary": VOCABULARY, "shrink": 1}
    sizes["steps"] = max(3, 2 + round(3 * size.repeats))
    code = (
        "import json; from tests.benchmarks.rows_training import CASES, train; "
        f"print(json.dumps(train({library!r}, CASES[{case!r}], **{sizes!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


def cost(case: str, which: int) -> Callable[[str, Size], Measure]:
    """The peak (0) or the time of a step (1)."""
    return lambda name, size: lambda: measured(name, case, size)[which]


ROWS = [
    Row(f"training-{name}-{kind}", f"{words}, {case.title}", unit, case.targets[which], cost(name, which), repeats=1)
    for name, case in CASES.items()
    for which, (kind, words, unit) in enumerate(
        [("peak", "peak of a training step", "bytes"), ("time", "a training step (processor time)", "seconds")]
    )
]
