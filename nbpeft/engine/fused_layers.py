"""Linear layers that transformers 5 made parameters of: the experts of a mixture, and its router.

Configs and files of before name the layers (``w1``, ``mlp.experts.3.up_proj``, ``gate``). Today the weights of
all experts are one parameter, gate and up projection joined, and the router is a module of its own with a weight.
Their LoRA is one on the parameter; where two layers were joined it has the ranks of both.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.model_tree import Site
from nbpeft.engine.patterns import ENDING
from nbpeft.engine.registry import Method, resolve_backend, resolve_layer_kind
from nbpeft.engine.targets import ALL_LINEAR, Matcher
from nbpeft.errors import ConfigError, TargetError

_ROUTER = "gate"


@dataclass(frozen=True)
class FusedLayers:
    """A parameter that was layers.

    Attributes:
        module: path of the module that has it.
        name: its name there.
        layers: names of the layers, in its order.
        per_expert: whether there was one of each for every expert, below the module.
    """

    module: str
    name: str
    layers: tuple[str, ...]
    per_expert: bool = True

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return f"{self.module}.{self.name}"

    @property
    def short_name(self) -> str:
        """What names it in each block of a model: ``gate_up_proj``, ``gate.weight``."""
        return self.name if self.per_expert else f"{_ROUTER}.{self.name}"

    def former_paths(self, layer: str) -> tuple[str, ...]:
        """Paths under which a config may mean a layer: as it was, and as PEFT reads patterns."""
        return (f"{self.module}.0.{layer}", f"{self.module}.{layer}") if self.per_expert else (self.module,)


def fused_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the parameters of experts that transformers joins when it loads older files.

    Args:
        model: a base model; {} if it does not come from transformers, or has no such experts.

    Returns:
        Name of the parameter -> names of the layers of each expert, in the order in which they are joined.
    """
    if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    loose: Any = model
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers before 5 has the layers
        return {}
    found = {}
    for step in get_model_conversion_mapping(loose):
        sources, targets = step.source_patterns, step.target_patterns
        if isinstance(step, WeightConverter) and len(targets) == 1 and all(".*." in source for source in sources):
            module, _, name = targets[0].rpartition(".")
            layers = [source.removesuffix(".weight").rpartition(".*.") for source in sources]
            if all(before == module for before, _, _ in layers) and len(layers) <= 2:
                found[name] = tuple(layer for _, _, layer in layers)
    return found


def fused_layers(model: nn.Module, sites: Sequence[Site]) -> list[FusedLayers]:
    """Finds the parameters of a model that were linear layers, in its order.

    Args:
        model: the base model, with or without adapters on it.
        sites: of its modules.
    """
    names = fused_parameters(model)
    return [fused for site in sites if names for fused in _in_module(site, sites, names)]


def _in_module(site: Site, sites: Sequence[Site], names: Mapping[str, tuple[str, ...]]) -> Iterator[FusedLayers]:
    held: dict[str, Any] = site.module._parameters
    found = [name for name in held if name in names and getattr(held[name], "ndim", 0) == 3]
    for name in found:
        yield FusedLayers(site.path, name, names[name])
    block = site.path.rpartition(".")[0]
    for other in sites if found else ():
        weight: Any = other.module._parameters.get("weight")
        if other.path == f"{block}.{_ROUTER}" and getattr(weight, "ndim", 0) == 2 and not _is_layer(other):
            yield FusedLayers(other.path, "weight", (_ROUTER,), per_expert=False)


def _is_layer(site: Site) -> bool:
    return resolve_layer_kind(site.module) is not None


def with_parameters(model: nn.Module, config: Any, resolved: Any, method: Method, sites: Sequence[Site]) -> None:
    """Names parameters in a config where it names layers that were made one, as PEFT's do from 0.19 on.

    Other layers of those names, of shared experts and blocks without a mixture, stay targets; PEFT leaves them out.
    Parameters that ``target_parameters`` names are as it says.

    Args:
        model: the base model.
        config: as it was given.
        resolved: a copy with its targets as names or a pattern; changed in place.
        method: of the config.
        sites: of the model's modules.

    Raises:
        TargetError: it names one of two joined layers, and not the other.
        ConfigError: its patterns name one of them.
    """
    if not hasattr(config, "target_parameters") or "target_parameters" in config.not_implemented:
        return
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    found = fused_layers(model, sites) if config.target_modules else []
    if not found:
        return
    given = Matcher(resolved.target_parameters or ())
    found = [fused for fused in found if not given.matches(fused.path)]
    if everything:
        found = _adaptable(found, resolved, method, sites)
    matcher = Matcher(
        ".*" if everything else config.target_modules,
        config.exclude_modules,
        config.layers_to_transform,
        config.layers_pattern,
    )
    chosen = [fused for fused in found if _means(matcher, fused)]
    for fused in chosen:
        _check_patterns(config, fused)
        others = [other for other in found if other.short_name == fused.short_name]
        _add(resolved, config, fused, fused.short_name if set(others) <= set(chosen) else fused.path)
    if chosen and not everything:
        _drop_former_names(resolved, chosen, sites)


