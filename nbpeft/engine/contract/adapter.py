"""The contract of a method: its config, its adapters, and their optional capabilities.

    Adapter        the maths of one method on one layer: what to ADD to the output and to the weight
    SharedState    tensors that all layers of one adapter share, for methods that have some (a common projection)

An adapter does not know its own name, whether it is active, or how the weight is quantized. So M methods, K kinds of
layers and N weight backends (``base.py``) take M + K + N files, not M * K * N. What only some methods can do is a
capability (``capabilities.py``).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import MethodType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from nbpeft._util import hooks
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter_site import AdapterSite as AdapterSite
from nbpeft.engine.contract.adapter_weights import AdapterWeights as AdapterWeights
from nbpeft.engine.contract.adapter_weights import LowRankDelta as LowRankDelta
from nbpeft.engine.contract.adapter_weights import ReadsTensors as ReadsTensors
from nbpeft.engine.contract.adapter_weights import TakenOver as TakenOver
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import Bindable
from nbpeft.engine.contract.capabilities import ChangesBase as ChangesBase
from nbpeft.engine.contract.capabilities import ConvertsToLora as ConvertsToLora
from nbpeft.engine.contract.capabilities import FusesAdd as FusesAdd
from nbpeft.engine.contract.capabilities import HasFixedTensors as HasFixedTensors
from nbpeft.engine.contract.capabilities import HasInnerAdapters as HasInnerAdapters
from nbpeft.engine.contract.capabilities import HotSwaps as HotSwaps
from nbpeft.engine.contract.capabilities import IsLowRank as IsLowRank
from nbpeft.engine.contract.capabilities import MeasuresDelta as MeasuresDelta
from nbpeft.engine.contract.capabilities import MergesInPlace as MergesInPlace
from nbpeft.engine.contract.capabilities import NotConvertible as NotConvertible
from nbpeft.engine.contract.capabilities import Pads as Pads
from nbpeft.engine.contract.capabilities import QuantizationAware as QuantizationAware
from nbpeft.engine.contract.capabilities import ReplacesCall as ReplacesCall
from nbpeft.engine.contract.capabilities import Rescales as Rescales
from nbpeft.engine.contract.capabilities import ServesRows as ServesRows
from nbpeft.engine.contract.capabilities import Shape as Shape
from nbpeft.engine.contract.capabilities import ShowsModules as ShowsModules
from nbpeft.engine.contract.capabilities import StartsInWeight as StartsInWeight
from nbpeft.engine.contract.capabilities import TransformsInput as TransformsInput
from nbpeft.engine.contract.capabilities import TransformsOutput as TransformsOutput
from nbpeft.engine.contract.capabilities import Untargeted as Untargeted
from nbpeft.engine.contract.capabilities import UsesAnother as UsesAnother
from nbpeft.engine.contract.capabilities import inner_adapters_of as inner_adapters_of
from nbpeft.engine.contract.capabilities import rounds as rounds
from nbpeft.engine.contract.capabilities import size_of as size_of
from nbpeft.engine.contract.capabilities import source_of as source_of
from nbpeft.engine.contract.capabilities import swap_refusal as swap_refusal
from nbpeft.engine.contract.field_types import check_types
from nbpeft.engine.contract.peft_names import ADAPTER_PARTS as ADAPTER_PARTS
from nbpeft.engine.contract.peft_names import PeftNames as PeftNames
from nbpeft.engine.contract.peft_types import TASK_HEADS as TASK_HEADS
from nbpeft.engine.contract.peft_types import PeftType as PeftType
from nbpeft.engine.contract.peft_types import TaskType as TaskType
from nbpeft.engine.contract.shared_state import SharedSite as SharedSite
from nbpeft.engine.contract.shared_state import SharedState as SharedState
from nbpeft.engine.kernels.numerics import add_scaled_, compute_dtype
from nbpeft.errors import ConfigError, MergeError, did_you_mean
from nbpeft.names import PEFT_VERSION


class ConfigStore(Protocol):
    """Reads and writes configs on disk or a hub; the checkpoint package provides it."""

    def make(self, fields: dict[str, Any]) -> AdapterConfig:
        """Builds a config from its fields, spelled as in ``adapter_config.json``."""
        ...

    def read(self, source: str, **options: Any) -> AdapterConfig:
        """Reads the config of a saved adapter."""
        ...

    def write(self, config: AdapterConfig, folder: str, **options: Any) -> None:
        """Writes a config into a folder."""
        ...

    def push(self, config: AdapterConfig, repo_id: str, **options: Any) -> str:
        """Uploads the file of a config to a repository."""
        ...

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors of a file, by key."""
        ...

    def adapter(self, source: str, model: nn.Module) -> tuple[AdapterConfig, ReadsTensors]:
        """Reads the config of a saved adapter in a folder or on the Hub.

        Returns:
            The config, and a function that reads the adapter's tensors for ``model``.
        """
        ...


