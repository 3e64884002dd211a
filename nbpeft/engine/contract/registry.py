"""What methods, kinds of layers and ways to store a weight there are, and which one fits.

A file in ``methods/``, ``layer_kinds/`` or ``backends/`` registers what it defines; nothing else
lists them. Packages outside nbpeft add methods through the entry point group ``nbpeft.methods``:
each entry point names a module whose import registers.
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, AdapterWeights, PeftType, SharedState
from nbpeft.engine.contract.base import Backend, Composite, LayerKind
from nbpeft.engine.contract.combination import Combine, Member
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.errors import UnknownMethodError, did_you_mean, in_one_line, shortened

ENTRY_POINT_GROUP = "nbpeft.methods"

Targets = Collection[str] | str | None


@dataclass(frozen=True)
class Part:
    """An adapter that a config of another method asks for on some layer.

    Attributes:
        config: what ``create`` of the method takes.
        tied_to: path of the layer whose adapter it shares the tensors of; else empty.
    """

    config: Any
    tied_to: str = ""


class Companion(Protocol):
    """How configs of other methods ask for adapters of a method, with a field of theirs."""

    field: str
    """The field; empty or None asks for nothing."""
    file_keys: Mapping[str, str]
    """Parameter name -> what follows the module path in the files of the other methods."""

    def __call__(self, model: nn.Module, config: Any, modules: Sequence[tuple[str, nn.Module]]) -> Mapping[str, Part]:
        """Path -> adapter that the field asks for.

        Args:
            model: the base model.
            config: any config, with the field or without.
            modules: path and module of everything in the model; a module may come several times.

        Raises:
            TargetError: a module is not there, or cannot have such an adapter.
            ConfigError: the value is impossible.
        """
        ...

    def combine(self, parts: Mapping[str, Sequence[tuple[Member, float]]]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """Combines what configs asked for.

        Args:
            parts: path -> adapters there, each with the weight of its change.

        Returns:
            The field's value for the combination, and path -> parameter name -> tensor.
        """
        ...


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        label: its name for people, e.g. ``DoRA``.
        peft_type: the ``peft_type`` in config files.
        config_class: class of its configs.
        adapter_class: class of its adapters.
        applies: whether a config of that class means this method (several may share a class).
        prefix: starts the names of its parameters.
        file_keys: parameter name -> what follows the module path in PEFT's files, where that is not the name itself.
        default_targets: model type -> usual targets, names, a pattern or "all-linear"; None if unknown.
        variant: config -> a name more exact than the label, or empty: ``rsLoRA``.
        summary: config -> what panels, cards and previews show of it: ``{"r": "16", "α": "32"}``.
        smaller: config -> one with fewer parameters, for forecasts that do not fit; None where there is none.
        sample_configs: name -> fields of a config, without targets; the tests try the method with each.
        shared: class of what all its layers share, if anything.
        tied: (config, path -> (in, out) features of its layers, in model order) -> path -> parameter -> path of the
            earlier layer whose parameter it is, where some layers share one. A file holds it for each of them. The
            names of the config's targets are condensed before, where they are many.
        call_context: (config, args, kwargs of a call of the model) -> what its adapters find in ``base.context``
            while the call runs; a tensor with one entry for each row is cut to the rows that an adapter serves.
        call_arguments: names of arguments of a call that are for that alone, and not for the model.
        token_arguments: those of them that are one number for each token of the input, (rows, length); the others are
            one for each row.
        derived: (config, parameters of one place) -> what a file holds besides, computed from them, by key.
        combine: how adapters of it are combined; methods that can be combined with each other have the same.
        companion: lets configs of other methods ask for it.
        draws_in_training: whether its adapters compute with random numbers in training mode, besides dropout.
        layer_kinds: kinds of layers that it alone takes; where it has some, it takes no others.
        layer_prefix: what PEFT's names of its kinds of layers begin with: ``HRA`` of ``HRALinear``.
        layer_name: PEFT's name of a layer that carries adapters of it alone; empty for ``<peft_type>.<kind>``.
        layer_names: names under which PEFT's layers keep its parameters, and those of what they keep besides, each
            separated by spaces.
        pack: (config, key -> tensor) -> what a file holds in their place, where that is not the tensors themselves.
        unpack: (config, key -> tensor of a file) -> the tensors of an adapter. Called with tensors on the meta device
            first, whose shapes are checked before the file is read.
        fuse: (key -> tensor of a file, parameter of experts -> layers that it was) -> the same, with the tensors of
            those layers joined to the parameter's; for files from before transformers 5.
        model_functions: PEFT's name of a function of a model whose first adapter has such a config -> a function of the
            model's manager and the arguments.
        model_attributes: PEFT's name of an attribute of such a model's ``base_model`` -> a function of that.
        parts: (manager, adapter name) -> folder beside its file -> config, and path -> parameter -> tensor, of other
            adapters that it consists of.
        with_parts: (config of a file, folder of such an adapter -> its place or None, keywords of loading) -> the same
            config with their places.
        generation: (config, model) -> arguments of ``generate`` where a call does not say otherwise.
        without_weight: rewrites an adapter that is initialised from the weight as one that is not.
        kind_classes: kind of layer -> class of its adapters there, where that is another one. It has to name one for
            bare parameters (``target_parameters``) and for each ``Composite`` kind, or goes on none.
        tied_class: (config, paths of layers that share one weight) -> class of the adapters that use the tensors of the
            one on the first of them, for ``ensure_weight_tying``; None where there is none.
        when: when to choose it, in a few words.
        paper: where it is described: ``arXiv:2106.09685``, or an address.
        listed_with: fields of the config with which lists of methods show it, where its defaults are not enough.
    """

    label: str
    peft_type: str
    config_class: type[AdapterConfig]
    adapter_class: type[Adapter]
    prefix: str
    applies: Callable[[Any], bool] = lambda config: True
    file_keys: Mapping[str, str] = field(default_factory=dict)
    default_targets: Callable[[str | None], Targets] = lambda model_type: None
    variant: Callable[[Any], str] = lambda config: ""
    summary: Callable[[Any], Mapping[str, str]] = lambda config: {}
    smaller: Callable[[Any], Any] = lambda config: None
    sample_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: type[SharedState] | None = None
    tied: Callable[[Any, Mapping[str, tuple[int, int]]], Mapping[str, Mapping[str, str]]] | None = None
    call_context: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any] | None = None
    call_arguments: tuple[str, ...] = ()
    token_arguments: tuple[str, ...] = ()
    derived: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    combine: Combine | None = None
    companion: Companion | None = None
    draws_in_training: bool = False
    layer_kinds: tuple[LayerKind, ...] = ()
    layer_prefix: str = ""
    layer_name: str = ""
    layer_names: tuple[str, str] = ("", "")
    pack: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda config, tensors: tensors
    unpack: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda config, tensors: tensors
    fuse: Callable[[Mapping[str, Tensor], Mapping[str, tuple[str, ...]]], Mapping[str, Tensor]] | None = None
    model_functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    model_attributes: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    parts: Callable[[Any, str], Mapping[str, tuple[AdapterConfig, dict[str, dict[str, Tensor]]]]] = lambda _, name: {}
    with_parts: Callable[[Any, Callable[[str], str | None], Mapping[str, Any]], Any] = lambda config, *_: config
    generation: Callable[[Any, nn.Module], Mapping[str, Any]] = lambda config, model: {}
    without_weight: Callable[[Any, Mapping[str, Any], AdapterWeights], tuple[Any, AdapterWeights]] | None = None
    kind_classes: Mapping[str, type[Adapter]] = field(default_factory=dict)
    tied_class: Callable[[Any, Sequence[str]], type[Adapter]] | None = None
    when: str = ""
    paper: str = ""
    listed_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transforms_calls(self) -> bool:
        """Whether its adapters act on calls of the whole model, and not on layers."""
        return issubclass(self.adapter_class, ModelAdapter)

    def title(self, config: AdapterConfig) -> str:
        """Its name for people, for one config."""
        return self.variant(config) or self.label


