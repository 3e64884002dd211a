"""Builds models without weights, whole or with fewer layers, from a model, a config, a folder or a hub id."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.hub_access import config_errors, hub_options
from nbpeft._util.interrupts import in_main_thread
from nbpeft.engine.calls.model_properties import class_names
from nbpeft.engine.contract.adapter import AdapterConfig, TaskType
from nbpeft.engine.tree.model_tree import base_model_of
from nbpeft.errors import ConfigError, in_one_line

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


@dataclass(frozen=True)
class Architecture:
    """How to build a model without its weights.

    Attributes:
        config: its transformers config.
        model_class: the class to build, or None to use the auto class.
        auto_class: name of the transformers auto class, e.g. ``AutoModelForCausalLM``.
    """

    config: Any
    model_class: type[nn.Module] | None
    auto_class: str

    @property
    def layer_count(self) -> int:
        """Number of layers, or 0 if a model with another number cannot be built from the config."""
        config = self.config
        nested = any(hasattr(config, name) for name in ("text_config", "vision_config", "audio_config"))
        count = getattr(config, "num_hidden_layers", None)
        if nested or getattr(config, "is_encoder_decoder", False) or not isinstance(count, int):
            return 0
        return count

    def build(self, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
        """Build the model with the kind of tensors of the surrounding context (fake or meta).

        Args:
            dtype: dtype of its weights.
            layers: number of layers; None for all.
        """
        import transformers

        config = copy.deepcopy(self.config) if layers is None else _with_layers(self.config, self.layer_count, layers)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        maker: Any = self.model_class or _class_of(getattr(transformers, self.auto_class), config)
        if not in_main_thread() and maker is not None:
            return _build_outside_main_thread(maker, config, dtype)
        if self.model_class is not None:
            model: nn.Module = maker._from_config(config, dtype=dtype)
        else:
            model = getattr(transformers, self.auto_class).from_config(config, dtype=dtype)
        return model

    @property
    def checkpoints(self) -> bool:
        """Whether the model class supports gradient checkpointing; True if it does not say."""
        import transformers

        return can_checkpoint(self.model_class or _class_of(getattr(transformers, self.auto_class), self.config))

    @cached_property
    def identity(self) -> str:
        """A key that is equal for architectures with the same memory needs."""
        name = self.auto_class if self.model_class is None else self.model_class.__qualname__
        return name + json.dumps(self.config.to_dict(), sort_keys=True, default=str)

    def batch(self, batch_size: int, sequence_length: int, *, labels: bool, packed: bool = False) -> dict[str, Tensor]:
        """Return the inputs of a training or inference step, as tensors of the surrounding context's kind.

        Args:
            batch_size: number of sequences.
            sequence_length: tokens per sequence.
            labels: whether to include labels.
            packed: whether each sequence contains several rows; adds ``position_ids`` that start again.
        """
        tokens = torch.zeros((batch_size, sequence_length), dtype=torch.long)
        inputs = {"input_ids": tokens}
        if packed:
            inputs["position_ids"] = torch.arange(sequence_length).expand(batch_size, -1) % max(2, sequence_length // 2)
        if getattr(self.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens.clone()
        if labels and self.auto_class == "AutoModelForQuestionAnswering":
            inputs |= {name: torch.zeros(batch_size, dtype=torch.long) for name in ("start_positions", "end_positions")}
        elif labels and self.auto_class == "AutoModelForSequenceClassification":
            inputs["labels"] = torch.zeros(batch_size, dtype=torch.long)
        elif labels and self.auto_class != "AutoModel":
            inputs["labels"] = tokens.clone()
        return inputs


def architecture_of(model_or_config: Any, adapter_config: AdapterConfig | None) -> Architecture:
    """Return the architecture of a model or config.

    Args:
        model_or_config: a transformers model with or without adapters, its config, a folder, a hub id, or an
            ``Architecture``, which is returned as it is.
        adapter_config: config whose ``task_type`` selects the auto class for a config, a folder or a hub id; None
            for a causal language model.

    Raises:
        ConfigError: ``model_or_config`` is none of these, or ``adapter_config`` is not a config.
    """
    if adapter_config is not None and not isinstance(adapter_config, AdapterConfig):
        raise ConfigError(f"the adapter must be given as a config such as LoraConfig, not {adapter_config!r:.60}")
    if isinstance(model_or_config, Architecture):
        return model_or_config
    if isinstance(model_or_config, nn.Module):
        return _of_model(model_or_config)
    config = _loaded_config(model_or_config) if isinstance(model_or_config, str) else model_or_config
    if not hasattr(config, "model_type"):
        raise ConfigError(
            f"cannot forecast for a {type(config).__name__}; give a transformers model, its config, folder or hub id"
        )
    task = (
        TaskType.CAUSAL_LM if adapter_config is None or adapter_config.task_type is None else adapter_config.task_type
    )
    name = _AUTO_CLASSES[TaskType(task)]
    if getattr(config, "is_encoder_decoder", False) and name == "AutoModelForCausalLM":
        name = "AutoModelForSeq2SeqLM"
    _check_known(config, name)
    return Architecture(config, None, name)


def _check_known(config: Any, auto_class: str) -> None:
    import transformers

    if type(config) not in getattr(transformers, auto_class)._model_mapping:
        raise ConfigError(
            f"transformers has no {auto_class} for a {type(config).__name__}, so its inputs are not known; "
            "give the model itself, or an adapter with another task_type"
        )


def can_checkpoint(model_class: Any) -> bool:
    """Return whether a model class supports gradient checkpointing; True if it does not say."""
    return bool(getattr(model_class, "supports_gradient_checkpointing", True))


def _of_model(model: nn.Module) -> Architecture:
    base = base_model_of(model)
    config = getattr(base, "config", None)
    if not hasattr(config, "model_type") or not hasattr(type(base), "_from_config"):
        raise ConfigError(
            f"cannot forecast for a {type(base).__name__}: it is not a transformers model, so its inputs are not known"
        )
    main_input = getattr(base, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise ConfigError(
            f"cannot forecast for a {type(base).__name__}: its input is {main_input}; only text models are supported"
        )
    kinds = {name.removeprefix("Auto").removeprefix("Model"): name for name in _AUTO_CLASSES.values()}
    names = class_names(base)
    found = (kinds[ending] for name in names for ending in kinds if ending and name.endswith(ending))
    automatic = next(found, "AutoModelForCausalLM" if any("LMHead" in name for name in names) else "AutoModel")
    if any(name.endswith("ForConditionalGeneration") for name in names):
        automatic = "AutoModelForSeq2SeqLM"
    return Architecture(config, type(base), automatic)


def _class_of(automatic: Any, config: Any) -> Any:
    """Return the model class that an auto class selects for a config; None if it is unknown or ambiguous."""
    if type(config) not in automatic._model_mapping:
        return None
    found = automatic._model_mapping[type(config)]
    return found if isinstance(found, type) else None


def _build_outside_main_thread(maker: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model without changing torch's default dtype, which transformers does and all threads share."""
    config.dtype = dtype
    model: nn.Module = maker(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _loaded_config(source: str) -> Any:
    from transformers import AutoConfig

    if source.startswith(("/", "./", "../", "~")) and not os.path.exists(os.path.expanduser(source)):
        raise ConfigError(f"there is no folder {source!r}", source=source)
    source = os.path.expanduser(source)
    folder, name = os.path.split(source)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if name.endswith(".gguf"):
        place = {"pretrained_model_name_or_path": folder or ".", "gguf_file": name}
    try:
        return AutoConfig.from_pretrained(**place, trust_remote_code=False, **hub_options(source))
    except config_errors() as error:
        reason = in_one_line(str(error).partition("\n\n")[0]) or type(error).__name__
        raise ConfigError(f"cannot read the config of {source!r}: {reason.rstrip('.')}", source=source) from None


def _with_layers(config: Any, have: int, wanted: int) -> Any:
    """Return a copy of a config with fewer layers; lists with one entry per layer are shortened too."""
    values = copy.deepcopy(config)
    for name, value in list(vars(values).items()):
        if isinstance(value, list) and len(value) == have and name != "architectures":
            setattr(values, name, value[:wanted])
    values.num_hidden_layers = wanted
    return values


def equal_layers(model: nn.Module, count: int) -> str:
    """Return the path of a model's list of equal layers.

    Layers are equal if their tensors, including those of adapters, have the same names, shapes, dtypes and
    ``requires_grad``, and if they share no trained tensor.

    Args:
        model: the model.
        count: number of its layers.

    Returns:
        The path of the ``ModuleList``, or the empty string if there is no such list.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            shapes = {
                tuple(
                    (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                    for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
                )
                for layer in module
            }
            owners = Counter(id(tensor) for layer in module for tensor in layer.parameters() if tensor.requires_grad)
            return path if len(shapes) == 1 and max(owners.values(), default=1) == 1 else ""
    return ""


@contextmanager
def silenced() -> Iterator[None]:
    """Silence warnings, and the tracebacks that torch logs for failing operations on fake tensors.

    Does nothing outside the main thread: warning filters apply to all threads, and a cell may be running.
    """
    if not in_main_thread():
        yield
        return
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
