"""What a step takes: exact for weights and adapters, simulated on fake tensors for the rest."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from nbpeft.engine.adapter import AdapterConfig
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.model_tree import linear_layers_to_quantize
from nbpeft.engine.plan import InjectionPlan, plan
from nbpeft.engine.storage import short_name
from nbpeft.errors import ConfigError, TargetError
from nbpeft.memory.architecture import Architecture, adapters_are_alike, can_checkpoint, layers_are_alike
from nbpeft.memory.checkpointing import enable_checkpointing
from nbpeft.memory.saved import tensors_in
from nbpeft.memory.standin import put_standins, quantized_bytes
from nbpeft.memory.threads import in_main_thread, quiet
from nbpeft.memory.timeline import Peak, fake_tensors, record

_HALF = (torch.float16, torch.bfloat16)
FEW = (2, 3)
"""Numbers of layers that are simulated; what the others need follows, for each adds the same."""

T = TypeVar("T")
Look = Callable[[nn.Module, Callable[[], Any], int], T]

Trained = tuple[tuple[tuple[int, ...], int], ...]
"""(shape, bytes an element) of each trained tensor."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides what a step needs."""

    architecture: Architecture
    adapter_config: AdapterConfig | None
    batch_size: int
    sequence_length: int
    dtype: torch.dtype
    quantization: str | None
    double_quant: bool
    gradient_checkpointing: bool
    training: bool
    on_cpu: bool = False

    def with_changes(self, **changes: Any) -> Setting:
        """The same with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def key(self, *, step: bool) -> str:
        """Equal for settings with the same weights or, with ``step``, the same step."""
        adapter = None if self.adapter_config is None else self.adapter_config.to_dict()
        fields: list[Any] = [
            self.architecture.identity,
            adapter,
            str(self.dtype),
            self.quantization,
            self.double_quant,
        ]
        if step:
            fields += [self.batch_size, self.sequence_length, self.gradient_checkpointing, self.training, self.on_cpu]
        return json.dumps(fields, sort_keys=True, default=str)


@dataclass(frozen=True)
class Weights:
    """What lies in memory before a step.

    Attributes:
        kinds: bytes of base weights and buffers by the way they are stored.
        trained: the adapter's tensors, or all parameters without an adapter.
        adapter_bytes: bytes of the adapter; 0 without one.
        alike: whether all layers are of the same shape and have the same adapter.
    """

    kinds: dict[str, int]
    trained: Trained
    adapter_bytes: int
    alike: bool


_weights: dict[str, Weights] = {}
_steps: dict[str, Peak] = {}
_LIMIT = 512


def weights_of(setting: Setting) -> Weights:
    """Bytes of weights and adapters, from their shapes alone; kept for the next question.

    Raises:
        TargetError: the adapter does not fit the model.
    """
    key = setting.key(step=False)
    if key not in _weights:
        _trim(_weights)
        _weights[key] = _count_weights(setting)
    return _weights[key]


def _count_weights(setting: Setting) -> Weights:
    with torch.device("meta"), quiet():
        model = setting.architecture.build(setting.dtype)
    kinds: Counter[str] = Counter()
    skipped: set[int] = set()
    if setting.quantization is not None:
        double = setting.double_quant and setting.quantization != "int8"
        for layer in linear_layers_to_quantize(model).values():
            weight: Any = layer.weight
            rows, columns = weight.shape
            skipped.add(id(weight))
            label = setting.quantization + (" double" if double else "")
            kinds[label] += quantized_bytes(rows, columns, setting.quantization, double=double)
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in skipped:
            kinds[short_name(tensor.dtype)] += tensor.nbytes
    alike = layers_are_alike(model, setting.architecture.layer_count)
    if setting.adapter_config is None:
        trained: Trained = tuple((tuple(p.shape), p.element_size()) for p in model.parameters())
        return Weights(dict(kinds), trained, 0, alike)
    injection = plan(model, setting.adapter_config)
    alike = alike and adapters_are_alike(injection, setting.architecture.layer_count)
    item = 4 if setting.dtype in _HALF else setting.dtype.itemsize
    trained = _adapter_tensors(model, injection, item)
    adapter_bytes = sum(math.prod(shape) * size for shape, size in trained) + item * _start_elements(injection)
    return Weights(dict(kinds), trained, adapter_bytes, alike)


def _start_elements(injection: InjectionPlan) -> int:
    """Elements that adapters initialised from the weight keep of that component, beside what they train."""
    if not injection.config.initialised_from_weight:
        return 0
    return sum(target.adapter_class.initial_elements(target.shapes) for target in injection.targets)


def _adapter_tensors(model: nn.Module, injection: InjectionPlan, item: int) -> Trained:
    trained = [(shape, item) for target in injection.targets for shape in target.shapes.values()]
    trained += [(shape, item) for shape in injection.shared.values()]
    for path in injection.copies:
        trained += [(tuple(p.shape), p.element_size()) for p in model.get_submodule(path).parameters()]
    return tuple(trained)


def step_peak(setting: Setting) -> Peak:
    """The peak of one step beyond weights and optimizer state.

    Raises:
        ConfigError: the model cannot run without data.
    """
    key = setting.key(step=True)
    if key not in _steps:
        _trim(_steps)
        _steps[key] = _extrapolated(setting)
    return _steps[key]


def _extrapolated(setting: Setting) -> Peak:
    count = setting.architecture.layer_count
    if count > max(FEW) and weights_of(setting).alike:
        try:
            low, high = (run_step(setting, layers, record) for layers in FEW)
        except TargetError:
            return largest(run_step(setting, None, record))
        # In between, backward frees one layer after another: the peak is at one of its ends.
        return largest([further(low[end], high[end], count) for end in (0, -1)])
    return largest(run_step(setting, None, record))


def further(low: Peak, high: Peak, count: int) -> Peak:
    """What ``count`` layers take, from what two and three take."""
    steps = (count - FEW[0]) / (FEW[1] - FEW[0])
    values = zip(dataclasses.astuple(low), dataclasses.astuple(high), strict=True)
    return Peak(*(round(a + (b - a) * steps) for a, b in values))


def largest(peaks: list[Peak]) -> Peak:
    """The highest."""
    return max(peaks, key=lambda peak: peak.total)


def run_step(setting: Setting, layers: int | None, look: Look[T]) -> T:
    """Runs a step of a model on fake tensors while ``look`` looks on.

    Args:
        setting: what to run.
        layers: with so many layers; all for None.
        look: called with the model, the step, and the number of phases to tell apart.

    Raises:
        ConfigError: the model cannot run without data.
    """
    phases = 1 if layers is None or not setting.training else layers
    with fake_tensors(setting.on_cpu), quiet():
        model = _prepared(setting, layers)
        try:
            step = _train_step if setting.training else _prefill
            return look(model, lambda: step(model, setting), phases)
        except TargetError:
            raise
        except Exception as error:
            kind = type(model).__name__
            reason = _too_long(setting) or (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot forecast {kind}: it does not run without data ({reason})", model=kind) from error


def _too_long(setting: Setting) -> str:
    """That the model has fewer positions than the sequence is long, if so."""
    positions = getattr(setting.architecture.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or setting.sequence_length <= positions:
        return ""
    return f"sequence_length {setting.sequence_length} is more than its {positions} positions"


def _prepared(setting: Setting, layers: int | None) -> nn.Module:
    model = setting.architecture.build(setting.dtype, layers)
    if setting.adapter_config is not None:
        AdapterManager.attach(model).add("forecast", setting.adapter_config, allow_missing=False)
    else:
        model.requires_grad_(setting.training)
    checkpointed = setting.gradient_checkpointing and setting.training
    if setting.quantization is not None:
        put_standins(model, setting.quantization, double=setting.double_quant, checkpointed=checkpointed)
    model.train(setting.training)
    if checkpointed:
        _checkpoint(model)
    return model


def _checkpoint(model: nn.Module) -> None:
    if not can_checkpoint(type(model)):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing")
    config: Any = model.config
    config.use_cache = False  # as transformers does by itself, with a warning
    # Elsewhere the main thread may draw random numbers meanwhile; there is one generator for all.
    enable_checkpointing(model, {"preserve_rng_state": in_main_thread()})


def _train_step(model: nn.Module, setting: Setting) -> None:
    batch = setting.architecture.batch(setting.batch_size, setting.sequence_length, labels=True)
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = next(tensors_in(dict(output))).sum()
    del output
    loss.backward()


def _prefill(model: nn.Module, setting: Setting) -> Any:
    batch: dict[str, Any] = dict(setting.architecture.batch(setting.batch_size, setting.sequence_length, labels=False))
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    with torch.no_grad():
        output = model(**batch)
    return next((value for value in dict(output).values() if not isinstance(value, torch.Tensor)), None)


def _trim(cache: dict[str, Any]) -> None:
    while len(cache) >= _LIMIT:
        cache.pop(next(iter(cache)))
