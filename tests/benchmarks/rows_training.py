"""A training as a whole: peft under transformers' Trainer or TRL's, and ``nbpeft.train``, on the same rows.

Each side runs in a fresh process. Peaks are exact: what is there before a step, and the most that torch allocated in
it beside that. Times are of the processor, so that a busy machine does not count.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tests.benchmarks.harness import OURS, PEFT, Measure, Row, Size

TRL = "peft under TRL's SFTTrainer"


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
BASES = {
    "shape": "SmolLM2's shape with 8 layers",
    "nf4": "the same in nf4",
    "smollm2": "SmolLM2-135M itself",
}
VOCABULARY = 49152
QUIET = {
    **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False},
    "logging_steps": 1,
}
"""Arguments of a Trainer that is only measured."""
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


def base_of(kind: str, *, hidden: int, layers: int, vocabulary: int) -> Any:
    """The model to adapt: one of ``BASES``."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    if kind == "smollm2":
        from tests.smollm2 import source

        read = AutoModelForCausalLM.from_pretrained(source().parent, gguf_file=source().name, dtype=torch.float32)
        fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        plain: Any = LlamaForCausalLM(
            LlamaConfig(**fields)
        )  # transformers' Trainer takes none that were read from GGUF
        plain.load_state_dict(read.state_dict())
        return plain
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
    base: Any = LlamaForCausalLM(config)
    if kind != "nf4":
        return base
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        stored: Any = BitsAndBytesConfig(load_in_4bit=True, **how)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=stored, dtype=torch.float32)


def adapted(source: Any, base: Any) -> Any:
    """A model with LoRA on all linear layers.

    Args:
        source: peft or nbpeft.
        base: the model to adapt.
    """
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return source.get_peft_model(base, source.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))


def trl() -> Any:
    """TRL, from the folder of packages that are tested and not installed."""
    from tests.clients.packages import installed

    sys.path.append(str(installed("trl==1.16.0")))
    return importlib.import_module("trl")


def train(library: str, case: Rows, kind: str, *, vocabulary: int, steps: int, shrink: int, **sizes: int) -> Any:
    """Trains and returns (peak bytes, median seconds of a step)."""
    from nbpeft.training import Collator
    from tests.benchmarks.harness import library as imported
    from tests.benchmarks.step_costs import StepCosts

    base = base_of(kind, vocabulary=vocabulary, **sizes)
    source = imported(OURS if library == OURS else PEFT)
    model, costs = adapted(source, base), StepCosts()
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
            _train_with_trainer(library, model, rows, costs, settings)
    return costs.peak, statistics.median(costs.seconds[1:-1] or costs.seconds)


def _train_with_trainer(library: str, model: Any, rows: Any, costs: Any, settings: dict[str, Any]) -> None:
    import transformers

    from nbpeft.training import Collator

    settings |= QUIET | {"learning_rate": 2e-4}
    trainer: Any
    if library == TRL:
        from datasets import Dataset

        from tests.training.trl_run import tiny_tokenizer

        library_of_trl = trl()
        arguments = library_of_trl.SFTConfig(bf16=False, **settings)
        own = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
        trainer = library_of_trl.SFTTrainer(model=model, args=arguments, callbacks=[costs], **own)
    else:
        own = {"train_dataset": rows, "data_collator": Collator(copy_labels=True)}
        trainer = transformers.Trainer(
            model=model, args=transformers.TrainingArguments(**settings), callbacks=[costs], **own
        )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def in_own_process(module: str, call: str) -> tuple[float, float]:
    """(peak bytes, seconds of a step) that a call returns in a fresh process, with the names of a module."""
    code = f"import json; from {module} import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


@functools.cache
def measured(library: str, case: str, kind: str, size: Size) -> tuple[float, float]:
    """(peak bytes, seconds of a step); at toy size in this process, else in one of its own."""
    if not size.repeats:
        sizes = {"hidden": size.hidden, "layers": 2, "vocabulary": 64, "steps": 2, "shrink": 8}
        peak, seconds = train(library, CASES[case], "shape" if kind == "smollm2" else kind, **sizes)
        return peak, seconds
    sizes = {"hidden": size.hidden, "layers": LAYERS, "vocabulary": VOCABULARY, "shrink": 1}
    sizes["steps"] = max(3, 2 + round(3 * size.repeats))
    return in_own_process(__name__, f"train({library!r}, CASES[{case!r}], {kind!r}, **{sizes!r})")


def cost(case: str, kind: str, which: int) -> Callable[[str, Size], Measure]:
    """The peak (0) or the time of a step (1)."""
    return lambda name, size: lambda: measured(name, case, kind, size)[which]


def rows_of(
    case: str, kind: str = "shape", rival: str = PEFT, targets: tuple[float, float] | None = None
) -> Iterator[Row]:
    """The rows for peak and time of a step."""
    most = targets or CASES[case].targets
    name = "-".join(["training", *({"shape": []}.get(kind, [kind])), *(["trl"] if rival == TRL else []), case])
    where = f", {BASES[kind]}" if kind != "shape" else ""
    beside = ", beside TRL" if rival == TRL else ""
    for which, (ending, words, unit) in enumerate(_COSTS):
        title = f"{words}, {CASES[case].title}{where}{beside}"
        measure = cost(case, kind, which)
        yield Row(f"{name}-{ending}", title, unit, most[which], measure, rival=rival, repeats=1)


_COSTS: tuple[tuple[str, str, Literal["seconds", "bytes"]], ...] = (
    ("peak", "peak of a training step", "bytes"),
    ("time", "a training step (processor time)", "seconds"),
)
ROWS = [
    *(row for case in CASES for row in rows_of(case)),
    *(row for case in ("short", "long") for row in rows_of(case, "smollm2")),
    *(row for case in ("short", "long") for row in rows_of(case, "nf4")),
    *(row for case in ("short", "long") for row in rows_of(case, rival=TRL, targets=(1.0, 1.0))),
]
