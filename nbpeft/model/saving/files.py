"""Saving the adapters of a manager, in folders and on the hub."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import inside
from nbpeft.engine.config.config_checks import check_choice
from nbpeft.engine.contract.adapter import (
    ADAPTER_PARTS,
    Adapter,
    AdapterConfig,
    AdapterWeights,
    InitialComponent,
    TiedAdapter,
    Untargeted,
    WeightInitialized,
    source_of,
)
from nbpeft.engine.contract.model_adapter import HasSideNetwork, ModelAdapter
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.shared_state import listed_name
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.views.part_names import name_on_model, shown_name
from nbpeft.engine.wrappers.fake_quant import is_prepared_quantization_aware
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, few
from nbpeft.model.saving.loading import fitted
from nbpeft.model.saving.offloaded import adapters_onloaded, embedding_weights
from nbpeft.model.saving.residuals import left_start, mark_left, take_out_of_saved
from nbpeft.model.saving.saved_places import note_saved, note_written_over, owner_of
from nbpeft.model.saving.sharded import gathered, is_sharded, noted_fingerprint, warn_of_shards
from nbpeft.names import DEFAULT_ADAPTER

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_WRAPPED = ("", ".base_layer")
"""Alternatives for the part of a key between the path of an embedding and its weight."""


Rewrite = Callable[[str, AdapterConfig, AdapterWeights], tuple[AdapterConfig, AdapterWeights]]


def base_name(model: nn.Module) -> str | None:
    """Returns the name or path of a base model; None if it has none."""
    return model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None) or None


def with_base_name(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Returns a copy of a new adapter's config with the base model's name, adjusted to a prepared base model.

    Raises:
        ConfigError: the base was prepared for quantization-aware adapters, which this method does not support.
    """
    name, former = base_name(model), config.base_model_name_or_path
    if name and former not in (None, name):
        warnings.warn(f"base_model_name_or_path of the config was renamed from {former!r} to {name!r}", stacklevel=5)
    completed = config.copy(base_model_name_or_path=name or former)
    return completed.rounded() if is_prepared_quantization_aware(model) else completed


def save(
    manager: AdapterManager,
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    embeddings: str | bool = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    flat: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rewrite: Rewrite | None = None,
    mark_saved: bool = True,
    facts: checkpoint.CardFacts | None = None,
    tags: Sequence[str] = (),
    pickled: bool = False,
    write: bool = True,
    base: checkpoint.Fingerprint | None = None,
    replace: bool = True,
) -> dict[str, checkpoint.WrittenFiles]:
    """Saves adapters. If they are sharded over processes, all processes call this and one writes.

    Args:
        manager: manager of the model.
        folder: folder for ``default``; other adapters are saved in subfolders.
        names: names of the adapters; None for all.
        embeddings: also save the embeddings; "auto" decides from the model.
        state_dict: take the tensors from this dictionary, under their names in the PeftModel.
        flat: save the only adapter in ``names`` into the folder itself, whatever its name.
        initial: save adapters whose init changed the base weights as plain LoRA for the original base. This folder has
            the initial adapter, which is read for an adapter on a base without that change.
        rewrite: (name, config, tensors) -> config and tensors to write instead.
        mark_saved: mark the adapters as saved; False for temporary folders and converted adapters.
        facts: information for the model card in addition to the config.
        tags: tags for the model card in addition to the base model's.
        pickled: write the tensors as PEFT's former ``.bin``.
        write: whether this process writes.
        base: fingerprint of the base model, computed before sharding; computed here by default.
        replace: overwrite another adapter in the folder, which is the default as in PEFT.

    Returns:
        Adapter name -> written files.

    Raises:
        AdapterExistsError: a folder has another adapter, and ``replace`` is False.
        CheckpointError: the folder's name is empty, which would be the working directory.
    """
    if not checkpoint.expanded(folder):
        raise CheckpointError("the name of the folder is empty: pass '.' for the working directory")
    chosen = list(manager.names if names is None else names)
    manager.require(*chosen)
    with manager.active_state.hold():  # a training in the background changes the tensors that are read here
        print_ = _fingerprint(manager, take=write) if base is None else base
        places: dict[str, str] = {}
        notes: dict[str, Mapping[str, str]] = {}
        ready: dict[str, tuple[AdapterConfig, Mapping[str, Tensor]]] = {}
        for name in chosen:
            places[name] = "" if name == DEFAULT_ADAPTER or flat else name
            with manager.reading():
                paths = [*manager.layers_with(name)]
                weights, config = _saved_weights(manager, name, embeddings, state_dict), manager.configs[name]
                warn_of_shards(manager, name, weights)
                notes[places[name]] = left_start(manager, name) if initial is None else {}
                if notes[places[name]]:
                    take_out_of_saved(manager, name, weights)
            if initial is not None or _loses_start(manager, name):
                config, weights = _without_weight(manager, name, weights, initial)
            if rewrite is not None:
                config, weights = rewrite(name, config, weights)
            config = checkpoint.config_to_save(config, manager.model, targets=paths)
            ready[places[name]] = config, _under_keys(config, weights)
            ready |= _parts(manager, name, places[name])
        if not ready or not write:
            return {}
        targets = {name: Path(os.path.expanduser(folder), place) for name, place in places.items()}
        if not replace:
            for name, target in targets.items():
                _refuse_other(manager, name, target, ready[places[name]][1], print_)
        card = _card_config(manager, ready[""][0] if "" in ready else manager.configs[manager.names[0]])
        written = checkpoint.write_checkpoints(
            folder,
            ready,
            fingerprint=print_,
            notes=notes,
            card=card,
            tags=[*_card_tags(manager.model), *tags],
            facts=facts,
            pickled=pickled,
            names={place: os.path.basename(place) for place in ready} | {place: name for name, place in places.items()},
        )
    for name in chosen:
        if notes[places[name]]:
            mark_left(manager, name)
    if mark_saved:
        note_saved(manager, targets)
    else:  # a converted adapter or a temporary copy
        note_written_over(targets.values())
    return {name: written[place] for name, place in places.items()}


