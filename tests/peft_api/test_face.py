"""Every public name, signature, default, field and attribute of the installed PEFT against nbpeft's.

What differs is in one table with its reason: a difference that is not in it fails, and so does a line that no
difference matches any more.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.contract.registry import methods
from nbpeft.peft_api.missing import missing
from nbpeft.peft_api.names import METHODS, MODULES

peft = pytest.importorskip("peft")

# Reason -> patterns of differences, as the functions below write them.
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "variants and initializations of LoRA that nbpeft lacks": (
        "peft.tuners.lora.arrow: *",
        "peft.tuners.lora.corda: *",
        "peft.tuners.lora.eva: no *",
        "peft.tuners.lora.loraga: no *",
        "peft.tuners.lora.monteclora: * refuses",
    ),
    "tools that nbpeft lacks": (
        "peft.tuners.lora.model: no *",  # tensor parallelism
        "peft.tuners.lora.tp_layer: *",  # Megatron's layers
        "peft.utils.integrations: no *",
        "peft.tuners.tuners_utils: replicate_layers refuses",
        "peft.utils.merge_utils: * refuses",
    ),
    "how PEFT makes prompts; the engine gives them their values and puts them into calls": (
        "peft.tuners.adalora*: RankAllocator: no parameter peft_config",
        "peft*: *Embedding: word_embeddings=None, not 'no default'",
        "peft*: AdaptedAttention: no parameter *",
        "peft*: AdaptionPromptModel: no parameter *",
        "peft*: *_model_postprocess_past_key_value refuses",
        "peft*: map_cache_to_layer_device_map refuses",
        "peft.utils: _prepare_prompt_learning_config refuses",
        "peft.utils.integrations: get_layer_device_map refuses",
    ),
    "of methods that nbpeft lacks": ("peft.tuners.lycoris_utils: * refuses",),
    "a class for isinstance: the engine makes layers": (
        "peft.tuners*: *: only for isinstance",
        "peft.utils*: *Wrapper: *",
    ),
    "how PEFT builds its layers; the engine has kinds of layers and ways to store a weight instead": (
        "peft.tuners.*: no dispatch_*",
        "peft.tuners.lora.bnb: no VARIANT_KWARG_KEYS",
        "peft.tuners.lora.dora: *",
        "peft.tuners.lora*: Embedding: no parameter init_lora_weights",  # PEFT's does not read it
        "peft.tuners.lora*: ParamWrapper: no parameter is_target_conv_1d_layer",  # PEFT's only refuses it
        "peft.tuners.lora*: TorchaoLoraLinear: no parameter get_apply_tensor_subclass",
        "peft.tuners.lora.layer: no Lora*",
        "peft.tuners.lora.te: TeLinear refuses",
        "peft.tuners.lora.layer: LoraVariant refuses",
        "peft.tuners.lora.variants: *",
        "peft.utils.other: no is_gptqmodel_*",
        "peft.utils.other: no mlu_available",
        "peft.utils.quantization_utils: no LayerType",
        "peft.utils.quantization_utils: *Backend: no parameter *",
        "peft*: get_gptqmodel_quant_linear refuses",
        "peft*: get_quantization_kwargs refuses",
        "peft*: quantization_extra_repr refuses",
        "LoRA's *: no attribute *_init",
        "LoRA's *: no attribute cast_input_dtype_enabled",
        "LoRA's *: no attribute ephemeral_gpu_offload",
        "LoRA's *: no attribute frozen_peft_weight_names",
        "LoRA's *: no attribute kwargs",
        "LoRA's *: no attribute lora_variant*",
        "LoRA's *: no attribute resolve_lora_variant",
        "LoRA's embedding: no attribute *_fns",
        "LoRA's embedding: no attribute device_mesh",
        "LoRA's embedding: no attribute tp_layer",
        "LoRA's linear: no attribute is_target_conv_1d_layer",
        "LoraModel: no attribute subtract_mutated_init",
    ),
    "what PEFT's own code calls": (
        "peft.auto: no *_allowlist",
        "peft.config: PeftConfigMixin refuses",
        "peft.tuners.lora*: dispatch_* refuses",
        "peft.tuners.tuners_utils: clone_module refuses",
        "peft.tuners.tuners_utils: no *",
        "peft.utils: _set_trainable refuses",
        "peft.utils*: check_file_exists_on_hf_hub refuses",
        "peft.utils*: set_additional_trainable_modules refuses",
        "peft.utils.integrations: dequantize_bnb_weight refuses",
        "peft.utils.integrations: gather_params_ctx refuses",
        "peft.utils.other: no create_attention_mask",
        "peft.utils.transformers_weight_conversion: * refuses",
    ),
    "the maths of a method, which is the engine's": (
        "peft.tuners.adaption_prompt.*: no *",
        "peft.tuners.boft.*: no *",
        "peft.tuners.c3a.utils: no such module",
        "peft.tuners.glora.layer: no Glora*Path",
        "peft.tuners.loha.layer: no *",
        "peft.tuners.lokr.layer: no make_*",
        "peft.tuners.mixed.model: no *",
        "peft.tuners.oft.layer: no *",
        "peft.tuners.poly.router: no EPS",
        "peft.tuners.psoft.layer: no OrthLayer",
        "peft.tuners.randlora.layer: no UniqueBaseGrad",
        "peft.tuners.shadow.*: no *",
        "peft.tuners.shadow*: ShadowCache: no parameter *",
        "peft.tuners.shadow*: ShadowCarrier refuses",
        "peft.tuners.waveft.*: no such module",
        "peft.tuners.xlora.*: no *",
    ),
    "a type for annotations": ("peft.tuners.road.config: no RoadVariant",),
    "whose layers they are is known": (
        "peft*: delete_adapter: layer_cls=None, not *",
        "peft*: delete_adapter: prefix='lora_', not *",
        "peft*: set_adapter: layer_cls=None, not *",
    ),
    "a status that one makes oneself may leave something out": ("peft.peft_model: Tuner*Status: *",),
    "a model needs a config": (
        "peft*: PeftModelForTokenClassification: peft_config='no default', not None",
        "PeftModelForTokenClassification.__init__: peft_config='no default', not None",
    ),
    "the default depends on the method": ("LoraModel.add_weighted_adapter: combination_type=None, not 'svd'",),
    "the same name for all methods: peft_config": (
        *(
            f"peft*: {name}Model: no parameter config"
            for name in ("AdaLora", "Adamss", "OSF", "TinyLora", "UniLora", "XLora")
        ),
    ),
    "the adapters that it names are loaded as any others": ("peft*: XLoraModel: no parameter *_*",),
    "the default is the model's": ("XLoraConfig: hidden_size=None, not 4096",),
    "empty at first, and filled in by training": ("AdaLoraConfig: rank_pattern={}, not None",),
    "a field of our own": (
        "*LoraConfig: field quantization_aware is not PEFT's",
        "*AdaLoraConfig: field quant* is not PEFT's",
    ),
    "a field that every method has": (
        "*Config: field exclude_modules is not PEFT's",
        "*Config: field layers_* is not PEFT's",
    ),
    "not there yet": (
        "LoRA's embedding: no attribute bias",
        "LoRA's head: no attribute *",
    ),
}

CONFIGS = sorted(
    {"PeftConfig", "LoraRuntimeConfig", *(method.config_class.__name__ for method in methods())} & vars(peft).keys()
)
NEEDED = {"AdaLoraConfig": {"total_step": 1}, "CPTConfig": {"task_type": "CAUSAL_LM"}}
"""Config -> fields without which there is none."""
TASKS = (
    *("PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification"),
    *("PeftModelForTokenClassification", "PeftModelForQuestionAnswering", "PeftModelForFeatureExtraction"),
)
REQUIRED = "no default"


class Tiny(nn.Module):
    """One layer of each kind that most models have, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.linear(self.embedding(ids)))


