"""Estimates the memory of a step: weights and adapters are counted, the rest comes from a run on fake tensors."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nbpeft._util.interrupts import in_main_thread
from nbpeft.engine.calls.selective_recompute import selective_recompute
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.kernels.grouped_heads import grouped_heads
from nbpeft.engine.kernels.storage import short_name
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import prepared
from nbpeft.engine.tree.model_tree import experts_to_quantize, linear_layers_to_quantize, manager_of
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter
from nbpeft.errors import ConfigError, TargetError
from nbpeft.losses import chunked_head, without_logits
from nbpeft.memory.allocations import fake_tensors, record
from nbpeft.memory.architecture import Architecture, can_checkpoint, equal_layers, silenced
from nbpeft.memory.checkpointing import enable_checkpointing
from nbpeft.memory.fake_quantized import code_bytes, quantized_bytes, replace_by_fakes
from nbpeft.memory.formatting import size_text
from nbpeft.memory.optimizers import kind_of, state_bytes
from nbpeft.memory.per_process import for_one_process
from nbpeft.memory.saved import tensors_in
from nbpeft.memory.stages import Peak
from nbpeft.names import LOSS_CHUNK_SIZE, START
from nbpeft.state import MemoryPart
from nbpeft.sweeps import members_together

SAMPLED_LAYERS = 3
"""Number of layers that are run; the needs of more layers are extrapolated, because each adds the same."""

_SCANNED = (8, 16)
"""Sequence lengths that are run for a model without attention, which may process positions one by one (slow)."""
_CACHE_SIZE = 512


@dataclass(frozen=True)
class Setting:
    """Everything that determines the memory of a step; see ``forecast`` for the fields.

    ``quantized_experts`` says whether the experts of a mixture-of-experts model are quantized too, ``bfloat16`` whether
    the device computes in this dtype.
    """

    architecture: Architecture
    adapter_config: AdapterConfig | None
    batch_size: int
    max_length: int
    dtype: torch.dtype
    quantization: str | None
    double_quant: bool
    gradient_checkpointing: bool
    optim: str
    training: bool
    on_cpu: bool = False
    loss_chunk_size: int = LOSS_CHUNK_SIZE
    recompute: bool = True
    packing: bool = False
    num_adapters: int = 1
    quantized_experts: bool = True
    processes: int = 1
    fsdp: bool = False
    reference: str | None = None
    generation: bool = False
    bfloat16: bool = True

    @property
    def one_pass(self) -> Setting:
        """The setting of one pass over the model: its adapters count as one adapter with the rows of all.

        The loss is computed for one adapter after the other, so a chunk contains only tokens of one of them.
        """
        chunk = min(self.loss_chunk_size, self.batch_size * self.max_length)
        return replace(self, num_adapters=1, batch_size=self.batch_size * self.together, loss_chunk_size=chunk)

    @property
    def together(self) -> int:
        """Number of adapters that one pass over the model trains."""
        return members_together(self.num_adapters, self.batch_size * self.max_length, on_cpu=self.on_cpu)

    def key(self, *, step: bool) -> str:
        """Return a key that is equal for settings with the same weights or, with ``step``, with the same step."""
        adapter = None if self.adapter_config is None else self.adapter_config.to_dict()
        fields: list[Any] = [
            self.architecture.identity,
            adapter,
            str(self.dtype),
            self.quantization,
            self.double_quant,
            self.quantized_experts,
        ]
        if step:
            fields += [self.batch_size, self.max_length, self.gradient_checkpointing, self.training, self.on_cpu]
            fields += [self.loss_chunk_size, self.recompute, self.packing]
        return json.dumps(fields, sort_keys=True, default=str)


@dataclass(frozen=True)
class Weights:
    """The weights in memory before a step.

    Attributes:
        kinds: storage format -> bytes of base weights and buffers.
        trained: (shape, bytes per element) of each trained tensor: the adapter's, or all without an adapter.
        adapter_bytes: bytes of the adapter; 0 without one.
        layers: path of the list of layers if all are equal (see ``equal_layers``); else empty.
        shardable_bytes: bytes of base weights that FSDP2 shards: those that are not quantized, and the 4-bit codes of
            linear layers.
        layer_bytes: bytes of one layer's base weights that FSDP2 shards.
        of_experts: number of trained elements that adapt experts.
        attends: whether the model has attention modules, judged by their class names.
    """

    kinds: dict[str, int]
    trained: tuple[tuple[tuple[int, ...], int], ...]
    adapter_bytes: int
    layers: str
    shardable_bytes: int = 0
    layer_bytes: int = 0
    of_experts: int = 0
    attends: bool = True

    @property
    def trained_count(self) -> int:
        """Number of trained parameters (elements)."""
        return sum(math.prod(shape) for shape, _ in self.trained)

    @property
    def trained_sizes(self) -> list[int]:
        """Bytes of each trained tensor, and so of its gradient."""
        return [math.prod(shape) * item for shape, item in self.trained]


_weights: dict[str, Weights] = {}
_steps: dict[str, Peak] = {}


def estimate(setting: Setting) -> tuple[MemoryPart, ...]:
    """Return the peak of a step, part by part.

    The first call for a setting takes about a third of a second; its result is cached.

    Raises:
        ConfigError: the model cannot run on fake tensors.
        TargetError: the adapter does not fit the model.
    """
    parts, weights = _alone(setting), weights_of(setting)
    if setting.processes == 1 or not setting.training:
        return parts
    return for_one_process(
        parts,
        setting.processes,
        sharded=setting.fsdp,
        base_bytes=sum(weights.kinds.values()),
        shardable_bytes=weights.shardable_bytes,
        layer_bytes=weights.layer_bytes,
        layer_count=setting.architecture.layer_count,
        trained_bytes=sum(weights.trained_sizes),
    )


def _alone(setting: Setting) -> tuple[MemoryPart, ...]:
    """Return the peak of a step, part by part, for a single process."""
    weights, step = weights_of(setting), _peak_of(setting.one_pass)
    base = sum(weights.kinds.values())
    kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in weights.kinds.items())
    parts = [
        MemoryPart("base weights", base, kinds),
        MemoryPart("adapters", weights.adapter_bytes * setting.num_adapters),
    ]
    if not setting.training:
        return (*parts, MemoryPart("KV cache", step.result), MemoryPart("temporary", step.total - step.result))
    states = state_bytes(setting.optim, weights.trained) * setting.num_adapters
    paged = "paged: may go to the host" if kind_of(setting.optim)[1] else setting.optim
    parts.append(MemoryPart("optimizer", states, paged))
    sizes = weights.trained_sizes
    if setting.reference == START:
        parts.append(MemoryPart("reference", sum(sizes), "the trained weights at the beginning"))
    gradients, largest = sum(sizes) * setting.num_adapters, max(sizes, default=0)
    full_passes = setting.num_adapters // setting.together  # a last pass with fewer adapters has a lower peak
    earlier = gradients * (full_passes - 1) * setting.together // setting.num_adapters  # gradients of earlier passes
    if gradients + 2 * largest > step.total + earlier:
        return (*parts, MemoryPart("gradients", gradients), MemoryPart("temporary", 2 * largest, "optimizer step"))
    if setting.generation:  # before forward and backward, which need more unless layers are computed again
        prefill = _peak_of(replace(setting.one_pass, training=False))
        if prefill.total > step.total + earlier:
            rest = prefill.total - prefill.result
            return (*parts, MemoryPart("KV cache", prefill.result), MemoryPart("temporary", rest, "generation"))
    rest = step.total - step.saved - step.gradients
    return (
        *parts,
        MemoryPart("gradients", step.gradients + earlier),
        MemoryPart("activations", step.saved, "kept for backward"),
        MemoryPart("temporary", rest, "logits, loss and single layers at the peak"),
    )


def weights_of(setting: Setting) -> Weights:
    """Return the weights of a setting, computed from shapes alone; cached."""
    key = setting.key(step=False)
    if key not in _weights:
        _make_room(_weights)
        _weights[key] = _count_weights(setting)
    return _weights[key]


def _count_weights(setting: Setting) -> Weights:
    with torch.device("meta"), silenced():
        model = setting.architecture.build(setting.dtype)
        base = [*model.parameters(), *model.buffers()]
        quantized: dict[int, nn.Module] = {id(layer.weight): layer for layer in _to_quantize(model, setting)}
        _add_adapter(model, setting)
    double = setting.double_quant and setting.quantization != "int8"
    kinds: Counter[str] = Counter()
    shardable: dict[int, int] = {}  # by the id of a base tensor
    for tensor in sorted(base, key=lambda tensor: id(tensor) not in quantized):
        if id(tensor) in quantized:
            label = f"{setting.quantization}{' double' if double else ''}"
            kinds[label] += quantized_bytes(quantized[id(tensor)], str(setting.quantization), double=double)
            shardable[id(tensor)] = code_bytes(quantized[id(tensor)], str(setting.quantization))
        else:
            kinds[short_name(tensor.dtype)] += tensor.nbytes
            shardable[id(tensor)] = tensor.nbytes
    added = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in shardable]
    trained = tuple((tuple(p.shape), p.element_size()) for p in model.parameters() if p.requires_grad)
    layers = equal_layers(model, setting.architecture.layer_count)
    found: Any = model.get_submodule(layers) if layers else ()
    inside = found[0].parameters() if layers else ()
    layer_bytes = sum(shardable.get(id(parameter), 0) for parameter in inside)
    adapter_bytes = sum(tensor.nbytes for tensor in added)
    attends = any("att" in type(module).__name__.lower() for module in model.modules())
    return Weights(
        dict(kinds),
        trained,
        adapter_bytes,
        layers,
        sum(shardable.values()),
        layer_bytes,
        _trained_on_experts(model),
        attends,
    )


def _trained_on_experts(model: nn.Module) -> int:
    """Return the number of trained elements that an adapter has on expert parameters."""
    manager = manager_of(model)
    layers = manager.layers.values() if manager is not None else ()
    experts = [layer for layer in layers if isinstance(layer, AdaptedParameter) and layer.num_experts > 1]
    return sum(parameter.numel() for layer in experts for parameter in layer.adapters.parameters())


def _peak_of(setting: Setting) -> Peak:
    """Return the peak of one step, without weights and optimizer state; cached."""
    key = setting.key(step=True)
    if key not in _steps:
        _make_room(_steps)
        _steps[key] = _scanned_peak(setting) or _extrapolated_peak(setting) or run_step(setting)
    return _steps[key]


def _scanned_peak(setting: Setting) -> Peak | None:
    """Return the peak of a model without attention, which may process positions one by one; None for other models.

    Each position of such a model costs the same. So the peak is extrapolated from runs with the same number of tokens
    in more and shorter rows, which take seconds instead of minutes.
    """
    length, longest = setting.max_length, _SCANNED[-1]
    if length <= 2 * longest or weights_of(setting).attends:
        return None
    below = length - length % longest
    peak = _in_more_rows(replace(setting, max_length=below))
    if below == length:
        return peak
    return peak.towards(_in_more_rows(replace(setting, max_length=below + longest)), (length - below) / longest)


def _in_more_rows(setting: Setting) -> Peak:
    """Extrapolate the peak from two runs with the same number of tokens in more rows.

    Two runs are needed, because each row has a fixed cost in addition to that of its tokens.
    """
    tokens = setting.batch_size * setting.max_length
    runs = (replace(setting, batch_size=tokens // size, max_length=size) for size in _SCANNED)
    first, second = (_extrapolated_peak(run) or run_step(run) for run in runs)
    most, fewer = (tokens // size for size in _SCANNED)
    return first.towards(second, (most - setting.batch_size) / (most - fewer))


def _extrapolated_peak(setting: Setting) -> Peak | None:
    """Return the peak extrapolated from a few layers; None if that is not possible."""
    if setting.architecture.layer_count <= SAMPLED_LAYERS or not (path := weights_of(setting).layers):
        return None
    if setting.adapter_config is not None and setting.adapter_config.on_last_layers:
        return None  # layers are not equal
    try:
        return _run(setting, path)
    except TargetError:  # the config names later layers only
        return None


def run_step(setting: Setting) -> Peak:
    """Run one step of the whole model on fake tensors and return its peak.

    Raises:
        ConfigError: the model cannot run on fake tensors.
    """
    peak = _run(setting, "")
    assert peak is not None
    return peak


def _run(setting: Setting, path: str) -> Peak | None:
    """Run a step with a few layers of the list at ``path``, or with all layers if it is empty."""
    sampled = SAMPLED_LAYERS if path else None
    with fake_tensors(), silenced():
        model = _prepared(setting, sampled)
        step = _train_step if setting.training else _prefill
        try:
            layers: Any = model.get_submodule(path) if path else ()
            more = setting.architecture.layer_count - len(layers) if path else 0
            return record(
                model, lambda on_backward: step(model, setting, on_backward), layers, more, on_cpu=setting.on_cpu
            )
        except TargetError:
            raise
        except Exception as error:
            kind = type(model).__name__
            reason = _too_long(setting) or (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"cannot forecast {kind}: it does not run on meta tensors ({reason})", model=kind
            ) from error


def _too_long(setting: Setting) -> str:
    """Return the reason that the sequence is longer than the model's positions, or the empty string."""
    positions = getattr(setting.architecture.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or setting.max_length <= positions:
        return ""
    return f"max_length {setting.max_length} exceeds its {positions} positions"


def _prepared(setting: Setting, layers: int | None) -> nn.Module:
    model = setting.architecture.build(setting.dtype, layers)
    checkpointed = setting.gradient_checkpointing and setting.training
    chosen = _to_quantize(model, setting)
    _add_adapter(
        model, setting if layers is None else _without_missing(setting, model), allow_missing=layers is not None
    )
    if setting.adapter_config is None:
        model.requires_grad_(setting.training)
    if setting.quantization is not None:
        replace_by_fakes(model, chosen, setting.quantization, double=setting.double_quant, checkpointed=checkpointed)
    model.train(setting.training)
    if checkpointed:
        _checkpoint(model)
    elif hasattr(config := model.config, "use_cache"):
        config.use_cache = True  # without a cache, transformers creates a mask for fake tensors, but not for real ones
    return model


def _to_quantize(model: nn.Module, setting: Setting) -> list[nn.Module]:
    """Return the linear layers and expert views that the setting quantizes; the model must not have adapters yet."""
    if setting.quantization is None:
        return []
    experts = experts_to_quantize(model).values() if setting.quantized_experts else ()
    return [*linear_layers_to_quantize(model).values(), *experts]


def _add_adapter(model: nn.Module, setting: Setting, *, allow_missing: bool = False) -> None:
    if setting.adapter_config is not None:
        AdapterManager.attach(model).add("forecast", setting.adapter_config, allow_missing=allow_missing)


def _without_missing(setting: Setting, model: nn.Module) -> Setting:
    """Return the setting without targets of layers that a smaller model lacks: a resolved config names every layer."""
    config = setting.adapter_config
    targets = getattr(config, "target_modules", None)
    if config is None or not isinstance(targets, list | set | tuple):
        return setting
    paths = [path for path, _ in model.named_modules()]
    known = {*paths, *(path[at + 1 :] for path in paths for at, letter in enumerate(path) if letter == ".")}
    return replace(setting, adapter_config=config.copy(target_modules=[name for name in targets if name in known]))


def _checkpoint(model: nn.Module) -> None:
    if not can_checkpoint(type(model)):
        raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing")
    config: Any = model.config
    config.use_cache = False  # transformers does the same, but with a warning
    # torch's random generator is shared by all threads: restoring its state in another thread than the main one would
    # repeat numbers that the main thread has drawn in the meantime.
    enable_checkpointing(model, {"preserve_rng_state": in_main_thread()})


def _train_step(model: nn.Module, setting: Setting, on_backward: Callable[[], None]) -> None:
    batch: dict[str, Any] = dict(
        setting.architecture.batch(setting.batch_size, setting.max_length, labels=True, packed=setting.packing)
    )
    if setting.packing:  # with a cache, transformers models ignore that a sequence contains several rows
        batch["use_cache"] = False
    with ExitStack() as block:
        if setting.recompute:
            block.enter_context(selective_recompute(model, verify=False))
            if setting.on_cpu:
                block.enter_context(grouped_heads(model))
        with chunked_head(model, setting.loss_chunk_size, sampled=True), without_logits(model):
            output = _output(model, setting, batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = next(tensors_in(dict(output))).sum()
        del output
        on_backward()
        loss.backward()


def _prefill(model: nn.Module, setting: Setting, on_backward: Callable[[], None]) -> Any:
    batch: dict[str, Any] = dict(setting.architecture.batch(setting.batch_size, setting.max_length, labels=False))
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    with torch.no_grad():
        output = _output(model, setting, batch)
    return next((value for value in dict(output).values() if not isinstance(value, torch.Tensor)), None)


def _output(model: nn.Module, setting: Setting, batch: Mapping[str, Any]) -> Any:
    """Run the model on a batch, with zeros for the call arguments of the adapter's method."""
    manager = manager_of(model)
    method = None if setting.adapter_config is None else method_of(setting.adapter_config)
    if manager is None or method is None or not method.calls.arguments:
        return model(**batch)
    shape = (setting.batch_size, setting.max_length)
    shapes = {name: shape if name in method.calls.token_arguments else shape[:1] for name in method.calls.arguments}
    given = {name: torch.zeros(size, dtype=torch.long) for name, size in shapes.items()}
    with manager.active_state.call(lambda: prepared(manager.configs, manager.active_state.current(), (), given)):
        return model(**batch)


def _make_room(cache: dict[str, Any]) -> None:
    while len(cache) >= _CACHE_SIZE:
        cache.pop(next(iter(cache)))
