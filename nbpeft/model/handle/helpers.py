"""The functions of ``peft.helpers``."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from nbpeft import checkpoint
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.contract.adapter import Rescales
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, ConfigError, NbpeftError, did_you_mean
from nbpeft.model.handle.peft_model import PeftModel

_METHODS = ("forward", "generate", "all")


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder or a hub repository has a saved adapter of a supported method."""
    try:
        checkpoint.read_config(str(model_name_or_path))
    except (NbpeftError, OSError, ValueError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiplies the scaling of every adapter while the block runs.

    A dictionary ``layer.scaling`` that was read before the block, or in it, is not changed.

    Args:
        model: any model with adapted layers.
        multiplier: factor on the scaling of every adapter on every layer.

    Raises:
        TypeError: the multiplier is not a number.
        AdapterError: the model has no adapted layer.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    # A list of the adapter modules, not names: an adapter can be renamed or deleted inside the block.
    adapters = [module for module in called_modules(model) if isinstance(module, Rescales)]
    if not adapters:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s: none here has a scaling")
    with ExitStack() as stack:
        _keep_scalings(model)
        for adapter in adapters:
            scaling = float(adapter.scaling)
            stack.callback(adapter.rescale, scaling)
            adapter.rescale(scaling * multiplier)
        stack.callback(_keep_scalings, model)
        yield


def _keep_scalings(model: nn.Module) -> None:
    """Replaces each layer's ``scaling`` by a copy, so that a dictionary that was read before is not changed."""
    for layer in called_modules(model):
        if isinstance(layer, AdaptedLayer) and getattr(layer, "scaling", None):
            layer.scaling = layer.scaling.copy()


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Does nothing: an adapter computes in the dtype of its tensors at the time of the call, whatever the input's.

    So it also works with weights that hooks cast to another dtype during a forward pass.

    Args:
        model: accepted for compatibility with PEFT and ignored.
        active: accepted for compatibility with PEFT and ignored.
    """
    yield


def update_forward_signature(model: PeftModel) -> None:
    """Gives a PeftModel's ``forward`` the base model's documentation if its signature is ``*args, **kwargs``."""
    _borrow(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Gives a PeftModel's ``generate`` the documentation of the base model's, if it has one."""
    if hasattr(model.get_base_model(), "generate"):
        _borrow(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Calls ``update_forward_signature``, ``update_generate_signature`` or both.

    Args:
        model: the PeftModel.
        method: "forward", "generate" or "all".

    Raises:
        ConfigError: the method is none of these.
    """
    if method not in _METHODS:
        raise ConfigError(
            f"method must be one of {', '.join(map(repr, _METHODS))}, not {method!r}."
            + did_you_mean(str(method), _METHODS)
        )
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _borrow(model: PeftModel, name: str) -> None:
    own: Any = getattr(type(model), name)
    kinds = {parameter.kind for key, parameter in inspect.signature(own).parameters.items() if key != "adapter_names"}
    if inspect.Parameter.VAR_KEYWORD not in kinds or "input_ids" in inspect.signature(own).parameters:
        return

    def borrowed(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    theirs = getattr(type(model.get_base_model()), name)
    functools.update_wrapper(borrowed, theirs, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, MethodType(borrowed, model))


class MontecloraTrainerMixin:
    """PEFT's mixin for Trainers of MonteCLoRA. It is empty, because the model's loss includes the divergence."""