def _parts(manager: AdapterManager, name: str, place: str) -> dict[str, tuple[AdapterConfig, Mapping[str, Tensor]]]:
    """Returns subfolder -> config and tensors by key of the other adapters that an adapter consists of."""
    with manager.reading():
        return {
            os.path.join(place, part): (
                checkpoint.config_to_save(config, manager.model),
                _under_keys(config, AdapterWeights(tensors)),
            )
            for part, (config, tensors) in method_of(manager.configs[name]).files.parts(manager, name).items()
        }


def refuse_other_adapters(manager: AdapterManager, folder: str | os.PathLike[str]) -> None:
    """Checks before a long computation that saving all adapters would not overwrite another one.

    Raises:
        AdapterExistsError: the folder, or an adapter's subfolder, has another adapter.
    """
    home = Path(os.path.expanduser(folder))
    targets = {name: home if name == DEFAULT_ADAPTER else home / name for name in manager.names}
    with manager.active_state.hold():
        base = _fingerprint(manager) if any(map(inside.leads_to_folder, targets.values())) else None
        for name, target in targets.items():
            if inside.leads_to_folder(target):
                with manager.reading():
                    weights, config = _saved_weights(manager, name, "auto", None), manager.configs[name]
                if _loses_start(manager, name):
                    config, weights = _without_weight(manager, name, weights, None)
                _refuse_other(manager, name, target, _under_keys(config, weights), base)


def _fingerprint(manager: AdapterManager, *, take: bool = True) -> checkpoint.Fingerprint | None:
    """Returns the base model's fingerprint; None if it cannot be computed (merged or sharded weights) or must not."""
    noted = noted_fingerprint(manager.model)
    if noted is None and take and not manager.merged and not is_sharded(manager.model):
        return checkpoint.fingerprint(manager.model)
    return noted


def _refuse_other(
    manager: AdapterManager, name: str, folder: Path, tensors: Mapping[str, Tensor], base: checkpoint.Fingerprint | None
) -> None:
    """Refuses to overwrite another adapter."""
    owner = owner_of(manager, name, folder)
    if owner is None:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        embeddings = [key.rpartition(".") for key in embedding_weights(manager.model)]
        optional = {f"{checkpoint.PREFIX}{path}{middle}.{leaf}" for path, _, leaf in embeddings for middle in _WRAPPED}
        found = checkpoint.other_adapter(folder, name, shapes, base, optional=optional)
    else:
        of_another = " of another model" if owner == name else ""
        found = f"another adapter, {owner!r}{of_another}" if owner else ""
    if found:
        where = checkpoint.shown(folder)
        raise AdapterExistsError(
            f"{where} holds {found}: choose another folder for {name!r}, or replace it (replace=…)", name=name
        )


