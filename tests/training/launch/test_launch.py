"""Training in several processes from one that waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.runs.folder import RunFolder
from nbpeft.training import train
from tests.tiny_models import VOCABULARY
from tests.training.support import trainable, weights


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


ARGUMENTS: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.01, "lr_scheduler_type": "linear"}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_on_the_same_batches(tmp_path: Path) -> None:
    alone, apart = trainable(lora_dropout=0.0), trainable(lora_dropout=0.0)
    expected = train(alone, rows(), rows(4), per_device_train_batch_size=4, **ARGUMENTS)
    states: list[Any] = []
    result = train(
        apart,
        rows(),
        rows(4),
        processes=2,
        per_device_train_batch_size=2,
        run_dir=tmp_path,
        publish=states.append,
        **ARGUMENTS,
    )
    assert result.status == "finished" and result.steps == 6
    for (step, mine), (other, theirs) in zip(result.state.history, expected.state.history, strict=True):
        assert step == other and mine == pytest.approx(theirs, abs=1e-4)
    assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-4)
    found = weights(apart)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)
    (folder,) = tmp_path.glob("default-*")
    facts = RunFolder(folder).facts()
    assert facts["status"] == "finished" and facts["step"] == 6 and facts["arguments"]["processes"] == 2
    assert [entry["step"] for entry in RunFolder(folder).entries() if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert result.state.folder == str(folder) and result.state.memory is not None
    assert {state.status for state in states} <= {"running", "finished"} and states[-1].status == "finished"
