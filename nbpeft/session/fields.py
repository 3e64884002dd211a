"""The fields that a cell may set, with values and help: those of a config, of quantization and of training.

This imports nothing, so that completion is fast; config fields are only available after torch was imported.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.names import DTYPES, LOSS_CHUNK_SIZE, OPTIMIZERS, ORIGIN_FIELDS, QUANT_TYPES
from nbpeft.session.configs import DEFAULT_METHOD, SYNONYMS, config_class, method_names
from nbpeft.session.handles import uncompiled
from nbpeft.training.objectives.objective import fields_by_name, names
from nbpeft.training.transformers.argument_source import (
    NOTEBOOK_DEFAULTS,
    OTHER_NAMES,
    tracker_names,
    training_arguments,
)

_MODULE_FIELDS: dict[str, tuple[str, ...]] = {
    "target_modules": ("all-linear",),
    "exclude_modules": (),
    "modules_to_save": (),
}


@dataclass(frozen=True)
class Field:
    """One field of a cell.

    Attributes:
        name: name of the field.
        kind: its type, in Python syntax.
        default: its default value, in Python syntax; empty if there is none.
        help: description in one line.
        choices: the possible values, if they can be listed.
        modules: whether it also accepts names of the model's modules.
        listed: texts that are allowed as elements of a list.
    """

    name: str
    kind: str = ""
    default: str = ""
    help: str = ""
    choices: tuple[Any, ...] = ()
    modules: bool = False
    listed: tuple[str, ...] = ()


_QUANTIZATION = (
    Field("bits", "int", "4", "Bits of a quantized weight.", (4, 8)),
    Field("quant_type", "str", "'nf4'", "Data type of 4-bit weights.", QUANT_TYPES),
    Field("double_quant", "bool", "True", "Quantize the constants of 4-bit blocks too.", (True, False)),
    Field("compute_dtype", "str", "", "Dtype in which 4-bit layers compute; by default that of the rest.", DTYPES),
    Field("quant_storage", "str", "'uint8'", "Dtype that holds the 4-bit codes.", ("uint8", *DTYPES)),
    Field("gradient_checkpointing", "bool", "True", "Recompute activations in backward.", (True, False)),
    Field("gradient_checkpointing_kwargs", "dict", "None", "Options of torch.utils.checkpoint."),
    Field("upcast", "str", "'norms'", "Which parameters are cast to float32.", ("norms", "peft", "none")),
    Field("gguf_file", "str", "None", "The .gguf file in a folder or repository."),
    Field("device_map", "str | dict", "None", "Devices of the layers, e.g. 'auto'.", ("auto",)),
    Field("model_class", "type", "None", "The class to load, such as AutoModelForSequenceClassification."),
    Field("dtype", "str", "", "Dtype of the weights that are not quantized.", DTYPES),
    Field("revision", "str", "None", "Branch, tag or commit on the hub."),
    Field("subfolder", "str", "''", "Folder in the repository."),
    Field("cache_dir", "str", "None", "Folder for downloads."),
    Field("token", "str | bool", "None", "Access token of the hub."),
    Field("local_files_only", "bool", "False", "Download nothing.", (True, False)),
    Field("trust_remote_code", "bool", "False", "Run code that comes with the model.", (True, False)),
    Field("attn_implementation", "str", "None", "How attention is computed.", ("sdpa", "eager", "flash_attention_2")),
    Field("max_memory", "dict", "None", "Bytes for each device, with device_map."),
)

PLAN_FIELDS = (
    *("bits", "quant_type", "double_quant", "gradient_checkpointing", "optim", "fsdp", "loss_chunk_size", "recompute"),
)
"""Fields of a training and of a quantization that affect the memory of a step."""


def fields(kind: str, method: str = "") -> Mapping[str, Field]:
    """Returns the fields of a cell, without those that would be refused.

    Args:
        kind: ``config``, ``training``, ``qlora`` or ``plan``.
        method: the method of a config; LoRA if empty.
    """
    if kind == "training":
        return {field.name: field for field in _training()}
    own = _QUANTIZATION if kind == "qlora" else _plan() if kind == "plan" else ()
    return {field.name: field for field in (*own, *_config(method))}


def meant_field(kind: str, option: str) -> str:
    """Returns the field that is meant by an option that a command does not have; empty if there is none.

    Args:
        kind: ``config``, ``training`` or ``qlora``; other kinds have no fields.
        option: the name of the option without dashes in front, e.g. ``learning-rate`` or ``lr``.
    """
    name = option.replace("-", "_")
    meant = (OTHER_NAMES if kind == "training" else SYNONYMS).get(name, name)
    return meant if kind and meant in fields(kind) else ""


def objective_names() -> tuple[str, ...]:
    """Returns the names of the objectives of a training."""
    return names()


def module_names(model: Any) -> tuple[str, ...]:
    """Returns the names of a model's layers that can be adapted, without duplicates, in model order."""
    from nbpeft.engine.contract.registry import resolve_layer_kind
    from nbpeft.engine.tree.model_tree import base_model_of, walk

    sites = walk(base_model_of(uncompiled(model)))
    found = (site.path.rpartition(".")[2] for site in sites if resolve_layer_kind(site.module) is not None)
    return tuple(dict.fromkeys(name for name in found if not name.isdigit()))


