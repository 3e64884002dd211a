"""Loading and saving the adapters of a manager: the step between the engine and the checkpoint package."""

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

from nbpeft import checkpoint
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.config.module_paths import wrapper_places
from nbpeft.engine.config.targets import with_target
from nbpeft.engine.contract.adapter import (
    ADAPTER_PARTS,
    AdapterConfig,
    AdapterWeights,
    HasFixedTensors,
    StartsInWeight,
    TakenOver,
    UsesAnother,
)
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.engine.injection.plan import InjectionPlan
from nbpeft.engine.peft_names.peft_modules import shown_name
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import bare_modules, embedding_of, manager_of
from nbpeft.engine.wrappers.fake_quant import is_prepared_quantization_aware
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, ConfigError, few
from nbpeft.model.saving.given_configs import take_given
from nbpeft.model.saving.residuals import START, config_on, kept_start, left_start, mark_left, take_out_of_saved
from nbpeft.model.saving.saved_places import note_place, note_saved, note_written_over, owner_of
from nbpeft.model.saving.sharded import gathered, is_sharded, noted_fingerprint
from nbpeft.names import DEFAULT_ADAPTER

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")
_WRAPPED = ("", ".base_layer")
"""What stands in a key between the path of an embedding and its weight."""


Rewrite = Callable[[str, AdapterConfig, AdapterWeights], tuple[AdapterConfig, AdapterWeights]]


class LoadResult(NamedTuple):
    """What did not match while loading.

    Attributes:
        missing_keys: names in the model of those of the adapter's tensors that were not given. Unlike PEFT's they
            have none of the base model among them, which no adapter file holds.
        unexpected_keys: keys that were given and name nothing of the adapter.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_result(
    manager: AdapterManager, name: str, missing: Sequence[str], unexpected: Sequence[str], *, bare: bool = False
) -> LoadResult:
    """Returns what did not match while an adapter was loaded, under the model's names.

    Args:
        manager: has the adapter.
        name: of the adapter.
        missing: keys of a file.
        unexpected: keys as they were given.
        bare: whether the model has no handle, whose names have a prefix.
    """
    if not missing:
        return LoadResult([], list(unexpected))
    prefix = "" if bare else checkpoint.PREFIX
    in_model = {key: key for key in (f"{prefix}{own}" for own in manager.model.state_dict())}
    names = checkpoint.keys_of_a_file(in_model, name, method_of(manager.configs[name]).peft_type)
    wanted = [checkpoint.without_prefix(key) if bare else key for key in missing]
    return LoadResult([names.get(key, key) for key in wanted], list(unexpected))


def with_base_name(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Returns a copy of a new adapter's config that names its base model, and is as that was prepared for.

    Raises:
        ConfigError: the base was prepared for adapters that act on rounded weights, and this one cannot.
    """
    name = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    given = config.base_model_name_or_path
    if name and given not in (None, name):
        warnings.warn(f"base_model_name_or_path of the config was renamed from {given!r} to {name!r}", stacklevel=5)
    made = config.copy(base_model_name_or_path=name or given)
    return made.rounded() if is_prepared_quantization_aware(model) else made


def saved_config(model: nn.Module, source: str | os.PathLike[str], options: Mapping[str, Any]) -> AdapterConfig | None:
    """The config of a saved adapter, where it matters to what base it goes: where a model carries adapters already."""
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
        manager: of the base model.
        source: a folder, a hub id, or one file with keys spelled as kohya's or diffusers' (see ``lora_file``).
        name: name to give it.
        trainable: whether it trains while active.
        half: keep it in a half-precision base's dtype.
        config: replaces the saved config.
        key_mapping: regular expressions that rename keys of the file.
        options: PEFT's further keywords: hub options, ``torch_device``, ``ignore_mismatched_sizes``.

    Returns:
        A function that puts it on the model.

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
    config, tensors = saved.beside(config.copy(inference_mode=not trainable))
    # Merged weights are not the base's: they would look like another base.
    note = None if manager.merged else checkpoint.compare(saved.metadata, manager.model)
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
        note = None  # its base is expected to have other weights
    _warn_of_mismatches(source, loaded, note)
    _check_base_tensors(manager, name, plan, loaded.weights)
    modes = {"trainable": trainable, "training": trainable, "half": half}
    put = manager.prepare(name, plan, loaded.weights, replace=True, **modes)

    def load() -> LoadResult:
        with manager.transaction() as change:
            put()
            if starts:
                mark_left(manager, name)
            if given is not None:
                take_given(manager, name, given, change, loading=True)
            result = load_result(manager, name, loaded.missing, loaded.unexpected)
        if single is None and not hub and os.path.isdir(os.path.expanduser(source)):
            note_place(manager, name, source)
        return result

    return load


