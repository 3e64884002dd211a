"""The contract of a method: its config, its adapters, and what else an adapter may be able to do.

    Adapter        the maths of one method on one layer: what to ADD to the output and to the weight
    SharedState    what the layers of one adapter share, where a method needs that (a common projection)

An adapter knows no name, no activation and no quantization: M methods, K kinds of layers and N ways to
store a weight (``base.py``) are M + K + N files. What only some methods can do is a capability (``capabilities.py``).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.bindable import Bindable
from nbpeft.engine.contract.capabilities import ChangesBase as ChangesBase
from nbpeft.engine.contract.capabilities import ConvertsToLora as ConvertsToLora
from nbpeft.engine.contract.capabilities import HasFixedTensors as HasFixedTensors
from nbpeft.engine.contract.capabilities import IsLowRank as IsLowRank
from nbpeft.engine.contract.capabilities import Pads as Pads
from nbpeft.engine.contract.capabilities import ReplacesCall as ReplacesCall
from nbpeft.engine.contract.capabilities import Rescales as Rescales
from nbpeft.engine.contract.capabilities import ServesRows as ServesRows
from nbpeft.engine.contract.capabilities import Shape as Shape
from nbpeft.engine.contract.capabilities import ShowsModules as ShowsModules
from nbpeft.engine.contract.capabilities import StartsInWeight as StartsInWeight
from nbpeft.engine.contract.capabilities import TransformsInput as TransformsInput
from nbpeft.engine.contract.capabilities import TransformsOutput as TransformsOutput
from nbpeft.engine.contract.capabilities import UsesAnother as UsesAnother
from nbpeft.engine.contract.field_types import check_types
from nbpeft.engine.contract.peft_names import ADAPTER_PARTS as ADAPTER_PARTS
from nbpeft.engine.contract.peft_names import PeftNames as PeftNames
from nbpeft.engine.contract.peft_types import TASK_HEADS as TASK_HEADS
from nbpeft.engine.contract.peft_types import PeftType as PeftType
from nbpeft.engine.contract.peft_types import TaskType as TaskType
from nbpeft.engine.contract.shared_state import SharedSite as SharedSite
from nbpeft.engine.contract.shared_state import SharedState as SharedState
from nbpeft.engine.kernels.numerics import add_scaled_
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import PEFT_VERSION


class ConfigStore(Protocol):
    """Reads and writes configs on disk or a hub; the checkpoint package provides it."""

    def make(self, fields: dict[str, Any]) -> AdapterConfig:
        """The config that fields, as a file holds them, mean."""
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
        """The config of a saved adapter in a folder or on the hub, and what reads its tensors for a model."""
        ...


@dataclass
class AdapterConfig:
    """Fields every method has. Names, defaults and meanings are PEFT's.

    Public as ``nbpeft.PeftConfig``. A config handed to the engine is copied, so that later
    changes to the caller's object change nothing.

    Attributes:
        task_type: what the model is for; decides which new heads are trained and how the adapter is loaded.
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
    """Fields that are accepted only while they ask for nothing; their type is not asked about."""
    instead: ClassVar[Mapping[str, str]] = {}
    """Such a field -> what to do instead."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Fields that say something only together with those; completion leaves them out."""
    checked_apart: ClassVar[tuple[str, ...]] = ()
    """Fields whose type is checked with their value."""
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field -> the values it takes, or examples of them; those of its type where it is not named."""
    condenses_targets: ClassVar[bool] = True
    """Whether a long list of targets may be saved as the suffixes that mean the same modules."""
    value_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that change what an adapter computes and not which tensors it has."""
    card_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that a model card lists; if empty, the method's own fields that are not at their default."""
    card_tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card."""
    own_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that PEFT does not have: a file holds them only where they are set."""
    slot_fields: ClassVar[tuple[str, ...]] = (
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    )
    """Fields that say what an adapter consists of: hot-swapping another one into its place does not change them."""

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
        """Whether an adapter takes over a part of the weight at its start, so that it depends on the base's values."""
        return False

    def started_as(self, init: str) -> Self | None:
        """A copy that takes over what an init finds in the weight; None where it would not find the same again."""
        return None

    def has_scale_of(self, other: AdapterConfig, paths: Iterable[str]) -> bool:
        """Whether what another adapter of the method takes over of the weights at some paths fits to this one."""
        return False

    @property
    def is_quantization_aware(self) -> bool:
        """Whether an adapter acts as it will once it is merged into quantized weights, and learns so."""
        return False

    def rounded(self) -> Self:
        """A copy whose adapters act so.

        Raises:
            ConfigError: those of the method cannot.
        """
        raise ConfigError(
            f"the model was prepared with quantization_aware=True, which {type(self).__name__} does not know: use a "
            "LoraConfig, or prepare the model without",
            field="quantization_aware",
        )

    def unused_patterns(self, paths: Sequence[str]) -> str:
        """Describes patterns over module paths among the values that match none of the adapted modules; else empty."""
        return ""

    @property
    def is_prompt_learning(self) -> bool:
        """PEFT's question: whether the method learns a prompt."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """PEFT's question: whether the method adds the attention to prompts inside the model."""
        return False

    def on_model(self, model: nn.Module, planned: Callable[[AdapterConfig], Any]) -> AdapterConfig:
        """The config that a model is adapted with: a copy, where other adapters or the model itself complete it.

        Args:
            model: the base model.
            planned: gives the plan of another config for it.

        Raises:
            NbpeftError: it cannot be completed, or an adapter that it names cannot be read.
        """
        return self

    def fill_in(self, model_type: str | None) -> None:
        """Fills in what the method derives from a model's type; called on a copy of a config, its targets resolved.

        Raises:
            ConfigError: a field has no default for this type of model.
        """

    def fill_in_layers(self, features: Mapping[str, tuple[int, int]]) -> bool:
        """Fills in what the shapes on a layer owe to all layers together; called on a copy of a config.

        Args:
            features: path -> (in, out) features of each layer that gets an adapter, in the order of the model.

        Returns:
            Whether there is such a thing, so that ``parameter_shapes`` has to be asked again.
        """
        return False

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Fills in what a method without layers derives from the model; called on a copy of a config.

        Args:
            model: the base model.
            width: features of its input embedding.

        Raises:
            ConfigError: the model does not say what is needed.
        """

    def beside(self, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        """What the config and the tensors of one file mean for each other: the config, and tensors to bind, by key."""
        return self, tensors

    def stored_tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors of a file that a field names, by key.

        Raises:
            CheckpointError: it cannot be read.
        """
        return store_of(type(self)).tensors(path)

    @property
    def size(self) -> int | None:
        """The size (rank) of the adapter, where the method has one and it is the same for all layers."""
        return None

    def resized(self, size: int) -> Self:
        """A copy with another size; only where ``size`` is not None."""
        raise NotImplementedError

    def set_size(self, size: int, paths: Sequence[str]) -> None:
        """Sets the config to one size (rank) for all layers, and keeps the strength of each of the paths.

        Raises:
            ConfigError: adapters of this method have no size that could be set.
        """
        raise ConfigError(f"{type(self).__name__} has no size that could be set")

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of this process alone, nested configs as dictionaries, as PEFT's ``to_dict``."""
        unset = [name for name in self.own_fields if not getattr(self, name)]
        return {name: v for name, v in dataclasses.asdict(self).items() if name not in ("runtime_config", *unset)}

    def copy(self, **changes: Any) -> Self:
        """A deep copy with some fields replaced, without the checks of the constructor."""
        twin = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(twin, name, value)
        return twin

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **options: Any
    ) -> AdapterConfig:
        """Reads the config of a saved adapter from a folder or a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            subfolder: a folder inside it.
            **options: ``revision``, ``cache_dir``, ``token``, …; what else libraries hand on is ignored.

        Raises:
            CheckpointNotFoundError: there is no ``adapter_config.json``.
            UnknownMethodError: the file names a method that is not registered.
        """
        return store_of(cls).read(pretrained_model_name_or_path, subfolder=subfolder, **options)

    @classmethod
    def from_peft_type(cls, **fields: Any) -> AdapterConfig:
        """A config of the method that ``peft_type`` names; without one, of this class.

        Fields that are not known are left out, with a warning.
        """
        return store_of(cls).make(fields) if fields.get("peft_type") is not None else cls(**fields)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields of a config file, as it holds them."""
        with open(path_json_file, encoding="utf-8") as file:
            fields: dict[str, Any] = json.load(file)
        return {name: value for name, value in fields.items() if name != "runtime_config"}

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Writes ``adapter_config.json`` into a folder, atomically."""
        store_of(type(self)).write(self, save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads ``adapter_config.json`` to a repository on the hub.

        Args:
            repo_id: ``user/name``; made if need be.
            **options: ``token``, ``private``, ``endpoint``, and what ``HfApi.upload_folder`` takes.

        Returns:
            The address of the commit.
        """
        return store_of(type(self)).push(self, repo_id, **options)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's hook before a config is made from keywords; the constructor checks them here."""
        return kwargs


_IN_USE = "_is_of_an_adapter"


def note_use(config: AdapterConfig) -> AdapterConfig:
    """Notes that an adapter has a config; copies of it, also those of a copied model, know it too. Returns it."""
    vars(config)[_IN_USE] = True
    return config


def is_of_an_adapter(config: AdapterConfig) -> bool:
    """Whether an adapter of some model has a config, or one that it is a copy of."""
    return _IN_USE in vars(config)


def store_of(cls: type[AdapterConfig]) -> ConfigStore:
    """What reads and writes configs of a class; raises ConfigError where nothing does."""
    if cls.store is None:
        raise ConfigError("reading and writing configs needs nbpeft.checkpoint to be imported")
    return cls.store


class Adapter(Bindable):
    """One method, for one name, on one layer. Subclass it in ``methods/``.

    A subclass gives ``parameter_shapes``, ``initial_tensors``, ``forward`` and ``delta_weight``, and declares in
    ``from_config`` what it takes from its config. All its tensors to train are direct parameters, named as in the
    papers; ``parameter_shapes`` gives their names and shapes before anything is allocated.
    """

    from_config: ClassVar[Mapping[str, str]] = {}
    """Attribute -> field or property of the config, or its function of the layer's path, that it is the value of.

    They are set when the adapter is made, replaced and restored when another one is swapped in, and shown by ``repr``.
    One named ``scaling`` is the factor that ``Rescales`` changes.
    """

    identity: ClassVar[Mapping[str, float]] = {}
    """Parameter -> the value with which the adapter changes nothing, whatever the others are; empty: all at zero."""

    reads_weight: ClassVar[bool] = False
    """Whether ``delta_weight`` depends on the weight it is given, so that several adapters need the frozen one."""

    supports_fused_add: ClassVar[bool] = False
    """Whether ``forward`` takes ``fused=True``: return output and delta together, which can be cheaper."""

    is_quantization_aware: bool = False
    """Whether its layers act as they will once it is merged into quantized weights (``merged_twin``)."""

    is_tied: ClassVar[bool] = False
    """Whether it changes no whole weight that targets name, and goes on what shares one by itself: rows of tokens."""

    peft: ClassVar[PeftNames] = PeftNames()
    """PEFT's names of what it has."""

    peft_container: str = ""
    """The module below the layer in which PEFT has the parameters; empty for the layer itself."""

    # What every method gives

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape this method will have at ``path``.

        Raises:
            ConfigError: the method does not work on this layer with this config.
        """
        raise NotImplementedError

    @classmethod
    def initial_tensors(cls, config: Any, site: AdapterSite) -> Mapping[str, Tensor]:
        """Makes the tensors of a new adapter, by name; zeros unless a method says otherwise.

        Args:
            config: the method's own config.
            site: the layer; ``site.new`` makes tensors where and as they are needed.
        """
        return {name: site.new(shape) for name, shape in site.shapes.items()}

    def prepare(self, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Sets buffers and attributes that follow neither from ``from_config`` nor from the parameters.

        Args:
            config: the method's own config.
            site: the layer, with the state that it shares with others.
            tensors: loaded or initial ones, those of ``fixed_tensors`` among them if they are there.
        """

    _names: tuple[str, ...] = ()

    @classmethod
    def class_at(cls, config: Any, site: AdapterSite) -> type[Self]:
        """The class of the adapter of a layer, where a method has several."""
        return cls

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the adapter of one layer; rarely overridden.

        Args:
            config: the method's own config.
            site: the layer.
            tensors: loaded parameters to bind as they are, or None to initialise.
        """
        made = cls.class_at(config, site)()
        given = cls.initial_tensors(config, site) if tensors is None else tensors
        names = tuple(site.shapes)
        made.bind({name: given[name] for name in names}, _names=names, **made._config_values(config, site.path))
        made.prepare(config, site, given)
        return made

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the layer's output.

        Args:
            x: the layer's input, (…, in), in its own dtype (an adapter casts inside, and keeps ``x``).
            base_output: what the frozen layer gave, (…, out), bias included.
            base: the layer.

        Returns:
            A tensor shaped like ``base_output`` in the adapter's or the autocast dtype.
        """
        raise NotImplementedError

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the canonical weight, which is the frozen base's. Same shape."""
        raise NotImplementedError

    # What a method may do better than by default

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """Computes what to ADD to the layer's bias, (out,); None where that stays."""
        return None

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Adds ``scale * delta_weight(weight)`` to a canonical weight in place.

        A method overrides it to spend less memory than a second weight.
        """
        add_scaled_(weight, self.delta_weight(weight, base), scale)

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why what it adds is not a change of the layer's weight and bias, as part of a sentence; else empty."""
        return ""

    def unconvertible_reason(self, base: BaseLayer) -> str:
        """Why no product of two matrices can stand for it, as part of a sentence; else empty."""
        reason = self.unmergeable_reason(base)
        if len(base.kind.weight_shape(base.module)) < 2:
            return "its weight is a vector, which is no product of two matrices"
        if not reason and int(getattr(base.module, "groups", 1)) > 1:
            return "the weight of a convolution in groups is no product of two matrices"
        return f"it cannot be merged into {reason}" if reason else ""

    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        """Measures the change of the weight.

        Returns:
            Its Frobenius norm, and how many directions hold most of it where that is cheap to compute.
        """
        delta = self.delta_weight(weight, base)
        return float(torch.linalg.vector_norm(delta, dtype=torch.promote_types(delta.dtype, torch.float32))), None

    @property
    def delta_rank(self) -> int | None:
        """The largest rank its change of the weight can have, where the method bounds it."""
        return None

    def saved_tensors(self, shapes: Callable[[], Mapping[str, tuple[int, ...]]]) -> dict[str, Tensor]:
        """What an adapter's file holds of it: references to its parameters, or views of them.

        Args:
            shapes: returns what ``parameter_shapes`` gives for its config.
        """
        own = self._parameters.items()
        return {key: value for key, value in own if value is not None and key not in self.peft.constants}

    def swap_refusal(self) -> str:
        """Why other tensors cannot take the place of its own, as part of a sentence; else empty."""
        return ""

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites its parameters so that it adds nothing."""
        for name, value in (self.identity or dict.fromkeys(self._parameters, 0.0)).items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.detach().fill_(value)

    @classmethod
    def _config_values(cls, config: Any, path: str) -> dict[str, Any]:
        """The values of ``from_config`` on a layer."""
        values = {}
        for name, field_name in cls.from_config.items():
            value = getattr(config, field_name)
            values[name] = value(path) if type(value) is MethodType else value
        if "scaling" in values:
            values["scaling"] = float(values["scaling"])
        return values

    def configure(self, config: Any, path: str) -> None:
        """Takes the values of another config over; after its tensors were replaced."""
        values = self._config_values(config, path)
        if isinstance(self, Rescales) and "scaling" in values:
            self.rescale(values.pop("scaling"), trained=True)
        self.bind(**values)

    def keep_settings(self, change: Transaction) -> None:
        """Records what ``configure`` changes."""
        if isinstance(self, Rescales):
            self.keep_scaling(change)
        change.keep_attributes(self, *self.from_config)

    def extra_repr(self) -> str:
        """The shapes of its parameters, and what it takes from its config."""
        shapes = {name: tuple(one.shape) for name, one in self._parameters.items() if one is not None}
        shown = {**shapes, **{name: getattr(self, name) for name in self.from_config}}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    @classmethod
    def size_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The size (rank) of an adapter with these parameter shapes, where the method has one."""
        return None

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """What a person should know about a config on these layers (path, layer, kind) before it is used."""
        return ()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets whether gradients reach its parameters, but for those that are never trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen_parameters)
        return self

    source: Adapter | None = None
    """The adapter of another layer whose tensors this one uses (``UsesAnother``)."""

    @property
    def inner_adapters(self) -> Mapping[str, Adapter]:
        """Adapters that it consists of, submodules of it, by the names under which PEFT's layers have their parts."""
        return {}
