"""What trains in a model at one moment, copied to host memory, to be put back without a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.errors import CorruptCheckpointError
from nbpeft.training.adapters.adapted_model import trainable
from nbpeft.training.adapters.method_state import method_state, read_state, set_method_state

_METHOD = "method:"
"""Starts the names of the method's own state in a file."""


class Snapshot:
    """The trainable parameters of a model, and what its method remembers of the training.

    Args:
        step: optimizer steps done.
        tensors: name -> copy of a parameter.
        method: as ``method_state`` gives it.
    """

    def __init__(self, step: int, tensors: Mapping[str, Tensor], method: Mapping[str, Tensor] | None) -> None:
        self.step = step
        self._tensors, self._method = dict(tensors), method

    @classmethod
    def of(cls, model: nn.Module, step: int) -> Self:
        """Copies them."""
        return cls(step, copied(dict(trainable(model))), method_state(model))

    def renew(self, model: nn.Module, step: int) -> None:
        """Copies what trains now into the place of what was copied: no further memory is taken.

        Args:
            model: the same one.
            step: optimizer steps done.
        """
        self._tensors = copied(dict(trainable(model)), self._tensors)
        self.step, self._method = step, method_state(model)

    @classmethod
    def read(cls, file: Path, model: nn.Module) -> Self:
        """Reads what ``write`` wrote.

        Args:
            file: the file.
            model: in training; a state of it is not much larger than the model itself.

        Raises:
            CorruptCheckpointError: the file is truncated, altered or something else.
        """
        tensors, metadata = read_state(file, model)
        if not metadata.get("step", "").isdecimal():
            raise CorruptCheckpointError(f"{file.name} does not say of which step it is")
        method = {key.removeprefix(_METHOD): tensors.pop(key) for key in [*tensors] if key.startswith(_METHOD)}
        return cls(int(metadata["step"]), tensors, method or None)

    def fits(self, model: nn.Module) -> bool:
        """Whether it has all that trains in a model now, in the same shapes."""
        found = self._tensors
        return all(name in found and found[name].shape == parameter.shape for name, parameter in trainable(model))

    def write(self, file: Path) -> None:
        """Writes a file; nothing where this process has a part of sharded tensors.

        Raises:
            OSError: it cannot be written.
        """
        if all(type(tensor) is Tensor for tensor in self._tensors.values()):
            method = {f"{_METHOD}{key}": tensor for key, tensor in (self._method or {}).items()}
            write_tensors(file, storable({**self._tensors, **method}), {"step": str(self.step)})

    def put_back(self, model: nn.Module) -> None:
        """Writes it into the model; an interruption waits, so that two states are never mixed."""
        with HeldInterrupts(to_the_end=True):
            set_method_state(model, self._method)  # first: what went since is trainable again
            write_back(self._tensors, dict(trainable(model)))


def copied(parameters: Mapping[str, Tensor], into: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """Copies of parameters in host memory.

    Args:
        parameters: name -> parameter.
        into: earlier copies of them, which are written over: no further memory is taken.
    """
    found = {}
    for name, parameter in parameters.items():
        if name in into:
            found[name] = into[name].copy_(parameter.detach())
        else:
            found[name] = parameter.detach().to("cpu", copy=True)
    return found


def write_back(copies: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Writes copies into the parameters of their names; an interruption waits until all are written."""
    with HeldInterrupts(to_the_end=True), torch.no_grad():
        for name, parameter in parameters.items():
            if name in copies:
                parameter.copy_(copies[name])