def _loses_start(manager: AdapterManager, name: str) -> bool:
    """Returns whether an adapter's file must include its initial component, because it cannot be reconstructed."""
    if not manager.configs[name].initialised_from_weight:
        return False  # its base does not have the initial component
    adapters = (layer.adapter(name) for layer in manager.layers_with(name).values())
    return any(isinstance(adapter, WeightInitialized) and adapter.loses_start for adapter in adapters)


def _without_weight(
    manager: AdapterManager, name: str, weights: AdapterWeights, initial: str | os.PathLike[str] | None
) -> tuple[AdapterConfig, AdapterWeights]:
    """Returns the config and tensors of an adapter, converted so that its init does not change the base weights."""
    config = manager.configs[name]
    rewrite = method_of(config).files.without_weight
    if rewrite is not None and initial is not None and not (weights.starts or config.initialised_from_weight):
        weights.starts = _starts_in(initial, manager, name)
    if rewrite is None or not (weights.starts or config.initialised_from_weight):
        warnings.warn(f"the init of adapter {name!r} did not change the base: it is saved as it is", stacklevel=5)
        return config, weights
    adapters = {path: layer.adapters._modules.get(name) for path, layer in manager.layers.items()}
    try:
        return rewrite(config, adapters, weights)
    except AdapterError as error:
        raise AdapterError(
            f"Passing `path_initial_model_for_weight_conversion` to `save_pretrained` cannot convert {name!r}: {error}"
        ) from None
    except KeyError as error:
        raise AdapterError(
            f"{name!r} cannot be converted: the state dict has no {error} of one of its layers"
        ) from None


def _starts_in(folder: str | os.PathLike[str], manager: AdapterManager, name: str) -> dict[str, InitialComponent]:
    """Returns path -> initial factors of an adapter, from the folder to which it was saved after its init."""
    saved = checkpoint.read_checkpoint(str(folder))
    if saved.config.initialised_from_weight:
        raise CheckpointError(
            f"{folder} is not the initial adapter of {name!r}: its init_lora_weights must be True, as PEFT saves it"
        )
    plan, loaded = fitted(manager, name, saved.config, saved.tensors)
    adapters, starts = manager.weights(name).adapters, {}
    for target in plan.targets:
        tensors, (down, up, *_) = loaded.weights.adapters[target.path], target.shapes
        own = adapters.get(target.path, {})
        if any(key not in own or own[key].shape != tensors[key].shape for key in (down, up)):
            raise CheckpointError(
                f"{folder} is not the initial adapter of {name!r}: {target.path} has another rank there, or no factors"
            )
        starts[target.path] = InitialComponent(tensors[down], -tensors[up], "", (down, up))
    return starts


def _card_config(manager: AdapterManager, config: AdapterConfig) -> AdapterConfig:
    """Returns the config for the model card, which names the base only if that has a config, like models on the hub."""
    has_config = hasattr(manager.model, "config")
    return config if has_config else config.copy(base_model_name_or_path=None)


def _card_tags(model: nn.Module) -> list[str]:
    """Returns tags for the model card: the base model's own tags and its library."""
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
    """Returns the tensors of an adapter under the keys of a file; see ``save`` for the arguments."""
    with manager.reading():
        weights, config = _saved_weights(manager, name, embeddings, state_dict), manager.configs[name]
    return _under_keys(config, weights)


def _under_keys(config: AdapterConfig, weights: AdapterWeights) -> dict[str, Tensor]:
    tensors = checkpoint.to_file(weights, peft_type=method_of(config).peft_type)
    derived = method_of(config).files.derived
    for named in weights.adapters.values() if derived is not None else ():
        tensors.update(derived(config, named))  # type: ignore[misc]
    whole = {key: gathered(tensors[key]) for key in sorted(tensors)}  # gathering needs the same order in each process
    return dict(method_of(config).files.pack(config, {key: whole[key] for key in tensors}))


def _saved_weights(
    manager: AdapterManager, name: str, embeddings: str | bool, state_dict: Mapping[str, Tensor] | None
) -> AdapterWeights:
    """Returns the tensors to save for an adapter; see ``save`` for the arguments."""
    check_choice("save_embedding_layers", embeddings, ("auto", True, False, None))
    with adapters_onloaded(manager, name):
        weights = manager.weights(name)
    targeted = _adapted_embeddings(manager, name)
    if embeddings is True or (embeddings == "auto" and (targeted or vocabulary_resized(manager.model))):
        present = embedding_weights(manager.model, loaded=True)
        if not present:
            warnings.warn(
                "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. None is "
                "saved: the model has no get_input_embeddings()",
                stacklevel=4,
            )
        for key, value in present.items():
            path = key.rpartition(".")[0]
            if path not in weights.copies and (path in manager.layers or not targeted):
                weights.base[key] = value
    return weights if state_dict is None else _picked(manager, weights, name, state_dict)


