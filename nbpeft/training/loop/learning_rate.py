"""The learning rate of a training that is given none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbpeft.display import numbers
from nbpeft.engine.config.prompt_config import WIDTHS, size_in
from nbpeft.errors import ConfigError
from nbpeft.training.adapters.adapted_model import base_of, trained_names
from nbpeft.training.objectives.objective import Objective
from nbpeft.training.request import TrainRequest

_AT_2000 = 10 * 5e-5
"""The learning rate of LoRA at a width of 2,000: ten times that of full fine-tuning."""
_SLOPE = 0.78
"""It falls with this power of the width. Both are from "LoRA Without Regret" (Thinking Machines Lab, 2025)."""
_HIGHEST = 2e-3
"""The rate of all models with less than about 340 features."""


def with_learning_rate(request: TrainRequest, objective: Objective) -> TrainRequest:
    """Returns a request with the default learning rates of its adapters, and the reason, where none is given.

    The rate follows from the width of the model, and from the factors of the adapters' methods and of the objective.
    Adapters that are trained side by side have their own.

    Args:
        request: an opened request.
        objective: its objective.
    """
    model, members = request.model, request.members
    named = isinstance(members, Mapping) and all(isinstance(fields, Mapping) for fields in members.values())
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    names = members if named else trained_names(model) if request.adapter is None else (request.adapter,)
    given = {name for name in names if named and "learning_rate" in members[name]}
    factors = {name: getattr(configs.get(name), "rate_factor", 1.0) for name in names if name not in given}
    is_given = "learning_rate" in request.arguments
    optimizer, *_ = request.arguments.get("optimizers") or (None,)
    if optimizer is not None:
        return replace(request, rate_reason="learning_rate is not used: the optimizer has its own" if is_given else "")
    if is_given or not factors:
        return request
    usual, at = _of_lora(model)
    rates = {name: float(f"{factor * objective.rate_factor * usual:.1e}") for name, factor in factors.items()}
    lowest = min(rates, key=lambda name: rates[name])
    factor = factors[lowest] * objective.rate_factor
    reason = f"learning rate {numbers.setting(rates[lowest])}: {'' if factor == 1 else f'{factor:g} times '}LoRA's{at}"
    if named:
        own = {name: {"learning_rate": rate} for name, rate in rates.items() if rate != rates[lowest]}
        members = {name: own.get(name, {}) | dict(fields) for name, fields in members.items()}
    arguments = {**request.arguments, "learning_rate": rates[lowest]}
    return replace(request, members=members, arguments=arguments, rate_reason=reason)


def _of_lora(model: Any) -> tuple[float, str]:
    """The learning rate of LoRA, and for which width, in words; empty if the model has none."""
    try:
        width = size_in(getattr(base_of(model), "config", None), "width", WIDTHS)
    except ConfigError:  # not a transformer
        return _AT_2000, ""
    return min(_HIGHEST, _AT_2000 * (2000 / width) ** _SLOPE), f" for a width of {width:,}"
