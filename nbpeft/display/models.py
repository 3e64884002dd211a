"""Adapters and models as text and as blocks."""

from __future__ import annotations

from collections.abc import Sequence

from nbpeft.display.blocks import Block, Card, Cell, Details, Line, Table, Text, bold, card, dim, line
from nbpeft.display.memory import memory_bar
from nbpeft.display.numbers import count, plural, share, short_count, size
from nbpeft.display.training import training_text
from nbpeft.errors import few
from nbpeft.state import ENDED, AdapterState, ModelState

ADAPTER_HEAD = ("Adapter", "Modules", "Parameters", "State")
ADAPTER_FIGURES = (2,)
"""Indices of the columns of ``ADAPTER_HEAD`` with figures."""
_MOST_ROWS = 30
"""Most rows of a card's table of adapters; further adapters are folded below it."""


def with_notes(text: str, notes: tuple[str, ...]) -> str:
    """Returns a text followed by its notes."""
    return text + "".join(f" [note: {note}]" for note in notes)


def settings(adapter: AdapterState) -> str:
    """Returns the main settings of an adapter: ``r=16 α=32``."""
    return " ".join(f"{key}={value}" for key, value in adapter.summary.items())


def describe(adapter: AdapterState) -> str:
    """Returns an adapter as text: ``LoRA r=16 α=32 on 210 modules (q_proj, v_proj), 4,884,480 parameters``."""
    what = " ".join(part for part in (adapter.method, settings(adapter)) if part)
    where = few(adapter.targets, 8, quoted=False)
    return f"{what} on {plural(adapter.module_count, 'module')} ({where}), {count(adapter.parameter_count)} parameters"


def trainable(model: ModelState) -> str:
    """Returns the number of trainable parameters: ``4,884,480 trainable of 140,366,688 (3.48 %)``."""
    return f"{count(model.trainable_count)} {_of_all(model)}"


def _of_all(model: ModelState) -> str:
    return f"trainable of {count(model.parameter_count)} ({share(model.trainable_count, model.parameter_count)})"


def activity(model: ModelState) -> str:
    """Returns a text that says which adapters are active."""
    if model.merged:
        return f"merged: {', '.join(model.merged)}"
    if not model.enabled:
        return "off: only the base model is active"
    return f"active: {', '.join(model.active)}" if model.active else "no adapter is active"


def in_pool(model: ModelState) -> str:
    """Returns a text with the number of further adapters in the model's pool; empty if there are none."""
    return f"{model.offloaded_count:,} more in the pool" if model.offloaded_count else ""


def condition(adapter: AdapterState, *, brief: bool = False) -> str:
    """Returns the state of an adapter as text: ``active, trainable`` or ``inactive, not saved``.

    Args:
        adapter: the adapter.
        brief: whether ``not saved`` replaces ``trainable`` and ``inactive``, for narrow tables.
    """
    if adapter.merged:
        words = ["merged"]
    elif adapter.active:
        words = ["active", "trainable" if adapter.trainable else "frozen"]
    else:
        words = ["inactive", "frozen"] if adapter.frozen else ["inactive"]
    if adapter.unsaved:
        words = [*(word for word in words if not brief or word not in ("trainable", "inactive")), "not saved"]
    if adapter.scale != 1.0:
        words.append(f"×\u00a0{adapter.scale:g}")
    return ", ".join(words)


def modules(adapter: AdapterState) -> Text:
    """Returns the adapted modules: ``q_proj v_proj`` or ``down_proj + 6``, with all of them in the tooltip."""
    few = adapter.targets if len(adapter.targets) <= 2 else (adapter.targets[0], f"+\u00a0{len(adapter.targets) - 1}")
    return Text(" ".join(few), "dim", " ".join(adapter.targets))