def replaced_state_dict(model: nn.Module, manager: AdapterManager) -> Mapping[str, Tensor] | None:
    """Returns the result of a ``state_dict`` that a script set or hooked into, e.g. to gather shards; None without one.

    A method that returns only an adapter's file is ignored, because those tensors are the model's own. Hooks on a
    sharded model are those of the library that sharded it.
    """
    hooked = (model._state_dict_hooks or model._state_dict_pre_hooks) and not is_sharded(manager.model)
    found: Mapping[str, Tensor] | None = model.state_dict() if "state_dict" in vars(model) or hooked else None
    types = {name: method_of(config).peft_type for name, config in manager.configs.items()}
    return found if found and any(checkpoint.is_of_a_model(found, *item) for item in types.items()) else None


class _StateDict:
    """The tensors of a state dict, under any of the names that an adapted model has for them.

    Args:
        tensors: name -> tensor.

    Attributes:
        missing: names of tensors that ``present`` has not found.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.missing: list[str] = []

    def find(self, key: str) -> Tensor | None:
        """The tensor of a name in the bare model, or None."""
        path, _, leaf = key.rpartition(".")
        for prefix in ("base_model.model.", "base_model.", ""):
            for spelt in (key, f"{path}.base_layer.{leaf}", f"{path}.original_module.{leaf}"):
                if prefix + spelt in self._tensors:
                    return self._tensors[prefix + spelt]
        return None

    def present(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors that it has, by the adapter's names.

        Args:
            keys: the adapter's name -> name in the bare model.
        """
        found = {own: self.find(key) for own, key in keys.items()}
        self.missing.extend(keys[own] for own, tensor in found.items() if tensor is None)
        return {own: tensor for own, tensor in found.items() if tensor is not None}

    def shared(self, key: str, name: str, own: Tensor) -> Tensor:
        """A tensor that the layers of adapter ``name`` share, or ``own`` if the state dict lacks it."""
        endings = (f"{ADAPTER_PARTS}.{name}.shared.{key}", f".{listed_name(key, name)}", f".{key}.{name}")
        return next((value for key, value in self._tensors.items() if key.endswith(endings)), own)


def _picked(
    manager: AdapterManager, weights: AdapterWeights, name: str, state_dict: Mapping[str, Tensor]
) -> AdapterWeights:
    """Returns the same weights with the tensors of a state dict, e.g. one that was gathered from a sharded model.

    Tensors of the adapter that it lacks are left out with a warning, as in PEFT.
    """
    given = _StateDict(state_dict)
    places = checkpoint.Places(weights.adapters, weights.copies, weights.parameters)
    adapters = {path: manager.layers[path].adapter(name) for path in weights.adapters}
    own_names = {
        path: adapter.paths_by_name_in_files() if isinstance(adapter, ModelAdapter) else {}
        for path, adapter in adapters.items()
    }
    own = {
        id(adapter): given.present(
            {
                k: _listed_as(manager.layers[path], places.of_adapter(path), adapter, own_names[path].get(k, k), name)
                for k in weights.adapters[path]
            }
        )
        for path, adapter in adapters.items()
        if source_of(adapter) is None
    }
    copies = {
        path: given.present({k: f"{path}.modules_to_save.{name}.{k}" for k in named})
        for path, named in weights.copies.items()
    }
    _warn_of_missing(manager.configs[name], name, given.missing, has_some=any((*own.values(), *copies.values())))
    return AdapterWeights(
        {
            path: own[id(adapter)]
            if not isinstance(adapter, TiedAdapter) or adapter.source is None
            else adapter.tied_tensors(weights.adapters[path], own[id(adapter.source)])
            for path, adapter in adapters.items()
        },
        copies,
        {key: own if (tensor := given.find(key)) is None else tensor for key, own in weights.base.items()},
        {key: given.shared(key, name, own) for key, own in weights.shared.items()},
        weights.parameters,
        weights.starts,
    )


