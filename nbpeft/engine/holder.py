"""What adapters a base model has, and who is told when that changes."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

from torch import Tensor, nn

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights, SharedState
from nbpeft.engine.biases import BaseBiases
from nbpeft.engine.copies import CopiedModule
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.switch import Switch
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import AdapterError, StaleModelError, UnknownAdapterError, did_you_mean, in_one_line, shown

BASE_NAME = "__base__"
"""Name of the base model in a mixed batch."""
_TAKEN_NAMES = {
    BASE_NAME: "it stands for the base model in a mixed batch",
    "base": "it stands for the base model in panels and results",
    "training": "torch keeps there whether a module trains",
}


class Supplier(Protocol):
    """Brings adapters that are kept elsewhere onto the model."""

    @property
    def waiting_count(self) -> int:
        """How many adapters it knows that are not on the model now."""
        ...

    def knows(self, name: str) -> bool:
        """Whether it can bring that adapter."""
        ...

    def supply(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Has those of the adapters that it knows on the model, all together, until the block ends.

        Args:
            names: adapters.
            switching: the block makes them the active ones, so the active ones may go for them.
        """
        ...


class AdapterHolder:
    """The record of the adapters of one base model.

    Attributes:
        model: the base model.
        switch: what acts now; read by all wrappers.
        configs: adapter name -> its config, targets resolved.
        layers: path -> adapted layer.
        copies: path -> module with copies trained as a whole.
        alive: False once the adapters were unloaded; every command then refuses.
        revision: grows with every change.
        frozen: adapters that do not train even while active.
        owner: token of the one handle that may use the manager.
        supplier: where adapters come from that are named and not on the model, if anywhere.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.switch = Switch()
        self.configs: dict[str, AdapterConfig] = {}
        self.layers: dict[str, AdaptedLayer] = {}
        self.copies: dict[str, CopiedModule] = {}
        self.alive = True
        self.revision = 0
        self.frozen: set[str] = set()
        self._selected: tuple[str, ...] = ()
        self._enabled = True
        self._scales: dict[str, float] = {}
        self._merged: tuple[str, ...] = ()
        self._parked: tuple[str, ...] = ()
        self._parked_weights: list[Callable[[], None]] = []
        self._slots: dict[str, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        self._biases = BaseBiases(model)
        self._was_trainable: list[nn.Parameter] = []
        self._subscribers: list[Callable[[], Callable[[], None] | None]] = []
        self._transaction = Transaction(self.switch, self.changed)
        self.owner = object()
        self.supplier: Supplier | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, oldest first."""
        return tuple(self.configs)

    @property
    def active(self) -> tuple[str, ...]:
        """Selected adapters, inside a block of ``use`` those of the block; they act unless disabled."""
        scope = self.switch.scope
        return self._selected if scope is None else scope.names

    @property
    def selected(self) -> tuple[str, ...]:
        """Selected adapters outside of all blocks."""
        return self._selected

    @property
    def enabled(self) -> bool:
        """Whether the selected adapters act; False inside a block of ``disabled``."""
        scope = self.switch.scope
        return self._enabled if scope is None else scope.enabled

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters whose deltas are in the base weights now."""
        return self._merged

    def scale(self, name: str) -> float:
        """Factor on an adapter's delta; 1 unless set."""
        return self._scales.get(name, 1.0)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All trainable tensors of an adapter, copies and trained base biases included."""
        self.require(name)
        slots = self._slots.get(name)
        if slots is None:
            slots = self._slots[name] = self._find_slots(name)
        # Looked up each time: sharding and moves put other tensors into the same places.
        found = [parameters[key] for parameters, key in slots]
        return [*(parameter for parameter in found if parameter is not None), *self._biases.of(name).values()]

    def _find_slots(self, name: str) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """Where an adapter's tensors hang: (parameters of a module, key)."""
        owners: list[nn.Module] = []
        for layer in self.layers.values():
            adapter = layer.adapters._modules.get(name)
            owners.extend(() if adapter is None else adapter.modules() if adapter._modules else (adapter,))
        for copied in self.copies.values():
            trained = copied.modules_to_save._modules.get(name)
            owners.extend(trained.modules() if trained is not None else ())
        return [
            (owner._parameters, key)
            for owner in owners
            for key, parameter in owner._parameters.items()
            if parameter is not None and parameter.is_floating_point()
        ]

    def weights(self, name: str) -> AdapterWeights:
        """References to the tensors of an adapter."""
        self.require(name)
        weights = AdapterWeights()
        for path, layer in self.layers.items():
            if name in layer.adapters._modules:
                weights.adapters[path] = self._saved_tensors(path, layer, name)
        for path, module in self.copies.items():
            if name in module.modules_to_save._modules:
                weights.copies[path] = dict(module.modules_to_save[name].state_dict(keep_vars=True))
        weights.base = self.base_biases(name)
        shared = self.shared(name)
        weights.shared = {} if shared is None else shared.saved_tensors()
        return weights

    def _saved_tensors(self, path: str, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        adapter, config = layer.adapter(name), self.configs[name]
        return adapter.saved_tensors(
            lambda: type(adapter).parameter_shapes(config, path, layer.base.module, layer.kind)
        )

    def shared(self, name: str) -> SharedState | None:
        """What the layers of an adapter share, where its method has that."""
        for layer in self.layers.values():
            adapter = layer.adapters._modules.get(name)
            held = None if adapter is None else adapter._modules.get("shared")
            if isinstance(held, SharedState):
                return held
        return None

    def base_biases(self, name: str) -> dict[str, Tensor]:
        """Name in the bare base model -> bias that an adapter trains along."""
        return dict(self._biases.of(name))

    def replaced_in_base(self, name: str) -> dict[str, Tensor]:
        """Name in the bare base model -> what was there before an adapter brought or trained its own."""
        return self._biases.originals(name)

    def supplied(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Holds adapters on the model while the block runs; see ``Supplier``. Without one it does nothing."""
        return nullcontext() if self.supplier is None else self.supplier.supply(names, switching=switching)

    def require(self, *names: str) -> None:
        """Raises unless the manager is alive and has all the names.

        Raises:
            StaleModelError: the adapters were unloaded.
            UnknownAdapterError: there is no such adapter.
        """
        self.check_alive()
        for name in names:
            if not isinstance(name, str) or name not in self.configs:
                have = ", ".join(map(repr, self.configs)) or "none"
                raise UnknownAdapterError(
                    f"Adapter {name!r} not found; the model has: {have}." + did_you_mean(str(name), self.configs),
                    name=name,
                    available=self.names,
                )

    def require_reachable(self, *names: str) -> None:
        """As ``require``, where an adapter that the supplier can bring counts as there."""
        self.require(*(name for name in names if not self.reachable(name)))

    def reachable(self, name: str) -> bool:
        """Whether an adapter is on the model or the supplier can bring it."""
        return name in self.configs or (self.supplier is not None and self.supplier.knows(name))

    def check_alive(self) -> None:
        """Raises StaleModelError once the adapters were unloaded."""
        if not self.alive:
            raise StaleModelError(
                "this handle is dead: its adapters were merged into the base model or unloaded; "
                "use the model that merge_and_unload() or unload() returned"
            )

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back after every change; bound methods are held weakly. Returns how to stop."""
        bound = getattr(callback, "__self__", None) is not None
        reference: Callable[[], Callable[[], None] | None]
        reference = weakref.WeakMethod(callback) if bound else (lambda: callback)
        self._subscribers.append(reference)

        def stop() -> None:
            if reference in self._subscribers:
                self._subscribers.remove(reference)

        return stop

    def changed(self) -> None:
        """Tells subscribers that something changed; for code that wrote tensors itself."""
        self.revision += 1
        for reference in list(self._subscribers):
            callback = reference()
            if callback is None:
                self._subscribers.remove(reference)
                continue
            try:
                callback()
            except Exception as error:
                reason = f"{type(error).__name__}: {in_one_line(error)}"
                warnings.warn(f"a subscriber failed after the adapters were changed: {reason}", stacklevel=4)

    def _publish_active(self) -> None:
        """Tells the layers what acts; the manager knows."""

    def __getstate__(self) -> dict[str, Any]:
        state = {
            **self.__dict__,
            "_subscribers": [],
            "_slots": {},
            "_parked": (),
            "_parked_weights": [],
            "supplier": None,
        }
        del state["_transaction"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transaction = Transaction(self.switch, self.changed)
        self._publish_active()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return twin


def check_name(name: object) -> None:
    """Raises AdapterError for a name that cannot be a key, a folder or part of a parameter name."""
    if not isinstance(name, str) or not name.strip() or any(c in name for c in "./\\\0\n"):
        raise AdapterError(
            f"{shown(name)} cannot name an adapter: use a non-empty text without dots and slashes", name=name
        )
    if name in _TAKEN_NAMES:
        raise AdapterError(f"{name!r} cannot name an adapter: {_TAKEN_NAMES[name]}; take another name", name=name)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise AdapterError(f"{shown(name)} cannot name an adapter: it holds half a character (a surrogate)", name=name)


def names_in(names: object) -> tuple[str, ...]:
    """One name or several as a tuple, each once.

    Raises:
        AdapterError: they are neither.
    """
    if isinstance(names, str):
        return (names,)
    try:
        return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
    except TypeError:
        raise AdapterError(f"expected the name of an adapter or a list of names, not {names!r:.60}") from None


def check_scale(name: str, scale: Any) -> float:
    """The factor on an adapter's delta as a float.

    Raises:
        AdapterError: it is no finite number.
    """
    try:
        factor = float(scale)
    except (TypeError, ValueError, OverflowError):
        factor = math.nan
    if not math.isfinite(factor):
        raise AdapterError(f"the scale of adapter {name!r} must be a finite number, not {shown(scale)}", name=name)
    return factor


def cloned(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies of tensors, by path and parameter, without history."""
    return {path: {key: value.detach().clone() for key, value in named.items()} for path, named in tensors.items()}
