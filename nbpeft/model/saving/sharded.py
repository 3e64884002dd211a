"""Tensors that are sharded over processes: FSDP2's ``DTensor`` and DeepSpeed ZeRO-3, whose shards look empty."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import Fingerprint, fingerprint
from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.engine.runtime.adapter_tensors import flattened
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import CheckpointError, PeftWarning, few

_fingerprints: weakref.WeakKeyDictionary[nn.Module, Fingerprint] = weakref.WeakKeyDictionary()
"""Base model -> its fingerprint before sharding."""


def gathered(tensor: Tensor) -> Tensor:
    """Returns a complete, detached tensor. All processes must call this for a sharded tensor.

    Raises:
        CheckpointError: only DeepSpeed can gather the tensor; without this check an empty one would be saved.
    """
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    if shape != tuple(tensor.shape):
        raise CheckpointError(
            f"a parameter of shape {shape} is sharded by DeepSpeed ZeRO-3: save with Trainer.save_model, or pass "
            "state_dict=… gathered from all processes"
        )
    whole: Any = tensor.detach()
    complete: Tensor = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return complete


def warn_of_shards(manager: AdapterManager, name: str, weights: AdapterWeights) -> None:
    """Warns if tensors to save of an adapter are shards, which are saved all the same, as in PEFT.

    Args:
        manager: manager of the model.
        name: the adapter.
        weights: its tensors.
    """
    found = flattened(manager.layers, name, manager.configs[name], weights.adapters)
    if found:
        shown_ = [f"{key} {shape}" for key, shape in found.items()]
        warnings.warn(
            f"adapter {name!r} is saved with {len(found)} incomplete tensors ({few(shown_)}), which cannot be loaded: "
            "DeepSpeed ZeRO-3 / FSDP shards were not gathered; save inside FSDP.summon_full_params(model) or "
            "deepspeed.zero.GatheredParameters(parameters), or pass state_dict=… gathered from all processes",
            PeftWarning,
            stacklevel=4,
        )


def like(own: Tensor, value: Tensor) -> Tensor:
    """Converts a value to the layout of a tensor to copy it into: for a sharded tensor, this process's shard.

    Args:
        own: the tensor to write to.
        value: the complete value. All processes call this with the same values in the same order.
    """
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    device = "cpu" if own.device.type == "cpu" else own.device
    return distribute_tensor(value.to(device), mesh, own.placements)  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether a model's weights are sharded over processes."""
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_shape") for parameter in model.parameters())


def note_fingerprint(model: nn.Module) -> None:
    """Computes the fingerprint of a base model before it is sharded, which is not possible afterwards."""
    if not is_sharded(model):
        _fingerprints[model] = fingerprint(model)


def noted_fingerprint(model: nn.Module) -> Fingerprint | None:
    """Returns the fingerprint of a base model before sharding; None for a model that is not sharded."""
    return _fingerprints.get(model) if is_sharded(model) else None


def gathered_state(state: Any) -> Any:
    """Returns an optimizer state with complete tensors, on the CPU; all processes must call this."""
    if isinstance(state, Tensor):
        return gathered(state).to("cpu")
    if isinstance(state, dict):
        return {key: gathered_state(value) for key, value in state.items()}
    return [gathered_state(value) for value in state] if isinstance(state, list) else state


def state_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Converts a complete optimizer state to the layout of the optimizer's parameters; all processes must call this.

    Args:
        optimizer: the optimizer, with its parameters in the order of the state.
        state: complete state in the layout of ``optimizer.state_dict()``.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shaped = {
        index: {
            name: like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": shaped}
