"""Linear layers that transformers 5 fused into parameters: the experts of a mixture, and its router.

Older configs and files name the layers (``w1``, ``gate``, every ``mlp.experts.3.up_proj``). In transformers 5 the
weights of all experts are one parameter, with gate and up projection joined, and the router is a separate module with a
weight. A LoRA for such layers becomes one on the parameter; if two layers were joined its rank is the sum of theirs.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.engine.config.patterns import ENDING
from nbpeft.engine.config.targets import Matcher, is_all_linear, matches_segment_names
from nbpeft.engine.contract.registry import Method, method_of, resolve_backend, resolve_layer_kind
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.model_tree import Site, walk
from nbpeft.errors import ConfigError, TargetError

_ROUTER = "gate"
_EXPERT = re.compile(r"((?:^|\.)experts\.)(\d{1,5})\.")


@dataclass(frozen=True)
class FusedLayers:
    """A parameter into which former layers were fused.

    Attributes:
        module: path of the module with the parameter.
        name: name of the parameter in the module.
        layers: names of the former layers, in their order in the parameter.
        per_expert: whether every expert had these layers, in a submodule.
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
        """The name that matches the parameter in every block of the model: ``gate_up_proj``, ``gate.weight``."""
        return self.name if self.per_expert else f"{_ROUTER}.{self.name}"

    @property
    def former(self) -> list[str]:
        """``former_paths`` of all former layers."""
        return [path for layer in self.layers for path in self.former_paths(layer)]

    def former_paths(self, layer: str) -> tuple[str, ...]:
        """Paths under which a config may name a former layer: in the first expert, and in PEFT's patterns."""
        return (f"{self.module}.0.{layer}", f"{self.module}.{layer}") if self.per_expert else (self.module,)


def _fused_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Expert parameter that transformers fuses when it loads older files -> names of its former layers, in order."""
    found = {}
    for step in _conversions(model):
        sources, targets = step.source_patterns, step.target_patterns
        joins = hasattr(step, "operations")  # the other conversions only rename
        if joins and len(targets) == 1 and all(".*." in source for source in sources):
            module, _, name = targets[0].rpartition(".")
            layers = [source.removesuffix(".weight").rpartition(".*.") for source in sources]
            if all(before == module for before, _, _ in layers) and len(layers) <= 2:
                found[name] = tuple(layer for _, _, layer in layers)
    return found


def _conversions(model: nn.Module) -> list[Any]:
    """transformers' conversions for loading older files of a model."""
    if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    loose: Any = model
    return list(get_model_conversion_mapping(loose))


def renaming(model: nn.Module) -> Callable[[str], str] | None:
    """A function from a tensor's name in older files to its present name; None if transformers renames nothing."""
    steps = [step for step in _conversions(model) if not hasattr(step, "operations")]

    def rename(name: str) -> str:
        for step in steps:
            name, _ = step.rename_source_key(name)
        return name

    return rename if steps else None


def fused_layers(model: nn.Module, sites: Sequence[Site] | None = None) -> list[FusedLayers]:
    """Finds the parameters of a model that were linear layers.

    Args:
        model: the base model, with or without adapters.
        sites: sites of its modules; None to walk the model.

    Returns:
        The parameters in model order.
    """
    names = _fused_parameters(model)
    if not names:
        return []
    sites = list(walk(model)) if sites is None else sites
    return [fused for site in sites for fused in _in_module(site, sites, names)]


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


def of_former_file(model: nn.Module, config: Any, keys: Iterable[str]) -> Any:
    """Adapts the config of a file from before transformers 5: expert layers become parameters.

    Args:
        model: the base model.
        config: the config in the file.
        keys: keys of the file's tensors.

    Returns:
        A changed copy; ``config`` itself if no key belongs to an expert layer.
    """
    if not any("experts." in key and _EXPERT.search(key) for key in keys):
        return config
    made = config.copy()
    with_parameters(model, config, made, method_of(config), list(walk(model)), include_present=True)
    return made


