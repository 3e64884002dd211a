"""States as HTML and as plain text. Pure functions: no widget, no kernel, no side effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from nbpeft.session import render
from nbpeft.session.describe import adapter_table, condition, waiting
from nbpeft.state import AdapterState, MemoryState, ModelState, TrainState
from nbpeft.widgets import styles
from nbpeft.widgets.charts import ENDED, loss_chart, loss_image

NONE = "–"

_COLUMNS = (
    ("Adapter", ""),
    ("Method", "nbpeft-extra"),
    ("r / α", "nbpeft-number"),
    ("Adapted modules", "nbpeft-extra"),
    ("Parameters", "nbpeft-number"),
    ("Size", "nbpeft-number nbpeft-extra"),
    ("State", ""),
)
"""Columns of the interactive panel and their CSS classes; its style sheet lays them out."""


# Models


def model_title(model: ModelState) -> str:
    """``model · LlamaForCausalLM``."""
    return f"{model.name} · {model.class_name}"


def model_summary(model: ModelState) -> str:
    """``134.5 M parameters · bfloat16 · cpu``."""
    stored = f" · {model.quantization}" if model.quantization else ""
    return f"{short_count(model.parameter_count)} parameters · {model.dtype}{stored} · {model.device}"


def short_count(number: int) -> str:
    """A number for a heading: ``134.5 M``."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if number >= limit:
            return f"{number / (limit if unit != 'k' else 1000):.1f} {unit}"
    return f"{number:,}"


def model_card(model: ModelState | None, name: str | None = None, *, hint: str = "") -> str:
    """A model with its adapters as a card that needs no widget and no style sheet.

    Args:
        model: The model, or None where it is gone.
        name: What it was called.
        hint: A line at the end.
    """
    if model is None:
        return render.card(name or "model", render.line(render.dim(missing_model(name))))
    return render.card(
        model_title(model),
        adapter_table(model.adapters) if model.adapters else render.line(render.dim(no_adapters(model))),
        totals(model),
        memory_bar(model.memory) if model.memory is not None else "",
        render.note(hint),
        aside=model_summary(model),
    )


def no_adapters(model: ModelState) -> str:
    """What to do where a model has no adapter."""
    return f"No adapters yet. A cell that begins with %%lora {model.name} adds one."


def missing_model(name: str | None) -> str:
    """What to do where there is no model."""
    if name:
        return f"There is no model {name!r} any more: it was unloaded or deleted."
    return "No model yet. A cell that begins with %%lora and the name of a model adapts it."


def totals(model: ModelState) -> str:
    """How much of the model trains."""
    pool = render.note(waiting(model))
    return (
        f'<div style="margin-top:10px"><b style="font-weight:600;color:{styles.STRONG}">'
        f"{render.count(model.trainable_count)}</b> trainable of {render.count(model.parameter_count)} "
        f"{render.dim(f'({render.share(model.trainable_count, model.parameter_count)})')}</div>{pool}"
    )


def panel_head(model: ModelState | None, name: str | None, busy: str) -> str:
    """Title line of the interactive panel.

    Args:
        model: The model, or None where it is gone.
        name: What it was called.
        busy: What runs, or the empty string.
    """
    title = model_title(model) if model is not None else name or "model"
    aside = render.accent(f"{busy} …") if busy else render.dim(model_summary(model) if model is not None else "")
    return (
        '<div style="display:flex;justify-content:space-between;gap:16px;align-items:baseline;margin-bottom:8px">'
        f'<b style="font-weight:600;color:{styles.STRONG}">{escape(title)}</b>{aside}</div>'
    )


def panel_note(text: str) -> str:
    """A dim line of the interactive panel."""
    return f'<div style="padding:4px 0">{render.dim(text)}</div>'


def row_head() -> str:
    """Column titles of the interactive panel."""
    return _row([(escape(title), f"color:{styles.DIM}") for title, _ in _COLUMNS])


def adapter_row(adapter: AdapterState) -> str:
    """One adapter as a row of the interactive panel."""
    name, kinds = escape(adapter.name), escape(" ".join(adapter.targets))
    # That it is active is told by the row's colour.
    state = escape(condition(dataclasses.replace(adapter, active=False)))
    return _row(
        [
            (f'<span title="{name}">{name}</span>', "font-weight:600" if adapter.active else ""),
            (escape(adapter.method), ""),
            (rank_alpha(adapter), ""),
            (f'<span title="{kinds}">{escape(modules(adapter))}</span>', ""),
            (render.count(adapter.parameter_count), ""),
            (render.size(adapter.byte_count), ""),
            (f'<span title="{state}">{state}</span>', "" if adapter.trainable else f"color:{styles.DIM}"),
        ]
    )


