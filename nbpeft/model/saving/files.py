"""Loading and saving the adapters of a manager."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from nbpeft import checkpoint
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.config.config_checks import check_choice
from nbpeft.engine.config.module_paths import wrapper_places
from nbpeft.engine.config.targets import with_target
from nbpeft.engine.contract.adapter import (
    ADAPTER_PARTS,
    AdapterConfig,
    AdapterWeights,
    HasFixedTensors,
    StartsInWeight,
    TakenOver,
    Untargeted,
    UsesAnother,
    source_of,
)
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.shared_state import listed_name
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.engine.injection.plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import bare_modules, manager_of
from nbpeft.engine.views.part_modules import shown_name
from nbpeft.engine.wrappers.fake_quant import is_prepared_quantization_aware
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, ConfigError, few
from nbpeft.model.saving.given_configs import take_given
from nbpeft.model.saving.offloaded import adapter_onloaded, embedding_weights, refuse_offloaded
from nbpeft.model.saving.residuals import START, config_on, kept_start, left_start, mark_left, take_out_of_saved
from nbpeft.model.saving.saved_places import note_place, note_saved, note_written_over, owner_of
from nbpeft.model.saving.sharded import gathered, is_sharded, noted_fingerprint, warn_of_shards
from nbpeft.names import DEFAULT_ADAPTER

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")
_WRAPPED = ("", ".base_layer")
"""Alternatives for the part of a key between the path of an embedding and its weight."""


Rewrite = Callable[[str, AdapterConfig, AdapterWeights], tuple[AdapterConfig, AdapterWeights]]


class LoadResult(NamedTuple):
    """Keys that did not match while loading.

    Attributes:
        missing_keys: names in the model of the adapter's tensors that were not given. Unlike PEFT's they do not include
            the tensors of the base model, which are not in adapter files.
        unexpected_keys: given keys that do not belong to the adapter.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        return repr(_IncompatibleKeys(*self))


def load_result(
    manager: AdapterManager, name: str, missing: Sequence[str], unexpected: Sequence[str], *, bare: bool = False
) -> LoadResult:
    """Returns the keys that did not match while an adapter was loaded, under the model's names.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        missing: missing keys, as in a file.
        unexpected: unexpected keys, as they were given.
        bare: the model is not a PeftModel, so that its names have no prefix.
    """
    if not missing:
        return LoadResult([], list(unexpected))
    prefix = "" if bare else checkpoint.PREFIX
    in_model = {key: key for key in (f"{prefix}{own}" for own in manager.model.state_dict())}
    names = checkpoint.keys_of_a_file(in_model, name, method_of(manager.configs[name]).peft_type)
    wanted = [checkpoint.without_prefix(key) if bare else key for key in missing]
    return LoadResult([names.get(key, key) for key in wanted], list(unexpected))


