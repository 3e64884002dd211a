"""The parts of a training in several processes, one process at a time."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore, TCPStore

from nbpeft.errors import CheckpointError, ConfigError, TrainingError
from nbpeft.model.saving import sharded
from nbpeft.model.saving.sharded import gathered, is_sharded
from nbpeft.state import TrainState
from nbpeft.training import Run, train
from nbpeft.training.disk import agreement
from nbpeft.training.launch import parent, shared_control
from nbpeft.training.launch.job import Ended
from nbpeft.training.launch.processes import CHILD, Failure, Launch, Processes, environment, launch_of
from nbpeft.training.launch.shared_control import SharedControl
from nbpeft.training.launch.transport import load_whole, save_whole
from tests.tiny_models import VOCABULARY, llama, same_state, state, tokens
from tests.training.support import Clock, trainable

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]


@pytest.mark.parametrize(
    ("processes", "machines", "message"),
    [
        (0, None, "processes must be a whole number from 1 to 256, not 0"),
        (True, None, "processes must be a whole number from 1 to 256, not True"),
        ("2", None, "processes must be a whole number from 1 to 256, not '2'"),
        (2, ["10.0.0.1"], r"hosts must be at least two addresses, this machine's first, not \['10.0.0.1'\]"),
        (2, "10.0.0.1", "hosts must be at least two addresses"),
    ],
)
def test_impossible_numbers_are_refused(processes: Any, machines: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch_of(processes, machines)


def test_one_process_trains_here_as_does_one_that_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_of(None) is None and launch_of(1) is None
    launch = launch_of(2, ("a", "b"))
    assert launch == Launch(2, ("a", "b")) and launch.world == 4
    variables = environment(launch, 1, 1, "a", 29500)
    found = {name: variables[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "29500",
    }
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch_of(2) is None


def test_more_processes_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match="2 processes need 2 cuda devices, and this machine has 1: set processes=1"):
        launch_of(2)


def test_a_model_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    model = trainable(init_lora_weights=False)
    content = {"model": model, "head": model.get_base_model().lm_head.weight}
    assert save_whole(tmp_path / "job.pt", content, model) == (tmp_path / "job.pt").stat().st_size
    found = load_whole(tmp_path / "job.pt")
    assert found["head"] is found["model"].get_base_model().lm_head.weight
    assert same_state(state(found["model"]), state(model))
    ids = tokens()
    assert torch.equal(found["model"](input_ids=ids).logits, model(input_ids=ids).logits)
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    assert [name for name, part in found["model"].named_parameters() if part.requires_grad] == trained
    with torch.no_grad():  # a page that is written to is this process's alone
        next(found["model"].parameters()).add_(1)
    assert same_state(state(load_whole(tmp_path / "job.pt")["model"]), state(model))


def test_a_quantized_parameter_keeps_its_class_and_the_base_its_hooks(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    save_whole(tmp_path / "layer.pt", layer, layer)
    found = load_whole(tmp_path / "layer.pt")
    assert isinstance(found.weight, bnb.nn.Params4bit) and found.weight.quant_state is not None
    x = torch.randn(2, 64)
    assert torch.equal(found(x), layer(x))
    model = llama()
    model.enable_input_require_grads()
    save_whole(tmp_path / "model.pt", model, model)
    assert load_whole(tmp_path / "model.pt").get_input_embeddings()(tokens()).requires_grad


def test_what_other_processes_cannot_import_is_named(tmp_path: Path) -> None:
    class Local(nn.Linear):
        pass

    with pytest.raises(TrainingError, match=r"Local is defined in the notebook or inside a function.*\.py file"):
        save_whole(tmp_path / "job.pt", Local(2, 2), nn.Linear(2, 2))
    with pytest.raises(TrainingError, match="cannot be sent to other processes"):
        save_whole(tmp_path / "job.pt", (time.sleep, sys._getframe()), nn.Linear(2, 2))


def test_a_disk_without_room_is_seen_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3})())
    with pytest.raises(TrainingError, match=r"a file of 24 B, and .* has only 3 B left: set TMPDIR"):
        save_whole(tmp_path / "job.pt", None, nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_leaves_model_and_disk_as_they_were(tmp_path: Path) -> None:
    model = trainable()
    before = state(model)
    with pytest.raises(TrainingError, match="<lambda> is defined in the notebook"):
        train(model, ROWS, processes=2, max_steps=1, run_dir=tmp_path, compute_metrics=lambda found: {})
    assert same_state(state(model), before) and not list(tmp_path.iterdir())


def test_a_stream_is_not_shared_out() -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(TrainingError, match="cannot share a stream of rows: pass a list"):
        train(trainable(), stream, processes=2, max_steps=1)


def test_sharding_without_processes_says_what_is_missing() -> None:
    with pytest.raises(
        ConfigError, match="fsdp shards a model over several processes: set their number with processes=…"
    ):
        train(trainable(), ROWS, fsdp=True, max_steps=1)


def test_requests_are_kept_until_a_step_has_ended() -> None:
    control = SharedControl()
    saved: list[int] = []
    control.take({"pause": True, "save": True})
    assert not control.paused and not control.save_requested
    control._deliver()
    assert control.paused and control.save_requested
    control.take({"pause": False, "stop": True, "reason": "enough"})
    assert control.wait_or_stop(on_save=lambda: saved.append(1)) and saved == [1]
    assert control.reason == "enough" and not control.paused


def test_a_run_that_mirrors_shows_the_other_process() -> None:
    clock = Clock()
    states: list[TrainState] = []
    run = Run(trainable(), None, clock=clock, publish=states.append)
    run.mirrors = True
    with run:
        run.note("2 processes")
        clock.advance(5)
        run.mirror(
            TrainState("other", "default", "running", 3, 8, loss=2.0, elapsed=1.5, remaining=4.0, message="slow")
        )
        clock.advance(1)
        assert run.tick().elapsed == pytest.approx(2.5) and run.tick().remaining == pytest.approx(3.0)
        assert (run.state.step, run.state.loss, run.state.message) == (3, 2.0, "2 processes · slow")
        assert run.state.run_id == run.run_id and run.steps_done == 0, "the model has none of them yet"
        run.mirror(TrainState("other", "default", "paused", 3, 8, elapsed=2.5))
        clock.advance(9)
        assert run.state.elapsed == pytest.approx(2.5)
        run.mirror(TrainState("other", "default", "finished", 8, 8, loss=1.0, elapsed=3.0))
        run.received_weights(64)
    assert (states[-1].status, states[-1].step, states[-1].remaining) == ("finished", 8, None)
    assert (run.steps_done, run.token_count) == (8, 64)


def test_a_process_that_is_killed_is_named_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen

    def sleep(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", CHILD]
        return started([sys.executable, "-c", "import time; print('at work', flush=True); time.sleep(60)"], **options)

    monkeypatch.setattr(subprocess, "Popen", sleep)
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        assert processes.running and processes.failure() is None
        os.kill(processes._running[1].pid, signal.SIGKILL)
        processes._running[1].wait()
        failure = processes.failure()
        Failure(0, "RuntimeError", "Connection closed by peer", 1.0).write(tmp_path)
        assert processes.failure().message == failure.message, "the cause, not what followed from it"
    assert failure.rank == 1 and failure.message == "was killed by signal SIGKILL (out of memory?)"
    assert not processes.running


def test_a_process_that_aborts_follows_the_first_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, {"0": "import os; os.kill(os.getpid(), 6)", "1": "raise SystemExit(1)"})
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        for process in processes._running:
            process.wait()
        Failure(0, "TrainingError", "second", 2.0).write(tmp_path)
        Failure(1, "ValueError", "first", 1.0).write(tmp_path)
        assert processes.failure().message == "first"


def started_as(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """Lets each process run a script of its own, by its rank."""
    started = subprocess.Popen

    def start(command: list[str], env: dict[str, str], **options: Any) -> Any:
        return started([sys.executable, "-c", scripts[env["RANK"]]], env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", start)


class ReadSlowly:
    """Takes its time where it is read."""

    def __reduce__(self) -> Any:
        return read_slowly, ()


def read_slowly() -> Ended:
    time.sleep(0.5)
    return Ended("finished", {"train_loss": 1.0}, 24)


SENDS = "import sys; sys.stdout.buffer.write({!r}); sys.stdout.flush()"
WAITS = "import time; time.sleep(60)"


def waited_for_end(processes: Processes) -> None:
    for process in processes._running:
        process.wait(30)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("ends", [";", "; raise SystemExit(3)"], ids=["well", "in an error"])
def test_an_answer_that_is_still_being_read_counts(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sends = SENDS.format(pickle.dumps(ReadSlowly())) + ends
    started_as(monkeypatch, {"0": sends, "1": "pass"})
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        waited_for_end(processes)
        parent._check(processes)
        assert processes.answer == Ended("finished", {"train_loss": 1.0}, 24)


def test_an_answer_counts_although_another_process_fails_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = tmp_path / "sent"
    sends = f"{SENDS.format(pickle.dumps(ReadSlowly()))}; open({str(sent)!r}, 'w'); {WAITS}"
    fails = f"import os, time\nwhile not os.path.exists({str(sent)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    started_as(monkeypatch, {"0": sends, "1": fails})
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        processes._running[1].wait(30)
        parent._check(processes)
        assert processes.answer is not None


def test_processes_that_end_without_an_answer_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, {"0": "pass", "1": "pass"})
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        waited_for_end(processes)
        with pytest.raises(TrainingError, match=r"^process 0 of 2: ended before the training did$"):
            parent._check(processes)


def test_a_message_that_cannot_be_read_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of another version, installed while this process runs."""
    started_as(monkeypatch, {"0": SENDS.format(b"cnbpeft.training.launch.job\nGone\n.") + f"; {WAITS}", "1": WAITS})
    with Processes(tmp_path, Launch(2), address="127.0.0.1", port=1) as processes:
        processes._reader.join(30)
        assert processes.running
        with pytest.raises(TrainingError, match=r"2: sent a message that cannot be read here \(AttributeError: .*Gone"):
            parent._check(processes)


