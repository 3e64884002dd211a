"""What ``qlora`` would load, quantize and adapt, told before anything is touched."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import CheckpointNotFoundError, ConfigError, in_one_line
from nbpeft.names import DTYPES
from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.planning import foreseen
from nbpeft.session.preview import Preview, preview_of
from nbpeft.session.quantized import PartSize, part_table, stored_words
from nbpeft.session.results import Result

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.memory.architecture import Architecture
    from nbpeft.model.weight_storage import StoredPart
    from nbpeft.training.prepare import Upcast

DEFAULTS: dict[str, Any] = {"bits": 4, "quant_type": "nf4", "double_quant": True}
"""What is not given, for quantizing."""

QUANTIZATION_FIELDS = ("bits", "quant_type", "double_quant", "compute_dtype", "quant_storage")
LOADING_FIELDS = (
    "gguf_file",
    "device_map",
    "model_class",
    "dtype",
    "revision",
    "subfolder",
    "cache_dir",
    "token",
    "local_files_only",
    "trust_remote_code",
    "attn_implementation",
    "max_memory",
)
PREPARING_FIELDS = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "upcast")

_OF_CONFIG = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")
"""Fields of loading that also say where a config is."""


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


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked and sorted.

    Attributes:
        config: of the adapter.
        settings: of quantizing, as they were given.
        loading: what ``from_pretrained`` gets.
        upcast: what becomes float32.
        checkpointing: whether training recomputes activations.
    """

    config: AdapterConfig
    settings: dict[str, Any]
    loading: dict[str, Any]
    upcast: Upcast
    checkpointing: bool

    @property
    def kind(self) -> str:
        """How layers will be stored: ``nf4``, ``fp4`` or ``int8``."""
        chosen = DEFAULTS | self.settings
        return "int8" if chosen["bits"] == 8 else str(chosen["quant_type"])

    @property
    def double(self) -> bool:
        """Whether the constants of 4-bit blocks will be quantized, too."""
        return self.kind != "int8" and bool((DEFAULTS | self.settings)["double_quant"])


def asked_for(config: AdapterConfig, how: Mapping[str, Any]) -> Asked:
    """Sorts the keywords of ``qlora``.

    Raises:
        ConfigError: a value is impossible.
    """
    from nbpeft.model.quantize import quantization
    from nbpeft.training.prepare import check_upcast

    settings, loading = sorted_out(how)
    upcast = how.get("upcast", "norms")
    quantization(**settings)
    check_upcast(upcast)
    return Asked(config, settings, loading, upcast, bool(how.get("gradient_checkpointing", True)))


