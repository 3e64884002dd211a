"""AutoPeftModel: loads a saved adapter together with its base model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from nbpeft import checkpoint
from nbpeft._util.hub_access import hub_options
from nbpeft.engine.contract.adapter import AdapterConfig, TaskType
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import BaseNotFoundError, CheckpointError, ConfigError, in_one_line, shown
from nbpeft.model.handle.peft_model import PeftModel

_BASE_CLASSES: dict[TaskType, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_CHECKPOINT_OPTIONS = ("subfolder", "cache_dir", "token", "local_files_only")


class AutoPeftModel:
    """Loads a saved adapter and the base model that its config names."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(f"create a {type(self).__name__} with {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] = ("transformers",),
        **kwargs: Any,
    ) -> PeftModel:
        """Loads the base model and the adapter.

        Args:
            pretrained_model_name_or_path: folder or hub id of the adapter.
            adapter_name: name to give the adapter.
            is_trainable: whether to make the adapter trainable.
            config: used instead of the saved config.
            revision: revision of the adapter on the hub.
            import_allowlist: packages from which a config without a task type may import the base model's class.
            **kwargs: ``subfolder``, ``cache_dir``, ``token``; all others are passed to the base model's
                ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``, …).

        Returns:
            The base model with the adapter.

        Raises:
            CheckpointError: the adapter does not name its base model, or the base model cannot be loaded.
        """
        source = checkpoint.expanded(pretrained_model_name_or_path)
        options = {key: kwargs[key] for key in _CHECKPOINT_OPTIONS if key in kwargs}
        saved = config or checkpoint.read_config(source, revision=revision, **options)
        base_name = saved.base_model_name_or_path
        if not base_name:
            raise CheckpointError(f"{source} does not name its base model: load that model and use PeftModel")
        base_class = cls._base_class(saved, import_allowlist)
        base_options = {key: value for key, value in kwargs.items() if key not in ("subfolder",)}
        base_options |= hub_options(base_name, base_options)
        try:
            base = base_class.from_pretrained(base_name, revision=saved.revision or "main", **base_options)
        except (OSError, ValueError) as error:
            raise BaseNotFoundError(
                f"the base model {shown(base_name)}, named by {source}, cannot be loaded: {in_one_line(error)}",
                name=base_name,
            ) from error
        _resize_for_tokenizer(base, source, options, trusted=bool(kwargs.get("trust_remote_code", False)))
        return PeftModel.from_pretrained(
            base, source, adapter_name, is_trainable, config=config, revision=revision, **options
        )

    @classmethod
    def _base_class(cls, config: AdapterConfig, allowed: Sequence[str]) -> Any:
        task = cls.task or (TaskType(config.task_type) if config.task_type else None)
        if cls.task is not None and config.task_type is not None and TaskType(config.task_type) != cls.task:
            raise ConfigError(
                f"the adapter is for {TaskType(config.task_type).value}, but {cls.__name__} loads {cls.task.value}"
            )
        if task is not None:
            return getattr(importlib.import_module("transformers"), _BASE_CLASSES[task])
        mapping = config.auto_mapping or {}
        library, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
        if not library or not name:
            raise ConfigError("the adapter's config has neither its task nor its base model's class; use PeftModel")
        if library.split(".")[0] not in allowed:
            raise ConfigError(
                f"the adapter's base class is in {shown(library)}, which is not in import_allowlist={allowed}"
            )
        try:
            found = getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError, ValueError):
            found = None
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise ConfigError(f"the adapter's base class {shown(name)} is not in {shown(library)}; use PeftModel")
        return found


def _resize_for_tokenizer(base: Any, source: str, options: dict[str, Any], *, trusted: bool) -> None:
    """Resizes the embeddings if the adapter was saved with a larger vocabulary."""
    folder = os.path.join(source, options.get("subfolder") or "")
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return
    tokenizers = importlib.import_module("transformers.models.auto.tokenization_auto")
    try:
        tokenizer = tokenizers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # a third party's file can raise any error
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {in_one_line(error)}") from error
    embedding: Any = embedding_of(base)
    if len(tokenizer) > embedding.num_embeddings:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For sequence-to-sequence language models."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For feature extractors."""

    task = TaskType.FEATURE_EXTRACTION
