"""A bare parameter of a module that is not a layer: the weights of several experts in one tensor, or of a router.

    3-D   (experts, out, in), or (experts, in, out) if the module has ``is_transposed``
    2-D   (out, in)

A ``ParameterView`` shows it as the ``weight`` of a layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_layer_kind
from nbpeft.engine.kernels.live_parameters import LiveParameters
from nbpeft.errors import LayerKindError


class ParameterView(nn.Module):
    """A module whose ``weight`` is a parameter of another module, which it reads and writes in place.

    Args:
        owner: the module with the parameter.
        name: name of the parameter in the owner.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        live = LiveParameters({"weight": (owner, name)})
        self.__dict__.update(owner=owner, parameter_name=name, bias=None, _parameters=live, training=owner.training)

    owner: nn.Module
    parameter_name: str

    def __getattr__(self, name: str) -> Any:
        # Replicas and sharded modules have plain tensors instead of parameters.
        return getattr(self.owner, self.parameter_name) if name == "weight" else super().__getattr__(name)

    @property
    def is_transposed(self) -> bool:
        """Whether the owner stores its matrices as (in, out)."""
        return len(self.shape) == 3 and bool(getattr(self.owner, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.weight.shape)

    @property
    def count(self) -> int:
        """Number of matrices (experts)."""
        return self.shape[0] if len(self.shape) == 3 else 1


@register_layer_kind
class Parameter:
    """A bare parameter of 2 or 3 dimensions; the canonical weight is the parameter, unchanged."""

    name = "parameter"
    peft_name = "ParamWrapper"
    priority = 100
    is_linear = False
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, ParameterView)

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ParameterView)
        first, second = module.shape[-2:]
        return (first, second) if module.is_transposed else (second, first)

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        assert isinstance(module, ParameterView)
        return module.shape

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Always raises LayerKindError: only the module knows how its parameter is used."""
        raise LayerKindError("a bare parameter can only be applied by its module", kind=self.name)

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector
