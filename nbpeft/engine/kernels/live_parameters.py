"""Parameters of a module that belong to other modules: read and written where they are."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

Slot = tuple[nn.Module, str]
"""A module and the name of a parameter of its."""


class LiveParameters(MutableMapping[str, Any]):
    """The parameters of a module that belong to others.

    Args:
        slots: name in the module -> the owner, and its own name of the parameter; it need not have one.
    """

    __slots__ = ("_in_forward", "slots")  # DeepSpeed ZeRO-3 notes the first

    def __init__(self, slots: dict[str, Slot]) -> None:
        self.slots = slots

    def __getitem__(self, name: str) -> Any:
        owner, own = self.slots[name]
        return owner._parameters[own]

    def __setitem__(self, name: str, value: Any) -> None:
        owner, own = self.slots[name]
        held = owner._parameters.get(own, owner.__dict__.get(own))
        if held is not None and value is not None and held.shape != value.shape:
            raise ValueError(f"{own} must have shape {tuple(held.shape)}, not {tuple(value.shape)}")
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

    def held(self, name: str) -> Any:
        """What the owner has in the place of a parameter: also a plain tensor, which FSDP puts there; or None."""
        owner, own = self.slots[name]
        return owner._parameters.get(own, owner.__dict__.get(own))

    def hold(self, name: str, value: Tensor) -> None:
        """Puts a plain tensor into the place of a parameter that was taken out."""
        owner, own = self.slots[name]
        owner.__dict__[own] = value

    def copy(self) -> dict[str, Any]:
        """A dictionary of what it holds now."""
        return dict(self)
