"""The base model's own state dict, with adapters on the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nbpeft.engine.manager import require_manager
from nbpeft.engine.model_tree import bare_names
from nbpeft.errors import BaseMismatchError, did_you_mean
from nbpeft.model.files import LoadResult


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under the keys they have without adapters.

    Args:
        model: a PeftModel or an adapted base model.

    Returns:
        References to the tensors.
    """
    base = require_manager(model).model
    bare = bare_names(base)
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


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
