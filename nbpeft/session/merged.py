"""What merging gives: a copy in full precision on disk, and the error of each way to merge."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.results import Result

if TYPE_CHECKING:
    from nbpeft.engine.manager import AdapterManager
    from nbpeft.model.merge_export import MergeErrors

_SHOWN = 5


@dataclass(frozen=True, repr=False)
class MergedCopy(Result):
    """A merged model was written to disk; the model in memory is as it was.

    Attributes:
        model_name: the notebook variable of the model.
        names: the adapters in the copy.
        folder: where it is; ``from_pretrained`` loads it.
        dtype: of its weights.
        byte_count: of its weights.
        shard_bytes: of each of its files with weights.
        errors: of both ways to merge, by layer and in total.
        notes: what a person should know.
    """

    model_name: str
    names: tuple[str, ...]
    folder: str
    dtype: str
    byte_count: int
    shard_bytes: tuple[int, ...]
    errors: MergeErrors
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        files = render.plural(len(self.shard_bytes), "file")
        line = (
            f"merged {', '.join(map(repr, self.names))} of {self.model_name} into a copy in {self.folder} "
            f"({self.dtype}, {render.size(self.byte_count)} in {files}); {self.errors}"
        )
        return with_notes(line, self.notes)

    def _both(self, error: float) -> tuple[str, str]:
        return _figure(error), self.errors.delta_words(error)

    def _html(self) -> str:
        requantized = self.errors.requantized
        ways = [("this copy", self.dtype, *self._both(self.errors.full_precision))]
        if requantized is not None:
            ways.append(("into the quantized weights (%lora merge)", "quantized again", *self._both(requantized)))
        files = render.plural(len(self.shard_bytes), "file")
        return render.card(
            f"{', '.join(self.names)} · merged into a copy",
            render.line(render.dim(f"{self.folder}: {self.dtype}, {render.size(self.byte_count)} in {files}")),
            render.table(("Way to merge", "Weights", "Relative error", "Of what the adapter adds"), ways, right=(2, 3)),
            self._worst(),
            render.notes(self.notes),
            aside=self.model_name,
        )

    def _worst(self) -> str:
        """The layers that lose most; nothing where none loses anything."""
        layers = [item for item in self.errors.layers if item.requantized or item.full_precision]
        layers.sort(key=lambda item: -(item.requantized or item.full_precision))
        again = [] if self.errors.requantized is None else ["Quantized again"]
        rows = [
            (escape(item.path), _figure(item.full_precision), *(_figure(item.requantized) for _ in again))
            for item in layers[:_SHOWN]
        ]
        head = (f"Layers that suffer most, of {len(self.errors.layers)}", "Copy", *again)
        return render.table(head, rows, right=(1, 2)) if rows else ""


def _figure(error: float | None) -> str:
    return "–" if error is None else f"{error:.2e}" if error else "0"


def requantizing_note(manager: AdapterManager, names: list[str] | None) -> str:
    """What merging into quantized weights will cost, or the empty string where nothing is quantized."""
    from nbpeft.model import merge_errors

    chosen = tuple(manager.active if names is None else names)
    lossy = any(layer.backend.name != "dense" and layer.backend.can_merge for layer in manager.layers.values())
    if manager.merged or not chosen or not lossy:
        return ""
    return f"{merge_errors(manager.model, chosen)}; %lora merge --to DIR keeps full precision"


def write_copy(
    manager: Any, model_name: str, folder: str, names: list[str] | None, notes: list[str], **how: Any
) -> MergedCopy:
    """Writes the copy; see ``nbpeft.merge_to_folder`` for what ``how`` may hold."""
    from nbpeft.model import merge_to_folder

    done = merge_to_folder(manager.model, names, folder, **how)
    assert done.errors is not None
    return MergedCopy(
        model_name,
        done.names,
        str(done.folder),
        done.dtype,
        done.byte_count,
        done.shard_bytes,
        done.errors,
        tuple(notes),
    )