def with_parameters(
    model: nn.Module,
    config: Any,
    resolved: Any,
    method: Method,
    sites: Sequence[Site],
    *,
    include_present: bool = False,
) -> None:
    """Replaces former layers in a config's targets with the parameters they were fused into, as PEFT does from 0.19 on.

    A name that present layers still have, such as those of shared experts, targets only these layers. "all-linear"
    includes the former layers. Parameters in ``target_parameters`` are not changed.

    Args:
        model: the base model.
        config: the config as given by the user.
        resolved: a copy with its targets as names or a pattern; changed in place.
        method: method of the config.
        sites: sites of the model's modules.
        include_present: also target parameters under names that present layers have.

    Raises:
        TargetError: only one of two joined layers is named, or only some of the experts.
        ConfigError: a rank or alpha pattern names one of several joined layers.
    """
    if not hasattr(config, "target_parameters") or "target_parameters" in config.not_implemented:
        return
    found = fused_layers(model, sites) if config.target_modules else []
    found = [fused for fused in found if not _is_copied(fused, config)]
    if not found:
        return
    if is_all_linear(config.target_modules):
        given = Matcher(resolved.target_parameters or ())
        new = [fused for fused in found if not given.matches(fused.path)]
        _take(resolved, config, _adaptable(new, config, resolved, method, sites), found)
        return
    matcher = Matcher(
        _present_names(model, config.target_modules, found, sites),
        config.exclude_modules,
        config.layers_to_transform,
        config.layers_pattern,
    )
    chosen = _chosen(matcher, resolved, found, set() if include_present else _leaves(matcher, sites))
    for fused in chosen:
        _check_patterns(config, fused)
    _take(resolved, config, chosen, found)
    _drop_former_names(resolved, model, found, sites)


def _is_copied(fused: FusedLayers, config: Any) -> bool:
    """Whether the module of a parameter, or a parent of it, is trained as a whole."""
    parts = fused.module.split(".")
    paths = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return any(matches_segment_names(path, config.modules_to_save or ()) for path in paths)


def _adaptable(
    found: Sequence[FusedLayers], config: Any, resolved: Any, method: Method, sites: Sequence[Site]
) -> list[FusedLayers]:
    """The parameters that are not excluded and that the config supports; warns about those left out."""
    modules = {site.path: site.module for site in sites}
    adapter_class = method.kinds.classes.get("parameter")
    matcher = Matcher(".*", config.exclude_modules)
    taken: list[FusedLayers] = []
    problems: dict[str, ConfigError] = {}
    for fused in found:
        view = ParameterView(modules[fused.module], fused.name)
        kind = resolve_layer_kind(view)
        if adapter_class is None or kind is None or resolve_backend(view) is None or _is_excluded(matcher, fused):
            continue
        try:
            _check_patterns(config, fused)
            adapter_class.parameter_shapes(resolved, fused.path, view, kind)
        except ConfigError as problem:
            problems.setdefault(fused.short_name, problem)
        else:
            taken.append(fused)
    for name, reason in problems.items():
        warnings.warn(f"target_modules='all-linear' does not adapt {name}: {reason}", stacklevel=6)
    return taken


def _is_excluded(matcher: Matcher, fused: FusedLayers) -> bool:
    """Whether a config excludes a parameter, or a layer that is a part of it."""
    return any(map(matcher.excluded, (fused.path, fused.module, *fused.former)))


def _chosen(matcher: Matcher, config: Any, found: Sequence[FusedLayers], leaves: Set[str]) -> list[FusedLayers]:
    """The parameters whose former layers a config names.

    Raises:
        TargetError: it names only some of the layers of a parameter.
    """
    given = Matcher(config.target_parameters or ())
    chosen = []
    for fused in found:
        if given.matches(fused.path) or _is_excluded(matcher, fused) or not leaves.isdisjoint(fused.layers):
            continue
        named = [layer for layer in fused.layers if any(map(matcher.matches, fused.former_paths(layer)))]
        missing = [layer for layer in fused.layers if layer not in named]
        if named and missing:
            raise TargetError(
                f"target_modules names {named[0]} of the experts and not {missing[0]}: they are fused into "
                f"{fused.path}, so name both or neither",
                path=fused.path,
            )
        chosen += [fused] if named else []
    return chosen


