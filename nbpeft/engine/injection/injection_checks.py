"""Checks which modules of a model cannot have an adapter, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.tree.model_tree import read_directly
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError, LayerKindError, TargetError, shown

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def bypassed(model: nn.Module, path: str) -> str:
    """Why an adapter on a layer would have no effect.

    Args:
        model: the base model.
        path: path of the layer.

    Returns:
        Part of a sentence; empty if it would have an effect.
    """
    if path.rpartition(".")[2] not in read_directly(model):
        return ""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return f"{kind} reads its weight without calling it, so an adapter would have no effect"


def check_called(model: nn.Module, path: str) -> None:
    """Raises TargetError if an adapter would have no effect, because the model does not call the layer."""
    reason = bypassed(model, path)
    if reason:
        name = path.rpartition(".")[2]
        raise TargetError(
            f"{path} cannot be adapted: {reason}; remove {name!r} from target_modules or exclude it", path=path
        )


def check_shaped(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises LayerKindError if a lazy layer has no shape yet."""
    for path, module in modules:
        if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
            raise LayerKindError(
                f"{path} is a {type(module).__name__:.60} that has no shape yet: call the model with a batch first",
                path=path,
            )


def check_copy(path: str, module: nn.Module, wrapper: nn.Module | None) -> None:
    """Checks that a module can be trained as a whole (``modules_to_save``).

    Args:
        path: path of the module.
        module: the base module.
        wrapper: around it now, or None.

    Raises:
        TargetError: it has adapters, or stores quantized matrices.
        LayerKindError: it is a container without a forward.
    """
    if isinstance(wrapper, AdaptedLayer):
        raise TargetError(f"{path} already has adapters and cannot be trained as a whole (modules_to_save)")
    inner = next((name for name, part in module.named_modules() if isinstance(part, AdaptedLayer)), None)
    if inner is not None:
        raise TargetError(f"{path} cannot be trained as a whole (modules_to_save): its {inner} has adapters")
    stored = ((name, part) for name, part in module.named_parameters() if isinstance(part, QuantizedMatrices))
    for name, part in stored:
        raise TargetError(
            f"{path} cannot be trained as a whole (modules_to_save): its {name} is stored in {part.form.label}; add an "
            "adapter to it (target_parameters)"
        )
    if isinstance(module, _CONTAINERS):
        raise LayerKindError(
            f"modules_to_save cannot be applied to modules of type {type(module).__name__}, such as {path}, which "
            "has no forward(); name the modules inside it",
            path=path,
        )


def check_shapes(adapter_class: type[Any], path: str, shapes: object) -> None:
    """Checks what ``parameter_shapes`` returned for a layer.

    Args:
        adapter_class: class of the adapter.
        path: path of the layer.
        shapes: what it returned.

    Raises:
        ConfigError: it is no dictionary from names to tuples of sizes.
    """
    if not (isinstance(shapes, Mapping) and all(map(_is_shape, shapes.values()))):
        raise ConfigError(
            f"{path}: {adapter_class.__name__}.parameter_shapes must return a tuple of whole numbers for each "
            f"parameter, by name, not {shown(shapes)}"
        )


def _is_shape(shape: object) -> bool:
    # This runs for every parameter of an adapter, and asking for an abstract class takes longer than all the rest.
    if type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape):
        return True
    return isinstance(shape, Sequence) and all(isinstance(size, Integral) and int(size) >= 0 for size in shape)
