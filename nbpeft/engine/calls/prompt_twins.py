"""A base model of its own for a second prompt: prompts change no weights, so that two can be learned over one base.

The input embedding is where a prompt is kept, and calls of the model are where it acts. So a twin has those modules of
its own that lead to them; all others, and every tensor, are the base's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.calls.model_calls import LayerHook
from nbpeft.engine.contract.model_adapter import learns_prompt
from nbpeft.engine.tree.model_tree import MANAGER, embedding_of, walk
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import twin_of


def twin_without_prompts(model: nn.Module) -> nn.Module | None:
    """A model that shares its modules and tensors with a base model, but carries none of the prompts that are on it.

    Args:
        model: the base model, which stays as it is.

    Returns:
        None where the input embedding has other adapters, too, which would have to be left behind.
    """
    wrappers = {id(site.wrapper): site.wrapper for site in walk(model) if isinstance(site.wrapper, AdaptedLayer)}
    prompted = {key for key, layer in wrappers.items() if any(map(learns_prompt, layer.adapters.values()))}
    embedding = embedding_of(model)
    for key in {*prompted, id(embedding)} & wrappers.keys():
        if not all(map(learns_prompt, wrappers[key].adapters.values())):
            return None
    return _Twins({*prompted, id(embedding)}).of(model)


class _Twins:
    """Makes the twins of a model's modules, each once.

    Args:
        places: ids of modules around which everything is a twin; of wrappers the frozen layer is left.
    """

    def __init__(self, places: set[int]) -> None:
        self._places = places
        self._made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of a model, without the manager of its adapters."""
        twin = self._made_of(module)
        made: Any = _twin(module, {}) if twin is module else twin
        for attribute in (MANAGER, "peft_config"):
            made.__dict__.pop(attribute, None)
        return made  # type: ignore[no-any-return]

    def _made_of(self, module: nn.Module) -> nn.Module:
        """The twin of a module that leads to one of the places, or on which a prompt acts; else the module itself."""
        if id(module) in self._made:
            return self._made[id(module)]
        if id(module) in self._places:
            return module.base_layer if isinstance(module, AdaptedLayer) else module
        children = {name: self._made_of(child) for name, child in module._modules.items() if child is not None}
        leads = any(id(child) in self._places for child in module._modules.values())
        leads |= any(child is not module._modules[name] for name, child in children.items())
        twin = _twin(module, children) if leads or any(map(_is_of_prompt, _hooks_of(module))) else module
        self._made[id(module)] = twin
        return twin


def _twin(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    twin: Any = twin_of(module, {}, children)
    own = twin.__dict__
    own["_parameters"] = module._parameters  # the very dictionaries, as of buffers: what is moved, is moved for both
    for name, hooks in vars(module).items():
        if "_hooks" in name and isinstance(hooks, dict):
            own[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_prompt(hook))
    return twin  # type: ignore[no-any-return]


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _is_of_prompt(hook: Any) -> bool:
    return isinstance(hook, LayerHook)