def test_a_port_is_kept_until_the_first_process_listens() -> None:
    with parent._held_port() as port:
        listening = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert listening.port == port
    if sys.platform == "linux":
        with parent._held_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))


def test_a_group_lives_no_longer_than_its_world() -> None:
    for _ in range(2):
        distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            assert agreement._on_the_cpu() is agreement._on_the_cpu()
        finally:
            distributed.destroy_process_group()
        gc.collect()
        assert not agreement._groups


def test_a_request_to_save_reaches_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sharded model each of them has a part."""
    monkeypatch.setattr(shared_control, "broadcast_from_rank0", lambda wanted: [False, False, True])
    monkeypatch.setattr(shared_control, "is_main_process", lambda: False)
    control, saved = SharedControl(), []
    assert not control.writes and not control.wait_or_stop(on_save=lambda: saved.append(1)) and saved == [1]


def test_a_part_of_a_model_is_not_saved_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = trainable()
    run = Run(model, 2)
    run.output_dir = str(tmp_path)
    monkeypatch.setattr(agreement, "is_distributed", lambda: True)
    monkeypatch.setattr(sharded, "is_sharded", lambda model: True)
    run.control.request_save()
    assert not run.wait_or_stop()
    assert run.state.message == "not saved: the model is sharded and only one process was asked to save it: use " + (
        "Trainer.save_model"
    )
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_tensor_is_never_taken_for_the_whole() -> None:
    part = nn.Parameter(torch.empty(0))
    assert not is_sharded(nn.ParameterList([part]))
    part.ds_shape = torch.Size((4, VOCABULARY))
    assert is_sharded(nn.ParameterList([part]))
    with pytest.raises(CheckpointError, match=rf"shape \(4, {VOCABULARY}\) is sharded by DeepSpeed ZeRO-3: save with"):
        gathered(part)
