"""The reference of an objective: the base, another adapter, or the weights at the beginning.

It needs no second model: the base is the model without its adapters, and the weights at the beginning are a copy of the
trained ones. A checkpoint contains that copy, so that a resumed training has the same reference.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.checkpoint import inside
from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.engine.changes.active_state import NO_ADAPTERS
from nbpeft.engine.contract.adapter import Rescales
from nbpeft.engine.kernels.numerics import bytes_of
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import CheckpointError, ConfigError, did_you_mean
from nbpeft.model.handle.serving import blended
from nbpeft.names import BASE as BASE
from nbpeft.names import START as START
from nbpeft.training.adapters.adapted_model import trainable, trained_names
from nbpeft.training.adapters.method_state import keeps_method_state, read_state

_FILE = "reference.safetensors"
_DIGEST, _SCALINGS = "digest", "scalings"


class Reference(ABC):
    """What a loss compares the trained weights with.

    Attributes:
        name: its name, as in the argument ``reference``.
    """

    name: str

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """A block in which the model computes as the reference in this thread."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Writes what a resumed training needs into a checkpoint."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Restores the reference of the training that wrote a checkpoint.

        Raises:
            CheckpointError: the checkpoint was written with another reference.
        """


class OfTheBase(Reference):
    """The base model, without any adapter."""

    name = BASE

    def __init__(self, manager: AdapterManager) -> None:
        self._manager = manager

    def active(self) -> AbstractContextManager[Any]:
        """A block without adapters."""
        return self._manager.active_state.call(NO_ADAPTERS)

    def write(self, folder: Path) -> None:
        """Writes nothing, as the base does not change."""

    def read(self, folder: Path) -> None:
        """Checks that the checkpoint was written with this reference.

        Raises:
            CheckpointError: it was written with another one.
        """
        if inside.leads_to_file(folder / _FILE):
            raise CheckpointError(f"the training of {folder} had another reference than {self.name!r}")


class OfAnAdapter(Reference):
    """Another adapter of the model, which is not trained meanwhile."""

    def __init__(self, manager: AdapterManager, name: str) -> None:
        self._manager, self.name = manager, name

    def active(self) -> AbstractContextManager[None]:
        """A block in which that adapter is active."""
        return blended(self._manager, {self.name: 1.0})

    def write(self, folder: Path) -> None:
        """Writes a digest of its weights, and its factors, which ``set_scale`` changes."""
        metadata = {"reference": self.name, _SCALINGS: self._scalings()}
        write_tensors(folder / _FILE, {_DIGEST: self._digest()}, metadata)

    def read(self, folder: Path) -> None:
        """Checks that the adapter has the same weights and factors.

        Raises:
            CheckpointError: it has others.
        """
        tensors, metadata = _read(folder, self._manager.model, self.name)
        if metadata.get(_SCALINGS, self._scalings()) != self._scalings():
            raise CheckpointError(f"the reference {self.name!r} has another scaling than when this training began")
        if not torch.equal(tensors.get(_DIGEST, torch.empty(0)), self._digest()):
            raise CheckpointError(f"the reference {self.name!r} has other weights than when this training began")

    def _scalings(self) -> str:
        adapters = [layer.adapter(self.name) for layer in self._manager.layers_with(self.name).values()]
        return " ".join(str(float(adapter.scaling)) for adapter in adapters if isinstance(adapter, Rescales))

    def _digest(self) -> Tensor:
        found = hashlib.sha256()
        for parameter in self._manager.parameters(self.name):
            found.update(bytes_of(parameter))
        return torch.tensor(list(found.digest()), dtype=torch.uint8)


class OfTheStart(Reference):
    """The trained parameters as they were at the beginning, in a copy on their device.

    Args:
        model: the model before its first step.
    """

    name = START

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = {name: parameter.detach().clone() for name, parameter in trainable(model)}

    @contextmanager
    def active(self) -> Iterator[None]:
        """A block in which the trained parameters have the values of the beginning; only the pointers are swapped."""
        parameters = dict(self._model.named_parameters())
        swapped: list[str] = []

        def swap(names: list[str]) -> None:
            for name in names:
                parameter = parameters[name]
                parameter.data, self._copies[name] = self._copies[name], parameter.data

        try:
            with DeferredInterrupts(to_the_end=True):
                swap([*self._copies])
                swapped += self._copies
            yield
        finally:
            with DeferredInterrupts(to_the_end=True):
                swap(swapped)

    def write(self, folder: Path) -> None:
        """Writes the copy."""
        write_tensors(folder / _FILE, storable(self._copies), {"reference": self.name})

    def read(self, folder: Path) -> None:
        """Restores the copy.

        Raises:
            CheckpointError: the file is missing, or has other parameters.
        """
        tensors, _ = _read(folder, self._model, self.name)
        shapes = [{name: value.shape for name, value in part.items()} for part in (tensors, self._copies)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{folder / _FILE} has other parameters than the adapter in training")
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor)


def _read(folder: Path, model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = folder / _FILE
    if not inside.leads_to_file(file):
        raise CheckpointError(f"{folder} has no {_FILE}: its training had another reference than {name!r}")
    tensors, metadata = read_state(file, model)
    if metadata.get("reference") != name:
        raise CheckpointError(f"the reference of {folder} is {metadata.get('reference')!r:.60}, not {name!r}")
    return tensors, metadata


def check_reference(
    model: nn.Module,
    given: Any,
    *,
    adapter: str | None,
    sweep: bool,
    sharded: bool,
    members: Collection[str] = (),
) -> None:
    """Refuses a reference that the training cannot have.

    Args:
        model: the model to train.
        given: ``base``, ``start``, the name of an adapter, or None.
        adapter: the adapter that will be activated, or None.
        sweep: whether several adapters are trained side by side.
        sharded: whether the model is sharded over several processes.
        members: the adapters of the model that are trained side by side; empty if a sweep creates its own.

    Raises:
        ConfigError: there is no such reference, or it does not support this training.
    """
    manager = manager_of(model)
    if manager is None:
        raise ConfigError(f"a reference needs adapters of nbpeft, not a {type(model).__name__}", field="reference")
    trained = members or (trained_names(model) if adapter is None else (adapter,))
    if given in (None, BASE, START):
        if given == START and sweep:
            raise ConfigError(
                "the adapters of a sweep have no common start: reference='base', or the name of the adapter from "
                "which they start",
                field="reference",
            )
        if given == START:
            _check_start(model, sharded=sharded)
        return
    if not isinstance(given, str) or given not in manager.configs:
        known = (BASE, START, *(name for name in manager.names if name not in trained))
        hint = did_you_mean(str(given), known)
        raise ConfigError(
            f"reference must be one of {', '.join(map(repr, known))}, not {given!r:.60}.{hint}", field="reference"
        )
    manager.require_available(given)
    if given in trained and (members or not sweep):
        instead = "take 'base', or another adapter" if sweep else "reference='start' is its weights at the beginning"
        raise ConfigError(f"{given!r} is trained here: {instead}", field="reference")


def _check_start(model: nn.Module, *, sharded: bool) -> None:
    if sharded:
        raise ConfigError(
            "reference='start' needs a copy of the weights, which fsdp shards: reference='base', or leave fsdp out",
            field="reference",
        )
    if keeps_method_state(model):
        raise ConfigError(
            "reference='start' is a copy of the weights, and the method of this adapter has a state besides them: "
            "reference='base', or the name of another adapter",
            field="reference",
        )


def reference_of(model: nn.Module, name: str) -> Reference:
    """Returns the reference of a training that begins now.

    Args:
        model: the model, with the adapters to train active.
        name: ``base``, ``start`` or the name of an adapter.
    """
    manager = require_manager(model)
    if name == BASE:
        return OfTheBase(manager)
    return OfTheStart(model) if name == START else OfAnAdapter(manager, name)


def trains_only_adapters(model: nn.Module) -> bool:
    """Whether every trained parameter is part of an active adapter, so that the base stays as it is."""
    manager = require_manager(model)
    biases = [tensor for name in trained_names(model) for tensor in manager.base_biases(name).values()]
    own = {id(tensor) for name in trained_names(model) for tensor in manager.parameters(name)}
    own -= {id(tensor) for tensor in biases}
    return all(id(parameter) in own for _, parameter in trainable(model))
