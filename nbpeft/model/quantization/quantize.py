"""Quantized base models: linear layers and experts, loaded or converted in memory.

    load_quantized(source, …)        loads a folder, hub id or GGUF file as a model with quantized layers
    quantize_model(model, …)         quantizes the layers of a loaded model

Works on CPU and on accelerators. References: QLoRA, https://arxiv.org/abs/2305.14314; LLM.int8(),
https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from nbpeft._util.hub_access import hub_options
from nbpeft._util.logs import collapsed
from nbpeft._util.optional import needs
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.registry import resolve_backend
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.model_tree import (
    experts_to_quantize,
    is_plain_linear,
    is_quantized,
    is_quantized_layer,
    linear_layers_to_quantize,
    manager_of,
)
from nbpeft.errors import CheckpointNotFoundError, ConfigError, did_you_mean, in_one_line
from nbpeft.memory.devices import has_bfloat16
from nbpeft.memory.fake_quantized import quantization_of
from nbpeft.memory.processor import has_instructions
from nbpeft.model.quantization.quantized_experts import (
    nothing_to_quantize,
    quantize_experts,
    quantized_parameter,
    quantizing_while_reading,
    save_dequantized,
)
from nbpeft.names import DTYPES, SHORT_DTYPES

_STORAGES = ("uint8", *DTYPES)
_ALIASES = {**SHORT_DTYPES, "half": "float16", "float": "float32"}


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
    """Loads a model and quantizes its linear layers, and the experts of a mixture.

    Weights of a folder or the hub are quantized one by one while they are read. A GGUF file is first read completely
    and then quantized layer by layer. Embeddings, norms and the head are not quantized. Experts compute in the dtype of
    their input.

    On CPUs with AVX512-BF16 bitsandbytes would repack 4-bit layers for inference, which then compute in bfloat16 with
    rounded quantization constants. Models quantized here are not repacked, so that their outputs are the same in
    training, in inference and on every CPU. On those CPUs this makes generation slower: by a factor of 2 for a model
    of 135M parameters, and by more for larger ones.

    Args:
        source: a folder, a hub id, or the path of a ``.gguf`` file.
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too.
        compute_dtype: dtype in which 4-bit layers compute; by default that of the model's other weights.
        quant_storage: dtype of the tensors that store 4-bit codes.
        gguf_file: name of a GGUF file in ``source``.
        device_map: as in transformers; by default the accelerator if there is one.
        model_class: an auto class or model class of transformers, or its name; by default ``AutoModelForCausalLM``.
        **from_pretrained: further arguments of the class's ``from_pretrained`` (``revision``, …). ``dtype`` is by
            default ``compute_dtype``, or else bfloat16 if the device supports it natively, float16 on other
            accelerators and float32 on other CPUs.

    Returns:
        The model.

    Raises:
        ConfigError: an argument is invalid.
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
    loader = class_of(model_class or "AutoModelForCausalLM")
    older = from_pretrained.pop("torch_dtype", None)  # former name of dtype in transformers
    dtype = from_pretrained.pop("dtype", None) or older or compute_dtype or usual_dtype()
    options: dict[str, Any] = {"dtype": dtype, **from_pretrained}
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = dtype_of(options["dtype"], "dtype", DTYPES)
    if device_map is not None:
        options["device_map"] = device_map
    with collapsed():
        _library()
        with collapsed():  # also covers the handler that transformers has added meanwhile
            if file is None:
                with quantizing_while_reading(settings):
                    model = _from_pretrained(loader, place, {**options, "quantization_config": settings})
                quantize_experts(model)  # experts of a checkpoint that is already quantized
                if compute_dtype is None and not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", True):
                    _compute_as_the_rest(model, model.config.quantization_config)
                _prepare(model)
                return model
            with respect_progress_bar_setting():
                model = _from_pretrained(loader, place, {**options, "gguf_file": file})
            clear_gguf_flags(model)
            if compute_dtype is None:
                _compute_as_the_rest(model, settings)
            target = None if device_map is not None else usual_device()
            return _quantize(model, settings, device=target, own=True)


