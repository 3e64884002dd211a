"""Converting an adapter of another method to LoRA."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterExistsError, check_text
from nbpeft.session.checks import adapter_name
from nbpeft.session.commands.adapters import adapter_in
from nbpeft.session.results.converting import ConvertResult
from nbpeft.session.undoable import Undoable, unsaved_words

if TYPE_CHECKING:
    from nbpeft.session.context import ModelLike, SessionContext


def convert(
    ctx: SessionContext,
    adapter: str,
    r: int | float,
    *,
    name: str | None = None,
    replace: bool = False,
    model: ModelLike = None,
) -> ConvertResult:
    """Add the best LoRA approximation of an adapter of any method as a new adapter, which is frozen and inactive.

    Args:
        adapter: name of the adapter, which is not changed.
        r: rank of the LoRA; a float is the share of the squared norm of the change to preserve per layer.
        name: name of the LoRA; by default the adapter's followed by ``_lora``.
        replace: replace an existing adapter with that name.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the name is taken.
        ConversionError: a LoRA cannot represent the adapter.
        ConfigError: the rank is invalid.
    """
    from nbpeft.engine.contract.adapter import AdapterWeights
    from nbpeft.engine.contract.registry import method_of
    from nbpeft.model.combine.conversion import converted

    check_text("adapter", adapter)
    tracked = ctx.models.get(model, command="convert", adapters=(adapter,))
    manager = tracked.manager
    manager.require_available(adapter)
    made_name = adapter_name(f"{adapter}_lora" if name is None else name)
    exists = made_name in manager.configs
    if exists and (not replace or made_name == adapter):
        raise AdapterExistsError(
            f"{tracked.name} has an adapter {made_name!r} already{unsaved_words(manager, made_name)}; choose another "
            f"name{'' if made_name == adapter else ', or replace it (replace=…)'}"
        )
    with ctx.command(f"converting {adapter!r}", slow=True) as notes, manager.ensure_loaded((adapter,)):
        made = converted(manager, adapter, r)
        config: Any = made.plan.config
        if isinstance(r, float):  # the patterns have each layer's rank; this one is displayed
            largest = max(config.rank_pattern.values())
            config = config.copy(r=largest, lora_alpha=largest)
        copies = {
            path: {key: tensor.clone() for key, tensor in named.items()} for path, named in made.weights.copies.items()
        }
        weights = AdapterWeights(made.weights.adapters, copies)
        half = all(tensor.itemsize < 4 for named in weights.adapters.values() for tensor in named.values())
        plan = dataclasses.replace(made.plan, config=config)
        put = manager.prepare(made_name, plan, weights, trainable=False, half=half, replace=exists)
        with Undoable(ctx, tracked, made_name, "converted again").change() if exists else manager.transaction():
            put()
        state, method = tracked.state(), method_of(manager.configs[adapter]).title(manager.configs[adapter])
        lora = adapter_in(state, made_name)
        return ConvertResult(tracked.name, adapter, method, lora, made.layers, state, notes=tuple(notes))