def with_base_name(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Returns a copy of a new adapter's config with the base model's name, adjusted to a prepared base model.

    Raises:
        ConfigError: the base was prepared for quantization-aware adapters, which this method does not support.
    """
    name = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    former = config.base_model_name_or_path
    if name and former not in (None, name):
        warnings.warn(f"base_model_name_or_path of the config was renamed from {former!r} to {name!r}", stacklevel=5)
    completed = config.copy(base_model_name_or_path=name or former)
    return completed.rounded() if is_prepared_quantization_aware(model) else completed


def saved_config(model: nn.Module, source: str | os.PathLike[str], options: Mapping[str, Any]) -> AdapterConfig | None:
    """Returns the config of a saved adapter if the model has adapters, because then the base depends on it."""
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    if manager_of(model) is None or checkpoint.lora_file(source) is not None:
        return None
    return checkpoint.read_config(source, **hub)


def read(
    manager: AdapterManager,
    source: str | os.PathLike[str],
    name: str,
    *,
    trainable: bool,
    half: bool,
    config: AdapterConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    options: Mapping[str, Any],
) -> Callable[[], LoadResult]:
    """Reads a saved adapter and checks that it fits; changes nothing yet.

    Args:
        manager: manager of the base model.
        source: a folder, a hub id, or a single file with keys as in kohya's or diffusers' files (see ``lora_file``).
        name: name to give the adapter.
        trainable: whether it is trainable while active.
        half: use a half-precision base's dtype for it.
        config: used instead of the saved config.
        key_mapping: regular expression -> replacement, applied to the keys of the file.
        options: PEFT's further keyword arguments: hub options, ``torch_device``, ``ignore_mismatched_sizes``.

    Returns:
        A function that adds the adapter to the model.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    manager.check_alive()
    check_name(name)
    if not isinstance(config, AdapterConfig | None):
        raise ConfigError(f"config must be a config such as LoraConfig, not {config!r:.60}", field="config")
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    device = _device(manager, options.get("torch_device"))
    single = None if hub.keys() & {"subfolder", "revision"} else checkpoint.lora_file(source)
    if single is not None:
        saved = checkpoint.read_lora_file(single, (path for path, _ in bare_modules(manager.model)), device)
    else:
        saved = checkpoint.read_checkpoint(str(source), device=device, **hub)
    given = config
    if config is None:
        find = functools.partial(_part_in, saved.folder)
        config = method_of(saved.config).files.with_parts(saved.config, find, options)
    config, tensors = saved.reconciled(config.copy(inference_mode=not trainable))
    note = base_mismatch(manager, saved.metadata)
    config = of_former_file(manager.model, config, tensors)
    settings: dict[str, Any] = {"key_mapping": key_mapping}
    settings["ignore_mismatched"] = bool(options.get("ignore_mismatched_sizes", False))
    plan, loaded = fitted(manager, name, config, tensors, **settings)
    starts = kept_start(manager, name, config, saved, loaded.weights)
    on_base = manager.configs[name] if starts else config_on(manager.model, config, saved.metadata)
    if on_base is not config:
        plan, loaded = fitted(manager, name, on_base.copy(inference_mode=not trainable), tensors, **settings)
        loaded.weights.starts = starts
    elif START in saved.metadata:
        note = None  # the adapter was saved for a base with other weights
    form = checkpoint.prompt_format(saved.config)
    _warn_of_mismatches(source, loaded, note, checkpoint.other_classes(manager.model, form))
    _check_base_tensors(manager, name, plan, loaded.weights)
    put = manager.prepare(name, plan, loaded.weights, replace=True, trainable=trainable, training=trainable, half=half)

    def load() -> LoadResult:
        with manager.transaction() as change:
            put()
            if starts:
                mark_left(manager, name)
            change.on_undo(checkpoint.name_classes(manager.model, form))
            if given is not None:
                take_given(manager, name, given, change, loading=True)
            result = load_result(manager, name, [*loaded.missing, *loaded.mismatched], loaded.unexpected)
        if single is None and not hub and os.path.isdir(os.path.expanduser(source)):
            note_place(manager, name, source)
        return result

    return load


def _part_in(folder: Path, part: str) -> str | None:
    """Returns the folder of an adapter that is saved in a subfolder of another adapter's folder; None if there is none.

    PEFT writes whole models into such subfolders, under other keys; these are not adapters.
    """
    if not (folder / part / checkpoint.CONFIG_NAME).is_file():
        return None
    keys = checkpoint.read_checkpoint(folder / part).unread.header
    return str(folder / part) if all(key.startswith(checkpoint.PREFIX) for key in keys) else None


def fitted(
    manager: AdapterManager,
    name: str | None,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor] | checkpoint.UnreadTensors,
    **options: Any,
) -> tuple[InjectionPlan, checkpoint.Loaded]:
    """Returns the plan of a config, and the tensors of its file assigned to the plan's layers.

    A file can have several pairs of factors although its config requests a tied pair: PEFT unties them when a model is
    moved to a device, and never ties those of an encoder and a decoder. Then the plan does not tie them either.

    Args:
        manager: manager of the base model.
        name: name of an adapter that the new one replaces, or None.
        config: config of the adapter.
        tensors: key in the file -> tensor, already read or not.
        **options: options of ``checkpoint.from_file``.

    Raises:
        CheckpointError: the file does not fit.
    """
    plan = manager.plan(config, name)
    conversion = checkpoint.key_conversion_of(manager.model)
    settings = {"peft_type": method_of(config).peft_type, "conversion": conversion, **options}
    loaded = checkpoint.from_file(tensors, expected(manager.model, plan), **settings)
    if further := _copied_by_peft(manager.model, config, loaded.unexpected):
        names = [*config.modules_to_save, *further]  # type: ignore[attr-defined]
        return fitted(manager, name, config.copy(modules_to_save=names), tensors, **options)
    plan.share_in(loaded.weights)
    apart = plan.not_tied_in(loaded.weights)
    if not apart:
        return plan, loaded
    paths = [apart[0].tied_to, *(target.path for target in plan.targets if target.tied_to)]
    warnings.warn(
        f"the file has different tensors for {few([target.path for target in apart])} and {paths[0]}, although its "
        "config has ensure_weight_tying: they are loaded untied and are trained separately",
        stacklevel=5,
    )
    untied: Any = config.copy(ensure_weight_tying=False)
    for path in paths:
        untied.target_modules = with_target(untied.target_modules, path)
    return fitted(manager, name, untied, tensors, **options)