def class_of(chosen: Any) -> Any:
    """The class of a model, which is given itself or by its name in transformers."""
    loader = getattr(importlib.import_module("transformers"), chosen, None) if isinstance(chosen, str) else chosen
    if loader is None:
        raise ConfigError(f"transformers has no class {chosen!r}", field="model_class")
    if not hasattr(loader, "from_pretrained"):
        raise ConfigError(f"model_class is {chosen!r:.60}; expected a class of transformers, or its name")
    return loader


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
    """Quantizes the linear layers of a model, and the experts of a mixture, in place, and returns it.

    Biases, norms, embeddings, the head and layers that share its weight are not quantized. Either all layers are
    replaced or none: the old weights stay in memory until the last layer is quantized. 4-bit layers are never
    repacked; see ``load_quantized``.

    Args:
        model: a model with floating-point weights and without adapters.
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too.
        compute_dtype: dtype in which 4-bit layers compute; by default that of the model's other weights.
        quant_storage: dtype of the tensors that store 4-bit codes.
        skip_modules: further layers not to quantize, by path or by a whole component of it (``"experts"``).

    Raises:
        ConfigError: an argument is invalid, the model has adapters, is already quantized, or has no weights or nothing
            to quantize, or ``skip_modules`` has a name that is not in it.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model to quantize, not {model!r:.60}; load_quantized loads one from a folder")
    settings = quantization(
        bits=bits,
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        quant_storage=quant_storage,
    )
    check_quantizable(model)
    if compute_dtype is None:
        _compute_as_the_rest(model, settings)
    with collapsed():
        return _quantize(model, settings, skip=skip_modules, own=False)


def check_quantizable(model: nn.Module) -> None:
    """Checks that ``quantize_model`` supports a model.

    Raises:
        ConfigError: the model has adapters, or is already quantized.
    """
    manager = manager_of(model)
    if manager is not None and manager.alive and manager.names:
        raise ConfigError("the model has adapters; quantize the base model before adding them")
    if is_quantized(model):
        raise ConfigError("the model is already quantized")


def layers_to_quantize(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Returns path -> layer that ``quantize_model`` replaces; experts are views whose weight is the parameter.

    See ``linear_layers_to_quantize`` and ``experts_to_quantize``.

    Args:
        model: the model.
        skip: layers not to quantize, by path or by a whole component of it.

    Raises:
        ConfigError: there is nothing to quantize, or ``skip`` has a name of no module.
    """
    found = linear_layers_to_quantize(model, skip)
    if not found:
        raise nothing_to_quantize(model)
    return found | experts_to_quantize(model, skip)


def place_of(source: str | os.PathLike[str], gguf_file: str | None) -> tuple[str, str | None]:
    """Splits a source into a folder or hub id, and the name of a GGUF file in it.

    Args:
        source: a folder, a hub id, or the path of a ``.gguf`` file.
        gguf_file: name of a GGUF file in ``source``, or None.
    """
    text = os.path.expanduser(os.fspath(source))
    if gguf_file is None and text.endswith(".gguf"):
        return os.path.dirname(text) or ".", os.path.basename(text)
    return text, gguf_file


def _library() -> Any:
    """Returns bitsandbytes, imported."""
    with needs("bitsandbytes", "Quantizing"):
        import bitsandbytes
    return bitsandbytes


def _from_pretrained(loader: Any, place: str, options: dict[str, Any]) -> Any:
    failure, offline = "", hub_options(place, options)
    if offline and str(loader.__module__).startswith("transformers."):
        offline["adapter_kwargs"] = dict(offline)  # transformers looks for an adapter in the same place
    options = options | offline
    try:
        return loader.from_pretrained(place, **options)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        failure = in_one_line(error)[:300]
    except (TypeError, AssertionError, RuntimeError) as error:  # the latter two for a device that does not exist
        reason = in_one_line(error)[:300]
        if "memory" in reason:
            raise
        raise ConfigError(f"{place} cannot be loaded with these options: {reason}") from None
    raise CheckpointNotFoundError(f"no model could be loaded from {place!r}: {failure}", source=place)


