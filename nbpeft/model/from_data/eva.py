"""EVA: A is initialized with the principal directions of a layer's inputs (Paischer et al. 2024).

The inputs of the adapted layers are collected over a dataloader. The principal components of each layer are computed
incrementally (``IncrementalPCA``) until they converge. The ranks of all layers are then redistributed to the components
that explain most of their layer's variance. Layers with the same input share one decomposition.

Reference: https://arxiv.org/abs/2410.07170
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.contract.registry import layer_kind_named
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.init_configs import EvaConfig
from nbpeft.engine.methods.lora.initialization.inits import remember_starts
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import manager_of, walk
from nbpeft.errors import AdapterError, ConfigError, few
from nbpeft.model.from_data.eva_search import EvaSearch, LayerInputsFn
from nbpeft.model.from_data.observing import base_alone, device_of, evaluated, moved, progress

_LARGEST_RHO = 1000
"""Above this value rho is limited by the largest dimension of the model."""
_MOST_PASSES = 100
"""Largest number of passes over the data, if the directions do not converge."""

_HALF = (torch.float16, torch.bfloat16)

ForwardFn = Callable[[nn.Module, Any], Any]
ModelInputsFn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class EvaBatches:
    """The data of EVA and how to use it; see ``get_eva_state_dict``.

    Attributes:
        dataloader: the batches, iterated as often as necessary.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: (batch, config) -> second argument of ``prepare_layer_inputs_fn``.
        prepare_layer_inputs_fn: returns the rows of a layer's inputs to use.
    """

    dataloader: Iterable[Any]
    forward_fn: ForwardFn
    prepare_model_inputs_fn: ModelInputsFn | None
    prepare_layer_inputs_fn: LayerInputsFn | Mapping[str, LayerInputsFn] | None


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Calls a model with a batch of keyword arguments.

    Args:
        model: the model.
        inputs: keyword arguments of its forward.

    Returns:
        The model's output.
    """
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Returns the indices (tokens, 2) of the tokens to use: attended to and, if ``use_label_mask``, with a label.

    Args:
        model_input: batch with ``input_ids`` (batch, length), and optionally ``attention_mask`` and ``labels``.
        peft_config: the adapter's config.

    Raises:
        TypeError: the batch is not a dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"prepare_model_inputs_fn_language_modeling takes a batch as a dictionary, not {type(model_input).__name__}"
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Selects the inputs of a layer at the tokens to use.

    Args:
        layer_input: inputs of the layer, (batch, length, in).
        model_input: indices from ``prepare_model_inputs_fn_language_modeling``, (tokens, 2).
        layer_name: name of the layer, for messages.

    Returns:
        The selected inputs, (tokens, in).
    """
    selected: Tensor = _tensor_of(layer_input, layer_name)[model_input.T.unbind()]
    return selected


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Returns all rows of a layer's input, (n, in).

    Args:
        layer_input: a tensor (..., in), or the layer's inputs of which it is the first.
        model_input: ignored.
        layer_name: name of the layer, for messages.

    Raises:
        TypeError: the input is no tensor.
    """
    rows = _tensor_of(layer_input, layer_name)
    return rows.reshape(-1, rows.shape[-1])


