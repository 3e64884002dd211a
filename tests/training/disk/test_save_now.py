"""Adapters that are saved during a run."""

from __future__ import annotations

import os
from pathlib import Path

from nbpeft.training.disk.save_now import save_adapters
from tests.tiny_models import adapted


def test_what_was_saved_at_the_same_step_stays(tmp_path: Path) -> None:
    model = adapted()
    places = [save_adapters(model, str(tmp_path), 7, together=False, write=True) for _ in range(3)]
    assert [os.path.basename(place) for place in places] == [f"default-step-7{end}" for end in ("", "-2", "-3")]
    assert all((Path(place) / "adapter_config.json").is_file() for place in places)
