"""The modules behind the declared names of parameters: ``layer.core["default"].weight``, ``…core.default.weight``.

An adapter owns its parameters. The modules here show them under the names of ``PeftNames``. They are created when code
first iterates over an adapted layer's modules or accesses one, and stay. Writing to them writes to the adapter,
also from ``load_state_dict``, ``torch.func.functional_call`` and FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from nbpeft.engine.changes.called_modules import is_changed
from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.capabilities import ShowsModules, inner_adapters_of, warn_not_called
from nbpeft.engine.contract.shared_state import state_of_all
from nbpeft.engine.kernels.live_parameters import LiveParameters, Slot
from nbpeft.engine.views.layer_attributes import by_name
from nbpeft.errors import AdapterError


class _FollowsMode(nn.Module):
    """A module that shows parts of adapters and has their training mode."""

    def _showing(self) -> Iterable[nn.Module]:
        """The adapters whose parts are shown."""
        raise NotImplementedError

    @property
    def training(self) -> bool:
        """Whether the shown adapters are in training mode."""
        return all(module.training for module in self._showing())

    @training.setter
    def training(self, mode: bool) -> None:
        """Does nothing: ``train()`` and ``eval()`` of the layer also set the mode of the adapters."""


class _Shows(_FollowsMode):
    """A module whose parameters are those of adapters; assigning a tensor replaces the adapter's parameter."""

    def _showing(self) -> Iterable[nn.Module]:
        live = self.__dict__["_parameters"]
        return () if not isinstance(live, LiveParameters) else (adapter for adapter, _ in live.slots.values())

    def __setattr__(self, name: str, value: Any) -> None:
        live = self.__dict__.get("_parameters")
        if name == "_parameters" and isinstance(live, LiveParameters) and value != {}:
            return  # DeepSpeed ZeRO-3 replaces this dictionary on all modules; replacing the adapters' is sufficient
        if name == "parametrizations" and isinstance(live, LiveParameters):
            self.__class__ = type(self).__mro__[1]  # torch has made a class for it
            live.refuse_others()
        if not isinstance(live, LiveParameters) or name not in live.slots or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif name in live and not isinstance(value, nn.Parameter):
            live[name] = nn.Parameter(value)
        elif isinstance(value, nn.Parameter):
            live[name] = value
        else:
            live.set_tensor(name, value)

    def __getattr__(self, name: str) -> Any:
        live = self.__dict__.get("_parameters")
        if isinstance(live, LiveParameters) and name in live.slots:
            return live.get_tensor(name)
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        live = self.__dict__.get("_parameters")
        if isinstance(live, LiveParameters) and name in live.slots and name not in live:
            adapter, own = live.slots[name]
            adapter.__dict__.pop(own, None)
        else:
            super().__delattr__(name)


class _Parts(dict[str, Any]):
    """The modules that show one part of a layer's adapters; assigning a module replaces the part of the adapter.

    Attributes:
        slots: adapter name -> (adapter, the adapter's name of the part).
        base: the layer.
    """

    slots: dict[str, Slot]
    base: BaseLayer

    def __setitem__(self, name: str, module: Any) -> None:
        slots: dict[str, Slot] = self.__dict__.get("slots", {})  # missing while unpickling
        shown = self.get(name)
        if slots and name not in slots:
            raise AdapterError(f"there is no adapter {name!r} on this layer: add it with add_adapter() first")
        if shown is not None and module is not shown:
            if name not in slots:
                raise AdapterError(
                    f"this part of adapter {name!r} is shared by its layers and cannot be replaced in one"
                )
            adapter, own = slots[name]
            module = put_part(adapter, own, module, shown, self.base)  # type: ignore[arg-type]
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        raise AdapterError(
            f"a part of adapter {name!r} cannot be taken out: delete_adapter() removes the adapter, and "
            "model.manager.rename(old, new) renames it"
        )

    def keep(self, leaves: Mapping[str, nn.Module], slots: dict[str, Slot], base: BaseLayer | None = None) -> None:
        """Replaces the shown parts.

        Args:
            leaves: adapter name -> the module that shows the part.
            slots: adapter name -> (adapter, the adapter's name of the part).
            base: the layer.
        """
        self.__dict__.update(slots=slots, base=base)
        self.clear()
        self.update(leaves)

    def put(self, name: str, slot: Slot, module: nn.Module | None) -> None:
        """Shows the part of one more adapter; see ``keep``."""
        self.slots[name] = slot
        super().__setitem__(name, module)

    def leave(self, name: str) -> None:
        """No longer shows the part of an adapter."""
        self.__dict__["slots"].pop(name, None)
        self.pop(name, None)

    def of(self, name: str, adapter: nn.Module) -> Any:
        """The existing module for an adapter's part, under its current or a former name; None if there is none."""
        slots: dict[str, Slot] = self.__dict__.get("slots", {})
        names = (own for own in (name, *slots) if own in slots and slots[own][0] is adapter)
        return next((self.get(own) for own in names), None)


