"""Whether a run fits, part by part, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.results import Result
from nbpeft.state import MemoryPart

if TYPE_CHECKING:
    from nbpeft.memory.suggest import Suggestion

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2")
"""Of parts, readable on light and dark."""
_OVER = "#d32f2f"
_GROUND = "rgba(128,128,128,.2)"
_SHOWN = 5


@dataclass(frozen=True)
class PlanSettings:
    """What a forecast is for.

    Attributes:
        batch_size: sequences in a step.
        sequence_length: tokens of each.
        rank: of the adapter, or None where it has no single one.
        dtype: of weights and activations, e.g. ``bfloat16``.
        quantization: ``nf4``, ``fp4``, ``int8`` or None.
        gradient_checkpointing: whether layers are computed again in backward.
        optimizer: its name.
        training: a training step; else reading a prompt.
    """

    batch_size: int
    sequence_length: int
    rank: int | None
    dtype: str
    quantization: str | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    training: bool = True

    def __str__(self) -> str:
        words = [f"batch {self.batch_size}", f"length {self.sequence_length}"]
        words += [f"rank {self.rank}"] if self.rank is not None else []
        words.append(self.dtype if self.quantization is None else f"{self.quantization} + {self.dtype}")
        if self.training:
            words += ["gradient checkpointing"] if self.gradient_checkpointing else []
            words.append(self.optimizer)
        else:
            words.append("inference")
        return ", ".join(words)


@dataclass(frozen=True)
class Room:
    """Where it should fit.

    Attributes:
        name: of the device, for a person.
        total: its bytes; None where the system does not tell.
        free: what is free on it now; None for a device elsewhere.
        held: what the model holds on it already.
        on_cpu: whether it is the host.
    """

    name: str
    total: int | None = None
    free: int | None = None
    held: int = 0
    on_cpu: bool = False


@dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """What a run will need at its peak.

    Attributes:
        model_name: variable, folder or hub id of the model.
        class_name: of the model.
        adapter: the adapter, in words.
        settings: what it was forecast for.
        parts: the peak, part by part.
        room: where it should fit.
        changes: what would lower the peak; what makes it fit first. Empty where not asked for.
    """

    model_name: str
    class_name: str
    adapter: str
    settings: PlanSettings
    parts: tuple[MemoryPart, ...]
    room: Room
    changes: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Most bytes needed at any time."""
        return sum(part.byte_count for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much in all; None where that is not known."""
        return None if self.room.total is None else self.peak_bytes <= self.room.total

    @property
    def fits_now(self) -> bool | None:
        """Whether it fits what is free now, the model's own part included; None where that is not known."""
        return None if self.room.free is None else self.peak_bytes <= self.room.free + self.room.held

    @property
    def excess(self) -> int:
        """Bytes beyond the device; 0 where it fits."""
        return max(self.peak_bytes - (self.room.total or self.peak_bytes), 0)

    @property
    def exceeding(self) -> tuple[tuple[str, int], ...]:
        """The parts that find no room when they are laid in one after the other, and by how much each."""
        if not self.excess or self.room.total is None:
            return ()
        found, end = [], 0
        for part in self.parts:
            end += part.byte_count
            over = min(end - self.room.total, part.byte_count)
            if over > 0:
                found.append((part.name, over))
        return tuple(found)

    # Words

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        total = render.size(self.room.total)
        if self.fits is None:
            return f"what {self.room.name} has is not known"
        if not self.fits:
            return f"does not fit {self._device(total)}: {render.size(self.excess)} too much"
        if self.fits_now is False:
            need = self.peak_bytes - self.room.held
            free = render.size(self.room.free)
            return f"would fit {self._device(total)}, but {free} are free now and {render.size(need)} more are needed"
        return f"fits {self._device(total)}: {render.size((self.room.total or 0) - self.peak_bytes)} to spare"

    def _device(self, total: str) -> str:
        return total if total == self.room.name else f"{total} of {self.room.name}"

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {render.size(part.byte_count)}" for part in self.parts if part.byte_count)
        lines = [f"{self.model_name} ({self.settings}): peak {render.size(self.peak_bytes)} ({parts}); {self.verdict}"]
        if self.exceeding:
            lines.append(f"  no room for: {self._exceeding()}")
        for change in self.changes[:_SHOWN]:
            lines.append(f"  {change.words}{'; then it fits' if change.fits and self.fits is False else ''}")
        if self.changes and self.fits is False and not any(change.fits for change in self.changes):
            lines.append("  no change of these settings makes it fit")
        lines[0] = with_notes(lines[0], self.notes)
        return "\n".join(lines)

    def _exceeding(self) -> str:
        return ", ".join(f"{name} ({render.size(over)})" for name, over in self.exceeding)

    # HTML

    def _html(self) -> str:
        return render.card(
            f"memory plan · {self.model_name}",
            self.body(),
            "".join(render.line(render.dim(note)) for note in self.notes),
            aside=" · ".join(text for text in (self.class_name, self.adapter) if text),
        )

    def body(self, *, settings: bool = True) -> str:
        """The plan as HTML without its card.

        Args:
            settings: tell what it is for.
        """
        told = render.line(render.dim(str(self.settings))) if settings else ""
        size = render.bold(f"peak {render.size(self.peak_bytes)}")
        colour = render.bad if self.fits is False else render.dim if self.fits_now is not False else render.warning
        return (
            told
            + render.line(size, colour(self.verdict))
            + self.bar()
            + (render.line(render.bad(f"no room for: {self._exceeding()}")) if self.exceeding else "")
            + self._change_table()
        )

    def bar(self) -> str:
        """Parts as one bar on the device, with the end of the device marked, and a legend."""
        total = self.room.total
        whole = max(self.peak_bytes, total or 0) or 1
        # On a large device the parts would be too thin to see: there they fill the bar.
        if total is not None and self.peak_bytes < total / 20:
            whole, total = self.peak_bytes or 1, None
        pieces = "".join(
            f'<div title="{escape(_words(part))}" style="width:{100 * part.byte_count / whole:.2f}%;height:14px;'
            f'background:{colour}"></div>'
            for part, colour in self._coloured()
        )
        legend = "".join(
            f'<span title="{escape(part.detail)}"><span style="display:inline-block;width:9px;height:9px;'
            f'border-radius:2px;margin-right:5px;background:{colour}"></span>'
            f"{escape(part.name)} {render.size(part.byte_count)}</span>"
            for part, colour in self._coloured()
        )
        return (
            f'<div style="display:flex;height:14px;border-radius:3px;overflow:hidden;margin:8px 0 0;'
            f'background:{_GROUND}">{pieces}</div>{self._end(whole, total)}'
            f'<div style="display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12px">{legend}</div>'
        )

    def _end(self, whole: int, total: int | None) -> str:
        """Where the device ends, drawn below the bar."""
        if total is None:
            return '<div style="height:6px"></div>'
        share = 100 * min(total / whole, 1.0)
        colour = _OVER if self.excess else "rgba(128,128,128,.8)"
        beyond = f'<div style="width:{100 - share:.2f}%;height:3px;background:{_OVER}"></div>' if self.excess else ""
        return (
            f'<div style="display:flex;height:3px;margin-top:2px">'
            f'<div style="box-sizing:border-box;width:{share:.2f}%;height:3px;border-right:2px solid {colour}"></div>'
            f"{beyond}</div>"
            f'<div style="font-size:11px;margin-bottom:4px;text-align:{"right" if share > 60 else "left"};'
            f'{f"width:{share:.2f}%" if share > 60 else f"margin-left:{share:.2f}%"}">'
            f"{render.dim(f'{self.room.name}, {render.size(total)}' if self._named else render.size(total))}</div>"
        )

    @property
    def _named(self) -> bool:
        return self.room.name != render.size(self.room.total)

    def _coloured(self) -> Iterator[tuple[MemoryPart, str]]:
        for place, part in enumerate(self.parts):
            if part.byte_count:
                yield part, COLOURS[place % len(COLOURS)]

    def _change_table(self) -> str:
        if not self.changes:
            return ""
        wanting = self.fits is False
        rows = []
        for change in self.changes[:_SHOWN]:
            cost = f'<div style="font-size:12px">{render.dim(change.cost)}</div>' if change.cost else ""
            sizes = [_unbroken(render.size(count)) for count in (change.saved_bytes, change.peak_bytes)]
            then = render.accent("fits") if change.fits else render.dim("still too much")
            rows.append((escape(change.change) + cost, *sizes, *((_unbroken(then),) if wanting else ())))
        titles = ("Change", "Saves", "Peak\u00a0then", *(("Then",) if wanting else ()))
        return f'<div style="overflow-x:auto">{render.table(titles, rows, right=(1, 2))}</div>'

    def with_changes(self, changes: tuple[Suggestion, ...]) -> PlanResult:
        """The same with other changes shown."""
        return dataclasses.replace(self, changes=changes)


def _words(part: MemoryPart) -> str:
    return f"{part.name} {render.size(part.byte_count)}" + (f": {part.detail}" if part.detail else "")


def _unbroken(text: str) -> str:
    return f'<span style="white-space:nowrap">{text}</span>'
