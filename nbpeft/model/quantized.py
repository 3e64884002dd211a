"""Quantized base models: loaded through bitsandbytes, or quantized where they lie in memory.

    load_quantized(source, …)        a folder, hub id or GGUF file -> a model with quantized layers
    quantize_model(model, …)         the same for a model that is loaded already
    stored_parts(model)              what each part takes, and what it would take in bfloat16

Works on CPU and on accelerators. References: QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(),
https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import nn

from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.registry import resolve_backend
from nbpeft.engine.targets import names_part
from nbpeft.engine.tokens import embedding_of
from nbpeft.errors import CheckpointNotFoundError, ConfigError, did_you_mean, in_one_line
from nbpeft.logs import collapsed
from nbpeft.memory.fake_quantized import is_kept
from nbpeft.model.gguf import forget_gguf, obedient_progress
from nbpeft.model.quantization import dtype_of, quantization, usual_device, usual_dtype
from nbpeft.model.stored import is_quantized_layer
from nbpeft.names import DTYPES


def load_quantized(
    source: str | os.PathLike[str],
    *,
    bits: int = 4,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | str | None = None,
    quant_storage: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    device_map: Any = None,
    model_class: Any = None,
    **from_pretrained: Any,
) -> Any:
    """Loads a model with its linear layers quantized.

    Weights of a folder or the hub are quantized one by one as they are read. A GGUF file is read
    whole, in the compute dtype, and then quantized layer by layer. Embeddings, norms and the head
    stay as they are.

    Args:
        source: a folder, a hub id, or the path of a ``.gguf`` file.
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too.
        compute_dtype: what 4-bit layers compute in, and by default the dtype of everything else;
            see ``quantization``.
        quant_storage: dtype that holds the 4-bit codes.
        gguf_file: name of a GGUF file in ``source``.
        device_map: as in transformers; by default the accelerator if there is one.
        model_class: an automatic or model class of transformers, or its name;
            ``AutoModelForCausalLM`` if left out.
        **from_pretrained: what else the class's ``from_pretrained`` takes (``revision``, ``dtype``, …).

    Raises:
        ConfigError: a setting is impossible.
        CheckpointNotFoundError: there is no model at ``source``.
    """
    settings = quantization(
        bits=bits,
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        quant_storage=quant_storage,
    )
    if "quantization_config" in from_pretrained:
        raise ConfigError("quantization_config is made from bits, quant_type, …; leave it out")
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a model is loaded from a folder, a hub id or a GGUF file, not from {source!r:.60}")
    place, file = place_of(source, gguf_file)
    if not os.path.exists(place) and (os.path.isabs(place) or place.startswith(".") or place.count("/") > 1):
        raise CheckpointNotFoundError(f"no model could be loaded from {place!r}: there is no such folder", source=place)
    chosen = model_class or "AutoModelForCausalLM"
    loader = getattr(importlib.import_module("transformers"), chosen, None) if isinstance(chosen, str) else chosen
    if loader is None:
        raise ConfigError(f"transformers has no class {chosen!r}", field="model_class")
    if not hasattr(loader, "from_pretrained"):
        raise ConfigError(f"model_class is {chosen!r:.60}; expected a class of transformers, or its name")
    options: dict[str, Any] = {"dtype": compute_dtype or usual_dtype(), **from_pretrained}
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = dtype_of(options["dtype"], "dtype", DTYPES)
    if device_map is not None:
        options["device_map"] = device_map
    with collapsed():
        _library()
        with collapsed():  # takes in the handler that transformers made meanwhile
            if file is None:
                model = _from_pretrained(loader, place, {**options, "quantization_config": settings})
                _prepare(model)
                return model
            with obedient_progress():
                model = _from_pretrained(loader, place, {**options, "gguf_file": file})
            forget_gguf(model)
            target = None if device_map is not None else usual_device()
            return _quantize(model, settings, device=target, own=True)


def quantize_model(
    model: nn.Module,
    *,
    bits: int = 4,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | str | None = None,
    quant_storage: torch.dtype | str | None = None,
    skip_modules: Sequence[str] = (),
) -> nn.Module:
    """Quantizes the linear layers of a model where it lies, and returns it.

    Biases, norms, embeddings, the head and layers that share their weight stay as they are. All
    layers or none: until the last one is quantized the old weights are kept.

    Args:
        model: a model with floating weights and without adapters.
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too.
        compute_dtype: what 4-bit layers compute in; by default the model's dtype.
        quant_storage: dtype that holds the 4-bit codes.
        skip_modules: further layers that stay, by path or by a whole part of it.

    Raises:
        ConfigError: a setting is impossible, the model has adapters, is quantized already, or has
            no weights or nothing to quantize, or ``skip_modules`` names nothing in it.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model to quantize, not {model!r:.60}; load_quantized reads one from a folder")
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    settings = quantization(
        bits=bits,
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=compute_dtype if compute_dtype is not None or first is None else first.dtype,
        quant_storage=quant_storage,
    )
    check_quantizable(model)
    with collapsed():
        return _quantize(model, settings, skip=skip_modules, own=False)


