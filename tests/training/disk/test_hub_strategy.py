"""Checkpoints that are pushed to the hub while a training runs, as transformers' ``hub_strategy`` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from nbpeft import LoraConfig, PeftModel, get_peft_model, train
from nbpeft.errors import ConfigError
from tests.checkpoint.loopback import TOKEN, Hub, be_the_hub, serving
from tests.tiny_models import llama, same_state
from tests.training.support import token_rows

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as running:
        be_the_hub(running, monkeypatch, tmp_path)
        # Both have read the address of the hub when they were made. One client does its uploads in their order.
        client = HfApi(running.endpoint)
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: client, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.endpoint)
        yield running


def pushed(hub: Hub, folder: Path, strategy: str, **more: Any) -> tuple[Any, dict[str, bytes]]:
    """A model after a training with pushes, and the files of its repository."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    arguments: dict[str, Any] = {
        "max_steps": 3,
        "save_steps": 1,
        "save_strategy": "steps",
        "learning_rate": 0.01,
        "push_to_hub": True,
        "hub_model_id": "me/orders",
        "hub_strategy": strategy,
        "hub_always_push": True,
        "report_to": [],
    }
    print(train(model, token_rows(8), output_dir=str(folder / "out"), **arguments | more))
    return model, hub.files["me/orders"]


def loaded(files: dict[str, bytes], folder: Path, inside: str = "") -> PeftModel:
    """The adapter in the files of a repository, or of a folder in it."""
    folder.mkdir()
    for name in ADAPTER:
        (folder / name).write_bytes(files[f"{inside}{name}"])
    return PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_repository_has_the_trained_adapter(strategy: str, hub: Hub, tmp_path: Path) -> None:
    model, files = pushed(hub, tmp_path, strategy)
    assert files.keys() >= ADAPTER
    assert TOKEN.encode() not in b"".join(files.values())
    assert same_state(model.state_dict(), loaded(files, tmp_path / "again").state_dict())
    if strategy == "every_save":
        assert len(hub.commits) > 1, "more than the push at the end"
    places = {"checkpoint": ["last-checkpoint/"], "all_checkpoints": [f"checkpoint-{step}/" for step in (1, 2, 3)]}
    for place in places.get(strategy, []):
        assert {f"{place}{name}" for name in (*ADAPTER, "trainer_state.json", "optimizer.pt")} <= files.keys()
    if strategy == "checkpoint":
        last = loaded(files, tmp_path / "last", "last-checkpoint/")
        assert same_state(model.state_dict(), last.state_dict())


def test_a_hub_that_refuses_is_named_before_the_first_step(hub: Hub, tmp_path: Path) -> None:
    hub.accepted = set()
    with pytest.raises(ConfigError, match="push_to_hub: the hub cannot be reached"):
        pushed(hub, tmp_path, "every_save")


def test_a_hub_that_vanishes_meanwhile_does_not_cost_the_training(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            hub.broken = True

    model, files = pushed(hub, tmp_path, "every_save", callbacks=[Break()])
    assert not files, "nothing arrived"
    saved = PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert same_state(model.state_dict(), saved.state_dict())
    assert "but was not pushed to me/orders" in capsys.readouterr().out
