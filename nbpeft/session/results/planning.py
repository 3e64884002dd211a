"""Whether a run fits, part by part, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Bar, Block, Card, Table, Text, Tone, bold, card, dim, line
from nbpeft.display.memory import label, parts_text, scale_of
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import size
from nbpeft.session.results.base import Result
from nbpeft.state import MemoryPart

if TYPE_CHECKING:
    from nbpeft.memory.suggest import Suggestion

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
        device: name of where it should fit, ``this-machine`` among them; empty for the planner's own.
        packing: whether a sequence holds several rows.
        adapters: how many are trained side by side.
        processes: that train together.
        sharded: whether they share the model out.
    """

    batch_size: int
    sequence_length: int
    rank: int | None
    dtype: str
    quantization: str | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    training: bool = True
    device: str = ""
    packing: bool = False
    adapters: int = 1
    processes: int = 1
    sharded: bool = False

    def __str__(self) -> str:
        words = [f"batch {self.batch_size}", f"length {self.sequence_length}"]
        words += [f"rank {self.rank}"] if self.rank is not None else []
        words.append(self.dtype if self.quantization is None else f"{self.quantization} + {self.dtype}")
        words += ["packed"] if self.packing else []
        if self.training:
            words += ["gradient checkpointing"] if self.gradient_checkpointing else []
            words.append(self.optimizer)
            words += [f"{self.adapters} adapters side by side"] if self.adapters > 1 else []
            words += [f"one of {self.processes} {'sharded ' if self.sharded else ''}processes"] * (self.processes > 1)
        else:
            words.append("inference")
        return ", ".join(words)


@dataclass(frozen=True)
class Room:
    """Where it should fit.

    Attributes:
        name: of the device, for a person.
        total: its bytes; None where the system does not report them.
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

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        total = size(self.room.total)
        if self.fits is None:
            return f"what {self.room.name} has is not known"
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
        """Model class and adapter in words."""
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
        """The plan with its settings."""
        assumed = tuple(line(dim(note)) for note in self.notes)
        settings = line(dim(str(self.settings)))
        return card(f"Memory plan for {self.model_name}", settings, self.blocks(), assumed, aside=self.aside)

    def blocks(self) -> tuple[Block, ...]:
        """The plan without its settings and its frame."""
        tone: Tone = "error" if self.fits is False else "warning" if self.fits_now is False else "dim"
        found: list[Block] = [line(bold(f"peak {size(self.peak_bytes)}"), Text(self.verdict, tone)), self.bar()]
        found += [line(Text(f"no room for: {self._exceeding()}", "error"))] if self.exceeding else []
        return (*found, self._change_table()) if self.changes else tuple(found)

    def bar(self) -> Bar:
        """The parts on the device, with its end marked."""
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