def check_quantizable(model: nn.Module) -> None:
    """Refuses a model that ``quantize_model`` cannot take.

    Raises:
        ConfigError: it has adapters, or is quantized already.
    """
    manager = AdapterManager.of(model) or model.__dict__.get("manager")
    if isinstance(manager, AdapterManager) and manager.alive and manager.names:
        raise ConfigError("the model carries adapters; quantize it first and add them then")
    if any(is_quantized_layer(module) for module in model.modules()):
        raise ConfigError("the model is quantized already")


def layers_to_quantize(model: nn.Module, skip: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Paths of the layers to quantize, and of linear layers that stay. Works on meta tensors, too.

    What the model's class keeps in float32 stays: T5 casts its input to the dtype of such a weight.

    Args:
        model: a model that is not quantized.
        skip: further layers that stay, by path or by a whole part of it.

    Raises:
        ConfigError: there is nothing to quantize, or ``skip`` names no module.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    head = _head(model)
    chosen, stay = [], []
    if not isinstance(skip, Collection) or not all(isinstance(name, str) and name for name in skip):
        raise ConfigError(f"skip_modules is {skip!r:.60}; expected names of modules", field="skip_modules")
    unseen = dict.fromkeys([skip] if isinstance(skip, str) else skip)
    names = tuple(unseen)
    for path, module in model.named_modules():
        naming = [name for name in names if names_part(name, path)]
        for name in naming:
            unseen.pop(name, None)
        if not path or not _is_linear(module):
            continue
        stays = naming or module is head or is_kept(model, path)
        if stays or uses[id(module.weight)] > 1 or not module.weight.is_floating_point():
            stay.append(path)
        else:
            chosen.append(path)
    if unseen:
        name, known = next(iter(unseen)), {path.rpartition(".")[2] for path in (*chosen, *stay)}
        raise ConfigError(
            f"skip_modules names {name!r}, which is no module of the model.{did_you_mean(str(name), known)}",
            field="skip_modules",
        )
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no linear layer to quantize")
    return chosen, stay


def place_of(source: str | os.PathLike[str], gguf_file: str | None) -> tuple[str, str | None]:
    """Folder or hub id, and the GGUF file in it."""
    text = os.path.expanduser(os.fspath(source))
    if gguf_file is None and text.endswith(".gguf"):
        return os.path.dirname(text) or ".", os.path.basename(text)
    return text, gguf_file


def _library() -> Any:
    """bitsandbytes, imported."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(f"quantizing needs bitsandbytes ({error}): pip install bitsandbytes") from None


def _from_pretrained(loader: Any, place: str, options: dict[str, Any]) -> Any:
    failure = ""
    try:
        return loader.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        failure = in_one_line(error)[:300]
    except (TypeError, AssertionError, RuntimeError) as error:  # the latter two: of a device that is not here
        reason = in_one_line(error)[:300]
        if "memory" in reason:
            raise
        raise ConfigError(f"{place} cannot be loaded with these options: {reason}") from None
    raise CheckpointNotFoundError(f"no model could be loaded from {place!r}: {failure}", source=place)


@torch.no_grad()
def _quantize(
    model: nn.Module, settings: Any, *, own: bool, skip: Sequence[str] = (), device: torch.device | None = None
) -> nn.Module:
    """Replaces layers; with ``own`` one after the other, which frees each old weight at once."""
    paths, stay = layers_to_quantize(model, skip)
    for path in paths:
        if model.get_submodule(path).weight.is_meta:
            raise ConfigError(f"{path} has no weights (meta device): load the model before quantizing it")
    library = _library()
    made: list[tuple[str, nn.Module]] = []
    for path in paths:
        new = _quantized_layer(model.get_submodule(path), settings, library, device)
        if own:
            model.set_submodule(path, new)
        else:
            made.append((path, new))
    for path, new in made:
        model.set_submodule(path, new)
    if device is not None:
        model.to(device)
    _tell_transformers(model, settings, stay)
    _prepare(model)
    return model


def _head(model: Any) -> nn.Module | None:
    """The output embedding, or the last linear layer outside the backbone of a task model."""
    head = embedding_of(model, output=True)
    if head is not None:
        return head
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(backbone, nn.Module) or backbone is model:
        return None
    outside = [child for child in model.children() if child is not backbone]
    linear = [module for child in outside for module in child.modules() if _is_linear(module)]
    return linear[-1] if linear else None


def _is_linear(module: nn.Module) -> bool:
    """A plain linear layer or GPT-2's transposed one; subclasses may compute otherwise."""
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )


