"""Tensors of which each process has a part: FSDP2's (``DTensor``), and those of DeepSpeed's ZeRO-3, which are empty."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import Fingerprint, fingerprint
from nbpeft.errors import CheckpointError

_fingerprints: weakref.WeakKeyDictionary[nn.Module, Fingerprint] = weakref.WeakKeyDictionary()
"""Base model -> its fingerprint before it was sharded."""


def gathered(tensor: Tensor) -> Tensor:
    """A tensor whole and detached; where each process has a part, all of them call this.

    Raises:
        CheckpointError: it is a part that DeepSpeed alone can gather: an empty file would be written.
    """
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    if shape != tuple(tensor.shape):
        raise CheckpointError(
            f"a parameter of shape {shape} is sharded by DeepSpeed ZeRO-3: save with Trainer.save_model, or pass "
            "state_dict=… gathered from all processes"
        )
    whole: Any = tensor.detach()
    found: Tensor = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return found


def like(own: Tensor, value: Tensor) -> Tensor:
    """A value in the form of a tensor it is to be copied into: of a sharded one this process's part.

    Args:
        own: what is written to.
        value: whole; the same in all processes, which all call this in the same order.
    """
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    device = "cpu" if own.device.type == "cpu" else own.device
    return distribute_tensor(value.to(device), mesh, own.placements)  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share a model's weights out."""
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_shape") for parameter in model.parameters())


def note_fingerprint(model: nn.Module) -> None:
    """Takes the fingerprint of a base model that is about to be sharded: of its parts none can be taken."""
    if not is_sharded(model):
        _fingerprints[model] = fingerprint(model)


def noted_fingerprint(model: nn.Module) -> Fingerprint | None:
    """The fingerprint of a base model before it was sharded; None for one that is not."""
    return _fingerprints.get(model) if is_sharded(model) else None


def gathered_state(state: Any) -> Any:
    """The state of an optimizer with its tensors whole; all processes call this."""
    if isinstance(state, Tensor):
        return gathered(state).to("cpu")
    if isinstance(state, dict):
        return {key: gathered_state(value) for key, value in state.items()}
    return [gathered_state(value) for value in state] if isinstance(state, list) else state


def state_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer, in the form of the parameters that it holds here; all processes call this.

    Args:
        optimizer: with parameters, in the order of those that the state belongs to.
        state: as ``optimizer.state_dict()`` has it, whole.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shaped = {
        index: {
            name: like(held[index], value) if isinstance(value, Tensor) and value.shape == held[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": shaped}
