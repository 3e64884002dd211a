"""A parameter mapping that reads and writes the parameters of other modules."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

Slot = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


class LiveParameters(MutableMapping[str, Any]):
    """A replacement for ``_parameters`` of a module whose parameters belong to other modules.

    Args:
        slots: name in this module -> (owner, the parameter's name there); the owner may lack the parameter for a time.
    """

    __slots__ = ("_in_forward", "slots")  # DeepSpeed ZeRO-3 sets the first on every `_parameters`

    def __init__(self, slots: dict[str, Slot]) -> None:
        self.slots = slots

    def __getitem__(self, name: str) -> Any:
        owner, own = self.slots[name]
        return owner._parameters[own]

    def __setitem__(self, name: str, value: Any) -> None:
        owner, own = self.slots[name]
        present = owner._parameters.get(own, owner.__dict__.get(own))
        if present is not None and value is not None and present.shape != value.shape:
            raise ValueError(f"{own} must have shape {tuple(present.shape)}, not {tuple(value.shape)}")
        owner.__dict__.pop(own, None)
        owner._parameters[own] = value

    def __delitem__(self, name: str) -> None:
        owner, own = self.slots[name]
        del owner._parameters[own]

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
        return dict(self)
