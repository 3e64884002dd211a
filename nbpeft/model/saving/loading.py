"""Loading adapters onto the model of a manager: files are read and checked before the model changes."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from nbpeft import checkpoint
from nbpeft.checkpoint import inside
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.config.targets import with_target
from nbpeft.engine.contract.adapter import (
    AdapterConfig,
    AdapterWeights,
    HasFixedTensors,
)
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import bare_modules, manager_of
from nbpeft.errors import ConfigError, few
from nbpeft.model.saving.offloaded import embedding_weights, refuse_offloaded
from nbpeft.model.saving.residuals import START, config_on, kept_start, mark_left
from nbpeft.model.saving.saved_places import note_place
from nbpeft.model.saving.user_configs import adopt_config

HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")


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
    saved, is_folder = _saved(manager, source, options)
    given = config
    if config is None:
        find = functools.partial(_part_in, saved.folder)
        config = method_of(saved.config).files.with_parts(saved.config, find, options)
    config, tensors = _named_as_in_files(saved, name).reconciled(config.copy(inference_mode=not trainable))
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
    modes: dict[str, Any] = {"trainable": trainable, "training": trainable, "half": half}
    put = manager.prepare(name, plan, loaded.weights, replace=True, **modes)

    def load() -> LoadResult:
        with manager.transaction() as change:
            put()
            if starts:
                mark_left(manager, name)
            change.on_undo(checkpoint.name_classes(manager.model, form))
            if given is not None:
                adopt_config(manager, name, given, change, loading=True)
            result = load_result(manager, name, [*loaded.missing, *loaded.mismatched], loaded.unexpected)
        if is_folder:
            note_place(manager, name, source)
        return result

    return load


def _saved(
    manager: AdapterManager, source: str | os.PathLike[str], options: Mapping[str, Any]
) -> tuple[checkpoint.Checkpoint, bool]:
    """Reads a saved adapter; its tensors are read later.

    Args:
        manager: manager of the base model.
        source: a folder, a hub id, or a single file.
        options: hub options and ``torch_device``.

    Returns:
        The saved adapter, and whether it is the one in a local folder itself.
    """
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    device = _device(manager, options.get("torch_device"))
    single = None if hub.keys() & {"subfolder", "revision"} else checkpoint.lora_file(source)
    if single is not None:
        paths = (path for path, _ in bare_modules(manager.model))
        return checkpoint.read_lora_file(single, paths, device), False
    saved = checkpoint.read_checkpoint(source, device=device, **hub)
    return saved, not hub and os.path.isdir(os.path.expanduser(source))


def _named_as_in_files(saved: checkpoint.Checkpoint, name: str) -> checkpoint.Checkpoint:
    """Returns a saved adapter with keys of files; scripts save those of the model, which contain the adapter's name."""
    peft_type = method_of(saved.config).peft_type
    if not checkpoint.is_of_a_model(saved.unread.header, name, peft_type):
        return saved
    renamed = saved.unread.changed(lambda tensors: checkpoint.keys_of_a_file(tensors, name, peft_type))
    return replace(saved, unread=renamed)


def _part_in(folder: Path, part: str) -> str | None:
    """Returns the folder of an adapter that is saved in a subfolder of another adapter's folder; None if there is none.

    PEFT writes whole models into such subfolders, under other keys; these are not adapters.
    """
    if not inside.leads_to_file(folder / part / checkpoint.CONFIG_NAME):
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
    plan = manager.plan(config, name, is_new=False)
    conversion = checkpoint.key_conversion_of(manager.model)
    settings = {"peft_type": method_of(config).peft_type, "conversion": conversion, **options}
    loaded = checkpoint.from_file(tensors, expected(manager.model, plan), **settings)
    if further := _copied_by_peft(manager.model, config, plan, loaded.unexpected):
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


def _copied_by_peft(model: nn.Module, config: AdapterConfig, plan: InjectionPlan, keys: Iterable[str]) -> list[str]:
    """Returns the modules that a file has tensors of, and whose names end with a name in ``modules_to_save``.

    PEFT trains them too, e.g. DistilBERT's ``pre_classifier`` for ``classifier``. Those that the plan copies are left
    out.
    """
    names = tuple(getattr(config, "modules_to_save", None) or ())
    if not names or not keys:
        return []
    copied, given = tuple(f"{path}." for path in plan.copies), {key.removeprefix(checkpoint.PREFIX) for key in keys}
    return sorted(
        path
        for path, module in bare_modules(model)
        if path.endswith(names)
        and path not in names
        and not f"{path}.".startswith(copied)
        and any(f"{path}.{name}" in given for name in module.state_dict())
    )


def expected(model: nn.Module, plan: InjectionPlan) -> checkpoint.Expected:
    """Returns the keys and shapes that a file for a plan must have."""
    modules = dict(bare_modules(model)) if plan.copies or plan.biases else {}
    biases = {name: modules[name.rpartition(".")[0]]._parameters["bias"] for name in plan.biases}
    embeddings = shapes_of(embedding_weights(model))
    return checkpoint.Expected(
        adapters={target.path: target.saved_shapes for target in plan.targets},
        copies={path: shapes_of(modules[path].state_dict()) for path in plan.copies},
        base=shapes_of({name: bias for name, bias in biases.items() if bias is not None}),
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


def shapes_of(named: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


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
    known = {**embedding_weights(manager.model, loaded=True), **manager.biases.originals(name)} if brought else {}
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
