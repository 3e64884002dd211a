"""State dicts: an adapter's under the keys of PEFT's files, and the base model's without its adapters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterWeights, StartsInWeight, UsesAnother
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import bare_modules, bare_names, unwrapped
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import BaseMismatchError, CheckpointError, did_you_mean, few
from nbpeft.model.saving.files import LoadResult, embedding_weights, file_tensors, load_result, replaced_state_dict
from nbpeft.model.saving.sharded import like

_Arguments = ParamSpec("_Arguments")


def _in_one_transaction(function: Callable[_Arguments, LoadResult]) -> Callable[_Arguments, LoadResult]:
    """Decorator of what writes into a ``model``, its first argument: no thread comes between its checks and it."""

    @functools.wraps(function)
    def command(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> LoadResult:
        model: Any = args[0] if args else kwargs["model"]
        with require_manager(model).transaction():
            return function(*args, **kwargs)

    return command


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Returns the tensors of one adapter under the keys of its file.

    Args:
        model: a PeftModel or an adapted base model.
        state_dict: take the tensors from here instead of from the model, or from a ``state_dict()`` put on it.
        adapter_name: which adapter.
        unwrap_compiled: accepted for PEFT's sake; a compiled model is always unwrapped.
        save_embedding_layers: also the embeddings; "auto" decides from the model.

    Returns:
        References to the tensors, detached. Keys are those of a file for a handle; for a base model
        adapted without one they lack the ``base_model.model.`` in front, as in PEFT.
    """
    manager = require_manager(model)
    given = replaced_state_dict(model, manager) if state_dict is None else state_dict
    tensors = file_tensors(manager, adapter_name, embeddings=save_embedding_layers, state_dict=given)
    if unwrapped(model) is manager.model:
        return {checkpoint.without_prefix(key): tensor for key, tensor in tensors.items()}
    return tensors


