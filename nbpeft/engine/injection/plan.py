"""Plans what applying a config will change in a model.

``plan`` changes nothing and allocates nothing, so it works with a model on the meta device too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import nbpeft.engine.backends
import nbpeft.engine.layer_kinds
import nbpeft.engine.methods  # noqa: F401
from nbpeft.engine.config.default_targets import default_targets
from nbpeft.engine.config.module_paths import suffixes
from nbpeft.engine.config.targets import (
    Matcher,
    condensed_if_many,
    is_all_linear,
    matches_segment_names,
    no_match,
    nothing_matches,
    with_target,
)
from nbpeft.engine.contract.adapter import (
    TASK_HEADS,
    Adapter,
    AdapterConfig,
    HasFixedTensors,
    TaskType,
    TiedAdapter,
)
from nbpeft.engine.contract.base import Backend, LayerKind, Shape
from nbpeft.engine.contract.registry import (
    Method,
    companions,
    composite_kind,
    method_of,
    resolve_backend,
    resolve_layer_kind,
)
from nbpeft.engine.injection.config_warnings import (
    guessed_heads,
    missing_head_message,
    warn_about_config,
    warn_of_both,
    warn_of_ensured,
    warn_of_experts,
    warn_of_experts_along,
    warn_of_tied,
    warn_of_uncalled,
)
from nbpeft.engine.injection.custom_layers import CustomAdapter, custom_part, kind_and_backend, probed_shapes
from nbpeft.engine.injection.injection_checks import bypassed, check_called, check_copy, check_shaped, check_shapes
from nbpeft.engine.injection.injection_plan import Extent, InjectionPlan, Target
from nbpeft.engine.injection.redirects import redirected
from nbpeft.engine.injection.replication import pending_replication, replicated
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.fused_layers import fused_layers, with_parameters
from nbpeft.engine.tree.model_tree import (
    Site,
    bare_modules,
    embedding_of,
    frozen_module,
    parameter_counts,
    reader_of,
    sharing_embedding,
    walk,
)
from nbpeft.engine.tree.parameter_targets import no_parameter, parameter_sites
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper, only_holds
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter
from nbpeft.errors import ConfigError, LayerKindError, PeftWarning, TargetError

_LARGEST = 10**8
"""Adapters with at most this many values are never refused as too large; tiny test models may have large ranks."""
_CLASSIFIER_HEADS = TASK_HEADS[TaskType.SEQ_CLS]


def plan(
    model: nn.Module,
    config: AdapterConfig,
    *,
    allow_missing: bool = True,
    replacing: str | None = None,
    is_new: bool = True,
) -> InjectionPlan:
    """Plans what adding an adapter will change in a model.

    Args:
        model: the base model, with or without adapters, also on the meta device.
        config: config of any registered method.
        allow_missing: only warn about targets that match nothing, if others match; False to raise an error.
        replacing: name of an adapter on the model that the new one replaces.
        is_new: whether the user wrote the config; False if it comes from a file or an adapter on the model.

    Returns:
        The plan.

    Raises:
        TargetError: nothing matches, a target cannot be adapted, or a target is missing.
        ConfigError: a value of the config is invalid for a layer.
    """
    method = method_of(config)
    options: dict[str, Any] = {"allow_missing": allow_missing, "replacing": replacing, "is_new": is_new}
    config = config.on_model(model, lambda other: plan(model, other, **options))
    model = model if (layer_map := pending_replication(model, config)) is None else replicated(model, layer_map)
    sites = [site._replace(wrapper=None) if only_holds(site.wrapper, replacing) else site for site in walk(model)]
    check_shaped([("the model", model), *((site.path, site.module) for site in sites)])
    resolved = _resolve_targets(model, config, method, sites)
    resolved.fill_in(_model_type(model))
    if method.transforms_calls:
        return _plan_for_calls(model, resolved, method, sites, strict=not allow_missing)
    matcher = _matcher_of(resolved, method)
    copies = _copies(sites, resolved, guessed_heads(config), matcher, strict=not allow_missing)
    tied = _tied_modules(model, config, sites)
    copies |= _tied_copies(copies, tied, sites)
    targets, excluded = _match(model, sites, matcher, resolved, tuple(copies), replacing)
    targets = _add_tied(targets, tied, sites, matcher, resolved)
    features = {target.path: (target.in_features, target.out_features) for target in targets}
    if resolved.fill_in_layers(features):
        targets, excluded = _match(model, sites, matcher, resolved, tuple(copies), replacing)
    _set_layout(resolved, targets)
    if method.shares.tied is not None:
        ties = method.shares.tied(resolved, features)
        targets = [replace(target, tied=ties.get(target.path, {})) for target in targets]
    adapted = {target.path for target in targets}
    named = Matcher(getattr(resolved, "target_parameters", None) or ())
    bare = parameter_sites(model, sites, named, adapted, tuple(copies)) if named.targets else []
    targets += [_parameter_target(site, resolved, method) for site in bare]
    parts = _companion_targets(model, resolved, sites, adapted | copies.keys())
    if not targets and not ((copies or parts) and not matcher.targets):
        if named.targets and not matcher.targets:
            raise no_parameter(named.missing(), sites)
        raise nothing_matches(matcher, excluded, adaptable_paths(sites))
    missing = (*matcher.missing(), *named.missing())
    _warn_of_unmatched(matcher, named, sites, strict=not allow_missing)
    if is_new:  # a stored config lists the modules that "all-linear" matched, and heads are among them
        warn_of_both(config)
    unused_exclude = _excludes_nothing(matcher, model, sites)
    modules = [(site.path, site.module) for site in (*sites, *bare) if site in bare or site.path in adapted]
    warn_about_config(resolved, method.adapter_class, modules, strict=not allow_missing, unused_exclude=unused_exclude)
    warn_of_uncalled([site for site in sites if site.path in adapted], adapted)
    if bare and is_all_linear(getattr(config, "target_modules", None)) and not config.target_parameters:  # type: ignore[attr-defined]
        warn_of_experts_along([(target.matrix_count, target.parameter_count) for target in targets])
    shared = {} if method.shares.state is None else method.shares.state.tensor_shapes(resolved, features)
    _check_size(model, (*targets, *parts), shared)
    _warn_of_ties(model, config, sites, tied, adapted | copies.keys(), parts)
    biases = _biases(model, resolved, adapted, tuple(copies))
    everywhere = (*targets, *parts)
    _check_has_tensors(resolved, everywhere, [*shared, *copies, *biases])
    made = InjectionPlan(method.label, resolved, everywhere, copies, biases, tuple(excluded), missing, shared, features)
    return replace(made, other_paths=_other_paths(made.module_paths, sites))


def _matcher_of(config: AdapterConfig, method: Method) -> Matcher:
    """The matcher of the layers that a config targets; a method that accompanies others targets none itself."""
    return Matcher(
        () if method.shares.companion is not None else getattr(config, "target_modules", None) or (),
        getattr(config, "exclude_modules", None),
        getattr(config, "layers_to_transform", None),
        getattr(config, "layers_pattern", None),
    )


def _excludes_nothing(matcher: Matcher, model: nn.Module, sites: list[Site]) -> bool:
    """Whether ``exclude_modules`` matches no module, not even by the path that a fused layer had."""
    former = fused_layers(model, sites) if matcher.exclude else []
    known = (*(site.path for site in sites), *(path for one in former for path in (one.path, *one.former)))
    return matcher.excludes_none_of(known)


def _set_layout(config: AdapterConfig, targets: Sequence[Target]) -> None:
    """Sets ``fan_in_fan_out`` to the layout of the last target with a matrix, as PEFT does, for those who read it."""
    layouts = [target.kind == "conv1d" for target in targets if target.kind in ("linear", "conv1d")]
    if not layouts or not isinstance(given := getattr(config, "fan_in_fan_out", None), bool):
        return
    config.fan_in_fan_out = layouts[-1]  # type: ignore[attr-defined]
    if given and not any(layouts):
        warnings.warn("fan_in_fan_out is set to False: the layers store their weight as (out, in)", stacklevel=4)


def _warn_of_ties(
    model: nn.Module,
    config: AdapterConfig,
    sites: list[Site],
    tied: Mapping[str, nn.Module],
    changed: Set[str],
    parts: list[Target],
) -> None:
    """Warns if only some users of a shared weight are changed, and if tying is requested but has no effect."""
    if getattr(config, "ensure_weight_tying", False):
        warn_of_ensured(tied, changed | {part.path for part in parts})
    if not tied:
        apart = {part.path for part in parts if not part.tied_to} - {part.tied_to for part in parts}
        warn_of_tied(model, [(site.path, site.module) for site in sites], changed | apart, config)


def _warn_of_unmatched(matcher: Matcher, named: Matcher, sites: list[Site], *, strict: bool) -> None:
    """Raises the error for names of modules or of parameters that match nothing, or warns of it if not strict."""
    problems = [no_match(matcher.missing(), adaptable_paths(sites))] if matcher.missing() else []
    problems += [no_parameter(named.missing(), sites)] if named.missing() else []
    for problem in problems:
        if strict:
            raise problem
        warnings.warn(str(problem), RuntimeWarning, stacklevel=4)


def _plan_for_calls(
    model: nn.Module, config: AdapterConfig, method: Method, sites: list[Site], *, strict: bool
) -> InjectionPlan:
    """The plan of an adapter that changes calls of the whole model; it is stored on the input embedding.

    In a model without one, an adapter that does not need it is stored on the first layer.
    """
    adapter_class: Any = method.adapter_class
    embedding = site = _embedding_site(model, sites)
    if site is None and not adapter_class.needs_embedding:
        first = next(iter(adaptable_paths(sites)), None)
        site = next((one for one in sites if one.path == first), None)
    if site is None or isinstance(site.wrapper, ModulesToSaveWrapper):
        why = (
            "is trained as a whole by another adapter"
            if site is not None
            else "was not found: get_input_embeddings() names none, and no embedding has config.vocab_size rows"
        )
        raise TargetError(f"{method.label} needs the input embedding of {type(model).__name__}, which {why}")
    kind, _ = resolve_parts(site, method)
    config.fill_in_sizes(model, 0 if embedding is None else kind.features(site.module)[1])
    adapter_class.check_model(config, model)
    copies = _copies(sites, config, guessed_heads(config), Matcher(()), strict=strict)
    target = _target(site, config, method)
    warn_about_config(config, method.adapter_class, [(site.path, site.module)], strict=strict)
    _check_size(model, [target], {})
    made = InjectionPlan(method.label, config, (target,), copies, {}, (), ())
    return replace(made, other_paths=_other_paths(made.module_paths, sites))


def _other_paths(paths: Sequence[str], sites: Iterable[Site]) -> dict[str, tuple[str, ...]]:
    """Path -> other paths of the same module; only for modules that are in several places."""
    places: dict[int, list[str]] = {}
    modules: dict[str, int] = {}
    for site in sites:
        places.setdefault(id(site.module), []).append(site.path)
        modules[site.path] = id(site.module)
    shared = ((path, places[modules[path]]) for path in paths if len(places[modules[path]]) > 1)
    return {path: tuple(other for other in found if other != path) for path, found in shared}


def _embedding_site(model: nn.Module, sites: Sequence[Site]) -> Site | None:
    """The site of ``get_input_embeddings()``, or of the first embedding with ``vocab_size`` rows."""
    embedding = embedding_of(model)
    if embedding is not None:
        return next((site for site in sites if site.module is frozen_module(embedding)), None)
    config = getattr(model, "config", None)
    rows = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    tables = (site for site in sites if isinstance(site.module, nn.Embedding))
    return next((site for site in tables if site.module.num_embeddings == rows), None)


def _check_size(model: nn.Module, targets: Sequence[Target], shared: Mapping[str, Shape]) -> None:
    """Raises ConfigError if the adapter is more than ten times as large as the model, which can only be a mistake."""
    shapes = [*shared.values(), *(shape for target in targets for shape in target.saved_shapes.values())]
    size = sum(map(math.prod, shapes)) + sum(target.unsaved for target in targets)
    if size > _LARGEST and size > 10 * parameter_counts(model)[1]:
        raise ConfigError(
            f"the adapter would have {size:,} values, more than ten times as many as the model: check the sizes in "
            "its config"
        )


def _check_has_tensors(config: AdapterConfig, targets: Sequence[Target], others: Sequence[str]) -> None:
    """Raises ConfigError if the adapter has no tensors, on its targets or among ``others``, although it should."""
    method = method_of(config)
    if not targets or others or any(target.saved_shapes for target in targets) or not method.files.has_tensors:
        return
    more = f" and {len(targets) - 1} more layers" if len(targets) > 1 else ""
    raise ConfigError(
        f"{method.title(config)} with these settings has no parameters on {targets[0].path}{more}: nothing would be "
        "trained; change them, or name other layers"
    )


def _resolve_targets(model: nn.Module, config: AdapterConfig, method: Method, sites: list[Site]) -> AdapterConfig:
    """A copy of the config whose targets are names or a pattern."""
    resolved = config.copy()
    targets = getattr(config, "target_modules", None)
    if targets is None and method.shares.companion is None and not method.transforms_calls:
        model_type = _model_type(model)
        targets = default_targets(method, model_type)
        if targets is None and getattr(config, "target_parameters", None):
            return resolved
        if targets is None:
            names = sorted({path.rsplit(".", 1)[-1] for path in adaptable_paths(sites)})
            raise TargetError(
                f"Please specify `target_modules`: there is no default for model type {model_type!r}. "
                f"The model has: {', '.join(names)}",
                model_type=model_type,
            )
        resolved.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[attr-defined]
    if is_all_linear(targets):
        resolved.target_modules = set(_all_linear(model, config, sites))  # type: ignore[attr-defined]
    with_parameters(model, config, resolved, method, sites)
    chosen = config.condenses_targets and getattr(config, "layers_to_transform", None) is not None
    if chosen or method.shares.tied is not None:  # these depend on the names in target_modules, as in PEFT
        paths = (path for path, _ in bare_modules(model, repeat=True) if path)
        resolved.target_modules = condensed_if_many(resolved.target_modules, paths)  # type: ignore[attr-defined]
    if is_all_linear(targets) and not method.kinds.linear:
        warnings.warn(
            f"target_modules='all-linear' makes {method.label} train linear layers, which it is not meant for: leave "
            "target_modules out for its own layers",
            PeftWarning,
            stacklevel=4,
        )
    if is_all_linear(targets) and not getattr(config, "target_parameters", None):
        warn_of_experts(model, config, Matcher(getattr(resolved, "target_parameters", None) or ()).matches)
    return resolved


def _model_type(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    found: str | None = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return found


def _all_linear(model: nn.Module, config: AdapterConfig, sites: list[Site]) -> list[str]:
    """Full paths of all linear layers except the output head."""
    heads: list[nn.Module] = []
    output_head = embedding_of(model, output=True)
    if output_head is not None:
        heads.append(frozen_module(output_head))
    elif config.task_type == TaskType.SEQ_CLS:
        heads.extend(frozen_module(getattr(model, name)) for name in _CLASSIFIER_HEADS if hasattr(model, name))
    heads.extend(_tied_modules(model, config, sites).values())  # also heads that the model does not name
    found = []
    for site in sites:
        kind = resolve_layer_kind(site.module)
        linear = kind is not None and kind.is_linear and 0 not in kind.features(site.module)
        if linear and not any(site.module is head for head in heads) and not bypassed(model, site.path):
            found.append(site.path)
    return found


def _copies(
    sites: list[Site], config: AdapterConfig, heads: Sequence[str], matcher: Matcher, *, strict: bool
) -> dict[str, Extent]:
    """Path -> size of each module trained as a whole; ``heads`` are names that the task added, not the user."""
    names = list(getattr(config, "modules_to_save", None) or ())
    if not names:
        return {}
    wanted = set(names)
    ending = tuple(wanted.intersection(heads))  # DistilBERT's pre_classifier is a part of the head, too
    found = {
        site.path: Extent.of(site.module.parameters())
        for site in sites
        if matches_segment_names(site.path, wanted)
        or (ending and site.path.endswith(ending) and not matcher.matches(site.path))
    }
    matched = {suffix for path in found for suffix in suffixes(path)}
    missing = [name for name in names if name not in matched]
    if missing and not (found and set(missing) <= set(_CLASSIFIER_HEADS)):
        problem = no_match(missing, [site.path for site in sites], what="modules_to_save")
        guessed = set(missing) <= set(heads)
        if strict or not (found or guessed):
            raise problem
        warnings.warn(missing_head_message(missing) if guessed else str(problem), stacklevel=4)
    for site in sites:
        if site.path in found:
            check_copy(site.path, site.module, site.wrapper)
    inner = {path for path in found if any(path.startswith(f"{outer}.") for outer in found)}
    return {path: extent for path, extent in found.items() if path not in inner}


def _tied_modules(model: nn.Module, config: AdapterConfig, sites: list[Site]) -> dict[str, nn.Module]:
    """Path -> module of the input embedding and the modules that share its weight, with ``ensure_weight_tying``."""
    if not getattr(config, "ensure_weight_tying", False):
        return {}
    return sharing_embedding(model, ((site.path, site.module) for site in sites))


def _tied_copies(copies: Mapping[str, Extent], tied: Mapping[str, nn.Module], sites: list[Site]) -> dict[str, Extent]:
    """The modules copied because a module with the same weight is; they share its tensors, so their size is zero."""
    copied = {id(site.module) for site in sites if site.path in copies}
    if not any(id(module) in copied for module in tied.values()):
        return {}
    return {path: Extent() for path, module in tied.items() if id(module) not in copied}


def _add_tied(
    targets: list[Target], tied: Mapping[str, nn.Module], sites: list[Site], matcher: Matcher, config: AdapterConfig
) -> list[Target]:
    """Extends a target on one of the tied modules to all of them; the adapters share the first one's tensors."""
    modules = {id(module) for module in tied.values()}
    places = {site.path for site in sites if id(site.module) in modules}
    if places.isdisjoint(target.path for target in targets):
        return targets
    source, *others = [next(site for site in sites if site.path == path) for path in tied]
    method, refusal = method_of(config), _tie_refusal([source, *others], matcher, config)
    if refusal or method.shares.tied_class is None:
        raise ConfigError(
            f"ensure_weight_tying: {' and '.join(tied)} share one weight, and {refusal}; remove all of them from the "
            "targets",
            field="ensure_weight_tying",
        )
    tied_class = method.shares.tied_class(config, list(tied))
    for path in tied:
        if not matcher.matches(path):  # PEFT ties modules by its fixed names of embeddings and heads
            config.target_modules = with_target(config.target_modules, path)  # type: ignore[attr-defined]
    order = {site.path: number for number, site in enumerate(sites)}
    own = [_target(source, config, method), *(target for target in targets if target.path not in places)]
    own.sort(key=lambda target: order[target.module_path])
    return own + [_target(site, config, method, tied_to=source.path, adapter_class=tied_class) for site in others]


