"""The contract of a method: its config, its adapters, and what else an adapter may be able to do.

    Adapter        the maths of one method on one layer: what to ADD to the output and to the weight
    SharedState    what the layers of one adapter share, where a method needs that (a common projection)

An adapter knows no name, no activation and no quantization: M methods, K kinds of layers and N ways to
store a weight (``base.py``) are M + K + N files. What only some methods can do is a capability, a class to
derive from beside ``Adapter``; the engine asks ``isinstance(adapter, Rescales)`` and never for a method:

    TransformsInput, TransformsOutput   act on the input or output of the one base call, at no second product
    ReplacesCall                        compute what a layer gives without the base call
    Rescales                            have a factor that can be changed while loaded
    ChangesBase                         change the layer itself when they are put on it
    Pads                                fit into larger tensors, so that a compiled model need not compile again
    ServesRows                          serve a mixed batch in one pass
    ConvertsToLora                      add a product of two thin matrices, which a LoRA can take over as they are
    IsLowRank                           are saved as such a product, so that any LoRA runtime can serve them
    LearnsWithHooks                     take part in training beside the gradient (``training_hooks.py``)
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from nbpeft.engine.contract.field_types import check_types
from nbpeft.engine.contract.peft_types import TASK_HEADS as TASK_HEADS
from nbpeft.engine.contract.peft_types import PeftType as PeftType
from nbpeft.engine.contract.peft_types import TaskType as TaskType
from nbpeft.engine.contract.shared_state import SharedState as SharedState
from nbpeft.engine.kernels.numerics import add_scaled_
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import PEFT_VERSION

ADAPTER_PARTS = "adapter_parts"
"""Where the submodules of adapters are shown, for which PEFT has no name."""


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


Shape = tuple[int, ...]


class Adapter(nn.Module):
    """One method, for one name, on one layer. Subclass it in ``methods/``.

    A subclass gives ``parameter_shapes``, ``create``, ``forward`` and ``delta_weight``. All its tensors to
    train are direct parameters, named as in the papers; ``parameter_shapes`` gives their names and shapes
    before anything is allocated.
    """

    reads_weight: ClassVar[bool] = False
    """Whether ``delta_weight`` depends on the weight it is given, so that several adapters need the frozen one."""

    supports_fused_add: ClassVar[bool] = False
    """Whether ``forward`` takes ``fused=True``: return output and delta together, which can be cheaper."""

    is_quantization_aware: bool = False
    """Whether its layers act as they will once it is merged into quantized weights (``merged_twin``)."""

    loses_start: bool = False
    """Whether a file cannot say what it started from: it is saved as one without (``Method.without_weight``)."""

    leaves_start: bool = False
    """Whether it was saved for a base without the part of the weight that it starts in (``take_out_``)."""

    is_tied: ClassVar[bool] = False
    """Whether it changes no whole weight that targets name, and goes on what shares one by itself: rows of tokens."""

    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that are never trained."""

    constant_parameters: ClassVar[tuple[str, ...]] = ()
    """Those of them that no file holds and nothing reads: PEFT's users count them."""

    has_tensors: ClassVar[bool] = True
    """Whether there is anything in it that a file would hold."""

    takes_quantized: ClassVar[bool] = True
    """Whether it goes on a layer whose weight is stored quantized."""

    wrapped_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that PEFT keeps in a small module, as its ``weight``: ``layer.core["default"].weight``."""

    names_in_modules: ClassVar[Mapping[str, str]] = {}
    """Such a parameter -> its name there, where that is another one."""

    parameter_lists: ClassVar[tuple[str, ...]] = ()
    """What PEFT keeps in a list, ``layer.core["default"][0]``: its parameters ``core.0``, ``core.1``, …"""

    optional_tensors: ClassVar[tuple[str, ...]] = ()
    """Those of ``fixed_tensors`` that a file may lack; ``create`` finds them."""

    peft_modules: ClassVar[tuple[str, ...]] = ()
    """What PEFT keeps in modules beside the parameters; ``peft_module`` makes them."""

    parts_shown_as: ClassVar[str] = ADAPTER_PARTS
    """Where the submodules of adapters are shown on a layer."""

    peft_container: str = ""
    """The module below the layer in which PEFT has the parameters; empty for the layer itself."""

    peft_mappings: ClassVar[tuple[str, ...]] = ()
    """Mappings that every layer of PEFT's has, also where this method has no entry for them."""

    peft_attributes: ClassVar[Mapping[str, str]] = {}
    """PEFT's name of an attribute of an adapted layer -> that of the adapter behind it."""

    peft_functions: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """PEFT's name of a method of an adapted layer -> a function of the layer and arguments."""

    # What every method gives

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape this method will have at ``path``.

        Raises:
            ConfigError: the method does not work on this layer with this config.
        """
        raise NotImplementedError

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the adapter of one layer.

        Args:
            config: the method's own config.
            site: the layer.
            tensors: loaded parameters to bind as they are, or None to initialise.
        """
        raise NotImplementedError

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
        return {key: value for key, value in own if value is not None and key not in self.constant_parameters}

    @classmethod
    def fixed_tensors(
        cls, config: Any, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """What a file holds of it that is not trained: name of a buffer -> its shape and dtype.

        Args:
            config: the method's own config.
            shapes: what ``parameter_shapes`` gave.
            module: the layer.
            kind: of the layer.
        """
        return {}

    @property
    def taken_over(self) -> TakenOver | None:
        """The part of the weight that it starts in, and subtracts from the layer; None where there is none."""
        return None

    def take_out_(self, weight: Tensor) -> None:
        """Subtracts that part from a canonical weight in place, as the adapter does not do in a file without it."""
        raise NotImplementedError

    def shapes_with_start(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in a file; only where it ``loses_start``."""
        raise NotImplementedError

    def split_start(self, tensors: Mapping[str, Tensor], change: Transaction) -> dict[str, Tensor]:
        """Takes the start over that tensors of a file hold, and returns those of its parameters.

        Args:
            tensors: parameter name -> tensor, as ``shapes_with_start`` says; only where it ``loses_start``.
            change: records what is written.
        """
        raise NotImplementedError

    def swap_refusal(self) -> str:
        """Why other tensors cannot take the place of its own, as part of a sentence; else empty."""
        return ""

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites its parameters so that it adds nothing."""
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.detach().zero_()

    def configure(self, config: Any, path: str) -> None:
        """Takes the settings of another config over that are no tensors; after its tensors were replaced."""

    def keep_settings(self, change: Transaction) -> None:
        """Records what ``configure`` changes."""

    @classmethod
    def size_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The size (rank) of an adapter with these parameter shapes, where the method has one."""
        return None

    @classmethod
    def unsaved_elements(cls, config: Any, module: nn.Module, kind: LayerKind) -> int:
        """Number of values it keeps on a layer that no file holds, where a config can ask for any number of them."""
        return 0

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """What a person should know about a config on these layers (path, layer, kind) before it is used."""
        return ()

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        """Makes the module that users of PEFT know under a name of ``wrapped_parameters`` or ``peft_modules``.

        The parameter becomes its ``weight``. One of ``peft_modules`` has this adapter as its ``adapter``.

        Args:
            name: one of them.
            base: the layer.

        Returns:
            A new module; None for one that only holds the parameter.
        """
        return None

    def ds_external_parameters(self) -> tuple[()]:
        """What DeepSpeed's ZeRO-3 asks each module with hooks for: parameters of other modules that it uses; none."""
        return ()

    @property
    def computes_by_parts(self) -> bool:
        """Whether a call can be computed by the modules that ``peft_module`` made, one after the other."""
        return False

    def forget_observed(self, name: str) -> None:
        """Computes without the module of a name again, which is as ``peft_module`` makes it."""

    def observe(self, module: nn.Module, name: str = "") -> None:
        """Called when somebody puts a hook on a module that ``peft_module`` made, or another module in its place.

        Args:
            module: the module, which a layer does not call by itself.
            name: of what it takes the place of, as for ``peft_module``.
        """
        warnings.warn(
            f"a {type(module).__name__} of an adapter computes only where it is called itself: this hook will not run "
            "in calls of the model; put it on the layer",
            stacklevel=3,
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets whether gradients reach its parameters, but for those that are never trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen_parameters)
        return self

    def layer_names(self) -> tuple[str, ...]:
        """Names under which PEFT's layers keep parameters of the method."""
        own = dict.fromkeys(name.partition(".")[0] for name in self._parameters)
        return tuple(name for name in self.peft_mappings if name not in self.peft_modules) or tuple(own)

    # Layers that share a weight
    source: Adapter | None = None  # the adapter of another layer whose tensors this one uses

    def tie_to(self, source: Adapter) -> None:
        """Makes this adapter use the tensors of another one, for layers that share one weight."""
        raise NotImplementedError

    @classmethod
    def tied_tensors(cls, names: Collection[str], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of an adapter with some parameters that uses these of another one: views of them."""
        return {}

    @classmethod
    def differs(cls, own: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> bool:
        """Whether loaded tensors of an adapter that uses those of another one differ from what is given of these."""
        tied = cls.tied_tensors(own, source)
        return any(name in tied and not torch.equal(tensor, tied[name]) for name, tensor in own.items())

    @property
    def inner_adapters(self) -> Mapping[str, Adapter]:
        """Adapters that it consists of, submodules of it, by the names under which PEFT's layers have their parts."""
        return {}

    @property
    def held(self) -> Mapping[str, Any]:
        """Its parameters by name; nn.DataParallel's replicas have plain attributes instead."""
        return self._parameters or self.__dict__

    def held_buffer(self, name: str) -> Tensor:
        """One of its buffers; nn.DataParallel's replicas have it as a plain attribute."""
        found: Any = self._buffers.get(name)
        return self.__dict__[name] if found is None else found  # type: ignore[no-any-return]


class TransformsInput(ABC):
    """Alone on a layer, changes the input of the base call instead of adding to its output."""

    @abstractmethod
    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The input (…, in) to call the frozen layer with, in the dtype of ``x``."""


class ReplacesCall(ABC):
    """Alone on a layer without hooks, computes what the layer gives in place of the base call."""

    @abstractmethod
    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """What the layer gives for ``x``, bias included, in its own dtype; None where the base has to be called."""


class TransformsOutput(ABC):
    """Alone on a layer, changes the output of the base call; beside ``TransformsInput``, of that call."""

    @abstractmethod
    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """What the layer gives instead of ``output`` (…, out), in the dtype of that."""


class Rescales:
    """Has a factor on what it adds, ``scaling``, which can be changed while the adapter is loaded.

    Attributes:
        scaling: the factor; a 0-d tensor once the model is prepared for compiled hot-swapping.
    """

    scaling: float | Tensor
    _trained_scaling: float | None = None

    @property
    def trained_scaling(self) -> float:
        """The factor its config asks for, whatever was written since."""
        return float(self.scaling) if self._trained_scaling is None else self._trained_scaling

    def rescale(self, scaling: float | Tensor, *, trained: bool = False) -> None:
        """Sets the factor, in place where it is held as a tensor.

        Args:
            scaling: the new factor.
            trained: take it for the trained one from now on.
        """
        self.__dict__["_trained_scaling"] = None if trained else self.trained_scaling
        if isinstance(self.scaling, Tensor):
            self.scaling.fill_(float(scaling))
        else:
            self.__dict__["scaling"] = float(scaling)

    def keep_scaling(self, change: Transaction) -> None:
        """Records the factor."""
        change.keep_attributes(self, "scaling", "_trained_scaling")
        if isinstance(self.scaling, Tensor):
            change.keep_values([self.scaling])

    def hold_scaling_as_tensor(self, device: torch.device) -> None:
        """Lets the factor change without recompiling."""
        if not isinstance(self.scaling, Tensor):
            self.__dict__["scaling"] = torch.tensor(float(self.scaling), device=device)


class ChangesBase(ABC):
    """Changes the layer it is put on, beside what it adds."""

    @abstractmethod
    def change_base(self, base: BaseLayer, change: Transaction) -> None:
        """Changes the layer, once, as the adapter is put on it; what it changes is recorded."""


class Pads(ABC):
    """Can have more room in its tensors than it uses, so that adapters of another size fit in."""

    @property
    @abstractmethod
    def room(self) -> int:
        """The largest size (rank) that fits into its tensors now."""

    @abstractmethod
    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Views of the part of a parameter that an adapter of some shape uses, and of the rest."""

    @abstractmethod
    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that grow to a size, and their values padded with zeros."""

    @abstractmethod
    def mark_padded(self) -> None:
        """Remembers that its tensors have more room than it uses."""


class ServesRows(ABC):
    """Can serve a batch, whose rows are served by several adapters of the class, in one pass."""

    @classmethod
    @abstractmethod
    def mixed(
        cls, adapters: Sequence[Any], scales: Sequence[float], base: BaseLayer, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """One pass for a batch whose rows are served by several adapters of this method.

        Args:
            adapters: what may serve a row; None where the layer lacks the adapter.
            scales: factor on each one's delta.
            base: the layer.
            kept: a place for what is prepared once for many calls.

        Returns:
            A function of the input (batch, …) and an index (batch,) into ``adapters`` (-1: none)
            that gives the delta to add, or None where rows have to be served adapter by adapter.
        """


class ConvertsToLora(ABC):
    """What it adds to a weight is exactly the product of two thin matrices."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """The two matrices, detached, without rows that are only padding; None where there are none on the layer."""


class IsLowRank(ConvertsToLora):
    """Its parameters are those two matrices, on every layer."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """The two matrices; see ``ConvertsToLora``."""
