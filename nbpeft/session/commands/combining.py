"""Combining adapters into a new one by weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import AdapterExistsError, ConfigError, did_you_mean
from nbpeft.session.checks import adapter_name, weights_of
from nbpeft.session.commands.adapters import adapter_in
from nbpeft.session.results.combining import CombineResult
from nbpeft.session.undoable import Undoable, unsaved_words

if TYPE_CHECKING:
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel

_OPTIONS = {"svd_rank": "r", "svd_clamp": "clamp", "density": "density"}
"""Setting of the engine -> name of the session's option."""
_LINEAR_NOTE = 0.05
"""Relative error above which a note explains the inaccuracy of ``linear``."""


def combine(
    ctx: SessionContext,
    weights: Mapping[str, float],
    *,
    name: str,
    type: str = "exact",
    r: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
    seed: int | None = None,
    replace: bool = False,
    model: ModelLike = None,
) -> CombineResult:
    """Add the weighted combination of adapters as a new adapter, which is frozen and inactive.

    Calling it again with the same name recomputes the combination. An adapter that was created in another way, or was
    trained since, is only replaced with ``replace``.

    Args:
        weights: adapter name -> weight; negative ones subtract.
        name: name of the new adapter.
        type: ``exact`` (the default) is the exact weighted sum of the deltas, with a truncated SVD if ``r`` is
            given. The others have PEFT's names; ``linear`` and types that are based on it mix the factors of
            different adapters, which differs from the sum. The available types depend on the method.
        r: rank of the result, for ``exact``, ``svd`` and the types that end in ``_svd``.
        density: share of the entries that TIES, DARE and magnitude pruning preserve, from 0 to 1.
        majority_sign: how TIES elects a sign: ``total`` or ``frequency``.
        clamp: quantile in (0, 1] at which entries are clamped, for types with an SVD.
        seed: seed for the entries that DARE drops; None uses torch's current random state.
        replace: replace any adapter with that name.
        model: an adapted model.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterExistsError: the name is taken.
        AdapterError: the adapters cannot be combined.
        ConfigError: an option is invalid or has no effect for this type.
    """
    settings = combination_settings(type, r=r, density=density, majority_sign=majority_sign, clamp=clamp)
    weights = weights_of(weights)
    adapter_name(name)
    tracked = ctx.models.get(model, command="combine", adapters=weights)
    tracked.manager.require_available(*weights)
    with ctx.command(f"combining {', '.join(weights)}", slow=True) as notes, seeded(seed):
        remade = _may_replace(ctx, tracked, name, weights, replace)
        combined = make_combination(ctx, tracked, weights, name, settings, replaces=remade)
        tracked.combinations[name] = weakref.ref(tracked.manager.configs[name])
        if type == "linear" and combined.relative_error > _LINEAR_NOTE:
            notes.append("linear mixes the factors of one adapter with another's; type exact keeps the true sum")
        if remade:
            notes.append("it replaces the previous combination; session.undo() restores that")
        state, pairs = tracked.state(), tuple((part, float(weight)) for part, weight in weights.items())
        made = adapter_in(state, name)
        return CombineResult(tracked.name, pairs, made, combined, state, remade, notes=tuple(notes))


def combination_settings(
    type: str,
    *,
    r: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
) -> dict[str, Any]:
    """Return the options of ``combine`` under the engine's names; see ``combine``."""
    return {
        "combination_type": type,
        "svd_rank": r,
        "svd_clamp": clamp,
        "density": density,
        "majority_sign_method": majority_sign,
    }


def make_combination(
    ctx: SessionContext,
    tracked: TrackedModel,
    weights: Mapping[str, float],
    name: str,
    settings: Mapping[str, Any],
    *,
    replaces: bool = False,
) -> Any:
    """Combine adapters; a replaced adapter is removed only after the new one is complete.

    Args:
        tracked: the model.
        weights: adapter name -> weight.
        name: name of the new adapter.
        settings: result of ``combination_settings``.
        replaces: whether there is an adapter with this name to replace.

    Raises:
        AdapterError: the adapters cannot be combined.
        ConfigError: an option is invalid or has no effect for this type, or the type is unknown.
    """
    from nbpeft.model.combine.combining import combine_adapters

    manager, made = tracked.manager, free_name(name, tracked.manager.names) if replaces else name
    _check_options(manager, weights, settings)
    with DeferredInterrupts():
        try:
            combined = combine_adapters(manager, tuple(weights), tuple(weights.values()), made, settings)
            if replaces:
                with Undoable(ctx, tracked, name, "combined again").change():
                    if name in manager.active:
                        manager.activate([made if other == name else other for other in manager.active])
                    manager.remove(name)
                    manager.rename(made, name)
        except BaseException:
            if replaces and made in manager.names:  # also if an interruption came right after its creation
                with DeferredInterrupts(to_the_end=True):
                    manager.remove(made)
            raise
        return combined


def _check_options(manager: AdapterManager, weights: Mapping[str, float], settings: Mapping[str, Any]) -> None:
    """Refuse types that the method does not have, and options without effect on a type, which PEFT ignores."""
    from nbpeft.engine.contract.combination import check_weights
    from nbpeft.model.combine.combining import combine_of

    check_weights(tuple(weights), tuple(weights.values()))
    manager.require_available(*weights)
    with manager.ensure_loaded(tuple(weights)):
        combine = combine_of(manager, tuple(weights))
    chosen = settings["combination_type"]
    if chosen not in combine.types:
        known, near = ", ".join(combine.types), did_you_mean(str(chosen), combine.types)
        raise ConfigError(f"type {chosen!r} is unknown; choose from {known}.{near}", field="type")
    for setting, option in _OPTIONS.items():
        if settings[setting] is None or setting in combine.takes(chosen):
            continue
        others = [name for name in combine.types if setting in combine.takes(name)]
        near = f"{chosen}_svd" if f"{chosen}_svd" in others else next(iter(others), "")
        hint = f"; {near} uses it" if near else ""
        raise ConfigError(f"{option} has no effect for type {chosen!r}{hint}", field=option)


def _may_replace(
    ctx: SessionContext, tracked: TrackedModel, name: str, weights: Mapping[str, float], replace: bool
) -> bool:
    """Return whether there is an adapter with this name to replace."""
    manager = tracked.manager
    if name not in manager.configs:
        return False
    if name in weights:
        raise AdapterExistsError(f"{name!r} is one of the combined adapters; choose another name", name=name)
    known = tracked.combinations.get(name)
    same = known is not None and known() is manager.configs[name]
    if replace or (same and name in manager.frozen and name not in manager.unsaved):
        return True
    there = f"{tracked.name} has an adapter {name!r} already{unsaved_words(manager, name)}"
    raise AdapterExistsError(f"{there}; choose another name, or replace it (replace=…)", name=name)


def free_name(name: str, taken: tuple[str, ...]) -> str:
    """Return the name, with a number appended if it is taken.

    Args:
        name: the preferred name.
        taken: names that are taken.
    """
    free, number = name, 2
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch inside the block and restore its generators afterwards.

    Raises:
        ConfigError: the seed is not a number that torch accepts.
    """
    if seed is None:
        yield
        return
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}; expected a whole number of at most 64 bits")
    from nbpeft.engine.changes.random_numbers import drawing_from

    with drawing_from(seed):
        yield
