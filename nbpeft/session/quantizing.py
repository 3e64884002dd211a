"""The command that quantizes a model, prepares it for training and puts an adapter on it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import ConfigError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.session.adapters import AdapterCommands
from nbpeft.session.checks import adapter_name, place_of
from nbpeft.session.configs import build_config
from nbpeft.session.handles import uncompiled
from nbpeft.session.quantized import QloraResult
from nbpeft.session.quantizing_preview import (
    DEFAULTS,
    QloraPreview,
    asked_for,
    foreseen_qlora,
    part_sizes,
    skeleton_of,
    sorted_out,
    source_words,
)

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.model.weight_storage import StoredPart
    from nbpeft.session.book import Entry
    from nbpeft.training.prepare import Preparation

    ConfigLike = AdapterConfig | Mapping[str, Any]


class QuantizingCommands(AdapterCommands):
    """QLoRA in one command."""

    def __init__(self) -> None:
        super().__init__()
        self._origins: weakref.WeakKeyDictionary[Any, _Origin] = weakref.WeakKeyDictionary()

    def qlora(
        self,
        source: nn.Module | str | os.PathLike[str],
        config: ConfigLike,
        *,
        name: str = "default",
        variable: str | None = None,
        allow_missing: bool = False,
        bits: int | None = None,
        quant_type: str | None = None,
        double_quant: bool | None = None,
        compute_dtype: Any = None,
        quant_storage: Any = None,
        gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        upcast: Any = "norms",
        **loading: Any,
    ) -> QloraResult:
        """Loads a model quantized (or quantizes one in memory), prepares it, and adds an adapter.

        Run again with the same source and quantization it only reconfigures the adapter.

        Args:
            source: a folder, a hub id, a ``.gguf`` file, or a loaded model, which is quantized in place.
            config: a config, or its fields.
            name: the adapter.
            variable: what to call the model.
            allow_missing: go on where a target matches nothing, as long as others match.
            bits: 4 or 8; 4 if left out.
            quant_type: ``"nf4"`` (if left out) or ``"fp4"``.
            double_quant: whether the constants of 4-bit blocks are quantized too; they are if left out.
            compute_dtype: what 4-bit layers compute in; see ``nbpeft.model.quantize``.
            quant_storage: dtype that holds the 4-bit codes.
            gradient_checkpointing: whether training recomputes activations.
            gradient_checkpointing_kwargs: e.g. ``{"use_reentrant": True}``.
            upcast: what becomes float32: ``"norms"``, ``"peft"`` or ``"none"``.
            **loading: ``gguf_file``, ``device_map``, ``model_class`` and what else ``from_pretrained`` takes.

        Raises:
            ConfigError: a field is unknown or impossible, or the model is quantized otherwise already.
            TargetError: the targets do not match the model.
            CheckpointNotFoundError: there is no model at ``source``.
        """
        from nbpeft.model.weight_storage import stored_parts

        given = {
            "bits": bits,
            "quant_type": quant_type,
            "double_quant": double_quant,
            "compute_dtype": compute_dtype,
            "quant_storage": quant_storage,
            "upcast": upcast,
            "gradient_checkpointing": gradient_checkpointing,
        }
        asked = asked_for(build_config(config), given | loading)  # what is impossible is refused before loading
        made, settings = asked.config, asked.settings
        adapter_name(name)
        with self._command(f"quantizing for {name!r}", slow=True):
            started = time.monotonic()
            if isinstance(source, str | os.PathLike):
                found = self._loaded(place_of(source, "qlora"), settings, loading, variable or "model")
                variable = variable or (None if found.now else "model")
            else:
                _refuse_loading(loading)
                found = self._in_memory(source, name, made, settings, allow_missing)
            seconds = time.monotonic() - started
            with as_it_was_on_failure(found.base):
                done = self._prepared(found.base, gradient_checkpointing, gradient_checkpointing_kwargs, upcast)
                added = self.add(found.base, made, name=name, variable=variable, allow_missing=allow_missing)
            self._origins.setdefault(found.base, found.origin)
            return QloraResult(
                holder=added.holder,
                added=added,
                source=source_words(source, loading) if found.origin.source else type(found.base).__name__,
                quantized=found.now,
                parts=part_sizes(stored_parts(found.base), found.before),
                prepared=str(done) if done is not None else "",
                prepare_bytes=done.extra_bytes if done is not None else 0,
                seconds=seconds,
            )

    def preview_qlora(
        self,
        source: nn.Module | str | os.PathLike[str],
        config: ConfigLike,
        *,
        name: str = "default",
        variable: str | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        device: Any = None,
        **how: Any,
    ) -> QloraPreview:
        """What ``qlora`` would load, quantize and adapt, and what training would need; nothing is touched.

        Of a folder, a hub id or a GGUF file only the config is read.

        Args:
            source: as for ``qlora``.
            config: of the adapter to come, or its fields.
            name: of the adapter to come.
            variable: what to call the model.
            batch_size: for the forecast of memory, like the next two; see ``plan_memory``.
            sequence_length: tokens of each row.
            device: where it should fit.
            **how: quantization, preparation and loading, as for ``qlora``.

        Raises:
            ConfigError: a field is unknown or impossible, or the model cannot be quantized.
            TargetError: the targets do not match the model.
            CheckpointNotFoundError: there is no model at ``source``.
        """
        from nbpeft.engine.model_tree import manager_of

        asked = asked_for(build_config(config), how)
        sizes = {"batch_size": batch_size, "sequence_length": sequence_length, "device": device}
        with self._command("planning") as notes:
            bare = None
            if isinstance(source, str | os.PathLike):
                place, variable = place_of(source, "qlora"), variable or "model"
                base = self._present(_Origin(place, asked.settings, asked.loading), variable)
                bare = skeleton_of(place, asked) if base is None else None
                words = source_words(place, asked.loading)
            else:
                _refuse_loading(asked.loading)
                base = self._base_of(source)
                self._refuse_other_settings(base, asked.settings)
                words = type(base).__name__
            entry = self._entry_of(base) if bare is None else None
            return foreseen_qlora(
                base if bare is None else bare.model,
                bare,
                asked,
                source=words,
                name=name,
                model_name=variable or (entry.name if entry is not None else "model"),
                replaces=entry is not None and name in entry.manager.configs,
                fresh=bare is not None or (manager_of(base) is None and base not in self._origins),
                sizes={size: value for size, value in sizes.items() if value is not None},
                notes=notes,
            )

    def goes_on_with(self, model: Any, variable: str, source: str, how: Mapping[str, Any]) -> bool:
        """Whether ``qlora`` made the adapted model in a variable of this source, so that it would load none.

        Args:
            model: what the variable holds.
            variable: its name.
            source: a folder, a hub id or a ``.gguf`` file.
            how: quantization, preparation and loading, as for ``qlora``.
        """
        entry = self._book.find(uncompiled(model))
        present = self._present(_Origin(source, *sorted_out(how)), variable)
        return present is not None and entry is not None and entry.manager.model is present

    def _present(self, origin: _Origin, variable: str) -> Any:
        """The base model that a variable holds, if it came from there and was quantized like that."""
        entry = next((entry for entry in self._book.entries() if entry.name == variable), None)
        same = entry is not None and self._origins.get(entry.manager.model) == origin
        return entry.manager.model if entry is not None and same else None

    def _loaded(self, source: str, settings: dict[str, Any], loading: dict[str, Any], variable: str) -> _Found:
        """The model of a source: the one that this variable holds already, or loaded now."""
        from nbpeft.model.quantize import load_quantized

        origin = _Origin(source, settings, loading)
        present = self._present(origin, variable)
        if present is not None:
            return _Found(present, origin, now=False)
        return _Found(load_quantized(source, **settings, **loading), origin, now=True)

    def _base_of(self, source: Any) -> Any:
        """The base model below a model in memory."""
        entry: Entry | None = self._entry_of(source)
        return entry.manager.model if entry is not None else uncompiled(source)

    def _in_memory(
        self, source: Any, name: str, config: AdapterConfig, settings: dict[str, Any], allow_missing: bool
    ) -> _Found:
        """The base model, quantized now unless it was so; refuses what cannot be adapted before a weight is rounded."""
        from nbpeft.engine.model_tree import manager_of
        from nbpeft.engine.plan import plan
        from nbpeft.model.quantize import quantize_model
        from nbpeft.model.weight_storage import stored_parts

        base = self._base_of(source)
        before, origin = stored_parts(base), _Origin(None, settings, {})
        manager = manager_of(base)
        replacing = name if manager is not None and name in manager.configs else None
        quantized = any(part.name == "quantized layers" for part in before)
        if quantized:
            self._refuse_other_settings(base, settings)
        plan(base, config, allow_missing=allow_missing, replacing=replacing)
        if quantized:
            return _Found(base, origin, now=False)
        quantize_model(base, **settings)
        return _Found(base, origin, now=True, before=before)

    def _refuse_other_settings(self, base: Any, settings: dict[str, Any]) -> None:
        known = self._origins.get(base)
        have = DEFAULTS | known.settings if known is not None else {}
        if known is not None and any(have.get(field) != value for field, value in settings.items()):
            words = ", ".join(f"{field} = {value}" for field, value in have.items())
            raise ConfigError(f"the model is quantized already with {words}; load it anew to change that")

    def _prepared(
        self, base: Any, checkpointing: bool, options: dict[str, Any] | None, upcast: Any
    ) -> Preparation | None:
        """Prepares a model that carries no adapter yet; for others only switches checkpointing."""
        from nbpeft.engine.model_tree import manager_of
        from nbpeft.memory.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing
        from nbpeft.training.prepare import prepare_model

        if manager_of(base) is None and base not in self._origins:
            return prepare_model(base, checkpointing, options, upcast=upcast)
        now = is_checkpointing(base)
        if checkpointing and not now:
            enable_checkpointing(base, options)
        elif now and not checkpointing:
            disable_checkpointing(base)
        return None


@dataclass(frozen=True)
class _Origin:
    """Where a model came from and how it was quantized."""

    source: str | None
    settings: dict[str, Any]
    loading: dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """A quantized base model.

    Attributes:
        base: the model.
        origin: where it came from.
        now: whether it was quantized by this command.
        before: its parts before, where it was in memory.
    """

    base: Any
    origin: _Origin
    now: bool
    before: tuple[StoredPart, ...] | None = None


@contextmanager
def as_it_was_on_failure(base: nn.Module) -> Iterator[None]:
    """Takes back what preparing does to a model (dtypes, flags, hooks, checkpointing) where the block fails.

    What is kept for it are references: a tensor that is cast stays alive until the block ends.
    """
    from nbpeft.memory.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing

    checkpoints = is_checkpointing(base)
    parameters = [(parameter, parameter.requires_grad, parameter.data) for parameter in base.parameters()]
    hooks = [
        (registered, dict(registered))
        for module in base.modules()
        for registered in (module._forward_pre_hooks, module._forward_hooks)
    ]
    try:
        yield
    except BaseException:
        with HeldInterrupts(to_the_end=True):
            if checkpoints != is_checkpointing(base):
                (enable_checkpointing if checkpoints else disable_checkpointing)(base)
            for registered, were in hooks:
                for key in registered.keys() - were.keys():
                    del registered[key]
            for parameter, trained, data in parameters:
                if parameter.dtype != data.dtype:
                    parameter.data = data
                parameter.requires_grad_(trained)
        raise


def _refuse_loading(loading: Mapping[str, Any]) -> None:
    if loading:
        raise ConfigError(f"{next(iter(loading))!r} is for loading, and this model is loaded already")