@torch.no_grad()
@_in_one_transaction
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copies tensors under the keys of a file into an adapter that is on the model.

    Args:
        model: a PeftModel or an adapted base model.
        peft_model_state_dict: key -> tensor; also (part of) the state dict of a whole model, whose keys
            name the adapter, in the spelling here or in PEFT's; the base's tensors in such a one are ignored.
            Biases of the base among the keys of a file are written, whatever ``bias`` the config has, as in PEFT.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave tensors of another shape out instead of refusing.
        low_cpu_mem_usage: accepted for PEFT's sake.

    Raises:
        CheckpointError: nothing fits, or tensors that are one here differ.
        BaseMismatchError: shapes do not fit.
    """
    manager = require_manager(model)
    weights = manager.weights(adapter_name)
    peft_type = method_of(manager.configs[adapter_name]).peft_type
    whole = checkpoint.is_of_a_model(peft_model_state_dict, adapter_name, peft_type)
    present = embedding_weights(manager.model) | ({} if whole else _biases(manager.model))
    inside = tuple(f"{path}." for path in weights.copies)
    wanted = checkpoint.Expected(
        adapters={path: _shapes(named) for path, named in weights.adapters.items()},
        copies={path: _shapes(named) for path, named in weights.copies.items()},
        base=_shapes(weights.base),
        shared=_shapes(weights.shared),
        optional=_shapes({key: value for key, value in present.items() if not key.startswith(inside)}),
        others={
            f"{place}{key}": tensor.dtype
            for place, named in (
                *((f"{path}.", named) for path, named in (*weights.copies.items(), *weights.adapters.items())),
                (checkpoint.SHARED_PREFIX, weights.shared),
            )
            for key, tensor in named.items()
            if not tensor.is_floating_point()
        },
        parameters=weights.parameters,
    )
    config = manager.configs[adapter_name]
    packed = checkpoint.keys_of_a_file(peft_model_state_dict, adapter_name, peft_type)
    tensors = method_of(config).files.unpack(config, packed)
    started: Mapping[str, StartsInWeight] = {}
    options: dict[str, Any] = {"peft_type": peft_type, "ignore_mismatched": ignore_mismatched_sizes}
    options["conversion"] = checkpoint.key_conversion_of(manager.model)
    try:
        loaded = checkpoint.from_file(tensors, wanted, **options)
    except BaseMismatchError:
        started = _lost_starts(manager, adapter_name)
        if not started:
            raise
        shapes = {path: adapter.shapes_with_start() for path, adapter in started.items()}
        loaded = checkpoint.from_file(tensors, replace(wanted, adapters={**wanted.adapters, **shapes}), **options)
    _check_tied(manager, adapter_name, weights, loaded.weights)
    with manager.transaction() as change:
        for path, adapter in started.items():
            loaded.weights.adapters[path] = adapter.split_start(loaded.weights.adapters[path], change)
        _write(manager, adapter_name, weights, loaded, present, change)
    # The state dict of a whole model holds the base and other adapters besides.
    unexpected = [key for key in loaded.unexpected if not (whole and key in peft_model_state_dict)]
    return load_result(manager, adapter_name, loaded.missing, unexpected, bare=unwrapped(model) is manager.model)


def _check_tied(manager: AdapterManager, name: str, present: AdapterWeights, weights: AdapterWeights) -> None:
    """Raises CheckpointError where tensors that are one here are several in a state dict.

    Args:
        manager: of the model.
        name: of the adapter.
        present: its tensors.
        weights: those of the state dict.
    """
    given = weights.adapters
    first: dict[int, tuple[str, Tensor]] = {}
    for path, key, value in ((path, key, value) for path, named in given.items() for key, value in named.items()):
        owner, one = first.setdefault(id(present.adapters[path].get(key, value)), (path, value))
        if value is not one and not torch.equal(value.to(one), one):
            raise CheckpointError(
                f"the state dict has other {key} for {path} than for {owner}, which share one in adapter {name!r}"
            )
    adapters = {path: manager.layers[path].adapter(name) for path in given}
    paths = {id(adapter): path for path, adapter in adapters.items()}
    for path, adapter in adapters.items():
        source = paths.get(id(adapter.source)) if adapter.source is not None else None
        if source is not None and isinstance(adapter, UsesAnother) and adapter.differs(given[path], given[source]):
            raise CheckpointError(
                f"the state dict has other tensors for {path} than for {source}, which share one pair in adapter "
                f"{name!r} (ensure_weight_tying)"
            )


def _lost_starts(manager: AdapterManager, name: str) -> dict[str, StartsInWeight]:
    """Path -> adapter whose start a file holds beside its factors; see ``StartsInWeight.loses_start``."""
    found: dict[str, Any] = {path: layer.adapters._modules.get(name) for path, layer in manager.layers.items()}
    return {path: one for path, one in found.items() if isinstance(one, StartsInWeight) and one.loses_start}


def _write(
    manager: AdapterManager,
    name: str,
    weights: AdapterWeights,
    loaded: checkpoint.Loaded,
    present: Mapping[str, Tensor],
    change: Transaction,
) -> None:
    """Writes loaded tensors into an adapter's own."""
    writes = [
        (own[path][key], value)
        for own, new in ((weights.adapters, loaded.weights.adapters), (weights.copies, loaded.weights.copies))
        for path, named in sorted(new.items())  # parts of sharded tensors are sent around: each process in one order
        for key, value in sorted(named.items())
    ]
    writes += [(weights.shared[key], value) for key, value in sorted(loaded.weights.shared.items())]
    writes += [
        (present[key] if key in present else weights.base[key], value)
        for key, value in sorted(loaded.weights.base.items())
    ]
    change.keep_values([own for own, _ in writes if not own.is_meta])
    _fill_in(manager, name, {id(own): value for own, value in writes if own.is_meta}, change)
    for own, value in writes:
        if not own.is_meta:
            own.copy_(like(own, value))
    shared = manager.shared(name)
    if shared is not None and loaded.weights.shared:
        here = {path: layer for path, layer in manager.layers.items() if name in layer.adapters._modules}
        shared.settle({path: (layer.adapter(name), layer.base) for path, layer in here.items()}, change)