def sorted_out(how: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those keywords of ``qlora`` that say how to quantize, and those that go to ``from_pretrained``."""
    settings = {field: how[field] for field in QUANTIZATION_FIELDS if how.get(field) is not None}
    own = (*QUANTIZATION_FIELDS, *PREPARING_FIELDS)
    return settings, {field: value for field, value in how.items() if field not in own}


@dataclass(frozen=True)
class Skeleton:
    """A model of a folder, hub id or GGUF file on the meta device.

    Attributes:
        model: modules and shapes, no weights.
        architecture: what it was built from.
        dtype: of its weights, as they would be loaded.
        note: what its config says that a person should know; mostly empty.
    """

    model: nn.Module
    architecture: Architecture
    dtype: torch.dtype
    note: str


def skeleton_of(source: str, asked: Asked) -> Skeleton:
    """Reads a config and builds its model without weights, in the dtype that it would be loaded in.

    Raises:
        CheckpointNotFoundError: there is no config at ``source``.
        ConfigError: its class or a dtype is not known.
    """
    import torch

    from nbpeft.memory.threads import quiet

    config = _config(source, asked.loading)
    stored = getattr(config, "quantization_config", None)
    how = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    method = str(getattr(how, "value", how or ""))
    architecture = _architecture(config, asked.loading.get("model_class"))
    dtype = _dtype(asked, config)
    with torch.device("meta"), quiet():
        model = architecture.build(dtype)
    known = method in ("", "gguf")
    return Skeleton(model, architecture, dtype, "" if known else f"its weights are stored by {method} and stay so")


def foreseen_qlora(
    base: Any,
    bare: Skeleton | None,
    asked: Asked,
    *,
    source: str,
    name: str,
    model_name: str,
    replaces: bool,
    fresh: bool,
    sizes: Mapping[str, Any],
    notes: list[str],
) -> QloraPreview:
    """Counts what would be quantized, prepared and adapted, and forecasts; the model is not changed.

    Args:
        base: the model, or its skeleton.
        bare: the skeleton, or None for a model in memory.
        asked: what was asked for.
        source: where the model would come from, in words.
        name: of the adapter to come.
        model_name: what the model is called.
        replaces: whether an adapter of that name is there.
        fresh: whether the model is to be prepared for training.
        sizes: of the forecast.
        notes: put into the preview.
    """
    from nbpeft.model.quantize import check_quantizable, layers_to_quantize
    from nbpeft.model.weight_storage import estimated_parts, stored_parts
    from nbpeft.training.prepare import Preparation, becoming_float32

    before = stored_parts(base) if bare is None else None
    done = before is not None and any(part.name == "quantized layers" for part in before)
    paths: list[str] = []
    if not done:
        check_quantizable(base)
        paths = list(layers_to_quantize(base))
    chosen = {id(base.get_submodule(path).weight) for path in paths}
    raised = [one for one in becoming_float32(base, asked.upcast) if id(one) not in chosen] if fresh else []
    extra = sum(parameter.numel() * (4 - parameter.element_size()) for parameter in raised)
    parts = estimated_parts(base, paths, kind=asked.kind, double=asked.double, raised=raised)
    settings: dict[str, Any] = {"gradient_checkpointing": asked.checkpointing, **sizes}
    if not done:
        settings |= {"quantization": asked.kind, "double_quant": asked.double}
    if bare is not None:
        settings["dtype"] = bare.dtype
        notes += [bare.note] if bare.note else []
    stored = dict.fromkeys(paths, "bnb8bit" if asked.kind == "int8" else "bnb4bit")
    adapter = preview_of(
        base, asked.config, name=name, model_name=model_name, replaces=replaces, notes=notes, stored=stored
    )
    planned = foreseen(base if bare is None else bare.architecture, asked.config, model_name, settings)
    return QloraPreview(
        source=source,
        action="" if done else "quantize" if bare is None else "load and quantize",
        parts=part_sizes(parts, None if done else before),
        prepared=str(Preparation(0, len(raised), extra, asked.checkpointing, False)) if fresh else "",
        adapter=dataclasses.replace(adapter, memory=planned),
    )


def _config(source: str, loading: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    from nbpeft.model.quantize import place_of

    place, file = place_of(source, loading.get("gguf_file"))
    options: dict[str, Any] = {name: loading[name] for name in _OF_CONFIG if name in loading}
    failure = ""
    try:
        return AutoConfig.from_pretrained(place, **options, **({"gguf_file": file} if file else {}))
    except (OSError, ValueError, ImportError) as error:
        failure = in_one_line(error)[:300]
    raise CheckpointNotFoundError(f"no model could be loaded from {place!r}: {failure}", source=place)


def _architecture(config: Any, model_class: Any) -> Architecture:
    import transformers

    from nbpeft.memory.architecture import Architecture

    automatic = "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"
    chosen = model_class or automatic
    name = chosen if isinstance(chosen, str) else chosen.__name__
    found = getattr(transformers, name, None) if isinstance(chosen, str) else chosen
    if found is None:
        raise ConfigError(f"transformers has no class {chosen!r}", field="model_class")
    return Architecture(config, None if name.startswith("Auto") else found, name)


def _dtype(asked: Asked, config: Any) -> Any:
    """What ``load_quantized`` would load weights in."""
    from nbpeft.model.quantize import dtype_of, usual_dtype

    chosen, computes = asked.loading.get("dtype"), asked.settings.get("compute_dtype")
    if chosen == "auto":
        return getattr(config, "dtype", None) or usual_dtype()
    if chosen is not None:
        return dtype_of(chosen, "dtype", DTYPES)
    return usual_dtype() if computes is None else dtype_of(computes, "compute_dtype", DTYPES)


def part_sizes(now: tuple[StoredPart, ...], before: tuple[StoredPart, ...] | None) -> tuple[PartSize, ...]:
    """The parts now, beside what the same weights took before (None: they were never loaded otherwise)."""
    old = {part.name: part.byte_count for part in before or ()}
    if before is not None and "quantized layers" not in old:
        # What is quantized now was among the other layers; the rest of those stayed.
        stayed = sum(part.byte_count for part in now if part.name == "other layers")
        old["quantized layers"] = old.get("other layers", 0) - stayed
        old["other layers"] = stayed
    return tuple(
        PartSize(part.name, part.module_count, part.byte_count, old.get(part.name), part.bfloat16_bytes, part.kinds)
        for part in now
    )


def source_words(source: Any, loading: Mapping[str, Any]) -> str:
    """A source for a person: a hub id as it is, of a path outside the working folder only its last part."""
    file = loading.get("gguf_file")
    if file:
        return str(file)
    text = str(os.fspath(source))
    path = os.path.expanduser(text)
    if not os.path.isabs(path):
        return text
    inside = os.path.relpath(path)
    return os.path.basename(os.path.normpath(path)) if inside.startswith(os.pardir) else inside
