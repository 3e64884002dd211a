"""What a method may say of itself beside its config and its adapter: optional records of ``register``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, AdapterWeights
from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.contract.combination import Member
from nbpeft.engine.contract.shared_state import SharedState


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

    @property
    def file_keys(self) -> Mapping[str, str]:
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
class FileFormat:
    """How the files of a method differ from the names and tensors of its parameters.

    Attributes:
        prefix: starts the names of its parameters; the ``peft_type`` in small letters if empty.
        keys: parameter name -> what follows the module path in PEFT's files, where that is not the name itself.
        pack: (config, key -> tensor) -> what a file holds in their place, where that is not the tensors themselves.
        unpack: (config, key -> tensor of a file) -> the tensors of an adapter. Called with tensors on the meta device
            first, whose shapes are checked before the file is read.
        derived: (config, parameters of one place) -> what a file holds besides, computed from them, by key.
        fuse: (key -> tensor of a file, parameter of experts -> layers that it was) -> the same, with the tensors of
            those layers joined to the parameter's; for files from before transformers 5.
        parts: (manager, adapter name) -> folder beside its file -> config, and path -> parameter -> tensor, of other
            adapters that it consists of.
        with_parts: (config of a file, folder of such an adapter -> its place or None, keywords of loading) -> the same
            config with their places.
        has_tensors: whether there is anything in an adapter that a file holds.
        without_weight: rewrites an adapter that is initialised from the weight as one that is not.
    """

    prefix: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    pack: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda config, tensors: tensors
    unpack: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda config, tensors: tensors
    derived: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    fuse: Callable[[Mapping[str, Tensor], Mapping[str, tuple[str, ...]]], Mapping[str, Tensor]] | None = None
    parts: Callable[[Any, str], Mapping[str, tuple[AdapterConfig, dict[str, dict[str, Tensor]]]]] = lambda _, name: {}
    with_parts: Callable[[Any, Callable[[str], str | None], Mapping[str, Any]], Any] = lambda config, *_: config
    has_tensors: bool = True
    without_weight: Callable[[Any, Mapping[str, Any], AdapterWeights], tuple[Any, AdapterWeights]] | None = None


@dataclass(frozen=True)
class SharedTensors:
    """What the layers of one adapter share, or an adapter with those of other methods.

    Attributes:
        state: class of what all its layers share, if anything.
        tied: (config, path -> (in, out) features of its layers, in model order) -> path -> parameter -> path of the
            earlier layer whose parameter it is, where some layers share one. A file holds it for each of them. The
            names of the config's targets are condensed before, where they are many.
        tied_class: (config, paths of layers that share one weight) -> class of the adapters that use the tensors of the
            one on the first of them, for ``ensure_weight_tying``; None where there is none.
        companion: lets configs of other methods ask for it.
    """

    state: type[SharedState] | None = None
    tied: Callable[[Any, Mapping[str, tuple[int, int]]], Mapping[str, Mapping[str, str]]] | None = None
    tied_class: Callable[[Any, Sequence[str]], type[Adapter]] | None = None
    companion: Companion | None = None


@dataclass(frozen=True)
class CallInputs:
    """What the adapters of a method take from a call of the model.

    Attributes:
        context: (config, args, kwargs of a call of the model) -> what its adapters find in ``base.context`` while the
            call runs; a tensor with one entry for each row is cut to the rows that an adapter serves.
        arguments: names of arguments of a call that are for that alone, and not for the model.
        token_arguments: those of them that are one number for each token of the input, (rows, length); the others are
            one for each row.
        generation: (config, model) -> arguments of ``generate`` where a call does not say otherwise.
    """

    context: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any] | None = None
    arguments: tuple[str, ...] = ()
    token_arguments: tuple[str, ...] = ()
    generation: Callable[[Any, nn.Module], Mapping[str, Any]] = lambda config, model: {}


@dataclass(frozen=True)
class OwnKinds:
    """Kinds of layers that a method treats in its own way.

    Attributes:
        only: kinds of layers that it alone takes; where it has some, it takes no others.
        classes: kind of layer -> class of its adapters there, where that is another one. It has to name one for bare
            parameters (``target_parameters``) and for each ``Composite`` kind, or goes on none.
        quantized: whether it goes on a layer whose weight is stored quantized.
    """

    only: tuple[LayerKind, ...] = ()
    classes: Mapping[str, type[Adapter]] = field(default_factory=dict)
    quantized: bool = True