def drop_values(manager: AdapterManager, name: str) -> None:
    """Puts the parameters of an adapter on the meta device, where they take no memory until they are loaded."""
    with manager.transaction() as change:
        _replace_data(manager, name, lambda parameter, layer: parameter.detach().to("meta"), change)


def _fill_in(manager: AdapterManager, name: str, values: Mapping[int, Tensor], change: Transaction) -> None:
    """Gives an adapter parameters in the place of those without data, by the id of these."""

    def filled(parameter: nn.Parameter, layer: AdaptedLayer) -> Tensor | None:
        value = values.get(id(parameter))
        return None if value is None else value.to(layer.base.device, parameter.dtype, copy=True)

    if values:
        _replace_data(manager, name, filled, change)


def _replace_data(
    manager: AdapterManager,
    name: str,
    data: Callable[[nn.Parameter, AdaptedLayer], Tensor | None],
    change: Transaction,
) -> None:
    """Gives an adapter new parameters for those that ``data`` has other values for; what layers share stays one."""
    made: dict[int, nn.Parameter] = {}
    for layer in manager.layers.values():
        adapter: Any = layer.adapters._modules.get(name)
        for key, parameter in {} if adapter is None else dict(adapter._parameters).items():
            if parameter is None or key in adapter.peft.constants:
                continue
            if id(parameter) not in made and (values := data(parameter, layer)) is not None:
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            if id(parameter) in made:
                change.set_item(adapter._parameters, key, made[id(parameter)])


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base model's tensors under the keys they have without adapters.

    Args:
        model: a PeftModel or an adapted base model.

    Returns:
        References to the tensors.
    """
    base = require_manager(model).model
    bare = bare_names(base)
    return {own: tensor for key, tensor in base.state_dict().items() if (own := bare(key)) is not None}


@_in_one_transaction
def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Loads tensors under the keys of the bare base model; adapters stay as they are.

    Args:
        model: a PeftModel or an adapted base model.
        state_dict: key in the bare base model -> tensor.
        strict: refuse keys that are missing or unknown.

    Raises:
        BaseMismatchError: keys do not fit (``strict``), or shapes do not; nothing was loaded.
        MergeError: adapters are merged into the weights.
    """
    manager = require_manager(model)
    manager.refuse_merged("loading base weights")
    base = manager.model
    bare = bare_names(base)
    present = base.state_dict()
    wrapped = {own: key for key in present if (own := bare(key)) is not None}
    missing = [key for key in wrapped if key not in state_dict]
    unexpected = [key for key in state_dict if key not in wrapped]
    if strict and (missing or unexpected):
        hint = did_you_mean(unexpected[0], wrapped) if unexpected else ""
        wrong = {"Missing key(s)": missing, "Unexpected key(s)": unexpected}  # torch's words in load_state_dict
        parts = [f"{what}: {few(keys, 3)}." for what, keys in wrong.items() if keys]
        raise BaseMismatchError(f"the state dict does not fit the base model. {' '.join(parts)}{hint}")
    given = {wrapped[key]: tensor for key, tensor in state_dict.items() if key in wrapped}
    for key, tensor in given.items():
        if isinstance(present[key], Tensor) and present[key].shape != tensor.shape:
            raise BaseMismatchError(f"{bare(key)} is {tuple(tensor.shape)}, expected {tuple(present[key].shape)}")
    with manager.transaction() as change:
        change.keep_values([present[key] for key in given if isinstance(present[key], Tensor)])
        base.load_state_dict(given, strict=False)
    return LoadResult(missing, unexpected)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Reads the tensors of a saved adapter, from a folder or the hub, under the keys of the file."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = checkpoint.read_checkpoint(str(model_id), device=device, **hub).unread.unchanged()
    return checkpoint.remapped(saved.read(), key_mapping)


def _biases(model: nn.Module) -> dict[str, Tensor]:
    """Returns name in the bare model -> bias."""
    owners = ((f"{path}.bias".lstrip("."), module._parameters.get("bias")) for path, module in bare_modules(model))
    return {name: bias for name, bias in owners if bias is not None}


def _shapes(named: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in named.items()}
