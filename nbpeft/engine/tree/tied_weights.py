"""Weights that several modules of a model share, often the input embedding and the output head.

Merging an adapter on one of them must not change the others. The module therefore gets a separate weight when an
adapter is merged, and the shared one again when it is unmerged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import Adapter, source_of
from nbpeft.engine.tree.model_tree import TIED, bare_modules, base_model_of, embedding_of, sharing_embedding
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import MergeError, few


def layers_to_untie(model: nn.Module, layers: Mapping[str, AdaptedLayer], names: Sequence[str]) -> set[str]:
    """Finds the layers that need a separate weight before adapters are merged into them.

    Args:
        model: the base model.
        layers: path -> adapted layer.
        names: names of the adapters to merge.

    Returns:
        Paths of these layers.
    """
    changing = {
        path: [name for name in names if layer.changes_weight([name])]
        for path, layer in layers.items()
        if isinstance(layer.weight_module._parameters.get("weight"), nn.Parameter)
    }
    merging = {path: adapters for path, adapters in changing.items() if adapters}
    wanted = {id(layers[path].weight_module._parameters["weight"]) for path in merging}
    users: dict[int, set[int]] = {}
    for module in called_modules(model):
        # A layer with merged adapters has a separate copy at the moment, but will use the shared weight again.
        kept = [module.shared_weight] if isinstance(module, AdaptedLayer) else []
        for parameter in (*module._parameters.values(), *kept):
            if id(parameter) in wanted:
                users.setdefault(id(parameter), set()).add(id(module))
    if all(len(modules) == 1 for modules in users.values()):
        return set()
    untied: set[str] = set()
    for weight, modules in users.items():
        group = [path for path in merging if id(layers[path].weight_module._parameters["weight"]) == weight]
        if len(modules) > 1 and not _alike(layers, {path: merging[path] for path in group}, len(modules)):
            untied.update(group)
    return untied


def _alike(layers: Mapping[str, AdaptedLayer], group: Mapping[str, list[str]], users: int) -> bool:
    """Whether all layers with a weight change it equally, with the same tensors, so that it can stay shared."""
    changes = {change_of([(layers[path].adapter(name), 1.0) for name in names]) for path, names in group.items()}
    return len({id(layers[path]) for path in group}) == users and len(changes) == 1


def check_single(layer: AdaptedLayer, layers: Mapping[str, AdaptedLayer]) -> None:
    """Checks that a layer can be unmerged alone.

    Args:
        layer: the layer.
        layers: path -> adapted layer, of the whole model.

    Raises:
        MergeError: other layers have the same merged weight.
    """
    weight = layer.weight_module._parameters.get("weight")
    sharing = {
        path: other
        for path, other in layers.items()
        if weight is not None
        and other.weight_module._parameters.get("weight") is weight
        and other.changes_weight(other.merged_names)
    }
    own = next((path for path, other in sharing.items() if other is layer), "")
    others = [path for path, other in sharing.items() if other is not layer]
    if own and others:
        raise MergeError(
            f"{own} shares its merged weight with {few(others)}: unmerge the model (unmerge_adapter) first", path=own
        )


def change_of(adapters: Iterable[tuple[Adapter, float]]) -> tuple[tuple[int, float], ...]:
    """A key for the change of a weight by adapters; equal for adapters with the same tensors and scales.

    Args:
        adapters: (adapter, factor on its delta).
    """
    return tuple(
        (id(source_of(member) or member), scale * float(getattr(member, "scaling", 1.0))) for member, scale in adapters
    )


def modules_tied_to_embedding(model: nn.Module) -> list[str]:
    """Paths of the modules that share the weight of the input embedding, except the embedding itself.

    Args:
        model: a base model with or without adapters, or a handle.

    Returns:
        The paths, sorted; empty if the model's config declares the embeddings as untied.
    """
    base = base_model_of(model)
    return sorted(list(sharing_embedding(base, bare_modules(base)))[1:])


def untie_embeddings_(model: nn.Module, change: Transaction) -> None:
    """Sets a model's config to untied embeddings if they no longer share one weight.

    Otherwise loading the saved model would tie them again. All modules that still share a weight get separate copies,
    because the config can only declare all of them as tied or none.

    Args:
        model: the base model.
        change: records what is changed.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, TIED, False):
        return
    ends = [_embedding_weight(model, output=output) for output in (False, True)]
    if None in ends or ends[0] is ends[1]:
        return
    seen: set[int] = set()
    for module in called_modules(model):
        weight = module._parameters.get("weight")
        if weight is None or not any(weight is end for end in ends):
            continue
        if id(weight) in seen:
            own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            change.set_item(module._parameters, "weight", own)
        seen.add(id(weight))
    change.keep_attributes(config, TIED)
    setattr(config, TIED, False)
    warnings.warn(f"the embedding and the output head no longer share a weight: set config.{TIED}=False", stacklevel=4)


def _embedding_weight(model: nn.Module, *, output: bool) -> nn.Parameter | None:
    weight = getattr(embedding_of(model, output=output), "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