def adapter_cells(adapter: AdapterState) -> tuple[Cell, ...]:
    """Returns an adapter as a table row with the columns of ``ADAPTER_HEAD``."""
    how = " ".join(part for part in (adapter.method, settings(adapter)) if part)
    varies = "*: some modules have other values" if "*" in how else ""
    return (
        (Text(adapter.name, tooltip=adapter.name, wrap="names"), Text(how, "dim", varies)),
        (f"{adapter.module_count:,}", modules(adapter)),
        (count(adapter.parameter_count), dim(size(adapter.byte_count))),
        condition(adapter),
    )


def adapter_table(adapters: Sequence[AdapterState]) -> Table:
    """Returns a table of adapters in which active ones are marked."""
    return Table(
        ADAPTER_HEAD,
        tuple(adapter_cells(adapter) for adapter in adapters),
        right=ADAPTER_FIGURES,
        marked=tuple(place for place, adapter in enumerate(adapters) if adapter.active),
    )


def model_title(model: ModelState) -> str:
    """Returns the title of a model: ``model (LlamaForCausalLM)``."""
    return f"{model.name} ({model.class_name})"


def model_summary(model: ModelState) -> str:
    """Returns a model's size, dtype and device: ``134.5 M parameters, bfloat16, cpu``."""
    parts = (f"{short_count(model.parameter_count)} parameters", model.dtype, model.quantization, model.device)
    return ", ".join(part for part in parts if part)


def model_card(model: ModelState | None, called: str | None = None, *, hint: str = "", brief: bool = False) -> Card:
    """Returns a card of a model with its adapters.

    Args:
        model: the model, or None if it no longer exists.
        called: name of a model that no longer exists.
        hint: a line at the end.
        brief: with many adapters, show only the number of further ones instead of a folded table.
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


def training_now(model: ModelState) -> str:
    """Returns which training runs on a model and how far it is; empty if none does."""
    train = model.training
    if train is None or train.status in ENDED:
        return ""
    return f"{training_text(train, brief=True)} (%lora watch shows its card)"


def _adapters(model: ModelState, brief: bool) -> tuple[Block, ...]:
    """Returns the table of adapters, or an example that adds one if there are none."""
    if not model.adapters:
        return no_adapters(model)
    first, others = model.adapters[:_MOST_ROWS], model.adapters[_MOST_ROWS:]
    table = adapter_table(first)
    if not others:
        return (table,)
    words = f"{len(others):,} more"
    return table, line(dim(words)) if brief else Details(words, adapter_table(others))


def totals(model: ModelState, *more: str) -> Line:
    """Returns a line with the number of trainable parameters, the adapters in the pool, and further texts."""
    words = "; ".join(("", *(part for part in (in_pool(model), *more) if part)))
    return line(bold(count(model.trainable_count)), Text(_of_all(model) + words))


def example(model_name: str) -> Line:
    """Returns an example of a notebook cell that adds an adapter."""
    return line(
        Text(f'%%lora {model_name} --name my_adapter\nr = 16\ntarget_modules = "all-linear"', "code", wrap="as is")
    )


def no_adapters(model: ModelState) -> tuple[Line, ...]:
    """Returns the text for a model without adapters."""
    return line(dim("No adapters yet. A cell like this adds one:")), example(model.name)


def missing_model(called: str | None) -> str:
    """Returns the message for a missing model."""
    if called:
        return f"There is no model {called!r} any more: it was unloaded or deleted, or its variable holds another."
    return "No adapted model yet."


def no_model(called: str | None) -> tuple[Line, ...]:
    """Returns the text for a missing model."""
    if called:
        return (line(dim(missing_model(called))),)
    return line(dim(f"{missing_model(None)} A cell like this adapts one:")), example("model")


def model_text(model: ModelState | None, called: str | None = None) -> str:
    """Returns a model as one line of plain text."""
    if model is None:
        return missing_model(called) if called else "no adapted model yet"
    adapters = ", ".join(f"{item.name}{'*' if item.active else ''} [{item.method}]" for item in model.adapters)
    pool = f" and {in_pool(model)}" if model.offloaded_count else ""
    return f"{model_title(model)}: {adapters or 'no adapters'}{pool}; {trainable(model)}"
