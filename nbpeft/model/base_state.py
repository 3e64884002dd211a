"""The base model's own state dict, with adapters on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from nbpeft.engine.copies import CopiedModule
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.errors import BaseMismatchError, MergeError, did_you_mean
from nbpeft.model.files import LoadResult
from nbpeft.model.tensors import manager_of


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under the keys they have without adapters.

    Args:
        model: a PeftModel or an adapted base model.

    Returns:
        References to the tensors.
    """
    base = manager_of(model).model
    bare = _bare_keys(base)
    return {own: tensor for key, tensor in base.state_dict().items() if (own := bare(key)) is not None}


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
    manager = manager_of(model)
    if manager.merged:
        raise MergeError(f"{', '.join(map(repr, manager.merged))} merged: unmerge before loading base weights")
    base = manager.model
    bare = _bare_keys(base)
    present = base.state_dict()
    wrapped = {own: key for key in present if (own := bare(key)) is not None}
    missing = [key for key in wrapped if key not in state_dict]
    unexpected = [key for key in state_dict if key not in wrapped]
    if strict and (missing or unexpected):
        hint = did_you_mean(unexpected[0], wrapped) if unexpected else ""
        parts = [f"{what}: {_few(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise BaseMismatchError(f"the state dict does not fit the base model; {'; '.join(parts)}.{hint}")
    given = {wrapped[key]: tensor for key, tensor in state_dict.items() if key in wrapped}
    for key, tensor in given.items():
        if isinstance(present[key], Tensor) and present[key].shape != tensor.shape:
            raise BaseMismatchError(f"{bare(key)} is {tuple(tensor.shape)}, expected {tuple(present[key].shape)}")
    with manager.transaction() as change:
        change.keep_values([present[key] for key in given if isinstance(present[key], Tensor)])
        base.load_state_dict(given, strict=False)
    return LoadResult(missing, unexpected)


def _bare_keys(base: nn.Module) -> Callable[[str], str | None]:
    """A function that gives the key in the bare model, or None for one of an adapter."""
    frozen: dict[str, str] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer):
            frozen[name] = "base_layer"
        elif isinstance(module, CopiedModule):
            frozen[name] = "original_module"

    def bare(key: str) -> str | None:
        parts = key.split(".")
        kept: list[str] = []
        position = 0
        while position < len(parts):
            kept.append(parts[position])
            position += 1
            wanted = frozen.get(".".join(parts[:position]))
            if wanted is not None:
                if parts[position] != wanted:
                    return None
                position += 1
        return ".".join(kept)

    return bare


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
