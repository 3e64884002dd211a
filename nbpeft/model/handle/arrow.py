"""``create_arrow_model``: routes tokens over several saved adapters (Arrow, GenKnowSub)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.variant_configs import ArrowConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import base_model_of, manager_of
from nbpeft.errors import ConfigError, few
from nbpeft.model.handle.peft_model import PeftModel

ROUTER = "arrow_router"
"""Name of the routing adapter."""


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Loads LoRA adapters and routes each token to the most suitable ones.

    The algorithm is in ``nbpeft.engine.methods.lora.variants.arrow``.

    The adapters are named task_0, task_1, … and gks_0, gks_1, …, and an adapter ``arrow_router`` is active. LoRA
    adapters that are added later take part in the routing. Each one can also be activated by itself.

    Args:
        base_model: the model, changed in place; unchanged after an error.
        task_specific_adapter_paths: folders or hub ids of the adapters to route over, all on the same linear layers.
            ``user/repo/sub/folder`` names a folder in a hub repository.
        arrow_config: options of the routing; its fields for adapter names are set.
        general_adapter_paths: adapters whose mean is subtracted from the others, with ``use_gks``; all must then have
            the same rank.
        **adapter_kwargs: keyword arguments of ``PeftModel.from_pretrained``.

    Returns:
        The model with these adapters, of which the router is active.

    Raises:
        ConfigError: an argument is missing, or the adapters cannot be combined.
        CheckpointError: an adapter cannot be read or does not fit.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    general_paths = general_adapter_paths or () if arrow_config.use_gks else ()
    tasks = {f"task_{index}": path for index, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{index}": path for index, path in enumerate(general_paths)}
    model = base_model_of(base_model)
    manager = manager_of(model) or AdapterManager(model)
    first, *others = [(name, *repository_of(path)) for name, path in (tasks | general).items()]
    with manager.transaction():
        AdapterManager.attach(model, manager)
        name, source, options = first
        handle = PeftModel.from_pretrained(model, source, name, **{**options, **adapter_kwargs})
        for name, source, options in others:
            handle.load_adapter(source, name, **{**options, **adapter_kwargs})
        handle.add_adapter(ROUTER, _router_config(manager, arrow_config, [*tasks, *general]))
        handle.set_adapter(ROUTER)
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = [*tasks], [*general]
    return handle


def repository_of(path: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """Splits a path into a folder or hub id, and options with the folder inside the hub repository."""
    name = os.fspath(path)
    parts = name.strip("/").split("/")
    if os.path.isdir(name) or len(parts) < 3:
        return name, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def _router_config(manager: AdapterManager, settings: ArrowConfig, names: Sequence[str]) -> LoraConfig:
    """Returns the config of a router over adapters."""
    paths = {name: {*manager.layers_with(name)} for name in names}
    for name in names:
        differing = sorted(paths[names[0]] ^ paths[name])
        if differing:
            raise ConfigError(f"{names[0]!r} and {name!r} adapt different layers, such as {few(differing, 2)}")
    config: Any = manager.configs[names[0]]
    # None for the names, so that adapters that are added later take part in the routing.
    own = replace(settings, task_adapter_names=None, gks_adapter_names=None)
    targets = sorted(paths[names[0]])
    return LoraConfig(arrow_config=own, target_modules=targets, r=config.adapter_size or 8, task_type=config.task_type)
