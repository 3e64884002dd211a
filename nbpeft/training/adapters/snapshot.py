"""A copy in host memory of a model's trainable parameters, to restore them without a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.errors import CorruptCheckpointError
from nbpeft.training.adapters.adapted_model import trainable
from nbpeft.training.adapters.method_state import method_state, read_state, set_method_state

_METHOD = "method:"
"""The prefix of the tensors of the method's training state in a file."""


class Snapshot:
    """A copy of a model's trainable parameters and of its method's training state.

    Args:
        step: optimizer steps done.
        tensors: name -> copy of a parameter.
        method: a result of ``method_state``.
    """

    def __init__(self, step: int, tensors: Mapping[str, Tensor], method: Mapping[str, Tensor] | None) -> None:
        self.step = step
        self._tensors, self._method = dict(tensors), method

    @classmethod
    def of(cls, model: nn.Module, step: int) -> Self:
        """Takes a snapshot.

        Args:
            model: the model in training.
            step: optimizer steps done.
        """
        return cls(step, copied(dict(trainable(model))), method_state(model))

    def renew(self, model: nn.Module, step: int) -> None:
        """Updates the snapshot in place, without allocating further memory.

        Args:
            model: the same model.
            step: optimizer steps done.
        """
        self._tensors = copied(dict(trainable(model)), self._tensors)
        self.step, self._method = step, method_state(model)

    @classmethod
    def read(cls, file: Path, model: nn.Module) -> Self:
        """Reads a snapshot that ``write`` wrote.

        Args:
            file: the file.
            model: the model in training, whose size limits that of the file.

        Raises:
            CorruptCheckpointError: the file is truncated, altered or something else.
        """
        tensors, metadata = read_state(file, model)
        if not metadata.get("step", "").isdecimal():
            raise CorruptCheckpointError(f"{file.name} does not name its step")
        method = {key.removeprefix(_METHOD): tensors.pop(key) for key in [*tensors] if key.startswith(_METHOD)}
        return cls(int(metadata["step"]), tensors, method or None)

    def fits(self, model: nn.Module) -> bool:
        """Whether it has all parameters that are trainable in a model now, in the same shapes."""
        tensors = self._tensors
        return all(name in tensors and tensors[name].shape == parameter.shape for name, parameter in trainable(model))

    def write(self, file: Path) -> None:
        """Writes the snapshot to a file, unless its tensors are sharded over several processes.

        Raises:
            OSError: the file cannot be written.
        """
        if all(type(tensor) is Tensor for tensor in self._tensors.values()):
            method = {f"{_METHOD}{key}": tensor for key, tensor in (self._method or {}).items()}
            write_tensors(file, storable({**self._tensors, **method}), {"step": str(self.step)})

    def restore(self, model: nn.Module) -> None:
        """Restores the model; an interrupt is delayed until the end, so that two states are never mixed."""
        with DeferredInterrupts(to_the_end=True):
            set_method_state(model, self._method)  # first, as it makes parameters pruned since then trainable again
            write_back(self._tensors, dict(trainable(model)))


def copied(parameters: Mapping[str, Tensor], into: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """Copies of parameters in host memory.

    Args:
        parameters: name -> parameter.
        into: earlier copies of them, which are overwritten, so that no further memory is allocated.
    """
    copies = {}
    for name, parameter in parameters.items():
        if name in into:
            copies[name] = into[name].copy_(parameter.detach())
        else:
            copies[name] = parameter.detach().to("cpu", copy=True)
    return copies


def write_back(copies: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Writes copies into the parameters of the same names; an interrupt is delayed until all are written.

    Args:
        copies: name -> copy.
        parameters: name -> parameter; those without a copy are not changed.
    """
    with DeferredInterrupts(to_the_end=True), torch.no_grad():
        for name, parameter in parameters.items():
            if name in copies:
                parameter.copy_(copies[name])
