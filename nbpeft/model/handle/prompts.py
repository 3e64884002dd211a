"""PEFT's interface to learned prompts on a PeftModel: the prompts, their encoders and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.manual_prompts import inserting_prompts, note_requested
from nbpeft.engine.calls.model_calls import cache_of, prompt_of
from nbpeft.engine.changes.called_modules import outside
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import unknown_adapter
from nbpeft.engine.contract.model_adapter import ModelAdapter, learns_prompt
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import MANAGER, embedding_of, frozen_module, walk
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import AdapterError, with_article
from nbpeft.model.saving.files import file_tensors

_LISTED = ModelAdapter.peft.shown_as
"""Name under which a PeftModel lists learned prompts."""


class ShowsPrompts(nn.Module):
    """Base class of ``PeftModel``: has learned prompts under PEFT's names, and as its own modules as PEFT does.

    They are its own modules only if the first adapter is a prompt; else they are those of the embedding's wrapper.
    """

    @property
    def manager(self) -> AdapterManager:
        """The manager of the base model's adapters."""
        manager: AdapterManager = self.__dict__[MANAGER]
        return manager

    # The module tree in PEFT's layout

    @property
    def _lists_prompts(self) -> bool:
        return _LISTED in self._modules

    def _list_prompts(self, change: Transaction) -> None:
        """Lists learned prompts as own modules if the first adapter is a prompt."""
        prompted = _prompted(self.manager)
        first = next(iter(self.manager.configs), None)
        apart = any(first in layer.adapters._modules for layer in prompted)
        self.manager.layer_commands.list_apart(prompted, change, apart=apart)
        change.keep(self._modules)
        if apart:
            self._modules[_LISTED] = prompted[0].adapters

    def _update_prompts(self) -> None:
        """Updates the prompts among the own modules, if there are any."""
        if not self._lists_prompts:
            return
        manager = self.manager
        for layer in _prompted(manager):
            if not layer.listed_apart or layer.is_outside != (str(id(layer)) in outside(manager.model)):
                with manager.transaction(during_calls=True, quiet=True) as change:
                    manager.layer_commands.list_apart([layer], change, apart=True)
            self._modules[_LISTED] = layer.adapters if layer.is_outside else nn.ModuleDict()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules of PEFT's layout; see ``nn.Module``."""
        self._update_prompts()
        yield from super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the state dict in PEFT's layout; see ``nn.Module``."""
        self._update_prompts()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._update_prompts()
        if self._lists_prompts:
            state_dict.pop(f"{prefix}word_embeddings.weight", None)  # PEFT lists the embedding twice
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # What scripts read and call

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """Adapter name -> adapter, for those with a learned prompt; its ``embedding`` has the trained rows.

        Raises:
            AttributeError: there are none.
        """
        return _encoders(self.manager)

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Adapter name -> ids of the virtual tokens of its prompt, int64 (tokens,)."""
        encoders = map(str, _encoders(self.manager))
        return {name: torch.arange(_config(self.manager, name).total_tokens) for name in encoders}

    @property
    def word_embeddings(self) -> Any:
        """The model's input embedding, if an adapter has a learned prompt; None where a prefix found none.

        Raises:
            AttributeError: no adapter has a learned prompt.
        """
        _encoders(self.manager)
        layer = _prompted(self.manager)[0]
        return layer.in_tree if layer.kind.takes_ids else None

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Returns the active prompt for a batch.

        What calls this puts the prompt in itself: later calls of the base model with embeddings or a cache do not get
        it a second time, those of this PeftModel do.

        Args:
            batch_size: number of rows.
            task_ids: task of each row, (rows,) int64, for multitask prompts.
            max_cache_len: accepted for compatibility with PEFT and ignored; the cache of a prefix grows.

        Returns:
            Embeddings (rows, tokens, features), or a cache that begins with the prefix.

        Raises:
            AdapterError: no active adapter has a learned prompt.
        """
        manager = self.manager
        note_requested(manager.active_state)
        for name in manager.active:
            for layer in manager.layers_with(name).values():
                adapter = layer.adapter(name)
                if learns_prompt(adapter):
                    base = layer.base.within(task_ids)
                    if adapter.state_count:
                        return cache_of(manager.model, adapter, base, batch_size)
                    return prompt_of(adapter, base, batch_size)
        raise AdapterError("the active adapter is not of a prompt method")

    def _prompts_put_in(self, task_ids: Tensor | None) -> AbstractContextManager[None]:
        """Context manager around a call: prompts are put in, those of ``get_prompt`` where a script replaced it."""
        if not self._lists_prompts:
            return nullcontext()
        if "get_prompt" not in self.__dict__ and type(self).get_prompt is ShowsPrompts.get_prompt:
            return inserting_prompts()
        return inserting_prompts(lambda batch: self.get_prompt(batch_size=batch, task_ids=task_ids))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Returns the prompt as saved in files, (tokens, features), detached, on the CPU."""
        _config(self.manager, adapter_name)
        return file_tensors(self.manager, adapter_name)["prompt_embeddings"].detach().cpu()


def _prompted(manager: AdapterManager) -> list[AdaptedLayer]:
    """Returns the layers with learned prompts, i.e. the input embedding."""
    return [layer for layer in manager.layers.values() if any(map(learns_prompt, layer.adapters._modules.values()))]


def _encoders(manager: AdapterManager) -> nn.ModuleDict:
    """Returns the adapters with a learned prompt by name, in a new container.

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
        raise AttributeError("no adapter of this model is of a prompt method, so there is no prompt_encoder")
    return Encoders(found)


