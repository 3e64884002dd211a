"""Losses, norms of gradients and curves of ten steps, as TRL's Trainers with PEFT have them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.training.rewards import trainer as rollouts
from nbpeft.training.rewards.rollouts import Completion
from tests.closeness import assert_close
from tests.training.objectives.trl_run import (
    CASES,
    COPIES,
    OF_REWARDS,
    base_and_rows,
    completions_of,
    even,
    filled,
    short,
)
from tests.training.trl_run import tiny_tokenizer

torch.set_num_threads(1)
RECORDED = Path(__file__).with_name("trl.json")
"""The results of ``trl_run.py`` with TRL 1.16, transformers 5.24 and torch 2.13."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def ours(case: str, batches: int = 1) -> dict[str, list[float]]:
    """The curves of nbpeft for the training of a case, with each batch of TRL divided into several."""
    base, rows, fields = base_and_rows(case)
    fields["per_device_train_batch_size"] //= batches
    fields["gradient_accumulation_steps"] = batches * fields.get("gradient_accumulation_steps", 1)
    task = "SEQ_CLS" if case.startswith("reward") else "CAUSAL_LM"
    model = filled(nbpeft.get_peft_model(base, nbpeft.LoraConfig(task_type=task, **LORA))).train()
    logged: list[dict[str, Any]] = []

    class Keep(nbpeft.training.RunCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.extend([logs] if logs and "loss" in logs else [])

    keep = Keep(nbpeft.training.Run(model, None))
    objective = case.partition("-")[0]
    if objective == "grpo":
        rows = [{"prompt": row["prompt"]} for row in rows]
        fields |= {**OF_REWARDS, "reward": [even, short]}
    nbpeft.train(model, rows, objective=objective, tokenizer=tiny_tokenizer(), callbacks=[keep], **fields)
    return {name: [entry[name] for entry in logged if name in entry] for name in logged[0]}


def given(model: Any, base: Any, rows: Any, tokenizer: Any, *rest: Any) -> list[Completion]:
    """The completions that TRL has learned, instead of generated ones."""
    found = []
    for place, row in enumerate(rows):
        tokens = completions_of(row["prompt"], COPIES)[place % COPIES]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Completion(row, tuple(tokens), text, tokens[-1] == tokenizer.eos_token_id))
    return found


@pytest.fixture(autouse=True)
def learns_given_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "generated", given)


def same(theirs: dict[str, list[float]], found: dict[str, list[float]]) -> None:
    """Rewards, margins and KL are differences of sums of log-probabilities, which a nat is a small size for."""
    for name, values in theirs.items():
        assert_close(found[name], values, scale=max(1.0, *map(abs, values)), message=name)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_have_the_recorded_numbers_of_trl(case: str) -> None:
    same(json.loads(RECORDED.read_text("utf-8"))[case], ours(case))


@pytest.mark.parametrize("batches", [2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if "accumulated" not in case])
def test_a_batch_that_is_divided_has_the_numbers_of_the_whole_one(case: str, batches: int) -> None:
    same(json.loads(RECORDED.read_text("utf-8"))[case], ours(case, batches))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_ten_steps_have_the_numbers_of_the_installed_trl(tmp_path: Path) -> None:
    script, results = Path(__file__).with_name("trl_run.py"), tmp_path / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, str(script), str(results)], check=True, env=environment)
    for case, theirs in json.loads(results.read_text("utf-8")).items():
        same(theirs, ours(case))
