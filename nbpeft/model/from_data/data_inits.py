"""``preprocess_corda`` and ``preprocess_loraga`` collect on the layers what these initializations need.

Both run a model, observe the layers that a config targets, and set an attribute on each of them, under PEFT's name. An
adapter created with the same config reads it (``engine/methods/lora/initialization/inits.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.checkpoint import NewFile, replace_files
from nbpeft.checkpoint.tensor_file import unpickled
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.registry import backend_named, layer_kind_named
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.gradients import GRADIENT
from nbpeft.engine.methods.lora.initialization.inits import DECOMPOSITION
from nbpeft.engine.tree.model_tree import is_quantized_layer, manager_of, walk
from nbpeft.errors import CheckpointError, ConfigError, few, in_one_line
from nbpeft.model.from_data.observing import base_alone, evaluated, input_hooks, modes_kept, progress

_DAMPING = 0.01
"""Share of the mean of a covariance's diagonal that is added to the diagonal; doubled until it can be inverted."""
_LARGEST_ERROR = 0.05
"""Largest accepted distance of a covariance times its computed inverse from the identity."""


@dataclass
class CordaEigens:
    """The r directions with which CorDA initializes a layer.

    Attributes:
        S_WC: singular values (r,) of the weight times the covariance of its inputs.
        U_WC: left singular vectors (out, r).
        V_WC: right singular vectors times the inverse of the covariance, (in, r).
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    show_progress: bool = False,
) -> None:
    """Computes the weights' most or least important directions on data, for ``init_lora_weights="corda"``.

    The covariances (in, in) of the inputs of all targeted layers are in memory at the same time. Batches may have any
    size.

    Args:
        model: the model that gets the adapter; its weights are not changed.
        lora_config: the adapter's config, with ``corda_config``.
        run_model: runs the model on data; not called if a file of ``corda_config`` has the results.
        hooked_model: the model that ``run_model`` runs, if it is not ``model``.
        show_progress: show a progress bar for the decompositions, like ``verbose`` of ``corda_config``.

    Raises:
        ConfigError: there is no config or no data, or an input is not finite. The layers are not changed.
        CheckpointError: a file cannot be read, or lacks a layer.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ConfigError("lora_config has no corda_config: set init_lora_weights='corda'", field="corda_config")
    layers = _linear_layers(model, lora_config)
    fields = ("S_WC", "U_WC", "V_WC")
    found: dict[str, CordaEigens] = {}
    if has_file(settings.cache_file):
        cache = _read(settings.cache_file, [f"{path}.{DECOMPOSITION}.{field}" for path in layers for field in fields])
        for path in layers:
            found[path] = CordaEigens(*(cache[f"{path}.{DECOMPOSITION}.{field}"] for field in fields))
    else:
        covariances, counts = _covariances(model, hooked_model, lora_config, run_model, layers)
        with progress(len(layers), "CorDA: weights decomposed", show=settings.verbose or show_progress) as report:
            for number, (path, layer) in enumerate(layers.items()):
                check_interrupt()
                report(number)
                weight, rank = layer.weight().float(), lora_config.rank_at(path)
                found[path] = _directions(weight, covariances[path].to(weight), rank, settings.corda_method)
        if not settings.prune_temporary_fields:
            for path, layer in layers.items():
                layer.module.__dict__.update(covariance_matrix=covariances[path], sample_count=counts[path])
        if settings.cache_file is not None:
            _write(
                settings.cache_file,
                {
                    f"{path}.{DECOMPOSITION}.{field}": getattr(eigens, field)
                    for path, eigens in found.items()
                    for field in fields
                },
            )
    for path, layer in layers.items():
        layer.module.__dict__[DECOMPOSITION] = found[path]


