"""What PEFT's users reach for on a handle with a learned prompt: the prompts, their encoders and tokens."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_calls import cache_of, prompt_of
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.model_adapter import ModelAdapter, learns_prompt
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import embedding_of, frozen_module, walk
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import AdapterError
from nbpeft.model.saving.files import file_tensors

LISTED = ModelAdapter.peft.shown_as
"""Name under which a handle lists learned prompts."""


def list_apart(manager: AdapterManager, modules: dict[str, nn.Module | None], change: Transaction) -> None:
    """Lists the learned prompts of a model as its handle's own, as PEFT does, where its first adapter is one.

    Args:
        manager: of the model.
        modules: those of the handle, changed in place.
        change: records it.
    """
    prompted = _prompted(manager)
    first = next(iter(manager.configs), None)
    apart = any(first in layer.adapters._modules for layer in prompted)
    for layer in prompted:
        change.keep_attributes(layer, "listed_apart")
        layer.__dict__["listed_apart"] = apart
    change.keep(modules)
    if apart:
        modules[LISTED] = prompted[0].adapters


def list_anew(manager: AdapterManager, modules: dict[str, nn.Module | None]) -> None:
    """Brings what a handle lists up to date, where it lists prompts at all; see ``list_apart``."""
    if LISTED not in modules:
        return
    for layer in _prompted(manager):
        layer.__dict__["listed_apart"] = True
        modules[LISTED] = layer.adapters if layer.is_passed_over else nn.ModuleDict()


def _prompted(manager: AdapterManager) -> list[AdaptedLayer]:
    """The layers at which learned prompts are, which is the input embedding."""
    return [layer for layer in manager.layers.values() if any(map(learns_prompt, layer.adapters._modules.values()))]


def encoders(manager: AdapterManager) -> nn.ModuleDict:
    """Returns the adapters that learn a prompt, by name; the modules themselves, in a new container.

    Raises:
        AttributeError: there are none.
    """
    found: dict[str, nn.Module] = {
        name: adapter
        for layer in manager.layers.values()
        for name, adapter in layer.adapters.items()
        if learns_prompt(adapter)
    }
    if not found:
        raise AttributeError("no adapter of this model learns a prompt, so there is no prompt_encoder")
    return nn.ModuleDict(found)


def tokens(manager: AdapterManager) -> dict[str, Tensor]:
    """Returns the numbers of the tokens of each prompt, int64 (tokens,), by adapter name."""
    return {str(name): torch.arange(_config(manager, str(name)).total_tokens) for name in encoders(manager)}


def word_embeddings(manager: AdapterManager) -> nn.Module:
    """Returns the model's input embedding.

    Raises:
        AttributeError: no adapter learns a prompt.
    """
    encoders(manager)
    found = _prompted(manager)[0]
    return found.base_layer if found.is_passed_over else found


def resize_token_embeddings(manager: AdapterManager, *args: Any, **kwargs: Any) -> Any:
    """Resizes the embeddings of a model with its own method, which needs to find them bare; prompts stay on them.

    Args:
        manager: of the model.
        *args: for the model's ``resize_token_embeddings``.
        **kwargs: likewise.

    Returns:
        What that returns: the input embedding.

    Raises:
        AdapterError: an adapter has tensors of the size of the vocabulary.
    """
    model: Any = manager.model
    with manager.transaction() as change:
        ends = [embedding_of(model), embedding_of(model, output=True)]
        if ends[0] is not None:  # which is resized before the head is found to have an adapter
            bare = frozen_module(ends[0])
            change.keep_data(bare.parameters())
            change.keep_attributes(bare, "num_embeddings", "padding_idx")
            for place in (model, getattr(model, "config", None)):  # written before a tied head is found to have one
                if hasattr(place, "vocab_size"):
                    change.keep_attributes(place, "vocab_size")
        adapted = {end for end in ends if isinstance(end, AdaptedLayer | ModulesToSaveWrapper)}
        prompted = [
            (site.parent._modules, site.attribute, site.wrapper)
            for site in walk(model)
            if site.wrapper is not None and site.wrapper in adapted and _is_bare(site.wrapper)
        ]
        for modules, name, layer in prompted:
            change.set_item(modules, name, layer.base_layer)
        try:
            resized = model.resize_token_embeddings(*args, **kwargs)
        except (TypeError, KeyError) as error:  # the latter where the weight of the head is to be tied again
            if adapted.issubset(layer for _, _, layer in prompted):
                raise
            raise AdapterError(
                "an adapter on the embeddings has tensors of the size of the vocabulary: resize_token_embeddings() "
                "comes before the adapter"
            ) from error
        for modules, name, layer in prompted:
            base_layer = modules[name]
            assert isinstance(layer, AdaptedLayer) and base_layer is not None
            layer.replace_base_layer(base_layer, change)
            change.set_item(modules, name, layer)
    return resized


def _is_bare(wrapper: nn.Module | None) -> TypeGuard[AdaptedLayer]:
    """Whether all adapters on a layer act on calls of the model and leave the layer as it is."""
    return isinstance(wrapper, AdaptedLayer) and all(
        isinstance(adapter, ModelAdapter) for adapter in wrapper.adapters._modules.values()
    )


def embedding_to_save(manager: AdapterManager, name: str) -> Tensor:
    """Returns what the file of a prompt holds, (tokens, features), detached, on the CPU."""
    _config(manager, name)
    return file_tensors(manager, name)["prompt_embeddings"].detach().cpu()


def prompt(manager: AdapterManager, batch_size: int, task_ids: Tensor | None) -> Any:
    """Returns what the active prompt puts in front of a batch.

    Args:
        manager: of the model.
        batch_size: rows.
        task_ids: (rows,) int64, for methods that have tasks.

    Returns:
        Embeddings (rows, tokens, features), or a cache that begins with the prefix.

    Raises:
        AdapterError: no active adapter learns a prompt.
    """
    for name in manager.active:
        for layer in manager.layers.values():
            adapter = layer.adapters._modules.get(name)
            if learns_prompt(adapter):
                base = layer.base.within(task_ids)
                if adapter.state_count:
                    return cache_of(manager.model, adapter, base, batch_size)
                return prompt_of(adapter, base, batch_size)
    raise AdapterError("the active adapter learns no prompt")


def _config(manager: AdapterManager, name: str) -> Any:
    manager.require(name)
    config = manager.configs[name]
    if not config.is_prompt_learning:
        raise AdapterError(f"adapter {name!r} learns no prompt")
    return config
