"""Trains the cases of ``trl_run.py`` with nbpeft, in several ways that have to give the same curves.

``python -m tests.training.objectives.nbpeft_run`` prints the table of the guide's page on preferences: for each
objective and way the largest difference of a loss, gradient norm or curve of ten steps from the recorded ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import nbpeft
from nbpeft.training.rewards import trainer as rollouts
from nbpeft.training.rewards.rollouts import Completion
from tests.training.objectives.trl_run import (
    COPIES,
    OF_REWARDS,
    base_and_rows,
    completions_of,
    even,
    filled,
    short,
    task_of,
)
from tests.training.trl_run import tiny_tokenizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
OBJECTIVES = ("sft", "classify", "dpo", "kto", "orpo", "simpo", "cpo", "reward", "grpo")
IN_HALF = tuple(name for name in OBJECTIVES if name not in ("classify", "reward"))  # their new heads are trained
IN_TWO_PROCESSES = tuple(name for name in OBJECTIVES if name != "grpo")
RECORDED = Path(__file__).with_name("trl.json")
"""The results of ``trl_run.py`` with TRL 1.16, transformers 5.24 and torch 2.13."""
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one batch": (OBJECTIVES, {}),
    "2 batches": (OBJECTIVES, {"batches": 2}),
    "4 batches": (OBJECTIVES, {"batches": 4}),
    "checkpointing": (OBJECTIVES, {"gradient_checkpointing": True}),
    "2 processes": (IN_TWO_PROCESSES, {"processes": 2}),
    "float16": (IN_HALF, {"half": True}),
}
_OWN = {"grad_norm": "gradient norm"}
"""TRL's name of a curve -> its name in nbpeft."""


def curves(case: str, names: Any, *, batches: int = 1, half: bool = False, **more: Any) -> dict[str, list[float]]:
    """The curves of a training of a case.

    Args:
        case: one of ``trl_run.CASES``.
        names: names of the curves, as in TRL's logs.
        batches: into how many each batch of TRL is divided, whose gradients are accumulated.
        half: whether the base is in float16.
        **more: further fields of the training, such as ``processes``.
    """
    base, rows, fields = base_and_rows(case)
    parts = batches * more.get("processes", 1)
    fields["per_device_train_batch_size"] //= parts
    fields["gradient_accumulation_steps"] = batches * fields.get("gradient_accumulation_steps", 1)
    base = base.half() if half else base
    model = filled(nbpeft.get_peft_model(base, nbpeft.LoraConfig(task_type=task_of(case), **LORA))).train()
    objective = case.partition("-")[0]
    if objective == "grpo":
        rows = [{"prompt": row["prompt"]} for row in rows]
        fields |= {**OF_REWARDS, "reward": [even, short]}
    with mock.patch.object(rollouts, "generated", _given):
        result = nbpeft.train(model, rows, objective=objective, tokenizer=tiny_tokenizer(), **fields, **more)
    found = {"loss": result.state.history, **result.state.series}
    return {name: [value for _, value in found[_OWN.get(name, name)]] for name in names}


def _given(model: Any, base: Any, rows: Any, tokenizer: Any, *rest: Any) -> list[Completion]:
    """The completions that TRL has learned, instead of generated ones."""
    found = []
    for place, row in enumerate(rows):
        tokens = completions_of(row["prompt"], COPIES)[place % COPIES]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Completion(row, tuple(tokens), text, tokens[-1] == tokenizer.eos_token_id))
    return found


def worst(case: str, **how: Any) -> float:
    """The largest difference of a curve from the recorded one, relative to its largest value, or to 1."""
    theirs = json.loads(RECORDED.read_text("utf-8"))[case]
    found = curves(case, theirs, **how)
    return max(
        abs(one - other) / max(1.0, *map(abs, values))
        for name, values in theirs.items()
        for one, other in zip(found[name], values, strict=True)
    )


if __name__ == "__main__":
    print(f"| objective | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for objective in OBJECTIVES:
        figures = [f"{worst(objective, **how):.0e}" if objective in known else "–" for known, how in WAYS.values()]
        print(f"| `{objective}` | {' | '.join(figures)} |", flush=True)
