"""Results of quantizing, preparing and adapting a model, and its preview."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Card, Table, card, dim, line, notes
from nbpeft.display.models import adapter_table, describe, model_title, trainable, with_notes
from nbpeft.display.numbers import count, plural, size
from nbpeft.session.results.adapters import AddResult
from nbpeft.session.results.base import ModelResult, Result
from nbpeft.session.results.preview import Preview


@dataclass(frozen=True)
class PartSize:
    """The size of one part of the base weights.

    Attributes:
        name: ``quantized layers``, ``experts``, ``embedding``, ``head``, ``other layers`` or ``norms and biases``.
        module_count: number of modules with its weights; for experts, of tensors.
        byte_count: current size in bytes.
        before: previous size in bytes, or None if it was never loaded in another form.
        bfloat16_bytes: size in bfloat16, in bytes.
        kinds: the storage formats.
    """

    name: str
    module_count: int
    byte_count: int
    before: int | None
    bfloat16_bytes: int
    kinds: tuple[str, ...]

    @property
    def share(self) -> float:
        """Size relative to that in bfloat16."""
        return self.byte_count / self.bfloat16_bytes if self.bfloat16_bytes else 1.0


class _BaseWeights:
    """Sums over the parts of the base weights."""

    parts: tuple[PartSize, ...]

    @property
    def byte_count(self) -> int:
        """Current or planned size of the base weights in bytes."""
        return sum(part.byte_count for part in self.parts)

    @property
    def bfloat16_bytes(self) -> int:
        """Size of the base weights in bfloat16, in bytes."""
        return sum(part.bfloat16_bytes for part in self.parts)


@dataclass(frozen=True, repr=False)
class QloraResult(_BaseWeights, ModelResult):
    """A quantized model was prepared and has an adapter.

    Attributes:
        added: the result of adding the adapter.
        source: where the model came from, as text.
        quantized: whether this command quantized it; otherwise it was already quantized.
        parts: the base weights, part by part.
        prepared: what was prepared for training, as text; empty if nothing was left to prepare.
        prepare_bytes: memory that the preparation needed, in bytes.
        seconds: time for loading and quantizing, in seconds.
        compute_dtype: dtype in which its 4-bit layers compute, e.g. ``float32``; empty if it has none.
    """

    added: AddResult
    source: str
    quantized: bool
    parts: tuple[PartSize, ...]
    prepared: str
    prepare_bytes: int
    seconds: float
    compute_dtype: str = ""

    def release(self) -> None:
        """Releases the reference to the model."""
        self.added.release()
        super().release()

    def __str__(self) -> str:
        added, did = self.added, "quantized" if self.quantized else "already quantized"
        prepared = "".join(f"; {text}" for text in (self._computes, self.prepared) if text)
        adapter = f"{added.did} {added.adapter.name!r} on {added.model_name}: {describe(added.adapter)}"
        return with_notes(f"{did} {self.source}: {stored_words(self.parts)}{prepared}; {adapter}", added.notes)

    @property
    def _computes(self) -> str:
        return f"4-bit layers compute in {self.compute_dtype}" if self.compute_dtype else ""

    def view(self) -> Card:
        took = f"{self.seconds:.1f} s" if self.quantized else "no weight was changed"
        return card(
            f"{self.added.adapter.name}: {self.added.did} on a {'newly ' if self.quantized else ''}quantized model",
            part_table(self.parts),
            line(dim("; ".join(text for text in (self._computes, self.prepared, took) if text))),
            adapter_table((self.added.adapter,)),
            line(dim(trainable(self.added.state))),
            notes(self.added.notes),
            aside=model_title(self.added.state),
        )


@dataclass(frozen=True, repr=False)
class QloraPreview(_BaseWeights, Result):
    """What ``qlora`` would do; nothing was loaded or changed.

    Attributes:
        source: where the model would come from, as text.
        action: ``load and quantize``, ``quantize``, or the empty string if it is already quantized.
        parts: the base weights as they would be, part by part.
        prepared: what would be prepared for training, as text; empty if nothing is left to prepare.
        adapter: what would be adapted, and what training would need.
    """

    source: str
    action: str
    parts: tuple[PartSize, ...]
    prepared: str
    adapter: Preview

    def __str__(self) -> str:
        did = f"would {self.action} {self.source}" if self.action else f"{self.source} is quantized already"
        prepared = f"; {self.prepared}" if self.prepared else ""
        what = f"dry run: {did}: {stored_words(self.parts)}{prepared}; {self.adapter.what()}; nothing was changed"
        return with_notes(what, self.adapter.all_notes()) + self.adapter.forecast_text()

    def view(self) -> Card:
        untouched = "loaded or changed" if self.action.startswith("load") else "changed"
        return card(
            f"{self.adapter.name}: dry run, nothing was {untouched}",
            line(dim(f"would {self.action} {self.source}" if self.action else "quantized already")),
            part_table(self.parts),
            line(dim(f"would be prepared: {self.prepared}" if self.prepared else "")),
            self.adapter.blocks(),
            aside=f"{self.adapter.model_name}, {self.adapter.method}",
        )


def stored_words(parts: tuple[PartSize, ...]) -> str:
    """Returns e.g. ``210 layers in nf4 double: 55.1 MB, 0.259 of bfloat16; the rest 113.3 MB``."""
    named = {"quantized layers": "layer", "experts": "tensor"}
    shown = [part for part in parts if part.name in named]
    words = [
        f"{plural(part.module_count, named[part.name])}{' of experts' if part.name == 'experts' else ''} in "
        f"{', '.join(part.kinds)}: {size(part.byte_count)}, {part.share:.3f} of bfloat16"
        for part in shown
    ]
    return "; ".join((*words, f"the rest {size(sum(part.byte_count for part in parts if part not in shown))}"))


def part_table(parts: tuple[PartSize, ...]) -> Table:
    """Returns the parts as a table, with a last row for their sum."""
    measured = all(part.before is not None for part in parts)
    now, before, dense = (
        sum(sizes) for sizes in zip(*((p.byte_count, p.before or 0, p.bfloat16_bytes) for p in parts), strict=True)
    )
    total = PartSize("base weights", 0, now, before, dense, ())
    head = ("Part", "Modules", "Stored", *(("Before",) if measured else ()), "In bfloat16", "Now", "Share")
    rows = tuple(_row(part, measured) for part in (*parts, total))
    return Table(head, rows, right=(1, *range(3, len(head))))


def _row(part: PartSize, measured: bool) -> tuple[str, ...]:
    return (
        part.name,
        count(part.module_count) if part.module_count else "",
        ", ".join(part.kinds),
        *((size(part.before),) if measured else ()),
        size(part.bfloat16_bytes),
        size(part.byte_count),
        f"{part.share:.3f}",
    )