def _quantized_layer(old: Any, settings: Any, library: Any, device: torch.device | None) -> nn.Module:
    """A quantized layer with the weight and the bias of ``old``."""
    weight = old.weight.detach()
    transposed = type(old) is not nn.Linear
    weight = weight.t().contiguous() if transposed else weight
    target = weight.device if device is None else device
    rows, columns = weight.shape
    new: Any
    with torch.device("meta"):
        if settings.load_in_8bit:
            new = library.nn.Linear8bitLt(
                columns,
                rows,
                old.bias is not None,
                has_fp16_weights=False,
                threshold=settings.llm_int8_threshold,
            )
        else:
            new = library.nn.Linear4bit(
                columns,
                rows,
                old.bias is not None,
                settings.bnb_4bit_compute_dtype,
                compress_statistics=settings.bnb_4bit_use_double_quant,
                quant_type=settings.bnb_4bit_quant_type,
                quant_storage=settings.bnb_4bit_quant_storage,
            )
    if settings.load_in_8bit:
        new.weight = library.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False).to(target)
    else:
        kept = {name: value for name, value in new.weight.__dict__.items() if name != "module"}
        new.weight = library.nn.Params4bit(weight, requires_grad=False, module=new, **kept).to(target)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().to(target), requires_grad=False)
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(new, hooks).update(getattr(old, hooks))
    new.source_cls = type(old)
    new.train(old.training)
    return cast(nn.Module, new)


def _prepare(model: nn.Module) -> None:
    """Lets the backend see to every quantized layer, as it does when adapters are added."""
    for module in model.modules():
        if is_quantized_layer(module):
            backend: Any = resolve_backend(module)
            backend.prepare(module)


def _tell_transformers(model: Any, settings: Any, stay: Sequence[str]) -> None:
    """Sets what transformers sets on a model that it quantized while loading."""
    setattr(model, "is_loaded_in_8bit" if settings.load_in_8bit else "is_loaded_in_4bit", True)
    if not hasattr(type(model), "from_pretrained"):
        return
    settings.llm_int8_skip_modules = list(stay) or None
    quantizers = importlib.import_module("transformers.quantizers")
    model.is_quantized = True
    model.quantization_method = settings.quant_method
    model.config.quantization_config = settings
    model.hf_quantizer = quantizers.AutoHfQuantizer.from_config(settings, pre_quantized=True)
    for module in model.modules():
        if hasattr(type(module), "from_pretrained") and hasattr(module, "config"):
            module.config._is_quantized = True
