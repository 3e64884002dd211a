"""QLoRA in one command: load or quantize a model, prepare it for training, add an adapter; and its dry run."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft._util.hub_access import config_errors, hub_options
from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft._util.paths import from_here
from nbpeft.errors import CheckpointNotFoundError, ConfigError, in_one_line
from nbpeft.names import DTYPES
from nbpeft.session.checks import adapter_name, place_of
from nbpeft.session.commands.adapters import add, completed
from nbpeft.session.commands.planning import plan_or_reason
from nbpeft.session.configs import build_config
from nbpeft.session.handles import is_module, uncompiled
from nbpeft.session.preview import preview_of
from nbpeft.session.results.quantizing import QloraPreview, QloraResult
from nbpeft.state import StoredPart

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.memory.architecture import Architecture
    from nbpeft.session.context import ConfigLike, SessionContext
    from nbpeft.training.loop.prepare import Preparation, Upcast

DEFAULTS: dict[str, Any] = {"bits": 4, "quant_type": "nf4", "double_quant": True}
"""Default quantization."""
QUANTIZATION_FIELDS = ("bits", "quant_type", "double_quant", "compute_dtype", "quant_storage")
LOADING_FIELDS = (
    *("gguf_file", "device_map", "model_class", "dtype", "revision", "subfolder", "cache_dir", "token"),
    *("local_files_only", "trust_remote_code", "attn_implementation", "max_memory"),
)
PREPARING_FIELDS = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "upcast")
_OF_CONFIG = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")
"""Arguments of loading that are also needed to find a config."""


def qlora(
    ctx: SessionContext,
    /,
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
    """Load a model quantized, or quantize a loaded one, prepare it, and add an adapter.

    A repeated call with the same source and quantization only reconfigures the adapter.

    Args:
        source: a folder, a hub id, a ``.gguf`` file, or a loaded model, which is quantized in place.
        config: a config, or its fields.
        name: name of the adapter.
        variable: name for the model.
        allow_missing: ignore targets that match nothing, as long as others match.
        bits: 4 (the default) or 8.
        quant_type: ``"nf4"`` (the default) or ``"fp4"``.
        double_quant: whether the constants of 4-bit blocks are quantized too, which is the default.
        compute_dtype: dtype in which 4-bit layers compute; by default that of the model's other weights.
        quant_storage: dtype of the tensors that store 4-bit codes.
        gradient_checkpointing: whether training recomputes activations.
        gradient_checkpointing_kwargs: e.g. ``{"use_reentrant": True}``.
        upcast: what to cast to float32: ``"norms"``, ``"peft"`` or ``"none"``.
        **loading: ``gguf_file``, ``device_map``, ``model_class`` and further arguments of ``from_pretrained``.

    Raises:
        ConfigError: a field is unknown or invalid, or the model is already quantized in another way.
        TargetError: the targets do not match the model.
        CheckpointNotFoundError: there is no model at ``source``.
    """
    from nbpeft.model.from_data.start_from_rows import init_from_data
    from nbpeft.model.quantization.quantize import load_quantized
    from nbpeft.model.quantization.weight_storage import stored_parts

    given = {"bits": bits, "quant_type": quant_type, "double_quant": double_quant, "compute_dtype": compute_dtype}
    given |= {"quant_storage": quant_storage, "upcast": upcast, "gradient_checkpointing": gradient_checkpointing}
    request = _request(config, given | loading)  # invalid arguments are refused before loading
    if (init := init_from_data(request.config)) and not is_module(source):
        raise ConfigError(
            f"init_lora_weights={init!r} needs rows and a loaded model: load the model quantized first, then add the "
            "adapter to it (init_data=…)",
            field="init_lora_weights",
        )
    adapter_name(name)
    with ctx.command(f"quantizing for {name!r}", slow=True):
        started = time.monotonic()
        origin, base = _resolve(ctx, source, variable, request)
        before, quantized = None, base is None
        if origin.source is not None and base is None:
            base = load_quantized(origin.source, **request.settings, **request.loading)
        elif origin.source is None:
            before = stored_parts(base)
            quantized = _quantize(base, _is_quantized(before), request, name, allow_missing)
        seconds = time.monotonic() - started
        with _restored_on_failure(base):
            prepared = _prepare(ctx, base, gradient_checkpointing, gradient_checkpointing_kwargs, upcast)
            added = add(ctx, base, request.config, name=name, variable=variable, allow_missing=allow_missing)
        ctx.qlora_origins.setdefault(base, origin)
        return QloraResult(
            reference=added.reference,
            added=added,
            source=_title(origin, base),
            quantized=quantized,
            parts=_part_sizes(stored_parts(base), before if quantized else None),
            prepared=str(prepared) if prepared is not None else "",
            prepare_bytes=prepared.extra_bytes if prepared is not None else 0,
            seconds=seconds,
            compute_dtype=_compute_dtype(base),
        )


def _quantize(base: nn.Module, is_quantized: bool, request: _Request, name: str, allow_missing: bool) -> bool:
    """Quantize a loaded model, or the experts of a quantized one; return whether something was quantized."""
    from nbpeft.engine.injection.plan import plan
    from nbpeft.engine.tree.model_tree import manager_of
    from nbpeft.model.quantization.quantize import quantize_model
    from nbpeft.model.quantization.quantized_experts import quantize_experts, remaining_experts

    experts = is_quantized and bool(remaining_experts(base))
    manager = manager_of(base)
    replacing = name if manager is not None and name in manager.configs else None
    # Targets that do not match are refused before a weight is rounded.
    plan(base, request.config, allow_missing=allow_missing, replacing=replacing)
    if experts:
        quantize_experts(base)
    elif not is_quantized:
        quantize_model(base, **request.settings)
    return experts or not is_quantized


def preview_qlora(
    ctx: SessionContext,
    /,
    source: nn.Module | str | os.PathLike[str],
    config: ConfigLike,
    *,
    name: str = "default",
    variable: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    device: Any = None,
    **how: Any,
) -> QloraPreview:
    """Report what ``qlora`` would load, quantize and adapt, and what training would need; nothing is changed.

    Only the config of a folder, a hub id or a GGUF file is read.

    Args:
        source: as for ``qlora``.
        config: config of the new adapter, or its fields.
        name: name of the new adapter.
        variable: name for the model.
        batch_size: setting of the memory forecast, like the next two; see ``plan``.
        max_length: number of tokens per row.
        device: the device that it should fit.
        **how: quantization, preparation and loading, as for ``qlora``.

    Raises:
        ConfigError: a field is unknown or invalid, or the model cannot be quantized.
        TargetError: the targets do not match the model.
        CheckpointNotFoundError: there is no model at ``source``.
    """
    request = _request(build_config(config), how)
    sizes = {"batch_size": batch_size, "max_length": max_length, "device": device}
    with ctx.command("planning") as notes:
        origin, base = _resolve(ctx, source, variable, request)
        skeleton = _skeleton(origin.source, request) if origin.source is not None and base is None else None
        tracked = ctx.find(base) if skeleton is None else None
        title = variable or (tracked.name if tracked is not None else "model")
        base = base if skeleton is None else skeleton.model
        replaces = tracked is not None and name in tracked.manager.configs
        come = _parts_to_come(ctx, base, skeleton, request)
        settings: dict[str, Any] = {"gradient_checkpointing": request.checkpointing}
        settings |= {size: value for size, value in sizes.items() if value is not None}
        if come.layers is not None:
            settings |= {"quantization": come.kind, "double_quant": come.double}
        if skeleton is not None:
            settings["dtype"] = skeleton.dtype
            notes += [skeleton.note] if skeleton.note else []
        config = completed(request.config, tracked, base)
        adapter = preview_of(
            base, config, name=name, model_name=title, replaces=replaces, notes=notes, stored=come.backends()
        )
        planned = plan_or_reason(base if skeleton is None else skeleton.architecture, config, title, settings)
        return QloraPreview(
            source=_title(origin, base),
            action="" if come.layers is None else "quantize" if skeleton is None else "load and quantize",
            parts=come.parts,
            prepared=str(come.prepared) if come.prepared is not None else "",
            adapter=dataclasses.replace(adapter, memory=planned),
        )


def would_reuse(ctx: SessionContext, model: Any, variable: str, source: str, how: Mapping[str, Any]) -> bool:
    """Return whether ``qlora`` would reuse the model in a variable, because it created it from the same source.

    Args:
        model: value of the variable.
        variable: name of the variable.
        source: a folder, a hub id or a ``.gguf`` file.
        how: quantization, preparation and loading, as for ``qlora``.
    """
    tracked = ctx.models.find(uncompiled(model))
    present = _present(ctx, _Origin(source, *_sorted(how)), variable)
    return present is not None and tracked is not None and tracked.manager.model is present


@dataclass(frozen=True)
class _Request:
    """The arguments of ``qlora``, checked, and sorted by what they are for."""

    config: AdapterConfig
    settings: dict[str, Any]
    loading: dict[str, Any]
    upcast: Upcast
    checkpointing: bool

    @property
    def kind(self) -> str:
        """The storage format of layers: ``nf4``, ``fp4`` or ``int8``."""
        from nbpeft.memory.fake_quantized import quantization_of

        chosen = DEFAULTS | self.settings
        return quantization_of(chosen["bits"], chosen["quant_type"])

    @property
    def double(self) -> bool:
        """Whether the constants of 4-bit blocks will be quantized too."""
        return self.kind != "int8" and bool((DEFAULTS | self.settings)["double_quant"])


def _request(config: ConfigLike, how: Mapping[str, Any]) -> _Request:
    """Check and sort the arguments of ``qlora``."""
    from nbpeft.model.quantization.quantize import quantization
    from nbpeft.training.loop.prepare import check_upcast

    made = build_config(config)
    settings, loading = _sorted(how)
    upcast = how.get("upcast", "norms")
    quantization(**settings)
    check_upcast(upcast)
    return _Request(made, settings, loading, upcast, bool(how.get("gradient_checkpointing", True)))


def _sorted(how: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those of quantizing and those of ``from_pretrained``."""
    settings = {field: how[field] for field in QUANTIZATION_FIELDS if how.get(field) is not None}
    own = (*QUANTIZATION_FIELDS, *PREPARING_FIELDS)
    return settings, {field: value for field, value in how.items() if field not in own}


