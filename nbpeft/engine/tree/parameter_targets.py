"""Resolves ``target_parameters`` to bare parameters of modules that are not layers: experts, routers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from nbpeft.engine.config.targets import Matcher
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.model_tree import Site, reader_of
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.parameter_layer import wrappers_of
from nbpeft.errors import LayerKindError, TargetError, did_you_mean, few


def parameter_sites(
    model: nn.Module, sites: Sequence[Site], matcher: Matcher, adapted: Collection[str], copies: Sequence[str]
) -> list[Site]:
    """Finds the parameters that a config names.

    Args:
        model: the base model.
        sites: sites of its modules.
        matcher: for the names in ``target_parameters``.
        adapted: paths of modules that the config adapts as layers.
        copies: paths of modules that it trains as a whole.

    Returns:
        A site for each parameter, with a module that has it as its ``weight``, in model order.

    Raises:
        TargetError: a parameter cannot be adapted.
        LayerKindError: a parameter is neither a matrix nor a stack of matrices.
    """
    own = next((name for name in model._parameters if matcher.matches(name)), None)
    if own is not None:
        raise TargetError(f"Targeting an nn.Parameter on the top-level module is not supported (parameter {own!r})")
    inside = tuple(f"{path}." for path in copies)
    found: list[Site] = []
    seen: set[int] = set()
    for site in sites:
        own_names = [name for name, value in site.module._parameters.items() if value is not None]
        names = [name for name in own_names if matcher.matches(f"{site.path}.{name}")]
        if not names or id(site.module) in seen:
            continue
        seen.add(id(site.module))
        if reader_of(site) is not None:
            raise TargetError(f"{site.path} is read by a {type(site.parent).__name__:.60}: target that as a module")
        if site.path in adapted:
            raise TargetError(f"{site.path} is adapted as a layer (target_modules): take it out of target_parameters")
        if site.path in copies or (inside and site.path.startswith(inside)):
            raise TargetError(f"{site.path} is trained as a whole (modules_to_save): take it out of target_parameters")
        found += _of_module(site, names)
    return found


def _of_module(site: Site, names: Sequence[str]) -> list[Site]:
    if isinstance(site.wrapper, ModulesToSaveWrapper):
        raise TargetError(f"{site.path} is trained as a whole by another adapter (modules_to_save)")
    wrappers = {wrapper.parameter_name: wrapper for wrapper in wrappers_of(site.wrapper)}
    if wrappers and wrappers.keys() != set(names):
        raise TargetError(
            f"all adapters must target the same set of parameters of {site.path}: another one has "
            f"{few(sorted(wrappers))}, this one {few(sorted(names))}",
            path=site.path,
        )
    if isinstance(site.wrapper, AdaptedLayer) and not wrappers:
        raise TargetError(f"{site.path} is adapted as a layer by another adapter: take it out of target_parameters")
    found = []
    for name in names:
        view, path = ParameterView(site.module, name), f"{site.path}.{name}"
        if len(view.shape) not in (2, 3):
            raise LayerKindError(f"{path} has {len(view.shape)} dimensions; only 2 and 3 can be adapted", path=path)
        found.append(site._replace(path=path, module=view, wrapper=wrappers.get(name)))
    return found


def no_parameter(missing: Sequence[str], sites: Sequence[Site]) -> TargetError:
    """Creates the error for names in ``target_parameters`` that match nothing.

    Args:
        missing: the names.
        sites: sites of the model's modules, from which similar names are suggested.

    Returns:
        The error, for the caller to raise.
    """
    known = sorted(
        {
            f"{site.attribute}.{name}"
            for site in sites
            for name, value in site.module._parameters.items()
            if value is not None and value.ndim == 3 and not type(site.module).__module__.startswith("torch.nn.")
        }
    )
    have = f" The model has: {few(known, 8)}" if known else " The model has no parameters of several matrices"
    return TargetError(
        f"target_parameters {few(missing)} not found in the base model.{did_you_mean(missing[0], known)}{have}",
        missing=tuple(missing),
    )
