"""PEFT's task classes, and ``get_peft_model``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from nbpeft.checkpoint import without_prefix
from nbpeft.engine.contract.adapter import TASK_HEADS, AdapterConfig, TaskType
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.saving.files import base_name
from nbpeft.model.saving.user_configs import adopt_config, user_config


def _forward(*names: str) -> Callable[..., Any]:
    """Returns a forward method whose signature names the usual inputs, from which a Trainer selects columns.

    Args:
        *names: inputs, which can also be passed by position; an input that is None is not passed to the base model.
    """

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """Runs the base model's forward with the active adapters."""
        if len(args) > len(names):
            raise TypeError(f"forward() takes {len(names)} inputs by position, not {len(args)}")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"forward() got multiple values for argument {name!r}")
            kwargs[name] = value
        inputs = {name: value for name, value in kwargs.items() if value is not None or name not in names}
        return PeftModel.forward(self, **inputs)

    kind = inspect.Parameter
    inputs = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    ends = kind("self", kind.POSITIONAL_OR_KEYWORD), kind("kwargs", kind.VAR_KEYWORD)
    signed: Any = forward
    signed.__signature__ = inspect.Signature([ends[0], *inputs, ends[1]])
    return forward


_TEXT = ("input_ids", "attention_mask", "inputs_embeds")
_OPTIONS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


class _TaskModel(PeftModel):
    """A PeftModel for a task."""

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of heads that are randomly initialized and are therefore also trained and saved."""
    forward = _forward(*_TEXT, "labels", *_OPTIONS)

    @classmethod
    def _complete(cls, config: AdapterConfig) -> AdapterConfig:
        if not cls.heads or not hasattr(config, "modules_to_save"):
            return config
        names = dict.fromkeys([*(config.modules_to_save or ()), *cls.heads])
        return config.copy(modules_to_save=list(names), task_type=config.task_type or cls.task)


class PeftModelForCausalLM(_TaskModel):
    """A causal language model with adapters."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(_TaskModel):
    """A sequence-to-sequence language model with adapters."""

    task = TaskType.SEQ_2_SEQ_LM
    forward = _forward(
        *_TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *_OPTIONS
    )


class PeftModelForSequenceClassification(_TaskModel):
    """A sequence classifier with adapters; its head is also trained and saved."""

    task = TaskType.SEQ_CLS
    heads = TASK_HEADS[task]


class PeftModelForTokenClassification(_TaskModel):
    """A token classifier with adapters; its head is also trained and saved."""

    task = TaskType.TOKEN_CLS
    heads = TASK_HEADS[task]


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answering model with adapters; its head is also trained and saved."""

    task = TaskType.QUESTION_ANS
    heads = TASK_HEADS[task]
    forward = _forward(
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions", *_OPTIONS),
    )


class PeftModelForFeatureExtraction(_TaskModel):
    """A feature extractor with adapters."""

    task = TaskType.FEATURE_EXTRACTION
    forward = _forward(*_TEXT, *_OPTIONS)


_NAME_FIELDS = (
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern"),
)
"""Fields of configs with names or patterns of modules."""


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adds a new adapter to a model and returns the PeftModel. The model is changed in place.

    A second call with the same name replaces that adapter by a newly initialized one with the new config; layers are
    not wrapped twice. A second prompt on the same base leaves the first one unchanged.

    Args:
        model: the base model, or a PeftModel.
        peft_config: config of the adapter. If ``model`` is a PeftModel, its names may also be paths in it, such as
            ``base_model.model.lm_head``.
        adapter_name: name of the adapter.
        mixed: accepted for compatibility with PEFT and ignored; adapters of different methods can always be mixed.
        autocast_adapter_dtype: use float32 for the adapter on a half-precision base.
        revision: revision of the base model, for the saved config.
        low_cpu_mem_usage: leave the adapter's parameters on the meta device until ``load_adapter`` or
            ``set_peft_model_state_dict`` loads them.

    Returns:
        The PeftModel, of the class for the config's task.

    Raises:
        TargetError: the config does not fit the model, which is not changed.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"get_peft_model needs a torch model, not a {type(model).__name__}")
    if not isinstance(peft_config, AdapterConfig):
        raise ConfigError(f"get_peft_model needs a config such as LoraConfig, not a {type(peft_config).__name__}")
    manager = manager_of(model)
    names = () if manager is None else manager.names
    config = _with_names_in_base(peft_config, model) if isinstance(model, PeftModel) else peft_config
    config = _of_base(config, model, revision)
    handle = PeftModel.for_task(config)(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    if config is not peft_config:
        with handle.manager.transaction() as change:
            adopt_config(handle.manager, adapter_name, peft_config, change)
    if names and handle.manager is manager:
        warnings.warn(
            f"You are trying to modify a model that already carries {', '.join(map(repr, names))}: "
            + (f"{adapter_name!r} is reconfigured" if adapter_name in names else f"{adapter_name!r} is added")
            + ("" if isinstance(model, PeftModel) else "; an older PeftModel of this model is invalid now"),
            stacklevel=2,
        )
    return handle


def _of_base(config: AdapterConfig, model: nn.Module, revision: str | None) -> AdapterConfig:
    """Returns a config with the base model's revision, and without a name that the base model does not have."""
    if revision is not None:
        if config.revision not in (None, revision):
            warnings.warn(
                f"the config's revision {config.revision!r} of the base model is replaced by {revision!r}", stacklevel=3
            )
        config = user_config(config).copy(revision=revision)
    name, base = config.base_model_name_or_path, model.get_base_model() if isinstance(model, PeftModel) else model
    if name is not None and base_name(base) is None:
        warnings.warn(
            f"base_model_name_or_path of the config was renamed from {name!r} to 'None': the base model has no name",
            stacklevel=3,
        )
        config = user_config(config).copy(base_model_name_or_path=None)
    return config


def _with_names_in_base(config: AdapterConfig, model: PeftModel) -> AdapterConfig:
    """Returns a config whose names are paths in the base model; those of the given one may be paths in a PeftModel."""
    if "base_model" in model.get_base_model()._modules:
        return config
    changed: dict[str, Any] = {}
    for field in _NAME_FIELDS:
        value: Any = getattr(config, field, None)
        bare = value
        if isinstance(value, str):
            bare = without_prefix(value)
        elif isinstance(value, Mapping):
            bare = {without_prefix(name): of_name for name, of_name in value.items()}
        elif value:
            bare = type(value)(map(without_prefix, value))
        if bare != value:
            changed[field] = bare
    return user_config(config).copy(**changed) if changed else config