class Encoders(nn.ModuleDict):
    """Learned prompts by adapter name; one that is assigned takes the place of the trained one."""

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(encoders)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Gives an adapter the parameters of another encoder of the same kind.

        Args:
            name: name of the adapter.
            module: the encoder, whose parameters are the adapter's from now on.

        Raises:
            UnknownAdapterError: no learned prompt has this name.
            AdapterError: the encoder is of another class, or its parameters have other shapes.
        """
        if name not in self._modules:
            raise unknown_adapter(name, [*self])
        encoder = self[name]
        if type(module) is not type(encoder):
            raise AdapterError(
                f"the prompt encoder of {name!r} is a {type(encoder).__name__}: {with_article(module)} would not be "
                "called. To compute the prompt otherwise, derive a PeftModel class with get_prompt()"
            )
        given, own = dict(module.named_parameters()), dict(encoder.named_parameters())
        shapes, expected = ({path: tuple(one.shape) for path, one in all_.items()} for all_ in (given, own))
        if shapes != expected:
            raise AdapterError(f"the prompt encoder of {name!r} has parameters {expected}, the assigned one {shapes}")
        for path, parameter in given.items():
            owner, _, last = path.rpartition(".")
            setattr(encoder.get_submodule(owner), last, parameter)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_modules", {}):
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __delitem__(self, name: str) -> None:
        """Refuses.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(f"the prompt of adapter {name!r} cannot be taken out alone: use delete_adapter({name!r})")


def _config(manager: AdapterManager, name: str) -> Any:
    manager.require(name)
    config = manager.configs[name]
    if not config.learns_prompt:
        raise AdapterError(f"adapter {name!r} is not of a prompt method")
    return config


def resize_token_embeddings(manager: AdapterManager, *args: Any, **kwargs: Any) -> Any:
    """Resizes the embeddings with the model's own method, which requires unwrapped layers, and restores the prompts.

    Args:
        manager: manager of the model.
        *args: arguments of the model's ``resize_token_embeddings``.
        **kwargs: keyword arguments of it.

    Returns:
        The result of that method: the input embedding.

    Raises:
        AdapterError: an adapter has tensors of the size of the vocabulary.
    """
    model: Any = manager.model
    with manager.transaction() as change:
        ends = [embedding_of(model), embedding_of(model, output=True)]
        if ends[0] is not None:  # transformers resizes it before it fails at an adapted head
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
                "an adapter on the embeddings has tensors of the vocabulary's size: call resize_token_embeddings() "
                "before adding the adapter"
            ) from error
        for modules, name, layer in prompted:
            base_layer = modules[name]
            assert isinstance(layer, AdaptedLayer) and base_layer is not None
            layer.replace_base_layer(base_layer, change)
            change.set_item(modules, name, layer)
    return resized


def _is_bare(wrapper: nn.Module | None) -> TypeGuard[AdaptedLayer]:
    """Returns whether all adapters on a layer change only calls of the model, and not the layer itself."""
    return isinstance(wrapper, AdaptedLayer) and all(
        isinstance(adapter, ModelAdapter) for adapter in wrapper.adapters._modules.values()
    )
