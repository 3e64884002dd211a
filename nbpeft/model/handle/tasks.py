"""The task classes of PEFT, and the way in: ``get_peft_model``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from nbpeft.engine.contract.adapter import TASK_HEADS, AdapterConfig, TaskType
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.saving.given_configs import as_given, take_given


class _TaskModel(PeftModel):
    """A handle whose forward names the usual inputs, so that a Trainer knows which columns to keep."""

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of heads that start random and are therefore trained and saved too."""

    @classmethod
    def _complete(cls, config: AdapterConfig) -> AdapterConfig:
        if not cls.heads or not hasattr(config, "modules_to_save"):
            return config
        names = dict.fromkeys([*(config.modules_to_save or ()), *cls.heads])
        return config.copy(modules_to_save=list(names), task_type=config.task_type or cls.task)

    def _run(self, named: Mapping[str, Any], kwargs: dict[str, Any]) -> Any:
        given = {name: value for name, value in named.items() if value is not None}
        return super().forward(**given, **kwargs)


class _SingleStack(_TaskModel):
    """A model of one stack of layers, with labels."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model's forward with the active adapters."""
        return self._run(_named(locals()), kwargs)


class PeftModelForCausalLM(_SingleStack):
    """A causal language model with adapters."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(_TaskModel):
    """A sequence-to-sequence language model with adapters."""

    task = TaskType.SEQ_2_SEQ_LM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model's forward with the active adapters."""
        return self._run(_named(locals()), kwargs)


class PeftModelForSequenceClassification(_SingleStack):
    """A sequence classifier with adapters; its head is trained and saved too."""

    task = TaskType.SEQ_CLS
    heads = TASK_HEADS[task]


class PeftModelForTokenClassification(_SingleStack):
    """A token classifier with adapters; its head is trained and saved too."""

    task = TaskType.TOKEN_CLS
    heads = TASK_HEADS[task]


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answering model with adapters; its head is trained and saved too."""

    task = TaskType.QUESTION_ANS
    heads = TASK_HEADS[task]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model's forward with the active adapters."""
        return self._run(_named(locals()), kwargs)


class PeftModelForFeatureExtraction(_TaskModel):
    """A feature extractor with adapters."""

    task = TaskType.FEATURE_EXTRACTION

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the base model's forward with the active adapters."""
        return self._run(_named(locals()), kwargs)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("self", "kwargs", "__class__")}


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adds a new adapter to a model and returns the handle. The model is changed in place.

    A second call with the same name replaces that adapter: it is initialised anew with the new
    config, and nothing is wrapped twice. A second prompt over one base leaves the first as it is.

    Args:
        model: the base model, or a handle on one.
        peft_config: config of the adapter.
        adapter_name: its name.
        mixed: accepted for PEFT's sake; adapters of different methods always go together here.
        autocast_adapter_dtype: keep the adapter in float32 on a half-precision base.
        revision: of the base model, for the saved config.
        low_cpu_mem_usage: leave the adapter's parameters on the meta device, to be filled in by
            ``load_adapter`` or ``set_peft_model_state_dict``.

    Raises:
        TargetError: the config does not fit the model, which is as it was.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"get_peft_model needs a torch model, not a {type(model).__name__}")
    if not isinstance(peft_config, AdapterConfig):
        raise ConfigError(f"get_peft_model needs a config such as LoraConfig, not a {type(peft_config).__name__}")
    known = manager_of(model)
    there = () if known is None or isinstance(model, PeftModel) else known.names
    config = peft_config
    if revision is not None:
        if config.revision not in (None, revision):
            warnings.warn(
                f"the config has revision {config.revision!r} of the base model already; {revision!r} takes its place",
                stacklevel=2,
            )
        config = as_given(config).copy(revision=revision)
    handle = PeftModel.for_task(config)(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    if config is not peft_config:
        with handle.manager.transaction() as change:
            take_given(handle.manager, adapter_name, peft_config, change)
    if there and handle.manager is known:
        warnings.warn(
            f"You are trying to modify a model that already carries {', '.join(map(repr, there))}: "
            + (f"{adapter_name!r} is reconfigured" if adapter_name in there else f"{adapter_name!r} is added")
            + "; an older handle on it is dead now",
            stacklevel=2,
        )
    return handle
