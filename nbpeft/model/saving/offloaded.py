"""Tensors that accelerate keeps elsewhere between calls (``cpu_offload``, ``disk_offload``, ``device_map``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn

from nbpeft.engine.contract.base import all_onloaded, offloading
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import bare_modules, embedding_of
from nbpeft.errors import CheckpointError


def adapters_onloaded(manager: AdapterManager, *names: str) -> AbstractContextManager[None]:
    """Context manager: loads what is offloaded of the tensors that adapters' files can have.

    References to tensors that are taken inside the block keep their data.

    Args:
        manager: manager of the model.
        *names: names of the adapters.
    """
    modules = (module for name in names for module in _offloaded(manager, name))
    return all_onloaded({id(module): module for module in modules}.values())


def _offloaded(manager: AdapterManager, name: str) -> Iterator[nn.Module]:
    """Yields the modules with tensors of the adapter that may be offloaded: its parts, copies and biases."""
    for layer in manager.layers_with(name).values():
        yield from layer.offloaded_parts()
    for copied in manager.copies.values():
        if name in copied.modules_to_save:
            yield from copied.modules_to_save[name].modules()
    owners = {key.rpartition(".")[0] for key in manager.base_biases(name)}
    yield from (module for path, module in bare_modules(manager.model) if path in owners)


def refuse_offloaded_adapter(manager: AdapterManager, name: str) -> None:
    """Refuses to write to the tensors of an adapter that is offloaded: they would be lost in the next call.

    Args:
        manager: manager of the model.
        name: name of the adapter.

    Raises:
        CheckpointError: it is.
    """
    for module in _offloaded(manager, name):
        if offloading(module) is not None and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            raise CheckpointError(
                f"adapter {name!r} is offloaded: load its tensors before the model is offloaded, or after "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )


def embedding_weights(model: nn.Module, *, loaded: bool = False) -> dict[str, Tensor]:
    """Returns name in the bare model -> weight of the input and output embeddings, if there are any.

    Args:
        model: the base model, with or without adapters.
        loaded: load offloaded weights; otherwise they are on the meta device.
    """
    embeddings = [embedding_of(model, output=output) for output in (False, True)]
    wanted = {module for found in embeddings if found is not None for _, module in bare_modules(found)}
    with all_onloaded(wanted if loaded else ()):
        return {
            f"{path}.weight": weight
            for path, module in (bare_modules(model) if wanted else ())
            if module in wanted and isinstance(weight := module._parameters.get("weight"), Tensor)
        }


def refuse_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses to write to tensors that are offloaded.

    Args:
        model: the base model, with or without adapters.
        names: names of the tensors in the bare model.

    Raises:
        CheckpointError: one is offloaded.
    """
    owners = {name.rpartition(".")[0]: name for name in names}
    for path, module in bare_modules(model) if owners else ():
        if path in owners and offloading(module) is not None:
            raise CheckpointError(
                f"the adapter has its own {owners[path]}, which is offloaded in this model: load the model without "
                "offloading"
            )
