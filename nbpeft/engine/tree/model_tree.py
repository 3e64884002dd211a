"""Queries about a model: its modules, manager, embeddings and quantization.

Paths and names are those of the base model without adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.called_modules import outside
from nbpeft.engine.config.targets import names_part
from nbpeft.engine.contract.base import offloading
from nbpeft.engine.contract.registry import composite_kind, resolve_backend
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import is_packed
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import AdapterError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from nbpeft.engine.runtime.manager import AdapterManager

MANAGER = "_nbpeft_manager"
"""Attribute of an adapted base model, and of each handle on one, with its manager."""

TIED = "tie_word_embeddings"
"""Attribute of a model's config: whether input and output embedding share one weight."""

_WRAPPED_IN = ("_orig_mod", "_fsdp_wrapped_module")
"""Names of the wrapped model inside the wrappers of ``torch.compile`` and FSDP."""

_WRAPPERS = (AdaptedLayer, ModulesToSaveWrapper)

_INNER_WRAPPED_IN = frozenset((*_WRAPPED_IN, "_checkpoint_wrapped_module"))
"""The same for wrappers of modules inside a model: parts of a path that the bare model does not have."""

_QUANTIZED_FLAGS = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized")


# Modules and names


class Site(NamedTuple):
    """A place of a module in the tree."""

    parent: nn.Module
    attribute: str
    path: str
    module: nn.Module
    """The base module, even if the parent has a wrapper around it now; the wrapper may also be outside of the tree."""
    wrapper: AdaptedLayer | ModulesToSaveWrapper | None
    siblings: dict[str, nn.Module | None]
    """A copy of the parent's submodules at the time of the walk."""


def walk(model: nn.Module, *, repeat: bool = False) -> Iterator[Site]:
    """Yields the site of every module below ``model``, in model order.

    Args:
        model: the base model, with or without adapters.
        repeat: visit the children of a module once for each of its places; the module itself is yielded once for each
            place in any case.
    """
    visited: set[int] = {id(model)}
    apart = _wrappers_outside(model)
    stack: list[Iterator[Site]] = [_children(model, "", apart)]
    while stack:
        for site in stack[-1]:
            yield site
            module = site.module
            if repeat or id(module) not in visited:
                visited.add(id(module))
                if module._modules:
                    stack.append(_children(module, site.path + ".", apart))
                    break
        else:
            stack.pop()


def site_at(model: nn.Module, path: str) -> Site:
    """Returns the site that ``walk`` yields for a path.

    Args:
        model: the base model, with or without adapters on it.
        path: path of a module below it.

    Raises:
        KeyError: there is no such module.
    """
    *parents, last = path.split(".")
    parent = model
    for attribute in parents:
        parent = frozen_module(_child(parent, attribute))
    return _site(parent, last, path, dict(parent._modules), _child(parent, last), _wrappers_outside(model))


def _child(parent: nn.Module, attribute: str) -> nn.Module:
    child = parent._modules[attribute]
    if child is None:
        raise KeyError(attribute)
    return child


def _wrappers_outside(model: nn.Module) -> dict[int, AdaptedLayer]:
    """Returns ``id`` of a frozen layer -> its wrapper, of those outside of the tree."""
    wrappers = outside(model).values()
    return {id(wrapper.base_layer): wrapper for wrapper in wrappers if isinstance(wrapper, AdaptedLayer)}


def _site(
    parent: nn.Module,
    attribute: str,
    path: str,
    siblings: dict[str, nn.Module | None],
    child: nn.Module,
    apart: Mapping[int, AdaptedLayer],
) -> Site:
    wrapper = child if isinstance(child, _WRAPPERS) else apart.get(id(child)) if apart else None
    return Site(parent, attribute, path, frozen_module(child), wrapper, siblings)


def _children(parent: nn.Module, prefix: str, apart: Mapping[int, AdaptedLayer]) -> Iterator[Site]:
    siblings = dict(parent._modules)
    for attribute, child in siblings.items():
        if child is not None:
            yield _site(parent, attribute, prefix + attribute, siblings, child, apart)


def frozen_module(module: nn.Module) -> nn.Module:
    """Returns the base module inside an adapter's wrapper, or the module itself."""
    while isinstance(module, (AdaptedLayer, AdaptedBlock)):  # each adapted parameter of a module has a wrapper
        module = module.base_layer
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def reader_of(site: Site) -> nn.Module | None:
    """Returns the parent that reads a layer's weight without calling the layer (``out_proj`` of attention), or None."""
    kind = composite_kind(site.parent)
    return site.parent if kind is not None and site.attribute in kind.layers else None


