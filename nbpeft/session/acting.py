"""The commands that choose what acts, train or stays in the base weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError, ConfigError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.base import SessionBase
from nbpeft.session.checks import names_of, place_of
from nbpeft.session.results import CommandResult, MergedCopy, ModelRef, UnloadResult

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.manager import AdapterManager

    ModelLike = nn.Module | str | None
    Names = str | Sequence[str]


class ActingCommands(SessionBase):
    """Switching, scaling, freezing, merging and unloading."""

    def use(self, names: Names, *, model: ModelLike = None) -> CommandResult:
        """Switches to one adapter, or to several whose deltas add up.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        chosen = names_of(names)
        entry = self._book.get(model)
        with self._command(f"switching to {', '.join(chosen)}") as notes:
            entry.manager.activate(list(chosen), enable=True)
            self._book.enter(entry.name, entry.model)
            return self._done(entry, f"{entry.name} uses {', '.join(map(repr, chosen))}", notes)

    def off(self, *, model: ModelLike = None) -> CommandResult:
        """Lets only the base model act, until ``on`` or ``use``."""
        entry = self._book.get(model)
        with self._command("switching adapters off") as notes:
            entry.manager.disable()
            return self._done(entry, f"adapters of {entry.name} are off; %lora on brings them back", notes)

    def on(self, *, model: ModelLike = None) -> CommandResult:
        """Lets the selected adapters act again."""
        entry = self._book.get(model)
        with self._command("switching adapters on") as notes:
            entry.manager.enable()
            return self._done(entry, f"adapters of {entry.name} are on: {', '.join(entry.manager.active)}", notes)

    def set_scale(self, name: str, scale: float, *, model: ModelLike = None) -> CommandResult:
        """Sets the factor on an adapter's delta; 1 is how it was trained.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        entry = self._book.get(model)
        with self._command(f"scaling {name!r}") as notes:
            entry.manager.set_scale(name, scale)
            return self._done(entry, f"{name!r} acts with a factor of {scale:g}", notes)

    def freeze(self, name: str, *, model: ModelLike = None) -> CommandResult:
        """Keeps an adapter from training."""
        entry = self._book.get(model)
        with self._command(f"freezing {name!r}") as notes:
            entry.manager.freeze(name)
            return self._done(entry, f"froze {name!r}", notes)

    def unfreeze(self, name: str, *, model: ModelLike = None) -> CommandResult:
        """Lets an adapter train while it is active."""
        entry = self._book.get(model)
        with self._command(f"unfreezing {name!r}") as notes:
            entry.manager.unfreeze(name)
            return self._done(entry, f"{name!r} trains while it is active", notes)

    # The base weights

    def merge(
        self,
        names: Names | None = None,
        *,
        model: ModelLike = None,
        safe: bool = False,
        to: str | os.PathLike[str] | None = None,
        **copying: Any,
    ) -> CommandResult | MergedCopy:
        """Adds adapters to the base weights, so that they cost nothing when the model runs.

        Args:
            names: None: the active ones.
            model: an adapted model.
            safe: refuse where a merged weight would not be finite.
            to: write a merged copy in full precision into this folder, and leave the model as it is.
            **copying: with ``to``: ``base``, ``dtype``, ``tokenizer`` and ``max_shard_bytes`` of
                ``nbpeft.merge_to_folder``.

        Raises:
            MergeError: the weights cannot be merged into, or are merged already.
            CheckpointError: the folder cannot be written, or holds a model.
        """
        chosen = None if names is None else list(names_of(names))
        folder = None if to is None else place_of(to, "merge")
        entry = self._book.get_for("merge", model)
        if not (entry.manager.active if chosen is None else chosen):
            raise AdapterError(
                f"nothing to merge into {entry.name}: no adapter is {'active' if chosen is None else 'named'}"
            )
        if to is None and copying:
            raise ConfigError(f"{next(iter(copying))!r} goes with a folder to merge into: to=…")
        with self._command("merging", slow=True) as notes:
            if folder is not None:
                return _write_copy(entry.manager, entry.name, folder, chosen, notes, safe=safe, **copying)
            note = _requantizing_note(entry.manager, chosen)
            entry.manager.merge(chosen, safe=safe)
            notes += [note] if note else []
            return self._done(entry, f"merged {', '.join(map(repr, entry.manager.merged))} into {entry.name}", notes)

    def unmerge(self, *, model: ModelLike = None) -> CommandResult:
        """Puts the base weights back, bit for bit."""
        entry = self._book.get_for("unmerge", model)
        with self._command("unmerging", slow=True) as notes:
            merged = entry.manager.merged
            if not merged:
                return self._done(entry, f"nothing is merged into {entry.name}; nothing changed", notes)
            entry.manager.unmerge()
            return self._done(entry, f"unmerged {', '.join(map(repr, merged))}: the base weights are back", notes)

    def unload(self, *, merge: bool = False, model: ModelLike = None, safe: bool = False) -> UnloadResult:
        """Takes all adapters off and forgets the model; its handles are dead afterwards.

        Args:
            merge: add the active adapters to the base weights first.
            model: an adapted model.
            safe: with ``merge``, refuse where a merged weight would not be finite.
        """
        entry = self._book.get_for("unload", model)
        with self._command("unloading", slow=True) as notes:
            names = entry.manager.names
            with HeldInterrupts():
                base = entry.manager.unload(merge=merge, safe=safe)
                self._book.leave(entry)
            return UnloadResult(ModelRef(base), entry.name, names, merge, tuple(notes))


def _requantizing_note(manager: AdapterManager, names: list[str] | None) -> str:
    """What merging into quantized weights will cost, or the empty string where nothing is quantized."""
    from nbpeft.model import merge_errors

    chosen = tuple(manager.active if names is None else names)
    lossy = any(layer.backend.name != "dense" and layer.backend.can_merge for layer in manager.layers.values())
    if manager.merged or not chosen or not lossy:
        return ""
    return f"{merge_errors(manager.model, chosen)}; %lora merge --to DIR keeps full precision"


def _write_copy(
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