def _copied_by_peft(model: nn.Module, config: AdapterConfig, keys: Iterable[str]) -> list[str]:
    """Returns the modules of which keys are tensors, and whose names end with one in ``modules_to_save``.

    PEFT trains them too, e.g. DistilBERT's ``pre_classifier`` for ``classifier``.
    """
    names = tuple(getattr(config, "modules_to_save", None) or ())
    modules = {path for path, _ in bare_modules(model) if path.endswith(names)} if names else set()
    parents = {key.removeprefix(checkpoint.PREFIX).rpartition(".")[0] for key in keys} if modules else set()
    return sorted(path for path in modules if any(f"{parent}.".startswith(f"{path}.") for parent in parents))


def expected(model: nn.Module, plan: InjectionPlan) -> checkpoint.Expected:
    """Returns the keys and shapes that a file for a plan must have."""
    modules = dict(bare_modules(model)) if plan.copies or plan.biases else {}
    copies = {
        path: {name: tuple(tensor.shape) for name, tensor in modules[path].state_dict().items()} for path in plan.copies
    }
    biases = {name: modules[name.rpartition(".")[0]]._parameters["bias"] for name in plan.biases}
    base = {name: tuple(bias.shape) for name, bias in biases.items() if bias is not None}
    embeddings = {name: tuple(tensor.shape) for name, tensor in embedding_weights(model).items()}
    return checkpoint.Expected(
        adapters={target.path: target.saved_shapes for target in plan.targets},
        copies=copies,
        base=base,
        shared=plan.saved_shared,
        optional={name: shape for name, shape in embeddings.items() if name.rpartition(".")[0] not in plan.copies},
        others=not_floating({path: modules[path] for path in plan.copies}) | fixed_dtypes(plan),
        parameters=[target.path for target in plan.targets if target.is_bare],
        recomputable={
            f"{target.path}.{name}"
            for target in plan.targets
            if issubclass(target.adapter_class, HasFixedTensors)
            for name in target.adapter_class.optional_tensors
        },
    )


def fixed_dtypes(plan: InjectionPlan) -> dict[str, torch.dtype]:
    """Returns name -> dtype of an adapter's saved tensors that are neither trained nor floating-point."""
    shared = method_of(plan.config).shares.state
    found = {} if shared is None else shared.other_dtypes(plan.saved_shared)
    return {
        **{f"{checkpoint.SHARED_PREFIX}{name}": dtype for name, dtype in found.items()},
        **{
            f"{target.path}.{name}": dtype
            for target in plan.targets
            for name, (_, dtype) in target.fixed.items()
            if not dtype.is_floating_point
        },
    }


def not_floating(modules: Mapping[str, nn.Module]) -> dict[str, torch.dtype]:
    """Returns name -> dtype of the modules' tensors that are not floating-point."""
    return {
        f"{path}.{name}": tensor.dtype
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
        if not tensor.is_floating_point()
    }


def drop_unchanged(weights: AdapterWeights, present: Mapping[str, Tensor]) -> list[str]:
    """Removes a file's base tensors that equal those of the base model.

    Args:
        weights: weights read from the file, changed in place.
        present: name in the bare model -> tensor of the base model.

    Returns:
        Names in ``present`` whose values differ.
    """
    brought = [key for key in weights.base if key in present]
    for key in brought:
        if torch.equal(weights.base[key].to(present[key]), present[key]):
            del weights.base[key]
    return [key for key in brought if key in weights.base]


def _check_base_tensors(manager: AdapterManager, name: str, plan: InjectionPlan, weights: AdapterWeights) -> None:
    """Removes a file's base tensors that equal those of the base model, and warns about those that differ."""
    brought = [key for key in weights.base if key not in plan.biases]
    known = {**embedding_weights(manager.model, loaded=True), **manager.replaced_in_base(name)} if brought else {}
    replaced = drop_unchanged(weights, {key: known[key] for key in brought})
    refuse_offloaded(manager.model, replaced)
    if replaced:
        warnings.warn(
            f"adapter {name!r} has its own {few(replaced)}: the base model uses them, whichever adapter is active, "
            "until this one is deleted",
            stacklevel=5,
        )


def _device(manager: AdapterManager, wanted: object) -> str:
    """Returns the device to load tensors to: the requested one, or the base model's if it has only one."""
    if wanted is not None:
        return str(wanted)
    parameters = (module._parameters.values() for module in called_modules(manager.model))
    devices = {str(parameter.device) for own in parameters for parameter in own if parameter is not None}
    return devices.pop() if len(devices) == 1 and devices != {"meta"} else "cpu"


def warn_of_other_shapes(loaded: checkpoint.Loaded) -> None:
    """Warns if tensors were skipped because of their shape (``ignore_mismatched_sizes``)."""
    if loaded.mismatched:
        count = "1 tensor" if len(loaded.mismatched) == 1 else f"{len(loaded.mismatched)} tensors"
        warnings.warn(f"{count} of another shape skipped: {few(loaded.mismatched, 3)}", stacklevel=6)