def rank_alpha(adapter: AdapterState) -> str:
    """``16 / 32``, with a star where some modules have other values."""
    return f"{adapter.rank} / {adapter.alpha:g}" + (" *" if adapter.mixed_ranks else "")


def modules(adapter: AdapterState) -> str:
    """``60 · q_proj v_proj``, ``210 · down_proj + 6``."""
    if not adapter.targets:
        return str(adapter.module_count)
    first, *rest = adapter.targets
    if len(rest) > 1:
        return f"{adapter.module_count} · {first} + {len(rest)}"
    return f"{adapter.module_count} · {' '.join((first, *rest))}"


def _row(cells: Sequence[tuple[str, str]]) -> str:
    drawn = (
        f'<div class="{kind}" style="{style}">{content}</div>'
        for (content, style), (_, kind) in zip(cells, _COLUMNS, strict=True)
    )
    return f'<div class="nbpeft-grid">{"".join(drawn)}</div>'


def model_text(model: ModelState | None, name: str | None = None) -> str:
    """A model in one line of plain text."""
    if model is None:
        return missing_model(name)
    adapters = ", ".join(f"{item.name}{'*' if item.active else ''} ({item.method})" for item in model.adapters)
    pool = f" and {waiting(model)}" if model.waiting_count else ""
    return (
        f"{model_title(model)}: {adapters or 'no adapters'}{pool}; {render.count(model.trainable_count)} trainable of "
        f"{render.count(model.parameter_count)} ({render.share(model.trainable_count, model.parameter_count)})"
    )


# Memory


def memory_bar(memory: MemoryState) -> str:
    """Parts of the memory as one bar with its legend, and what is free on the device."""
    used = sum(part.byte_count for part in memory.parts)
    parts = [
        (styles.SERIES[place % len(styles.SERIES)], part.name, part.byte_count, part.detail)
        for place, part in enumerate(memory.parts)
    ]
    whole = used or 1
    # On a large device the parts would be too thin to see: there they fill the bar.
    if memory.device_total is not None and used >= memory.device_total / 20:
        whole = max(memory.device_total, used)
        elsewhere = whole - used - (memory.device_free or 0)
        if memory.device_free is not None and elsewhere > whole / 200:
            parts.append((styles.ELSEWHERE, "elsewhere", elsewhere, "other programs and the system"))
    pieces = "".join(
        f'<div title="{escape(_part(name, size, detail))}" '
        f'style="width:{100 * size / whole:.2f}%;height:14px;background:{colour}"></div>'
        for colour, name, size, detail in parts
    )
    legend = "".join(f"<span>{_swatch(colour)}{escape(_part(name, size))}</span>" for colour, name, size, _ in parts)
    return (
        f'<div style="display:flex;height:14px;border-radius:3px;overflow:hidden;margin:8px 0 6px;'
        f'{_background(styles.FILL)}">{pieces}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12px">'
        f"{legend}{render.dim(_free(memory))}</div>"
    )


def _part(name: str, byte_count: int, detail: str = "") -> str:
    return f"{name} {render.size(byte_count)}" + (f": {detail}" if detail else "")


def memory_text(memory: MemoryState) -> str:
    """Parts of the memory in one line of plain text."""
    parts = ", ".join(f"{part.name} {render.size(part.byte_count)}" for part in memory.parts)
    return f"{parts or 'nothing measured'} · {_free(memory)}"


def _free(memory: MemoryState) -> str:
    peak = f"peak {render.size(memory.peak)} · " if memory.peak is not None else ""
    if memory.device_free is None or memory.device_total is None:
        return f"{peak}on {memory.device}"
    return f"{peak}free {render.size(memory.device_free)} of {render.size(memory.device_total)} on {memory.device}"


def _swatch(colour: str) -> str:
    return (
        f'<span style="display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px;'
        f'{_background(colour)}"></span>'
    )


def _background(colour: str) -> str:
    """A background that stays coloured where ``var(…)`` is dropped."""
    plain = {styles.ACCENT: "#1976d2", styles.ERROR: "#d32f2f", styles.FILL: "#d0d0d0"}.get(colour)
    return f"background:{plain};background:{colour}" if plain else f"background:{colour}"


# Training