def _tensor_of(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the input of {layer_name} is a {type(found).__name__}, not a tensor: give prepare_layer_inputs_fn"
        )
    return found


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputsFn | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputsFn
    | Mapping[str, LayerInputsFn]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Computes the directions with which EVA initializes each layer; their number is the layer's rank.

    Args:
        model: a PeftModel or a model without adapters. It runs without adapters in evaluation mode, and its state is
            restored afterwards.
        dataloader: the batches, iterated as often as necessary.
        peft_config: the config of an adapter to create; None for that of ``adapter_name``.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: (batch, config) -> second argument of ``prepare_layer_inputs_fn``; None passes the
            batch.
        prepare_layer_inputs_fn: (layer's inputs, that value, name of the layer) -> rows (n, in). A mapping gives a
            function per layer name; None uses all rows.
        adapter_name: the adapter whose layers are observed.
        gather_distributed_inputs: gather the rows of all processes, with ``torch.distributed``.
        show_progress_bar: show a progress bar of converged layers.

    Returns:
        Name of the layer in the model -> directions (rank, in), including layers of rank 0.

    Raises:
        ConfigError: there is no config or no data, or no batch has as many rows as there are directions to find.
    """
    manager = manager_of(model)
    if peft_config is None:
        if manager is None:
            raise ConfigError("peft_config is required if model is not a PeftModel")
        manager.require(adapter_name)
        config: Any = manager.configs[adapter_name]
    else:
        config = peft_config
    if getattr(config, "eva_config", None) is None:
        config = config.copy(eva_config=EvaConfig())
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ConfigError("dataloader is empty")
    modules = _modules(model, manager, config, adapter_name)
    batches = EvaBatches(dataloader, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    return find_directions(model, config, modules, batches, gather_distributed_inputs, show_progress_bar)


def targeted_layers(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[str, nn.Module]]:
    """Finds the linear layers of a base model that a config targets.

    Args:
        model: the base model.
        config: config of the adapter.

    Returns:
        Name of the layer -> its path and the frozen layer.
    """
    targets = {target.path for target in plan(model, config).targets if layer_kind_named(target.kind).is_linear}
    return {site.path: (site.path, site.module) for site in walk(model) if site.path in targets}


@torch.no_grad()
def find_directions(
    model: nn.Module,
    config: Any,
    modules: Mapping[str, tuple[str, nn.Module]],
    batches: EvaBatches,
    gather: bool = True,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Computes the directions of the given layers; see ``get_eva_state_dict``.

    Args:
        model: the model. It runs without adapters in evaluation mode, and its state is restored afterwards.
        config: config of the adapter, with ``eva_config``.
        modules: name of a layer -> its path and the layer.
        batches: the data and how to use it.
        gather: gather the rows of all processes, with ``torch.distributed``.
        show_progress: show a progress bar of converged layers.

    Returns:
        Name of the layer -> directions (rank, in).

    Raises:
        ConfigError: there is no layer or no data, or no batch has as many rows as there are directions to find.
    """
    if not modules:
        raise ConfigError("EVA needs linear layers, but the config targets none")
    functions = _functions(batches.prepare_layer_inputs_fn, modules)
    search = EvaSearch(modules, functions, config, _rho(config, model), gather=gather)
    calls = _Calls(model, batches, config)
    with base_alone(model), evaluated(model):
        calls.run(search.look_for_equal_inputs(), search)
        with progress(len(modules), "EVA: layers converged", show=show_progress) as report:
            for first_of_pass, batch in calls.endless():
                report(search.converged_count)
                if search.has_converged:
                    break
                if first_of_pass:
                    search.check_pass()
                check_interrupt()
                calls.run_batch(batch, search.collect(), search)
                search.share_ranks()
    return search.result(whiten=config.eva_config.whiten)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputsFn | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputsFn
    | Mapping[str, LayerInputsFn]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initializes an adapter with ``init_lora_weights="eva"`` from the inputs of its layers.

    A layer's rank becomes its number of directions; layers of rank 0 lose the adapter. Call this before an optimizer
    is created.

    Args:
        model: a PeftModel.
        dataloader: the batches; see ``get_eva_state_dict``, also for the arguments below.
        eva_state_dict: result of ``get_eva_state_dict``; computed if None.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: (batch, config) -> second argument of ``prepare_layer_inputs_fn``.
        prepare_layer_inputs_fn: returns the rows of a layer's inputs to use.
        adapter_name: name of the adapter.
        gather_distributed_inputs: gather the rows of all processes, with ``torch.distributed``.
        show_progress_bar: show a progress bar of converged layers.

    Raises:
        ConfigError: the adapter has another init, or there is neither data nor a state dict.
        AdapterError: the model has no adapters, or several are active. After any error the adapters are unchanged.
    """
    manager = require_manager(model)
    manager.require(adapter_name)
    if len(manager.active) > 1:
        raise AdapterError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config: Any = manager.configs[adapter_name]
    if getattr(config, "init_name", "") != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    with manager.transaction():
        _fill_in(manager, adapter_name)
        start_at(manager, adapter_name, {_bare(name): value for name, value in eva_state_dict.items()})


def _fill_in(manager: AdapterManager, name: str) -> None:
    """Replaces an adapter without values (``low_cpu_mem_usage``) by one as with ``init_lora_weights=True``."""
    parameters = manager.parameters(name)
    if any(parameter.is_meta for parameter in parameters):
        half = parameters[0].dtype in _HALF
        manager.add(name, manager.configs[name], replace=True, trainable=name not in manager.frozen, half=half)


def start_at(manager: AdapterManager, name: str, directions: Mapping[str, Tensor]) -> None:
    """Replaces an adapter with ``init_lora_weights="eva"`` by one that has the directions and their ranks.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        directions: path -> directions (rank, in).

    Raises:
        ConfigError: every layer has rank 0.
    """
    weights = manager.weights(name)
    started, by_path, missing = _started(manager, name, weights, directions)
    if missing:
        warnings.warn(
            f"EVA has no directions for {few(missing)}, which are initialized as with init_lora_weights=True (EVA "
            "supports linear layers)",
            stacklevel=3,
        )
    start = AdapterWeights(by_path, weights.copies, weights.base, weights.shared)
    first = next((value for named in weights.adapters.values() for value in named.values()), None)
    half = first is not None and first.dtype in _HALF
    manager.add(name, started, start, replace=True, trainable=name not in manager.frozen, half=half)


def _started(
    manager: AdapterManager, name: str, weights: AdapterWeights, directions: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]], list[str]]:
    """The adapter that starts at the directions.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        weights: its present tensors.
        directions: path -> directions (rank, in).

    Returns:
        The config with the ranks, path -> the tensors of the layer, and the paths without directions.

    Raises:
        ConfigError: every layer has rank 0.
    """
    config: Any = manager.configs[name]
    by_path: dict[str, dict[str, Tensor]] = {}
    starts: dict[str, Any] = {}
    missing: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, tensors in weights.adapters.items():
        rank, alpha, found = config.rank_at(path), config.alpha_at(path), directions.get(path)
        if found is not None and not len(found):
            continue
        if found is None:
            missing.append(path)
            by_path[path] = tensors
        else:
            if config.eva_config.adjust_scaling_factors:
                alpha *= len(found) / rank
            rank = len(found)
            adapter: Any = manager.layers[path].adapter(name)
            by_path[path] = adapter.started_at(found)
            first_factor, second_factor = (by_path[path][factor].clone() for factor in adapter.factor_names)
            starts[path] = (manager.layers[path].base_layer, (first_factor, second_factor))
        if rank != config.r:
            ranks[path] = rank
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    if not by_path:
        raise ConfigError("EVA assigned no layer a rank: give more data, or a larger r")
    started: Any = config.copy(
        target_modules=set(by_path),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    remember_starts(started, starts)
    return started, by_path, missing


def _modules(
    model: nn.Module, manager: AdapterManager | None, config: AdapterConfig, name: str
) -> dict[str, tuple[str, nn.Module]]:
    """Returns name -> path and frozen layer, of the linear layers that have or get the adapter."""
    if manager is not None and name in manager.configs:
        layers = manager.layers_with(name).items()
        found = {path: (path, layer.base_layer) for path, layer in layers if layer.kind.is_linear}
    else:
        found = targeted_layers(model, config)
    prefix = _PREFIX if manager is not None and model is not manager.model else ""
    return {f"{prefix}{path}": layer for path, layer in found.items()}


_PREFIX = "base_model.model."


def _bare(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _rho(config: Any, model: nn.Module) -> float:
    rho = float(config.eva_config.rho)
    if rho > _LARGEST_RHO:
        largest = max(max(parameter.shape, default=0) for parameter in model.parameters())
        rho = min(rho, largest // config.r)
    return rho


def _functions(functions: Any, modules: Mapping[str, Any]) -> dict[str, LayerInputsFn]:
    """Returns name of a layer -> function that prepares its inputs."""
    if isinstance(functions, Mapping):
        unknown = sorted(functions.keys() - modules.keys())
        if unknown:
            raise ConfigError(f"prepare_layer_inputs_fn names {few(unknown)}, which EVA does not initialize")
        return {name: functions.get(name) or all_rows for name in modules}
    return dict.fromkeys(modules, functions or all_rows)


class _Calls:
    """Calls the model with the batches of a dataloader, moved to the model's device."""

    def __init__(self, model: nn.Module, batches: EvaBatches, config: Any) -> None:
        self._model, self._batches, self._config = model, batches, config
        self._device = device_of(model)

    def endless(self) -> Iterator[tuple[bool, Any]]:
        """Yields whether a batch begins a repeated pass over the data, and the batch."""
        for number in range(_MOST_PASSES):
            first = number > 0
            for batch in self._batches.dataloader:
                yield first, batch
                first = False
        warnings.warn(
            f"EVA has not converged after {_MOST_PASSES} passes: the directions found so far are used", stacklevel=4
        )

    def run(self, hooked: AbstractContextManager[None], search: EvaSearch) -> None:
        """Calls the model with the first batch.

        Args:
            hooked: context manager that registers the hooks.
            search: the search that the hooks report to.
        """
        batch = next(iter(self._batches.dataloader), None)
        if batch is None:
            raise ConfigError("dataloader is empty")
        self.run_batch(batch, hooked, search)

    def run_batch(self, batch: Any, hooked: AbstractContextManager[None], search: EvaSearch) -> None:
        """Calls the model with a batch, with hooks on its layers.

        Args:
            batch: the batch, which is moved to the model's device.
            hooked: context manager that registers the hooks.
            search: the search that the hooks report to.
        """
        batch = moved(batch, self._device)
        prepare = self._batches.prepare_model_inputs_fn
        search.model_input = batch if prepare is None else prepare(batch, self._config)
        with hooked:
            self._batches.forward_fn(self._model, batch)
