"""Shipping through the session: what is written, what the result says, and the tokenizer it finds by itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import AdapterError, CheckpointError, ConfigError
from nbpeft.session import Session, ShipResult
from tests.session.support import everything
from tests.shipping.support import base_model, tokenizer
from tests.tiny_models import randomize, same_state


@pytest.fixture
def adapted(session: Session) -> Any:
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = session.add(base_model(), fields, name="sql", variable="model").model
    randomize(model, "sql")
    return model


def test_a_folder_for_vllm(session: Session, adapted: Any, tmp_path: Path) -> None:
    before = everything(adapted)
    result = session.ship("sql", engine="vllm", to=tmp_path / "served")
    assert isinstance(result, ShipResult) and result.written and not result.merged
    assert str(result).startswith(
        f"shipped 'sql' for vLLM 0.26, as an adapter (4.1 kB) to {tmp_path / 'served'}; start it with: "
    )
    html = result._repr_html_()
    assert "sql · shipped for vllm" in html and "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8" in html
    assert same_state(everything(adapted), before)
    assert session.load(tmp_path / "served", name="again", model="model").adapter.name == "again"


def test_sizes_come_before_files(session: Session, adapted: Any, tmp_path: Path) -> None:
    planned = session.ship(engine="transformers", merged=True, to=tmp_path / "served", dry_run=True)
    assert not planned.written and not list(tmp_path.iterdir())
    assert str(planned).startswith("would ship 'sql' for transformers 5.24, merged into its base in bf16 (")
    done = session.ship(engine="transformers", merged=True, to=tmp_path / "served")
    assert done.byte_count == planned.byte_count
    written = (tmp_path / "served" / "model.safetensors").stat().st_size
    assert planned.byte_count < written < planned.byte_count + 4096


def test_the_tokenizer_of_the_last_command_is_used(session: Session, adapted: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give it \(tokenizer=…\)"):
        session.ship(engine="ollama", to=tmp_path / "served")
    session.context.tokenizers[adapted.get_base_model()] = tokenizer()
    result = session.ship(engine="ollama", to=tmp_path / "served")
    assert {path.name for path in (tmp_path / "served").iterdir()} == {"Modelfile", "model.gguf"}
    assert result.merged and result.commands[1] == "ollama run sql"


def test_refusals(session: Session, adapted: Any, tmp_path: Path) -> None:
    session.add(adapted, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}, name="dora")
    before = everything(adapted)
    with pytest.raises(AdapterError, match=r"has several adapters; name the one to ship \(name=…\): sql, dora"):
        session.ship(engine="vllm", to=tmp_path / "served")
    with pytest.raises(AdapterError, match=r"vLLM 0.26 cannot load the adapter: DoRA on 2 layers"):
        session.ship("dora", engine="vllm", to=tmp_path / "served")
    with pytest.raises(AdapterError, match="Adapter 'sq' not found"):
        session.ship("sq", engine="vllm", to=tmp_path / "served")
    with pytest.raises(AdapterError, match="needs the name of an adapter, not 3"):
        session.ship(3, engine="vllm", to=tmp_path / "served")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="already exists"):
        session.ship("sql", engine="vllm", to=tmp_path / "file")
    assert same_state(everything(adapted), before) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_by_default_the_folder_is_named_after_both(
    session: Session, adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = session.ship(engine="llama.cpp")
    assert str(result.folder) == "sql-llama.cpp" and (tmp_path / "sql-llama.cpp" / "adapter.gguf").is_file()
