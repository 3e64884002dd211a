"""What ``qlora`` would load, quantize and adapt."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.preview import Preview
from nbpeft.session.quantized import PartSize, part_table, stored_words
from nbpeft.session.results import Result


@dataclass(frozen=True, repr=False)
class QloraPreview(Result):
    """What ``qlora`` would do; nothing was loaded or changed.

    Attributes:
        source: where the model would come from, in words.
        action: ``load and quantize``, ``quantize`` or, where that is done already, the empty string.
        parts: the base weights as they would be, part by part.
        prepared: what would be prepared for training, in words; empty where it is so already.
        adapter: what would be adapted, and what training would need.
    """

    source: str
    action: str
    parts: tuple[PartSize, ...]
    prepared: str
    adapter: Preview

    @property
    def byte_count(self) -> int:
        """What the base weights would take."""
        return sum(part.byte_count for part in self.parts)

    @property
    def bfloat16_bytes(self) -> int:
        """What the base weights would take in bfloat16."""
        return sum(part.bfloat16_bytes for part in self.parts)

    def __str__(self) -> str:
        did = f"would {self.action} {self.source}" if self.action else f"{self.source} is quantized already"
        prepared = f"; {self.prepared}" if self.prepared else ""
        line = f"dry run: {did}: {stored_words(self.parts)}{prepared}; {self.adapter.what()}; nothing was changed"
        return with_notes(line, self.adapter.all_notes()) + self.adapter.forecast_text()

    def _html(self) -> str:
        touched = "loaded or changed" if self.action.startswith("load") else "changed"
        return render.card(
            f"{self.adapter.name} · dry run, nothing was {touched}",
            render.line(render.dim(f"would {self.action} {self.source}" if self.action else "quantized already")),
            part_table(self.parts),
            render.line(render.dim(f"would be prepared: {self.prepared}")) if self.prepared else "",
            self.adapter.body(),
            aside=f"{self.adapter.model_name} · {self.adapter.method}",
        )