@dataclass(frozen=True)
class _Origin:
    """Where a model was loaded from (None for a model in memory) and how it was quantized."""

    source: str | None
    settings: dict[str, Any]
    loading: dict[str, Any]


def _resolve(ctx: SessionContext, source: Any, variable: str | None, request: _Request) -> tuple[_Origin, Any]:
    """Return where the model of a source comes from, and its base model, or None if it has to be loaded."""
    if isinstance(source, str | os.PathLike):
        place = place_of(source, "qlora")
        origin = _Origin(place, request.settings, request.loading)
        return origin, _present(ctx, origin, variable or "model")
    if request.loading:
        raise ConfigError(f"{next(iter(request.loading))!r} is an option of loading, and this model is loaded already")
    tracked = ctx.find(source)
    base = tracked.manager.model if tracked is not None else uncompiled(source)
    known = ctx.qlora_origins.get(base)
    have = DEFAULTS | known.settings if known is not None else {}
    if known is not None and any(have.get(field) != value for field, value in request.settings.items()):
        present = ", ".join(f"{field} = {value}" for field, value in have.items())
        raise ConfigError(f"the model is quantized already with {present}; load it again to change that")
    return _Origin(None, request.settings, {}), base


def _present(ctx: SessionContext, origin: _Origin, variable: str) -> Any:
    """Return the base model in a variable, if it was loaded from the same source and quantized in the same way."""
    tracked = next((tracked for tracked in ctx.models.all() if tracked.name == variable), None)
    same = tracked is not None and ctx.qlora_origins.get(tracked.manager.model) == origin
    return tracked.manager.model if tracked is not None and same else None


