"""Optional records that a method passes to ``register`` in addition to its config and adapter classes."""

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
    """An adapter that a config of another method requests on one layer.

    Attributes:
        config: passed to ``create`` of the companion's adapter class.
        tied_to: path of the layer whose adapter's tensors it uses; empty if it has its own.
    """

    config: Any
    tied_to: str = ""


class Companion(Protocol):
    """Lets configs of other methods request adapters of this method through one of their fields.

    For example, ``trainable_token_indices`` of a ``LoraConfig`` requests adapters of trainable tokens.
    """

    field: str
    """Name of the field; an empty or None value requests nothing."""

    @property
    def file_keys(self) -> Mapping[str, str]:
        """Parameter name -> what follows the module path in the files of the other methods."""

    def __call__(self, model: nn.Module, config: Any, modules: Sequence[tuple[str, nn.Module]]) -> Mapping[str, Part]:
        """The adapters that the field requests.

        Args:
            model: the base model.
            config: any config, with the field or without.
            modules: path and module of everything in the model; a module may come several times.

        Returns:
            Path -> requested adapter.

        Raises:
            TargetError: a module does not exist, or cannot have such an adapter.
            ConfigError: the value of the field is invalid.
        """
        ...

    def combine(self, parts: Mapping[str, Sequence[tuple[Member, float]]]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        """Combines requested adapters of several configs.

        Args:
            parts: path -> adapters there, each with its weight in the combination.

        Returns:
            The value of the field in the combined config, and path -> parameter name -> tensor.
        """
        ...


def _rank(config: Any) -> int:
    """``r`` of a config; 0 without one."""
    rank = getattr(config, "r", None)
    return rank if isinstance(rank, int) else 0


@dataclass(frozen=True)
class Listing:
    """How lists, panels, model cards and messages present a method.

    Attributes:
        when: when to choose it, in a few words.
        paper: where it is described: ``arXiv:2106.09685``, or a URL.
        variant: config -> a display name that is more specific than the label (``rsLoRA``), or the empty string.
        summary: config -> settings to show: ``{"r": "16", "α": "32"}``; by default ``r`` if the config has it.
        smaller: config -> a config with fewer parameters, to suggest if a memory estimate does not fit, or None; by
            default with half of ``r``.
        listed_with: config fields to use in lists of methods, if the config's defaults alone are not valid.
    """

    when: str = ""
    paper: str = ""
    variant: Callable[[Any], str] = lambda config: ""
    summary: Callable[[Any], Mapping[str, str]] = lambda config: {"r": str(config.r)} if _rank(config) else {}
    smaller: Callable[[Any], Any] = lambda config: config.copy(r=config.r // 2) if _rank(config) > 1 else None
    listed_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileFormat:
    """How the files of a method differ from its parameters.

    Attributes:
        prefix: start of the keys of its parameters in PEFT's files; if empty, ``peft_type`` in lower case and ``_``.
        keys: parameter name -> what follows the module path in PEFT's files; needed only if that is not the name.
        pack: (config, key -> tensor) -> key -> tensor to write to a file, if the tensors are not saved as they are.
        unpack: (config, key -> tensor in a file) -> key -> tensor of the adapter; the inverse of ``pack``. It is called
            with tensors on the meta device first, so that shapes are checked before the file is read.
        derived: (config, parameters of one layer) -> key -> further tensor to write, computed from the parameters.
        fuse: (key -> tensor in a file, name of an expert parameter -> its former layers) -> the tensors, with those of
            the former layers joined to one for the parameter; for files from before transformers 5.
        parts: (manager, adapter name) -> subfolder -> (config, path -> parameter -> tensor) of the adapters that it
            consists of, each of which is saved in its subfolder.
        with_parts: (config of a file, function from a subfolder to its location or None, keywords of loading) -> the
            config with the locations of these adapters.
        has_tensors: whether an adapter of the method has any tensors to save.
        without_weight: (config, path -> adapter, weights) -> config and weights of an equal adapter that is not
            initialized from the base weight.
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
    """Tensors that the layers of one adapter share, and adapters of this method inside those of other methods.

    Attributes:
        state: class of the state that all layers of an adapter share, or None.
        tied: (config, path -> (in, out) features of its layers, in model order) -> path -> parameter -> path of the
            earlier layer that has this parameter; for methods in which only some layers share a parameter. It is saved
            for each of these layers. A long list of targets in the config is condensed before the call.
        tied_class: (config, paths of layers that share one weight) -> class of the adapters on all but the first of
            these layers, which use the tensors of the first one's adapter; None if the method cannot do that. For
            ``ensure_weight_tying``.
        companion: lets configs of other methods request adapters of this one; None if they cannot.
    """

    state: type[SharedState] | None = None
    tied: Callable[[Any, Mapping[str, tuple[int, int]]], Mapping[str, Mapping[str, str]]] | None = None
    tied_class: Callable[[Any, Sequence[str]], type[Adapter]] | None = None
    companion: Companion | None = None


@dataclass(frozen=True)
class CallInputs:
    """What the adapters of a method read from a call of the model.

    Attributes:
        context: (config, args, kwargs of the call) -> value of ``base.context`` in its adapters during the call. In a
            mixed batch, a tensor with one entry for each row is cut to the rows of the adapter.
        arguments: names of keyword arguments of a call that only ``context`` reads; they are not passed to the model.
        token_arguments: names in ``arguments`` with one value for each token, (rows, length); the others have one value
            for each row.
        generation: (config, model) -> default arguments of ``generate``.
    """

    context: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any] | None = None
    arguments: tuple[str, ...] = ()
    token_arguments: tuple[str, ...] = ()
    generation: Callable[[Any, nn.Module], Mapping[str, Any]] = lambda config, model: {}


@dataclass(frozen=True)
class OwnKinds:
    """Which kinds of layers a method supports, if that differs from the default.

    Attributes:
        only: kinds of layers of this method alone; if not empty, it supports no other kinds.
        classes: name of a layer kind -> adapter class for that kind, if it is not the registered one. Bare parameters
            (``target_parameters``) and ``Composite`` kinds are supported only if they have an entry here.
        quantized: whether it supports layers with a quantized weight.
        linear: whether it is meant for linear layers. If not, lists leave ``target_modules="all-linear"`` out, and an
            adapter with it is added with a warning.
    """

    only: tuple[LayerKind, ...] = ()
    classes: Mapping[str, type[Adapter]] = field(default_factory=dict)
    quantized: bool = True
    linear: bool = True
