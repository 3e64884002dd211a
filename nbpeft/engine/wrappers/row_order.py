"""Checks by shape that a layer's input in a mixed batch is in the order of the batch's rows.

    (rows, positions, features)      as the model was called; beams, windows and choices of a row are adjacent
    (rows * positions, features)     flattened; the positions of a row are adjacent
    (some tokens, features)          tokens that a router selected for an expert; the shape does not show their rows
    (positions, rows, features)      positions first

The first two are supported. The others are refused if the shape shows them. An input that is reordered without
changing its shape (a flip, a permutation, a sort, positions first with as many positions as rows, or flattened that
way) cannot be detected, because values do not show which row they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveState, RowAssignment
from nbpeft.errors import AdapterError

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_EXPERT = re.compile(r"(?!.*shared).*expert_?\d+")
"""Names of modules that get only the tokens that a router selects."""
_EXPERTS = re.compile(r"(?!.*shared).*experts?(_?\d+)?")
"""The same, and names of modules that contain them."""
_WRAPPED = ("base_layer", "original_module")


def note_calls(model: nn.Module, active_state: ActiveState) -> Any:
    """Registers a hook on a model that records the shape of each call with a mixed batch.

    Args:
        model: the base model.
        active_state: state of its manager.

    Returns:
        The handle of the hook.
    """

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows = active_state.current().rows
        if rows is not None:
            names = (getattr(module, "main_input_name", ""), *_INPUTS)
            given = [*(kwargs.get(name) for name in names), *args, *kwargs.values()]
            rows.call.note([_tokens(value) for value in given if isinstance(value, Tensor)], len(rows.index))

    return model.register_forward_pre_hook(note, with_kwargs=True)


def _tokens(values: Tensor) -> tuple[int, ...]:
    """The shape of an input without the features: (rows, positions), (tokens,)."""
    return tuple(values.shape[:-1] if values.is_floating_point() else values.shape)


def check_row_order(rows: RowAssignment, x: Tensor, layer: Any) -> None:
    """Raises AdapterError if an input's shape shows that it is not in the order of the rows of a mixed batch.

    Reordering that does not change the shape is not detected; see the module's docstring.

    Args:
        rows: the assignment of the call.
        x: the layer's input: (…, features), or ids of any shape.
        layer: the wrapper of a layer or of a module.

    Raises:
        AdapterError: the shape shows another order, or tokens selected by a router.
    """
    if rows.is_uniform:
        return
    sizes, call = _tokens(x), rows.call
    if len(sizes) > 1 and call.batch in (None, sizes[0]):
        call.add_positions(sizes)
        return
    place = _path_of(layer)
    if _is_expert(place) or (len(sizes) == 1 and call.lengths and _is_chosen(layer._commands().manager.model, place)):
        reason = "gets tokens that a router selects from any row"
    elif call.batch is None:
        return
    elif len(sizes) == 1 and not call.holds(sizes[0]):
        reason = f"is called with {sizes[0]} rows, which are neither the {call.batch} of the batch nor their positions"
    elif len(sizes) > 1 and call.is_positions_first(sizes, x):
        reason = f"is called with positions first, {tuple(x.shape)}"
    else:
        return
    raise AdapterError(f"adapter_names: {place} {reason}; use a separate batch for each adapter", path=place)


def _path_of(layer: Any) -> str:
    """Path of the module that a wrapper calls."""
    manager = layer._commands().manager
    places = (*manager.layers.items(), *manager.copies.items())
    path = next((path for path, own in places if own is layer), type(layer).__name__)
    return path.removesuffix(f".{layer.__dict__.get('parameter_name')}")


def _is_expert(path: str) -> bool:
    """Whether a module has the name of an expert, or is inside a module with such a name."""
    *above, own = path.split(".")
    return _EXPERT.fullmatch(own) is not None or any(map(_EXPERTS.fullmatch, above))


def _is_chosen(model: nn.Module, path: str) -> bool:
    """Whether a module is in a list of similar modules next to a matrix with one row or column for each (a router)."""
    owner = model
    for parent, _ in _chain(model, path):
        if isinstance(parent, nn.ModuleList | nn.ModuleDict) and _has_router(owner, parent):
            return True
        owner = parent
    return False


def _chain(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Yields the modules on the path to a module, each with the name of the next one; wrappers are left out."""
    module: nn.Module | None = model
    for name in path.split("."):
        while module is not None and name not in module._modules and (inner := _inside(module)) is not None:
            module = inner
        if module is None:
            return
        yield module, name
        module = module._modules.get(name)


def _inside(module: nn.Module) -> nn.Module | None:
    return next((found for name in _WRAPPED if (found := module._modules.get(name)) is not None), None)


def _has_router(owner: nn.Module, listed: nn.Module) -> bool:
    """Whether a module with a list of similar modules also has a matrix with as many rows or columns."""
    count, kinds = len(listed._modules), {type(_inside(child) or child) for child in listed.children()}
    if count < 2 or len(kinds) > 1:
        return False
    others = [child for child in owner._modules.values() if child is not None and child is not listed]
    parts = [part for child in others for part in child.modules() if not isinstance(part, nn.Embedding)]
    matrices = (weight for part in (owner, *parts) for weight in part._parameters.values() if weight is not None)
    return any(weight.ndim == 2 and count in weight.shape for weight in matrices)
