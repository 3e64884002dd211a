"""Writes a new adapter into a slot, lets the caller validate it, and restores the old one on failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nbpeft._util.interrupts import released_interrupts
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.contract.base import Shapes
from nbpeft.engine.contract.manager_protocol import Manager
from nbpeft.engine.contract.registry import companions, method_of
from nbpeft.engine.hotswap.writes import Writes
from nbpeft.errors import HotSwapError, in_one_line
from nbpeft.jsonable import AsDict


@dataclass(frozen=True)
class Swapped(AsDict):
    """The result of a swap.

    Attributes:
        name: name of the slot.
        layers: number of layers with new tensors.
        zeroed: paths of the slot's layers that the new adapter does not have; their delta is zero now.
        reset: paths of ``modules_to_save`` that were reset to the base model's values.
    """

    name: str
    layers: int
    zeroed: tuple[str, ...]
    reset: tuple[str, ...]

    def __str__(self) -> str:
        zeroed = f", {len(self.zeroed)} without new tensors add nothing" if self.zeroed else ""
        return f"swapped {self.name!r}: {self.layers} layers{zeroed}"


def swap(
    manager: Manager,
    name: str,
    config: AdapterConfig,
    weights: AdapterWeights,
    *,
    grow: bool = False,
    validate: Callable[[], object] | None = None,
    done: Callable[[Transaction], None] | None = None,
    shapes: Mapping[str, Shapes] = MappingProxyType({}),
    consume: bool = False,
) -> Swapped:
    """Replaces the tensors of a loaded adapter, which keeps its name, by those of another one.

    The slot's config becomes the new adapter's, except for its targets.

    Args:
        manager: the model's manager.
        name: name of the slot.
        config: config of the new adapter.
        weights: its tensors. Layers of the slot that they do not contain have a delta of zero afterwards;
            ``modules_to_save`` that they do not contain are reset to the base model's values.
        grow: allocate larger tensors in a slot that is too small for the new rank; a compiled model
            is then recompiled.
        validate: called while the new adapter is the only active one, before other threads can use it;
            if it returns False or raises, the old adapter is restored, bit for bit.
        done: called at the end with the transaction of the swap, which is undone if it raises.
        shapes: path -> the shapes of the parameters that ``config_for_slot`` gives a layer, where the caller computed
            them.
        consume: whether the tensors of ``weights`` may be overwritten: with the slot's old values, instead of copies
            of these.

    Raises:
        HotSwapError: the new adapter does not fit the slot, or ``validate`` rejected it. The
            slot is unchanged.
        UnknownAdapterError: there is no such slot.
    """
    with manager.transaction() as change:
        manager.require(name)
        _check(manager, name, config, validate)
        new_config = config_for_slot(manager, name, config)
        _check_shared(manager, name, new_config, weights)
        layers = {path: layer for path, layer in manager.layers.items() if name in layer.adapters._modules}
        copies = {path: module for path, module in manager.copies.items() if name in module.modules_to_save._modules}
        writes = Writes(name, new_config, grow=grow, shapes=shapes, consume=consume)
        writes.collect_layers(layers, weights.adapters)
        writes.collect_copies(copies, weights.copies)
        writes.collect_biases(manager.base_biases(name), weights.base)
        change.keep(manager.configs)
        change.keep_attributes(manager, "unsaved")
        writes.write(change)
        manager.configs[name] = new_config
        manager.unsaved.discard(name)
        if validate is not None:
            _validated(manager, name, validate)
        if done is not None:
            done(change)
    return Swapped(name, len(weights.adapters), tuple(writes.zeroed), tuple(writes.reset))


def config_for_slot(manager: Manager, name: str, config: AdapterConfig) -> AdapterConfig:
    """A copy of a new adapter's config with the slot's targets and the per-layer values for these targets.

    Args:
        manager: the model's manager.
        name: name of the slot.
        config: config of the new adapter.
    """
    slot_config = manager.configs[name]
    fields = {key: getattr(slot_config, key) for key in slot_config.slot_fields if hasattr(slot_config, key)}
    filled = config.copy(**fields)
    if type(filled).fill_in_layers is not AdapterConfig.fill_in_layers:  # most methods have nothing to fill in
        filled.fill_in_layers(_features(manager, name))
    return filled


def _features(manager: Manager, name: str) -> dict[str, tuple[int, int]]:
    """Path -> (in, out) features of the layers of an adapter."""
    return {
        path: (layer.base.in_features, layer.base.out_features)
        for path, layer in manager.layers.items()
        if name in layer.adapters._modules
    }


def _check(manager: Manager, name: str, config: AdapterConfig, validate: object) -> None:
    if name in manager.merged:
        raise HotSwapError(f"adapter {name!r} is merged into the base weights: unmerge before swapping it", name=name)
    check_contents(name, manager.configs[name], config)
    if validate is not None and manager.merged:
        raise HotSwapError(f"{', '.join(map(repr, manager.merged))} merged: unmerge before a swap is validated")
    old_label, new_label = method_of(manager.configs[name]).label, method_of(config).label
    if old_label != new_label:
        raise HotSwapError(
            f"adapter {name!r} is {old_label} and cannot be swapped for {new_label}; load that under another name",
            name=name,
        )


def _check_shared(manager: Manager, name: str, config: AdapterConfig, weights: AdapterWeights) -> None:
    """Raises HotSwapError if the shared tensors of the new adapter differ, because a swap does not replace them."""
    method, slot_config = method_of(config), manager.configs[name]
    if method.shares.state is None:
        return
    if weights.shared or method.shares.state.is_saved(config):
        raise HotSwapError(
            f"the new {method.label} adapter has its own shared tensors, which a swap cannot replace: load it under "
            "another name"
        )
    for field in method.shares.state.made_from:
        old, new = getattr(slot_config, field), getattr(config, field)
        if old != new:
            raise HotSwapError(
                f"{field} is {old!r} in adapter {name!r} and {new!r} in the new one, and their shared tensors depend "
                "on it: load the new one under another name",
                name=name,
            )
    features = _features(manager, name)
    own = {path: features[path] for path in weights.adapters if path in features}
    wide, narrow = (method.shares.state.tensor_shapes(config, layers) for layers in (features, own))
    if wide != narrow:
        raise HotSwapError(
            f"the new adapter is not on the largest layers of {name!r}, so that its layers share tensors of other "
            f"shapes, {', '.join(map(str, narrow.values()))} instead of {', '.join(map(str, wide.values()))}: load the "
            "new one under another name",
            name=name,
        )


def check_contents(name: str, slot_config: AdapterConfig, config: AdapterConfig) -> None:
    """Raises HotSwapError if the slot or the new adapter has parts that cannot be replaced in place.

    Args:
        name: name of the slot.
        slot_config: config of the slot.
        config: config of the new adapter.
    """
    for owner, which in ((slot_config, f"adapter {name!r}"), (config, "the new adapter")):
        if getattr(owner, "initialised_from_weight", False):  # other libraries' configs lack it; refused later
            raise HotSwapError(
                f"{which} is initialized from a part of the base weights: load the new one under another name"
            )
        for method in companions():
            field = "" if method.shares.companion is None else method.shares.companion.field
            if getattr(owner, field, None):
                raise HotSwapError(f"{which} has {method.label} ({field}): load the new one under another name")


def _validated(manager: Manager, name: str, validate: Callable[[], object]) -> None:
    """Calls the caller's validation; an error makes the transaction restore the old adapter."""
    try:
        with manager.use(name), released_interrupts():
            verdict = validate()
        # Inside the ``try``, because ``bool`` of a tensor with several elements raises.
        accepted = verdict is None or bool(verdict)
    except Exception as error:
        reason = in_one_line(error) or type(error).__name__
        raise HotSwapError(f"validating the new adapter failed ({reason}); {name!r} is unchanged", name=name) from error
    if not accepted:
        raise HotSwapError(f"the new adapter did not pass its validation; {name!r} is unchanged", name=name)
