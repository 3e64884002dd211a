"""Building configs from the fields that a user writes, and comparing the meaning of configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.errors import ConfigError, UnknownMethodError, did_you_mean
from nbpeft.names import ORIGIN_FIELDS

if TYPE_CHECKING:
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.contract.registry import Method

DEFAULT_METHOD = "LORA"
"""The default ``peft_type``."""

_NAME_FIELDS = ("target_modules", "exclude_modules")
_ONE_NAME = re.compile(r"[\w.]+")


_FORMS_OF_LORA = {
    "DORA": "set use_dora = True",
    "RSLORA": "set use_rslora = True",
    "QLORA": "load the model in 4 bits (qlora), or add LoRA to one that is quantized already",
    "ALORA": "set alora_invocation_tokens",
    **{init.upper(): f'set init_lora_weights = "{init}"' for init in ("pissa", "olora", "loftq", "eva", "corda")},
    "LORA_GA": 'set init_lora_weights = "lora_ga"',
}
"""Name by which a form of LoRA is known -> how it is asked for."""


def config_class(peft_type: str = DEFAULT_METHOD) -> type[AdapterConfig]:
    """Return the config class of a method.

    Raises:
        UnknownMethodError: no registered method has that ``peft_type``.
    """
    import nbpeft.engine  # registers the methods
    from nbpeft.engine.contract.registry import config_class_of

    del nbpeft
    name = str(getattr(peft_type, "value", peft_type)).upper()
    if (field := _FORMS_OF_LORA.get(name)) is not None:
        raise UnknownMethodError(f"{peft_type} is a form of LoRA, not a method of its own: {field}", peft_type=name)
    return config_class_of(name)


def field_names(peft_type: str = DEFAULT_METHOD) -> tuple[str, ...]:
    """Return the fields that a cell may set for a method, including ``peft_type``."""
    return tuple(item.name for item in dataclasses.fields(config_class(peft_type)) if item.init)


def method_names() -> tuple[str, ...]:
    """Return the names of the methods for ``--method`` and ``peft_type``, in lower case."""
    import nbpeft.engine  # registers the methods
    from nbpeft.engine.contract.registry import methods

    del nbpeft
    return tuple(sorted({method.peft_type.lower() for method in methods()}))


def build_config(
    config: AdapterConfig | Mapping[str, Any], *, instead_of: AdapterConfig | None = None
) -> AdapterConfig:
    """Build a config from fields, or return a config unchanged.

    Args:
        config: a config, or fields by name. The method is their ``peft_type``, by default that of ``instead_of``, or
            else LoRA. In fields a target that is a plain name means modules with that name, and not a pattern; an init
            with options gets its default options.
        instead_of: config of the adapter that is reconfigured.

    Raises:
        ConfigError: a field is unknown (the message has similar names) or its value is invalid; ``details["field"]``
            is the name of the field.
        UnknownMethodError: ``peft_type`` is not a known method.
    """
    from nbpeft.engine.methods.lora.init_configs import INIT_CONFIGS

    if not isinstance(config, Mapping):
        if not hasattr(config, "base_model_name_or_path"):
            raise ConfigError(f"expected a config such as LoraConfig, or its fields by name, not {config!r:.60}")
        return config
    fields = {name: _as_names(value) if name in _NAME_FIELDS else value for name, value in config.items()}
    usual = DEFAULT_METHOD if instead_of is None else instead_of.peft_type
    chosen = fields.pop("peft_type", None) or usual or DEFAULT_METHOD
    cls, known = config_class(chosen), field_names(chosen)
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"{cls.__name__} has no field {name!r}.{field_hint(name, known)}",
                field=name,
                known=known,
            )
    init = fields.get("init_lora_weights")
    settings, settings_class = INIT_CONFIGS.get(init, ("", None)) if isinstance(init, str) else ("", None)
    if settings_class is not None and settings in known:
        fields.setdefault(settings, settings_class())
    try:
        return cls(**fields)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{cls.__name__}: {error}") from None


SYNONYMS = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "modules": "target_modules",
    "targets": "target_modules",
    "target": "target_modules",
    "layers": "layers_to_transform",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "init": "init_lora_weights",
    "quant": "bits",
    "checkpointing": "gradient_checkpointing",
    "sharded": "fsdp",
    "optimizer": "optim",
}
"""Common wrong names -> the field that is meant, where spelling alone does not suggest it."""


def field_hint(name: str, known: Collection[str]) -> str:
    """Return what is likely meant by the name of a field that a config does not have; empty if that is not known."""
    from nbpeft.training.transformers.argument_source import training_arguments

    if hint := _synonym_hint(name, known):
        return hint
    if any(argument.name == name for argument in training_arguments()):
        return " It is a field of TrainingArguments: give it to the training."
    return did_you_mean(name, known) or _other_method_hint(name)


def _synonym_hint(name: str, known: Collection[str]) -> str:
    """Return a hint at the field that a common wrong name means; empty if there is none."""
    meant = SYNONYMS.get(name.lower(), "")
    return f" Did you mean {meant!r}?" if meant in known else ""


def _other_method_hint(name: str) -> str:
    """Return a hint at methods whose configs have a field; the default method, if it is among them."""
    from nbpeft.engine.contract.registry import methods

    having = [method for method in methods() if name in field_names(method.peft_type)]
    types = list(dict.fromkeys(str(method.peft_type) for method in having))
    named = DEFAULT_METHOD if DEFAULT_METHOD in types else next(iter(types), "")
    others = f", and so do {len(types) - 1} others" if len(types) > 1 else ""
    return f" peft_type={named!r} has it{others}." if named else ""


def meaning(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields that determine what a config does in comparable form: without origins, with sorted lists."""
    return {name: _plain(value) for name, value in config.to_dict().items() if name not in ORIGIN_FIELDS}


def label_of(config: AdapterConfig) -> str:
    """Return the display name of a config's method: ``LoRA``, ``DoRA``, ``rsLoRA``."""
    return _method(config).title(config)


def summary_of(config: AdapterConfig) -> dict[str, str]:
    """Return the displayed fields of a config: ``{"r": "16", "α": "32"}``."""
    return dict(_method(config).listing.summary(config))


def combination_types(configs: Iterable[AdapterConfig]) -> tuple[str, ...]:
    """Return the combination types that all methods of these configs support."""
    ways = [combine.types if (combine := _method(config).combine) is not None else () for config in configs]
    return tuple(name for name in ways[0] if all(name in way for way in ways)) if ways else ()


def _method(config: AdapterConfig) -> Method:
    import nbpeft.engine  # registers the methods
    from nbpeft.engine.contract.registry import method_of

    del nbpeft
    return method_of(config)


def _as_names(value: Any) -> Any:
    """Return a single name as a list, because a string would be a pattern for the whole path of a module."""
    return [value] if isinstance(value, str) and _ONE_NAME.fullmatch(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    return getattr(value, "value", value)
