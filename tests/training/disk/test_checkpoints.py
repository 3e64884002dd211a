"""Checkpoints that are whole or not there, and a run that goes on from the last whole one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

from nbpeft.checkpoint import atomic
from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from nbpeft.training import Collator, Trainer, train
from nbpeft.training.disk import checkpoints
from nbpeft.training.disk.checkpoints import drop_after, flaw_of, last_whole
from tests.fuzz.corpus import STATES
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable, weights

TOKEN = "hf_" + "aB3d" * 8


def trainer_of(folder: Path, cls: Any = Trainer, **fields: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "report_to": "none", "use_cpu": True, "seed": 3}
    options = {"disable_tqdm": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(str(folder), save_strategy="steps", **(settings | options | fields))
    evaluated = token_rows(4) if "eval_strategy" in fields else None
    model, collator = trainable(llama(), task_type="CAUSAL_LM"), Collator(copy_labels=True)
    trainer = cls(
        model=model, args=arguments, train_dataset=token_rows(), eval_dataset=evaluated, data_collator=collator
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_checkpoint_is_whole_and_nothing_else_is_left(run: Path) -> None:
    assert steps_in(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [flaw_of(run / name) for name in steps_in(run)] == [None] * 3


def broken(folder: Path, how: str) -> None:
    if how.startswith("no "):
        (folder / how[3:]).unlink()
    else:
        path = folder / how
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no trainer_state.json", "no trainer_state.json"),
        ("trainer_state.json", "trainer_state.json is not valid JSON"),
        ("no adapter_model.safetensors", "no adapter"),
        ("adapter_model.safetensors", "adapter_model.safetensors is cut off"),
        ("optimizer.pt", "optimizer.pt is cut off"),
        ("rng_state.pth", "rng_state.pth is cut off"),
    ],
)
def test_what_a_broken_one_lacks(run: Path, how: str, told: str) -> None:
    broken(run / "checkpoint-6", how)
    assert flaw_of(run / "checkpoint-6") == told


@pytest.mark.parametrize("how", STATES)
def test_a_state_that_no_trainer_takes(run: Path, how: str) -> None:
    text, told = STATES[how]
    (run / "checkpoint-6" / "trainer_state.json").write_text(text)
    assert (flaw_of(run / "checkpoint-6") or "").startswith(told or "nothing") == bool(told)


SCALE = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rng_state.pth", [1], "rng_state.pth is damaged: delete it to resume with a new random state"),
        ("rng_state.pth", {"python": 1, "numpy": 2, "cpu": 3}, "rng_state.pth is damaged: delete it"),
        ("scaler.pt", {"scale": 1e999}, "scaler.pt is damaged: delete it to resume with the initial loss scale"),
        ("scaler.pt", SCALE | {"scale": float("nan")}, "scaler.pt is damaged"),
        ("scaler.pt", [2.0], "scaler.pt is damaged"),
        ("scaler.pt", SCALE, None),
    ],
)
def test_a_small_file_that_is_damaged_says_what_to_do(run: Path, name: str, content: Any, told: str | None) -> None:
    torch.save(content, run / "checkpoint-6" / name)
    found = flaw_of(run / "checkpoint-6")
    assert found is None if told is None else (found or "").startswith(told)


def test_bytes_that_were_overwritten_leave_the_model_as_it_is(run: Path) -> None:
    path = run / "checkpoint-6" / "rng_state.pth"
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl") + 60
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    trainer = trainer_of(run)
    before = weights(trainer.model)
    with pytest.raises(
        CheckpointNotFoundError, match=r"\(rng_state.pth is damaged: delete it .*checkpoint-4 is complete"
    ):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
    path.unlink()
    trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))


@pytest.mark.parametrize("cls", [Trainer, transformers.Trainer])
def test_resuming_passes_over_what_is_broken(run: Path, cls: Any) -> None:
    broken(run / "checkpoint-6", "adapter_model.safetensors")
    resumed = trainer_of(run, cls, max_steps=5)
    told = r"skipped checkpoint-6 \(adapter_model.safetensors is cut off\): resuming from .*checkpoint-4$"
    with pytest.warns(UserWarning, match=told):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5 and flaw_of(run / "checkpoint-5") is None


def test_a_link_to_a_checkpoint_is_passed_over_only_where_it_may_be_of_someone_else(run: Path) -> None:
    (run / "checkpoint-6").rename(run / "elsewhere")
    (run / "checkpoint-6").symlink_to(run / "elsewhere")
    assert last_whole(run).name == "checkpoint-6"
    with pytest.warns(UserWarning, match=r"skipped checkpoint-6 \(a link\)"):
        assert last_whole(run, strict=True).name == "checkpoint-4"


def test_the_states_after_a_step_are_dropped_if_an_earlier_one_is_left(run: Path) -> None:
    drop_after(run, 6)
    assert steps_in(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    drop_after(run, 4)
    assert steps_in(run) == ["checkpoint-2", "checkpoint-4"]
    drop_after(run, 1)
    assert steps_in(run) == ["checkpoint-2", "checkpoint-4"]


def test_a_link_in_a_checkpoint_of_someone_else_is_its_flaw(run: Path) -> None:
    folder = run / "checkpoint-6"
    (folder / "more.txt").symlink_to(folder / "trainer_state.json")
    assert flaw_of(folder) is None
    assert flaw_of(folder, strict=True) == "more.txt is a link"


def test_resuming_from_the_last_whole_one_ends_as_an_unbroken_run(run: Path) -> None:
    through = trainer_of(run / "through")
    through.train()
    shutil.rmtree(run / "checkpoint-6")
    resumed = trainer_of(run)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in weights(through.model).items():
        assert torch.equal(weights(resumed.model)[name], weight), name


def test_where_nothing_is_whole_it_says_what_there_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"empty has no complete checkpoint to resume from$"):
        trainer_of(tmp_path / "empty").train(resume_from_checkpoint=True)
    for name in steps_in(run):
        broken(run / name, "no trainer_state.json")
    with pytest.raises(CheckpointNotFoundError) as caught:
        trainer_of(run).train(resume_from_checkpoint=True)
    assert str(caught.value).endswith(
        "skipped " + ", ".join(f"checkpoint-{step} (no trainer_state.json)" for step in (6, 4, 2))
    )
    with pytest.raises(ValueError, match="no complete checkpoint"):  # as transformers raises it
        train(trainable(llama()), token_rows(4), output_dir=str(run), max_steps=2, resume_from_checkpoint=True)


def test_a_broken_one_that_is_asked_for_names_a_whole_one(run: Path) -> None:
    broken(run / "checkpoint-4", "optimizer.pt")
    for name, told in {
        "checkpoint-4": r"\(optimizer.pt is cut off\); .*checkpoint-6 is complete",
        "checkpoint-8": "there is no folder .*checkpoint-8 to resume from",
    }.items():
        with pytest.raises(CheckpointNotFoundError, match=told):
            trainer_of(run).train(resume_from_checkpoint=str(run / name))


def test_the_best_checkpoint_is_known_by_the_place_it_is_in(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=1e-2,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and Path(best).parent == tmp_path and Path(best).is_dir()
    assert json.loads((Path(best) / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert steps_in(tmp_path) == [Path(best).name]  # the Trainer keeps the best one alone at its end


def test_older_ones_go_as_with_transformers(tmp_path: Path) -> None:
    for cls, base in ((Trainer, trainable(llama())), (transformers.Trainer, llama())):
        trainer = trainer_of(tmp_path / cls.__module__, cls, save_total_limit=2, save_steps=1)
        trainer.model = trainer.model_wrapped = base
        trainer.train()
    assert steps_in(tmp_path / Trainer.__module__) == steps_in(tmp_path / transformers.Trainer.__module__)
    assert steps_in(tmp_path / Trainer.__module__) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_of_the_same_step_is_replaced(run: Path) -> None:
    (run / "checkpoint-6" / "mine.txt").write_text("of the old one")
    trainer = trainer_of(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert steps_in(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (run / "checkpoint-6" / "mine.txt").exists() and flaw_of(run / "checkpoint-6") is None


def raised_in_torch(message: str) -> Any:
    """A function that fails as torch's streams do, whose errors come out of its module."""
    scope: dict[str, Any] = {}
    exec(compile(f"def save(*a, **k): raise RuntimeError({message!r})", torch.serialization.__file__, "exec"), scope)
    return scope["save"]