def _listed_as(layer: AdaptedLayer, path: str, adapter: Adapter, own: str, name: str) -> str:
    """Returns the name of a parameter of an adapter below ``base_model``, its base model or the handle."""
    if isinstance(adapter, HasSideNetwork):
        return name_on_model(adapter, own, name)
    return f"{adapter.peft.shown_as}.{name}.{own}" if layer.is_outside else f"{path}.{shown_name(adapter, own, name)}"


def _warn_of_missing(config: AdapterConfig, name: str, missing: Sequence[str], *, has_some: bool) -> None:
    """Warns of tensors of an adapter that a state dict lacks.

    Raises:
        AdapterError: it has none of the adapter's tensors, or the adapter is a prompt, which is saved as a whole.
    """
    if not missing:
        return
    lacks = f"the state dict has no {few(missing)} of adapter {name!r}"
    if not has_some or config.learns_prompt:
        raise AdapterError(lacks)
    warnings.warn(f"{lacks}: it is saved without them", stacklevel=6)


def _adapted_embeddings(manager: AdapterManager, name: str) -> list[str]:
    """Returns paths of embeddings and output heads, recognized by name, whose weight an adapter changes."""
    return [
        path
        for path, layer in manager.layers_with(name).items()
        if path.rpartition(".")[2] in _EMBEDDING_NAMES and not isinstance(layer.adapter(name), Untargeted)
    ]


def warn_of_saved_embeddings(manager: AdapterManager, names: Sequence[str] | None, embeddings: str | bool) -> None:
    """Warns if whole embeddings are saved although the caller did not request it; see ``save`` for the arguments."""
    adapted = [path for name in names or manager.names for path in _adapted_embeddings(manager, name)]
    if embeddings == "auto" and (adapted or vocabulary_resized(manager.model)):
        targeted = f"embedding layers found in `target_modules`, {adapted[0]}" if adapted else ""
        warnings.warn(
            f"Setting `save_embedding_layers` to `True` as {targeted or 'the vocabulary was resized'}: "
            "whole embeddings are saved too; save_embedding_layers=False prevents it",
            stacklevel=3,
        )


def vocabulary_resized(model: nn.Module) -> bool:
    """Returns whether the vocabulary size differs from that in the folder from which the base was loaded.

    False for a base from the hub, because saving must not access the network.
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


def push(
    manager: AdapterManager,
    repo_id: str,
    *,
    name: str | None = None,
    facts: checkpoint.CardFacts | None = None,
    tags: Sequence[str] = (),
    replace: bool = True,
    **kwargs: Any,
) -> str:
    """Saves adapters into a temporary folder and uploads it.

    Args:
        manager: manager of the model.
        repo_id: ``user/name``.
        name: the adapter to save in the root of the repository; None saves all, with ``default`` in the root and the
            others in folders.
        facts: information for the model card in addition to the config; the text of an existing card is preserved.
        tags: tags for the model card in addition to the base model's.
        replace: overwrite another adapter in the repository, which is the default as in PEFT.
        **kwargs: as for ``checkpoint.push``.

    Returns:
        The URL of the commit.

    Raises:
        AdapterExistsError: the repository has another adapter, and ``replace`` is False.
    """
    manager.check_alive()
    hub = {key: kwargs.get(key) for key in ("token", "revision", "endpoint")}
    with checkpoint.scratch_folder() as folder:
        if facts is not None and (present := checkpoint.present_file(repo_id, "README.md", **hub)):
            (folder / "README.md").write_bytes(present.encode())
        names = list(manager.names) if name is None else [name]
        save(manager, folder, names=names, flat=name is not None, facts=facts, tags=tags, mark_saved=False)
        if not replace:
            own = (folder / checkpoint.CONFIG_NAME).read_text(encoding="utf-8")
            found = checkpoint.other_config(checkpoint.present_file(repo_id, checkpoint.CONFIG_NAME, **hub), own)
            if found:
                raise AdapterExistsError(
                    f"{repo_id} holds {found}: choose another repository for {names[0]!r}, or replace it (replace=…)",
                    name=names[0],
                )
        pushed = checkpoint.push(folder, repo_id, **kwargs)
    mark_saved(manager, *names)
    return pushed


def write_card(manager: AdapterManager, folder: str | os.PathLike[str]) -> None:
    """Writes or updates the README of the adapter that is saved in a folder."""
    manager.check_alive()
    first = manager.configs[manager.names[0]]
    checkpoint.write_card(folder, _card_config(manager, first), tags=_card_tags(manager.model))
