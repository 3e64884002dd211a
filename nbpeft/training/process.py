"""One of the processes of a training: python -m nbpeft.training.process FOLDER.

It has the variables that ``torch.distributed.run`` or ``accelerate launch`` set; the folder is that of a job, see
:mod:`nbpeft.training.launch`.
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
from nbpeft.training.adapters.adapted_model import base_of, trained_names
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
"""Seconds that the step of a process whose parent is gone may still take, and then keeping the run and ending."""


class Channel:
    """To the process that waits and from it, over what were the standard streams; what is printed goes to the log.

    Attributes:
        closed: whether nobody is there any more.
    """

    closed = False

    def __init__(self) -> None:
        self._requests: IO[bytes] = os.fdopen(os.dup(0), "rb")
        self._messages: IO[bytes] = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Sends one message; nobody may be there any more."""
        try:
            with self._lock:
                pickle.dump(message, self._messages)
                self._messages.flush()
        except OSError:
            return

    def listen(self, control: SharedControl, alone: Callable[[], object]) -> None:
        """Takes requests in a thread.

        Args:
            control: gets them.
            alone: called in the thread when nobody is there any more.
        """

        def work() -> None:
            with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    control.take(pickle.load(self._requests))
            self.closed = True
            alone()

        threading.Thread(target=work, name="nbpeft-requests", daemon=True).start()


def main(folder: Path) -> int:
    """Trains. Returns the status of the process."""
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
        with contextlib.suppress(OSError):  # where nobody waits for it, the folder may be gone
            Failure(rank, type(error).__name__, message, time.time(), trace).write(folder)
        return 1
    finally:
        if channel.closed:
            _remove_job(folder)


def _end_alone(control: SharedControl, folder: Path) -> None:
    """Ends this process, which nobody waits for: after the step that runs, or without it where that does not end.

    A collective operation with a process that is gone returns after many minutes, if ever, and no exception reaches
    the thread that is in it.
    """
    control.take({"stop": True, "pause": False, "reason": _PARENT_GONE})
    if control.wait_for_stop(_STEP_ALONE):
        time.sleep(_END_ALONE)
    _remove_job(folder)
    os._exit(1)


def _remove_job(folder: Path) -> None:
    """Removes what the process that is gone would have: the model's copy above all. Another host's is not its own."""
    if os.environ["GROUP_RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)


def _train(request: TrainRequest, control: SharedControl, channel: Channel | None) -> TrainResult:
    model, base = request.model, cast(Any, base_of(request.model))
    if getattr(base, "hf_device_map", None):  # accelerate compares it with the card of the process
        base.hf_device_map = {"": next(base.parameters()).device}
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
    """Keeps accelerate from numbering the CPU: moved from ``cpu`` to ``cpu:1``, shared weights would be copied."""
    made = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.device.type == "cpu":
            self.device = torch.device("cpu")

    PartialState.__init__ = init


def _shard_on_the_cpu() -> None:
    """Lets accelerate shard over processes on the CPU too, where what it does works all the same."""
    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def _share_frozen(model: Any) -> None:
    """Keeps DDP from sending the frozen base around, which all processes have read from one file."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]


def _device(folder: Path, local_rank: int) -> str:
    """Where the weights go."""
    if (folder / ON_THE_CPU).exists() or not torch.accelerator.is_available():
        return "cpu"
    torch.accelerator.set_device_index(local_rank)
    return f"{torch.accelerator.current_accelerator()}:{local_rank}"


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # threads that wait, of torch and for requests, would keep it or abort it