def bare_modules(model: nn.Module, *, repeat: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) as ``named_modules`` would without adapters, the model itself included; see ``walk``."""
    yield "", frozen_module(model)
    yield from ((site.path, site.module) for site in walk(frozen_module(model), repeat=repeat))


def check_has_data(model: nn.Module) -> None:
    """Refuses a model that was created on the meta device, without values; offloaded weights have values elsewhere.

    Raises:
        AdapterError: a parameter of the base model has no data.
    """
    if any(map(offloading, model.modules())):
        return
    for path, module in bare_modules(base_model_of(model)):
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise AdapterError(f"{path or 'the model'} has no data (meta device): load the model's weights first")


def bare_names(model: nn.Module) -> Callable[[str], str | None]:
    """Returns a function from a key of ``model.state_dict()`` to its key without adapters; None for an adapter's."""
    frozen: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer | AdaptedBlock):
            frozen[name] = "base_layer"
        elif isinstance(module, ModulesToSaveWrapper):
            frozen[name] = "original_module"

    def bare(key: str) -> str | None:
        parts = iter(key.split("."))
        path: list[str] = []
        kept: list[str] = []
        for part in parts:
            path.append(part)
            kept.append(part)
            while (inner := frozen.get(".".join(path))) is not None:
                if next(parts) != inner:
                    return None
                path.append(inner)
        return ".".join(kept)

    return bare


def without_wrappers(path: str) -> str:
    """Returns a path without the parts that compiled, FSDP and checkpointing wrappers of inner modules add."""
    if "._" not in path and not path.startswith("_"):
        return path
    return ".".join(part for part in path.split(".") if part not in _INNER_WRAPPED_IN)


# The model behind wrappers, and its manager


def unwrapped(model: Any) -> Any:
    """Returns the model inside compiled, DataParallel, DDP, FSDP and DeepSpeed wrappers, or the model itself."""
    while (inner := _wrapped_by(model)) is not None:
        model = inner
    return model


def _wrapped_by(model: Any) -> Any:
    children = getattr(model, "_modules", {})
    for name in _WRAPPED_IN:
        if name in children:
            return children[name]
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if parallel or any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__):
        return model.module
    return None


def manager_of(model: Any) -> AdapterManager | None:
    """Returns the manager of a model, or None if it never had adapters.

    Args:
        model: a base model, a handle such as a PeftModel, or a compiled or parallel wrapper of either. A handle
            keeps its manager after the adapters were unloaded; that manager is no longer ``alive``.
    """
    return getattr(unwrapped(model), "__dict__", {}).get(MANAGER)


def base_model_of(model: Any) -> nn.Module:
    """Returns the base model behind a handle and compiled or parallel wrappers, or the model itself."""
    manager = manager_of(model)
    return unwrapped(model) if manager is None else manager.model


# Embeddings and heads