def _covariances(
    model: nn.Module,
    hooked_model: nn.Module | None,
    config: LoraConfig,
    run_model: Callable[[], Any] | None,
    layers: Mapping[str, BaseLayer],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns path -> mean covariance (in, in) of the layer's inputs, and path -> number of calls."""
    settings = config.corda_config
    assert settings is not None
    if has_file(settings.covariance_file):
        return _read(settings.covariance_file, layers), dict.fromkeys(layers, 0)
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    run = model if hooked_model is None else hooked_model
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def see(path: str, args: tuple[Any, ...]) -> None:
        rows = args[0].detach()
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if settings.use_float16_for_covariance else rows.float()
        rows = rows / rows.max().abs()
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError(f"an input of {path} is zero or not finite: CorDA cannot use this data")
        covariance = rows.T @ rows
        sums[path] = sums[path].add_(covariance) if path in sums else covariance
        counts[path] += 1

    hooked = layers if hooked_model is None else _linear_layers(hooked_model, config)
    modules = {path: layer.module for path, layer in hooked.items() if path in layers}
    with input_hooks(modules, see), base_alone(run), evaluated(run):
        run_model()
    unseen = [path for path, count in counts.items() if not count]
    if unseen:
        raise ConfigError(f"run_model did not call {few(unseen)}: exclude these layers")
    means = {path: sums[path] / count for path, count in counts.items()}
    if settings.covariance_file is not None:
        _write(settings.covariance_file, means)
    return means, counts


def _directions(weight: Tensor, covariance: Tensor, rank: int, method: str) -> CordaEigens:
    """Returns the rank most or least important directions of a weight (out, in) times a covariance (in, in)."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damping = _DAMPING
    while True:
        damped = covariance + identity * (covariance.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, identity)) < _LARGEST_ERROR:
            break
        damping *= 2
    left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
    taken = slice(0, rank) if method == "ipm" else slice(len(values) - rank, len(values))
    # Clone: a slice would keep the whole tensor in memory, and torch.save would write all of it.
    return CordaEigens(values[taken].clone(), left[:, taken].clone(), (right[taken] @ inverse).T.contiguous())


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Computes the gradients of the targeted layers on data, for ``init_lora_weights="lora_ga"``.

    Args:
        model: the model that gets the adapter; its weights are not changed.
        lora_config: the adapter's config, with ``lora_ga_config``.
        train_step: calls the model and ``backward()`` on its loss, once or more; the gradients are averaged.
        cache_file: file for the gradients; if it exists, they are read from it and ``train_step`` is not called.

    Raises:
        ConfigError: there is no config or no linear layer, or a layer is quantized or gets no gradient.
        CheckpointError: the file cannot be read, or lacks a layer.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, give LoraConfig init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)",
            field="lora_ga_config",
        )
    layers = _linear_layers(model, lora_config)
    quantized = [
        path
        for path, layer in layers.items()
        if is_quantized_layer(layer.module) or hasattr(layer.module, "quant_state")
    ]
    if quantized:
        raise ConfigError(f"LoRA-GA needs gradients of full-precision weights; quantized: {few(quantized)}")
    if has_file(cache_file):
        found = _read(cache_file, [f"{path}.{GRADIENT}" for path in layers])
        gradients = {path: found[f"{path}.{GRADIENT}"] for path in layers}
    else:
        gradients = _gradients(model, layers, train_step)
        if cache_file is not None:
            _write(cache_file, {f"{path}.{GRADIENT}": gradient for path, gradient in gradients.items()})
    for path, layer in layers.items():
        layer.module.__dict__[GRADIENT] = gradients[path]


def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any]) -> None:
    """Sets the mean gradient of each targeted layer as an attribute on it; see ``preprocess_loraga``.

    Args:
        model: the model that gets the adapter.
        lora_config: the adapter's config.
        train_step: calls the model and ``backward()`` on its loss, once or more.
    """
    layers = _linear_layers(model, lora_config)
    for path, gradient in _gradients(model, layers, train_step).items():
        layers[path].module.__dict__[GRADIENT] = gradient


def _gradients(model: nn.Module, layers: Mapping[str, BaseLayer], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Returns path -> mean gradient of the layer's weight, and restores the model's gradients and requires_grad."""
    weights: dict[str, Any] = {path: layer.module.weight for path, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def count(path: str) -> None:
        counts[path] += 1

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = {path: weight.grad for path, weight in weights.items()}
    handles: list[Any] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for path, weight in weights.items():
            weight.requires_grad_(True).grad = None
            handles.append(weight.register_post_accumulate_grad_hook(lambda _, path=path: count(path)))
        with modes_kept(model), base_alone(model), torch.enable_grad():
            model.train()
            train_step()
        without = [path for path, weight in weights.items() if weight.grad is None or not counts[path]]
        if without:
            raise ConfigError(f"train_step gave {few(without)} no gradient; it must call backward()")
        return {path: weight.grad.detach() / counts[path] for path, weight in weights.items()}
    finally:
        for handle in handles:
            handle.remove()
        for path, weight in weights.items():
            weight.grad = before[path]
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


def _linear_layers(model: nn.Module, config: LoraConfig) -> dict[str, BaseLayer]:
    """Returns path -> frozen linear layer for the layers that a config targets, already adapted or not."""
    manager = manager_of(model)
    base = model if manager is None else manager.model
    targets = {target.path: target for target in plan(base, config).targets if layer_kind_named(target.kind).is_linear}
    found = {
        site.path: BaseLayer(
            site.module, layer_kind_named(targets[site.path].kind), backend_named(targets[site.path].backend)
        )
        for site in walk(base)
        if site.path in targets
    }
    if not found:
        raise ConfigError("No supported layers found: this init needs linear layers, but the config targets none")
    return found


def has_file(place: str | None) -> bool:
    """Returns whether a file exists and is not empty; False for None."""
    return place is not None and os.path.isfile(place) and os.path.getsize(place) > 0


def _read(place: str | None, names: Iterable[str]) -> dict[str, Tensor]:
    """Reads the named tensors from a cache file, ours or PEFT's, to the CPU."""
    assert place is not None
    try:
        cache = unpickled(place)
    except Exception as error:
        raise CheckpointError(f"{place} cannot be read: {in_one_line(error)}") from None
    missing = [name for name in names if not (isinstance(cache, dict) and isinstance(cache.get(name), Tensor))]
    if missing:
        raise CheckpointError(f"{place} was made for another model or config: it lacks {few(missing)}")
    return {name: cache[name] for name in names}


def _write(place: str, tensors: Mapping[str, Tensor]) -> None:
    path = Path(os.path.expanduser(place)).absolute()
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    replace_files(path.parent, [NewFile(path.name, lambda file: torch.save(on_cpu, file))])
