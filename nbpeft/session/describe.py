"""States in words and as tables."""

from __future__ import annotations

from html import escape

from nbpeft.session import render
from nbpeft.state import AdapterState, ModelState

_KINDS = 3
"""Kinds of modules that a table names."""


def with_notes(line: str, notes: tuple[str, ...]) -> str:
    """A line with its notes behind it."""
    return line + "".join(f" [note: {note}]" for note in notes)


def describe(adapter: AdapterState) -> str:
    """``LoRA r=16 alpha=32 on 210 modules (q_proj, v_proj), 4,884,480 parameters``."""
    mixed = " (mixed)" if adapter.mixed_ranks else ""
    where = ", ".join(adapter.targets[:8]) + (", …" if len(adapter.targets) > 8 else "")
    return (
        f"{adapter.method} r={adapter.rank} alpha={adapter.alpha:g}{mixed} on "
        f"{render.plural(adapter.module_count, 'module')} ({where}), {render.count(adapter.parameter_count)} parameters"
    )


def trainable(model: ModelState) -> str:
    """``4,884,480 trainable of 140,366,688 (3.48 %)``."""
    share = render.share(model.trainable_count, model.parameter_count)
    return f"{render.count(model.trainable_count)} trainable of {render.count(model.parameter_count)} ({share})"


def acting(model: ModelState) -> str:
    """Which adapters act, in words."""
    if model.merged:
        return f"merged: {', '.join(model.merged)}"
    if not model.enabled:
        return "off: only the base model acts"
    return f"active: {', '.join(model.active)}" if model.active else "no adapter is active"


def waiting(model: ModelState) -> str:
    """How many adapters its pool has besides those on it; empty where there are none."""
    return f"{model.waiting_count:,} more in the pool" if model.waiting_count else ""


def condition(adapter: AdapterState) -> str:
    """``active, trainable``."""
    words = ["merged"] if adapter.merged else (["active"] if adapter.active else [])
    words.append("trainable" if adapter.trainable else "frozen")
    if adapter.scale != 1.0:
        words.append(f"× {adapter.scale:g}")
    return ", ".join(words)


def adapter_table(adapters: tuple[AdapterState, ...]) -> str:
    """The adapters as an HTML table, active ones marked."""
    rows = [
        (
            render.name_or_path(item.name),
            escape(item.method),
            f"{item.rank} / {item.alpha:g}" + (" *" if item.mixed_ranks else ""),
            _where(item),
            render.count(item.parameter_count),
            render.size(item.byte_count),
            escape(condition(item)),
        )
        for item in adapters
    ]
    marked = [number for number, item in enumerate(adapters) if item.active]
    head = ("Adapter", "Method", "r / α", "Adapted modules", "Parameters", "Size", "State")
    return render.table(head, rows, right=(2, 4, 5), marked=marked)


def _where(adapter: AdapterState) -> str:
    """``60 · q_proj v_proj``, ``210 · down_proj gate_proj + 5``; all of them where the mouse rests."""
    targets = adapter.targets
    few = targets if len(targets) <= _KINDS else (*targets[: _KINDS - 1], f"+\u00a0{len(targets) - _KINDS + 1}")
    words = escape(" ".join([f"{adapter.module_count} ·", *few]))
    return f'<span title="{escape(" ".join(targets))}">{words}</span>'


def model_card(model: ModelState) -> str:
    """One model as a card."""
    stored = f" · {model.quantization}" if model.quantization else ""
    return render.card(
        f"{model.name} · {model.class_name}",
        adapter_table(model.adapters) if model.adapters else render.line(render.dim("no adapters")),
        render.note(waiting(model)),
        render.line(render.dim(f"{acting(model)}; {trainable(model)}")),
        aside=f"{render.count(model.parameter_count)} parameters · {model.dtype}{stored} · {model.device}",
    )