def _is_quantized(parts: tuple[StoredPart, ...]) -> bool:
    return any(part.name == "quantized layers" for part in parts)


def _compute_dtype(base: nn.Module) -> str:
    """Return the compute dtype of a model's 4-bit layers; empty if it has none."""
    from nbpeft.engine.contract.registry import resolve_backend

    for module in base.modules():
        dtype = getattr(module, "compute_dtype", None)
        if dtype is not None and getattr(resolve_backend(module), "name", "") == "bnb4bit":
            return str(dtype).removeprefix("torch.")
    return ""


def _is_unprepared(ctx: SessionContext, base: nn.Module) -> bool:
    """Return whether a model still has to be prepared for training, because it never had adapters."""
    from nbpeft.engine.tree.model_tree import manager_of

    return manager_of(base) is None and base not in ctx.qlora_origins


def _prepare(
    ctx: SessionContext, base: nn.Module, checkpointing: bool, options: dict[str, Any] | None, upcast: Any
) -> Preparation | None:
    """Prepare a model that has no adapter yet; for others only switch gradient checkpointing."""
    from nbpeft.memory.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing
    from nbpeft.training.loop.prepare import prepare_model

    if _is_unprepared(ctx, base):
        return prepare_model(base, checkpointing, options, upcast=upcast)
    now = is_checkpointing(base)
    if checkpointing and not now:
        enable_checkpointing(base, options)
    elif now and not checkpointing:
        disable_checkpointing(base)
    return None


