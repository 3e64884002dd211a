"""Merging into 4 bits with rows to round by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.session import Session
from tests.tiny_models import llama, logits, randomize
from tests.training.support import token_rows

pytest.importorskip("bitsandbytes")


@pytest.fixture
def model(session: Session) -> Any:
    base = quantize_model(llama(hidden_size=64, intermediate_size=128), bits=4)
    made = session.add(base, {"r": 4, "target_modules": ["q_proj", "down_proj"]}, name="sql", variable="model").model
    randomize(made, "sql", scale=0.03)
    return made.eval()


def test_rows_decide_how_it_is_rounded(session: Session, model: Any) -> None:
    wanted = logits(model)
    plain = session.merge(model=model)
    assert "session.merge(calibrate=…) most of the adapter's effect" in str(plain)
    session.unmerge(model=model)
    rows = [{**row, "id": 1, "weight": 2} for row in token_rows(200)]
    result = session.merge("sql", model=model, calibrate=rows)
    assert result.notes[:2] == ("columns not used: 'id'", "not used: weights of the rows")
    tokens = sum(len(row["input_ids"]) for row in token_rows(128))
    assert str(result).startswith("merged 'sql' into model")
    assert f"calibrated on {tokens:,} tokens: rounding loses" in str(result)
    session.unmerge(model=model)
    assert torch.equal(logits(model), wanted)


def test_what_does_not_go_together_is_one_line(session: Session, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to and calibrate exclude each other"):
        session.merge("sql", model=model, calibrate=token_rows(4), to=tmp_path / "copy")
    with pytest.raises(TrainingError):
        session.merge("sql", model=model, calibrate=[])
    assert model.manager.merged == () and not any(tmp_path.iterdir())
