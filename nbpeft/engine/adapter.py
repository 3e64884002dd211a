"""The contracts of the engine: what a method, a host and a backend must fill.

    Adapter   the maths of one method on one layer; says what to ADD to output and weight
    Host      one kind of layer that can be adapted (Linear, Conv1D, Embedding, …)
    Backend   one way a weight is stored (dense, bitsandbytes 4-bit, …)
    Base      what an adapter may see of the layer it sits on: its host and backend, joined

An adapter knows no name, no activation and no quantization. M methods, H hosts and N backends
are M + H + N files.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.base import Backend, Base, Dropout, Host, add_scaled_
from nbpeft.engine.field_types import check_types
from nbpeft.errors import ConfigError, did_you_mean

__all__ = ["Adapter", "AdapterConfig", "AdapterWeights", "Backend", "Base", "Dropout", "Host", "PeftType", "TaskType"]


class TaskType(str, enum.Enum):
    """What the adapted model is for. Values as in PEFT's files."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Names of heads that start random; a model need not have one of that name."""


class PeftType(str, enum.Enum):
    """Values of ``peft_type`` in config files, for the methods that come along."""

    LORA = "LORA"

    def __str__(self) -> str:
        return self.value


PEFT_VERSION = "0.21.2"
"""The version of PEFT whose fields and files these are."""


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


@dataclass
class AdapterConfig:
    """Fields every method has. Names, defaults and meanings are PEFT's.

    Public as ``nbpeft.PeftConfig``. A config handed to the engine is copied, so that later
    changes to the caller's object change nothing.
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
    checked_apart: ClassVar[tuple[str, ...]] = ()
    """Fields whose type is checked with their value."""

    def __post_init__(self) -> None:
        check_types(self, passing=(*self.not_implemented, *self.checked_apart))
        self.peft_version = self.peft_version or PEFT_VERSION
        if self.task_type is None:
            return
        names = [task.value for task in TaskType]
        if str(getattr(self.task_type, "value", self.task_type)) not in names:
            raise ConfigError(
                f"task_type {self.task_type!r:.60} is not one of {', '.join(names)}."
                + did_you_mean(str(self.task_type), names),
                field="task_type",
                task_type=self.task_type,
            )
        self.task_type = TaskType(self.task_type)

    @property
    def starts_in_base(self) -> bool:
        """Whether an adapter takes over a part of the weight at its start, so that it depends on the base's values."""
        return False

    @property
    def is_prompt_learning(self) -> bool:
        """PEFT's question; no method here learns a prompt."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """PEFT's question; no method here is an adaption prompt."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of this process alone, nested configs as dictionaries, as PEFT's ``to_dict``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "runtime_config"}

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

        Raises:
            CheckpointNotFoundError: there is no ``adapter_config.json``.
            UnknownMethodError: the file names a method that is not registered.
        """
        return _store(cls).read(pretrained_model_name_or_path, subfolder=subfolder, **options)

    @classmethod
    def from_peft_type(cls, **fields: Any) -> AdapterConfig:
        """A config of the method that ``peft_type`` names; without one, of this class.

        Fields that are not known are left out, with a warning.
        """
        return _store(cls).make(fields) if fields.get("peft_type") is not None else cls(**fields)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields of a config file, as it holds them."""
        with open(path_json_file, encoding="utf-8") as file:
            fields: dict[str, Any] = json.load(file)
        return {name: value for name, value in fields.items() if name != "runtime_config"}

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Writes ``adapter_config.json`` into a folder, atomically."""
        _store(type(self)).write(self, save_directory, **options)


def _store(cls: type[AdapterConfig]) -> ConfigStore:
    if cls.store is None:
        raise ConfigError("reading and writing configs needs nbpeft.checkpoint to be imported")
    return cls.store


@dataclass
class AdapterWeights:
    """The tensors of one adapter, apart from any file format.

    Attributes:
        adapters: path of the adapted module -> parameter name (``lora_A``) -> tensor.
        copies: path of a module trained as a whole (``modules_to_save``) -> parameter or
            buffer name inside that module -> tensor.
        base: name of a trained base parameter (``bias="all"``), without any wrapper -> tensor.
    """

    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)


class Adapter(nn.Module):
    """One method, for one name, on one layer. Subclass it in ``methods/``.

    A subclass gives ``create`` and the three maths methods. All its tensors to train are direct
    parameters, named as in the papers; ``parameter_shapes`` tells their names and shapes
    before anything is allocated.
    """

    weight_free: ClassVar[bool] = True
    """Whether ``delta_weight`` ignores the weight it is given (DoRA does not)."""

    scaling: float | Tensor

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, host: Host) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape this method will have at ``path``.

        Raises:
            ConfigError: the method does not work on this layer with this config.
        """
        raise NotImplementedError

    @classmethod
    def create(
        cls,
        config: Any,
        path: str,
        base: Base,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
    ) -> Self:
        """Builds the adapter for the layer at ``path``.

        Args:
            config: the method's own config.
            path: where the layer is in the model; patterns are matched against it.
            base: the layer.
            shapes: what ``parameter_shapes`` gave for it.
            tensors: loaded parameters to bind as they are, or None to initialise.
            dtype: dtype of new parameters.
        """
        raise NotImplementedError

    @property
    def held(self) -> Mapping[str, Any]:
        """Its parameters by name, or what stands for them: nn.DataParallel's replicas have plain attributes instead."""
        return self._parameters or self.__dict__

    def follow(self, source: Adapter) -> None:
        """Makes this adapter act with the tensors of another one; for layers that share one weight."""
        raise NotImplementedError

    def merged_elsewhere(self, base: Base) -> bool:
        """Whether its delta gets into the layer's weight by merging on another layer, which shares the weight."""
        return False

    shares_rows: ClassVar[bool] = False
    """Whether layers that share a weight share this adapter too, so that the weight may stay shared."""

    adds_itself: ClassVar[bool] = False
    """Whether ``forward`` takes ``whole=True``: give output and delta together, which can be cheaper."""

    def forward(self, x: Tensor, base_output: Tensor, base: Base) -> Tensor:
        """What to ADD to the layer's output.

        Args:
            x: the layer's input, in its own dtype (an adapter casts inside, and keeps ``x``).
            base_output: what the frozen layer gave, bias included.
            base: the layer.

        Returns:
            A tensor shaped like ``base_output`` in the adapter's or the autocast dtype.
        """
        raise NotImplementedError

    @classmethod
    def mixed(
        cls, adapters: Sequence[Self | None], scales: Sequence[float], base: Base, kept: dict[Any, Any]
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
        return None

    def delta_weight(self, weight: Tensor, base: Base) -> Tensor:
        """What to ADD to the canonical weight, which is the frozen base's. Same shape."""
        raise NotImplementedError

    def delta_bias(self, base: Base) -> Tensor | None:
        """What to ADD to the layer's bias, (out,), or None."""
        return None

    def add_to_(self, weight: Tensor, base: Base, scale: float) -> None:
        """Adds ``scale * delta_weight(weight)`` to a canonical weight in place.

        A method overrides it to spend less memory than a second weight.
        """
        add_scaled_(weight, self.delta_weight(weight, base), scale)
