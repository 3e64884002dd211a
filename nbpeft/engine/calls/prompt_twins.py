"""A copy of the module tree for a second prompt: prompts change no weights, so two can be trained on one base.

A prompt belongs to the input embedding and changes calls of the model. So a twin has its own modules on the path to
these; it shares all other modules, and every tensor, with the base.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.calls.model_calls import LayerHook
from nbpeft.engine.changes.called_modules import OUTSIDE
from nbpeft.engine.contract.model_adapter import learns_prompt
from nbpeft.engine.tree.model_tree import MANAGER, embedding_of, walk
from nbpeft.engine.wrappers.extension import on_models
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import twin_of


def twin_without_prompts(model: nn.Module) -> nn.Module | None:
    """A model that shares modules and tensors with a base model, but has none of its prompts.

    Args:
        model: the base model, which is not changed.

    Returns:
        The model; None if the input embedding also has other adapters, which the twin would lack.
    """
    wrappers = {id(site.wrapper): site.wrapper for site in walk(model) if isinstance(site.wrapper, AdaptedLayer)}
    prompted = {key for key, layer in wrappers.items() if any(map(learns_prompt, layer.adapters.values()))}
    embedding = embedding_of(model)
    places = prompted if embedding is None else {*prompted, id(embedding)}
    for key in places & wrappers.keys():
        if not all(map(learns_prompt, wrappers[key].adapters.values())):
            return None
    return _Twins(places | {id(wrappers[key].in_tree) for key in prompted}).of(model)


class _Twins:
    """Makes the twins of a model's modules, each once.

    Args:
        places: ids of the modules whose parents are all twins; a wrapper among them is replaced by its frozen layer.
    """

    def __init__(self, places: set[int]) -> None:
        self._places = places
        self._made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of a model, without the adapters' manager."""
        twin = self._made_of(module)
        copied: Any = _twin(module, {}) if twin is module else twin
        for attribute in (MANAGER, OUTSIDE, *on_models):
            copied.__dict__.pop(attribute, None)
        return copied

    def _made_of(self, module: nn.Module) -> nn.Module:
        """The twin of a module that contains one of the places or has a prompt's hooks; else the module itself."""
        if id(module) in self._made:
            return self._made[id(module)]
        if id(module) in self._places:
            return module.base_layer if isinstance(module, AdaptedLayer) else module
        children = {name: self._made_of(child) for name, child in module._modules.items() if child is not None}
        leads = any(id(child) in self._places for child in module._modules.values())
        leads |= any(child is not module._modules[name] for name, child in children.items())
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        twin = _twin(module, children) if leads or any(map(_is_of_prompt, hooks)) else module
        self._made[id(module)] = twin
        return twin


def _twin(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    twin: Any = twin_of(module, {}, children)
    attributes = twin.__dict__
    # The same dictionary object, as for buffers: moving either model to a device or dtype moves both.
    attributes["_parameters"] = module._parameters
    for name, hooks in vars(module).items():
        if "_hooks" in name and isinstance(hooks, dict):
            attributes[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_prompt(hook))
    return twin


def _is_of_prompt(hook: Any) -> bool:
    return isinstance(hook, LayerHook)