class AdapterDict(_Shows, nn.ModuleDict):
    """Modules by adapter name; unlike the base class, it supports names such as ``keys`` or ``type``.

    Two methods may have a part of the same name that is a module in only one of them (the factors of LoRA and AdaLoRA).
    If a layer has adapters of both, the other adapter's parameter is an entry itself.
    """

    def show(self, slots: dict[str, Slot]) -> None:
        """Sets the parameters that are shown in addition to the modules."""
        self.__dict__["_parameters"] = LiveParameters(slots) if slots else {}

    def _showing(self) -> Iterable[nn.Module]:
        return (*self._modules.values(), *super()._showing())

    def __getitem__(self, name: str) -> Any:
        live: Any = self.__dict__["_parameters"]
        return live.get_tensor(name) if name in live else self._modules[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters])

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)

    def keys(self) -> Any:
        """Names of the adapters."""
        return {name: None for name in self}.keys()

    def items(self) -> Any:
        """Adapter names and entries."""
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        """Entries of the adapters."""
        return {name: self[name] for name in self}.values()

    def _get_name(self) -> str:
        return "ModuleDict"


class ShownParts(AdapterDict):
    """One part of the adapters of a layer, by adapter name, as in ``layer.core["default"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_modules"] = _Parts()


def _observing(register: Callable[..., Any]) -> Any:
    """A method of ``nn.Module`` that adds a hook, with which the adapter calls the module from then on."""

    @wraps(register)
    def registering(self: Observed, *args: Any, **kwargs: Any) -> Any:
        _observe(self.adapter, self)
        return register(self, *args, **kwargs)

    return registering


class Observed(nn.Module):
    """A module that registers itself with its adapter when it gets hooks or another forward.

    Without these, the adapter computes directly and does not call the module.
    """

    @property
    def adapter(self) -> Any:
        """The adapter."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # hooks of accelerate and diffusers replace it
            _observe(self.adapter, self)
        super().__setattr__(name, value)

    register_forward_hook = _observing(nn.Module.register_forward_hook)
    register_forward_pre_hook = _observing(nn.Module.register_forward_pre_hook)
    register_full_backward_hook = _observing(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _observing(nn.Module.register_full_backward_pre_hook)


class ParameterModule(Observed, _Shows):
    """One parameter of an adapter as a module: usually its ``weight``; ``bias`` is None if there is none.

    Subclasses implement ``forward``.
    """

    @property
    def adapter(self) -> Any:
        return self._shown[0]

    @property
    def shown_parameter(self) -> str:
        """The adapter's name of the parameter."""
        return self._shown[1]

    @property
    def _shown(self) -> Slot:
        slots: dict[str, Slot] = self.__dict__["_parameters"].slots
        return next(iter(slots.values()))

    def extra_repr(self) -> str:
        """The shape and settings that ``repr`` shows."""
        return str(tuple(self.adapter.tensor(self.shown_parameter).shape))


def show_parameter(module: nn.Module, adapter: Adapter, name: str) -> None:
    """Shows an adapter's parameter as the ``weight`` of a module, and ``<name>_bias`` as its ``bias``.

    Args:
        module: the module.
        adapter: the adapter.
        name: the adapter's name of the parameter.
    """
    slots: dict[str, Slot] = {adapter.peft.names_in_modules.get(name, "weight"): (adapter, name)}
    if f"{name}_bias" in adapter._parameters:
        slots["bias"] = (adapter, f"{name}_bias")
    else:
        module.__dict__["bias"] = None
    # Not through ``register_parameter``: the parameter stays the adapter's, which may replace it at any time.
    module.__dict__["_parameters"] = LiveParameters(slots)


class ParameterMapping(_Shows, nn.ParameterDict):
    """One parameter of the adapters of a layer by adapter name, as in ``layer.core["default"]``."""

    def __init__(self, slots: dict[str, Slot]) -> None:
        super().__init__()
        self.show(slots)

    def show(self, slots: dict[str, Slot]) -> None:
        """Sets the parameters that are shown."""
        self.__dict__["_parameters"] = LiveParameters(slots)
        self.__dict__["_keys"] = dict.fromkeys(slots)

    def put(self, name: str, slot: Slot, _: nn.Module | None = None) -> None:
        """Shows the parameter of one more adapter."""
        live: Any = self.__dict__["_parameters"]
        live.slots[name] = slot
        self.__dict__["_keys"][name] = None

    def leave(self, name: str) -> None:
        """No longer shows the parameter of an adapter."""
        live: Any = self.__dict__["_parameters"]
        live.slots.pop(name, None)
        self.__dict__["_keys"].pop(name, None)

    def __getitem__(self, key: str) -> Any:
        live: Any = self._parameters
        return live.get_tensor(key)

    def __setitem__(self, key: str, value: Any) -> None:
        live: Any = self._parameters
        if key not in live.slots:
            raise AdapterError(
                f"the layer has no adapter {key!r} with this parameter, so setting it would have no effect"
            )
        self._parameters[key] = value if isinstance(value, nn.Parameter | None) else nn.Parameter(value)

    def _get_name(self) -> str:
        return "ParameterDict"


class ParameterListing(_Shows, nn.ParameterList):
    """Parameters of an adapter that PEFT keeps in a list, as in ``layer.core["default"][0]``.

    Args:
        adapter: the adapter.
        name: name of the list; the parameters are the adapter's ``name.0``, ``name.1``, ….
    """

    def __init__(self, adapter: Adapter, name: str) -> None:
        super().__init__()
        owned = {own.partition(".")[2]: own for own in adapter._parameters if own.partition(".")[0] == name}
        self.__dict__.update(adapter=adapter, owned=owned, _size=len(owned))
        self.__dict__["_parameters"] = LiveParameters({number: (adapter, own) for number, own in owned.items()})

    def _get_name(self) -> str:
        return "ParameterList"


class ModuleListing(_FollowsMode, nn.ModuleList):
    """Parameters that are weights of a list of modules in PEFT: ``layer.peanut_encoders["default"][0].weight``.

    Args:
        adapter: the adapter.
        name: name of the list; the parameters are the adapter's ``name.0``, ``name.1``, ….
        base: the layer.
    """

    def __init__(self, adapter: Adapter, name: str, base: BaseLayer) -> None:
        super().__init__(new_leaf(adapter, own, base) for own in adapter._parameters if own.partition(".")[0] == name)
        self.__dict__["adapter"] = adapter

    def _showing(self) -> Iterable[nn.Module]:
        return (self.__dict__["adapter"],)

    def _get_name(self) -> str:
        return "ModuleList"


class Container(_FollowsMode):
    """A module that contains parameters of adapters in PEFT, such as ``token_adapter``, with their attributes."""

    def __init__(self, adapters: Mapping[str, Any]) -> None:
        super().__init__()
        self.__dict__["adapters"] = adapters

    def _showing(self) -> Iterable[nn.Module]:
        return self.__dict__["adapters"].values()

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("__") else by_name(self.__dict__.get("adapters", {}), name)
        return super().__getattr__(name) if found is None else found


class _LiveBuffers(MutableMapping[str, Any]):
    """A buffer by adapter name, which reads and writes the buffers of the adapters or of what their layers share."""

    def __init__(self, adapters: Mapping[str, nn.Module], own: str) -> None:
        self._adapters, self._own = adapters, own

    def __getitem__(self, name: str) -> Any:
        return self._adapters[name]._buffers[self._own]

    def __setitem__(self, name: str, value: Any) -> None:
        self._adapters[name]._buffers[self._own] = value

    def __delitem__(self, name: str) -> None:
        del self._adapters[name]._buffers[self._own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def copy(self) -> dict[str, Any]:
        """The current buffers as a dictionary."""
        return dict(self)


class BufferMapping(_FollowsMode):
    """A buffer of the adapters of a layer by adapter name, as in ``layer.core_norm["default"]``."""

    def show(self, adapters: Mapping[str, nn.Module], own: str) -> None:
        """Sets the adapters, or their shared states, whose buffer ``own`` is shown; those without it are ignored."""
        having = {name: adapter for name, adapter in adapters.items() if own in adapter._buffers}
        hidden = {name for name, adapter in having.items() if own in adapter._non_persistent_buffers_set}
        buffers = _LiveBuffers(having, own)
        self.__dict__.update(adapters=having, _buffers=buffers, _non_persistent_buffers_set=hidden)

    def put(self, name: str, slot: Slot, _: nn.Module | None = None) -> None:
        """Shows the buffer of one more adapter."""
        adapter, own = slot
        self.__dict__["adapters"][name] = adapter
        if own in adapter._non_persistent_buffers_set:
            self._non_persistent_buffers_set.add(name)

    def leave(self, name: str) -> None:
        """No longer shows the buffer of an adapter."""
        self.__dict__["adapters"].pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _showing(self) -> Iterable[nn.Module]:
        return self.__dict__.get("adapters", {}).values()

    def __getitem__(self, name: str) -> Any:
        return self._buffers[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._buffers[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Any:
        """Names of the adapters."""
        return self._buffers.keys()

    def items(self) -> Any:
        """The buffers by adapter."""
        return self._buffers.items()

    def values(self) -> Any:
        """The buffers."""
        return self._buffers.values()

    def _get_name(self) -> str:
        return "BufferDict"


class Remainder(_FollowsMode):
    """Submodules of an adapter that have no name in PEFT; inner adapters among them are shown as adapters."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        shown, own = unnamed_parts(adapter), adapter._modules
        self.__dict__.update(adapter=adapter, _modules=own if len(shown) == len(own) else shown)

    def _showing(self) -> Iterable[nn.Module]:
        return (self.__dict__["adapter"],)


def unnamed_parts(adapter: Adapter) -> dict[str, Any]:
    """The submodules of an adapter that have no name in PEFT's layers."""
    on_model = {name: adapter._modules[name] for name in adapter.peft.on_model if name in adapter._modules}
    if on_model:  # the others are shown at the blocks that they are for
        return on_model
    inner, shared = inner_adapters_of(adapter), state_of_all(adapter)
    return {name: module for name, module in adapter._modules.items() if name not in inner and module is not shared}


def put_part(adapter: Adapter, own: str, module: Any, shown: nn.Module, base: BaseLayer) -> nn.Module:
    """Replaces a part of an adapter by a module that other code assigns.

    A plain module, such as ``nn.Linear``, becomes the module that shows the part: writing to it writes to the adapter,
    which computes as before. Any other module is called by the adapter, if the method supports that.

    Args:
        adapter: the adapter.
        own: the adapter's name of the part.
        module: the assigned module.
        shown: the module that shows the part now, or is called instead.
        base: the layer.

    Returns:
        The module that shows the part afterwards.

    Raises:
        AdapterError: the module would not be called, or would not be trained and saved with the adapter.
        ValueError: its weight has another shape.
    """
    if not isinstance(
        shown, Observed | Remainder | ParameterListing | ModuleListing | ParameterMapping
    ):  # a module assigned earlier
        made = new_leaf(adapter, own, base) if own in adapter._parameters else own_module(adapter, own, base)
        shown = shown if made is None else made
    if not isinstance(module, nn.Module) or not isinstance(shown, Observed):
        raise AdapterError(f"{own} of an adapter cannot be a {type(module).__name__}: change its tensors in place")
    slots = _slots(shown)
    given = {name: value for name, value in dict(module._parameters).items() if value is not None and name in slots}
    _check_parameters(adapter, own, module, slots, given)
    of_another, plain = isinstance(module, Observed), _is_plain_part(module, shown)
    if not (of_another or plain or (isinstance(adapter, ShowsModules) and adapter.computes_by_parts)):
        raise AdapterError(
            f"{own} of this adapter cannot be a {type(module).__name__}, which would not be called: set its weight, "
            f"or assign a torch.nn.{_torch_class(shown).__name__}"
        )
    live = LiveParameters(slots)
    for name, parameter in given.items():
        live[name] = parameter
    if not slots and (of_another or plain):
        adapter.__dict__["dropout"] = float(getattr(module, "p", 0.0))
    if of_another:
        return shown
    if given:
        show_parameter(module, adapter, own)
    if not plain:
        _observe(adapter, module, own)
        return module
    if isinstance(adapter, ShowsModules):
        adapter.forget_observed(own)
    if not slots:
        for name in ("p", "training"):
            module.__dict__.pop(name, None)
        module.__dict__.update(inplace=False, _adapter=adapter)
    module.__class__ = type(shown)
    return module


def _slots(shown: nn.Module) -> dict[str, Slot]:
    live = shown.__dict__["_parameters"]
    return live.slots if isinstance(live, LiveParameters) else {}


def _check_parameters(
    adapter: Adapter, own: str, module: nn.Module, slots: Mapping[str, Slot], given: Mapping[str, Any]
) -> None:
    """Raises AdapterError unless the parameters of a module are those of an adapter's part."""
    mine = {id(parameter) for parameter in adapter.parameters()}
    owned = {name: id(parameter) in mine for name, parameter in module.named_parameters()}
    other = next((name for name, is_mine in owned.items() if not is_mine and name not in given), None)
    missing = [] if any(owned.values()) and not given else [name for name in slots if name not in given]
    if other is not None or missing:
        wrong = f"has {other} too" if other is not None else f"has no {missing[0]}"
        expected = f"the parameters {' and '.join(slots)}" if slots else "no parameters"
        raise AdapterError(f"{own} must be a module with {expected}: this {type(module).__name__} {wrong}")


def _torch_class(shown: nn.Module) -> type[nn.Module]:
    """The class of ``torch.nn`` from which the module of a part is derived."""
    return next(kind for kind in type(shown).__mro__ if kind.__module__.startswith("torch.nn."))


def _is_plain_part(module: nn.Module, shown: nn.Module) -> bool:
    """Whether a module computes the same as the one that shows a part, and has no hooks."""
    kinds = (nn.Dropout, nn.Identity) if isinstance(shown, nn.Dropout) else (_torch_class(shown),)
    settings = ("stride", "padding", "dilation", "groups", "padding_mode")
    alike = all(getattr(module, name, None) == getattr(shown, name, None) for name in settings)
    return type(module) in kinds and kinds[0] is not nn.Module and alike and not is_changed(module)


def _observe(adapter: Adapter, module: nn.Module, name: str = "") -> None:
    if isinstance(adapter, ShowsModules):
        adapter.observe(module, name)
    else:
        warn_not_called(module, stacklevel=4)


def own_module(adapter: Adapter, name: str, base: BaseLayer) -> nn.Module | None:
    """The module of the method's own that shows a part of an adapter; None if it has none.

    Args:
        adapter: the adapter.
        name: name of the part.
        base: the layer.
    """
    return adapter.peft_module(name, base) if isinstance(adapter, ShowsModules) else None


def new_leaf(adapter: Adapter, name: str, base: BaseLayer) -> nn.Module:
    """A new module that shows a parameter of an adapter.

    Args:
        adapter: the adapter.
        name: name of the parameter.
        base: the layer.
    """
    leaf = own_module(adapter, name, base) or ParameterModule()
    show_parameter(leaf, adapter, name)
    return leaf