def _part_in(folder: Path, part: str) -> str | None:
    """The place of an adapter that is saved in a folder inside another one's; None where there is none.

    PEFT writes whole models there under keys of its own, which are no adapters.
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
    """Returns the plan of a config, and the tensors of its file sorted in.

    A file may hold several pairs of factors where its config asks for one on tied layers: PEFT parts them when a model
    is moved, and those of an encoder and a decoder from the start. Then the plan has them apart, too.

    Args:
        manager: of the base model.
        name: of an adapter whose place the new one takes, if there is one.
        config: of the adapter.
        tensors: key in the file -> tensor, read or not.
        **options: those of ``checkpoint.from_file``.

    Raises:
        CheckpointError: the file does not fit.
    """
    plan = manager.plan(config, name)
    conversion = checkpoint.key_conversion_of(manager.model)
    settings = {"peft_type": method_of(config).peft_type, "conversion": conversion, **options}
    loaded = checkpoint.from_file(tensors, expected(manager.model, plan), **settings)
    plan.share_in(loaded.weights)
    apart = plan.not_tied_in(loaded.weights)
    if not apart:
        return plan, loaded
    paths = [apart[0].tied_to, *(target.path for target in plan.targets if target.tied_to)]
    warnings.warn(
        f"the file has other tensors for {few([target.path for target in apart])} than for {paths[0]}, though its "
        "config says ensure_weight_tying: they are loaded as they are and train apart",
        stacklevel=5,
    )
    untied: Any = config.copy(ensure_weight_tying=False)
    for path in paths:
        untied.target_modules = with_target(untied.target_modules, path)
    return fitted(manager, name, untied, tensors, **options)


def expected(model: nn.Module, plan: InjectionPlan) -> checkpoint.Expected:
    """Returns what a file must hold for a plan."""
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
        found_anew={
            f"{one.path}.{name}"
            for one in plan.targets
            if issubclass(one.adapter_class, HasFixedTensors)
            for name in one.adapter_class.optional_tensors
        },
    )


def fixed_dtypes(plan: InjectionPlan) -> dict[str, torch.dtype]:
    """Returns name -> dtype of what a file holds of an adapter that is neither trained nor floating-point."""
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
    """Returns name -> dtype of all tensors of modules that are not floating-point."""
    return {
        f"{path}.{name}": tensor.dtype
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
        if not tensor.is_floating_point()
    }


def embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns name in the bare model -> weight of the input and output embeddings, where there are any."""
    embeddings = [embedding_of(model, output=output) for output in (False, True)]
    wanted = {module for found in embeddings if found is not None for _, module in bare_modules(found)}
    return {
        f"{path}.weight": weight
        for path, module in (bare_modules(model) if wanted else ())
        if module in wanted and isinstance(weight := module._parameters.get("weight"), Tensor)
    }


def drop_unchanged(weights: AdapterWeights, present: Mapping[str, Tensor]) -> list[str]:
    """Drops the base tensors of a file that the base model has with the same values.

    Args:
        weights: as read from the file; changed in place.
        present: name in the bare model -> the base model's own tensor.

    Returns:
        Names of those among ``present`` that are left, because their values differ.
    """
    brought = [key for key in weights.base if key in present]
    for key in brought:
        if torch.equal(weights.base[key].to(present[key]), present[key]):
            del weights.base[key]
    return [key for key in brought if key in weights.base]


def _check_base_tensors(manager: AdapterManager, name: str, plan: InjectionPlan, weights: AdapterWeights) -> None:
    """Drops base tensors of a file that the base has already, and warns of those with other values.

    Raises:
        CheckpointError: the base's own tensor has no data here, so that it could not be restored.
    """
    brought = [key for key in weights.base if key not in plan.biases]
    known = {**embedding_weights(manager.model), **manager.replaced_in_base(name)} if brought else {}
    present = {key: known[key] for key in brought}
    offloaded = next((key for key, own in present.items() if own.is_meta), None)
    if offloaded is not None:
        raise CheckpointError(
            f"the adapter brings its own {offloaded}, which is not in memory here: load the model whole"
        )
    replaced = drop_unchanged(weights, present)
    if replaced:
        warnings.warn(
            f"adapter {name!r} brings its own {few(replaced)}: the base model has them, whichever adapter is active, "
            "until this one is deleted",
            stacklevel=5,
        )


