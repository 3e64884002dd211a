"""What quantizing, preparing and adapting a model gives."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from nbpeft.session import render
from nbpeft.session.describe import adapter_table, describe, trainable, with_notes
from nbpeft.session.results import AddResult, _ModelResult

if TYPE_CHECKING:
    from nbpeft.model import PeftModel


@dataclass(frozen=True)
class PartSize:
    """What one part of the base weights takes.

    Attributes:
        name: ``quantized layers``, ``embedding``, ``head``, ``other layers`` or ``norms and biases``.
        module_count: modules that hold its weights.
        byte_count: what it takes now.
        before: what it took before, or None where it was never loaded otherwise.
        bfloat16_bytes: what it would take in bfloat16.
        kinds: how it is stored.
    """

    name: str
    module_count: int
    byte_count: int
    before: int | None
    bfloat16_bytes: int
    kinds: tuple[str, ...]

    @property
    def share(self) -> float:
        """Bytes as a share of those in bfloat16."""
        return self.byte_count / self.bfloat16_bytes if self.bfloat16_bytes else 1.0


@dataclass(frozen=True, repr=False)
class QloraResult(_ModelResult):
    """A quantized model was prepared and carries an adapter.

    Attributes:
        added: what applying the adapter gave.
        source: where the model came from, in words.
        quantized: whether this command quantized it; else it was so already.
        parts: the base weights, part by part.
        prepared: what was prepared for training, in words; empty where it was so already.
        prepare_bytes: memory that preparing cost.
        seconds: how long loading and quantizing took.
    """

    added: AddResult
    source: str
    quantized: bool
    parts: tuple[PartSize, ...]
    prepared: str
    prepare_bytes: int
    seconds: float

    @property
    def model(self) -> PeftModel:
        """The adapted model.

        Raises:
            AdapterError: the result was shown or released, and nothing else holds the model.
        """
        found: PeftModel = self.holder.get("model")
        return found

    @property
    def byte_count(self) -> int:
        """What the base weights take."""
        return sum(part.byte_count for part in self.parts)

    @property
    def bfloat16_bytes(self) -> int:
        """What the base weights would take in bfloat16."""
        return sum(part.bfloat16_bytes for part in self.parts)

    def release(self) -> None:
        """Keeps the model no longer alive."""
        self.added.release()
        super().release()

    def __str__(self) -> str:
        did = "quantized" if self.quantized else "already quantized"
        line = f"{did} {self.source}: {stored_words(self.parts)}"
        if self.prepared:
            line += f"; {self.prepared}"
        line += (
            f"; {self._what()} {self.added.adapter.name!r} on {self.added.model_name}: {describe(self.added.adapter)}"
        )
        return with_notes(line, self.added.notes)

    def _what(self) -> str:
        return "unchanged" if self.added.unchanged else "reconfigured" if self.added.reconfigured else "added"

    def _html(self) -> str:
        took = f"{self.seconds:.1f} s" if self.quantized else "no weight was touched"
        return render.card(
            f"{self.added.adapter.name} · {self._what()} on a {'newly ' if self.quantized else ''}quantized model",
            part_table(self.parts),
            render.line(render.dim("; ".join(text for text in (self.prepared, took) if text))),
            adapter_table((self.added.adapter,)),
            render.line(render.dim(trainable(self.added.state))),
            render.notes(self.added.notes),
            aside=f"{self.added.model_name} · {self.added.state.class_name}",
        )


def stored_words(parts: tuple[PartSize, ...]) -> str:
    """``210 layers in nf4 double: 55.1 MB, 0.259 of bfloat16; the rest 113.3 MB``."""
    layers = next((part for part in parts if part.name == "quantized layers"), None)
    rest = f"the rest {render.size(sum(part.byte_count for part in parts if part is not layers))}"
    if layers is None:
        return rest
    return (
        f"{render.plural(layers.module_count, 'layer')} in {', '.join(layers.kinds)}: "
        f"{render.size(layers.byte_count)}, {layers.share:.3f} of bfloat16; {rest}"
    )


def part_table(parts: tuple[PartSize, ...]) -> str:
    """The parts as a table, with a last row for all of them."""
    measured = all(part.before is not None for part in parts)
    now, before, dense = (
        sum(sizes) for sizes in zip(*((p.byte_count, p.before or 0, p.bfloat16_bytes) for p in parts), strict=True)
    )
    total = PartSize("base weights", 0, now, before, dense, ())
    head = ["Part", "Modules", "Stored", *(["Before"] if measured else []), "In bfloat16", "Now", "Share"]
    return render.table(head, [_row(part, measured) for part in (*parts, total)], right=(1, *range(3, len(head))))


def _row(part: PartSize, measured: bool) -> tuple[str, ...]:
    return (
        escape(part.name),
        render.count(part.module_count) if part.module_count else "",
        escape(", ".join(part.kinds)),
        *((render.size(part.before),) if measured else ()),
        render.size(part.bfloat16_bytes),
        render.size(part.byte_count),
        f"{part.share:.3f}",
    )
