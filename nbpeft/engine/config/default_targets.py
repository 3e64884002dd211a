"""Default targets by model type: a table for each type of method, which scripts may change as they change PEFT's."""

from __future__ import annotations

from functools import cache
from typing import Any

from nbpeft.engine.config.targets import usual_model_types
from nbpeft.engine.contract.registry import Method, Targets, methods_of_type


def default_targets(method: Method, model_type: str | None) -> Targets:
    """Returns the default targets of a method for a type of model; None if there are none."""
    found: Targets = _table(method.peft_type, method.default_targets).get(model_type or "")
    return method.default_targets(model_type) if found is None else found


def default_targets_of(peft_type: str) -> dict[str, Any]:
    """Returns model type -> default targets; what is changed in the dictionary applies to new adapters.

    Args:
        peft_type: the type of the method.
    """
    return _table(peft_type, methods_of_type(peft_type)[0].default_targets)


@cache
def _table(peft_type: str, usual: Any) -> dict[str, Any]:
    return {name: targets for name in usual_model_types() if (targets := usual(name)) is not None}