@dataclass
class AdapterConfig:
    """Fields that every method has. Names, defaults and meanings are PEFT's.

    Public as ``nbpeft.PeftConfig``. The engine copies a config that it is given, so later changes to the caller's
    object have no effect on the adapter.

    Attributes:
        task_type: what the model is for; decides which new heads are trained and how the adapter is loaded.
        peft_type: the method, as in ``adapter_config.json``.
        auto_mapping: class and module of a base model that has no ``task_type``, so that PEFT can load it.
        peft_version: version of PEFT whose file format is written.
        base_model_name_or_path: Hub id or folder of the base model.
        revision: revision of the base model on the Hub.
        inference_mode: whether the adapter is loaded frozen.
    """

    task_type: TaskType | str | None = field(default=None)
    peft_type: PeftType | str | None = field(default=None)
    auto_mapping: dict[str, Any] | None = field(default=None)
    peft_version: str | None = field(default=None)
    base_model_name_or_path: str | None = field(default=None)
    revision: str | None = field(default=None)
    inference_mode: bool = field(default=False)

    store: ClassVar[ConfigStore | None] = None
    not_implemented: ClassVar[tuple[str, ...]] = ()
    """Fields of PEFT that are not implemented: only false values are accepted, and their type is not checked."""
    instead: ClassVar[Mapping[str, str]] = {}
    """Field of ``not_implemented`` -> advice for the error message."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Fields that have an effect only together with a field of ``not_implemented``; completion leaves them out."""
    checked_apart: ClassVar[tuple[str, ...]] = ()
    """Fields that ``check_types`` skips because another check covers their type and value."""
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field -> its valid values, or examples of them. A field that is missing here takes any value of its type."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Fields with a rank or another size: whole numbers from 1."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Fields with a dropout or another fraction, from 0 to 1."""
    seeds: ClassVar[tuple[str, ...]] = ()
    """Fields with a seed of torch's generators."""
    positive: ClassVar[tuple[str, ...]] = ()
    """Fields with a number above 0."""
    not_negative: ClassVar[tuple[str, ...]] = ()
    """Fields with a number of at least 0."""
    condenses_targets: ClassVar[bool] = True
    """Whether a long list of targets may be saved as shorter suffixes that match the same modules."""
    value_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that change what an adapter computes, but not the names and shapes of its tensors."""
    card_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that a model card lists; if empty, the method's own fields that differ from their default."""
    card_tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card."""
    own_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that PEFT does not have; they are saved only if they are set."""
    slot_fields: ClassVar[tuple[str, ...]] = (
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    )
    """Fields that decide which modules an adapter has; hot-swapping another adapter into its slot keeps them."""
    learns_prompt: ClassVar[bool] = False
    """Whether the method learns a prompt: tokens, or cached states, in front of the input."""
    on_last_layers: ClassVar[bool] = False
    """Whether only the last layers of a model get adapters."""

    def __post_init__(self) -> None:
        hooks.configured()
        check_types(self, passing=(*self.not_implemented, *self.checked_apart))
        for name in self.not_implemented:
            if getattr(self, name):
                advice = self.instead.get(name, "leave it out")
                raise ConfigError(f"{name} is not implemented; {advice}", field=name)
        self.peft_version = self.peft_version or PEFT_VERSION
        if self.task_type is None:
            return
        names = [task.value for task in TaskType]
        task = getattr(self.task_type, "value", self.task_type)
        if str(task) not in names:
            raise ConfigError(
                f"task_type {self.task_type!r:.60} is not one of {', '.join(names)}."
                + did_you_mean(str(self.task_type), names),
                field="task_type",
                task_type=self.task_type,
            )
        if task is not self.task_type:  # a string stays one, as in PEFT: f"{config.task_type}" names folders
            self.task_type = TaskType(task)

    @property
    def initialised_from_weight(self) -> bool:
        """Whether an adapter is initialised from a part of the base weight, and so depends on its values (PiSSA)."""
        return False

    def started_as(self, init: str) -> Self | None:
        """A copy that is initialised from the weight with ``init``.

        Args:
            init: as in the config (``init_lora_weights``).

        Returns:
            The copy; None if ``init`` alone cannot find the same part of the weight again, as when it needs data.
        """
        return None

    def has_scale_of(self, other: AdapterConfig, paths: Iterable[str]) -> bool:
        """Whether this config can use the part of the weight that another adapter was initialised from.

        Args:
            other: config of the other adapter, of the same method.
            paths: paths of the layers in question.
        """
        return False

    @property
    def is_quantization_aware(self) -> bool:
        """Whether the adapter is trained against the rounding that merging it into quantized weights will cause."""
        return False

    def rounded(self) -> Self:
        """A copy with quantization-aware training; see ``is_quantization_aware``.

        Raises:
            ConfigError: the method does not support it.
        """
        raise ConfigError(
            f"the model was prepared with quantization_aware=True, which {type(self).__name__} does not support: use a "
            "LoraConfig, or prepare the model without it",
            field="quantization_aware",
        )

    def unused_patterns(self, paths: Sequence[str]) -> str:
        """Describes patterns in this config that match none of the adapted modules.

        Args:
            paths: paths of the adapted modules.

        Returns:
            Sentences for a warning; empty if every pattern matches.
        """
        return ""

    def on_model(self, model: nn.Module, planned: Callable[[AdapterConfig], Any]) -> AdapterConfig:
        """Completes this config from the model, or from saved adapters that it names.

        Args:
            model: the base model.
            planned: returns the plan for adding another config to this model.

        Returns:
            A completed copy; this config itself if there is nothing to complete.

        Raises:
            NbpeftError: it cannot be completed, or an adapter that it names cannot be read.
        """
        return self

    def fill_in(self, model_type: str | None) -> None:
        """Fills in fields that depend on the type of model, in place; called on a copy whose targets are resolved.

        Args:
            model_type: ``config.model_type`` of the base model; None if it has none.

        Raises:
            ConfigError: a field has no default for this type of model.
        """

    def fill_in_layers(self, features: Mapping[str, tuple[int, int]]) -> bool:
        """Fills in fields that need the sizes of all adapted layers, in place; called on a copy of a config.

        Args:
            features: path -> (in, out) features of each layer that gets an adapter, in the order of the model.

        Returns:
            Whether a field changed, so that ``parameter_shapes`` has to be called again.
        """
        return False

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Fills in the sizes that a prompt method takes from the model, in place; called on a copy of a config.

        Args:
            model: the base model.
            width: features of its input embedding; 0 if it has none.

        Raises:
            ConfigError: the model's config lacks a size that is needed.
        """

    def reconciled(self, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        """Adjusts this config to the tensors of its file, or the tensors to the config.

        Args:
            tensors: key -> tensor of the file.

        Returns:
            The config to use, and the tensors to bind, by key.
        """
        return self, tensors

    def stored_tensors(self, path: str) -> dict[str, Tensor]:
        """Reads the tensors of a file whose path is the value of a field.

        Args:
            path: path of the file.

        Returns:
            Key -> tensor.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return store_of(type(self)).tensors(path)

    @property
    def adapter_size(self) -> int | None:
        """The rank, or another size, of the adapter; None if the method has none, or it differs between layers."""
        return None

    def resized(self, size: int) -> Self:
        """A copy with another size; called only if ``adapter_size`` is not None."""
        raise NotImplementedError

    def set_size(self, size: int, paths: Sequence[str]) -> None:
        """Sets one size (rank) for all layers, in place, and keeps the scaling of each layer.

        Args:
            size: the new size.
            paths: paths of the adapted layers.

        Raises:
            ConfigError: adapters of this method have no size that could be set.
        """
        raise ConfigError(f"{type(self).__name__} has no size that could be set")

    def to_dict(self) -> dict[str, Any]:
        """All fields that are saved, nested configs as dictionaries, as PEFT's ``to_dict``.

        ``runtime_config``, which is valid only in this process, and unset ``own_fields`` are left out.
        """
        unset = [name for name in self.own_fields if not getattr(self, name)]
        return {name: v for name, v in dataclasses.asdict(self).items() if name not in ("runtime_config", *unset)}

    def set_derived(self, **values: Any) -> None:
        """Sets attributes that are not fields: values derived from a model, which are neither saved nor compared.

        Args:
            **values: attribute -> value.
        """
        vars(self).update(values)

    def copy(self, **changes: Any) -> Self:
        """A deep copy with some fields replaced; the checks of the constructor do not run again."""
        twin = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(twin, name, value)
        return twin

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **options: Any
    ) -> AdapterConfig:
        """Reads the config of a saved adapter from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hub.
            subfolder: a folder inside it.
            **options: ``revision``, ``cache_dir``, ``token``, …; other keywords that libraries pass on are ignored.

        Returns:
            The config, of the class that its ``peft_type`` names.

        Raises:
            CheckpointNotFoundError: there is no ``adapter_config.json``.
            UnknownMethodError: the file names a method that is not registered.
        """
        return store_of(cls).read(pretrained_model_name_or_path, subfolder=subfolder, **options)

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Writes ``adapter_config.json`` into a folder, atomically."""
        store_of(type(self)).write(self, save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads ``adapter_config.json`` to a repository on the hub.

        Args:
            repo_id: ``user/name``; the repository is created if it does not exist.
            **options: ``token``, ``private``, ``endpoint``, and what ``HfApi.upload_folder`` takes.

        Returns:
            The URL of the commit.
        """
        return store_of(type(self)).push(self, repo_id, **options)


