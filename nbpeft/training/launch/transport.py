"""Stores a model, its rows and its arguments in one file, which the processes of a host map: they share one copy.

Any model that can be pickled is supported, quantized or not, with its current adapters.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.storage import reduced_parameter
from nbpeft.errors import TrainingError, in_one_line
from nbpeft.memory.formatting import size_text

_INPUT_GRADS = "enable_input_require_grads.<locals>"
"""Part of the qualified name of the hook that transformers registers on embeddings."""


class _Pickler(pickle.Pickler):
    """Names objects that another process cannot import, and preserves classes of parameters (bitsandbytes)."""

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if nn.Parameter in kind.__mro__[1:]:
            return reduced_parameter(value)
        if not isinstance(value, FunctionType | type):
            return NotImplemented
        if _INPUT_GRADS in value.__qualname__:
            return _input_grads, ()
        if value.__module__ == "__main__" or "<locals>" in value.__qualname__ or "<lambda>" in value.__qualname__:
            raise TrainingError(
                f"{value.__qualname__} is defined in the notebook or inside a function, where other processes cannot "
                "import it: put it into a module (a .py file) and import it from there"
            )
        return NotImplemented


_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_Pickler, dumps=pickle.dumps, dump=pickle.dump)


def save_whole(path: Path, content: Any, model: nn.Module) -> int:
    """Writes a model and its job to a file.

    Returns:
        The size of the file, in bytes.

    Raises:
        TrainingError: an object cannot be sent to other processes, or the disk has too little space.
    """
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise TrainingError(
            f"the processes read the model from a file of {size_text(needed)}, and {path.parent} has only "
            f"{size_text(free)} left: set TMPDIR to a folder with more space"
        )
    try:
        torch.save(content, path, pickle_module=_PICKLE)
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise TrainingError(f"the training cannot be sent to other processes: {in_one_line(error)}") from error
    return path.stat().st_size


def load_whole(path: Path, device: torch.device | str = "cpu") -> Any:
    """Loads what ``save_whole`` wrote; on the CPU the tensors are memory-mapped, shared until they are modified."""
    return torch.load(path, map_location=device, mmap=True, weights_only=False)


def _input_grads() -> Any:
    return _require_input_grads


def _require_input_grads(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
