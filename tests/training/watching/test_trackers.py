"""Numbers of a run in TensorBoard, Weights & Biases and Trackio, written offline and read back."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
import threading
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbpeft.errors import CheckpointError, ConfigError
from nbpeft.training import train
from nbpeft.training.watching import trackers
from tests.closeness import assert_close
from tests.training.support import token_rows, trainable
from tests.waiting import PATIENCE

QUICK: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4}
TOKEN = "hf_" + "aB3d" * 8


@pytest.fixture(scope="session")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trackio writes: it reads that once, when it is imported."""
    if "trackio" not in sys.modules:
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    import trackio

    return Path(trackio.utils.TRACKIO_DIR)


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trackio_dir: Path) -> Any:
    """Trains with a tracker; gives the result, and the folder that everything is written below."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)

    def run(track: Any, **more: Any) -> tuple[Any, Path]:
        options = {"eval_data": token_rows(4), "run_dir": tmp_path / "runs", "hub_token": TOKEN, **QUICK, **more}
        result = train(trainable(), token_rows(), track=track, **options)
        text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert TOKEN.encode() not in text
        return result, tmp_path

    return run


def wandb_records(data: bytes, block: int = 32_768) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: a header of 7 bytes, then blocks of chunks as in a log of LevelDB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no chunk begins in the last bytes of a block
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def losses(result: Any) -> list[Any]:
    return [pytest.approx(value) for _, value in result.state.history]


def test_tensorboard(tracked: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, _ = tracked("tensorboard")
    events = EventAccumulator(str(Path(result.state.folder, "tensorboard")))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == losses(result)
    assert_close(events.Scalars("eval/loss")[-1].value, result.eval_loss)
    assert "train/learning_rate" in events.Tags()["scalars"]
    place = Path(result.state.folder, "tensorboard")
    assert f"TensorBoard: tensorboard --logdir {place}" in result.state.message
    assert result.state.warnings == (), "where the metrics are is no problem"


def test_a_place_is_written_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert trackers._typed(tmp_path / "runs" / "my run") == "'runs/my run'"
    assert trackers._typed(tmp_path.parent) == str(tmp_path.parent)


@pytest.mark.slow
def test_wandb_offline(tracked: Any) -> None:
    from wandb.proto import wandb_internal_pb2

    result, _ = tracked("wandb")
    (file,) = Path(result.state.folder).glob("wandb/offline-run-*/run-*.wandb")
    values: dict[str, list[float]] = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            values.setdefault(name, []).append(float(item.value_json))
    assert values["train/loss"] == losses(result)
    assert values["train/global_step"][:3] == [1, 2, 3]
    assert values["eval/loss"] == [pytest.approx(result.eval_loss)]
    assert f"Weights & Biases, offline: wandb sync {file.parent}" in result.state.message


def test_trackio(tracked: Any, trackio_dir: Path) -> None:
    result, folder = tracked("trackio")
    with sqlite3.connect(trackio_dir / f"{folder.name}.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    logged = [(name, step, json.loads(text)) for name, step, text in rows]
    assert {name for name, _, _ in logged} == {Path(result.state.folder).name}
    assert [part["train/loss"] for _, _, part in logged if "train/loss" in part] == losses(result)
    assert [step for _, step, part in logged if "train/loss" in part] == [1, 2, 3]
    assert f"Trackio: trackio show --project {folder.name}" in result.state.message


def test_several_at_once_and_none_left_open(tracked: Any, trackio_dir: Path) -> None:
    result, folder = tracked(["tensorboard", "trackio"])
    assert list(Path(result.state.folder, "tensorboard").iterdir())
    again, _ = tracked("trackio")
    with sqlite3.connect(trackio_dir / f"{folder.name}.db") as base:
        names = {name for (name,) in base.execute("select distinct run_name from metrics")}
    assert names == {Path(run.state.folder).name for run in (result, again)}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_nothing_is_written_through_a_link_out_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (other := tmp_path / "other").mkdir()
    (run := tmp_path / "run").mkdir()
    (run / name).symlink_to(other)
    opened: list[Any] = []
    monkeypatch.setitem(trackers._OPENED, name, lambda *args: opened.append(args))
    callback = trackers.TrackCallback([name], SimpleNamespace(folder=str(run), adapter="x", run_id="1"), {})
    with pytest.raises(
        CheckpointError, match=f"{name} is a link that leads out of .*, and nothing is written through it"
    ):
        train(trainable(), token_rows(), callbacks=[callback], **QUICK)
    assert not opened and not list(other.iterdir())


def test_without_a_run_folder_it_has_one_of_its_own(
    tracked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tracked("tensorboard", run_dir=None)
    assert list(tmp_path.glob("nbpeft_tracked/default-*/tensorboard/events*"))


@pytest.mark.parametrize("name", trackers.TRACKERS)
@pytest.mark.parametrize("argument", ["track", "report_to"])
def test_a_missing_package_is_one_line(
    name: str, argument: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda module: None if name in module else there(module))
    with pytest.raises(ConfigError) as caught:
        train(trainable(), token_rows(), run_dir=tmp_path / "runs", **QUICK, **{argument: name})
    assert str(caught.value) == f"{argument}={name!r} needs a package that is not installed: pip install {name}"
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"track='wandbb' is unknown. Did you mean 'wandb'"):
        train(trainable(), token_rows(), track="wandbb", **QUICK)


def test_a_tracker_that_fails_leaves_no_run(tracked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setitem(trackers._OPENED, "tensorboard", broken)
    with pytest.raises(Exception, match="no room"):
        tracked("tensorboard")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".gitignore"]


@pytest.mark.parametrize("place", ["log", "close"])
def test_a_tracker_that_fails_later_does_not_end_the_run(
    tracked: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("the network is down")

    made = SimpleNamespace(place="TensorBoard: elsewhere", log=lambda *args: None, close=lambda: None)
    setattr(made, place, broken)
    monkeypatch.setitem(trackers._OPENED, "tensorboard", lambda *args: made)
    result, _ = tracked("tensorboard")
    assert (result.status, result.steps) == ("finished", 3)
    assert result.message.count("tensorboard failed and receives no more metrics: the network is down") == 1


def test_other_threads_print_while_a_tracker_opens_in_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    def opens() -> None:
        with trackers._quiet():
            opened.set()
            printed.wait(PATIENCE)

    opened, printed = threading.Event(), threading.Event()
    thread = threading.Thread(target=opens)
    thread.start()
    assert opened.wait(PATIENCE)
    print("from a cell")
    printed.set()
    thread.join()
    assert capsys.readouterr().out == "from a cell\n"


def test_wandb_has_a_key_in_the_environment_or_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert not trackers._has_wandb_key()
    file.write_text("machine wandb.example.org login user password secret\n")
    assert not trackers._has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert trackers._has_wandb_key()
    file.write_text("machine without login\n")
    assert not trackers._has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert trackers._has_wandb_key()