class _Ranked(Protocol):
    priority: int


AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])
KindClass = TypeVar("KindClass", bound=type[Any])
Matching = TypeVar("Matching", Backend, LayerKind, Any)

_methods: list[Method] = []
_layer_kinds: list[LayerKind] = []
_composites: list[Any] = []
_backends: list[Backend] = []
_entry_points_loaded = False
_entry_points_loading = False
_entry_points_lock = threading.RLock()


def register(
    config_class: type[AdapterConfig], *, peft_type: str, label: str, **fields: Any
) -> Callable[[AdapterClass], AdapterClass]:
    """Registers an adapter class as a method.

    Args:
        config_class: class of its configs.
        peft_type: the ``peft_type`` in config files.
        label: its name for people.
        **fields: the other attributes of ``Method``; ``prefix`` is the ``peft_type`` in small letters by default.

    Raises:
        UnknownMethodError: another class has the label.
    """

    def decorate(cls: AdapterClass) -> AdapterClass:
        clash = next((m for m in _methods if m.label == label and m.adapter_class is not cls), None)
        if clash is not None and clash.adapter_class.__qualname__ != cls.__qualname__:
            raise UnknownMethodError(
                f"the method name {label!r} is taken by {clash.adapter_class.__module__}", label=label
            )
        if clash is not None:
            _methods.remove(clash)
        PeftType.add(peft_type)
        prefix = fields.pop("prefix", f"{peft_type.lower()}_")
        _methods.append(Method(label, peft_type, config_class, cls, prefix, **fields))
        return cls

    return decorate


