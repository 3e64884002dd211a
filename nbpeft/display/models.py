"""Adapters and models in words and as blocks."""

from __future__ import annotations

from collections.abc import Sequence

from nbpeft.display.blocks import Block, Card, Cell, Details, Line, Table, Text, bold, card, dim, line
from nbpeft.display.memory import memory_bar
from nbpeft.display.numbers import count, plural, share, short_count, size
from nbpeft.state import AdapterState, ModelState

ADAPTER_HEAD = ("Adapter", "Modules", "Parameters", "State")
ADAPTER_FIGURES = (2,)
"""Columns of ``ADAPTER_HEAD`` that hold figures."""
_MOST_ROWS = 30
"""Of a card's table of adapters; the others stand below it and open on request."""


def with_notes(text: str, notes: tuple[str, ...]) -> str:
    """Returns a line with its notes behind it."""
    return text + "".join(f" [note: {note}]" for note in notes)


def settings(adapter: AdapterState) -> str:
    """``r=16 α=32``."""
    return " ".join(f"{key}={value}" for key, value in adapter.summary.items())


def describe(adapter: AdapterState) -> str:
    """``LoRA r=16 α=32 on 210 modules (q_proj, v_proj), 4,884,480 parameters``."""
    what = " ".join(part for part in (adapter.method, settings(adapter)) if part)
    where = ", ".join(adapter.targets[:8]) + (", …" if len(adapter.targets) > 8 else "")
    return f"{what} on {plural(adapter.module_count, 'module')} ({where}), {count(adapter.parameter_count)} parameters"


def trainable(model: ModelState) -> str:
    """``4,884,480 trainable of 140,366,688 (3.48 %)``."""
    return f"{count(model.trainable_count)} {_of_all(model)}"


def _of_all(model: ModelState) -> str:
    return f"trainable of {count(model.parameter_count)} ({share(model.trainable_count, model.parameter_count)})"


def activity(model: ModelState) -> str:
    """Returns which adapters are active, in words."""
    if model.merged:
        return f"merged: {', '.join(model.merged)}"
    if not model.enabled:
        return "off: only the base model acts"
    return f"active: {', '.join(model.active)}" if model.active else "no adapter is active"


def in_pool(model: ModelState) -> str:
    """Returns how many adapters its pool has besides those on it; empty where there are none."""
    return f"{model.offloaded_count:,} more in the pool" if model.offloaded_count else ""


def condition(adapter: AdapterState, *, with_active: bool = True) -> str:
    """``active, trainable``, ``inactive, not saved``.

    Args:
        adapter: the adapter.
        with_active: say whether it is active, where that is not shown otherwise; without it there is little room,
            so that of one that is not saved it is not said besides that it trains.
    """
    if adapter.merged:
        words = ["merged"]
    elif adapter.active:
        words = ["active"] if with_active else []
        words.append("trainable" if adapter.trainable else "frozen")
    else:
        words = ["inactive", "frozen"] if adapter.frozen else ["inactive"]
    if adapter.unsaved:
        words = [*(word for word in words if with_active or word not in ("trainable", "inactive")), "not saved"]
    if adapter.scale != 1.0:
        words.append(f"×\u00a0{adapter.scale:g}")
    return ", ".join(words)


def modules(adapter: AdapterState) -> Text:
    """``q_proj v_proj``, ``down_proj + 6``; all kinds in the tooltip."""
    few = adapter.targets if len(adapter.targets) <= 2 else (adapter.targets[0], f"+\u00a0{len(adapter.targets) - 1}")
    return Text(" ".join(few), "dim", " ".join(adapter.targets))


def adapter_cells(adapter: AdapterState) -> tuple[Cell, ...]:
    """Returns one adapter as a row below ``ADAPTER_HEAD``."""
    how = " ".join(part for part in (adapter.method, settings(adapter)) if part)
    varies = "*: some modules have other values" if "*" in how else ""
    return (
        (Text(adapter.name, tooltip=adapter.name, wrap="names"), Text(how, "dim", varies)),
        (f"{adapter.module_count:,}", modules(adapter)),
        (count(adapter.parameter_count), dim(size(adapter.byte_count))),
        condition(adapter),
    )


def adapter_table(adapters: Sequence[AdapterState]) -> Table:
    """Returns the adapters, those that are active marked."""
    return Table(
        ADAPTER_HEAD,
        tuple(adapter_cells(adapter) for adapter in adapters),
        right=ADAPTER_FIGURES,
        marked=tuple(place for place, adapter in enumerate(adapters) if adapter.active),
    )


def model_title(model: ModelState) -> str:
    """``model (LlamaForCausalLM)``."""
    return f"{model.name} ({model.class_name})"


def model_summary(model: ModelState) -> str:
    """``134.5 M parameters, bfloat16, cpu``."""
    parts = (f"{short_count(model.parameter_count)} parameters", model.dtype, model.quantization, model.device)
    return ", ".join(part for part in parts if part)


def model_card(model: ModelState | None, called: str | None = None, *, hint: str = "", brief: bool = False) -> Card:
    """Returns a model with its adapters.

    Args:
        model: the model, or None where it is gone.
        called: what it was called.
        hint: a line at the end.
        brief: of many adapters, only say how many more there are.
    """
    if model is None:
        return card(called or "model", *no_model(called))
    return card(
        model_title(model),
        _adapters(model, brief),
        totals(model, activity(model)),
        memory_bar(model.memory) if model.memory is not None else None,
        line(dim(hint)),
        aside=model_summary(model),
    )


def _adapters(model: ModelState, brief: bool) -> tuple[Block, ...]:
    """Returns the table of adapters, or what to do where there are none."""
    if not model.adapters:
        return no_adapters(model)
    first, others = model.adapters[:_MOST_ROWS], model.adapters[_MOST_ROWS:]
    table = adapter_table(first)
    if not others:
        return (table,)
    words = f"{len(others):,} more"
    return table, line(dim(words)) if brief else Details(words, adapter_table(others))


def totals(model: ModelState, *more: str) -> Line:
    """Returns how much of the model trains, how many adapters its pool has, and more words."""
    words = "; ".join(("", *(part for part in (in_pool(model), *more) if part)))
    return line(bold(count(model.trainable_count)), Text(_of_all(model) + words))


def example(model_name: str) -> Line:
    """Returns a cell that adds an adapter."""
    return line(
        Text(f'%%lora {model_name} --name my_adapter\nr = 16\ntarget_modules = "all-linear"', "code", wrap="as is")
    )


def no_adapters(model: ModelState) -> tuple[Line, ...]:
    """Returns what to do where a model has no adapter."""
    return line(dim("No adapters yet. A cell like this adds one:")), example(model.name)


def missing_model(called: str | None) -> str:
    """Returns what is to be said where there is no model."""
    if called:
        return f"There is no model {called!r} any more: it was unloaded or deleted, or its variable holds another."
    return "No adapted model yet."


def no_model(called: str | None) -> tuple[Line, ...]:
    """Returns what to do where there is no model."""
    if called:
        return (line(dim(missing_model(called))),)
    return line(dim(f"{missing_model(None)} A cell like this adapts one:")), example("model")


def model_text(model: ModelState | None, called: str | None = None) -> str:
    """Returns a model in one line of plain text."""
    if model is None:
        return missing_model(called) if called else "no adapted model yet"
    adapters = ", ".join(f"{item.name}{'*' if item.active else ''} [{item.method}]" for item in model.adapters)
    pool = f" and {in_pool(model)}" if model.offloaded_count else ""
    return f"{model_title(model)}: {adapters or 'no adapters'}{pool}; {trainable(model)}"
