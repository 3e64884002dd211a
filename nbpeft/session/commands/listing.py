"""Listing the methods, and what each would cost on a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.errors import ConfigError, NbpeftError, check_text, did_you_mean
from nbpeft.session.commands import planning
from nbpeft.session.handles import uncompiled
from nbpeft.session.results.methods import OF_COSTS, MethodCost, MethodRow, MethodsResult, check_sort, sorted_rows

if TYPE_CHECKING:
    from nbpeft.engine.contract.registry import Method
    from nbpeft.session.context import ModelLike, SessionContext

_TRAINING_BYTES = 3 * 4
"""Bytes per parameter for the gradient and AdamW's two moments in float32."""


def methods(
    ctx: SessionContext,
    /,
    model: ModelLike = None,
    fields: Mapping[str, Any] = {},
    *,
    variable: str | None = None,
    sort: str = "group",
    **settings: Any,
) -> MethodsResult:
    """List the methods: what each costs on a model with its defaults, what it supports and when to choose it.

    Args:
        model: a bare or an adapted model; with None and not exactly one adapted model, no costs are listed.
        fields: config fields, used for the methods that have them, e.g. ``{"target_modules": "all-linear"}``.
        variable: name for a model that the session does not know yet.
        sort: ``group`` (the most used methods first, then by family), ``name``, ``parameters``, ``memory`` (to train)
            or ``peak``.
        **settings: settings of a memory forecast, as for ``Session.plan``; with any of them, the peak memory of a
            training step is listed.

    Raises:
        ConfigError: no method has one of the fields, or the sort order is unknown or needs a model or a forecast.
    """
    from nbpeft.model.analysis.method_facts import facts_of_method, group_of, listed_methods

    known = listed_methods()
    check_text("sort", sort)
    check_sort(sort)
    if not isinstance(fields, Mapping):
        raise ConfigError(f"fields must map fields of a config to values, e.g. {{'r': 8}}, not {fields!r:.60}")
    for name in fields:
        having = {field for method in known for field in method.config_class.__dataclass_fields__}
        if name not in having:
            raise ConfigError(f"no method has a field {name!r}.{did_you_mean(name, having)}", field=name)
    if model is None and ctx.models.names:
        model = ctx.models.get(None, command="methods").model
    tracked = None if model is None else ctx.find(model, variable, command="methods")
    base = None if model is None else uncompiled(model) if tracked is None else tracked.manager.model
    title = "" if base is None else tracked.name if tracked is not None else variable or "model"
    if base is None and sort in OF_COSTS:
        raise ConfigError(f"sorting the methods by {sort} needs a model", field="sort")
    if sort == "peak" and not settings:
        raise ConfigError("sorting the methods by peak needs a batch size or a sequence length", field="sort")
    with ctx.command("listing methods", slow=True) as notes:
        rows = []
        for method in known:
            facts = facts_of_method(method)
            cost = None if base is None else _cost(ctx, method, base, fields, settings)
            shown = method.listing
            row = MethodRow(method.label, _written(method), cost, facts, shown.when, shown.paper, group_of(method))
            rows.append(row)
        if base is None:
            notes.append("name a model to see the cost of each method on it")
        words = ", ".join(f"{name}={value}" for name, value in fields.items())
        given = f"{words} where available" if words else "their defaults"
        return MethodsResult(title, sorted_rows(rows, sort), given, bool(settings), sort, notes=tuple(notes))


def _written(method: Method) -> str:
    """Return how a method is selected: ``oft``, or a field if several methods have the same config class."""
    from nbpeft.engine.contract.registry import methods_of_type

    for name, value in method.listing.listed_with.items():
        if len(methods_of_type(method.peft_type)) > 1:
            return f"{name}={value if value is True or isinstance(value, str) else '…'}"
    return method.peft_type.lower()


def _cost(
    ctx: SessionContext, method: Method, base: Any, fields: Mapping[str, Any], settings: Mapping[str, Any]
) -> MethodCost:
    """Return the cost of a method, with defaults that divide the model's sizes, or why it cannot be used on it."""
    from nbpeft.engine.injection.plan import plan
    from nbpeft.model.analysis.method_facts import listed_config

    adjusted: dict[str, Any] = {}
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = listed_config(method, {**fields, **adjusted})
                made = plan(base, config)
                peak = planning.plan(ctx, base, config, suggest=False, **settings).peak_bytes if settings else None
        except NbpeftError as error:
            field, valid = error.details.get("field"), error.details.get("valid")
            if not isinstance(field, str) or valid is None or field in fields:
                return MethodCost(refusal=str(error))
            adjusted[field] = valid  # a smaller one each time
        else:
            trained, byte_count = made.parameter_count, made.byte_count + made.frozen_byte_count
            changed = ", ".join(f"{name}={value}" for name, value in adjusted.items())
            return MethodCost(trained, byte_count, trained * _TRAINING_BYTES, peak, settings=changed)