def register_layer_kind(cls: KindClass) -> KindClass:
    """Registers a kind of layer; ``priority`` orders them, higher is asked first."""
    _insert(_layer_kinds, cls())
    _composites[:] = [kind for kind in _layer_kinds if isinstance(kind, Composite)]
    return cls


def register_backend(cls: KindClass) -> KindClass:
    """Registers a backend class; ``priority`` orders them, higher is asked first."""
    _insert(_backends, cls())
    return cls


def methods() -> tuple[Method, ...]:
    """All methods, those of other packages included."""
    _load_entry_points()
    return tuple(_methods)


def layer_kinds() -> tuple[LayerKind, ...]:
    """All kinds of layers, in the order they are asked."""
    return tuple(_layer_kinds)


def backends() -> tuple[Backend, ...]:
    """All backends, in the order they are asked."""
    return tuple(_backends)


def method_of(config: AdapterConfig) -> Method:
    """The method a config means.

    Raises:
        UnknownMethodError: no registered method takes this config.
    """
    for method in _methods if any(m.config_class is type(config) for m in _methods) else methods():
        if method.config_class is type(config) and method.applies(config):
            return method
    known, name = sorted({m.config_class.__name__ for m in _methods}), type(config).__name__
    whose = f" of {type(config).__module__.split('.')[0]}" if name in known else ""
    raise UnknownMethodError(
        f"{name}{whose} is not the config of a known method; known: {', '.join(known)}",
        config=type(config).__name__,
    )


def method_of_adapter(adapter: Adapter) -> Method | None:
    """The method that an adapter is made by, that of the nearest registered class; None if there is none."""
    for cls in type(adapter).__mro__:
        for method in _methods:
            if cls in (method.adapter_class, *method.kind_classes.values()):
                return method
    return None


def methods_of_type(peft_type: str) -> tuple[Method, ...]:
    """The methods that share a ``peft_type`` in files."""
    return tuple(method for method in methods() if method.peft_type == peft_type)


def transforms_calls(peft_type: str) -> bool:
    """Whether adapters with a ``peft_type`` act on calls of the whole model: their files name no layers."""
    return any(method.transforms_calls for method in methods_of_type(peft_type))


