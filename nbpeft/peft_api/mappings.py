"""``peft.mapping``: mappings from ``peft_type`` or task, computed from the registered methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import nbpeft.model as model_api
from nbpeft.engine.contract.adapter import PeftType
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.model.handle.tuner import tuner_class


class _ByPeftType(Mapping[PeftType, Any]):
    """A mapping from ``peft_type`` to a property of the method; includes methods that are registered later."""

    def __init__(self, read: Callable[[Method], Any]) -> None:
        self._read = read

    def _values(self) -> dict[PeftType, Any]:
        return {PeftType(method.peft_type): self._read(method) for method in reversed(methods())}

    def __getitem__(self, peft_type: PeftType) -> Any:
        return self._values()[peft_type]

    def __iter__(self) -> Iterator[PeftType]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __repr__(self) -> str:
        return repr(self._values())


PEFT_TYPE_TO_CONFIG_MAPPING = _ByPeftType(lambda method: method.config_class)
PEFT_TYPE_TO_PREFIX_MAPPING = _ByPeftType(lambda method: method.prefix)
PEFT_TYPE_TO_TUNER_MAPPING = _ByPeftType(
    lambda method: method.adapter_class if method.transforms_calls else tuner_class(method)
)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, Any] = {}
"""Empty: every model supports adapters of different methods, without a separate class."""

MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    handle.task.value: handle
    for handle in (
        model_api.PeftModelForSequenceClassification,
        model_api.PeftModelForSeq2SeqLM,
        model_api.PeftModelForCausalLM,
        model_api.PeftModelForTokenClassification,
        model_api.PeftModelForQuestionAnswering,
        model_api.PeftModelForFeatureExtraction,
    )
}