# What differs, as lines


def modules() -> Iterator[tuple[str, Any]]:
    """All of PEFT's modules."""
    for info in pkgutil.walk_packages(peft.__path__, "peft."):
        yield info.name, importlib.import_module(info.name)
    yield "peft", peft


def is_of_a_method(path: str) -> bool:
    """Whether a module is below the package of a method other than LoRA: its names only have to be there."""
    parts = path.split(".")
    return len(parts) > 3 and parts[1] == "tuners" and parts[2] in METHODS


def public_names(module: Any) -> list[str]:
    """What a module calls public, and what it defines without an underscore: functions, classes and constants."""
    nodes = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    targets = [node.targets[0] for node in nodes if isinstance(node, ast.Assign)]
    found = [target.id for target in targets if isinstance(target, ast.Name)]
    found += [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = {name for name in found if name and not name.startswith("_") and hasattr(module, name)}
    return sorted({*public, *getattr(module, "__all__", [])})


def is_missing(value: Any) -> bool:
    return isinstance(value, type(missing("Class", "", ""))) or getattr(value, "__module__", "") == missing.__module__


def differing_names() -> Iterator[str]:
    """Names that are not there or only refuse, and signatures of those that are there."""
    lacking = {name for _, names in METHODS.values() for name in names.split()} - set(names_of_methods())
    for path, module in modules():
        if path.partition(".")[2] not in MODULES:
            yield f"{path}: no such module"
            continue
        ours = importlib.import_module(path.replace("peft", "nbpeft", 1))
        for name in public_names(module):
            if not hasattr(ours, name):
                yield f"{path}: no {name}"
            elif is_of_a_method(path):
                continue
            elif is_missing(getattr(ours, name)):
                yield from () if name in lacking else (f"{path}: {name} refuses",)
            elif callable(getattr(module, name)):
                yield from differing_signature(f"{path}: {name}", getattr(module, name), getattr(ours, name))


def names_of_methods() -> Iterator[str]:
    """What every method that is there has to have under PEFT's names."""
    for method in methods():
        title = method.config_class.__name__.removesuffix("Config")
        yield from (f"{title}Config", f"{title}Model", f"{title}Layer")


def differing_signature(title: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Parameters that ours lacks, and other defaults."""
    if "for ``isinstance``" in str(getattr(ours, "__doc__", "")):
        yield f"{title}: only for isinstance"
        return
    taken = parameters(ours)
    for name, default in parameters(theirs).items():
        if name not in taken:
            yield f"{title}: no parameter {name}"
        elif _shown(taken[name]) != _shown(default) and taken[name] != default:
            yield f"{title}: {name}={taken[name]!r}, not {default!r}"


def _shown(default: Any) -> str:
    """A default as text; functions, which each library has its own of, by name."""
    return default.__name__ if inspect.isfunction(default) else str(default)


def parameters(function: Any) -> dict[str, Any]:
    """Name -> default of the parameters that have a name."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    empty = inspect.Parameter.empty
    return {one.name: REQUIRED if one.default is empty else one.default for one in found if one.kind not in various}


def differing_fields() -> Iterator[str]:
    """Fields of configs that one side lacks, other defaults and methods."""
    for name in CONFIGS:
        theirs, ours = getattr(peft, name), getattr(nbpeft, name)
        fields, own = defaults(theirs), defaults(ours)
        yield from (f"{name}: no field {field}" for field in fields.keys() - own.keys())
        yield from (f"{name}: field {field} is not PEFT's" for field in own.keys() - fields.keys())
        for field in fields.keys() & own.keys():
            if str(fields[field]) != str(own[field]) and fields[field] != own[field]:
                yield f"{name}: {field}={own[field]!r}, not {fields[field]!r}"
        yield from differing_attributes(name, made(theirs), made(ours))


def made(config: Any) -> Any:
    return config(**NEEDED.get(config.__name__, {}))


def defaults(config: Any) -> dict[str, Any]:
    return {field.name: getattr(made(config), field.name) for field in dataclasses.fields(config)}


def differing_attributes(title: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Public attributes that ours lacks, and signatures of methods; those of every module apart."""
    common = set(dir(nn.Module()))
    for name in dir(theirs):
        if name.startswith("_") or name in common:
            continue
        if not hasattr(ours, name):
            yield f"{title}: no attribute {name}"
        elif inspect.isfunction(inspect.getattr_static(type(theirs), name, None)):
            yield from differing_signature(f"{title}.{name}", getattr(theirs, name), getattr(ours, name))


def differing_models() -> Iterator[str]:
    """Attributes of handles, of the model between, of layers and of a module trained as a whole."""
    config = {"target_modules": ["embedding", "linear"], "modules_to_save": ["head"]}
    both = [library.get_peft_model(Tiny(), library.LoraConfig(**config)) for library in (peft, nbpeft)]
    yield from differing_attributes("PeftModel", *both)
    yield from differing_attributes("LoraModel", *[model.base_model for model in both])
    for name in ("embedding", "linear", "head"):
        layers = [getattr(model.base_model.model, name) for model in both]
        yield from differing_attributes(f"LoRA's {name}", *layers)
    for name in TASKS:
        for method in ("__init__", "forward", "generate"):
            theirs = getattr(getattr(peft, name), method, None)
            if theirs is not None:
                ours = getattr(getattr(nbpeft, name), method, None)
                yield from differing_signature(f"{name}.{method}", theirs, ours)


def differing_enums() -> Iterator[str]:
    for name in ("PeftType", "TaskType"):
        theirs, ours = getattr(peft, name), getattr(nbpeft, name)
        yield from (f"{name}: no {member}" for member in theirs.__members__ if getattr(ours, member, None) != member)


@cache
def differences() -> frozenset[str]:
    found = (differing_names, differing_fields, differing_models, differing_enums)
    return frozenset(line for find in found for line in find())


# The tests


def test_every_difference_has_a_reason() -> None:
    patterns = [pattern for listed in DIFFERENCES.values() for pattern in listed]
    assert sorted(line for line in differences() if not any(fnmatchcase(line, one) for one in patterns)) == []


@pytest.mark.parametrize("reason", DIFFERENCES)
def test_every_reason_has_a_difference(reason: str) -> None:
    gone = [one for one in DIFFERENCES[reason] if not any(fnmatchcase(line, one) for line in differences())]
    assert gone == [], "they differ no more: take these lines out"


def test_constants_are_pefts() -> None:
    theirs, ours = (importlib.import_module(f"{library}.utils.constants") for library in ("peft", "nbpeft"))
    tables = ("TRANSFORMERS_MODELS_TO_", "_MAPPING")
    for name, value in vars(theirs).items():
        if name.isupper() and not name.startswith(tables[0]):
            assert getattr(ours, name) == value, name
    own = {method.peft_type.replace("_", "") + "_TARGET" for method in methods()}
    for name in sorted({*own, "IA3_FEEDFORWARD"}):
        table = f"{tables[0]}{name}_MODULES{tables[1]}"
        if not hasattr(theirs, table):
            continue
        found = getattr(ours, table)
        for model_type, targets in getattr(theirs, table).items():
            if (name, model_type) == ("LNTUNING_TARGET", "llava"):  # whose embeddings and head are no norms
                continue
            assert set(found[model_type]) == set(targets), (table, model_type)


def test_layer_classes_say_where_pefts_keep_what_adapters_have() -> None:
    """diffusers reads it from the classes, whether a layer of the method is in a model or not."""
    names, compared = ("adapter_layer_names", "other_param_names"), 0
    for path, module in modules():
        place = (
            importlib.import_module(path.replace("peft", "nbpeft", 1)) if path.partition(".")[2] in MODULES else None
        )
        for name, theirs in vars(module).items():
            own = getattr(place, name, None)
            if isinstance(theirs, type) and hasattr(theirs, names[0]) and isinstance(own, type) and not is_missing(own):
                wanted = () if name == "AuxiliaryTrainingWrapper" else tuple(getattr(theirs, one) for one in names)
                assert wanted in ((), tuple(getattr(own, one) for one in names)), (path, name)
                compared += 1
    assert compared > 150
    assert not isinstance(nn.Linear(2, 2), importlib.import_module("nbpeft.tuners.lora.tp_layer").LoraParallelLinear)


def test_constants_that_scripts_import_are_pefts() -> None:
    for path, name in (
        ("config", "MIN_EXPECTED_CONFIG_KEYS"),
        ("tuners.lora.layer", "VARIANT_KWARG_KEYS"),
        ("utils.hotswap", "CONFIG_KEYS_TO_CHECK"),
    ):
        theirs, ours = (importlib.import_module(f"{library}.{path}") for library in ("peft", "nbpeft"))
        assert getattr(ours, name) == getattr(theirs, name), name
