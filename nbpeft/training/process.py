"""The program of one training process: python -m nbpeft.training.process FOLDER.

It needs the environment variables that ``torch.distributed.run`` or ``accelerate launch`` set. The folder is that of a
job, see :mod:`nbpeft.training.launch`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import TrainingInterrupted, in_one_line
from nbpeft.memory import Meter
from nbpeft.state import TrainState
from nbpeft.training.adapters.adapted_model import PREPARED, base_of, trained_names
from nbpeft.training.adapters.method_state import save_in_training, write_method_state
from nbpeft.training.launch.job import JOB, ON_THE_CPU, RESULT, Ended
from nbpeft.training.launch.processes import Failure
from nbpeft.training.launch.shared_control import SharedControl
from nbpeft.training.launch.transport import load_whole
from nbpeft.training.loop.train import run_training
from nbpeft.training.monitor.failures import explain_failure
from nbpeft.training.monitor.result import TrainResult
from nbpeft.training.monitor.run import Run
from nbpeft.training.request import TrainRequest

_PARENT_GONE = "the process that started it is gone"
_STEP_ALONE, _END_ALONE = 10.0, 20.0
"""Seconds after the parent process has ended: for the current step, and then for saving the run and ending."""


class Channel:
    """Communication with the parent process over the original standard streams; printed text goes to the log.

    Attributes:
        closed: whether the parent process has ended.
    """

    closed = False

    def __init__(self) -> None:
        self._requests: IO[bytes] = os.fdopen(os.dup(0), "rb")
        self._messages: IO[bytes] = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Sends a message; ignored if the parent process has ended."""
        try:
            with self._lock:
                pickle.dump(message, self._messages)
                self._messages.flush()
        except OSError:
            return

    def listen(self, control: SharedControl, alone: Callable[[], object]) -> None:
        """Receives requests in a thread.

        Args:
            control: receives the requests.
            alone: called in the thread when the parent process has ended.
        """

        def work() -> None:
            with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    control.take(pickle.load(self._requests))
            self.closed = True
            alone()

        threading.Thread(target=work, name="nbpeft-requests", daemon=True).start()


def main(folder: Path) -> int:
    """Trains, and returns the exit status of the process."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    channel, control = Channel(), SharedControl()
    channel.listen(control, lambda: _end_alone(control, folder))
    model = None
    try:
        request: TrainRequest = load_whole(folder / JOB, _device(folder, local_rank))
        model = request.model
        result = _train(request, control, channel if rank == 0 else None)
        manager = manager_of(model)
        assert manager is not None
        options = {"names": trained_names(model), "embeddings": False, "mark_saved": False, "write": rank == 0}
        save_in_training(manager, folder / RESULT, **options)
        write_method_state(model, folder / RESULT, write=rank == 0)
        if rank == 0:
            channel.send(Ended(result.status, result.metrics, result.token_count))
        distributed.barrier()
        return 0
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        print(trace, file=sys.stderr, flush=True)
        message = in_one_line(explain_failure(error, model))
        with contextlib.suppress(OSError):  # if the parent process has ended, it may have removed the folder
            Failure(rank, type(error).__name__, message, time.time(), trace).write(folder)
        return 1
    finally:
        if channel.closed:
            _remove_job(folder)


def _end_alone(control: SharedControl, folder: Path) -> None:
    """Ends this process after its parent has ended: after the current step, or without it if it takes too long.

    A collective operation with a process that has ended returns after many minutes or never, and no exception can be
    raised in the thread that waits for it.
    """
    control.take({"stop": True, "pause": False, "reason": _PARENT_GONE})
    if control.wait_for_stop(_STEP_ALONE):
        time.sleep(_END_ALONE)
    _remove_job(folder)
    os._exit(1)


def _remove_job(folder: Path) -> None:
    """Removes the job's folder, with the copy of the model, instead of the parent; only on the parent's own host."""
    if os.environ["GROUP_RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)


def _train(request: TrainRequest, control: SharedControl, channel: Channel | None) -> TrainResult:
    model, base = request.model, cast(Any, base_of(request.model))
    if getattr(base, "hf_device_map", None):  # accelerate compares it with the process's device
        base.hf_device_map = {"": next(base.parameters()).device}
    for module in model.modules():  # with the mark of a former training the model would not be wrapped in DDP
        vars(module).pop(PREPARED, None)
    _stay_on_the_cpu()
    if request.arguments.get("fsdp"):
        _shard_on_the_cpu()
    else:
        _share_frozen(model)

    def publish(state: TrainState) -> None:
        if channel is not None:
            channel.send(state)

    meter = Meter(model)
    run_factory = functools.partial(Run, memory=meter.read)
    try:
        return run_training(replace(request, control=control, publish=publish, run_factory=run_factory))
    except TrainingInterrupted as error:
        assert isinstance(error.result, TrainResult)
        return error.result


def _stay_on_the_cpu() -> None:
    """Keeps accelerate's device at ``cpu`` without index: moving to ``cpu:1`` would copy the shared weights."""
    original = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.device.type == "cpu":
            self.device = torch.device("cpu")

    PartialState.__init__ = init


def _shard_on_the_cpu() -> None:
    """Makes accelerate support FSDP on the CPU too, which works although accelerate does not enable it."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def _share_frozen(model: Any) -> None:
    """Excludes frozen parameters from DDP's initial broadcast, because all processes have read them from one file."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def _device(folder: Path, local_rank: int) -> str:
    """Returns the device of the weights."""
    if (folder / ON_THE_CPU).exists() or not torch.accelerator.is_available():
        return "cpu"
    torch.accelerator.set_device_index(local_rank)
    return f"{torch.accelerator.current_accelerator()}:{local_rank}"


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # waiting threads of torch and of the channel would block or abort a normal exit
