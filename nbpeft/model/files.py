"""Loading and saving adapters of a manager: between the engine and the checkpoint package."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.holder import check_name
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.model_tree import embedding_of, walk
from nbpeft.engine.plan import InjectionPlan
from nbpeft.engine.registry import method_of
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, ConfigError, few, shortened

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")
_ROOT_ADAPTER = "default"


class LoadResult(NamedTuple):
    """What did not match while loading."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class Loading:
    """How to load one adapter.

    Attributes:
        name: name to give it.
        trainable: whether it trains while active.
        config: replaces the saved config.
        half: keep it in a half-precision base's dtype.
        key_mapping: regular expressions that rename keys of the file.
        options: PEFT's further keywords: hub options, ``torch_device``, ``ignore_mismatched_sizes``.
    """

    name: str
    trainable: bool = False
    config: AdapterConfig | None = None
    half: bool = False
    key_mapping: Mapping[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # a token may be among them


def with_base_name(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """A copy of a config that names its base model."""
    name = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    given = config.base_model_name_or_path
    if name and given not in (None, name):
        warnings.warn(f"base_model_name_or_path of the config was renamed from {given!r} to {name!r}", stacklevel=5)
    return config.copy(base_model_name_or_path=name or given)


def load(
    manager: AdapterManager, source: str | os.PathLike[str], loading: Loading, *, replace: bool = False
) -> LoadResult:
    """Puts a saved adapter on a manager's model; all or nothing. See ``read``."""
    return read(manager, source, loading, replace=replace)()


def read(
    manager: AdapterManager, source: str | os.PathLike[str], loading: Loading, *, replace: bool = False
) -> Callable[[], LoadResult]:
    """Reads a saved adapter and checks that it fits; changes nothing yet.

    Args:
        manager: of the base model.
        source: a folder or a hub id.
        loading: how.
        replace: let it take the place of one with the same name.

    Returns:
        What puts it on the model.

    Raises:
        AdapterExistsError: the name is taken.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    manager.check_alive()
    check_name(loading.name)
    if not isinstance(loading.config, AdapterConfig | None):
        raise ConfigError(f"config must be a config such as LoraConfig, not {loading.config!r:.60}", field="config")
    if loading.name in manager.configs and not replace:
        raise AdapterExistsError(
            f"the base model already carries an adapter {loading.name!r}: give this one another adapter_name, "
            "or use load_adapter() on the model that has it to replace it"
        )
    hub = {key: value for key, value in loading.options.items() if key in HUB_OPTIONS and value is not None}
    saved = checkpoint.read_checkpoint(str(source), device=_device(manager, loading), **hub)
    config = (loading.config or saved.config).copy(inference_mode=not loading.trainable)
    # Merged weights are not the base's: they would be told to be another base.
    note = None if manager.merged else checkpoint.compare(saved.metadata, manager.model)
    plan = manager.plan(config, loading.name)
    loaded = checkpoint.from_file(
        saved.tensors,
        expected(manager.model, plan),
        peft_type=str(config.peft_type),
        key_mapping=loading.key_mapping,
        rename=checkpoint.renames_of(manager.model),
        ignore_mismatched=bool(loading.options.get("ignore_mismatched_sizes", False)),
    )
    _tell(source, loaded, note)
    _tell_replaced(manager, loading.name, plan, loaded.weights)
    put = manager.prepare(
        loading.name, plan, loaded.weights, trainable=loading.trainable, half=loading.half, replace=replace
    )

    def load() -> LoadResult:
        put()
        return LoadResult(loaded.missing, loaded.unexpected)

    return load


def expected(model: nn.Module, plan: InjectionPlan) -> checkpoint.Expected:
    """What a file must hold for a plan."""
    modules = {site.path: site.module for site in walk(model)} if plan.copies or plan.biases else {}
    copies = {
        path: {name: tuple(tensor.shape) for name, tensor in modules[path].state_dict().items()} for path in plan.copies
    }
    biases = {name: modules[name.rpartition(".")[0]]._parameters["bias"] for name in plan.biases}
    base = {name: tuple(bias.shape) for name, bias in biases.items() if bias is not None}
    embeddings = {name: tuple(tensor.shape) for name, tensor in embedding_weights(model).items()}
    return checkpoint.Expected(
        adapters={target.path: target.shapes for target in plan.targets},
        copies=copies,
        base=base,
        shared=plan.shared,
        optional={name: shape for name, shape in embeddings.items() if name.rpartition(".")[0] not in plan.copies},
        others=not_floating({path: modules[path] for path in plan.copies}),
    )


def not_floating(modules: Mapping[str, nn.Module]) -> dict[str, torch.dtype]:
    """Name -> dtype of all tensors of modules that hold no floating numbers."""
    return {
        f"{path}.{name}": tensor.dtype
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
        if not tensor.is_floating_point()
    }


def embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """Names in the bare model -> weights of the input and output embeddings, where it has any."""
    wanted: set[int] = set()
    for output in (False, True):
        module = embedding_of(model, output=output)
        if module is not None:
            wanted.update(id(child) for child in module.modules())
    if not wanted:
        return {}
    return {
        f"{site.path}.weight": weight
        for site in walk(model)
        if (id(site.module) in wanted or id(site.wrapper) in wanted)
        and isinstance(weight := site.module._parameters.get("weight"), Tensor)
    }


def _tell_replaced(manager: AdapterManager, name: str, plan: InjectionPlan, weights: AdapterWeights) -> None:
    """Warns of tensors of the base that a file brings with other values, and leaves out those it has already.

    Raises:
        CheckpointError: the base's own has no data here, so that it could not be brought back.
    """
    brought = [key for key in weights.base if key not in plan.biases]
    present = {**embedding_weights(manager.model), **manager.replaced_in_base(name)} if brought else {}
    for key in brought:
        own, new = present[key], weights.base[key]
        if own.is_meta:
            raise CheckpointError(
                f"the adapter brings its own {key}, which is not in memory here: load the model whole"
            )
        if torch.equal(new.to(own.device, own.dtype), own):
            del weights.base[key]
    replaced = [key for key in brought if key in weights.base]
    if replaced:
        warnings.warn(
            f"adapter {name!r} brings its own {few(replaced)}: the base model has them, whichever adapter is active, "
            "until this one is deleted",
            stacklevel=5,
        )


def _device(manager: AdapterManager, loading: Loading) -> str:
    """Where to read to: the device asked for, or the base model's when it is on one only."""
    asked = loading.options.get("torch_device")
    if asked is not None:
        return str(asked)
    devices = {str(parameter.device) for parameter in manager.model.parameters()}
    return devices.pop() if len(devices) == 1 and devices != {"meta"} else "cpu"


def _tell(source: object, loaded: checkpoint.Loaded, note: str | None) -> None:
    for what, keys in (("missing from {source}", loaded.missing), ("in the file for nothing here", loaded.unexpected)):
        if keys:
            shown = ", ".join(shortened(key, 120) for key in keys[:3])
            shown += f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            count = "1 adapter key" if len(keys) == 1 else f"{len(keys)} adapter keys"
            verb = "is" if len(keys) == 1 else "are"
            warnings.warn(f"{count} {verb} {what.format(source=source)}: {shown}", stacklevel=5)
    if loaded.mismatched:
        warnings.warn(f"{len(loaded.mismatched)} tensors of another shape were left out", stacklevel=5)
    if note is not None and not note.startswith("the adapter does not say"):
        warnings.warn(note, stacklevel=5)


def save(
    manager: AdapterManager,
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    embeddings: str | bool = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    flat: bool = False,
    converted: bool = False,
) -> dict[str, checkpoint.WrittenFiles]:
    """Saves adapters.

    Args:
        manager: has them.
        folder: ``default`` goes into it, others into subfolders.
        names: which ones; all if None.
        embeddings: also save the embeddings; "auto" decides from the model.
        state_dict: take tensors from here, under the names they have in the handle.
        flat: put the one adapter named into the folder itself, whatever its name.
        converted: write adapters that started in a part of the base as plain LoRA.

    Returns:
        Adapter name -> what was written.
    """
    chosen = list(manager.names if names is None else names)
    manager.require(*chosen)
    print_ = None if manager.merged else checkpoint.fingerprint(manager.model)
    places: dict[str, str] = {}
    ready: dict[str, tuple[AdapterConfig, Mapping[str, Tensor]]] = {}
    for name in chosen:
        places[name] = "" if name == _ROOT_ADAPTER or flat else name
        paths = [path for path, layer in manager.layers.items() if name in layer.adapters._modules]
        weights, config = _saved_weights(manager, name, embeddings, state_dict), manager.configs[name]
        if converted:
            config, weights = _without_weight(manager, name, weights)
        config = checkpoint.config_to_save(config, manager.model, targets=paths)
        ready[places[name]] = config, _under_keys(config, weights)
    if not ready:
        return {}
    card = ready[""][0] if "" in ready else _first_config(manager)  # as PEFT does, whichever adapters it saves
    written = checkpoint.write_checkpoints(folder, ready, fingerprint=print_, card=card, tags=_card_tags(manager.model))
    return {name: written[place] for name, place in places.items()}


def _without_weight(
    manager: AdapterManager, name: str, weights: AdapterWeights
) -> tuple[AdapterConfig, AdapterWeights]:
    """The config and tensors of an adapter as those of one that is not initialised from the weight."""
    config = manager.configs[name]
    rewrite = method_of(config).without_weight
    if rewrite is None or not config.initialised_from_weight:
        warnings.warn(f"adapter {name!r} did not start in a part of the base: it is saved as it is", stacklevel=5)
        return config, weights
    adapters = {path: layer.adapters._modules.get(name) for path, layer in manager.layers.items()}
    try:
        return rewrite(config, adapters, weights)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r} cannot be converted: {error}") from None


def _first_config(manager: AdapterManager) -> AdapterConfig:
    return next(iter(manager.configs.values()))


def _card_tags(model: nn.Module) -> list[str]:
    """What the base model says of itself, and its library."""
    tags = [tag for tag in getattr(model, "model_tags", None) or () if isinstance(tag, str)]
    of_transformers = getattr(getattr(model, "config", None), "model_type", None) is not None
    return [*tags, *(["transformers"] if of_transformers else [])]


def file_tensors(
    manager: AdapterManager,
    name: str,
    *,
    embeddings: str | bool = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of an adapter under the keys of a file."""
    weights = _saved_weights(manager, name, embeddings, state_dict)
    return _under_keys(manager.configs[name], weights)


def _under_keys(config: AdapterConfig, weights: AdapterWeights) -> dict[str, Tensor]:
    tensors = checkpoint.to_file(weights, peft_type=str(config.peft_type))
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _saved_weights(
    manager: AdapterManager, name: str, embeddings: str | bool, state_dict: Mapping[str, Tensor] | None
) -> AdapterWeights:
    """The tensors that a file of an adapter holds; see ``save`` for the arguments."""
    weights = manager.weights(name)
    targeted = _adapted_embeddings(manager, name)
    if embeddings is True or (embeddings == "auto" and (targeted or _vocabulary_resized(manager.model))):
        present = embedding_weights(manager.model)
        if not present:
            warnings.warn(
                "save_embedding_layers: the model has no get_input_embeddings() that tells its embeddings; none is "
                "saved",
                stacklevel=4,
            )
        for key, value in present.items():
            path = key.rpartition(".")[0]
            if path not in weights.copies and (path in manager.layers or not targeted):
                weights.base[key] = value
    return weights if state_dict is None else _picked(weights, name, state_dict)


def _picked(weights: AdapterWeights, name: str, state_dict: Mapping[str, Tensor]) -> AdapterWeights:
    """The same tensors out of a state dict that was gathered from elsewhere."""

    def find(key: str, own: Tensor | None = None) -> Tensor:
        path, _, leaf = key.rpartition(".")
        for prefix in ("base_model.model.", ""):
            for spelt in (key, f"{path}.base_layer.{leaf}", f"{path}.original_module.{leaf}"):
                if prefix + spelt in state_dict:
                    return state_dict[prefix + spelt]
        if own is not None:
            return own
        raise AdapterError(f"the state dict has no {key!r} of adapter {name!r}")

    return AdapterWeights(
        {path: {k: find(f"{path}.adapters.{name}.{k}") for k in named} for path, named in weights.adapters.items()},
        {
            path: {k: find(f"{path}.modules_to_save.{name}.{k}") for k in named}
            for path, named in weights.copies.items()
        },
        {key: find(key, own) for key, own in weights.base.items()},
        {key: _shared_in(state_dict, f"adapters.{name}.shared.{key}", own) for key, own in weights.shared.items()},
    )


def _shared_in(state_dict: Mapping[str, Tensor], ending: str, own: Tensor) -> Tensor:
    return next((value for key, value in state_dict.items() if key.endswith(ending)), own)


def _adapted_embeddings(manager: AdapterManager, name: str) -> list[str]:
    """Paths of embeddings and output heads, by their names, whose whole weight an adapter changes."""
    layers = {path: layer for path, layer in manager.layers.items() if path.rpartition(".")[2] in _EMBEDDING_NAMES}
    return [
        path for path, layer in layers.items() if name in layer.adapters._modules and not layer.adapter(name).is_tied
    ]


def tell_of_embeddings(manager: AdapterManager, names: Sequence[str] | None, embeddings: str | bool) -> None:
    """Warns whoever called the caller where whole embeddings are saved though nobody asked for them."""
    adapted = [path for name in names or manager.names for path in _adapted_embeddings(manager, name)]
    if embeddings == "auto" and (adapted or _vocabulary_resized(manager.model)):
        why = f"{adapted[0]} is adapted" if adapted else "the vocabulary was resized"
        warnings.warn(f"{why}: whole embeddings are saved along (not with save_embedding_layers=False)", stacklevel=3)


def _vocabulary_resized(model: nn.Module) -> bool:
    """Whether the vocabulary differs from the one in the folder the base was loaded from.

    A base from the hub is not asked for: saving never goes to the network.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    source = Path(str(getattr(config, "_name_or_path", "") or "")) / "config.json"
    if size is None or not source.is_file():
        return False
    try:
        return bool(json.loads(source.read_text(encoding="utf-8")).get("vocab_size", size) != size)
    except (OSError, ValueError):
        return False


def push(manager: AdapterManager, repo_id: str, **kwargs: Any) -> Any:
    """Saves all adapters into a temporary folder and uploads it."""
    manager.check_alive()
    with checkpoint.scratch_folder() as folder:
        save(manager, folder)
        return checkpoint.push(folder, repo_id, **kwargs)


def write_card(manager: AdapterManager, folder: str | os.PathLike[str]) -> None:
    """Writes or updates the README of a saved adapter."""
    manager.check_alive()
    checkpoint.write_card(folder, _first_config(manager), tags=_card_tags(manager.model))