def _leaves(matcher: Matcher, sites: Sequence[Site]) -> set[str]:
    """Last parts of the paths of present layers that the targets match."""
    return {site.path.rpartition(".")[2] for site in sites if matcher.matches(site.path) and _is_layer(site)}


def _present_names(model: nn.Module, targets: Any, found: Sequence[FusedLayers], sites: Sequence[Site]) -> Any:
    """Targets with present module names, and the first expert instead of all experts.

    Raises:
        TargetError: the targets name only some of the experts.
    """
    if isinstance(targets, str):
        return targets
    numbers: dict[str, set[int]] = {}
    present = _present(model, targets)
    for former, name in present.items():
        match = _EXPERT.search(former)
        if match is not None:
            numbers.setdefault(name, set()).add(int(match[2]))
    modules: dict[str, Any] = {site.path: site.module for site in sites}
    for name, some in numbers.items():
        fused = next((fused for fused in found if any(map(Matcher([name]).matches, fused.former))), None)
        count = len(some) if fused is None else len(modules[fused.module]._parameters[fused.name])
        if fused is not None and some != set(range(count)):
            raise TargetError(
                f"target_modules names {len(some)} of {count} experts: they are one parameter now, {fused.path}, so "
                "name all or none",
                path=fused.path,
            )
    return set(present.values())


def _present(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in a config -> present name, with the first expert instead of any expert."""
    rename = renaming(model) or str
    return {name: _EXPERT.sub(r"\g<1>0.", rename(f".{name}").removeprefix(".")) for name in names}


def _check_patterns(config: Any, fused: FusedLayers) -> None:
    """Raises ConfigError if a rank or alpha is set for only one of the layers joined in a parameter."""
    paths = fused.former if len(fused.layers) > 1 else []
    for field in config.pattern_fields:
        for key in getattr(config, field):
            pattern = re.compile(ENDING.format(key))
            if not pattern.match(fused.path) and any(pattern.match(path) for path in paths):
                raise ConfigError(
                    f"{field}: {key!r} names a part of {fused.path}; name {fused.name} instead", field=field, key=key
                )


def _take(resolved: Any, config: Any, chosen: Sequence[FusedLayers], found: Sequence[FusedLayers]) -> None:
    """Adds parameters to a config, by short name if it matches no others, with the sum of the layers' ranks."""
    for short in dict.fromkeys(fused.short_name for fused in chosen):
        group = [fused for fused in chosen if fused.short_name == short]
        is_unique = len(group) == sum(fused.short_name == short for fused in found)
        names = [short] if is_unique else [fused.path for fused in group]
        resolved.target_parameters = [*(resolved.target_parameters or ()), *names]
        count = len(group[0].layers)
        if count == 1:
            continue
        # The scaling must not change when the rank is multiplied: alpha / r, or alpha / sqrt(r) with rsLoRA.
        alpha = config.lora_alpha * (math.sqrt(count) if config.use_rslora else count)
        patterns = [rf".*\.{re.escape(name)}" if is_unique else re.escape(name) for name in names]
        resolved.rank_pattern = {**resolved.rank_pattern, **dict.fromkeys(patterns, config.r * count)}
        resolved.alpha_pattern = {**resolved.alpha_pattern, **dict.fromkeys(patterns, alpha)}


def _drop_former_names(resolved: Any, model: nn.Module, found: Sequence[FusedLayers], sites: Sequence[Site]) -> None:
    """Removes targets that match only former layers."""
    routers = {fused.module for fused in found if not fused.per_expert}
    matcher = Matcher(resolved.target_modules)
    matched = {site.path for site in sites if site.path not in routers and matcher.matches(site.path)}
    former = [path for fused in found for path in fused.former]
    if isinstance(resolved.target_modules, str):
        pattern = re.compile(resolved.target_modules)
        if any(map(pattern.fullmatch, (*former, *routers))):
            resolved.target_modules = matched
        return
    present = _present(model, matcher.missing())
    fused_names = {name for name, now in present.items() if any(map(Matcher([now]).matches, former))}
    resolved.target_modules = set(resolved.target_modules) - fused_names