def _config(method: str) -> Iterator[Field]:
    if "torch" not in sys.modules or (method and method.lower() not in method_names()):
        return
    cls = config_class(method or DEFAULT_METHOD)
    texts = _attribute_docs(cls)
    hidden = {*ORIGIN_FIELDS, *cls.not_implemented, *cls.unused}
    for item in dataclasses.fields(cls):
        if not item.init or item.name in hidden:
            continue
        if item.name == "peft_type":
            text = "The method; the same as --method."
            yield Field("peft_type", "str", repr(DEFAULT_METHOD), text, tuple(name.upper() for name in method_names()))
            continue
        field = _field_of(item, cls, texts.get(item.name, ""))
        modules = item.name in _MODULE_FIELDS
        choices = _MODULE_FIELDS[item.name] if modules else cls.choices.get(item.name, field.choices)
        yield dataclasses.replace(field, choices=choices, modules=modules)


def _plan() -> Iterator[Field]:
    """Yields the fields of a training and of a quantization that affect the memory of a step."""
    found = {field.name: field for field in (*_training(), *_QUANTIZATION) if field.name in PLAN_FIELDS}
    if "optim" in found:
        found["optim"] = dataclasses.replace(found["optim"], choices=OPTIMIZERS)
    yield from found.values()


def _training() -> Iterator[Field]:
    trackers = tracker_names()
    for item in training_arguments():
        default = repr(NOTEBOOK_DEFAULTS[item.name]) if item.name in NOTEBOOK_DEFAULTS else item.default
        field = Field(item.name, item.kind, default, _first_line(item.help), item.choices)
        if item.name == "learning_rate":
            about = f"{field.help} By default it follows from method, model and objective; the card says it."
            field = dataclasses.replace(field, default="", help=about)
        if item.name == "report_to":
            field = dataclasses.replace(field, choices=("none", "all", *trackers), listed=trackers)
        yield field
    about = "Number of tokens whose logits are in memory at the same time for the loss; 0 for all."
    yield Field("loss_chunk_size", "int", str(LOSS_CHUNK_SIZE), about)
    about = "Stop if the loss is NaN or the weights explode, and restore the last good weights."
    yield Field("stop_on_divergence", "bool", "True", about, (True, False))
    for name, of_objectives in fields_by_name().items():
        first = next(iter(of_objectives.values()))
        usual: Any = first.default
        others = [f"{other}: {item.default!r}" for other, item in of_objectives.items() if item.default != usual]
        of = ", ".join(of_objectives) + (f"; default of {', '.join(others)}" if others else "")
        about = f"{first.metadata.get('help', '')} (objective {of})"
        choices = first.metadata.get("choices") or ((True, False) if isinstance(usual, bool) else ())
        kind = type(usual).__name__ if usual is not None else str(first.type)
        yield Field(name, kind, repr(usual), about, choices)


def _field_of(item: dataclasses.Field[Any], cls: type, text: str) -> Field:
    kind = _resolved(item, cls)
    default: Any = item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    written = "" if default is dataclasses.MISSING else repr(getattr(default, "value", default))
    return Field(item.name, _kind_text(kind), written, _first_line(text), _choices(kind))


def _resolved(item: dataclasses.Field[Any], cls: type) -> Any:
    """Returns the type of a field, also if its annotation is a string."""
    if not isinstance(item.type, str):
        return item.type
    owner = next((base for base in cls.__mro__ if item.name in inspect.get_annotations(base)), cls)
    try:
        return eval(item.type, dict(vars(sys.modules[owner.__module__])))
    except Exception:  # the annotation has a name that is imported only for type checkers
        return item.type


def _parts(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _choices(kind: Any) -> tuple[Any, ...]:
    """Returns all values of a type with few values: those of an enum, True and False, and None if it is allowed."""
    found: list[Any] = []
    parts = _parts(kind)
    for part in parts:
        if part is bool:
            found += [True, False]
        elif isinstance(part, type) and issubclass(part, enum.Enum):
            found += [member.value for member in part]
    return (*found, None) if found and type(None) in parts else tuple(found)


def _kind_text(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    names = ["str" if _is_enum(part) else _name(part) for part in _parts(kind)]
    return " | ".join(dict.fromkeys(names))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).rpartition(".")[2]


def _attribute_docs(cls: type) -> dict[str, str]:
    """Returns attribute name -> description from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        # Python 3.13 and newer compile docstrings without their indentation.
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
            found[name] = re.sub(r"\s+", " ", text)
    return found


def _first_line(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text[:1].upper() + text[1:]
