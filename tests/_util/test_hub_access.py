"""A hub that does not answer is given up after one look; one that does is asked as ever."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import huggingface_hub.constants
import pytest

from nbpeft._util import hub_access
from nbpeft._util.hub_access import hub_answers, hub_options
from nbpeft.checkpoint import read_config
from nbpeft.engine.methods.shadow.network import _saved
from nbpeft.errors import CheckpointNotFoundError, ConfigError
from nbpeft.model.saving.merge_weights import meta_model
from tests.checkpoint.loopback import serving
from tests.magics.notebook import Notebook
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_known", {})
    monkeypatch.setattr(hub_access, "TIMEOUT", 0.3)


@pytest.fixture(params=["refuses", "is silent"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that refuses connections, or takes them and says nothing."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_answers_unless_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access, "TIMEOUT", PATIENCE)
    with serving() as hub:
        assert hub_answers(hub.endpoint) and hub.asked == ["HEAD /"]
        assert hub_answers(hub.endpoint) and hub.asked == ["HEAD /"], "believed for a while"
        hub_access._known.clear()
        assert hub_options("some/thing", {"endpoint": hub.endpoint}) == {}
        hub_access._known.clear()
        hub.broken = True
        assert not hub_answers(hub.endpoint)
        assert hub_options("some/thing", {"endpoint": hub.endpoint}) == {"local_files_only": True}


def test_where_no_hub_answers_only_the_cache_is_left(unreachable: str, tmp_path: Path) -> None:
    assert hub_options("some/thing", {"endpoint": unreachable}) == {"local_files_only": True}
    assert hub_options(tmp_path, {"endpoint": unreachable}) == {}


def test_nobody_is_asked_where_the_hub_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        assert hub_options("some/thing", {"endpoint": hub.endpoint, "local_files_only": True}) == {}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert hub_options("some/thing", {"endpoint": hub.endpoint}) == {}
        assert hub.asked == []


@pytest.mark.drawn(1)
def test_an_unknown_id_is_one_line(
    unreachable: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    notebook: Notebook,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", unreachable)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    notebook.do("%lora add model --name sql r=2 target_modules=q_proj")
    with caplog.at_level(logging.WARNING, logger="huggingface_hub"):
        with pytest.raises(CheckpointNotFoundError, match="the hub is offline or cannot be reached"):
            read_config("some/thing", endpoint=unreachable, cache_dir=str(tmp_path))
        loaded = notebook.run("%lora load some/thing --name b")
        planned = notebook.run("%lora plan some/base --batch-size 1 --max-length 8")
        quantized = notebook.run("%%qlora some/base --as q --name x\nbits = 4")
    assert "the hub is offline or cannot be reached" in loaded.line
    assert "cannot read the config of 'some/base'" in planned.line
    assert "no model could be loaded from 'some/base'" in quantized.line
    told = [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")]
    assert told == [], "nothing is tried again"


def test_a_config_with_a_value_of_another_type_is_one_line(tmp_path: Path, notebook: Notebook) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    reason = "Validation error for field 'hidden_size'"
    planned = notebook.run(f"%lora plan {tmp_path} --batch-size 1 --max-length 8")
    assert f"cannot read the config of '{tmp_path}': {reason}" in planned.line
    with pytest.raises(CheckpointNotFoundError, match=f"has no model config: {reason}"):
        meta_model(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot be read: {reason}"):
        _saved(str(tmp_path))