@torch.no_grad()
def _quantize(
    model: nn.Module, settings: Any, *, own: bool, skip: Sequence[str] = (), device: torch.device | None = None
) -> nn.Module:
    """Replaces the layers; with ``own`` one by one, which frees each old weight immediately."""
    layers = layers_to_quantize(model, skip)
    stay = [path for path, module in model.named_modules() if path not in layers and is_plain_linear(module)]
    empty = next((path for path, layer in layers.items() if cast(Tensor, layer.weight).is_meta), None)
    if empty is not None:
        raise ConfigError(f"{empty} has no weights (meta device): load the model before quantizing it")
    library = _library()
    replacements: list[tuple[str, nn.Module, nn.Module | nn.Parameter]] = []
    for path in list(layers):
        old = layers.pop(path)
        replacements.append((path, old, _quantized(old, settings, library, device)))
        if own:
            _replace(model, *replacements.pop())
    for each in replacements:
        _replace(model, *each)
    if device is not None:
        model.to(device)
    _set_transformers_flags(model, settings, stay)
    save_dequantized(model)
    _prepare(model)
    return model


def _replace(model: nn.Module, path: str, old: nn.Module, new: nn.Module | nn.Parameter) -> None:
    """Replaces a layer, or the parameter of a view, by its quantized version."""
    if isinstance(old, ParameterView):
        old.owner._parameters[old.parameter_name] = cast(nn.Parameter, new)
    else:
        model.set_submodule(path, cast(nn.Module, new))


def _quantized(old: Any, settings: Any, library: Any, device: torch.device | None) -> nn.Module | nn.Parameter:
    """Returns a quantized layer, or the quantized parameter of experts."""
    if isinstance(old, ParameterView):
        return quantized_parameter(old.weight, settings, device)
    return _quantized_layer(old, settings, library, device)


def _quantized_layer(old: Any, settings: Any, library: Any, device: torch.device | None) -> nn.Module:
    """Returns a quantized layer with the weight and the bias of ``old``."""
    weight = old.weight.detach()
    transposed = type(old) is not nn.Linear
    weight = weight.t().contiguous() if transposed else weight
    target = weight.device if device is None else device
    rows, columns = weight.shape
    new: Any
    with torch.device("meta"):
        if settings.load_in_8bit:
            new = library.nn.Linear8bitLt(
                columns, rows, old.bias is not None, has_fp16_weights=False, threshold=settings.llm_int8_threshold
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
    # bitsandbytes quantizes in ``.to()``, and 8-bit parameters only if they are on the CPU before.
    if settings.load_in_8bit:
        new.weight = library.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False).to(target)
    else:
        attributes = {name: value for name, value in new.weight.__dict__.items() if name != "module"}
        new.weight = library.nn.Params4bit(weight, requires_grad=False, module=new, **attributes).to(target)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().to(target), requires_grad=False)
    for kind in ("forward", "forward_pre"):
        for hooks in (f"_{kind}_hooks", f"_{kind}_hooks_with_kwargs"):
            getattr(new, hooks).update(getattr(old, hooks))
    new.source_cls = type(old)
    new.train(old.training)
    return cast(nn.Module, new)


def _compute_as_the_rest(model: nn.Module, settings: Any) -> None:
    """Sets the compute dtype of 4-bit layers, and of the settings, to the dtype of the model's other weights."""
    quantized = [module for module in model.modules() if is_quantized_layer(module)]
    packed = {id(parameter) for module in quantized for parameter in module.parameters()}
    others = (
        parameter for parameter in model.parameters() if parameter.is_floating_point() and id(parameter) not in packed
    )
    dtype = next((parameter.dtype for parameter in others), None)
    if dtype is None or settings.load_in_8bit:
        return
    settings.bnb_4bit_compute_dtype = dtype_of(dtype, "compute_dtype", DTYPES)
    for module in quantized:
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]


def _prepare(model: nn.Module) -> None:
    """Prepares every quantized layer with its backend, as adding an adapter does."""
    for module in model.modules():
        if is_quantized_layer(module):
            backend: Any = resolve_backend(module)
            backend.prepare(module)