def _tie_refusal(sites: Sequence[Site], matcher: Matcher, config: AdapterConfig) -> str:
    """Why adapters at these places cannot share their tensors, as part of a sentence; otherwise empty."""
    for site in sites:
        if matcher.excluded(site.path):
            return f"exclude_modules excludes {site.path}"
        if isinstance(site.wrapper, ModulesToSaveWrapper):
            return f"{site.path} is trained as a whole by another adapter (modules_to_save)"
        if custom_part(site.module, site.wrapper, config, site.path) is not None:
            return f"{site.path} has a custom layer"
    method = method_of(config)
    return "" if method.shares.tied_class is not None else f"adapters of {method.title(config)} cannot share tensors"


def _match(
    model: nn.Module,
    sites: list[Site],
    matcher: Matcher,
    config: AdapterConfig,
    copies: tuple[str, ...],
    name: str | None,
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
        if isinstance(site.wrapper, ModulesToSaveWrapper):
            raise TargetError(f"{path} is trained as a whole by another adapter (modules_to_save); exclude it")
        check_called(model, path)
        if (chosen := redirected(model, config, name, site, sites)) is None:
            excluded.append(path)
            continue
        site, path = chosen, chosen.path
        seen.add(id(site.module))
        kind = composite_kind(site.module)
        if kind is not None and custom_part(site.module, site.wrapper, config, path) is None:
            targets += _composite_targets(site, sites, kind, config, method)
            seen.update(id(other.module) for other in sites if reader_of(other) is site.module)
        else:
            targets.append(_target(site, config, method))
    return targets, excluded


def _companion_targets(model: nn.Module, config: AdapterConfig, sites: list[Site], taken: Set[str]) -> list[Target]:
    """The targets of companion methods that the config requests (token rows); those tied to others come last."""
    targets: list[Target] = []
    for method in companions():
        assert method.shares.companion is not None
        parts = method.shares.companion(model, config, [(site.path, site.module) for site in sites])
        for site in sites:
            part = parts.get(site.path)
            if part is None:
                continue
            if site.path in taken or isinstance(site.wrapper, ModulesToSaveWrapper):
                raise LayerKindError(
                    f"{site.path} is already adapted or trained as a whole and cannot be in "
                    f"{method.shares.companion.field} too"
                )
            targets.append(_target(site, part.config, method, tied_to=part.tied_to))
    return sorted(targets, key=lambda target: bool(target.tied_to))


def make_adapters(plan: InjectionPlan, create: Callable[[Target], Adapter]) -> list[tuple[Target, Adapter]]:
    """Creates the adapter of each target, and ties those that share tensors.

    Args:
        plan: the plan.
        create: creates the adapter of one target.

    Returns:
        (target, adapter) in the plan's order.
    """
    made: dict[str, tuple[Target, Adapter]] = {}
    for target in plan.targets:
        adapter = create(target)
        made[target.path] = target, adapter
        for name, owner in target.tied.items():
            adapter._parameters[name] = made[owner][1]._parameters[name]
        if target.tied_to and isinstance(adapter, TiedAdapter):
            adapter.tie_to(made[target.tied_to][1])
    return list(made.values())


def _target(
    site: Site, config: Any, method: Method, tied_to: str = "", adapter_class: type[Adapter] | None = None
) -> Target:
    made_by = adapter_class or method.adapter_class
    part = custom_part(site.module, site.wrapper, config, site.path)
    if part is not None:
        kind, backend = kind_and_backend(site.module)
        shapes = probed_shapes(part, site.module, site.path)
        made_by, config = CustomAdapter, part
    else:
        kind, backend = resolve_parts(site, method)
        shapes = made_by.parameter_shapes(config, site.path, site.module, kind)
        check_shapes(made_by, site.path, shapes)
    taken, given = kind.features(site.module)
    fixed: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    unsaved = 0
    if not tied_to and issubclass(made_by, HasFixedTensors):
        fixed = made_by.fixed_tensors(config, shapes, site.module, kind)
        unsaved = made_by.unsaved_elements(config, site.module, kind)
    return Target(
        *(site.path, kind.name, backend.name, taken, given, shapes, made_by, config, tied_to),
        fixed=fixed,
        unsaved=unsaved,
    )


def _composite_targets(site: Site, sites: list[Site], kind: Any, config: Any, method: Method) -> list[Target]:
    """The targets of a composite module: its own weight, and the layers inside it whose weights it reads."""
    adapter_class, view = method.kinds.classes.get(kind.name), ParameterView(site.module, kind.parameter)
    refusal = kind.refusal(site.module)
    if adapter_class is None:
        refusal = f"{method.title(config)} does not work there (target module is not supported)"
    elif isinstance(site.wrapper, AdaptedParameter):
        refusal = "another adapter adapts its parameters (target_parameters)"
    backend = None if refusal else resolve_backend(view)
    if adapter_class is None or backend is None:
        what = type(site.module).__name__
        raise TargetError(
            f"{site.path} is a {what:.60}, which cannot be adapted: {refusal or 'its weight is quantized'}; exclude it",
            path=site.path,
            kind=what,
        )
    shapes = adapter_class.parameter_shapes(config, site.path, view, kind)
    taken, given = kind.features(view)
    own = Target(site.path, kind.name, backend.name, taken, given, shapes, adapter_class, config, "", kind.parameter)
    inner = (other for other in sites if reader_of(other) is site.module)
    return [own, *(_target(other, config, method, adapter_class=adapter_class) for other in inner)]


def _parameter_target(site: Site, config: Any, method: Method) -> Target:
    adapter_class = method.kinds.classes.get("parameter")
    if adapter_class is None:
        raise ConfigError(
            f"target_parameters does not work with {method.title(config)}; use plain LoRA", field="target_parameters"
        )
    target = _target(site, config, method, adapter_class=adapter_class)
    assert isinstance(site.module, ParameterView)
    return replace(target, parameter=site.module.parameter_name, matrix_count=site.module.count)


def resolve_parts(site: Site, method: Method) -> tuple[LayerKind, Backend]:
    """Finds the kind and the backend of the module at a site.

    Raises:
        TargetError: the module cannot be adapted by the method.
    """
    if isinstance(site.wrapper, AdaptedParameter) and site.module is site.wrapper.wrapped_module():
        raise TargetError(f"{site.path} has parameters that another adapter adapts (target_parameters); exclude it")
    kind, backend = resolve_layer_kind(site.module, method), resolve_backend(site.module)
    if kind is not None and isinstance(site.wrapper, AdaptedLayer):
        return site.wrapper.kind, site.wrapper.backend
    if kind is None or backend is None:
        what = "name other modules" if method.kinds.only else "name its linear layers"
        raise TargetError(
            f"{site.path} is a {type(site.module).__name__}, which cannot be adapted"
            f"{' by ' + method.label if method.kinds.only else ''} (target module is not supported); {what} or "
            "exclude it",
            path=site.path,
            kind=type(site.module).__name__,
        )
    return kind, backend


def adaptable_paths(sites: list[Site]) -> list[str]:
    """Paths of all modules that could be adapted."""
    return [site.path for site in sites if resolve_layer_kind(site.module) and resolve_backend(site.module)]


def _biases(model: nn.Module, config: AdapterConfig, adapted: Set[str], copies: Sequence[str]) -> dict[str, Extent]:
    """Name in the bare base model -> size of each trained base bias; biases of copied modules are in the copies."""
    kind = getattr(config, "bias", "none")
    if kind == "none":
        return {}
    copied = tuple(f"{path}." for path in copies)
    return {
        f"{path}.bias" if path else "bias": Extent.of([bias])
        for path, module in bare_modules(model)
        if isinstance(bias := module._parameters.get("bias"), nn.Parameter)
        and (kind == "all" or path in adapted)
        and not f"{path}.".startswith(copied)
    }