def _device(manager: AdapterManager, wanted: object) -> str:
    """Returns the device to read to: the one asked for, or the base model's if it is on one device only."""
    if wanted is not None:
        return str(wanted)
    held = (module._parameters.values() for module in called_modules(manager.model))
    devices = {str(parameter.device) for own in held for parameter in own if parameter is not None}
    return devices.pop() if len(devices) == 1 and devices != {"meta"} else "cpu"


def _warn_of_mismatches(source: object, loaded: checkpoint.Loaded, note: str | None) -> None:
    for what, keys in (("missing from {source}", loaded.missing), ("in the file for nothing here", loaded.unexpected)):
        if keys:
            count = "1 adapter key is" if len(keys) == 1 else f"{len(keys)} adapter keys are"
            warnings.warn(f"{count} {what.format(source=source)}: {few(keys, 3)}", stacklevel=5)
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
    initial: str | os.PathLike[str] | None = None,
    rewrite: Rewrite | None = None,
    mark_saved: bool = True,
    facts: checkpoint.CardFacts | None = None,
    pickled: bool = False,
    write: bool = True,
    base: checkpoint.Fingerprint | None = None,
    replace: bool = True,
) -> dict[str, checkpoint.WrittenFiles]:
    """Saves adapters. Where they are sharded over processes, all of them call it, and one writes.

    Args:
        manager: has them.
        folder: ``default`` goes into it, others into subfolders.
        names: which ones; all if None.
        embeddings: also save the embeddings; "auto" decides from the model.
        state_dict: take tensors from here, under the names they have in the handle.
        flat: put the one adapter named into the folder itself, whatever its name.
        initial: write adapters that started in a part of the base as plain LoRA for the whole of it; a folder of the
            adapter as it was at its start, which is read for one on a base without that part.
        rewrite: (name, config, tensors) -> what is written in their place.
        mark_saved: whether the folder is one that stays, so that the adapters are no longer unsaved.
        facts: what the card says besides the config.
        pickled: write the tensors as PEFT's old ``.bin``.
        write: whether this process writes.
        base: fingerprint of the base model, taken before that was sharded; taken here by default.
        replace: write over another adapter that a folder holds; by default as PEFT does.

    Returns:
        Adapter name -> what was written.

    Raises:
        AdapterExistsError: a folder holds another adapter, and that is not to be replaced.
    """
    chosen = list(manager.names if names is None else names)
    manager.require(*chosen)
    with manager.active_state.hold():  # a training in the background writes into what is read here
        print_ = _fingerprint(manager, take=write) if base is None else base
        places: dict[str, str] = {}
        notes: dict[str, Mapping[str, str]] = {}
        ready: dict[str, tuple[AdapterConfig, Mapping[str, Tensor]]] = {}
        for name in chosen:
            places[name] = "" if name == DEFAULT_ADAPTER or flat else name
            with manager.reading():
                paths = [path for path, layer in manager.layers.items() if name in layer.adapters._modules]
                weights, config = _saved_weights(manager, name, embeddings, state_dict), manager.configs[name]
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
        first = ready[""][0] if "" in ready else _first_config(manager)  # as PEFT does, whichever adapters it saves
        card = _card_config(manager, first)
        written = checkpoint.write_checkpoints(
            folder,
            ready,
            fingerprint=print_,
            notes=notes,
            card=card,
            tags=_card_tags(manager.model),
            facts=facts,
            pickled=pickled,
            names={place: os.path.basename(place) for place in ready} | {place: name for name, place in places.items()},
        )
    for name in chosen:
        if notes[places[name]]:
            mark_left(manager, name)
    if mark_saved:
        note_saved(manager, targets)
    else:  # something made of the adapters, or a copy that goes again
        note_written_over(targets.values())
    return {name: written[place] for name, place in places.items()}


def _parts(manager: AdapterManager, name: str, place: str) -> dict[str, tuple[AdapterConfig, Mapping[str, Tensor]]]:
    """Subfolder -> config and tensors by key of the other adapters that one consists of."""
    with manager.reading():
        return {
            os.path.join(place, part): (
                checkpoint.config_to_save(config, manager.model),
                _under_keys(config, AdapterWeights(tensors)),
            )
            for part, (config, tensors) in method_of(manager.configs[name]).files.parts(manager, name).items()
        }


