"""What a config would do to a model, before it does it.

``plan`` changes nothing and needs no memory: it works on a model of meta tensors too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import nbpeft.engine.backends
import nbpeft.engine.hosts
import nbpeft.engine.methods  # noqa: F401
from nbpeft.engine.adapter import TASK_HEADS, Adapter, AdapterConfig, Backend, Host, TaskType
from nbpeft.engine.copies import CopiedModule, only_holds
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.lora_config import suffixes
from nbpeft.engine.model_tree import Site, bare_modules, embedding_of, frozen_module, walk
from nbpeft.engine.registry import Method, method_of, resolve_backend, resolve_host
from nbpeft.engine.remarks import guessed_heads, remark, warn_of_experts, warn_of_tied, without_head
from nbpeft.engine.targets import (
    ALL_LINEAR,
    Matcher,
    default_targets,
    matches_segment_names,
    no_match,
    nothing_matches,
)
from nbpeft.engine.token_rows import TokenRows, TokenRowsConfig
from nbpeft.engine.tokens import token_rows
from nbpeft.engine.unadaptable import bypassed, check_called, check_copy, check_shaped
from nbpeft.errors import ConfigError, LayerKindError, TargetError

_LARGEST = 10**8
"""Parameters up to which an adapter may be larger than its model: tiny models try large ranks."""
_CLASSIFIER_HEADS = TASK_HEADS[TaskType.SEQ_CLS]


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter.

    Attributes:
        path: where it is in the base model.
        host: name of its kind.
        backend: name of how its weight is stored.
        in_features: input features.
        out_features: output features.
        shapes: parameter name -> shape of what is added.
        rows: rows of the weight that are trained, where it is not the config's method that acts here.
        tied_to: path of the target whose tensors this one shares; else empty.
    """

    path: str
    host: str
    backend: str
    in_features: int
    out_features: int
    shapes: dict[str, tuple[int, ...]]
    rows: tuple[int, ...] = ()
    tied_to: str = ""

    @property
    def parameter_count(self) -> int:
        """Parameters added here."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class InjectionPlan:
    """The whole of it.

    Attributes:
        method: label of the method.
        config: a copy of the config with its targets resolved.
        targets: what gets an adapter, in model order.
        copies: paths of modules trained as a whole, with their parameter counts.
        biases: names of base parameters trained along.
        excluded: paths that the targets name and ``exclude_modules`` takes out.
        missing: targets that match nothing.
    """

    method: str
    config: AdapterConfig
    targets: tuple[Target, ...]
    copies: dict[str, int]
    biases: tuple[str, ...]
    excluded: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the targets."""
        return tuple(target.path for target in self.targets)

    @property
    def parameter_count(self) -> int:
        """Parameters added: adapters and copies."""
        return sum(target.parameter_count for target in self.targets) + sum(self.copies.values())

    def byte_count(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the added parameters in a dtype."""
        return self.parameter_count * dtype.itemsize


def plan(
    model: nn.Module, config: AdapterConfig, *, allow_missing: bool = True, replacing: str | None = None
) -> InjectionPlan:
    """Works out what a config means for a model.

    Args:
        model: the base model, with or without adapters on it; meta tensors will do.
        config: the config of any registered method.
        allow_missing: warn about targets that match nothing, as long as others match; without
            it that is an error.
        replacing: an adapter on it whose place the new one takes.

    Raises:
        TargetError: nothing matches, a target cannot be adapted, or something is missing.
        ConfigError: a value of the config is impossible for a layer.
    """
    method = method_of(config)
    sites = [replace(site, wrapper=None) if only_holds(site.wrapper, replacing) else site for site in walk(model)]
    check_shaped([("the model", model), *((site.path, site.module) for site in sites)])
    resolved = _resolve_targets(model, config, sites)
    names = list(getattr(resolved, "modules_to_save", None) or ())
    copies = _copies(sites, names, guessed_heads(config), strict=not allow_missing)
    matcher = Matcher(
        getattr(resolved, "target_modules", None) or (),
        getattr(resolved, "exclude_modules", None),
        getattr(resolved, "layers_to_transform", None),
        getattr(resolved, "layers_pattern", None),
    )
    targets, excluded = _match(model, sites, matcher, resolved, tuple(copies))
    adapted = {target.path for target in targets}
    tokens = _token_targets(model, resolved, sites, adapted | copies.keys())
    if not targets and not ((copies or tokens) and not matcher.targets):
        raise nothing_matches(matcher, excluded, adaptable_paths(sites))
    missing = matcher.missing()
    if missing:
        problem = no_match(missing, adaptable_paths(sites))
        if not allow_missing:
            raise problem
        warnings.warn(str(problem), stacklevel=3)
    idle = matcher.excludes_none_of(site.path for site in sites)
    modules = [(site.path, site.module) for site in sites if site.path in adapted]
    remark(resolved, modules, strict=not allow_missing, idle_exclusion=idle)
    _check_size(model, (*targets, *tokens))
    warn_of_tied(model, [(site.path, site.module) for site in sites], adapted | copies.keys())
    biases = _biases(model, resolved, adapted, tuple(copies))
    return InjectionPlan(method.label, resolved, (*targets, *tokens), copies, biases, tuple(excluded), missing)


def _check_size(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuses an adapter of a size that can only be a mistake: many times the model itself."""
    size = sum(math.prod(shape) for target in targets for shape in target.shapes.values())
    if size > _LARGEST and size > 10 * sum(parameter.numel() for parameter in model.parameters()):
        raise ConfigError(f"the adapter would have {size:,} parameters, many times the model's: is the rank right?")


def _resolve_targets(model: nn.Module, config: AdapterConfig, sites: list[Site]) -> AdapterConfig:
    """A copy of the config whose targets are names or a pattern."""
    resolved = config.copy()
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        resolved.target_modules = set(_all_linear(model, config, sites))  # type: ignore[attr-defined]
        warn_of_experts(model)
    elif targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        found = default_targets(model_type)
        if found is None:
            names = sorted({path.rsplit(".", 1)[-1] for path in adaptable_paths(sites)})
            raise TargetError(
                f"Please specify `target_modules`: there is no default for model type {model_type!r}. "
                f"The model has: {', '.join(names)}",
                model_type=model_type,
            )
        resolved.target_modules = set(found) if isinstance(found, list) else found  # type: ignore[attr-defined]
    return resolved


def _all_linear(model: nn.Module, config: AdapterConfig, sites: list[Site]) -> list[str]:
    """Full paths of all linear layers but the output head."""
    heads: list[nn.Module] = []
    output_head = embedding_of(model, output=True)
    if output_head is not None:
        heads.append(frozen_module(output_head))
    elif config.task_type == TaskType.SEQ_CLS:
        heads.extend(frozen_module(getattr(model, name)) for name in _CLASSIFIER_HEADS if hasattr(model, name))
    found = []
    for site in sites:
        host = resolve_host(site.module)
        linear = host is not None and host.multiplies and 0 not in host.features(site.module)
        if linear and not any(site.module is head for head in heads) and not bypassed(model, site.path):
            found.append(site.path)
    return found


def _copies(sites: list[Site], names: list[str], heads: Sequence[str], *, strict: bool) -> dict[str, int]:
    """Paths of modules trained as a whole; ``heads`` are names that may have been guessed."""
    if not names:
        return {}
    wanted = set(names)
    found = {
        site.path: sum(parameter.numel() for parameter in site.module.parameters())
        for site in sites
        if matches_segment_names(site.path, wanted)
    }
    matched = {suffix for path in found for suffix in suffixes(path)}
    missing = [name for name in names if name not in matched]
    if missing and not (found and set(missing) <= set(_CLASSIFIER_HEADS)):
        problem = no_match(missing, [site.path for site in sites], what="modules_to_save")
        guessed = set(missing) <= set(heads)
        if strict or not (found or guessed):
            raise problem
        warnings.warn(without_head(missing) if guessed else str(problem), stacklevel=4)
    for site in sites:
        if site.path in found:
            check_copy(site.path, site.module, site.wrapper)
    inner = {path for path in found if any(path.startswith(f"{outer}.") for outer in found)}
    return {path: count for path, count in found.items() if path not in inner}


def _match(
    model: nn.Module, sites: list[Site], matcher: Matcher, config: AdapterConfig, copies: tuple[str, ...]
) -> tuple[list[Target], list[str]]:
    method = method_of(config)
    targets: list[Target] = []
    excluded: list[str] = []
    inside = tuple(f"{path}." for path in copies)
    seen: set[int] = set()
    for site in sites:
        path = site.path
        if not matcher.matches(path) or id(site.module) in seen:
            continue
        seen.add(id(site.module))
        if matcher.excluded(path) or path in copies or (inside and path.startswith(inside)):
            excluded.append(path)
            continue
        if isinstance(site.wrapper, CopiedModule):
            raise TargetError(f"{path} is trained as a whole by another adapter (modules_to_save); exclude it")
        check_called(model, path)
        targets.append(_target(site, config, method))
    return targets, excluded


def _token_targets(model: nn.Module, config: AdapterConfig, sites: list[Site], taken: Set[str]) -> list[Target]:
    """Modules of which a config trains rows, those that share their weights behind them."""
    rows = token_rows(model, config, [(site.path, site.module) for site in sites])
    targets: list[Target] = []
    for site in sites:
        wanted = rows.get(site.path)
        if wanted is None:
            continue
        if site.path in taken or isinstance(site.wrapper, CopiedModule):
            what = "adapted or trained as a whole already"
            raise LayerKindError(f"{site.path} is {what}; its rows cannot be trained too (trainable_token_indices)")
        host, backend = resolve_parts(site)
        shapes = (
            {}
            if wanted.tied_to
            else TokenRows.parameter_shapes(TokenRowsConfig(wanted.indices), site.path, site.module, host)
        )
        features = host.features(site.module)
        targets.append(Target(site.path, host.name, backend.name, *features, shapes, wanted.indices, wanted.tied_to))
    return sorted(targets, key=lambda target: bool(target.tied_to))


def make_adapters(
    plan: InjectionPlan, create: Callable[[type[Adapter], Any, Target], Adapter]
) -> list[tuple[Target, Adapter]]:
    """The adapter of each target, in the plan's order.

    Args:
        plan: the plan.
        create: makes one, of a class, with the config that class takes.
    """
    usual = method_of(plan.config).adapter_class
    made: dict[str, tuple[Target, Adapter]] = {}
    for target in plan.targets:
        kind: type[Adapter] = TokenRows if target.rows else usual
        adapter = create(kind, TokenRowsConfig(target.rows) if target.rows else plan.config, target)
        made[target.path] = target, adapter
        if target.tied_to:
            adapter.follow(made[target.tied_to][1])
    return list(made.values())


def _target(site: Site, config: AdapterConfig, method: Method) -> Target:
    host, backend = resolve_parts(site)
    shapes = method.adapter_class.parameter_shapes(config, site.path, site.module, host)
    in_features, out_features = host.features(site.module)
    return Target(site.path, host.name, backend.name, in_features, out_features, shapes)


def resolve_parts(site: Site) -> tuple[Host, Backend]:
    """Host and backend of the module at a site.

    Raises:
        TargetError: the module cannot be adapted.
    """
    if isinstance(site.wrapper, AdaptedLayer):
        return site.wrapper.host, site.wrapper.backend
    host, backend = resolve_host(site.module), resolve_backend(site.module)
    if host is None or backend is None:
        raise TargetError(
            f"{site.path} is a {type(site.module).__name__}, which cannot be adapted "
            f"(target module is not supported); name its linear layers or exclude it",
            path=site.path,
            kind=type(site.module).__name__,
        )
    return host, backend


def adaptable_paths(sites: list[Site]) -> list[str]:
    """Paths of all modules that could be adapted."""
    return [site.path for site in sites if resolve_host(site.module) and resolve_backend(site.module)]


def _biases(model: nn.Module, config: AdapterConfig, adapted: Set[str], copies: Sequence[str]) -> tuple[str, ...]:
    """Names (in the bare base model) of base biases that train along; those of copied modules do in the copy."""
    kind = getattr(config, "bias", "none")
    if kind == "none":
        return ()
    copied = tuple(f"{path}." for path in copies)
    return tuple(
        f"{path}.bias" if path else "bias"
        for path, module in bare_modules(model)
        if isinstance(module._parameters.get("bias"), nn.Parameter)
        and (kind == "all" or path in adapted)
        and not f"{path}.".startswith(copied)
    )