def _set_transformers_flags(model: Any, settings: Any, stay: Sequence[str]) -> None:
    """Sets the flags that transformers sets on a model that it quantized while loading."""
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


# Settings


def quantization(
    *,
    bits: int = 4,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | str | None = None,
    quant_storage: torch.dtype | str | None = None,
    skip_modules: Sequence[str] | None = None,
) -> Any:
    """Returns settings as a ``transformers.BitsAndBytesConfig``.

    Args:
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too, which saves 0.4 bits per weight.
        compute_dtype: dtype in which 4-bit layers compute; by default bfloat16 if the device supports it natively,
            float16 on other accelerators and float32 on other CPUs.
        quant_storage: dtype of the tensors that store 4-bit codes. A training with ``fsdp=True`` changes it in its
            processes to a dtype that FSDP2 can shard.
        skip_modules: names of layers not to quantize, in addition to the head.

    Raises:
        ConfigError: a value is invalid.
    """
    transformers = importlib.import_module("transformers")
    quantization_of(bits, quant_type)
    if not isinstance(double_quant, bool):
        raise ConfigError(f"double_quant is {double_quant!r}; expected True or False", field="double_quant")
    skipped = None if skip_modules is None else list(skip_modules)
    if bits == 8:
        if quant_storage is not None:
            raise ConfigError("quant_storage is for 4 bits; leave it out with bits=8", field="quant_storage")
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    storage = torch.uint8 if quant_storage is None else dtype_of(quant_storage, "quant_storage", _STORAGES)
    computes = usual_dtype() if compute_dtype is None else dtype_of(compute_dtype, "compute_dtype", DTYPES)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=computes,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )


def usual_device() -> torch.device:
    """Returns the accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def usual_dtype() -> torch.dtype:
    """Returns bfloat16 if the device supports it natively, else float16 on an accelerator and float32 on a CPU."""
    if torch.cuda.is_available():
        return torch.bfloat16 if has_bfloat16("cuda") else torch.float16
    if torch.accelerator.is_available():
        return torch.bfloat16
    return torch.bfloat16 if has_instructions(torch.bfloat16) else torch.float32


def dtype_of(value: torch.dtype | str, field: str, allowed: Sequence[str]) -> torch.dtype:
    """Returns a dtype that is given as a dtype or by name.

    Args:
        value: the dtype or its name.
        field: name of the argument, for the message.
        allowed: names of the allowed dtypes.

    Raises:
        ConfigError: the dtype is not allowed.
    """
    name = str(value).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in allowed:
        near = did_you_mean(name, allowed)
        raise ConfigError(f"{field} is {value!r}; expected one of {', '.join(allowed)}.{near}", field=field)
    found: torch.dtype = getattr(torch, name)
    return found


# GGUF files


@contextmanager
def respect_progress_bar_setting() -> Iterator[None]:
    """Context manager: makes transformers' progress bar for GGUF files respect ``disable_progress_bar``.

    transformers creates this bar with tqdm directly. In a notebook it would be a widget, which a saved notebook cannot
    show.
    """
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    plain = getattr(reader, "tqdm", None)
    if plain is None:
        yield
        return
    reader.tqdm = importlib.import_module("transformers.utils.logging").tqdm
    try:
        yield
    finally:
        reader.tqdm = plain


def clear_gguf_flags(model: nn.Module, change: Transaction | None = None) -> None:
    """Clears transformers' quantization flags on a model read from a GGUF file.

    transformers dequantizes such a file while reading, so that the weights are ordinary floating-point tensors. But it
    leaves the flags set, and because of them it refuses to save or train the model.

    Args:
        model: the base model.
        change: transaction that records the flags, so that the change can be undone.
    """
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if method is None and isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if str(getattr(method, "value", method)).lower() != "gguf":
        return
    if change is not None:
        change.keep_attributes(config, "quantization_config")
        change.keep_attributes(model, "hf_quantizer", "is_quantized", "quantization_method")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[union-attr]
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if name in model.__dict__:
            model.__dict__[name] = value