def _adaptable(found: Sequence[FusedLayers], config: Any, method: Method, sites: Sequence[Site]) -> list[FusedLayers]:
    """Those of the parameters on which the config works; says why others are left out."""
    modules = {site.path: site.module for site in sites}
    adapter_class = method.kind_classes.get("parameter")
    taken: list[FusedLayers] = []
    for fused in found:
        view = ParameterView(modules[fused.module], fused.name)
        kind = resolve_layer_kind(view)
        if adapter_class is None or kind is None or resolve_backend(view) is None:
            continue
        try:
            adapter_class.parameter_shapes(config, fused.path, view, kind)
        except ConfigError as problem:
            warnings.warn(f"target_modules='all-linear' leaves {fused.short_name} as it is: {problem}", stacklevel=6)
        else:
            taken.append(fused)
    return taken


def _means(matcher: Matcher, fused: FusedLayers) -> bool:
    """Whether a config names the layers of a parameter.

    Raises:
        TargetError: some of them only.
    """
    if matcher.excluded(fused.path) or matcher.excluded(fused.module):
        return False
    named = []
    for layer in fused.layers:
        paths = fused.former_paths(layer)
        if any(matcher.matches(path) for path in paths) and not any(matcher.excluded(path) for path in paths):
            named.append(layer)
    missing = [layer for layer in fused.layers if layer not in named]
    if named and missing:
        raise TargetError(
            f"target_modules names {named[0]} of the experts and not {missing[0]}: they are fused into {fused.path}, "
            "so name both or none of them",
            path=fused.path,
        )
    return bool(named)


def _check_patterns(config: Any, fused: FusedLayers) -> None:
    """Refuses ranks and alphas for one of several layers that are one parameter now."""
    paths = [path for layer in fused.layers for path in fused.former_paths(layer)] if len(fused.layers) > 1 else []
    for field in config.pattern_fields:
        for key in getattr(config, field):
            pattern = re.compile(ENDING.format(key))
            if not pattern.match(fused.path) and any(pattern.match(path) for path in paths):
                raise ConfigError(
                    f"{field}: {key!r} names a part of {fused.path}; name {fused.name} instead", field=field, key=key
                )


def _add(resolved: Any, config: Any, fused: FusedLayers, name: str) -> None:
    names = list(resolved.target_parameters or ())
    if name in names:
        return
    resolved.target_parameters = [*names, name]
    count = len(fused.layers)
    if count > 1:
        pattern = rf".*\.{re.escape(name)}" if name == fused.name else re.escape(name)
        # By what a product is multiplied stays: alpha / r, or alpha / sqrt(r).
        alpha = config.lora_alpha * (math.sqrt(count) if config.use_rslora else count)
        resolved.rank_pattern = {**resolved.rank_pattern, pattern: config.r * count}
        resolved.alpha_pattern = {**resolved.alpha_pattern, pattern: alpha}


def _drop_former_names(resolved: Any, chosen: Sequence[FusedLayers], sites: Sequence[Site]) -> None:
    """Takes those targets out that mean parameters alone."""
    routers = {fused.module for fused in chosen if not fused.per_expert}
    matcher = Matcher(resolved.target_modules)
    matched = {site.path for site in sites if site.path not in routers and matcher.matches(site.path)}
    former = [path for fused in chosen for layer in fused.layers for path in fused.former_paths(layer)]
    if isinstance(resolved.target_modules, str):
        pattern = re.compile(resolved.target_modules)
        if not matched or any(map(pattern.fullmatch, routers)):
            resolved.target_modules = matched
    else:
        gone = {name for name in matcher.missing() if any(map(Matcher([name]).matches, former))}
        resolved.target_modules = set(resolved.target_modules) - gone
