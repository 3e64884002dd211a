"""Modules whose tensors and attributes are set without ``nn.Module.__setattr__``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn


class Bindable(nn.Module):
    """Base class of adapters and of the states that their layers share.

    It bypasses ``nn.Module.__setattr__`` for two reasons: that would take a tenth of the time of adding an adapter, and
    would register a state that all layers share as a submodule of each of them.
    """

    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that are never trained."""

    def bind(self, tensors: Mapping[str, Tensor] | None = None, /, **attributes: Any) -> None:
        """Registers parameters and sets plain attributes.

        Args:
            tensors: parameter name -> tensor, which is wrapped in an ``nn.Parameter`` unless it is one already.
            **attributes: set without registering; a module among them does not become a submodule.
        """
        if tensors:
            frozen = self.frozen_parameters
            for name, tensor in tensors.items():
                if not isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(tensor, name not in frozen)
                self._parameters[name] = tensor
        set_plain(self, **attributes)

    def ds_external_parameters(self) -> tuple[()]:
        """Parameters of other modules that this one uses: none. DeepSpeed's ZeRO-3 calls it on modules with hooks."""
        return ()

    @overload
    def tensor(self, name: str) -> Tensor: ...

    @overload
    def tensor(self, name: str, *, optional: Literal[True]) -> Tensor | None: ...

    def tensor(self, name: str, *, optional: bool = False) -> Tensor | None:
        """One of its parameters or buffers by name.

        In a replica of ``nn.DataParallel`` parameters are plain attributes, which are found too.

        Args:
            name: name of the parameter or buffer.
            optional: return None if there is none of that name.
        """
        tensor: Any = self._parameters.get(name)
        if tensor is not None:
            return tensor
        tensor = self._buffers.get(name)
        if tensor is None:
            tensor = self.__dict__.get(name) if optional else self.__dict__[name]
        return tensor


def stored(name: str) -> Any:
    """A property of a ``Bindable``: its parameter or buffer of another name."""
    return property(lambda self: self.tensor(name))


def axis_size(name: str, axis: int = 0) -> Any:
    """A property of a ``Bindable``: the size of a parameter or buffer along an axis, such as a rank.

    Args:
        name: name of the parameter or buffer.
        axis: the axis.
    """
    return property(lambda self: int(self.tensor(name).shape[axis]))


def set_plain(module: nn.Module, **attributes: Any) -> None:
    """Sets attributes of a module without registering them, even if they are modules or parameters.

    Args:
        module: the module.
        **attributes: name -> value.
    """
    module.__dict__.update(attributes)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter registered under a name in the module itself; None if there is none.

    A property or plain attribute of that name is ignored.
    """
    return module._parameters.get(name)


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a module in which some parameters are replaced.

    The module itself is not changed, because other threads may be running it.

    Args:
        module: the module to copy.
        parameters: name -> replacement, or None for a parameter that is absent.

    Returns:
        The copy, which shares all other state with ``module``.
    """
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    shell.__dict__["_parameters"] = {**module._parameters, **parameters}
    return shell