def embedding_of(model: nn.Module, *, output: bool = False) -> nn.Module | None:
    """Returns a model's input embedding or its output head; None if its getter returns none."""
    try:
        found = getattr(model, "get_output_embeddings" if output else "get_input_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def says_untied(model: nn.Module) -> bool:
    """Returns whether a model's config declares its embeddings as untied, whether or not they share a weight."""
    return getattr(getattr(model, "config", None), TIED, None) is False


def sharing_embedding(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Returns the modules that share the weight of the input embedding.

    Args:
        model: a base model.
        modules: path and module of everything in the model; of a module in several places, the first path is used.

    Returns:
        Path -> module, the embedding first; empty if no other module shares the weight, or the config declares the
        embeddings as untied.
    """
    embedding = embedding_of(model)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or says_untied(model):
        return {}
    own = frozen_module(embedding) if embedding is not None else None
    places: dict[int, tuple[str, nn.Module]] = {}
    for path, module in modules:
        if module._parameters.get("weight") is weight:
            places.setdefault(id(module), (path, module))
    sharing = sorted(places.values(), key=lambda place: place[1] is not own)
    return dict(sharing) if len(sharing) > 1 else {}


def _head(model: nn.Module) -> nn.Module | None:
    """Returns the output embedding, or the last linear layer outside the backbone of a task model."""
    head = embedding_of(model, output=True)
    if head is not None:
        return frozen_module(head)
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", None)
    if not isinstance(backbone, nn.Module) or backbone is model:
        return None
    outside = [child for child in model.children() if child is not backbone]
    linear = [module for child in outside for _, module in bare_modules(child) if is_plain_linear(module)]
    return linear[-1] if linear else None


# Quantization


def is_quantized_layer(module: nn.Module) -> bool:
    """Returns whether a module's weight is quantized: its backend is not the dense one."""
    if "weight" not in module._parameters and module._modules:
        return False
    backend = resolve_backend(module)
    return backend is not None and backend.name != "dense"


def is_quantized(model: nn.Module) -> bool:
    """Returns whether a model has quantized weights. A model that was read from a GGUF file is dense."""
    method = quantization_method(model)
    if method == "gguf":
        return False
    flagged = bool(method) or any(bool(getattr(model, flag, False)) for flag in _QUANTIZED_FLAGS)
    return flagged or any(is_quantized_layer(module) for module in model.modules())


def quantization_method(model: nn.Module) -> str:
    """Returns transformers' name of a model's quantization method, or the empty string."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method or ""))


def is_plain_linear(module: nn.Module) -> bool:
    """Returns whether a module is exactly ``nn.Linear`` or GPT-2's ``Conv1D``; subclasses may compute differently."""
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )


_OUT = ("conv1d", "out_proj")
_OUT_AND_STEP = (*_OUT, "dt_proj")
_READ_DIRECTLY = {
    "bamba": _OUT,
    "falcon_h1": _OUT,
    "falcon_mamba": _OUT_AND_STEP,
    "granitemoehybrid": _OUT,
    "jamba": ("conv1d", "dt_proj"),
    "mamba": _OUT_AND_STEP,
    "mamba2": _OUT,
    "nemotron_h": _OUT,
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "zamba2": _OUT,
}
"""Model type -> names of layers whose weight is read directly."""


def read_directly(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of layers whose weight the model reads without calling them, as Mamba's fused kernels do.

    An adapter there would have no effect, and packed 4-bit codes would be taken for the weight.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return _READ_DIRECTLY.get(kind, ()) if isinstance(kind, str) else ()


def linear_layers_to_quantize(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Returns path -> linear layer that quantizing the model replaces. Works with meta tensors too.

    Not included are the head, layers with a shared weight, layers that the model's class keeps in float32 (T5 casts
    its input to the dtype of such a weight), and those that are not called (see ``read_directly``).

    Args:
        model: a model that is not quantized, with or without adapters.
        skip: further layers to leave out, by path or by a whole part of it.

    Raises:
        ConfigError: ``skip`` names no module.
    """
    if not isinstance(skip, Collection) or not all(isinstance(name, str) and name for name in skip):
        raise ConfigError(f"skip_modules is {skip!r:.60}; expected names of modules", field="skip_modules")
    skipped = [skip] if isinstance(skip, str) else list(skip)
    modules: dict[nn.Module, str] = {}
    for path, module in bare_modules(model):
        modules.setdefault(module, path)
    _check_names(skipped, modules)
    kept = _not_quantized(model, skipped)
    users = Counter(id(module._parameters.get("weight")) for module in modules)
    head = _head(model)
    return {
        path: module
        for module, path in modules.items()
        if path
        and is_plain_linear(module)
        and module is not head
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.is_floating_point()
        and users[id(weight)] == 1
        and not any(names_part(name, path) for name in kept)
    }


def experts_to_quantize(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, ParameterView]:
    """Returns path -> expert parameter that quantizing the model replaces, as a view with a ``weight``.

    Not included are parameters that several modules share, and those that the model's class keeps in float32. Works
    with meta tensors too.

    Args:
        model: a model with or without adapters.
        skip: modules or parameters to leave out, by path or by a whole part of it.
    """
    kept = _not_quantized(model, [skip] if isinstance(skip, str) else skip)
    found = [(path, module, name) for path, module in bare_modules(model) for name in expert_parameters(module)]
    users = Counter(id(module._parameters[name]) for _, module, name in found)
    return {
        f"{path}.{name}": ParameterView(module, name)
        for path, module, name in found
        if users[id(weight := module._parameters[name])] == 1
        and not isinstance(weight, QuantizedMatrices)
        and not any(names_part(part, f"{path}.{name}") for part in kept)
    }


def expert_parameters(module: nn.Module) -> list[str]:
    """Returns the names of a module's direct parameters with one matrix for each of its ``num_experts``."""
    count = getattr(module, "num_experts", None)
    if type(count) is not int:
        return []
    held = ((name, weight) for name, weight in module._parameters.items() if weight is not None)
    return [name for name, weight in held if weight.ndim == 3 and len(weight) == count and weight.is_floating_point()]


def _not_quantized(model: nn.Module, skip: Sequence[str]) -> tuple[str, ...]:
    """Names of modules and parameters that are not quantized, as paths or whole segments of paths."""
    return (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()), *read_directly(model))


def _check_names(names: Sequence[str], modules: Mapping[nn.Module, str]) -> None:
    for name in names:
        of_parameters = (f"{path}.{own}" for module, path in modules.items() for own in module._parameters)
        if not any(names_part(name, path) for path in (*modules.values(), *of_parameters)):
            known = {path.rpartition(".")[2] for module, path in modules.items() if path and is_plain_linear(module)}
            raise ConfigError(
                f"skip_modules names {name!r}, which is not a module of the model.{did_you_mean(name, known)}",
                field="skip_modules",
            )


def main_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the largest floating-point parameter that is not 4-bit codes; float32 if there is none."""
    floats = (
        parameter for parameter in model.parameters() if parameter.is_floating_point() and not is_packed(parameter)
    )
    largest = max(floats, key=lambda parameter: parameter.numel(), default=None)
    return torch.float32 if largest is None else largest.dtype


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of (trainable, all) parameters.

    A bitsandbytes 4-bit weight stores two values in each byte and counts with its unpacked size; a parameter that
    DeepSpeed has sharded away counts with its full size.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0:
            count = getattr(parameter, "ds_numel", 0)
        if is_packed(parameter):
            count *= 2 * parameter.element_size()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total