def refuse_other_adapters(manager: AdapterManager, folder: str | os.PathLike[str]) -> None:
    """Refuses a folder where saving all adapters would replace another one, before anything is done for it.

    Raises:
        AdapterExistsError: the folder, or the one in it that an adapter goes into, holds another adapter.
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
    """The fingerprint of the base model; None where merged weights or a sharded model hide it, or it is not taken."""
    noted = noted_fingerprint(manager.model)
    if noted is None and take and not manager.merged and not is_sharded(manager.model):
        return checkpoint.fingerprint(manager.model)
    return noted


def _refuse_other(
    manager: AdapterManager,
    name: str,
    folder: Path,
    tensors: Mapping[str, Tensor],
    base: checkpoint.Fingerprint | None,
) -> None:
    """Refuses to write over another adapter.

    Raises:
        AdapterExistsError: the folder holds one.
    """
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
    """Whether a file of an adapter could not say what it started from, and has to hold that."""
    if not manager.configs[name].initialised_from_weight:
        return False  # it is for a base without that
    adapters: Iterable[Any] = (layer.adapters._modules.get(name) for layer in manager.layers.values())
    return any(isinstance(adapter, StartsInWeight) and adapter.loses_start for adapter in adapters)


def _without_weight(
    manager: AdapterManager, name: str, weights: AdapterWeights, initial: str | os.PathLike[str] | None
) -> tuple[AdapterConfig, AdapterWeights]:
    """The config and tensors of an adapter as those of one that is not initialised from the weight."""
    config = manager.configs[name]
    rewrite = method_of(config).files.without_weight
    if rewrite is not None and initial is not None and not (weights.starts or config.initialised_from_weight):
        weights.starts = _starts_in(initial, manager, name)
    if rewrite is None or not (weights.starts or config.initialised_from_weight):
        warnings.warn(f"adapter {name!r} did not start in a part of the base: it is saved as it is", stacklevel=5)
        return config, weights
    adapters = {path: layer.adapters._modules.get(name) for path, layer in manager.layers.items()}
    try:
        return rewrite(config, adapters, weights)
    except AdapterError as error:
        raise AdapterError(
            f"Passing `path_initial_model_for_weight_conversion` to `save_pretrained` cannot convert {name!r}: {error}"
        ) from None


def _starts_in(folder: str | os.PathLike[str], manager: AdapterManager, name: str) -> dict[str, TakenOver]:
    """Returns path -> the factors of an adapter at its start, from the folder that it was saved to then.

    Raises:
        CheckpointError: it cannot be read, or is not of the same layers and ranks.
    """
    saved = checkpoint.read_checkpoint(str(folder))
    if saved.config.initialised_from_weight:
        raise CheckpointError(
            f"{folder} is no start for {name!r}: its init_lora_weights must be True, as PEFT saves one for a base "
            "without what it started from"
        )
    plan, loaded = fitted(manager, name, saved.config, saved.tensors)
    adapters, starts = manager.weights(name).adapters, {}
    for target in plan.targets:
        tensors, (down, up, *_) = loaded.weights.adapters[target.path], target.shapes
        own = adapters.get(target.path, {})
        if any(key not in own or own[key].shape != tensors[key].shape for key in (down, up)):
            raise CheckpointError(f"{folder} is no start for {name!r}: {target.path} has another rank there, or none")
        starts[target.path] = TakenOver(tensors[down], -tensors[up], "", (down, up))
    return starts


def _first_config(manager: AdapterManager) -> AdapterConfig:
    return next(iter(manager.configs.values()))


def _card_config(manager: AdapterManager, config: AdapterConfig) -> AdapterConfig:
    """Returns what a card describes: it names the base only if that has a config of its own, as those on the hub."""
    has_config = hasattr(manager.model, "config")
    return config if has_config else config.copy(base_model_name_or_path=None)


def _card_tags(model: nn.Module) -> list[str]:
    """Returns the base model's own tags, and its library."""
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
    """Returns the tensors of an adapter under the keys of a file."""
    with manager.reading():
        weights, config = _saved_weights(manager, name, embeddings, state_dict), manager.configs[name]
    return _under_keys(config, weights)


def _under_keys(config: AdapterConfig, weights: AdapterWeights) -> dict[str, Tensor]:
    tensors = checkpoint.to_file(weights, peft_type=method_of(config).peft_type)
    derived = method_of(config).files.derived
    for named in weights.adapters.values() if derived is not None else ():
        tensors.update(derived(config, named))  # type: ignore[misc]
    whole = {key: gathered(tensors[key]) for key in sorted(tensors)}  # each process in one order
    return dict(method_of(config).files.pack(config, {key: whole[key] for key in tensors}))


