"""Where methods that learn with hooks get their turn: once per optimizer step, with the gradients still there."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim.optimizer import _global_optimizer_post_hooks

from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.training import Collator, start_run, train
from nbpeft.training.adapters.optimizer_steps import watch_steps
from tests.training.support import token_rows, trainable

Calls = list[tuple[int, bool]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(step, whether there are gradients) of each call."""
    seen: Calls = []

    def after_backward(manager: Any, step: int) -> None:
        parameters = [p for layer in manager.layers.values() for p in layer.parameters() if p.requires_grad]
        seen.append((step, all(p.grad is not None for p in parameters) and bool(parameters)))

    monkeypatch.setattr(AdapterManager, "after_backward", after_backward, raising=False)
    return seen


def test_in_a_loop_of_ones_own(calls: Calls) -> None:
    model = trainable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    before = len(_global_optimizer_post_hooks)
    with start_run(model, total_steps=2) as run:
        for _ in range(2):
            ids = torch.arange(8)[None]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            other.step()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)
    assert calls == [(0, True), (1, True)]
    optimizer.step()
    assert len(calls) == 2 and len(_global_optimizer_post_hooks) == before, "the run is over"


def test_a_watched_model_is_not_kept_and_takes_its_hook_along() -> None:
    trainable()  # the first model that is adapted brings the one hook that marks unsaved training
    before = len(_global_optimizer_post_hooks)
    model = trainable()
    held = [weakref.ref(model), weakref.ref(model.manager)]
    end = watch_steps(model, lambda: 0)
    assert len(_global_optimizer_post_hooks) == before + 1
    del model
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert len(_global_optimizer_post_hooks) == before
    end()


def test_in_train_and_in_a_trainer_with_accumulation_and_resuming(calls: Calls, tmp_path: Path) -> None:
    train(trainable(), token_rows(), max_steps=2, gradient_accumulation_steps=2)
    assert calls == [(0, True), (1, True)]
    calls.clear()
    common: dict[str, Any] = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=4, save_steps=2, **common)

    def trainer() -> Any:
        return transformers.Trainer(
            args=arguments,
            train_dataset=token_rows(),
            data_collator=Collator(copy_labels=True),
            model_init=lambda: trainable(),
        )

    trainer().train()
    assert calls == [(step, True) for step in range(4)]
    calls.clear()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert calls == [(2, True), (3, True)]
