"""The properties of an adapter and its base model that decide whether a serving engine can load it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nbpeft.checkpoint import PromptFormat, prompt_format
from nbpeft.engine.contract.adapter import IsLowRank, LowRankDelta, PeftType
from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.contract.registry import method_of, methods
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import embedding_of, frozen_module, is_quantized
from nbpeft.engine.wrappers.factored_weight import AdaptsParameters
from nbpeft.model.combine.conversion import can_convert
from nbpeft.model.saving import files


@dataclass(frozen=True)
class AdapterFacts:
    """Properties of an adapter that matter to a serving engine.

    Attributes:
        name: name of the adapter.
        method: display name of its method: ``LoRA``, ``rsLoRA``, ``DoRA``.
        is_lora: whether its ``peft_type`` is LORA.
        own_method: whether the method is defined by another package than nbpeft.
        model_class: class name of the base model.
        library: top-level package of that class: ``transformers``, ``diffusers``.
        kinds: path -> kind of layer, for every adapted layer.
        deltas: path -> kind of layer and low-rank update, for layers whose update is a product of two matrices.
        others: method of the other adapted layers -> their number, e.g. ``{"DoRA": 12}``.
        convertible: whether all of the latter can be converted to LoRA.
        prompt_tokens: number of trained virtual tokens of a prompt-learning method; else 0.
        transforms_calls: whether it acts on calls of the whole model instead of layers.
        unmergeable: why a layer of it cannot be merged into the base model, as part of a sentence; empty if all can.
        copies: paths of modules that were trained as a whole (``modules_to_save``).
        biases: names of the base model's biases that were trained.
        starts_in_weight: whether it was initialized from the base weights (OLoRA, PiSSA).
        scale: factor on the whole adapter, set after it was loaded.
        tied_ends: paths of adapted embeddings and heads that share one weight.
        vocabulary_resized: whether the vocabulary of the base model differs from that of its source folder.
        quantized: whether base weights are quantized.
        base_name: hub id of the base model; empty if it has none.
        base_is_local: whether it is from a local folder.
        byte_count: size of the adapter's tensors in bytes.
        kept_byte_count: size in bytes of those that are not adapter parameters: trained copies and biases.
        form: the format of the rows that it was trained on; None if it is unknown.
    """

    name: str
    method: str
    is_lora: bool
    own_method: bool
    model_class: str
    library: str
    kinds: Mapping[str, str]
    deltas: Mapping[str, tuple[LayerKind, LowRankDelta]] = field(repr=False, hash=False)
    others: Mapping[str, int]
    convertible: bool
    prompt_tokens: int
    transforms_calls: bool
    unmergeable: str
    copies: tuple[str, ...]
    biases: tuple[str, ...]
    starts_in_weight: bool
    scale: float
    tied_ends: tuple[str, ...]
    vocabulary_resized: bool
    quantized: bool
    base_name: str
    base_is_local: bool
    byte_count: int
    kept_byte_count: int
    form: PromptFormat | None

    @property
    def is_plain(self) -> bool:
        """Whether it was trained on text without the chat template."""
        return self.form is not None and not self.form.chat and not self.form.classes

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in ascending order."""
        return tuple(sorted({delta.rank for _, delta in self.deltas.values()}))

    @property
    def scalings(self) -> tuple[float, ...]:
        """The distinct scaling factors in ascending order."""
        return tuple(sorted({delta.scaling for _, delta in self.deltas.values()}))

    @property
    def output_biases(self) -> tuple[str, ...]:
        """Paths of layers whose update includes a trained bias."""
        return tuple(path for path, (_, delta) in self.deltas.items() if delta.bias is not None)

    def paths_of(self, *kinds: str) -> tuple[str, ...]:
        """Returns the paths of layers whose kind starts with one of the given strings."""
        return tuple(path for path, kind in self.kinds.items() if kind.startswith(kinds))