def training_card(train: TrainState, *, model_name: str = "", hint: str = "") -> str:
    """A run as a card: figures, progress, loss curve and what a person should know.

    Args:
        train: The run.
        model_name: What its model is called.
        hint: How to end the run, where there are no buttons.

    The chart of a run that has ended is an image, which stays in the saved notebook.
    """
    chart = loss_image(train) if train.status in ENDED else loss_chart(train)
    title = f"training · {train.adapter}" if train.adapter else "training"
    return render.card(
        title,
        _figures(train),
        _progress(train),
        chart,
        _legend(train),
        _message(train),
        render.line(render.dim(hint)) if hint else "",
        aside=" · ".join(part for part in (status_words(train), model_name) if part),
    )


def status_words(train: TrainState) -> str:
    """The status for a person."""
    return "stopping after this step" if train.status == "stopping" else train.status


def training_text(train: TrainState) -> str:
    """A run in one line of plain text."""
    total = f"/{train.total_steps}" if train.total_steps else ""
    parts = [f"{status_words(train)}: step {train.step}{total}"]
    if train.smoothed_loss is not None:
        parts.append(f"loss {number(train.smoothed_loss)}")
    if train.eval_loss is not None:
        parts.append(f"eval loss {number(train.eval_loss)}")
    if train.tokens_per_second is not None:
        parts.append(f"{rate(train.tokens_per_second)} tokens/s")
    if train.remaining is not None and train.status not in ENDED:
        parts.append(f"{duration(train.remaining)} left")
    else:
        parts.append(duration(train.elapsed))
    name = f"training {train.adapter} " if train.adapter else "training "
    return f"{name}{' · '.join(parts)}" + (f" · {train.message}" if train.message else "")


def number(value: float | None) -> str:
    """A loss: three decimals where that tells something."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"


def rate(value: float | None) -> str:
    """Tokens a second."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def learning_rate(value: float | None) -> str:
    """``7.1e-4``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """``0:31``, ``1:02:03``."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(train: TrainState) -> str:
    total = f" / {train.total_steps:,}" if train.total_steps else ""
    ended = train.status in ENDED
    whole = train.elapsed + train.remaining if train.remaining is not None else None
    time = (
        (duration(train.elapsed), "time")
        if ended or train.remaining is None
        else (duration(train.remaining), f"left of {duration(whole)}")
    )
    figures = (
        (number(train.smoothed_loss), "loss (smoothed)", 92),
        (
            number(train.eval_loss),
            "eval loss" + (f", step {train.eval_step:,}" if train.eval_step is not None else ""),
            96,
        ),
        (f"{train.step:,}{total}", "step" + (f" · epoch {train.epoch:.2g}" if train.epoch is not None else ""), 92),
        (rate(train.tokens_per_second), "tokens / s", 72),
        (*time, 82),
        (learning_rate(train.learning_rate), "learning rate", 80),
    )
    cells = "".join(
        f'<div style="min-width:{width}px"><div style="font-size:19px;line-height:1.35;white-space:nowrap;'
        f'color:{styles.STRONG}">{escape(value)}</div>'
        f'<div style="font-size:11px;white-space:nowrap;color:{styles.DIM}">{escape(label)}</div></div>'
        for value, label, width in figures
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 28px;margin:8px 0">{cells}</div>'


def _progress(train: TrainState) -> str:
    done = min(1.0, train.step / train.total_steps) if train.total_steps else float(train.status == "finished")
    colour = styles.ERROR if train.status == "failed" else styles.ACCENT
    return (
        f'<div style="height:6px;border-radius:3px;overflow:hidden;margin:6px 0 10px;{_background(styles.FILL)}">'
        f'<div style="width:{100 * done:.1f}%;height:6px;{_background(colour)}"></div></div>'
    )


def _legend(train: TrainState) -> str:
    entries = [(styles.ACCENT, "training loss")]
    if train.eval_history:
        entries.append((styles.EVAL, "eval loss"))
    items = "".join(f"<span>{_swatch(colour)}{label}</span>" for colour, label in entries)
    return f'<div style="display:flex;gap:16px;margin-top:4px;font-size:12px">{items}</div>'


def _message(train: TrainState) -> str:
    if not train.message:
        return ""
    colour = {"failed": styles.ERROR, "finished": styles.DIM, "stopped": styles.DIM}.get(train.status, styles.WARN)
    return f'<div style="margin-top:8px;color:{colour}">{escape(train.message)}</div>'