def _saved_weights(
    manager: AdapterManager, name: str, embeddings: str | bool, state_dict: Mapping[str, Tensor] | None
) -> AdapterWeights:
    """Returns the tensors that a file of an adapter holds; see ``save`` for the arguments."""
    weights = manager.weights(name)
    targeted = _adapted_embeddings(manager, name)
    if embeddings is True or (embeddings == "auto" and (targeted or vocabulary_resized(manager.model))):
        present = embedding_weights(manager.model)
        if not present:
            warnings.warn(
                "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. None is "
                "saved: it has no get_input_embeddings() that names them",
                stacklevel=4,
            )
        for key, value in present.items():
            path = key.rpartition(".")[0]
            if path not in weights.copies and (path in manager.layers or not targeted):
                weights.base[key] = value
    return weights if state_dict is None else _picked(manager, weights, name, state_dict)


def replaced_state_dict(model: nn.Module, manager: AdapterManager) -> Mapping[str, Tensor] | None:
    """Returns what a ``state_dict`` that was put on a model gives, as one that gathers shards; None if there is none.

    One that gives only an adapter's file counts as none: those tensors are the model's own.
    """
    replaced = vars(model).get("state_dict")
    found: Mapping[str, Tensor] | None = None if replaced is None else replaced()
    types = {name: method_of(config).peft_type for name, config in manager.configs.items()}
    return found if found and any(checkpoint.is_of_a_model(found, *item) for item in types.items()) else None


def _picked(
    manager: AdapterManager, weights: AdapterWeights, name: str, state_dict: Mapping[str, Tensor]
) -> AdapterWeights:
    """Returns the same tensors taken from a state dict, such as one gathered from a sharded model."""

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
                if manager.layers[path].is_passed_over
                else f"{places.get(path, path)}.{shown_name(adapter, own_names[path].get(k, k), name)}"
            )
            for k in weights.adapters[path]
        }
        for path, adapter in adapters.items()
        if adapter.source is None
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
            key: _shared_in(state_dict, f"{ADAPTER_PARTS}.{name}.shared.{key}", own)
            for key, own in weights.shared.items()
        },
        weights.parameters,
        weights.starts,
    )


def _shared_in(state_dict: Mapping[str, Tensor], ending: str, own: Tensor) -> Tensor:
    return next((value for key, value in state_dict.items() if key.endswith(ending)), own)


def _adapted_embeddings(manager: AdapterManager, name: str) -> list[str]:
    """Paths of embeddings and output heads, by their names, whose whole weight an adapter changes."""
    layers = {path: layer for path, layer in manager.layers.items() if path.rpartition(".")[2] in _EMBEDDING_NAMES}
    return [
        path for path, layer in layers.items() if name in layer.adapters._modules and not layer.adapter(name).is_tied
    ]


def warn_of_saved_embeddings(manager: AdapterManager, names: Sequence[str] | None, embeddings: str | bool) -> None:
    """Warns if whole embeddings are saved although that was not asked for."""
    adapted = [path for name in names or manager.names for path in _adapted_embeddings(manager, name)]
    if embeddings == "auto" and (adapted or vocabulary_resized(manager.model)):
        targeted = f"embedding layers found in `target_modules`, {adapted[0]}" if adapted else ""
        warnings.warn(
            f"Setting `save_embedding_layers` to `True` as {targeted or 'the vocabulary was resized'}: "
            "whole embeddings are saved along (not with save_embedding_layers=False)",
            stacklevel=3,
        )


def vocabulary_resized(model: nn.Module) -> bool:
    """Returns whether the vocabulary differs from the one in the folder the base was loaded from.

    False for a base from the hub: saving never goes to the network.
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
    replace: bool = True,
    **kwargs: Any,
) -> str:
    """Saves adapters into a temporary folder and uploads it.

    Args:
        manager: has them.
        repo_id: ``user/name``.
        name: the adapter that goes into the repository itself; None: ``default`` does, others go into folders.
        facts: what the card says besides the config; a card that the repository has keeps its own text.
        replace: upload over another adapter that the repository holds; by default as PEFT does.
        **kwargs: as for ``checkpoint.push``.

    Returns:
        The address of the commit.

    Raises:
        AdapterExistsError: the repository holds another adapter, and that is not to be replaced.
    """
    manager.check_alive()
    hub = {key: kwargs.get(key) for key in ("token", "revision", "endpoint")}
    with checkpoint.scratch_folder() as folder:
        if facts is not None:
            present = checkpoint.present_file(repo_id, "README.md", **hub)
            if present:
                (folder / "README.md").write_bytes(present.encode())
        names = list(manager.names) if name is None else [name]
        save(manager, folder, names=names, flat=name is not None, facts=facts, mark_saved=False)
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
    """Writes or updates the README of a saved adapter."""
    manager.check_alive()
    checkpoint.write_card(folder, _card_config(manager, _first_config(manager)), tags=_card_tags(manager.model))