def facts_of(manager: AdapterManager, name: str) -> AdapterFacts:
    """Collects the properties of an adapter on a model.

    Args:
        manager: the model's adapters.
        name: name of the adapter.

    Raises:
        UnknownAdapterError: there is no adapter of that name.
        MergeError: adapters are merged into the base weights.
    """
    manager.require(name)
    manager.refuse_merged("shipping an adapter")
    config, model, scale = manager.configs[name], manager.model, manager.scale(name)
    title = method_of(config).title(config)
    layers, transforms_calls = manager.layers_with(name), method_of(config).transforms_calls
    reasons = (layer.adapter(name).unmergeable_reason(layer.base) for layer in layers.values())
    unmergeable = next(filter(None, reasons), "")
    layers = {} if transforms_calls else layers  # it is stored at the embedding but does not change it
    deltas: dict[str, tuple[LayerKind, LowRankDelta]] = {}
    others: dict[str, int] = {}
    rows = False
    for path, layer in layers.items():
        adapter = layer.adapter(name)
        if isinstance(adapter, IsLowRank):
            deltas[path] = layer.kind, _scaled(adapter.low_rank_delta(layer.base), scale)
        else:
            method = next((method for method in methods() if isinstance(adapter, method.adapter_class)), None)
            label = method.label if method else title
            label = "target_parameters" if isinstance(adapter, AdaptsParameters) else label
            rows = rows or bool(method and method.shares.companion)
            others[label] = others.get(label, 0) + 1
    kinds = {path: layer.kind.name for path, layer in layers.items()}
    weights = manager.weights(name)
    kept = _bytes([*weights.copies.values(), weights.base])
    return AdapterFacts(
        name=name,
        method=title,
        is_lora=config.peft_type == PeftType.LORA,
        own_method=not type(config).__module__.startswith("nbpeft."),
        model_class=type(model).__name__,
        library=type(model).__module__.partition(".")[0],
        kinds=kinds,
        deltas=deltas,
        others=others,
        convertible=bool(others) and not rows and can_convert(manager, name),
        prompt_tokens=int(getattr(config, "total_tokens", 0)) if config.learns_prompt else 0,
        transforms_calls=transforms_calls,
        unmergeable=unmergeable,
        copies=tuple(weights.copies),
        biases=tuple(manager.base_biases(name)),
        starts_in_weight=config.initialised_from_weight,
        scale=scale,
        tied_ends=_tied_ends(manager, kinds),
        vocabulary_resized=files.vocabulary_resized(model),
        quantized=is_quantized(model),
        base_name=base_name_of(model),
        base_is_local=bool(_source_of(model)) and not base_name_of(model),
        byte_count=_bytes(weights.adapters.values()) + kept,
        kept_byte_count=kept,
        form=prompt_format(config),
    )


def _source_of(model: Any) -> str:
    """Returns the hub id or folder that a model was loaded from; empty for a model that was made in memory."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def base_name_of(model: Any) -> str:
    """Returns the base model's hub id; empty for a local folder, whose path must not be published."""
    name = _source_of(model)
    return "" if not name or os.path.exists(name) or name.count("/") > 1 or name.startswith((".", "~", "/")) else name


def _bytes(groups: Iterable[Mapping[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())


def _scaled(delta: LowRankDelta, scale: float) -> LowRankDelta:
    bias = delta.bias if delta.bias is None else delta.bias * scale
    return LowRankDelta(delta.down, delta.up, delta.scaling * scale, bias)


def _tied_ends(manager: AdapterManager, changed: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the paths of adapted embeddings and heads if the two share one weight; else nothing."""
    if not getattr(getattr(manager.model, "config", None), "tie_word_embeddings", False):
        return ()
    found = [embedding_of(manager.model, output=output) for output in (False, True)]
    ends = {id(frozen_module(end)) for end in found if end is not None}
    return tuple(path for path in changed if id(manager.layers[path].base_layer) in ends)