_IN_USE = "_is_of_an_adapter"


def note_use(config: AdapterConfig) -> AdapterConfig:
    """Marks a config as belonging to an adapter on a model, and returns it. Copies of the config have the mark too."""
    vars(config)[_IN_USE] = True
    return config


def is_of_an_adapter(config: AdapterConfig) -> bool:
    """Whether a config, or one that it was copied from, belongs to an adapter on a model."""
    return _IN_USE in vars(config)


def store_of(cls: type[AdapterConfig]) -> ConfigStore:
    """The store that reads and writes configs of a class.

    Raises:
        ConfigError: no store is set, because ``nbpeft.checkpoint`` was not imported.
    """
    if cls.store is None:
        raise ConfigError("reading and writing configs needs nbpeft.checkpoint to be imported")
    return cls.store


class Adapter(Bindable):
    """One method, for one adapter name, on one layer. The base class of a method's adapters.

    A subclass implements ``parameter_shapes``, ``initial_tensors``, ``forward`` and ``delta_weight``, and declares in
    ``from_config`` which settings it takes from its config. All tensors that it trains are its own parameters, named as
    in the paper; ``parameter_shapes`` returns their names and shapes before anything is allocated.
    """

    from_config: ClassVar[Mapping[str, str]] = {}
    """Attribute of the adapter -> the field, property or method of the config, or of one of its fields (``a.b``).

    A method is called with the path of the layer. The attributes are set when the adapter is created,
    replaced (and restored on failure) when another adapter is swapped in, and shown by ``repr``. An attribute named
    ``scaling`` is the factor that ``Rescales`` changes.
    """

    identity: ClassVar[Mapping[str, float]] = {}
    """Parameter -> a value at which the adapter changes nothing, whatever its other parameters are.

    Empty if the adapter changes nothing when all its parameters are zero.
    """

    reads_weight: ClassVar[bool] = False
    """Whether ``delta_weight`` depends on its ``weight``; then each of several adapters needs the frozen weight."""

    peft: ClassVar[PeftNames] = PeftNames()
    """PEFT's names for its parameters and attributes."""

    # What every method implements

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The parameters that an adapter on this layer will have.

        Args:
            config: the method's own config.
            path: path of the layer in the base model.
            module: the frozen layer.
            kind: kind of the layer; gives its features and the shape of its canonical weight.

        Returns:
            Parameter name -> shape.

        Raises:
            ConfigError: the method does not work on this layer with this config.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement parameter_shapes")

    @classmethod
    def initial_tensors(cls, config: Any, site: AdapterSite) -> Mapping[str, Tensor]:
        """Creates the tensors of a new adapter; by default all are zeros.

        Args:
            config: the method's own config.
            site: the layer; ``site.new`` makes tensors on its device and in the dtype of new parameters.

        Returns:
            Parameter name -> tensor.
        """
        return {name: site.new(shape) for name, shape in site.shapes.items()}

    def prepare(self, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Sets buffers and attributes that are neither in ``from_config`` nor parameters; called after those are set.

        Args:
            config: the method's own config.
            site: the layer, with the state that it shares with others.
            tensors: the loaded or initial tensors by name, including those of ``fixed_tensors`` that are present.
        """

    _names: tuple[str, ...] = ()

    @classmethod
    def _class_for(cls, config: Any, site: AdapterSite) -> type[Adapter]:
        """The class of the adapter on a layer: this one, or a subclass for such layers or configs."""
        return cls

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the adapter of one layer; rarely overridden.

        Args:
            config: the method's own config.
            site: the layer.
            tensors: loaded tensors by name, which are used without a copy; None to initialise new ones.

        Returns:
            The adapter.
        """
        own: Any = cls._class_for(config, site)
        made: Self = own()
        given = site.checked(own.initial_tensors(config, site), own) if tensors is None else tensors
        names = tuple(site.shapes)
        made.bind({name: given[name] for name in names}, _names=names, **made._config_values(config, site.path))
        made.prepare(config, site, given)
        return made

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the layer's output: by default the product with ``delta_weight``, and ``delta_bias``.

        Override it if that is cheaper without a tensor of the weight's size.

        Args:
            x: the layer's input, (…, in), in its own dtype. The adapter casts a copy and does not change ``x``.
            base_output: the output of the frozen layer, (…, out), bias included.
            base: the layer.

        Returns:
            A tensor shaped like ``base_output``, in the dtype of the adapter or of autocast.
        """
        delta = self.delta_weight(base.weight(), base)
        dtype = compute_dtype(x, delta)
        output = base.kind.apply(base.module, x.to(dtype) if x.is_floating_point() else x, delta.to(dtype))
        bias = self.delta_bias(base)
        return output if bias is None else output + base.kind.per_channel(base.module, bias).to(output)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the weight of the layer: by default the product of ``low_rank_delta``.

        Override it if the adapter has none; the result must be differentiable if ``forward`` is not overridden.

        Args:
            weight: the frozen canonical weight, (out, in) or (out, in / groups, *kernel).
            base: the layer.

        Returns:
            A tensor shaped like ``weight``.

        Raises:
            MergeError: it cannot be merged; see ``unmergeable_reason``.
        """
        product = self.low_rank_delta(base) if isinstance(self, ConvertsToLora) and not self.reads_weight else None
        if product is not None:
            return product.up @ product.down * product.scaling
        reason = self.unmergeable_reason(base)
        if not reason:
            raise NotImplementedError(f"{type(self).__name__} does not implement delta_weight")
        raise MergeError(f"what the adapter adds is not {reason}")

    # Defaults that a method may improve on

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """Computes what to ADD to the layer's bias, (out,); None if the bias does not change."""
        return None

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why it cannot be merged, to complete the sentence "it cannot be merged into …"; empty if it can be."""
        return ""

    @property
    def delta_rank(self) -> int | None:
        """The largest rank that its delta can have; None if the method does not bound it."""
        return None

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        """The tensors that are saved, not copies: parameters and, with ``HasFixedTensors``, persistent buffers.

        Args:
            shapes: returns what ``parameter_shapes`` gives for its config.

        Returns:
            Name -> tensor.
        """
        constants = self.peft.constants
        own: dict[str, Tensor | None] = {key: value for key, value in self._parameters.items() if key not in constants}
        if isinstance(self, HasFixedTensors):
            own |= {key: value for key, value in self._buffers.items() if key not in self._non_persistent_buffers_set}
        saved = {key: value for key, value in own.items() if value is not None}
        if not isinstance(self, Pads) or not self.rank_axes:
            return saved
        unpadded = shapes()
        return {key: self.used_part(key, value, unpadded.get(key, value.shape))[0] for key, value in saved.items()}

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites its parameters so that it adds nothing."""
        for name, value in (self.identity or dict.fromkeys(self._parameters, 0.0)).items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.detach().fill_(value)

    @classmethod
    def _config_values(cls, config: Any, path: str) -> dict[str, Any]:
        """Attribute of ``from_config`` -> its value on the layer at ``path``."""
        values = {}
        for name, field_name in cls.from_config.items():
            value = attrgetter(field_name)(config)
            values[name] = value(path) if type(value) is MethodType else value
        if "scaling" in values:
            values["scaling"] = float(values["scaling"])
        return values

    def extra_repr(self) -> str:
        """The shapes of its parameters, and the settings of ``from_config``."""
        shapes = {name: tuple(value.shape) for name, value in self._parameters.items() if value is not None}
        shown = {**shapes, **{name: getattr(self, name) for name in self.from_config}}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """Warnings about a config, to be shown before it is applied.

        Args:
            config: the method's own config.
            modules: path, module and kind of each layer that it targets.

        Returns:
            One sentence for each problem.
        """
        return ()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets ``requires_grad`` on its parameters, except that ``frozen_parameters`` never get it."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen_parameters)
        return self


_PLAIN = (bool, int, float, str, type(None))
"""Types of settings that can be compared."""


@torch.no_grad()
def delta_of(adapter: Adapter, weight: Tensor, base: BaseLayer) -> Tensor:
    """What an adapter adds to the weight of its layer, detached.

    Args:
        adapter: the adapter.
        weight: the frozen canonical weight.
        base: the layer.
    """
    return adapter.delta_weight(weight, base).detach()


def add_to_(adapter: Adapter, weight: Tensor, base: BaseLayer, scale: float) -> None:
    """Adds ``scale * delta_weight(weight)`` of an adapter to a canonical weight in place.

    Args:
        adapter: the adapter.
        weight: the canonical weight to change.
        base: the layer.
        scale: factor on the delta.
    """
    if isinstance(adapter, MergesInPlace):
        adapter.add_to_(weight, base, scale)
    else:
        add_scaled_(weight, delta_of(adapter, weight, base), scale)


def unconvertible_reason(adapter: Adapter, base: BaseLayer) -> str:
    """Why an adapter cannot be converted to a product of two matrices, as part of a sentence; empty if it can.

    Args:
        adapter: the adapter.
        base: the layer.
    """
    if isinstance(adapter, NotConvertible):
        return adapter.unconvertible
    if len(base.kind.weight_shape(base.module)) < 2:
        return "its weight is a vector, not a product of two matrices"
    reason = adapter.unmergeable_reason(base)
    if not reason and int(getattr(base.module, "groups", 1)) > 1:
        return "the weight of a grouped convolution is not a product of two matrices"
    return f"it cannot be merged into {reason}" if reason else ""


def norm_of_delta(adapter: Adapter, weight: Tensor, base: BaseLayer) -> float:
    """Computes an adapter's change of the weight, and returns its Frobenius norm.

    Args:
        adapter: the adapter.
        weight: the frozen canonical weight.
        base: the layer.
    """
    delta = delta_of(adapter, weight, base)
    return float(torch.linalg.vector_norm(delta, dtype=torch.promote_types(delta.dtype, torch.float32)))


def configure(adapter: Adapter, config: Any, path: str) -> None:
    """Applies another config of the method to an adapter; called after its tensors were replaced.

    Args:
        adapter: the adapter.
        config: the new config.
        path: path of the layer.
    """
    values = adapter._config_values(config, path)
    if isinstance(adapter, Rescales) and "scaling" in values:
        adapter.rescale(values.pop("scaling"), trained=True)
    adapter.bind(**values)
    if isinstance(adapter, HotSwaps):
        adapter.configure(config, path)


def is_configured(adapter: Adapter, config: Any, path: str) -> bool:
    """Whether an adapter certainly has the settings of a config, so that ``configure`` would change nothing.

    Args:
        adapter: the adapter.
        config: a config of its method.
        path: path of the layer.
    """
    if isinstance(adapter, HotSwaps) and type(adapter).configure is not HotSwaps.configure:
        return False
    own = vars(adapter)
    return own.get("_trained_scaling") is None and all(
        type(value) in _PLAIN and type(own.get(name)) is type(value) and own[name] == value
        for name, value in adapter._config_values(config, path).items()
    )


def keep_settings(adapter: Adapter, change: Transaction) -> None:
    """Records what ``configure`` changes on an adapter, so that a failed change can restore it.

    Args:
        adapter: the adapter.
        change: the record.
    """
    if isinstance(adapter, Rescales):
        adapter.keep_scaling(change)
    change.keep_attributes(adapter, *adapter.from_config)
    if isinstance(adapter, HotSwaps):
        adapter.keep_settings(change)
