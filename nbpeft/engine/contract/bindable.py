"""Modules whose tensors and attributes are set without ``nn.Module.__setattr__``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class Bindable(nn.Module):
    """A module of which there is one for each adapted layer, or which all these layers refer to.

    ``nn.Module.__setattr__`` would take a tenth of the time of adding an adapter, and it would make a submodule of each
    layer of what all layers share.
    """

    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that are never trained."""

    def bind(self, tensors: Mapping[str, Tensor] | None = None, /, **attributes: Any) -> None:
        """Makes tensors parameters, and sets plain attributes.

        Args:
            tensors: parameter name -> tensor, or a parameter that is used as it is.
            **attributes: set as they are; modules among them do not become submodules.
        """
        if tensors:
            frozen = self.frozen_parameters
            for name, tensor in tensors.items():
                if not isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(tensor, name not in frozen)
                self._parameters[name] = tensor
        set_plain(self, **attributes)

    def ds_external_parameters(self) -> tuple[()]:
        """What DeepSpeed's ZeRO-3 asks each module with hooks for: parameters of other modules that it uses; none."""
        return ()

    @property
    def held(self) -> Mapping[str, Any]:
        """Its parameters by name; replicas of ``nn.DataParallel`` have plain attributes instead."""
        return self._parameters or self.__dict__

    def tensor(self, name: str) -> Tensor:
        """One of its parameters or buffers, which replicas of ``nn.DataParallel`` have as plain attributes."""
        found: Any = self._parameters.get(name)
        if found is None:
            found = self._buffers.get(name)
        return self.__dict__[name] if found is None else found  # type: ignore[no-any-return]


def set_plain(module: nn.Module, **attributes: Any) -> None:
    """Sets attributes of a module as they are; modules and parameters among them do not become its own."""
    module.__dict__.update(attributes)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter that a module itself registered; None if it has none of the name, even if it has an attribute."""
    return module._parameters.get(name)


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a module with other parameters; the module is left alone: other threads may run it."""
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    shell.__dict__["_parameters"] = {**module._parameters, **parameters}
    return shell
