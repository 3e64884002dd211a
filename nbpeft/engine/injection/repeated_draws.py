"""What a new adapter would draw, for one whose values come from a file or later, as PEFT initializes those too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from nbpeft.engine.contract.adapter import AdapterSite, SharedSite
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.initial_draws import Draws
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.injection.injection_plan import InjectionPlan


def record_draws(plan: InjectionPlan, bases: Mapping[str, BaseLayer], draws: Draws) -> None:
    """Records what PEFT draws for a new adapter.

    Args:
        plan: the plan of the adapter.
        bases: path of each target -> its layer, not adapted yet.
        draws: the record.
    """
    shared = method_of(plan.config).shares.state
    if shared is not None and bases:
        site = SharedSite(plan.shared, next(iter(bases.values())).device, torch.float32)
        draws.repeat(id(shared), partial(shared._repeat_draws, plan.config, site))
    for target in plan.targets:
        base, config, made_by = bases[target.path], target.config, target.adapter_class
        place = AdapterSite(target.path, base, target.shapes, torch.float32)
        sizes = target.in_features, target.out_features, *target.shapes.items()
        is_first = bool(target.parameter) and not base.adapters
        alike = made_by, id(config), target.kind, place.device.type, is_first, sizes
        draws.repeat(alike, partial(made_by._repeat_draws, config, place))
