"""The result of a memory plan: whether a run fits, part by part, and which changes would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Bar, Block, Card, Table, Text, Tone, bold, card, dim, line
from nbpeft.display.memory import label, parts_text, scale_of
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import size
from nbpeft.session.results.base import NotedResult
from nbpeft.state import MemoryPart

if TYPE_CHECKING:
    from nbpeft.memory.suggest import Suggestion

_SHOWN = 5


@dataclass(frozen=True)
class PlanSettings:
    """The settings of a forecast.

    Attributes:
        batch_size: number of sequences per step.
        max_length: number of tokens per sequence.
        rank: rank of the adapter, or None if it has no single one.
        dtype: dtype of weights and activations, e.g. ``bfloat16``.
        quantization: ``nf4``, ``fp4``, ``int8`` or None.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        optim: name of the optimizer.
        training: a training step if True; else reading a prompt.
        device: name of the device that it should fit, possibly ``this-machine``; empty for the planner's default.
        packing: whether a sequence has several rows.
        num_adapters: number of adapters that are trained side by side.
        processes: number of processes that train together.
        fsdp: whether the model is sharded over the processes.
    """

    batch_size: int
    max_length: int
    rank: int | None
    dtype: str
    quantization: str | None = None
    gradient_checkpointing: bool = False
    optim: str = "adamw"
    training: bool = True
    device: str = ""
    packing: bool = False
    num_adapters: int = 1
    processes: int = 1
    fsdp: bool = False

    def __str__(self) -> str:
        words = [f"batch {self.batch_size}", f"length {self.max_length}"]
        words += [f"rank {self.rank}"] if self.rank is not None else []
        words.append(self.dtype if self.quantization is None else f"{self.quantization} + {self.dtype}")
        words += ["packed"] if self.packing else []
        if self.training:
            words += ["gradient checkpointing"] if self.gradient_checkpointing else []
            words.append(self.optim)
            words += [f"{self.num_adapters} adapters side by side"] if self.num_adapters > 1 else []
            words += [f"one of {self.processes} {'sharded ' if self.fsdp else ''}processes"] * (self.processes > 1)
        else:
            words.append("inference")
        return ", ".join(words)


@dataclass(frozen=True)
class Room:
    """The device that the run should fit.

    Attributes:
        name: display name of the device.
        total: its memory in bytes; None if the system does not report it.
        free: its free memory in bytes; None for a device of another machine.
        held: bytes that the model already uses on it.
        on_cpu: whether it is the host.
        bfloat16: whether it computes in bfloat16.
    """

    name: str
    total: int | None = None
    free: int | None = None
    held: int = 0
    on_cpu: bool = False
    bfloat16: bool = True


@dataclass(frozen=True, repr=False)
class PlanResult(NotedResult):
    """The peak memory of a run.

    Attributes:
        model_name: variable, folder or hub id of the model.
        class_name: class of the model.
        adapter: the adapter, as text.
        settings: the settings of the forecast.
        parts: the peak memory, part by part.
        room: the device that it should fit.
        changes: settings that would lower the peak, those that make it fit first; empty if it fits anyway, or if not
            requested.
    """

    model_name: str
    class_name: str
    adapter: str
    settings: PlanSettings
    parts: tuple[MemoryPart, ...]
    room: Room
    changes: tuple[Suggestion, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes."""
        return sum(part.byte_count for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's total memory; None if that is unknown."""
        return None if self.room.total is None else self.peak_bytes <= self.room.total

    @property
    def fits_now(self) -> bool | None:
        """Whether the peak is within the free memory plus the model's own; None if that is unknown."""
        return None if self.room.free is None else self.peak_bytes <= self.room.free + self.room.held

    @property
    def excess(self) -> int:
        """Bytes that exceed the device's memory; 0 if it fits."""
        return max(self.peak_bytes - (self.room.total or self.peak_bytes), 0)

    @property
    def exceeding(self) -> tuple[tuple[str, int], ...]:
        """The parts that exceed the device's memory when they are added one by one, and by how many bytes each."""
        if not self.excess or self.room.total is None:
            return ()
        parts, end = [], 0
        for part in self.parts:
            end += part.byte_count
            over = min(end - self.room.total, part.byte_count)
            if over > 0:
                parts.append((part.name, over))
        return tuple(parts)

    @property
    def verdict(self) -> str:
        """Whether it fits, as text."""
        total = size(self.room.total)
        if self.fits is None:
            return f"the memory of {self.room.name} is unknown"
        if not self.fits:
            return f"does not fit {self._device(total)}: {size(self.excess)} too much"
        if self.fits_now is False:
            need = self.peak_bytes - self.room.held
            free = size(self.room.free)
            return f"would fit {self._device(total)}, but {free} are free now and {size(need)} more are needed"
        return f"fits {self._device(total)}, {size((self.room.total or 0) - self.peak_bytes)} left"

    def _device(self, total: str) -> str:
        return total if total == self.room.name else f"{total} of {self.room.name}"

    @property
    def aside(self) -> str:
        """Model class and adapter as text."""
        return ", ".join(text for text in (self.class_name, self.adapter) if text)

    def __str__(self) -> str:
        needs = f"peak {size(self.peak_bytes)} ({parts_text(self.parts)}); {self.verdict}"
        lines = [with_notes(f"{self.model_name} ({self.settings}): {needs}", self.notes)]
        if self.exceeding:
            lines.append(f"  no room for: {self._exceeding()}")
        for change in self.changes[:_SHOWN]:
            lines.append(f"  {change.words}{'; then it fits' if change.fits and self.fits is False else ''}")
        if self.changes and self.fits is False and not any(change.fits for change in self.changes):
            lines.append("  no change of these settings makes it fit")
        return "\n".join(lines)

    def _exceeding(self) -> str:
        return ", ".join(f"{label(name)} ({size(over)})" for name, over in self.exceeding)

    def view(self) -> Card:
        assumed = tuple(line(dim(note)) for note in self.notes)
        settings = line(dim(str(self.settings)))
        return card(f"Memory plan for {self.model_name}", settings, self.blocks(), assumed, aside=self.aside)

    def blocks(self) -> tuple[Block, ...]:
        """Shows the plan without its settings and without a frame."""
        tone: Tone = "error" if self.fits is False else "warning" if self.fits_now is False else "dim"
        blocks: list[Block] = [line(bold(f"peak {size(self.peak_bytes)}"), Text(self.verdict, tone)), self.bar()]
        blocks += [line(Text(f"no room for: {self._exceeding()}", "error"))] if self.exceeding else []
        return (*blocks, self._change_table()) if self.changes else tuple(blocks)

    def bar(self) -> Bar:
        """Returns a bar of the parts, with the end of the device's memory marked."""
        total = scale_of(self.peak_bytes, self.room.total)
        known = size(self.room.total)
        label = known if self.room.name == known else f"{self.room.name}, {known}"
        return Bar(self.parts, max(self.peak_bytes, total or 0) or 1, total, label)

    def _change_table(self) -> Table:
        wanting = self.fits is False
        rows = []
        for change in self.changes[:_SHOWN]:
            then = Text("fits", "accent") if change.fits else dim("too much")
            peak = (size(change.peak_bytes), *((then,) if wanting else ()))
            rows.append(((change.change, dim(change.cost)), size(change.saved_bytes), peak))
        return Table(("Change", "Saves", "New peak"), tuple(rows), right=(1, 2))