def _warn_of_mismatches(source: object, loaded: checkpoint.Loaded, *notes: str | None) -> None:
    for what, keys in (("missing from {source}", loaded.missing), ("unexpected in {source}", loaded.unexpected)):
        if keys:
            count = "1 adapter key is" if len(keys) == 1 else f"{len(keys)} adapter keys are"
            warnings.warn(f"{count} {what.format(source=source)}: {few(keys, 3)}", stacklevel=5)
    warn_of_other_shapes(loaded)
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=5)


def base_mismatch(manager: AdapterManager, metadata: Mapping[str, str]) -> str | None:
    """Returns how the base model differs from that of a saved adapter; None if it does not, or if that is unknown."""
    if manager.merged or checkpoint.Fingerprint.from_metadata(metadata) is None:
        return None  # merged weights have another fingerprint than the base
    return checkpoint.compare(metadata, manager.model)


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
    """
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
                paths = [path for path, layer in manager.layers.items() if name in layer.adapters._modules]
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
        base = _fingerprint(manager) if any(target.is_dir() for target in targets.values()) else None
        for name, target in targets.items():
            if target.is_dir():
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
    adapters: Iterable[Any] = (layer.adapters._modules.get(name) for layer in manager.layers.values())
    return any(isinstance(adapter, StartsInWeight) and adapter.loses_start for adapter in adapters)


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


def _starts_in(folder: str | os.PathLike[str], manager: AdapterManager, name: str) -> dict[str, TakenOver]:
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
        starts[target.path] = TakenOver(tensors[down], -tensors[up], "", (down, up))
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
    with adapter_onloaded(manager, name):
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
    """Returns the result of a ``state_dict`` method that was set on a model, e.g. to gather shards; None without one.

    A method that returns only an adapter's file is ignored, because those tensors are the model's own.
    """
    replaced = vars(model).get("state_dict")
    found: Mapping[str, Tensor] | None = None if replaced is None else replaced()
    types = {name: method_of(config).peft_type for name, config in manager.configs.items()}
    return found if found and any(checkpoint.is_of_a_model(found, *item) for item in types.items()) else None


def _picked(
    manager: AdapterManager, weights: AdapterWeights, name: str, state_dict: Mapping[str, Tensor]
) -> AdapterWeights:
    """Returns the same weights with the tensors of a state dict, e.g. one that was gathered from a sharded model."""

    def find(key: str, own: Tensor | None = None) -> Tensor:
        path, _, leaf = key.rpartition(".")
        for prefix in ("base_model.model.", "base_model.", ""):
            for spelt in (key, f"{path}.base_layer.{leaf}", f"{path}.original_module.{leaf}"):
                if prefix + spelt in state_dict:
                    return state_dict[prefix + spelt]
        if own is not None:
            return own
        raise AdapterError(f"the state dict has no {key!r} of adapter {name!r}")

    places = wrapper_places(weights.parameters)
    adapters = {path: manager.layers[path].adapter(name) for path in weights.adapters}
    own_names = {
        path: adapter.paths_by_name_in_files() if isinstance(adapter, ModelAdapter) else {}
        for path, adapter in adapters.items()
    }
    own = {
        id(adapter): {
            k: find(
                f"{adapter.peft.shown_as}.{name}.{own_names[path].get(k, k)}"
                if manager.layers[path].is_outside
                else f"{places.get(path, path)}.{shown_name(adapter, own_names[path].get(k, k), name)}"
            )
            for k in weights.adapters[path]
        }
        for path, adapter in adapters.items()
        if source_of(adapter) is None
    }
    return AdapterWeights(
        {
            path: own[id(adapter)]
            if not isinstance(adapter, UsesAnother) or adapter.source is None
            else adapter.tied_tensors(weights.adapters[path], own[id(adapter.source)])
            for path, adapter in adapters.items()
        },
        {
            path: {k: find(f"{path}.modules_to_save.{name}.{k}") for k in named}
            for path, named in weights.copies.items()
        },
        {key: find(key, own) for key, own in weights.base.items()},
        {
            key: _shared_in(state_dict, (f"{ADAPTER_PARTS}.{name}.shared.{key}", f".{listed_name(key, name)}"), own)
            for key, own in weights.shared.items()
        },
        weights.parameters,
        weights.starts,
    )


def _shared_in(state_dict: Mapping[str, Tensor], endings: tuple[str, ...], own: Tensor) -> Tensor:
    return next((value for key, value in state_dict.items() if key.endswith(endings)), own)


def _adapted_embeddings(manager: AdapterManager, name: str) -> list[str]:
    """Returns paths of embeddings and output heads, recognized by name, whose weight an adapter changes."""
    layers = {path: layer for path, layer in manager.layers.items() if path.rpartition(".")[2] in _EMBEDDING_NAMES}
    return [
        path
        for path, layer in layers.items()
        if name in layer.adapters._modules and not isinstance(layer.adapter(name), Untargeted)
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
