"""The fields that the config of every method has, and what a config says about its adapters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from nbpeft._util import hooks
from nbpeft._util.push_to_hub import PushesToHub
from nbpeft.engine.contract.adapter_weights import ReadsTensors
from nbpeft.engine.contract.field_types import check_types
from nbpeft.engine.contract.peft_types import PeftType, TaskType
from nbpeft.errors import ConfigError, did_you_mean
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

    def push(self, config: AdapterConfig, repo_id: str, *, tags: Sequence[str], **options: Any) -> str:
        """Uploads the file of a config, and with tags a model card, to a repository."""
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
class AdapterConfig(PushesToHub):
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
    rate_factor: ClassVar[float] = 1.0
    """Default learning rate of a training of nbpeft, relative to that of LoRA."""
    learns_prompt: ClassVar[bool] = False
    """Whether the method learns a prompt: tokens, or cached states, in front of the input."""
    mixes_rows: ClassVar[bool] = False
    """Whether the outputs of a row depend on the other rows of its batch."""
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
        """Whether an adapter is initialized from a part of the base weight, and so depends on its values (PiSSA)."""
        return False

    def started_as(self, init: str) -> Self | None:
        """A copy that is initialized from the weight with ``init``.

        Args:
            init: as in the config (``init_lora_weights``).

        Returns:
            The copy; None if ``init`` alone cannot find the same part of the weight again, as when it needs data.
        """
        return None

    def has_scale_of(self, other: AdapterConfig, paths: Iterable[str]) -> bool:
        """Whether this config can use the part of the weight that another adapter was initialized from.

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

    def _push(self, repo_id: str, *, tags: Sequence[str], **options: Any) -> str:
        return store_of(type(self)).push(self, repo_id, tags=tags, **options)


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