@contextmanager
def _restored_on_failure(base: nn.Module) -> Iterator[None]:
    """Restore a model's dtypes, flags, hooks and gradient checkpointing if the block fails.

    This uses references: a tensor that is cast stays in memory until the block ends.
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
        with DeferredInterrupts(to_the_end=True):
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


@dataclass(frozen=True)
class _Skeleton:
    """A model of a folder, hub id or GGUF file on the meta device; ``dtype`` is that in which it would be loaded."""

    model: nn.Module
    architecture: Architecture
    dtype: torch.dtype
    note: str


def _skeleton(source: str, request: _Request) -> _Skeleton:
    """Read a config and build its model without weights, in the dtype in which it would be loaded."""
    import torch

    from nbpeft.memory.architecture import silenced

    config = _config(source, request.loading)
    stored = getattr(config, "quantization_config", None)
    how = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    method = str(getattr(how, "value", how or ""))
    architecture = _architecture(config, request.loading.get("model_class"))
    dtype = _dtype(request, config)
    with torch.device("meta"), silenced():
        model = architecture.build(dtype)
    known = method in ("", "gguf")
    return _Skeleton(model, architecture, dtype, "" if known else f"its weights stay quantized with {method}")


@dataclass(frozen=True)
class _ToCome:
    """What quantizing and preparing would change.

    ``prepared`` is None if the model is prepared already, ``layers`` if all are quantized already.
    """

    parts: tuple[StoredPart, ...]
    prepared: Preparation | None
    layers: Mapping[str, nn.Module] | None
    kind: str
    double: bool

    def backends(self) -> dict[str, str]:
        """Returns path -> name of the backend that will store the layer."""
        from nbpeft.engine.layer_kinds.parameter import ParameterView

        linear = "bnb8bit" if self.kind == "int8" else "bnb4bit"
        layers = (self.layers or {}).items()
        return {path: "quantized_experts" if isinstance(layer, ParameterView) else linear for path, layer in layers}


def _parts_to_come(ctx: SessionContext, base: Any, skeleton: _Skeleton | None, request: _Request) -> _ToCome:
    """Return what would be quantized and prepared; the model is not changed."""
    from nbpeft.memory.forecast import stored_as
    from nbpeft.model.quantization.quantize import check_quantizable, layers_to_quantize
    from nbpeft.model.quantization.quantized_experts import remaining_experts
    from nbpeft.model.quantization.weight_storage import estimated_parts, stored_parts
    from nbpeft.training.loop.prepare import Preparation, becoming_float32

    before = stored_parts(base) if skeleton is None else None
    done = before is not None and _is_quantized(before)
    kind, double = request.kind, request.double
    layers: Mapping[str, nn.Module]
    if done:
        layers, present = remaining_experts(base), stored_as(base, None)
        kind, double = present.quantization or kind, present.double_quant and present.quantization != "int8"
    else:
        check_quantizable(base)
        layers = layers_to_quantize(base)
    unprepared = skeleton is not None or _is_unprepared(ctx, base)
    chosen = {id(layer.weight) for layer in layers.values()}
    raised = (
        [tensor for tensor in becoming_float32(base, request.upcast) if id(tensor) not in chosen] if unprepared else []
    )
    extra = sum(parameter.numel() * (4 - parameter.element_size()) for parameter in raised)
    parts = estimated_parts(base, layers.values(), kind=kind, double=double, raised=raised)
    preparation = Preparation(0, len(raised), extra, request.checkpointing, False) if unprepared else None
    sizes = _part_sizes(parts, before if layers else None)
    return _ToCome(sizes, preparation, layers or None, kind, double)


def _config(source: str, loading: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    from nbpeft.model.quantization.quantize import place_of

    place, file = place_of(source, loading.get("gguf_file"))
    options: dict[str, Any] = {name: loading[name] for name in _OF_CONFIG if name in loading}
    options |= hub_options(place, options)
    failure = ""
    try:
        return AutoConfig.from_pretrained(place, **options, **({"gguf_file": file} if file else {}))
    except config_errors() as error:
        failure = in_one_line(error)[:300]
    raise CheckpointNotFoundError(f"no model could be loaded from {place!r}: {failure}", source=place)


def _architecture(config: Any, model_class: Any) -> Architecture:
    from nbpeft.memory.architecture import Architecture
    from nbpeft.model.quantization.quantize import class_of

    automatic = "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"
    chosen = model_class or automatic
    name = chosen if isinstance(chosen, str) else chosen.__name__
    found = class_of(chosen)
    return Architecture(config, None if name.startswith("Auto") else found, name)


def _dtype(request: _Request, config: Any) -> Any:
    """Return the dtype in which ``load_quantized`` would load weights."""
    from nbpeft.model.quantization.quantize import dtype_of, usual_dtype

    chosen, computes = request.loading.get("dtype"), request.settings.get("compute_dtype")
    if chosen == "auto":
        return getattr(config, "dtype", None) or usual_dtype()
    if chosen is not None:
        return dtype_of(chosen, "dtype", DTYPES)
    return usual_dtype() if computes is None else dtype_of(computes, "compute_dtype", DTYPES)


def _part_sizes(now: tuple[StoredPart, ...], before: tuple[StoredPart, ...] | None) -> tuple[StoredPart, ...]:
    """Return the parts with their previous sizes; None as ``before`` if they were never loaded in another form."""
    old = {part.name: part.byte_count for part in before or ()}
    if before is not None and "quantized layers" not in old:
        # Layers that are quantized now were counted as other layers before.
        stayed = sum(part.byte_count for part in now if part.name == "other layers")
        old["quantized layers"] = old.get("other layers", 0) - stayed
        old["other layers"] = stayed
    return tuple(dataclasses.replace(part, before=old.get(part.name)) for part in now)


def _title(origin: _Origin, base: Any) -> str:
    """Return the source for display: a hub id unchanged, a path outside the working folder as its last component."""
    if origin.source is None:
        return type(base).__name__
    if origin.loading.get("gguf_file"):
        return str(origin.loading["gguf_file"])
    path = Path(origin.source).expanduser()
    if not path.is_absolute():
        return origin.source
    inside = from_here(path)
    return inside.name if inside.is_absolute() else str(inside)