def companions() -> tuple[Method, ...]:
    """The methods that configs of other methods can ask for."""
    return tuple(method for method in methods() if method.companion is not None)


def file_keys(peft_type: str) -> dict[str, str]:
    """Parameter name -> what follows the module path in PEFT's files; a name that is not in it stays as it is.

    Args:
        peft_type: of the config beside the file.
    """
    keys: dict[str, str] = {}
    for method in methods():
        if method.companion is not None:
            keys.update(method.companion.file_keys)
    for method in methods_of_type(peft_type):
        if method.companion is not None:
            keys = {key: value for key, value in keys.items() if key not in method.companion.file_keys}
        keys.update(method.file_keys)
    return keys


def prefixes(peft_type: str) -> tuple[str, ...]:
    """What the names of parameters in a file with such a config may start with."""
    found = {method.prefix for method in (*methods_of_type(peft_type), *companions())}
    return tuple(sorted(found))


def config_class_of(peft_type: str) -> type[AdapterConfig]:
    """The config class of a ``peft_type`` in a file.

    Raises:
        UnknownMethodError: no registered method has it.
    """
    known = {m.peft_type: m.config_class for m in reversed(methods())}
    if peft_type not in known:
        raise UnknownMethodError(
            f"peft_type {peft_type!r} is not a known method; known: {', '.join(sorted(known))}."
            + did_you_mean(peft_type, known),
            peft_type=peft_type,
        )
    return known[peft_type]


def resolve_layer_kind(module: nn.Module, method: Method | None = None) -> LayerKind | None:
    """The kind a layer is of, or None when it cannot be adapted; by a method that may have kinds of its own."""
    kinds = _layer_kinds if method is None or not method.layer_kinds else method.layer_kinds
    return _first_match(kinds, module)


def composite_kind(module: nn.Module) -> Any:
    """The kind of a module that computes with several weights itself, a ``Composite``; None of any other module."""
    return _first_match(_composites, module)


def resolve_backend(module: nn.Module) -> Backend | None:
    """The backend that reads a module's weight, or None."""
    return _first_match(_backends, module)


def _first_match(ranked: Sequence[Matching], module: nn.Module) -> Matching | None:
    for one in ranked:  # asked of every module of a model: a generator costs as much again
        if one.matches(module):
            return one
    return None


def layer_kind_named(name: str) -> LayerKind:
    """The kind of a name that ``resolve_layer_kind`` gave."""
    own = (kind for method in _methods for kind in method.layer_kinds)
    return next(kind for kind in chain(_layer_kinds, own) if kind.name == name)


def backend_named(name: str) -> Backend:
    """The backend of a name that ``resolve_backend`` gave."""
    return next(backend for backend in _backends if backend.name == name)


def _insert(ranked: list[Any], new: _Ranked) -> None:
    ranked[:] = [old for old in ranked if type(old).__qualname__ != type(new).__qualname__]
    ranked.append(new)
    ranked.sort(key=lambda item: -item.priority)


def _load_entry_points() -> None:
    """Lets other packages register their methods, once; one that cannot be loaded is skipped with a warning."""
    global _entry_points_loaded, _entry_points_loading
    if _entry_points_loaded:
        return
    failures = []
    with HeldInterrupts(), _entry_points_lock:
        if _entry_points_loaded or _entry_points_loading:  # a package may use the registry while it is imported
            return
        _entry_points_loading = True
        try:
            for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                try:
                    entry_point.load()
                except Exception as error:
                    failures.append((entry_point, error))
            _entry_points_loaded = True
        finally:
            _entry_points_loading = False
    for entry_point, failure in failures:
        package = entry_point.value if entry_point.dist is None else entry_point.dist.name
        warnings.warn(
            f"the method {entry_point.name!r} of the package {package} cannot be loaded and is left out: "
            f"{type(failure).__name__}: {shortened(in_one_line(failure), 200)}",
            stacklevel=3,
        )