def test_a_failure_leaves_the_checkpoints_that_were_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    trainer = trainer_of(run)
    trainer.create_optimizer_and_scheduler(6)
    trainer.state.global_step = 6

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such row")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, name, act, error in (
        (torch, "save", raised_in_torch("[enforce fail at inline_container.cc:664]"), CheckpointError),
        (torch, "save", raised_in_torch("basic_ios::clear: iostream error"), CheckpointError),
        (atomic, "flush_folder", full, CheckpointError),
        (atomic, "flush_folder", broken, RuntimeError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, act)
            with pytest.raises(error, match=r"the disk is full or fails|no space left|no such row") as caught:
                trainer._save_checkpoint(trainer.model, trial=None)
            assert type(caught.value) is error
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert "_get_output_dir" not in vars(trainer)


def test_what_is_uploaded_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        transformers.Trainer, "_push_from_checkpoint", lambda self, folder: seen.append((folder, os.path.isdir(folder)))
    )
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *args, **kwargs: None)
    trainer.create_optimizer_and_scheduler(2)
    trainer.state.global_step = 2
    trainer._save_checkpoint(trainer.model, trial=None)
    assert seen == [(str(tmp_path / "checkpoint-2"), True)]


def test_no_token_reaches_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=2, hub_token=TOKEN)
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"training_args.bin", "trainer_state.json", "README.md"}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    kept = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert kept.max_steps == 2 and kept.hub_token is None and trainer.args.hub_token == TOKEN


def test_what_is_beside_an_adapter_may_be_as_large_as_its_training_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_MOST_EXTRA", 5)
    (tmp_path / "adapter").write_bytes(bytes(10))
    for size in (325, 326):
        (tmp_path / "optimizer").write_bytes(bytes(size))
        assert checkpoints._is_too_large(tmp_path, [tmp_path / "adapter"]) is (size > 325)
