"""``peft.mapping``: mappings from ``peft_type`` or task, computed from the registered methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import nbpeft.model as model_api
from nbpeft.engine.contract.adapter import PeftType
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.errors import ConfigError, NotSupportedError, UnknownMethodError, did_you_mean
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


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Checks its arguments as PEFT does and refuses the rest: a method of nbpeft is registered otherwise.

    Args:
        name: name of the method, in lower case.
        config_cls: class of its config.
        model_cls: its tuner class, which nbpeft would not call.
        prefix: prefix of the names of its parameters; None for the name and an underscore.
        is_mixed_compatible: whether it may be combined with other methods, as all methods may here.

    Raises:
        ConfigError: PEFT refuses the name, too: it is in use, or no ``PeftType``.
        NotSupportedError: the method is new.
    """
    if name.endswith("_") or not name.islower():
        raise ConfigError(f"the name of a method is lower case and does not end with '_': {name!r}", field="name")
    if name.upper() not in {kind.value for kind in PeftType}:
        raise ConfigError(f"there is no PeftType {name.upper()}" + did_you_mean(name.upper(), PeftType), field="name")
    prefix = f"{name}_" if prefix is None else prefix
    if PeftType(name.upper()) in PEFT_TYPE_TO_CONFIG_MAPPING or prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise UnknownMethodError(f"there is a method {name!r} or a prefix {prefix!r} already", field="name")
    raise NotSupportedError(
        f"{getattr(model_cls, '__name__', model_cls)} cannot be registered: nbpeft calls no tuner classes. A method "
        "is one file for nbpeft.engine.contract.registry.register, see the guide's page on writing a method",
        name="register_peft_method",
    )


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
