"""Disables the fast path of nn.TransformerEncoderLayer, which reads weights of inner layers without calling them.

torch uses it in evaluation mode unless a module there has a hook. For the fast path nn.TransformerEncoder packs a
padded batch into a nested tensor, which the ordinary path does not support.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper

_PACKS = "use_nested_tensor"
_PACKED = "_nbpeft_use_nested_tensor"
"""Attribute that keeps an encoder's original ``use_nested_tensor``."""


def refresh_fast_paths(model: nn.Module, change: Transaction) -> None:
    """Makes encoder layers with adapters call their inner layers, and restores encoder layers without adapters.

    Args:
        model: the base model.
        change: records what is changed.
    """
    modules = called_modules(model)
    adapted = {id(module) for module in modules if is_encoder_layer(module) and _is_adapted(module)}
    for module in modules:
        if is_encoder_layer(module):
            _set_layer_calls(module, change, calls=id(module) in adapted)
        elif isinstance(module, nn.TransformerEncoder):
            _set_packing(module, change, packs=not any(id(layer) in adapted for layer in module.layers))


def is_encoder_layer(module: nn.Module) -> bool:
    """Whether a module has the fast path."""
    return isinstance(module, nn.TransformerEncoderLayer)


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(child, AdaptedLayer | ModulesToSaveWrapper) for child in module._modules.values())


def _set_layer_calls(module: nn.Module, change: Transaction, *, calls: bool) -> None:
    """Adds or removes the hook that makes an encoder layer call its inner layers."""
    own = [key for key, hook in module._forward_pre_hooks.items() if hook is _call_layers]
    if calls == bool(own):
        return
    change.keep(module._forward_pre_hooks)
    if calls:
        module.register_forward_pre_hook(_call_layers)
    for key in own:
        del module._forward_pre_hooks[key]


def _set_packing(module: Any, change: Transaction, *, packs: bool) -> None:
    """Disables an encoder's packing of padded batches, or restores its original setting."""
    change.keep_attributes(module, _PACKS, _PACKED)
    if not packs and getattr(module, _PACKS, False):
        module.__dict__.update({_PACKS: False, _PACKED: True})
    elif packs and module.__dict__.pop(_PACKED, False):
        module.__dict__[_PACKS] = True


def _call_layers(module: nn.Module, args: Any) -> None:
    """Does nothing: torch takes the ordinary path if a layer has any hook."""
