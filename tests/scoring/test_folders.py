"""Saved adapters are scored beside those of a model, and do not stay on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft import LoraConfig, PeftModel, get_peft_model, score
from nbpeft.errors import AdapterError
from tests.char_tokenizer import CharTokenizer
from tests.scoring.support import ROWS, adapted, alone, everything
from tests.tiny_models import llama, randomize, same_state


def scored(model: Any, data: Any = ROWS, **options: Any) -> Any:
    return score(model, data, **{"tokenizer": CharTokenizer(), "progress": False} | options)


def saved(folder: Path, *names: str) -> list[Path]:
    """Folders with one adapter each, whose dropout would change the answers in training mode."""
    found = []
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        model = get_peft_model(llama(), config)
        randomize(model, "default", seed + 20, 0.8)
        model.save_pretrained(folder / name / "adapter")
        found.append(folder / name / "adapter")
    return found


@pytest.mark.parametrize("bare", [False, True])
def test_adapters_in_folders_are_scored_and_not_left_on_the_model(tmp_path: Path, bare: bool) -> None:
    folders = saved(tmp_path, "one", "two", "three", "four", "v1.5")
    model = llama() if bare else adapted()
    before = None if bare else everything(model)
    modules = [name for name, _ in model.named_modules()]
    result = scored(model, metric=["exact", "loss"], folders=folders, max_new_tokens=4, adapters=None if bare else [])
    assert result.columns == ("base", "one", "two", "three", "four", "v1_5")
    assert [name for name, _ in model.named_modules()] == modules
    if before is not None:
        assert same_state(before[0], everything(model)[0]) and before[1:] == everything(model)[1:]
    else:
        assert not hasattr(model, "peft_config")
    for name, folder in zip(result.columns[1:], folders, strict=True):
        alone_with = PeftModel.from_pretrained(llama(), folder).eval()
        assert [item.answers[name] for item in result.items] == [alone(alone_with, row, 4) for row in ROWS]


def test_a_folder_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "one")
    folders = {"broken": tmp_path / "no", "one": folder}
    result = scored(adapted(), folders=folders, adapters="sql", max_new_tokens=2)
    assert len(result.items) == len(ROWS) and result.status == "finished"
    assert [len(result.values(name)) for name in ("base", "sql", "broken", "one")] == [12, 12, 0, 12]
    assert any(note.startswith("not scored: broken: ") for note in result.notes)
    assert "broken" in str(result) and "broken" in result._repr_html_()
    with pytest.raises(AdapterError, match="is the name of another column"):
        scored(adapted(), folders={"sql": folder})
    others = saved(tmp_path / "other", "sql", "sql_saved")
    twice = scored(adapted(), folders=[str(other) for other in others], max_new_tokens=2)
    assert twice.columns == ("base", "sql", "chat", "sql_saved_saved", "sql_saved"), "the saved version of an adapter"
    renamed = others[0].rename(tmp_path / "sql")
    assert scored(adapted(), folders=renamed, max_new_tokens=2).columns == ("base", "sql", "chat", "sql_saved")
    with pytest.raises(AdapterError, match="folders must be folders in a list"):
        scored(adapted(), folders=3)
