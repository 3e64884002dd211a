"""A parameter mapping that reads and writes the parameters of other modules."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any, NoReturn

from torch import Tensor, nn

from nbpeft.errors import AdapterError

Slot = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


class LiveParameters(MutableMapping[str, Any]):
    """A replacement for ``_parameters`` of a module whose parameters belong to other modules.

    Args:
        slots: name in this module -> (owner, the parameter's name there); the owner may lack the parameter for a time.
    """

    __slots__ = ("_deleted", "_in_forward", "slots")  # DeepSpeed ZeRO-3 sets the second on every `_parameters`

    def __init__(self, slots: dict[str, Slot]) -> None:
        self.slots = slots
        self._deleted: tuple[str, weakref.ref[Any]] | None = None

    def __getitem__(self, name: str) -> Any:
        owner, own = self.slots[name]
        return owner._parameters[own]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.slots:
            self.refuse_others()
        owner, own = self.slots[name]
        present = owner._parameters.get(own, owner.__dict__.get(own))
        if present is not None and value is not None and present.shape != value.shape:
            raise ValueError(f"{own} must have shape {tuple(present.shape)}, not {tuple(value.shape)}")
        owner.__dict__.pop(own, None)
        owner._parameters[own] = value

    def __delitem__(self, name: str) -> None:
        owner, own = self.slots[name]
        parameter = owner._parameters.pop(own)
        self._deleted = None if parameter is None else (name, weakref.ref(parameter))

    def refuse_others(self) -> NoReturn:
        """Refuses further parameters, as pruning and weight norm add them, and puts back the one they have deleted.

        Raises:
            AdapterError: always.
        """
        name, deleted = self._deleted or ("", lambda: None)
        parameter = deleted()
        if parameter is not None and name not in self:
            self[name] = parameter
        raise AdapterError(
            f"{', '.join(self.slots)} of an adapter cannot be computed from other parameters (parametrizations, "
            "pruning, weight norm), because the layer reads it itself: use a layer class of your own "
            "(config._register_custom_module)"
        )

    def __contains__(self, name: object) -> bool:
        slot = self.slots.get(name)  # type: ignore[call-overload]
        return slot is not None and slot[1] in slot[0]._parameters

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self.slots if name in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def get_tensor(self, name: str) -> Any:
        """The owner's parameter, or the plain tensor that FSDP sets in its place; None if it has neither."""
        owner, own = self.slots[name]
        return owner._parameters.get(own, owner.__dict__.get(own))

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Sets a plain tensor in place of the owner's parameter, which FSDP has removed."""
        owner, own = self.slots[name]
        owner.__dict__[own] = value

    def copy(self) -> dict[str, Any]:
        """A plain dictionary of the current entries."""
        return {name: held[own] for name, (owner, own) in self.slots.items() if own in (held := owner._parameters)}

    def items(self) -> Any:
        """The current entries; torch asks every module for them."""
        return self.copy().items()
